"""How many optimizer steps a phase has: stated, from its data's epochs, or as many as a cost allows."""

from __future__ import annotations

from collections.abc import Callable

from orchestrator.errors import UsageError
from orchestrator.spec.components import ScheduleSpec
from orchestrator.spec.phase import PhaseSpec, epoch_steps, rows_per_epoch


def total_steps_of(
    name: str, recipe: PhaseSpec, sets: dict[str, float], count_rows: Callable[[str], int | None]
) -> int:
    """Return the optimizer steps of a phase: `max_steps`, or the full batches of its epochs.

    Raises:
        UsageError: it has no length, or its data's rows cannot be counted.
    """
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


def steps_of_cost(target: float, price: Callable[[int], float | None], at_most: bool) -> int:
    """Return the optimizer steps whose cost is nearest to a target, or the most that stay within it.

    Args:
        target: TFLOPs.
        price: TFLOPs of a number of steps, rising with it; None where so few steps cannot be divided into stages.
        at_most: The cost may not exceed the target.

    Raises:
        ValueError: not even the fewest steps the schedule can have stay within the target.
    """

    def cost(steps: int) -> float:
        found = price(steps) if steps else None
        return 0.0 if found is None else found

    low, high = 0, 1
    while cost(high) < target:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    nearer = cost(high) == target if at_most else cost(high) - target <= target - cost(low)
    steps = high if nearer else low
    if not steps or price(steps) is None:
        steps_cost = f"{high} step{'s' if high > 1 else ''} cost {cost(high):,.3g}"
        raise ValueError(f"{target:,.3g} TFLOPs are too few for its schedule: {steps_cost}")
    return steps


def steps_by_cost(
    name: str,
    recipe: PhaseSpec,
    price: Callable[[str | ScheduleSpec, int], float | None] | None,
    stated: Callable[[PhaseSpec], int],
) -> int:
    """Return the optimizer steps of a phase whose length is a cost.

    `max_train_tflops`: the most steps that cost no more. `match_train_tflops`: as many as cost what the schedule it
    names costs over the phase's `max_steps` or `num_train_epochs` (one epoch where neither is given).

    Args:
        name: The phase.
        recipe: Its recipe, with one of the two.
        price: TFLOPs of some steps under a schedule; None where it cannot be divided into so few. None where costs are
            not known.
        stated: Steps of a phase with a stated length.

    Raises:
        UsageError: costs are not known, or allow no step.
    """
    matched, most = recipe.match_train_tflops, recipe.max_train_tflops
    key = "max_train_tflops" if matched is None else "match_train_tflops"
    if price is None:
        raise UsageError(f"phases.{name}.{key}: the cost of a step is not known here; give max_steps")
    if most is not None:
        target = most
    else:
        assert matched is not None
        one_epoch = {} if recipe.max_steps or recipe.num_train_epochs else {"num_train_epochs": 1.0}
        reference = stated(recipe.model_copy(update=one_epoch))
        found = price(matched, reference)
        if found is None:
            raise UsageError(f"phases.{name}.{key}: {matched} cannot be divided into {reference} steps")
        target = found
    try:
        return steps_of_cost(target, lambda steps: price(recipe.schedule, steps), at_most=most is not None)
    except ValueError as error:
        raise UsageError(f"phases.{name}.{key}: {error}") from error
