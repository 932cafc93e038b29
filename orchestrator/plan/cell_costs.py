"""What the cells and stage runs of an experiment cost by the formula of `cost.py`, each part computed once."""

from __future__ import annotations

from typing import Any

from orchestrator.plan import cost
from orchestrator.plan.cells.cell import Cell, PhasePlan
from orchestrator.plan.cells.sample_lengths import Samples
from orchestrator.plan.cost import Sample
from orchestrator.plan.identity import canonical_json
from orchestrator.plan.jobs import Action

_FIGURES = ("train_tflops", "visual_layer_tokens", "compression_ratio")
_NO_COST: dict[str, float | None] = dict.fromkeys((*_FIGURES, "forward_decoder_linear_tflops"))


class Costs:
    """Costs of planned work.

    Token figures and `forward_decoder_linear_tflops` are per sample of one image and `text_tokens` text tokens; a
    cell's are the mean over the samples of `finetune` (of its last phase where there is none).

    Args:
        text_tokens: Text tokens a sample, all labelled, one image; None takes the data's measured means.
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
        self._by_lineage: dict[str, Sample] = {}

    def stage_run(self, cell: Cell, plan: PhasePlan, first: int, last: int) -> dict[str, float | None]:
        """Return the cost of the steps `first` to `last` of a phase; None where the model's facts are not known."""
        if cell.facts is None or not cell.facts.priced:
            return dict(_NO_COST)
        # Cells of one schedule and recipe hold the very same objects, whatever their seeds.
        sample = self.sample(cell, plan)
        key = (id(cell.facts), id(plan.table), id(plan.recipe), sample, first, last)
        if key not in self._prices:
            self._alive.append(plan)  # so that an id stays its own
            self._prices[key] = self._price(cell, plan, sample, first, last)
        return dict(self._prices[key])

    def _price(self, cell: Cell, plan: PhasePlan, sample: Sample, first: int, last: int) -> dict[str, float | None]:
        assert cell.facts is not None
        facts, flops, tokens = cell.facts, 0.0, 0.0
        for points_id, (steps, action) in self._steps(plan, first, last).items():
            each, visual = self._sample_cost(cell, plan, action, points_id)
            flops += steps * each
            tokens += steps * visual
        tokens /= last - first
        return {
            "train_tflops": flops * plan.recipe.global_batch_size,
            "visual_layer_tokens": tokens,
            "compression_ratio": cost.compression_ratio(facts.image_grid, tokens, facts.num_layers),
            "forward_decoder_linear_tflops": cost.forward_decoder_linear_tflops(facts, tokens, sample.text_tokens),
        }

    def cell(self, cell: Cell) -> dict[str, float | None]:
        """Return the cost of a cell trained alone: all its phases' operations, the token figures of its finetuning."""
        if cell.facts is None or not cell.facts.priced:
            return dict.fromkeys(_FIGURES)
        if not cell.phases:
            full = cell.facts.num_layers * cell.facts.image_grid.tokens
            return {"train_tflops": 0.0, "visual_layer_tokens": float(full), "compression_ratio": 1.0}
        phases = [self.stage_run(cell, plan, 0, plan.total_steps) for plan in cell.phases]
        return {
            "train_tflops": sum(phase["train_tflops"] or 0.0 for phase in phases),
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
        key = (cell.facts, points_id, recipe_id, sample)
        if key not in self._per_sample:
            flops = cost.action_tflops_per_sample(cell.facts, action, sample, recipe)
            tokens = cost.action_layer_tokens(cell.facts, action)
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

    def sample(self, cell: Cell, plan: PhasePlan) -> Sample:
        """Return what one sample of a phase holds on average; mixtures weigh by the rows of an epoch."""
        if self.text_tokens is not None:
            return Sample(self.text_tokens, self.text_tokens)
        # A lineage fixes model, data and recipe.
        if plan.lineage not in self._by_lineage:
            assert cell.facts is not None
            sets = {entry["name"]: entry["share"] for entry in plan.data}
            found = self._samples.mean(cell.spec, plan.name, plan.recipe, sets, cell.facts)
            for name, phase in self._samples.missing:
                text = f"data.{name}: its text lengths are not known; costs of {phase} count one image and no text"
                self.notices[f"{text} a sample (text_tokens, --text-tokens N, gives them)"] = None
            self._by_lineage[plan.lineage] = found or Sample(0.0, 0.0)
        return self._by_lineage[plan.lineage]
