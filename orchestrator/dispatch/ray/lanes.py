"""The lanes of a run: Ray Train runs that the driver looks after, and their workers, which do the conductor's jobs."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.train.v2.api.config import LoggingConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.dispatch.conductor import RESTART, STOP, WAIT, Conductor, Rules, new_driver
from orchestrator.dispatch.driver import PATIENCE, Outcome, RunState
from orchestrator.dispatch.failures import one_line
from orchestrator.dispatch.job_queue import parallel_width
from orchestrator.dispatch.node_needs import lacks, needs_for
from orchestrator.dispatch.ray import compat
from orchestrator.dispatch.ray.nodes import check_nodes, wait_for_room
from orchestrator.dispatch.ray.placement import may_hold
from orchestrator.dispatch.worker import do_job, end_process, now, printed_to
from orchestrator.errors import StageRunError
from orchestrator.plan.jobs import Job, job_from_json
from orchestrator.plan.ledger import Ledger
from orchestrator.plan.ledger.files import log_path
from orchestrator.plan.ledger.process import start_ticks, this_process
from orchestrator.spec.infrastructure import ClusterSpec

POLL_SECONDS = 0.1
_LOOK_SECONDS = 1.0
# Calls of this group run in the conductor beside the others, one at a time.
_NEWS = "news"
ABORT_SECONDS = 10.0
LEAVE_SECONDS = 5.0
KILL_SECONDS = 20.0
CONTROLLER_FAILURES = 3
# The conductor counts a job's attempts and a lane's barren ones; this only keeps Ray from trying for ever.
_GROUP_FAILURES = 10_000
_STARTS_AGAIN = 3
# Ranks wait in a collective while one reads or writes files; Ray's own patience has no room for hours of that.
_PATIENCE_SECONDS = 1800
_SLOWEST_STORAGE = 20e6


def collective_seconds(checkpoint_bytes: float) -> int:
    """Return for how long the ranks of a lane wait for one another: half an hour, and for the bytes at 20 MB/s."""
    return math.ceil(_PATIENCE_SECONDS + checkpoint_bytes / _SLOWEST_STORAGE)


class RayLane:
    """A lane.

    Args:
        name: Its name, unique in the run.
        work: What its workers share with those of other lanes (`run_lane`).
        cluster: Number and resources of its workers.
        use_gpu: Whether they use GPUs.
        patience: How long they wait for one another in a collective, in seconds.
        folder: Where Ray Train may keep files of a run; they are removed with the run.

    Attributes:
        error: Why its last Train run ended, where it failed.
        thread: Waits for the Train run; None where there is none.
    """

    def __init__(
        self, name: str, work: Mapping[str, Any], cluster: ClusterSpec, use_gpu: bool, patience: int, folder: Path
    ) -> None:
        self.name = name
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None
        self._work, self._cluster, self._use_gpu, self._folder = work, cluster, use_gpu, folder
        self._patience = patience
        self._starts = 0
        self._run_name = ""

    @property
    def may_start_again(self) -> bool:
        """Whether it died of something that a new start may mend."""
        return self.error is not None and self._starts <= _STARTS_AGAIN

    def start(self) -> None:
        """Start its Train run."""
        self._starts += 1
        self.error = None
        self._run_name = f"{self.name}-{uuid.uuid4().hex[:8]}"
        self.thread = threading.Thread(target=self._fit, name=self.name, daemon=True)
        self.thread.start()

    def has_ended(self) -> bool:
        """Return True once for each Train run that is over; what it held is free then."""
        if self.thread is None or self.thread.is_alive():
            return False
        self.thread = None
        self.clean()
        if self.error is not None:
            self._free_groups()
        return True

    def clean(self) -> None:
        """Remove what Ray Train wrote for the last run."""
        shutil.rmtree(self._folder / self._run_name, ignore_errors=True)

    def _free_groups(self) -> None:
        """Free the resources of a controller that died and cannot do so itself."""
        with contextlib.suppress(Exception):
            for group in ray.get(self._work["conductor"].placement_groups.remote(self.name), timeout=10):
                with contextlib.suppress(Exception):
                    compat.release_placement_group(group)

    def _fit(self) -> None:
        try:
            self._trainer().fit()
        except BaseException as error:
            self.error = error

    def _trainer(self) -> Any:
        cluster = self._cluster
        is_elastic = cluster.least_workers < cluster.most_workers
        return compat.LaneTrainer(
            run_lane,
            train_loop_config={**self._work, "lane": self.name},
            torch_config=TorchConfig(timeout_s=self._patience),
            scaling_config=ScalingConfig(
                num_workers=(cluster.least_workers, cluster.most_workers) if is_elastic else cluster.most_workers,
                use_gpu=self._use_gpu,
                resources_per_worker=dict(cluster.resources_per_worker),
                placement_strategy="PACK" if cluster.placement == "pack" else "SPREAD",
            ),
            run_config=RunConfig(
                name=self._run_name,
                storage_path=str(self._folder),
                failure_config=FailureConfig(
                    max_failures=_GROUP_FAILURES, controller_failure_limit=CONTROLLER_FAILURES
                ),
                worker_runtime_env={"env_vars": _worker_environment(self._work["threads"], self._use_gpu)},
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )


def _worker_environment(threads: int, use_gpu: bool) -> dict[str, str]:
    """Return the variables of a worker process: they must stand before torch and DeepSpeed are imported."""
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **{name: os.environ.get(name, turns) for name, turns in PATIENCE.items()},
    }
    if not use_gpu:
        variables["DS_ACCELERATOR"] = "cpu"
    return variables


class Lanes:
    """The lanes of one run and the conductor they work for.

    Args:
        patience: As of `RayLane`.
        logs: Ray's folder of this session, named where the lanes give up.
        stop_asked: Asked ten times a second; see `Hooks.stop_asked`.
        say: As `Hooks.say`.
    """

    def __init__(
        self,
        state: RunState,
        ledger: Ledger,
        cluster: ClusterSpec,
        executor: str,
        rules: Rules,
        patience: int,
        logs: Path,
        stop_asked: Callable[[], int],
        say: Callable[[str], None],
    ) -> None:
        width = parallel_width(state.jobs) if state.is_closed else None
        nodes, room = wait_for_room(cluster, width, stop_asked, say)
        needs, asked = None, []
        if cluster.address is not None:  # a Ray of our own is this machine
            needs = needs_for(state.jobs, ledger)
            fits = may_hold(cluster, [node["Resources"] for node in nodes])
            asked = [node for node, is_asked in zip(nodes, fits, strict=True) if is_asked]
            check_nodes(needs, asked, stop_asked)
        self._state = state
        self._rules = rules
        self._logs = logs
        self._stop_asked = stop_asked
        self._conductor = _conductor(ledger.url, rules)
        self._url = ledger.url
        self._asked = False
        self._is_ours = cluster.address is None
        self._leaving: set[str] = set()
        self._looked = 0.0
        self._news: Any = None
        self._given_up: dict[str, str] = {}
        threads = max(1, math.floor(cluster.resources_per_worker.get("CPU", 1)))
        work = {
            "conductor": self._conductor,
            "storage": ledger.url,
            "executor": executor,
            "threads": threads,
            "nice": cluster.nice,
            "needs": needs,
            "asked": [node["NodeID"] for node in asked],
        }
        folder = ledger.storage / "ray"
        self._lanes = [RayLane(f"lane-{n}", work, cluster, room.use_gpu, patience, folder) for n in range(room.lanes)]

    def run(self) -> Outcome:
        """Work until no lane is left; see `run_on_ray`."""
        try:
            for lane in self._lanes:
                lane.start()
            while self._turn():
                time.sleep(POLL_SECONDS)
            return self._outcome()
        except ray.exceptions.RayActorError as error:
            raise StageRunError(f"the conductor died: {error}; run the same command to resume") from error
        finally:
            self._leave()

    def _turn(self) -> bool:
        """Take and pass on what is new; False once no lane is left."""
        # A call takes time from all processes around it: the conductor is asked when it has something to tell.
        if self._news is None or ray.wait([self._news], timeout=0)[0]:
            self._poll()
        if (newer := self._state.refresh()) is not None:
            self._send(*newer)
        if self._stop_asked() and not self._asked:
            self._asked = True
            self._get(self._conductor.interrupt.remote())
        self._look_at_nodes()
        return self._restart_lanes()

    def _look_at_nodes(self) -> None:
        """Tell the conductor of nodes that are about to be taken away."""
        if self._is_ours or time.monotonic() < self._looked + _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        if (leaving := compat.draining_nodes()) != self._leaving:
            self._leaving = leaving
            self._get(self._conductor.nodes_leave.remote(sorted(leaving)))

    def _poll(self) -> None:
        """Take what the conductor knows that is new, and wait for more."""
        state = self._state
        news = self._get(self._conductor.poll.remote(state.epoch, state.seen))
        if news["epoch"] != state.epoch:
            # It has just been started, for the first time or again, and knows nothing yet.
            state.epoch, state.seen = news["epoch"], 0
            self._send(state.jobs, state.is_closed)
            self._get(self._conductor.nodes_leave.remote(sorted(self._leaving)))
            if self._asked:
                self._get(self._conductor.interrupt.remote())
        state.take(news["events"])
        self._given_up = news["given_up"]
        if news["hung"]:
            end_processes(news["hung"], self._url)
        waits = self._conductor.wait_for_news.options(concurrency_group=_NEWS)
        self._news = waits.remote(state.epoch, state.seen)

    def _restart_lanes(self) -> bool:
        for lane in self._lanes:
            if not lane.has_ended():
                continue
            has_begun = self._get(self._conductor.lane_ended.remote(lane.name))
            self._poll()
            is_done = self._state.is_closed and not self._state.outcome(False).left
            # Workers that never came up will not the next time.
            if has_begun and lane.may_start_again and not (self._asked or is_done):
                lane.start()
        return any(lane.thread is not None for lane in self._lanes)

    def _send(self, jobs: Sequence[Mapping[str, Any]] | None, is_closed: bool) -> None:
        self._get(self._conductor.set_work.remote(jobs, is_closed, self._state.known()))

    def _get(self, reference: Any) -> Any:
        """Return the conductor's answer; blocks until the actor has restarted."""
        while True:
            done, _ = ray.wait([reference], timeout=POLL_SECONDS)
            if self._stop_asked() > 1:
                raise KeyboardInterrupt
            if done:
                return ray.get(reference)

    def _outcome(self) -> Outcome:
        state = self._state
        state.take(ray.get(self._conductor.poll.remote(state.epoch, state.seen))["events"])
        outcome = state.outcome(self._asked)
        given_up_on_purpose = self._asked or (self._rules.fail_fast and outcome.failed)
        if outcome.left and not given_up_on_purpose:
            reason = "; ".join(self._given_up.values()) or "Ray Train gave up"
            error = next((lane.error for lane in self._lanes if lane.error is not None), None)
            cause = f": {one_line(error, -1)}" if error is not None else ""
            raise StageRunError(f"{reason}{cause}\n    hint: Ray's logs are in {self._logs / 'logs'}")
        return outcome

    def _leave(self) -> None:
        """End the lanes, their leases and the conductor."""
        alive = [lane for lane in self._lanes if lane.thread is not None and lane.thread.is_alive()]
        _abort(alive)
        with contextlib.suppress(Exception):
            ray.get(self._conductor.leave.remote(), timeout=LEAVE_SECONDS)
        with contextlib.suppress(Exception):
            ray.kill(self._conductor)
        for lane in alive:
            lane.clean()


