"""Interleaved timing: every contender runs in every round, so that all of them see the same machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

try:
    import resource
except ImportError:  # Windows has no page-fault count
    resource = None  # type: ignore[assignment]

SHORTEST_NS = 200_000  # a sample repeats shorter steps until it lasts this long
WARMED_NS = 20_000_000  # and shorter steps than this are done once untimed before it
ROUNDS = (11, 200)


class Step(NamedTuple):
    """One step of a contender, in one part or in two: ``second`` takes what ``first`` returns."""

    first: Callable[[], Any]
    second: Callable[[Any], Any] | None = None


class Sample(NamedTuple):
    """Milliseconds and page faults of one step, in its two parts."""

    ms: tuple[float, ...]
    faults: tuple[float, ...]


class Summary(NamedTuple):
    p20: float
    p50: float
    p80: float


def summary(values: Sequence[float]) -> Summary:
    """20th, 50th and 80th percentile, interpolated between neighbours."""
    if not values:
        raise ValueError("values: there are none to summarise")
    if len(values) == 1:
        return Summary(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return Summary(cuts[1], cuts[4], cuts[7])


def confidence(values: Sequence[float]) -> tuple[float, float]:
    """The two values between which the median lies by 95 %: of ranks n/2 -+ 0.98 sqrt(n)."""
    ordered = sorted(values)
    reach = 0.98 * math.sqrt(len(ordered))
    low = max(math.floor(len(ordered) / 2 - reach), 0)
    return ordered[low], ordered[len(ordered) - 1 - low]


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> Summary:
    """How many times faster ours is: the ratio of the medians, between percentiles of the ratio round by round."""
    pairwise = summary([a / b for a, b in zip(theirs, ours, strict=False)])
    return Summary(pairwise.p20, statistics.median(theirs) / statistics.median(ours), pairwise.p80)


def page_faults() -> int:
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _cpu_sample(step: Step, repeats: int, warm: bool) -> Sample:
    clock = time.perf_counter_ns
    ns, faults = [0, 0], [0, 0]
    if warm:  # not timed: it finds the caches, also those of code, as the other contenders left them
        kept = step.first()
        if step.second is not None:
            step.second(kept)
        del kept
    before = page_faults()
    if step.second is None:
        start = clock()
        for _ in range(repeats):
            kept = step.first()
            del kept  # freeing is part of the step
        ns[0] = clock() - start
    else:
        for _ in range(repeats):
            start = clock()
            kept = step.first()
            ns[0] += clock() - start
            # Asking costs microseconds, and cold caches after it: a short step's faults are all its first part's.
            if repeats == 1:
                faults[0], before = page_faults() - before, page_faults()
            start = clock()
            result = step.second(kept)
            del kept, result
            ns[1] += clock() - start
    faults[step.second is not None and repeats == 1] += page_faults() - before
    parts = 1 if step.second is None else 2
    return Sample(
        tuple(t / repeats / 1e6 for t in ns[:parts]),
        tuple(f / repeats for f in faults[:parts]),
    )


def _cuda_sample(step: Step, repeats: int, warm: bool) -> Sample:
    """Device time: behind a sleeping kernel the host runs ahead, so that the events time kernels, not launches."""
    pairs = []
    torch.cuda._sleep(2_000_000 * min(repeats, 10))
    for _ in range(repeats):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 if step.second is None else 3)]
        torch.compiler.cudagraph_mark_step_begin()
        events[0].record()
        kept = step.first()
        events[1].record()
        if step.second is not None:
            step.second(kept)
            events[2].record()
        del kept
        pairs.append(events)
    torch.cuda.synchronize()
    parts = len(pairs[0]) - 1
    return Sample(
        tuple(statistics.fmean(events[i].elapsed_time(events[i + 1]) for events in pairs) for i in range(parts)),
        (0.0,) * parts,
    )


def go_on() -> None:
    """What a measurement that shares its machine with no other does between rounds."""


def interleave(
    steps: dict[str, Step],
    seconds: float,
    device: str,
    entering: Callable[[str], object] = lambda name: None,
    rounds: tuple[int, int] = ROUNDS,
    pause: Callable[[], None] = go_on,
    cold: bool = False,
) -> dict[str, list[Sample]]:
    """Sample every step round-robin, in an order that rotates, until ``seconds`` are spent.

    Args:
        steps: by contender, warmed up.
        seconds: time to spend, as far as ``rounds`` (least, most) allows.
        device: "cpu" or "cuda".
        entering: called, untimed, before each sample with the contender's name.
        pause: called between rounds; what it takes is none of ``seconds``.
        cold: on a CPU, time single steps, each behind those of the others; else short ones behind their own.
    """
    take = _cuda_sample if device == "cuda" else _cpu_sample
    plans: dict[str, tuple[int, bool]] = {}
    for name, step in steps.items():
        entering(name)
        once = sum(take(step, 1, False).ms) * 1e6
        if once < SHORTEST_NS:
            once = min(sum(take(step, 1, False).ms) for _ in range(3)) * 1e6
        repeats = max(1, min(1000, round(SHORTEST_NS / max(once, 1.0))))
        plans[name] = (1, False) if cold and device == "cpu" else (repeats, once < WARMED_NS)
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    names = list(steps)
    least, most = rounds
    deadline = time.perf_counter() + seconds
    for i in range(most):
        if i >= least and time.perf_counter() > deadline:
            break
        paused = time.perf_counter()
        pause()
        deadline += time.perf_counter() - paused
        for name in names[i % len(names) :] + names[: i % len(names)]:
            entering(name)
            samples[name].append(take(steps[name], *plans[name]))
    return samples
