"""channel_moments beside torch.var_mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rkfast.ops import channel_moments

from ..workload import Case, Function, Inputs, Traffic, grid


class ChannelMoments:
    op = "channel_moments"
    name = "moments"
    differentiable = False
    relu = False
    rms = False
    traffic = Traffic(1)

    def draw(self, shape: tuple[int, ...], randn: Callable[..., Tensor]) -> Inputs:
        return Inputs([2 * randn(*shape) + randn(shape[1]).view(1, -1, 1, 1)], [], [])

    def ours(self, activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
        return channel_moments(activations[0])[:2]

    def before_relu(self) -> Function:
        raise NotImplementedError

    def peers(self) -> dict[str, Function]:
        def eager(activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]:
            x = activations[0]
            var, mean = torch.var_mean(x if x.dtype == torch.float64 else x.float(), (0, 2, 3), correction=0)
            return mean, var

        return {"eager": eager}


def cases(size: str, device: str) -> Iterator[Case]:
    yield from grid(ChannelMoments(), [], size, device, boundary=False)
