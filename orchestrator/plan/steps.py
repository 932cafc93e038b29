"""How many optimizer steps a phase has."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.errors import UsageError
from orchestrator.spec.components import DataSpec
from orchestrator.spec.phase import PhaseSpec
from orchestrator.spec.steps import epoch_steps, rows_per_epoch


def num_rows(data: DataSpec) -> int | None:
    """Usable rows of a data set; None where it is not here and the spec does not say."""
    return data.num_rows()


def total_steps_of(
    name: str, recipe: PhaseSpec, sets: dict[str, float], count_rows: Callable[[str], int | None]
) -> int:
    """Optimizer steps of a phase: `max_steps`, or the whole batches of its epochs.

    Raises:
        UsageError: it has no length, or its data's rows cannot be counted.
    """
    for later in ("max_train_tflops", "match_train_tflops"):
        if getattr(recipe, later) is not None:
            raise UsageError(f"phases.{name}.{later} is not built yet; give max_steps or num_train_epochs")
    if recipe.max_steps is not None:
        return recipe.max_steps
    if recipe.num_train_epochs is None:
        raise UsageError(f"phases.{name} has no length: give max_steps or num_train_epochs")
    rows: list[tuple[int, float]] = []
    for set_name, share in sets.items():
        found = count_rows(set_name)
        if found is None:
            raise UsageError(
                f"data.{set_name}: its file is not here, so the steps of phases.{name} (num_train_epochs) cannot be "
                "counted; give num_samples on the data set, or max_steps on the phase"
            )
        rows.append((found, share))
    return epoch_steps(rows_per_epoch(rows), recipe.num_train_epochs, recipe.global_batch_size)
