"""`cluster:`, `tracking:` and `report:`, where and how an experiment runs; never part of a cell's identity."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from orchestrator.spec.base import Count, Flag, NonNegative, Positive, Spec, Whole


class WorkerRange(Spec):
    """An elastic number of workers per lane."""

    min: Count
    """Fewest workers that a lane runs with: it waits for so many."""
    max: Count
    """Most workers that a lane takes. It starts again from its last checkpoint with more of them within a minute of
    their resources being free, and with fewer where a node is lost.
    """

    @model_validator(mode="after")
    def _check(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}; min is at most max")
        return self


class KeepSpec(Spec):
    """What stays of a finished leaf of the stage tree."""

    leaf: Literal["full", "weights", "none"] = "weights"
    """What is kept of a cell's last state: `full` (weights and optimizer), `weights`, or `none` (scores only)."""


class ClusterSpec(Spec):
    """The machine or cluster that runs the experiment."""

    aliases: ClassVar[dict[str, str]] = {"save_steps": "checkpoint_every"}

    address: str | None = Field(default=None, examples=["auto"])
    """Ray cluster to join: `auto` (the one of this machine) or HOST:PORT. null starts a local Ray."""
    lanes: Count | Literal["auto"] = 1
    """Groups of workers that execute stage runs side by side. `auto`: as many as the cluster has room for now, and no
    more than there is work for.
    """
    num_workers: Count | WorkerRange = Field(default=1, examples=[8, {"min": 4, "max": 8}])
    """DeepSpeed workers of a lane, usually its GPUs; `{min: A, max: B}` takes what there is."""
    placement: Literal["pack", "spread"] = "pack"
    """Where a lane's workers are placed: `pack` on as few nodes as possible, `spread` over as many."""
    use_gpu: Flag | Literal["auto"] = "auto"
    """Whether workers use GPUs. `auto`: where the cluster has some."""
    resources_per_worker: dict[str, NonNegative] = Field(
        default_factory=lambda: {"CPU": 1.0}, examples=[{"CPU": 8, "GPU": 1}]
    )
    """Ray resources of one worker, by Ray's names; `CPU: 2` gives it two threads."""
    nice: Annotated[int, Field(ge=0, le=19)] = 0
    """Niceness of lanes' workers, for a machine that others use too: 19 leaves them nearly everything. It raises what
    workers start with (0 here, Ray's own 15 on a cluster that is joined) and cannot lower it.
    """
    max_failures: Whole = 3
    """Retries of one stage run or evaluation after failures, before its cells count as failed."""
    checkpoint_every: Count = 200
    """Optimizer steps between two checkpoints inside a stage run."""
    keep: KeepSpec = KeepSpec()
    """What is kept of finished work."""
    storage_path: str | None = Field(default=None, examples=["s3://bucket/llavolta"])
    """Where the ledger lies: a folder (local or NFS) or s3://BUCKET/PREFIX. null takes $LLAVOLTA_STORAGE or ./runs."""
    deterministic: Flag = False
    """Whether torch uses deterministic algorithms only: repeated runs agree bit by bit, and are slower."""
    wait_minutes: NonNegative = 0.0
    """Minutes to wait until the cluster has room for the lanes: for nodes that an autoscaler adds as they are asked
    for, or until others are done. Name `lanes` and `use_gpu` then: `auto` goes by the nodes that are there.
    """
    stall_minutes: Positive | None = Field(default=None, examples=[30])
    """Minutes without a step (or without a heartbeat of some rank) after which a lane counts as hung: it is killed, its
    stack traces are logged, and it resumes from its checkpoint. Longer than the longest load, step and end of a stage
    run, whose state is then moved to the storage; null: never.
    """
    device_tflops: Positive | None = Field(default=None, examples=[150])
    """Speed that one worker's device sustains in training, in 10^12 floating-point operations a second; usually 30 to
    50 % of its vendor's peak. `plan` estimates hours with it until stage runs have been measured; null: no estimate.
    """
    rehearse: Flag | Literal["auto"] = "auto"
    """Whether `run` begins with a rehearsal: each variant's longest samples, a save and a load, one answer of each
    evaluation. `auto`: on GPUs.
    """

    @property
    def least_workers(self) -> int:
        """Fewest workers that a lane runs with."""
        return self.num_workers.min if isinstance(self.num_workers, WorkerRange) else self.num_workers

    @property
    def most_workers(self) -> int:
        """Most workers that a lane runs with."""
        return self.num_workers.max if isinstance(self.num_workers, WorkerRange) else self.num_workers


class TrackingSpec(Spec):
    """Where results are recorded."""

    tracking_uri: str | None = Field(default=None, examples=["http://mlflow.example.org:5000"])
    """Address of the MLflow server or database, `${env:NAME}` in the place of a password. null takes
    MLFLOW_TRACKING_URI, else a sqlite file in the storage.
    """
    experiment_name: str | None = None
    """Name of the MLflow experiment; null takes the experiment's own name."""
    also: tuple[str, ...] = Field(default=(), examples=[["tensorboard", "wandb"]])
    """Trackers that record every cell too: `tensorboard`, `wandb`, or one of a plug-in. MLflow is always there."""


class ReportSpec(Spec):
    """What the table of results compares."""

    baseline: dict[str, Any] | None = Field(default=None, examples=[{"phases.finetune.schedule": "full"}])
    """Axes and values of the cells that others are compared with; null makes no comparison."""
    mean_over: tuple[str, ...] = Field(default=(), examples=[["seed"]])
    """Axes over which the table gives a mean and a standard deviation instead of one row a value."""
    rows: tuple[str, ...] = Field(default=(), examples=[["schedule=full", "schedule=four*"]])
    """Rows that are shown, in this order, by name or pattern; empty shows all. Tests are corrected for all rows."""
    columns: tuple[str, ...] = Field(default=(), examples=[["eval/vqa/accuracy", "cost/train_tflops"]])
    """Metrics that are shown, in this order, by tracked name or pattern; empty shows headline scores and costs."""
    labels: dict[str, str] = Field(
        default_factory=dict, examples=[{"eval/vqa/accuracy": "VQA", "schedule=full": "Full"}]
    )
    """What is written in the place of a metric's or a row's name."""
    decimals: dict[str, Annotated[int, Field(ge=0, le=9)]] = Field(default_factory=dict, examples=[{"eval/*": 1}])
    """Digits after the point, by tracked name or pattern of metrics; the first that fits."""
    bold: Literal["best"] | None = None
    """`best` prints the best value of each score bold, in Markdown and LaTeX; null nothing."""
