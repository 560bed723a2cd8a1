"""rk_sum beside the sum as it is written, ``y + c1 * k1 + ...``, and chains of torch.add(alpha=)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rkfast.ops import rk_sum

from ..workload import Case, Function, Inputs, Traffic, grid

RK4 = (1.0, 1 / 6, 1 / 3, 1 / 3, 1 / 6)  # y + h * (k1 + 2 k2 + 2 k3 + k4) / 6, h = 1


@dataclass(frozen=True)
class RkSum:
    """y + sum of n - 1 weighted stages; all weights differ unless given."""

    n: int
    steps: bool = False
    relu: bool = False
    moments: bool = False
    weights: tuple[float, ...] = ()

    op = "rk_sum"
    differentiable = True
    rms = False

    @property
    def name(self) -> str:
        parts = [p for p in ("steps", "relu", "moments") if getattr(self, p)]
        return "+".join([f"n={self.n}{'-rk4' if self.weights else ''}", *parts])

    @property
    def coeffs(self) -> tuple[float, ...]:
        return self.weights or (1.0, *(1 / (i + 2) for i in range(self.n - 1)))

    @property
    def traffic(self) -> Traffic:
        # The gradient of y is the incoming one unless a ReLU masks it; equal weights share a gradient; the gradient of
        # a step reads its term.
        written = self.n - 1 if self.steps else len({c for c in self.coeffs if c != 1.0})
        backward = 1 + written + self.relu + (self.n - 1) * self.steps
        return Traffic(self.n + 1, backward, (int(self.relu), int(self.relu)))

    def draw(self, shape: tuple[int, ...], randn: Callable[..., Tensor]) -> Inputs:
        steps = [randn(shape[1]) for _ in range(self.n - 1)] if self.steps else []
        return Inputs([randn(*shape) for _ in range(self.n)], steps, [])

    def ours(self, activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
        steps = [None, *vectors] if vectors else None
        result = rk_sum(activations, self.coeffs, steps=steps, relu=self.relu, return_moments=self.moments)
        return (result[0], *result[1][:2]) if self.moments else (result,)

    def before_relu(self) -> Function:
        return lambda activations, vectors, buffers: (self._chain(activations, vectors, False, False),)

    def peers(self) -> dict[str, Function]:
        def eager(activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
            total = activations[0]
            for i, (term, c) in enumerate(zip(activations[1:], self.coeffs[1:], strict=True)):
                total = total + (c * vectors[i].view(1, -1, 1, 1).to(term.dtype) * term if vectors else c * term)
            return self._with_moments(torch.relu(total) if self.relu else total)

        def add_alpha(activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
            return self._with_moments(self._chain(activations, vectors, self.relu, False))

        def in_place(activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
            return self._with_moments(self._chain(activations, vectors, self.relu, True))

        tuned = {"add_alpha": add_alpha, "in_place": in_place} if self.n > 2 or self.relu else {"add_alpha": add_alpha}
        return {"eager": eager, **tuned}

    def _chain(self, terms: list[Tensor], steps: list[Tensor], relu: bool, in_place: bool) -> Tensor:
        total = terms[0]
        for i, (term, c) in enumerate(zip(terms[1:], self.coeffs[1:], strict=True)):
            here = in_place and i > 0
            if steps:
                step = steps[i].view(1, -1, 1, 1).to(term.dtype)
                total = total.addcmul_(step, term, value=c) if here else torch.addcmul(total, step, term, value=c)
            else:
                total = total.add_(term, alpha=c) if here else torch.add(total, term, alpha=c)
        if not relu:
            return total
        return total.relu_() if in_place else torch.relu(total)

    def _with_moments(self, total: Tensor) -> tuple[Tensor, ...]:
        if not self.moments:
            return (total,)
        stored = total.detach()
        wide = stored if stored.dtype == torch.float64 else stored.float()
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        return total, mean, var


def cases(size: str, device: str) -> Iterator[Case]:
    variants = [
        RkSum(5, weights=RK4),
        RkSum(2),
        RkSum(8),
        RkSum(14),
        RkSum(4, steps=True),
        RkSum(4, relu=True),
        RkSum(4, moments=True),
        RkSum(4, steps=True, relu=True, moments=True),
    ]
    yield from grid(RkSum(4), variants, size, device)
