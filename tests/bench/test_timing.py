"""Statistics, and who runs when."""

from __future__ import annotations

import time

import pytest

from rkfast.bench import report, timing
from rkfast.bench.workload import Traffic


def test_summary_takes_interpolated_percentiles() -> None:
    assert timing.summary([10.0, 0.0, 5.0]) == pytest.approx((2.0, 5.0, 8.0))
    assert timing.summary(list(range(101))) == pytest.approx((20, 50, 80))
    assert timing.summary([3.0]) == (3.0, 3.0, 3.0)
    with pytest.raises(ValueError, match="values: there are none"):
        timing.summary([])


def test_speedup_is_the_ratio_of_medians_and_its_spread_is_pairwise() -> None:
    # Machine twice as slow in the last round: the ratio of that round is none the less 2.
    ratio = timing.ratios(theirs=[2.0, 2.2, 4.0], ours=[1.0, 1.1, 2.0])
    assert ratio == pytest.approx((2.0, 2.0, 2.0))
    ratio = timing.ratios(theirs=[8.0, 2.0, 3.0], ours=[1.0, 2.0, 6.0])  # 8, 1 and 0.5 round by round
    assert ratio == pytest.approx((0.7, 3 / 2, 5.2))


def test_contenders_take_turns_and_none_is_always_first() -> None:
    ran: list[str] = []
    steps = {name: timing.Step(lambda: time.sleep(0.001)) for name in "abc"}
    samples = timing.interleave(steps, 0.0, "cpu", ran.append, rounds=(6, 6))
    assert {name: len(s) for name, s in samples.items()} == {"a": 6, "b": 6, "c": 6}
    rounds = [ran[i : i + 3] for i in range(3, len(ran), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert {each[0] for each in rounds} == {"a", "b", "c"}


def test_a_step_is_timed_in_its_two_parts() -> None:
    step = timing.Step(lambda: time.sleep(0.002), lambda _: time.sleep(0.02))
    (sample, *_) = timing.interleave({"a": step}, 0.0, "cpu", rounds=(1, 1))["a"]
    first, second = sample.ms
    assert 2 <= first < 20 <= second


def test_short_steps_are_repeated_within_a_sample() -> None:
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1

    timing.interleave({"a": timing.Step(step)}, 0.0, "cpu", rounds=(1, 1))
    assert calls > 20


@pytest.mark.parametrize("parts", (1, 2))
def test_the_first_of_repeated_steps_is_not_timed(parts: int) -> None:
    """It finds the caches as another contender left them."""
    calls = 0

    def step(_: object = None) -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.05 if calls <= parts else 0)

    sample = timing._cpu_sample(timing.Step(step, step if parts == 2 else None), 3, warm=True)
    assert calls == 4 * parts and sum(sample.ms) < 10


@pytest.mark.parametrize("cold", (False, True))
def test_a_cold_step_is_timed_behind_those_of_others(cold: bool) -> None:
    ran: list[str] = []

    def step(name: str) -> timing.Step:
        return timing.Step(lambda: (ran.append(name), time.sleep(0.001)))

    timing.interleave({name: step(name) for name in "ab"}, 0.0, "cpu", rounds=(3, 3), cold=cold)
    assert "".join(ran[2:]) == ("abbaab" if cold else "aabbbbaaaabb")


def test_bytes_of_a_case() -> None:
    found = Traffic(forward=3, backward=2, masks=(1, 2)).bytes(numel=80, itemsize=2)
    assert found == {"forward": 480, "forward_grad": 490, "backward": 340, "both": 830}


def test_each_contender_stands_at_its_better_malloc_setting() -> None:
    from rkfast.bench.ops.channel_moments import ChannelMoments
    from rkfast.bench.workload import Case

    def reported(ours: float, eager: float) -> dict[str, object]:
        def contender(ms: float, is_ours: bool) -> dict[str, object]:
            return {
                "ms": {"forward": [ms] * 3},
                "faults": {"forward": 0},
                "ours": is_ours,
                "peak_bytes": {"forward": 1},
                "saved_bytes": None,
            }

        contenders = {"cpu": contender(ours, True), "eager": contender(eager, False), "copy": contender(0.5, False)}
        return {"threads": 2, "contenders": contenders}

    (row,) = report.rows(
        Case(ChannelMoments(), (2, 3, 4, 5)), {"default": reported(2.0, 4.0), "large": reported(1.0, 6.0)}, "cpu"
    )
    assert (row["malloc"], row["ms_p50"]) == ("large", 1.0)
    assert (row["peers"]["eager"]["malloc"], row["peers"]["eager"]["speedup"]) == ("default", 4.0)
    assert row["copy_share"] == 0.5
    assert row["gb_per_s"] == pytest.approx(2 * 3 * 4 * 5 * 4 / 1e-3 / 1e9)
