"""One lane as its driver sees it: a Ray Train run in a thread, started again a few times when the run itself dies."""

from __future__ import annotations

import contextlib
import math
import shutil
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.spec.infrastructure import ClusterSpec, WorkerRange

CONTROLLER_FAILURES = 3
# The conductor counts a job's attempts and a lane's barren ones; this only keeps Ray from trying for ever.
_GROUP_FAILURES = 10_000
_STARTS_AGAIN = 3


@dataclass(frozen=True)
class LaneSetup:
    """What all lanes of a run share.

    Attributes:
        url: The storage, as workers open it.
        folder: Where Ray Train may keep what it wants to keep of a run; taken away with the run.
        executor: `module:function` that does one job.
    """

    cluster: ClusterSpec
    conductor: Any
    url: str
    folder: Path
    executor: str
    use_gpu: bool


class RayLane:
    """A lane.

    Args:
        name: Its name, unique in the run.

    Attributes:
        error: Why its last Train run ended, where that was no good end.
    """

    def __init__(self, name: str, setup: LaneSetup) -> None:
        self.name = name
        self.error: BaseException | None = None
        self._setup = setup
        self._starts = 0
        self._run_name = ""
        self._thread: threading.Thread | None = None

    @property
    def thread(self) -> threading.Thread | None:
        """The thread that waits for the Train run; None where there is none to look after."""
        return self._thread

    @property
    def may_start_again(self) -> bool:
        """Whether it died of something that a new start may mend."""
        return self.error is not None and self._starts <= _STARTS_AGAIN

    def start(self) -> None:
        """Start its Train run."""
        self._starts += 1
        self.error = None
        self._run_name = f"{self.name}-{uuid.uuid4().hex[:8]}"
        self._thread = threading.Thread(target=self._fit, name=self.name, daemon=True)
        self._thread.start()

    def has_ended(self) -> bool:
        """Return True once for each Train run that is over; what it held is free then."""
        if self._thread is None or self._thread.is_alive():
            return False
        self._thread = None
        self.clean()
        if self.error is not None:
            self._free_groups()
        return True

    def clean(self) -> None:
        """Take away what Ray Train wrote for the last run."""
        shutil.rmtree(self._setup.folder / self._run_name, ignore_errors=True)

    def _free_groups(self) -> None:
        """Return a controller that died cannot free the resources it held."""
        import ray

        from orchestrator.dispatch.ray_compat import release_placement_group

        with contextlib.suppress(Exception):
            for group in ray.get(self._setup.conductor.placement_groups.remote(self.name), timeout=10):
                with contextlib.suppress(Exception):
                    release_placement_group(group)

    def _fit(self) -> None:
        try:
            self._trainer().fit()
        except BaseException as error:
            self.error = error

    def _trainer(self) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.v2.api.config import LoggingConfig

        from orchestrator.dispatch.lane import run_lane
        from orchestrator.dispatch.ray_compat import LaneTrainer

        cluster = self._setup.cluster
        threads = max(1, math.floor(cluster.resources_per_worker.get("CPU", 1)))
        workers = cluster.num_workers
        return LaneTrainer(
            run_lane,
            train_loop_config={
                "conductor": self._setup.conductor,
                "lane": self.name,
                "storage": self._setup.url,
                "executor": self._setup.executor,
                "threads": threads,
            },
            scaling_config=ScalingConfig(
                num_workers=(workers.min, workers.max) if isinstance(workers, WorkerRange) else workers,
                use_gpu=self._setup.use_gpu,
                resources_per_worker=dict(cluster.resources_per_worker),
                placement_strategy="PACK" if cluster.placement == "pack" else "SPREAD",
            ),
            run_config=RunConfig(
                name=self._run_name,
                storage_path=str(self._setup.folder),
                failure_config=FailureConfig(
                    max_failures=_GROUP_FAILURES, controller_failure_limit=CONTROLLER_FAILURES
                ),
                worker_runtime_env={"env_vars": _worker_environment(threads, self._setup.use_gpu)},
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
    }
    if not use_gpu:
        variables["DS_ACCELERATOR"] = "cpu"
    return variables
