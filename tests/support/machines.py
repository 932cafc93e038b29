"""Several machines on one: each has its own network address, files, processes and host name, and Ray joins them.

A machine is a set of Linux namespaces. What it holds ends with its first process, and that with the pipe which the
test holds: nothing is left behind even where the test is killed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from program import environment
from repository import ROOT

Popen = subprocess.Popen[bytes]
_TOOLS = ("ip", "tc", "unshare", "nsenter", "mount", "hostname")
RAY_PORT = 6379
JOBS_PORT = 8265
_STARTS = 3
# Its own /tmp, /dev/shm and host name; of what lies in the user's /tmp only what is named is there.
_BOOT = """
set -e
name=$1; hosts=$2; shift 2
hostname "$name"
mount --bind "$hosts" /etc/hosts
mount -t tmpfs -o mode=1777 none /mnt
for kept in "$@"; do
    mkdir -p "/mnt/${kept#/tmp/}"
    mount --bind "$kept" "/mnt/${kept#/tmp/}"
done
mount --move /mnt /tmp
mkdir /tmp/home
mount -t tmpfs none /dev/shm
ip link set lo up
echo ready
cat  # until the test's end of the pipe is closed
exit
"""
# A Ray whose agents are not up within 15 s dies, and these start on a part of this machine's cores: they go first, for
# so long, by the niceness of their session.
_FIRST = """
{ echo -10 > /proc/self/autogroup; } 2> /dev/null
"$@"
code=$?
{ echo 0 > /proc/self/autogroup; } 2> /dev/null
exit $code
"""


@functools.cache
def why_not() -> str | None:
    """Why no machines can be made here; None where they can."""
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"there is no {', '.join(missing)} (Debian and Ubuntu: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "machines are made of namespaces, which takes root"
    tried = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "ip", "link", "add", "br0", "type", "bridge"]
    done = subprocess.run(tried, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"no namespaces or no bridge here: {done.stderr.strip()}"


def address_of(number: int) -> str:
    """The address of a machine by its number, from 0 in the order in which they are added."""
    return f"10.77.0.{number + 1}"


class Machine:
    """One machine.

    Args:
        name: Its host name.
        hosts: The file of all machines' names and addresses.
        kept: Folders below /tmp that it shares with this one.

    Attributes:
        address: Its IP address.
        port: Where its cable ends at the switch.
    """

    def __init__(self, name: str, hosts: Path, kept: Sequence[Path] = ()) -> None:
        self.name, self.address, self.port = name, "", ""
        spaces = ("--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")
        self._boot = subprocess.Popen(
            ["unshare", *spaces, "bash", "-c", _BOOT, "boot", name, hosts, *map(str, kept)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._boot.stdout is not None
        assert self._boot.stdout.readline() == "ready\n", f"{name} did not start"
        children = Path(f"/proc/{self._boot.pid}/task/{self._boot.pid}/children").read_text().split()
        self.pid = int(children[0])
        """Number here of its first process."""

    def inside(self, path: str | Path) -> Path:
        """The place at which this process finds a file of the machine's."""
        return Path(f"/proc/{self.pid}/root{path}")

    def start(self, arguments: Sequence[str | Path], output: Path, folder: str | Path, **more: str) -> Popen:
        """Starts a program on it; what it prints goes to a file of this machine's."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", f"--wd={self.inside(folder)}"]
        home = {"HOME": "/tmp/home", "XDG_CACHE_HOME": "/tmp/home/.cache", "PYTHONUNBUFFERED": "1"}
        with output.open("w") as printed:
            return subprocess.Popen(
                [*enter, *map(str, arguments)], env=environment(**{**home, **more}),
                stdin=subprocess.DEVNULL, stdout=printed, stderr=printed,
                start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """Turns it off: all its processes are killed, its network and files are gone."""
        self._boot.kill()
        self._boot.wait()


class Machines:
    """Machines on one network, and Ray on them; a context manager.

    Args:
        folder: Gets what they print; `folder / "shared"` is the one folder that all of them and this one share.
        names: The machines; the first is Ray's head.
        serves_jobs: Whether the head takes jobs, for which it needs its dashboard.
        **more: Of their environment.
    """

    def __init__(self, folder: Path, names: Sequence[str], *, serves_jobs: bool = False, **more: str) -> None:
        self._serves_jobs = serves_jobs
        self.folder, self.shared = folder, folder / "shared"
        self.shared.mkdir(parents=True)
        self._more = more
        self._kept = [path for path in (ROOT, Path(sys.prefix), self.shared) if path.is_relative_to("/tmp")]
        self._names, self._number = names, 0
        self.by_name: dict[str, Machine] = {}
        self._hosts = folder / "hosts"
        self._hosts.touch()

    def __enter__(self) -> Machines:
        self._switch = Machine("switch", self._hosts)
        self._ip("link", "add", "switch", "type", "bridge")
        self._ip("link", "set", "switch", "up")
        for name in self._names:
            self.add(name)
        return self

    def __exit__(self, *_: object) -> None:
        for machine in (*self.by_name.values(), self._switch):
            machine.kill()

    def __getitem__(self, name: str) -> Machine:
        return self.by_name[name]

    @property
    def head(self) -> Machine:
        """The machine of Ray's head, on which the program is run."""
        return self.by_name[self._names[0]]

    def add(self, name: str, address: str | None = None) -> Machine:
        """Adds a machine, or one in the place of a killed one, under a new address or the one given."""
        machine = self.by_name[name] = Machine(name, self._hosts, self._kept)
        port = f"port{self._number}"
        self._ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(machine.pid))
        self._ip("link", "set", port, "master", "switch", "up")
        machine.address, machine.port = address or address_of(self._number), port
        self._number += 1
        for order in (f"address add {machine.address}/24 dev eth0", "link set eth0 up", "route add default dev eth0"):
            _run(["nsenter", f"--target={machine.pid}", "--net", "ip", *order.split()])
        hosts = {each.name: each.address for each in self.by_name.values()}
        self._hosts.write_text(
            "".join(f"{where} {who}\n" for who, where in {"localhost": "127.0.0.1", **hosts}.items())
        )
        return machine

    def remove(self, name: str) -> None:
        """Turns a machine off for good."""
        self.by_name.pop(name).kill()

    def has_process(self, name: str, process: str) -> bool:
        """Whether a process with this in its command line runs on a machine; False for one that was removed."""
        enter = ["nsenter", f"--target={self[name].pid}", "--mount", "--pid"] if name in self.by_name else ["false"]
        return subprocess.run([*enter, "pgrep", "-f", process], capture_output=True, check=False).returncode == 0

    def cut_off(self, name: str) -> None:
        """Pulls a machine's network cable."""
        self._ip("link", "set", self[name].port, "down")

    def connect(self, name: str) -> None:
        """Puts the cable back."""
        self._ip("link", "set", self[name].port, "up")

    def slow_down(self, name: str, rate: str) -> None:
        """Lets no more than so much reach a machine, as `tc` writes rates: `10mbit`."""
        limit = f"qdisc replace dev {self[name].port} root tbf rate {rate} burst 32k latency 1s"
        _run(["nsenter", f"--target={self._switch.pid}", "--net", "tc", *limit.split()])

    def _ip(self, *words: str) -> None:
        _run(["nsenter", f"--target={self._switch.pid}", "--net", "ip", *words])

    # Ray and the program -------------------------------------------------------------------------------------------

    def start_ray(self, num_cpus: dict[str, int]) -> None:
        """Starts Ray on these machines with so many CPUs each, one after the other."""
        head = self.head.name
        if head in num_cpus:
            self.join(head, num_cpus[head])
        for name in [name for name in num_cpus if name != head]:
            self.join(name, num_cpus[name])

    def join(self, name: str, num_cpus: int) -> None:
        """Starts Ray on one machine."""
        where = ["--head", f"--port={RAY_PORT}", f"--include-dashboard={self._serves_jobs}".lower(), "--no-monitor"]
        if self._serves_jobs:
            where += [f"--dashboard-host={self.head.address}", f"--dashboard-port={JOBS_PORT}"]
        if name != self.head.name:
            where = [f"--address={self.address}"]
        machine = self[name]
        options = [f"--node-ip-address={machine.address}", f"--num-cpus={num_cpus}", "--disable-usage-stats"]
        options += [f"--object-store-memory={80 * 2**20}", "--include-log-monitor=false"]
        ray = Path(sys.executable).with_name("ray")
        for _ in range(_STARTS):
            words = ["bash", "-c", _FIRST, "ray", ray, "start", *where, *options]
            start = self.start(name, words, f"ray-{name}.txt", PATH=f"{ray.parent}:{os.environ['PATH']}")
            if start.wait(timeout=300) == 0:
                return
            self.start(name, [ray, "stop", "--force"], f"stop-{name}.txt").wait(timeout=60)
        raise AssertionError(f"{name}: Ray does not start: {self.printed(f'ray-{name}.txt')}")

    @property
    def address(self) -> str:
        """The Ray cluster's."""
        return f"{self.head.address}:{RAY_PORT}"

    def start(
        self, name: str, arguments: Sequence[str | Path], output: str, folder: str | Path | None = None, **more: str
    ) -> Popen:
        """Starts a program on a machine in a folder of its own, or the shared one; `output` names the file of what it
        prints.
        """
        return self[name].start(arguments, self.folder / output, folder or self.shared, **{**self._more, **more})

    def run(
        self, name: str, arguments: Sequence[str | Path], output: str, folder: str | Path | None = None, **more: str
    ) -> str:
        """Runs a program on a machine and returns what it printed; one that fails is an error."""
        code = self.start(name, arguments, output, folder, **more).wait(timeout=600)
        printed = self.printed(output)
        assert code == 0, f"{name}: {printed}"
        return printed

    def printed(self, output: str) -> str:
        """What has been printed so far into the file of this name."""
        return (self.folder / output).read_text()


def _run(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


@contextlib.contextmanager
def ray_on_machines(
    folder: Path, num_cpus: dict[str, int], *, serves_jobs: bool = False, **more: str
) -> Iterator[Machines]:
    """Machines with Ray on them, and a token that it asks for; a test that cannot have them is skipped.

    Args:
        folder: As of `Machines`.
        num_cpus: The machines and Ray's CPUs of each; the first is the head.
        serves_jobs: As of `Machines`.
        **more: Of their environment.
    """
    if reason := why_not():
        pytest.skip(reason)
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with Machines(folder, list(num_cpus), serves_jobs=serves_jobs, **token, **more) as machines:
        machines.start_ray(num_cpus)
        yield machines
