"""What the cells and stage runs of an experiment cost by the formula of `cost.py`, each part computed once."""

from __future__ import annotations

from typing import Any

from orchestrator.plan import cost
from orchestrator.plan.cells.cell import Cell, PhasePlan
from orchestrator.plan.cells.sample_lengths import ROWS_READ, Samples
from orchestrator.plan.cost import MeasuredRows, Sample, unpriced, with_text
from orchestrator.plan.identity import canonical_json
from orchestrator.plan.jobs import Action
from orchestrator.spec.model_facts import ModelFacts

_FIGURES = ("train_tflops", "visual_layer_tokens", "compression_ratio")
_NO_COST: dict[str, float | None] = dict.fromkeys((*_FIGURES, "forward_decoder_linear_tflops"))


class Costs:
    """Costs of planned work.

    Token figures and `forward_decoder_linear_tflops` are per sample of one image and `text_tokens` text tokens; a
    cell's are the mean over the samples of `finetune` (of its last phase where there is none). Where images vary in
    size they are means over the images of the measured rows.

    Args:
        text_tokens: Text tokens a sample, all labelled, one image; None takes the data's measured means. Where images
            vary in size a sample keeps the images that were measured.
    """

    def __init__(self, text_tokens: float | None = None) -> None:
        self.text_tokens = text_tokens
        self.notices: dict[str, None] = {}
        self._prices: dict[tuple[Any, ...], dict[str, float | None]] = {}
        self._alive: list[PhasePlan] = []
        self._per_sample: dict[tuple[Any, ...], tuple[float, float]] = {}
        self._counts: dict[tuple[int, int, int], tuple[tuple[Action, ...], dict[str, tuple[int, Action]]]] = {}
        self._recipes: dict[tuple[str, bool], tuple[str, dict[str, Any]]] = {}
        self._samples = Samples()
        self._by_lineage: dict[str, Sample | None] = {}

    def stage_run(self, cell: Cell, plan: PhasePlan, first: int, last: int) -> dict[str, float | None]:
        """Return the cost of the steps `first` to `last` of a phase; None where the model's facts are not known."""
        # Cells of one schedule and recipe hold the very same objects, whatever their seeds.
        sample = self.sample(cell, plan) if cell.facts is not None else None
        if sample is None:
            return dict(_NO_COST)
        key = (id(cell.facts), id(plan.table), id(plan.recipe), sample, first, last)
        if key not in self._prices:
            self._alive.append(plan)  # so that an id stays its own
            try:
                self._prices[key] = self._price(cell, plan, sample, first, last)
            except ValueError as error:
                if sample.rows is None:
                    raise
                # Of images of several sizes some are too small for the amount.
                text = f"costs of {plan.name} are not known: {error}, and the data has such images"
                self.notices[text] = None
                self._prices[key] = dict(_NO_COST)
        return dict(self._prices[key])

    def at_most(self, plan: PhasePlan, first: int = 0, last: int | None = None) -> bool:
        """Return whether the costs of a phase's steps are bounds (see `cost.at_most`)."""
        steps = self._steps(plan, first, plan.last_step if last is None else last)
        return cost.at_most(action for _, action in steps.values())

    def rows(self, cell: Cell, plan: PhasePlan | None = None) -> MeasuredRows | None:
        """Return the measured rows of a cell's phase (None: its last one), where its images vary in size."""
        plan = plan or (cell.phases[-1] if cell.phases else None)
        sample = self.sample(cell, plan) if cell.facts is not None and plan is not None else None
        return None if sample is None else sample.rows

    def _price(self, cell: Cell, plan: PhasePlan, sample: Sample, first: int, last: int) -> dict[str, float | None]:
        assert cell.facts is not None
        facts, flops, tokens = cell.facts, 0.0, 0.0
        for points_id, (steps, action) in self._steps(plan, first, last).items():
            each, visual = self._sample_cost(cell, plan, action, points_id)
            flops += steps * each
            tokens += steps * visual
        tokens /= last - first
        ratio = cost.ratio_of(cost.image_tokens(facts, sample.rows), tokens, facts.num_layers) if tokens else None
        return {
            "train_tflops": flops * plan.recipe.global_batch_size,
            "visual_layer_tokens": tokens,
            "compression_ratio": ratio,
            "forward_decoder_linear_tflops": cost.forward_decoder_linear_tflops(facts, tokens, sample.text_tokens),
        }

    def cell(self, cell: Cell) -> dict[str, float | None]:
        """Return the cost of a cell trained alone as far as it is planned: all its phases' operations, token figures of
        its finetuning.
        """
        if cell.facts is None or not (cell.phases or cell.facts.priced):
            return dict.fromkeys(_FIGURES)
        if not cell.phases:
            full = cell.facts.num_layers * cell.facts.image_grid.tokens
            return {"train_tflops": 0.0, "visual_layer_tokens": float(full), "compression_ratio": 1.0}
        phases = [self.stage_run(cell, plan, 0, plan.last_step) for plan in cell.phases]
        known = [phase["train_tflops"] for phase in phases if phase["train_tflops"] is not None]
        return {
            "train_tflops": sum(known) if len(known) == len(phases) else None,
            "visual_layer_tokens": phases[-1]["visual_layer_tokens"],
            "compression_ratio": phases[-1]["compression_ratio"],
        }

    def _steps(self, plan: PhasePlan, first: int, last: int) -> dict[str, tuple[int, Action]]:
        """Return, by what they do, how many of the steps `first` to `last` do the same, and one of their actions."""
        key = (id(plan.table), first, last)
        if key not in self._counts:
            found: dict[str, tuple[int, Action]] = {}
            for action, points_id in zip(plan.table, plan.schedule.ids, strict=True):
                steps = min(action.last_step, last) - max(action.first_step, first)
                if steps > 0:
                    found[points_id] = (found.get(points_id, (0, action))[0] + steps, action)
            self._counts[key] = (plan.table, found)  # the table stays alive, so that its id stays its own
        return self._counts[key][1]

    def _sample_cost(self, cell: Cell, plan: PhasePlan, action: Action, points_id: str) -> tuple[float, float]:
        assert cell.facts is not None
        recipe_id, recipe = self._recipe(plan)
        sample = self.sample(cell, plan)
        assert sample is not None
        key = (cell.facts, points_id, recipe_id, sample)
        if key not in self._per_sample:
            flops = cost.action_tflops_per_sample(cell.facts, action, sample, recipe)
            tokens = cost.action_layer_tokens(cell.facts, action, sample.rows)
            self._per_sample[key] = (flops, tokens)
        return self._per_sample[key]

    def _recipe(self, plan: PhasePlan) -> tuple[str, dict[str, Any]]:
        # Checkpointing costs work without being part of what a lineage is.
        key = (plan.lineage, plan.recipe.gradient_checkpointing)
        if key not in self._recipes:
            recipe = plan.recipe
            what = {
                "train": list(recipe.train),
                "lora": None if recipe.lora is None else recipe.lora.model_dump(),
                "gradient_checkpointing": recipe.gradient_checkpointing,
            }
            self._recipes[key] = (canonical_json(what), what)
        return self._recipes[key]

    def sample(self, cell: Cell, plan: PhasePlan) -> Sample | None:
        """Return what one sample of a phase holds on average; mixtures weigh by the rows of an epoch.

        None where its cost cannot be known: notices say why.
        """
        assert cell.facts is not None
        if self.text_tokens is not None and cell.facts.priced and unpriced(cell.facts, plan.recipe) is None:
            return Sample(self.text_tokens, self.text_tokens)
        # A lineage fixes model, data and recipe.
        if plan.lineage not in self._by_lineage:
            self._by_lineage[plan.lineage] = self._sample(cell, plan, cell.facts)
        return self._by_lineage[plan.lineage]

    def _sample(self, cell: Cell, plan: PhasePlan, facts: ModelFacts) -> Sample | None:
        reason = unpriced(facts, plan.recipe)
        if reason is not None:
            self.notices[f"costs of {plan.name} are not known: {reason}"] = None
            return None
        sets = {entry["name"]: entry["share"] for entry in plan.data}
        found = self._samples.mean(cell.spec, plan.name, plan.recipe, sets, facts)
        if found is not None and self.text_tokens is not None:
            found = with_text(found, self.text_tokens)
        if facts.priced and not any(self._samples.missing.values()):
            for name, phase in self._samples.missing:
                text = f"data.{name}: its text lengths are not known; costs of {phase} count one image and no text"
                self.notices[f"{text} a sample (text_tokens, --text-tokens N, gives them)"] = None
            return found or Sample(0.0, 0.0)
        for (name, phase), reason in self._samples.missing.items():
            self.notices[f"data.{name}: what its images become is not known, nor the cost of {phase}: {reason}"] = None
        if found is not None:
            self.notices[_measured(plan.name, found)] = None
        return found


def _measured(phase: str, sample: Sample) -> str:
    """Return what was measured of a phase's rows, in words."""
    assert sample.rows is not None
    tokens = [image.tokens for _, image in sample.rows.images]
    if not tokens:
        return f"costs of {phase} are means over measured rows, none of which has an image"
    spread = f"{min(tokens):,} to {max(tokens):,}" if min(tokens) < max(tokens) else f"{tokens[0]:,}"
    return (
        f"costs of {phase} are means over up to {ROWS_READ:,} rows of each of its data sets: "
        f"{sample.images:.2f} images of {spread} visual tokens (mean {sample.rows.image_tokens:,.1f}), "
        f"{sample.text_tokens:,.1f} text tokens"
    )
