"""`cluster:`, `tracking:` and `report:`, where and how an experiment runs; never part of a cell's identity."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from orchestrator.spec.base import Count, Flag, NonNegative, Positive, Spec, Whole


class WorkerRange(Spec):
    """An elastic number of workers per lane."""

    min: Count
    max: Count


class KeepSpec(Spec):
    """What stays of a finished leaf of the stage tree."""

    leaf: Literal["full", "weights", "none"] = "weights"


class ClusterSpec(Spec):
    """The machine or cluster.

    Attributes:
        address: None starts a local Ray; `auto` or `ray://...` joins a cluster.
        lanes: Worker groups that take stage runs side by side; `auto`: as many as the cluster holds now, and no more
            than there is work for.
        num_workers: DeepSpeed workers per lane.
        resources_per_worker: Ray resources of one worker; `CPU: 2` gives it two threads.
        max_failures: Retries per stage run.
        checkpoint_every: Optimizer steps between checkpoints inside a stage run.
        storage_path: None takes $LLAVOLTA_STORAGE or ./runs.
        stall_minutes: A lane that makes no step for so long, or a rank that gives no sign of life, is killed and
            goes on from its checkpoint, its stacks in its logs. Longer than the longest load and step; None: never.
        device_tflops: Floating-point operations that one worker's device sustains in training, in 10^12 a second; not
            its vendor's peak, of which 30 to 50 % is usual. `plan` tells hours by it until stage runs are measured.
        rehearse: Try every variant's longest samples, a save and a load, and an answer of each evaluation before
            anything is trained; `auto`: on GPUs.
    """

    aliases: ClassVar[dict[str, str]] = {"save_steps": "checkpoint_every"}

    address: str | None = None
    lanes: Count | Literal["auto"] = 1
    num_workers: Count | WorkerRange = 1
    placement: Literal["pack", "spread"] = "pack"
    use_gpu: Flag | Literal["auto"] = "auto"
    resources_per_worker: dict[str, NonNegative] = Field(default_factory=lambda: {"CPU": 1.0})
    max_failures: Whole = 3
    checkpoint_every: Count = 200
    keep: KeepSpec = KeepSpec()
    storage_path: str | None = None
    deterministic: Flag = False
    stall_minutes: Positive | None = None
    device_tflops: Positive | None = None
    rehearse: Flag | Literal["auto"] = "auto"


class TrackingSpec(Spec):
    """Where MLflow is; None takes MLFLOW_TRACKING_URI or a sqlite file in the storage."""

    tracking_uri: str | None = None
    experiment_name: str | None = None


class ReportSpec(Spec):
    """How the table is laid out."""

    baseline: dict[str, Any] | None = None
    mean_over: tuple[str, ...] = ()
