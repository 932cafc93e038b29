"""run_on_ray(): does a work list in a lane of Ray Train workers and tells what happens as it happens."""

from __future__ import annotations

import contextlib
import math
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestrator.dispatch.conductor import Conductor
from orchestrator.dispatch.deferred import DeferredInterrupt
from orchestrator.dispatch.execute import DEFAULT_EXECUTOR
from orchestrator.dispatch.outcome import Outcome
from orchestrator.dispatch.ray_session import RaySession, ray_session
from orchestrator.dispatch.record import Teller
from orchestrator.errors import Interrupted, StageRunError, UsageError
from orchestrator.plan.jobs import Job, job_to_json
from orchestrator.spec.infrastructure import ClusterSpec, WorkerRange

if TYPE_CHECKING:
    from orchestrator.plan.ledger import Ledger

POLL_SECONDS = 0.1
ABORT_SECONDS = 10.0
CONTROLLER_FAILURES = 3
LANE = "lane-0"


def run_on_ray(
    work: Sequence[Job],
    ledger: Ledger,
    cluster: ClusterSpec,
    on_event: Callable[[Mapping[str, Any]], None],
    should_stop: Callable[[], bool | int],
    *,
    executor: str = DEFAULT_EXECUTOR,
    fail_fast: bool = False,
) -> Outcome:
    """Does the work in one Ray Train run and returns what became of it.

    Args:
        work: Jobs, parents before children; a parent that is not in the list is finished already.
        on_event: Called in this thread with `event` (started, finished, failed, retried, interrupted, skipped), `id`,
            `type`, `attempt`, and `error` where there is one.
        should_stop: Asked every 0.1 s. True: what runs writes a checkpoint and the lane ends. 2: stop at once.
        executor: `module:function` that does one job.
        fail_fast: The first failed job ends the run.

    Raises:
        UsageError: no Ray at the address, or the cluster is too small for one lane.
        StageRunError: the lane itself cannot run.
        Interrupted: KeyboardInterrupt, or `should_stop` said 2; no process of ours is left.
    """
    if isinstance(cluster.num_workers, WorkerRange):
        raise UsageError("cluster.num_workers: a range is not supported by this version; give one number")
    teller = Teller(ledger, on_event)
    try:
        # Nothing below is torn apart by Ctrl-C: Ray is started, asked and ended in whole steps.
        with DeferredInterrupt() as interrupt, ray_session(cluster.address) as session:
            lane = _Lane(work, ledger, cluster, session, executor, fail_fast)

            def stop_asked() -> int:
                interrupt.check()
                return int(should_stop())

            return lane.run(teller, stop_asked)
    except KeyboardInterrupt:
        raise Interrupted("stopped at once; what was under way goes on from its last checkpoint") from None