def _conductor(url: str, rules: Rules) -> Any:
    """Start the conductor's actor on its driver's node, so that no other loss takes it; Ray restarts it."""
    # Not `soft`: Ray puts an actor without resources on any node then.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here, concurrency_groups={_NEWS: 1}
    )(Conductor)
    return actor.remote(url, new_driver(), rules, asdict(this_process()))


def _abort(lanes: Sequence[RayLane]) -> None:
    """End Train runs whose controllers may be at any point, and the threads that wait for them."""
    deadline = time.monotonic() + ABORT_SECONDS
    threads = [lane.thread for lane in lanes if lane.thread is not None]
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        # Again and again: a controller may just be starting.
        with contextlib.suppress(Exception):
            compat.kill_controllers()
        for thread in threads:
            thread.join(POLL_SECONDS)


def end_processes(ranks: Sequence[Mapping[str, Any]], url: str) -> None:
    """Kill ranks as `Conductor.poll` names them under `hung`; a node that is gone took its ranks along.

    Args:
        url: The storage, for the logs.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(end_process)
    done = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(rank["node"], soft=False)).remote(rank, url)
        for rank in ranks
    ]
    ray.wait(done, num_returns=len(done), timeout=KILL_SECONDS)


HEARTBEAT_SECONDS = 1.0


class Heartbeat:
    """Sends heartbeats from a thread of its own; calling it counts as progress and returns whether to stop.

    So a stage run asks it at every step without a call to the conductor, and continues while there is none.

    Args:
        conductor: The actor's handle.
        who: The rank, as the conductor's `heartbeat` takes it.
    """

    def __init__(self, conductor: Any, who: Mapping[str, Any]) -> None:
        self._conductor = conductor
        self._who = who
        self._progress = 0
        self._stop = threading.Event()
        self._leave = threading.Event()
        self._has_dumped = False
        self.log: Path | None = None
        """Where the stacks go: the log of the current job."""
        self.at: tuple[int, str | None] | None = None
        """Number of the current item and the job before it."""
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def __call__(self) -> bool:
        """Return whether this rank should leave at the next checkpoint."""
        self._progress += 1
        return self._stop.is_set()

    def close(self) -> None:
        """Send no more heartbeats."""
        self._leave.set()

    def _beat(self) -> None:
        while not self._leave.wait(HEARTBEAT_SECONDS):
            try:
                heard = ray.get(self._conductor.heartbeat.remote(self._who, self._progress, self._has_dumped, self.at))
            except ray.exceptions.RayError:
                return  # it is gone for good, and with it the driver; the next call for an item says so
            if heard["stop"]:
                self._stop.set()
            if heard["dump"]:
                self._dump()

    def _dump(self) -> None:
        self._has_dumped = True
        if self.log is not None:
            with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8") as log:
                log.write(f"[{now()}] rank {self._who['rank']} hangs; where its threads are:\n")
                log.flush()
                faulthandler.dump_traceback(file=log, all_threads=True)


SHORTEST_PAUSE_SECONDS = 0.01
LONGEST_PAUSE_SECONDS = 0.25


class LaneRestart(Exception):
    """Ends this worker group so that Ray Train starts a fresh one; its job was queued again."""


def run_lane(config: dict[str, Any]) -> None:
    """Ray Train's loop on one worker.

    Args:
        config: `conductor` (actor handle), `lane`, `storage`, `executor`, `threads`, `nice`, `needs` and the nodes
            `asked` for them before the run.
    """
    import torch
    import torch.distributed as dist

    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (uuid.uuid4().hex, _unfit(config)))
    who = {
        "lane": config["lane"],
        "attempt": ranks[0][0],
        "unfit": "; ".join(text for _, text in ranks if text),
        "world_size": dist.get_world_size(),
        **_this_process(),
    }
    torch.set_num_threads(config["threads"])
    os.nice(max(0, config["nice"] - os.nice(0)))
    worker = _Worker(config, who)
    worker.begin()
    heartbeat = Heartbeat(config["conductor"], who)
    try:
        worker.work(heartbeat)
    finally:
        heartbeat.close()


def _unfit(config: Mapping[str, Any]) -> str | None:
    """Return why this worker's node cannot do what the run asks of it; None for one that was asked before the run."""
    node = ray.get_runtime_context().get_node_id()
    if config["needs"] is None or node in config["asked"] or not (found := lacks(config["needs"])):
        return None
    return f"node {socket.gethostname()} ({ray.util.get_node_ip_address()}), which joined later: {'; '.join(found)}"


