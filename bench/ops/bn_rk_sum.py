"""bn_rk_sum beside F.batch_norm followed, in place, by the addition and the ReLU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rkfast.ops import bn_rk_sum

from ..workload import Case, Function, Inputs, Traffic, grid

EPS, MOMENTUM = 1e-5, 0.1


@dataclass(frozen=True)
class BnRkSum:
    relu: bool = False
    residual: bool = False
    step: bool = False
    training: bool = True

    op = "bn_rk_sum"
    differentiable = True
    rms = False

    @property
    def name(self) -> str:
        parts = [p for p in ("residual", "step", "relu") if getattr(self, p)]
        return "+".join(["train" if self.training else "eval", *parts])

    @property
    def traffic(self) -> Traffic:
        # Training reads x once for the moments and once to normalise, and the gradient likewise.
        passes = 1 + self.training
        masked = self.relu and self.residual
        return Traffic(passes + self.residual + 1, 2 * passes + 1 + masked, (int(masked), passes * masked))

    def draw(self, shape: tuple[int, ...], randn: Callable[..., Tensor]) -> Inputs:
        c = shape[1]
        vectors = [1 + 0.1 * randn(c), randn(c), *([randn(c)] if self.step else [])]
        activations = [2 * randn(*shape) + randn(c).view(1, -1, 1, 1), *([randn(*shape)] if self.residual else [])]
        return Inputs(activations, vectors, [randn(c), 1 + 0.5 * randn(c).abs()])

    def ours(self, activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
        x, *terms = activations
        weight, bias, *step = vectors
        out = bn_rk_sum(
            x, weight, bias, buffers[0], buffers[1], terms=terms, coeffs=[1.0] * len(terms),
            step=step[0] if step else None, relu=self.relu, training=self.training, momentum=MOMENTUM, eps=EPS,
        )  # fmt: skip
        return (out,)

    def before_relu(self) -> Function:
        return lambda activations, vectors, buffers: (self._join(activations, vectors, buffers, False),)

    def peers(self) -> dict[str, Function]:
        def eager(activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
            return (self._join(activations, vectors, buffers, self.relu),)

        return {"eager": eager}

    def _join(self, activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor], relu: bool) -> Tensor:
        x, *terms = activations
        weight, bias, *step = vectors
        out = F.batch_norm(x, buffers[0], buffers[1], weight, bias, self.training, MOMENTUM, EPS)
        if step:
            h = step[0].view(1, -1, 1, 1).to(x.dtype)
            out = torch.addcmul(terms[0], h, out) if terms else h * out
        elif terms:
            out += terms[0]
        return out.relu_() if relu else out


def cases(size: str, device: str) -> Iterator[Case]:
    variants = [
        BnRkSum(),
        BnRkSum(relu=True),
        BnRkSum(residual=True, step=True),
        BnRkSum(relu=True, residual=True, training=False),
        BnRkSum(relu=True, training=False),
    ]
    yield from grid(BnRkSum(relu=True, residual=True), variants, size, device)
