"""The front that figures draw: only through points that differ."""

from orchestrator.report.front import OTHER_TRIALS, differing_front, palette
from orchestrator.report.units import lower_is_better


def test_a_front_joins_only_what_is_surely_better() -> None:
    cheap, overlapping, better, worse = (1.0, 0.80, 0.02), (2.0, 0.83, 0.02), (3.0, 0.90, 0.03), (4.0, 0.5, 0.01)
    assert differing_front([worse, better, overlapping, cheap]) == [3, 1]
    # Against the last that joined: 0.83 is not sure to be more than 0.80, and 0.85 is surely more than 0.80.
    assert differing_front([cheap, overlapping, (3.0, 0.85, 0.02)]) == [0, 2]


def test_no_front_between_points_that_may_be_equal() -> None:
    assert differing_front([(1.0, 0.80, 0.02), (2.0, 0.83, 0.02)]) == []
    assert differing_front([(1.0, 0.80, 0.01)]) == differing_front([]) == []
    assert differing_front([(1.0, 0.80, None), (2.0, 0.99, None)]) == [], "without intervals nothing is sure"
    assert differing_front([None, (1.0, 0.80, 0.01), (2.0, 0.99, 0.01), None]) == [1, 2]


def test_of_equal_costs_the_better_is_taken() -> None:
    assert differing_front([(1.0, 0.2, 0.01), (1.0, 0.8, 0.01), (2.0, 0.9, 0.01)]) == [1, 2]


def test_less_loss_is_better() -> None:
    assert differing_front([(1.0, 3.0, 0.1), (2.0, 2.0, 0.1), (3.0, 2.5, 0.1)], lower=True) == [0, 1]
    lower = ("eval/held_out/loss", "eval/held_out/under_full/perplexity", "eval/speed/prefill_milliseconds")
    assert all(map(lower_is_better, lower))
    assert not any(map(lower_is_better, ("eval/vqa/accuracy", "eval/speed/decode_tokens_per_second")))


def test_no_two_schedules_look_alike():
    keys = [f"schedule-{number}" for number in range(55)]
    looks = palette([*keys, OTHER_TRIALS, *keys])
    assert list(looks) == [OTHER_TRIALS, *keys] and len({looks[key] for key in keys}) == len(keys)
    assert (
        palette(keys[:10]).items() <= looks.items() and len({marker for _, marker in palette(keys[:10]).values()}) == 1
    )
