"""One case: the gate, then ours, eager, compiled PyTorch and a plain copy in the same rounds."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rkfast import dispatch, measure

from . import gate, timing
from .workload import BOUNDARY, Case, Function, Inputs

COMPILE = {
    "compile": "default",
    "compile_max_autotune": "max-autotune-no-cudagraphs",
    "compile_cuda_graphs": "reduce-overhead",
}
PEERS = (
    *("eager", "eager_channels_last", "add_alpha", "in_place"),
    *("compile", "compile_max_autotune", "compile_cuda_graphs"),
)


@dataclass(frozen=True)
class Contest:
    """How to measure: which of ``PEERS`` beside which backends of ours, and for how long."""

    device: str
    backends: tuple[str, ...]  # "auto" leaves the choice to dispatch
    peers: tuple[str, ...]
    seconds: float
    threads: int


def backends(device: str) -> tuple[str, ...]:
    """Every backend of ours with a kernel for the device; where there is none, what dispatch falls back to."""
    if device == "cpu":
        return ("auto",)
    return tuple(b for b in ("cuda", "triton") if dispatch.backend_reason(b, device) is None) or ("auto",)


class Contender:
    """A computation and the tensors it runs on, and its steps for the two loops: without and with gradients."""

    def __init__(self, function: Function, inputs: Inputs, seed: Tensor | None, backend: str = "auto") -> None:
        self.function, self.backend = function, backend
        self.plain = inputs
        self.seed = seed
        self.inputs = Inputs(_leaves(inputs.activations), _leaves(inputs.vectors), inputs.buffers)
        self.wanted = [*self.inputs.activations, *self.inputs.vectors]

    def forward(self) -> Any:
        with torch.no_grad():
            return self.function(*self.plain)

    def forward_grad(self) -> Any:
        return self.function(*self.inputs)

    def backward(self, outputs: Any) -> Any:
        return torch.autograd.grad(outputs[0], self.wanted, self.seed)

    def both(self) -> Any:
        return self.backward(self.forward_grad())


def _leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


class Copy:
    """``out.copy_(x)`` that moves as many bytes as each part of the case must."""

    backend = "auto"

    def __init__(self, case: Case, device: str) -> None:
        moved = case.bytes()

        def pair(mode: str) -> tuple[Tensor, Tensor]:
            elements = max(moved[mode] // (2 * case.dtype.itemsize), 1)
            x = torch.randn(elements, device=device).to(case.dtype)
            return torch.empty_like(x), x

        self.pairs = {mode: pair(mode) for mode in ("forward", "forward_grad", "backward")}

    def forward(self) -> None:
        out, x = self.pairs["forward"]
        out.copy_(x)

    def forward_grad(self) -> None:
        out, x = self.pairs["forward_grad"]
        out.copy_(x)

    def backward(self, _: Any) -> None:
        out, x = self.pairs["backward"]
        out.copy_(x)


def run(case: Case, contest: Contest) -> dict[str, Any]:
    """Samples of every contender by mode, with what it keeps; or, where the gate fails, no figure at all."""
    if any(peer in COMPILE for peer in contest.peers):  # else Dynamo, seconds of imports, is not needed
        from torch._inductor import config

        torch.compiler.reset()
        config.cpp.threads = contest.threads  # compiled code is cached under it, not under the number in force
    device = contest.device
    drawn, seed = case.draw(device), case.seed(device)
    report: dict[str, Any] = {"id": case.id, "threads": contest.threads, "gate": {}, "contenders": {}, "failed": {}}
    contenders: dict[str, Contender | Copy] = {}
    given = arranged(drawn, case.channels_last)
    for backend in contest.backends:
        ours = Contender(case.workload.ours, given, dense(seed, case.channels_last), backend)
        with forced(backend):
            verdict = gate.check(case, given, dense(seed, case.channels_last))
        served = dispatch.OPS[case.workload.op].last
        name = served.backend if served is not None and backend == "auto" else backend
        report["gate"][name] = verdict._asdict()
        if verdict.failure is None:
            contenders[name] = ours
    if not contenders:
        return report
    ours_by = tuple(contenders)
    contenders.update(_peers(case, contest, drawn, given, seed))
    contenders["copy"] = Copy(case, device)
    _warm_up(case, contenders, ours_by, report["failed"])
    for name, each in contenders.items():
        footprint = _footprint(case, each, device)
        report["contenders"][name] = {"ms": {}, "faults": {}, "ours": name in ours_by, **footprint}
    _measure(case, contest, contenders, report["contenders"])
    return report


def dense(t: Tensor, channels_last: bool) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def arranged(inputs: Inputs, channels_last: bool) -> Inputs:
    return inputs.map(lambda t: dense(t, channels_last), torch.clone)


def forced(name: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if name == "auto" else dispatch.use(name)


def _peers(case: Case, contest: Contest, drawn: Inputs, given: Inputs, seed: Tensor) -> Iterator[tuple[str, Contender]]:
    functions = case.workload.peers()
    eager = functions["eager"]
    # Each has its own tensors, but for layout those of ours.
    for name in contest.peers:
        if name in COMPILE:
            own = given.map(torch.clone, torch.clone)
            contender = Contender(eager, own, dense(seed, case.channels_last).clone())
            contender.function = torch.compile(eager, mode=COMPILE[name], dynamic=False)
            if name == "compile_cuda_graphs":  # a graph otherwise copies its inputs at every call
                for t in (*own.activations, *own.vectors, *own.buffers, *contender.wanted):
                    torch._dynamo.mark_static_address(t)
            yield name, contender
        elif name == "eager_channels_last":
            yield name, Contender(eager, arranged(drawn, True), dense(seed, True).clone())
        elif name in functions:
            channels_last = case.channels_last and name != "eager"
            yield name, Contender(functions[name], arranged(drawn, channels_last), dense(seed, channels_last).clone())


def _warm_up(
    case: Case, contenders: dict[str, Contender | Copy], ours: tuple[str, ...], failed: dict[str, str]
) -> None:
    """Compile and run every contender; a peer that cannot is left out, with the reason."""
    for name, contender in list(contenders.items()):
        try:
            _try(case, contender)
        except Exception as error:  # noqa: PERF203
            if name in ours:
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            del contenders[name]


def _try(case: Case, contender: Contender | Copy) -> None:
    with forced(contender.backend), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            contender.forward()
            if case.workload.differentiable:
                contender.backward(contender.forward_grad())


def _footprint(case: Case, contender: Contender | Copy, device: str) -> dict[str, Any]:
    if isinstance(contender, Copy):
        return {"peak_bytes": {}, "saved_bytes": None}
    with forced(contender.backend):
        peak = {"forward": measure.peak_bytes(contender.forward, device)}
        saved = None
        if case.workload.differentiable:
            peak["both"] = measure.peak_bytes(contender.both, device)
            saved = measure.saved_bytes(contender.forward_grad, contender.inputs.vectors)
    return {"peak_bytes": peak, "saved_bytes": saved}


def _measure(
    case: Case, contest: Contest, contenders: dict[str, Contender | Copy], found: dict[str, dict[str, Any]]
) -> None:
    entered = contextlib.ExitStack()

    def entering(name: str) -> None:
        entered.close()
        entered.enter_context(forced(contenders[name].backend))

    with entered:
        plain = {name: timing.Step(c.forward, None) for name, c in contenders.items()}
        for name, samples in timing.interleave(plain, contest.seconds, contest.device, entering).items():
            found[name]["ms"]["forward"] = [s.ms[0] for s in samples]
            found[name]["faults"]["forward"] = timing.summary([s.faults[0] for s in samples]).p50
        if not case.workload.differentiable:
            return
        training = {name: timing.Step(c.forward_grad, c.backward) for name, c in contenders.items()}
        for name, samples in timing.interleave(training, 2 * contest.seconds, contest.device, entering).items():
            ms, faults = found[name]["ms"], found[name]["faults"]
            for part, mode in enumerate(("forward_grad", "backward")):
                ms[mode] = [s.ms[part] for s in samples]
                faults[mode] = timing.summary([s.faults[part] for s in samples]).p50
            ms["both"] = [sum(s.ms) for s in samples]
            faults["both"] = timing.summary([sum(s.faults) for s in samples]).p50
        if case.shape == BOUNDARY:  # what the call costs, without the caches that a backward in between leaves
            alone = {name: timing.Step(c.forward_grad, None) for name, c in contenders.items()}
            for name, samples in timing.interleave(alone, contest.seconds, contest.device, entering).items():
                found[name]["ms"]["forward_grad"] = [s.ms[0] for s in samples]