class _Worker:
    """One rank of one attempt."""

    def __init__(self, config: dict[str, Any], who: dict[str, Any]) -> None:
        self._conductor = config["conductor"]
        self._who = who
        self._ledger = Ledger(config["storage"])
        self._executor = config["executor"]
        self._memory: dict[str, Any] = {}

    def begin(self) -> None:
        """Report from rank 0 that the group has started; no other rank asks before that."""
        import torch.distributed as dist

        if self._who["rank"] == 0:
            ray.get(self._conductor.begin.remote(self._who))
        dist.barrier()

    def work(self, heartbeat: Heartbeat) -> None:
        k, last, report = 0, None, None
        pause_seconds = SHORTEST_PAUSE_SECONDS
        while True:
            item = ray.get(self._conductor.next_item.remote(self._who, k, last, report))
            if item == STOP:
                return
            if item == RESTART:
                raise LaneRestart("the conductor gave this worker group up")
            if item == WAIT:
                time.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
                continue
            pause_seconds = SHORTEST_PAUSE_SECONDS
            job = job_from_json(item["job"])
            self._ledger.fences = {job.id: item["token"]}
            heartbeat.at = (k, last)
            report = self._do(job, heartbeat)
            k, last, heartbeat.at = k + 1, job.id, None

    def _do(self, job: Job, heartbeat: Heartbeat) -> str | dict[str, Any]:
        """Do a job and return what to report of it."""
        rank = self._who["rank"]
        heartbeat.log = log_path(self._ledger.work_folder(job.id), rank)
        try:
            with printed_to(heartbeat.log):
                print(f"[{now()}] {type(job).__name__} {job.id}, process {os.getpid()}", flush=True)
            printing = printed_to(heartbeat.log)
            return do_job(self._executor, job, self._ledger, self._memory, heartbeat, rank=rank, printing=printing)
        finally:
            heartbeat.log = None


def _this_process() -> dict[str, Any]:
    import torch.distributed as dist

    return {
        "rank": dist.get_rank(),
        "pid": os.getpid(),
        "started": start_ticks(),
        "node": ray.get_runtime_context().get_node_id(),
        "placement_group": compat.current_placement_group(),
    }