class _Lane:
    """One Ray Train run and the conductor it works for."""

    def __init__(
        self,
        work: Sequence[Job],
        ledger: Ledger,
        cluster: ClusterSpec,
        session: RaySession,
        executor: str,
        fail_fast: bool,
    ) -> None:
        self._work = work
        self._cluster = cluster
        self._session = session
        self._storage = ledger.storage.absolute()
        self._executor = executor
        self._fail_fast = fail_fast
        self._name = f"{LANE}-{uuid.uuid4().hex[:8]}"
        self._error: BaseException | None = None

    def run(self, teller: Teller, should_stop: Callable[[], int]) -> Outcome:
        import ray

        use_gpu = fits_cluster(self._cluster, ray.cluster_resources())
        jobs = [job_to_json(job) for job in self._work]
        actor = ray.remote(num_cpus=0)(Conductor)
        conductor = actor.remote(jobs, self._cluster.max_failures, self._fail_fast)
        thread = threading.Thread(target=self._fit, args=(conductor, use_gpu), name=LANE, daemon=True)
        thread.start()
        try:
            self._watch(thread, conductor, teller, should_stop)
            return self._finish(conductor, teller)
        except ray.exceptions.RayActorError as error:
            raise StageRunError(f"the conductor died: {error}; run the same command to go on") from error
        finally:
            if thread.is_alive():
                _abort(thread)
            shutil.rmtree(self._storage / "ray" / self._name, ignore_errors=True)

    def _watch(self, thread: threading.Thread, conductor: Any, teller: Teller, should_stop: Callable[[], int]) -> None:
        import ray

        asked = False
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            stop = should_stop()
            if stop and not asked:
                asked = True
                ray.get(conductor.interrupt.remote())
            if stop > 1:
                raise KeyboardInterrupt
            teller.tell(ray.get(conductor.events.remote(teller.seen)))

    def _finish(self, conductor: Any, teller: Teller) -> Outcome:
        import ray

        from orchestrator.dispatch.ray_compat import release_placement_group

        ray.get(conductor.lane_ended.remote(LANE))
        teller.tell(ray.get(conductor.events.remote(teller.seen)))
        if not self._session.owned and self._error is not None:
            # A controller that died cannot free what it held.
            for group in ray.get(conductor.placement_groups.remote()):
                with contextlib.suppress(Exception):
                    release_placement_group(group)
        outcome: Outcome = ray.get(conductor.outcome.remote())
        fatal = ray.get(conductor.fatal.remote())
        if outcome.left and not outcome.interrupted and not (self._fail_fast and outcome.failed):
            reason = fatal or "Ray Train gave up"
            cause = f": {_last_line(self._error)}" if self._error is not None else ""
            raise StageRunError(f"{reason}{cause}\n    hint: Ray's logs are in {self._session.folder / 'logs'}")
        return outcome

    def _fit(self, conductor: Any, use_gpu: bool) -> None:
        try:
            self._trainer(conductor, use_gpu).fit()
        except BaseException as error:
            self._error = error

    def _trainer(self, conductor: Any, use_gpu: bool) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.config import LoggingConfig

        from orchestrator.dispatch.lane import run_lane
        from orchestrator.dispatch.ray_compat import LaneTrainer

        threads = max(1, math.floor(self._cluster.resources_per_worker.get("CPU", 1)))
        return LaneTrainer(
            run_lane,
            train_loop_config={
                "conductor": conductor,
                "lane": LANE,
                "storage": str(self._storage),
                "executor": self._executor,
                "threads": threads,
            },
            scaling_config=ScalingConfig(
                num_workers=self._cluster.num_workers,
                use_gpu=use_gpu,
                resources_per_worker=dict(self._cluster.resources_per_worker),
                placement_strategy="PACK" if self._cluster.placement == "pack" else "SPREAD",
            ),
            run_config=RunConfig(
                name=self._name,
                storage_path=str(self._storage / "ray"),
                # The conductor counts a job's attempts; these only keep Ray from trying for ever.
                failure_config=FailureConfig(
                    max_failures=len(self._work) * (self._cluster.max_failures + 1) + CONTROLLER_FAILURES,
                    controller_failure_limit=CONTROLLER_FAILURES,
                ),
                worker_runtime_env={"env_vars": _worker_environment(threads, use_gpu)},
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )


def _abort(thread: threading.Thread) -> None:
    """Ends a Train run whose controller may be at any point, and the thread that waits for it."""
    from orchestrator.dispatch.ray_compat import kill_controllers

    deadline = time.monotonic() + ABORT_SECONDS
    while thread.is_alive() and time.monotonic() < deadline:
        # Again and again: the controller may just be starting.
        with contextlib.suppress(Exception):
            kill_controllers()
        thread.join(POLL_SECONDS)


def fits_cluster(cluster: ClusterSpec, available: Mapping[str, float]) -> bool:
    """Whether workers use GPUs, once it is sure that a lane can be placed.

    Args:
        available: Resources of the whole cluster, as Ray counts them.

    Raises:
        UsageError: it has less than one lane asks for; the numbers are told.
    """
    assert isinstance(cluster.num_workers, int)
    wanted = dict(cluster.resources_per_worker)
    use_gpu = available.get("GPU", 0) > 0 if cluster.use_gpu == "auto" else cluster.use_gpu
    if wanted.get("GPU", 0) > 0 and not cluster.use_gpu:
        raise UsageError("cluster: use_gpu is false and resources_per_worker asks for GPU; drop one of the two")
    if use_gpu or wanted.get("GPU", 0) > 0:
        use_gpu = True
        wanted.setdefault("GPU", 1)
    short = [
        f"{cluster.num_workers} x {amount:g} {name} = {cluster.num_workers * amount:g} {name}, "
        f"it has {available.get(name, 0):g}"
        for name, amount in wanted.items()
        if cluster.num_workers * amount > available.get(name, 0)
    ]
    if short:
        where = "this machine" if cluster.address is None else f"the cluster at {cluster.address}"
        raise UsageError(
            f"cluster: one lane does not fit on {where}: it needs {'; '.join(short)}\n"
            "    hint: lower cluster.num_workers or cluster.resources_per_worker"
        )
    return bool(use_gpu)


def _worker_environment(threads: int, use_gpu: bool) -> dict[str, str]:
    """Variables of a worker process: they must stand before torch and DeepSpeed are imported."""
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    if not use_gpu:
        variables["DS_ACCELERATOR"] = "cpu"
    return variables


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__
