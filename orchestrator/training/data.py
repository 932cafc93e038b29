"""The training data of a phase, built once per worker and kept between stage runs."""

from __future__ import annotations

import json

from orchestrator.data.pipeline import TrainData, build_train_data
from orchestrator.plan.jobs import StageJob
from orchestrator.spec.model import ModelSpec
from orchestrator.training.memory import TrainingMemory


def training_data(job: StageJob, memory: TrainingMemory) -> TrainData:
    """Return the data sets of the job, tokenised for its model.

    Raises:
        DataError: rows or images cannot be used.
    """
    model = ModelSpec.model_validate(job.model)
    facts = [job.data, model.model_name_or_path, model.revision, job.recipe["model_max_length"]]
    key = json.dumps(facts, sort_keys=True, default=str)

    def build() -> TrainData:
        return build_train_data(job.data, model, job.recipe["model_max_length"])

    data: TrainData = memory.data(key, build)
    return data
