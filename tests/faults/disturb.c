/* Preloaded into a program: moves its wall clock by what a file says, and lets single looks at files fail.

   DISTURB_CLOCK: a file of one number, the seconds by which the clock is off; read anew each time.
   DISTURB_READS: "EVERY PART": of the looks (open for reading, stat, opendir) at paths that hold PART each EVERY-th
   fails, with EIO and ESTALE in turn. DISTURB_TALE: a file that gets a line for each. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int real_open(const char *path, int flags) {
    static int (*call)(const char *, int, ...);
    if (!call) call = REAL(open);
    return call(path, flags, 0644);
}

static long offset(void) {
    const char *file = getenv("DISTURB_CLOCK");
    char text[32] = {0};
    int saved = errno, descriptor = file ? real_open(file, O_RDONLY | O_CLOEXEC) : -1;
    if (descriptor >= 0) {
        if (read(descriptor, text, sizeof text - 1) < 0) text[0] = 0;
        close(descriptor);
    }
    errno = saved;
    return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*call)(clockid_t, struct timespec *);
    if (!call) call = REAL(clock_gettime);
    int result = call(clock, now);
    if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec fine;
    (void)zone;
    if (clock_gettime(CLOCK_REALTIME, &fine)) return -1;
    now->tv_sec = fine.tv_sec;
    now->tv_usec = fine.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}

static int fails(const char *path) {
    static atomic_int count, failed;
    const char *about = getenv("DISTURB_READS"), *part = about ? strchr(about, ' ') : NULL;
    if (!part || !path || !strstr(path, part + 1) || (atomic_fetch_add(&count, 1) + 1) % atoi(about)) return 0;
    int number = atomic_fetch_add(&failed, 1) % 2 ? ESTALE : EIO;
    const char *tale = getenv("DISTURB_TALE");
    int descriptor = tale ? real_open(tale, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC) : -1;
    if (descriptor >= 0) {
        dprintf(descriptor, "%d %s\n", number, path);
        close(descriptor);
    }
    errno = number;
    return 1;
}

#define OPEN(name)                                                             \
    int name(const char *path, int flags, ...) {                              \
        static int (*call)(const char *, int, ...);                           \
        va_list more;                                                          \
        if (!call) call = (__typeof__(call))dlsym(RTLD_NEXT, #name);          \
        va_start(more, flags);                                                 \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more);                                                          \
        if (!(flags & (O_CREAT | O_WRONLY | O_RDWR)) && fails(path)) return -1; \
        return call(path, flags, mode);                                        \
    }
OPEN(open)
OPEN(open64)

#define STAT(name, kind)                                                       \
    int name(const char *restrict path, struct kind *restrict about) {        \
        static int (*call)(const char *, struct kind *);                      \
        if (!call) call = (__typeof__(call))dlsym(RTLD_NEXT, #name);          \
        return fails(path) ? -1 : call(path, about);                           \
    }
STAT(stat, stat)
STAT(stat64, stat64)

DIR *opendir(const char *path) {
    static DIR *(*call)(const char *);
    if (!call) call = REAL(opendir);
    return fails(path) ? NULL : call(path);
}
