"""What one sample of a phase holds on average: the data's measured lengths, mixed as the phase mixes its sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from orchestrator.plan.cost import Sample
from orchestrator.plan.identity import digest
from orchestrator.plan.measure import Lengths, measure_lengths
from orchestrator.plan.reached import data_identity
from orchestrator.plan.steps import num_rows
from orchestrator.spec.components import DataSpec
from orchestrator.spec.experiment import ExperimentSpec
from orchestrator.spec.model_facts import ModelFacts
from orchestrator.spec.phase import PhaseSpec


class Samples:
    """Measures each data set once.

    Attributes:
        missing: Data sets whose lengths are not at hand, by the phase that uses them.
    """

    def __init__(self) -> None:
        self.missing: dict[tuple[str, str], None] = {}
        self._means: dict[tuple[str, str, int], Lengths | None] = {}

    def mean(
        self, spec: ExperimentSpec, phase: str, recipe: PhaseSpec, sets: Mapping[str, float], facts: ModelFacts
    ) -> Sample | None:
        """The mean sample of a phase; sets weigh by the rows of an epoch. None where a set's lengths are not at hand.

        Args:
            spec: Holds the data sets and the model.
            phase: Name of the phase.
            recipe: Its `model_max_length` cuts texts.
            sets: Name of each set to its share.
            facts: The model's; an image counts as its visual tokens.
        """
        weighed: list[tuple[float, Lengths]] = []
        for name, share in sets.items():
            found = self._lengths(spec, recipe, spec.data[name], facts)
            if found is None:
                self.missing[name, phase] = None
                return None
            weighed.append(((num_rows(spec.data[name]) or 1) * share, found))
        total = sum(weight for weight, _ in weighed)

        def mean(of: Callable[[Lengths], float]) -> float:
            return sum(weight * of(lengths) for weight, lengths in weighed) / total

        return Sample(mean(lambda x: x.text_tokens), mean(lambda x: x.label_tokens), mean(lambda x: x.images))

    def _lengths(self, spec: ExperimentSpec, recipe: PhaseSpec, data: DataSpec, facts: ModelFacts) -> Lengths | None:
        folder, longest = spec.model.model_name_or_path, recipe.model_max_length
        key = (data.model_dump_json(), folder, longest)
        if key not in self._means:
            identity, notice = data_identity(data)
            tokens = facts.image_grid.tokens
            self._means[key] = None if notice else measure_lengths(data, digest(identity), folder, longest, tokens)
        return self._means[key]
