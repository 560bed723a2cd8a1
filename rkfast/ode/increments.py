"""What the Runge-Kutta steps of a network do to an input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rkfast.nn import RKStep
from rkfast.ode.untouched import as_it_was


@dataclass(frozen=True)
class StepReport:
    """One step of a network on one input. Sizes are root mean squares over all elements.

    Attributes:
        name: of the module.
        method: of its tableau.
        h: its step size; where it is learned or given per channel, a tuple of one for each.
        size: of y, what the step reads.
        increments: of h b_i k_i, one for each stage.
        error: of h sum_i (b_i - b^_i) k_i, the local error by the embedded weights; None for a method without them,
            and for a step with other coefficients than its tableau.
    """

    name: str
    method: str
    h: float | tuple[float, ...]
    size: float
    increments: tuple[float, ...]
    error: float | None


@dataclass(frozen=True)
class Probe:
    """The steps of a network in the order in which they began; the str is a table."""

    steps: tuple[StepReport, ...]

    def __iter__(self) -> Iterator[StepReport]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __str__(self) -> str:
        head = ("step", "method", "h", "|y|", "local error", "|h b_i k_i|")
        rows = [head] + [
            (
                step.name,
                step.method,
                f"{step.h:.4g}" if isinstance(step.h, float) else f"{min(step.h):.4g} to {max(step.h):.4g}",
                f"{step.size:.3g}",
                "" if step.error is None else f"{step.error:.3g}",
                "  ".join(f"{v:.3g}" for v in step.increments),
            )
            for step in self.steps
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def probe(model: nn.Module, *inputs: Any) -> Probe:
    """Run ``model(*inputs)`` once, without gradients, and report on every ``RKStep`` in it, also those within others.

    The model runs in the mode in which it is, fused or not; in training with batch statistics and dropout. Afterwards
    buffers, such as running statistics, hold what they held, the state of the random generators is as it was, and no
    hook is left. Of an adaptive step h is the one that it starts from.

    Raises:
        TypeError: model is no Module.
        ValueError: it has no RKStep.
        RuntimeError: its steps did not run; of a compiled model probe the one that was compiled.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Module, got {type(model).__name__}")
    found = {name: module for name, module in model.named_modules() if isinstance(module, RKStep)}
    if not found:
        raise ValueError(f"model: {type(model).__name__} has no RKStep")
    open_: list[_Record] = []  # the steps that are running, each within the one before it
    records: list[_Record] = []
    handles = []
    try:
        for name, step in found.items():
            handles.append(step.register_forward_pre_hook(_opens(open_, records, name)))
            # Before that of the step around it, which has this one for a branch.
            handles.append(step.register_forward_hook(_closes(open_), prepend=True))
            # One hook, also where a branch serves several stages.
            handles += [branch.register_forward_hook(_records(open_, step)) for branch in dict.fromkeys(step.branches)]
        with as_it_was(model), torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not records:
        raise RuntimeError("model: none of its RKSteps ran; of a compiled model probe the one that was compiled")
    return Probe(tuple(record.report() for record in records))


class _Record:
    """What the branches of a running step leave, taken while it is there: their buffers may serve again."""

    def __init__(self, name: str, step: RKStep) -> None:
        self.name = name
        self.step = step
        a, self.b, h = step.coefficients()
        self.h = h if isinstance(h, float) else tuple(h)
        t = step.tableau
        self.difference: list[float] | None = None
        if t.b_embedded is not None and (a, self.b) == t.floats():
            self.difference = [float(b + -1 * e) for b, e in zip(t.b, t.b_embedded, strict=True)]
        self.size = math.nan
        self.increments: list[float] = []
        self.error: Tensor | None = None

    def add(self, x: Tensor, k: Tensor) -> None:
        i = len(self.increments)
        if i == 0:
            self.size = _rms(x)  # the first stage reads y itself
        scaled = self._times_h(k)
        self.increments.append(abs(self.b[i]) * _rms(scaled))
        if self.difference is not None and self.difference[i]:
            term = self.difference[i] * scaled
            self.error = term if self.error is None else self.error + term

    def report(self) -> StepReport:
        error = None if self.error is None else _rms(self.error)
        return StepReport(self.name, self.step.tableau.name, self.h, self.size, tuple(self.increments), error)

    def _times_h(self, k: Tensor) -> Tensor:
        k = k.detach().to(torch.promote_types(k.dtype, torch.float32))
        if isinstance(self.h, float):
            return self.h * k
        return torch.tensor(self.h, dtype=k.dtype, device=k.device).view(-1, *(1,) * (k.dim() - 2)) * k


def _opens(open_: list[_Record], records: list[_Record], name: str) -> Callable[..., None]:
    def hook(step: RKStep, _: Any) -> None:
        open_.append(_Record(name, step))
        records.append(open_[-1])

    return hook


def _closes(open_: list[_Record]) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        open_.pop()

    return hook


def _records(open_: list[_Record], step: RKStep) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: Sequence[Any], k: Tensor) -> None:
        if open_ and open_[-1].step is step:  # and not another step that has the branch too
            open_[-1].add(inputs[0], k)

    return hook


def _rms(x: Tensor) -> float:
    x = x.detach()
    return (
        torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) / max(x.numel(), 1) ** 0.5
    ).item()
