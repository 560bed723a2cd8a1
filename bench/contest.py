"""One case: the gate, then ours, eager, compiled PyTorch and other peers, and a plain copy in the same rounds."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rkfast import dispatch, measure

from . import timing
from .gate import Verdict
from .workload import BOUNDARY, AnyCase

COMPILE = {
    "compile": "default",
    "compile_freezing": "default",
    "compile_max_autotune": "max-autotune-no-cudagraphs",
    "compile_cuda_graphs": "reduce-overhead",
}
# Bytes, where a case does not say how many it moves: the copy then only tells how fast the memory is, and is too large
# for the caches (an H200's hold 50 MB).
COPIED = {"cpu": 1 << 26, "cuda": 1 << 31}


@dataclass(frozen=True)
class Contest:
    """How to measure: which peers beside which backends of ours, and for how long."""

    device: str
    backends: tuple[str, ...]  # "auto" leaves the choice to dispatch
    peers: tuple[str, ...]
    seconds: float
    threads: int
    cold: bool = False  # as ``timing.interleave`` says
    pause: Callable[[], None] = timing.go_on  # between rounds, where another process may measure meanwhile


class Contender:
    """A computation on tensors of its own, as steps for the two loops: without and with gradients."""

    backend = "auto"
    parameters: Sequence[Tensor] = ()  # that the backward may keep at no cost
    compiled = False  # or converted, or anything else that takes time before the first step
    first_s: float | None = None  # seconds that it took to be made and to run the first step, where that is known
    has_footprint = True  # whether its memory is what it takes during a step

    def forward(self) -> Any:
        raise NotImplementedError

    def forward_grad(self) -> Any:
        raise NotImplementedError

    def backward(self, outputs: Any) -> Any:
        raise NotImplementedError

    def both(self) -> Any:
        return self.backward(self.forward_grad())


class Field(Protocol):
    """Who takes part in one case of a suite."""

    def ours(self) -> Iterator[tuple[str, Verdict, Contender]]:
        """Name, what the gate says, and the contender that is measured if that is nothing."""
        ...

    def peers(self) -> Iterator[tuple[str, Callable[[], Contender]]]:
        """Name, and what makes the contender; where that raises, the peer is left out, with the reason."""
        ...


class Suite(NamedTuple):
    """Cases that are measured alike."""

    kind: str  # what the names stand for
    # By name, the cases of one size ("tiny": everything once, "quick": a sample, "full") for one device.
    cases: dict[str, Callable[[str, str], Iterator[Any]]]
    field: Callable[[Any, Contest], Field]
    backends: Callable[[str], tuple[str, ...]]  # of ours, by device
    peers: dict[str, tuple[str, ...]]  # by device, unless others are asked for
    known_peers: tuple[str, ...]
    rounds: tuple[int, int] = timing.ROUNDS


def backends(device: str) -> tuple[str, ...]:
    """Every backend of ours with a kernel for the device; where there is none, what dispatch falls back to."""
    if device == "cpu":
        return ("auto",)
    return tuple(b for b in ("cuda", "triton") if dispatch.backend_reason(b, device) is None) or ("auto",)


def serving(asked: Sequence[str], op: str) -> tuple[str, ...]:
    """The backends asked for that implement the op; where none does, what dispatch falls back to."""
    able = {"auto", *(implementation.backend for implementation in dispatch.OPS[op].implementations)}
    return tuple(backend for backend in asked if backend in able) or ("auto",)


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def raised(error: Exception) -> Verdict:
    return Verdict(math.nan, math.nan, said(error))


class Copy(Contender):
    """``out.copy_(x)`` that moves as many bytes as each part of the case must."""

    has_footprint = False

    def __init__(self, case: AnyCase, device: str) -> None:
        moved = case.bytes() or dict.fromkeys(case.modes, COPIED[device])

        def pair(mode: str) -> tuple[Tensor, Tensor]:
            elements = max(moved[mode] // (2 * case.dtype.itemsize), 1)
            x = torch.randn(elements, device=device).to(case.dtype)
            return torch.empty_like(x), x

        self.pairs = {mode: pair(mode) for mode in case.modes if mode != "both"}

    def forward(self) -> None:
        out, x = self.pairs["forward"]
        out.copy_(x)

    def forward_grad(self) -> None:
        out, x = self.pairs["forward_grad"]
        out.copy_(x)

    def backward(self, outputs: Any) -> None:
        out, x = self.pairs["backward"]
        out.copy_(x)


def run(suite: Suite, case: AnyCase, contest: Contest) -> dict[str, Any]:
    """Samples of every contender by mode, with what it keeps; or, where the gate fails, no figure at all."""
    if any(peer in COMPILE for peer in contest.peers):  # else Dynamo, seconds of imports, is not needed
        from torch._inductor import config

        torch.compiler.reset()
        config.cpp.threads = contest.threads  # compiled code is cached under it, not under the number in force
    device = contest.device
    report: dict[str, Any] = {"id": case.id, "threads": contest.threads, "gate": {}, "contenders": {}, "failed": {}}
    contenders: dict[str, Contender] = {}

    def lost(name: str, error: Exception) -> None:
        """A contender that breaks down is left out, with the reason; the others are measured."""
        contenders.pop(name, None)
        report["contenders"].pop(name, None)
        if name in report["gate"]:
            report["gate"][name]["failure"] = said(error)
        else:
            report["failed"][name] = said(error)

    try:
        field = suite.field(case, contest)
        for name, verdict, ours in field.ours():
            report["gate"][name] = verdict._asdict()
            if verdict.failure is None:
                try:
                    _step(case, ours)
                    contenders[name] = ours
                except Exception as error:
                    lost(name, error)
    except Exception as error:
        report["gate"]["ours"] = raised(error)._asdict()
        return report
    if not contenders:
        return report
    copying: tuple[str, Callable[[], Contender]] = ("copy", functools.partial(Copy, case, device))
    for name, build in (*field.peers(), copying):
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                contender = build()
            _step(case, contender)
        except Exception as error:
            lost(name, error)
        else:
            contenders[name] = contender
            contender.first_s = time.perf_counter() - start
    for name, each in list(contenders.items()):
        ours_too = name in report["gate"]
        found = {"ms": {}, "faults": {}, "ours": ours_too, "first_s": each.first_s, "compiled": each.compiled}
        try:
            for _ in range(2):
                _step(case, each)
            report["contenders"][name] = found | _footprint(case, each, device)
        except Exception as error:
            lost(name, error)
    while contenders.keys() & report["gate"].keys():
        running: list[str] = []
        try:
            _measure(case, contest, suite.rounds, contenders, report["contenders"], running.append)
        except Exception as error:
            if not running:
                raise
            lost(running[-1], error)
        else:
            return report
    report["contenders"] = {}
    return report


def forced(name: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if name == "auto" else dispatch.use(name)


def _step(case: AnyCase, contender: Contender) -> None:
    with forced(contender.backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "forward" in case.modes:
            contender.forward()
        if "both" in case.modes:
            contender.both()


def _footprint(case: AnyCase, contender: Contender, device: str) -> dict[str, Any]:
    if not contender.has_footprint:
        return {"peak_bytes": {}, "saved_bytes": None}
    peak, saved = {}, None
    with forced(contender.backend):
        if "forward" in case.modes:
            peak["forward"] = measure.peak_bytes(contender.forward, device)
        if "both" in case.modes:
            peak["both"] = measure.peak_bytes(contender.both, device)
            saved = measure.saved_bytes(contender.forward_grad, contender.parameters)
    return {"peak_bytes": peak, "saved_bytes": saved}


def _measure(
    case: AnyCase,
    contest: Contest,
    rounds: tuple[int, int],
    contenders: dict[str, Contender],
    found: dict[str, dict[str, Any]],
    running: Callable[[str], None],
) -> None:
    entered = contextlib.ExitStack()

    def entering(name: str) -> None:
        running(name)
        entered.close()
        entered.enter_context(forced(contenders[name].backend))

    def sampled(steps: dict[str, timing.Step], loops: int = 1) -> Iterator[tuple[str, list[timing.Sample]]]:
        seconds = loops * contest.seconds
        samples = timing.interleave(steps, seconds, contest.device, entering, rounds, contest.pause, contest.cold)
        return iter(samples.items())

    with entered:
        if "forward" in case.modes:
            for name, samples in sampled({name: timing.Step(c.forward) for name, c in contenders.items()}):
                found[name]["ms"]["forward"] = [s.ms[0] for s in samples]
                found[name]["faults"]["forward"] = timing.summary([s.faults[0] for s in samples]).p50
        if "both" not in case.modes:
            return
        training = {name: timing.Step(c.forward_grad, c.backward) for name, c in contenders.items()}
        for name, samples in sampled(training, 2):
            ms, faults = found[name]["ms"], found[name]["faults"]
            for part, mode in enumerate(("forward_grad", "backward")):
                ms[mode] = [s.ms[part] for s in samples]
                faults[mode] = timing.summary([s.faults[part] for s in samples]).p50
            ms["both"] = [sum(s.ms) for s in samples]
            faults["both"] = timing.summary([sum(s.faults) for s in samples]).p50
        if case.shape == BOUNDARY:  # what the call costs, without the caches that a backward in between leaves
            for name, samples in sampled({name: timing.Step(c.forward_grad) for name, c in contenders.items()}):
                found[name]["ms"]["forward_grad"] = [s.ms[0] for s in samples]
