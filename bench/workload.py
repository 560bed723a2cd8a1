"""What a benchmark case is: a computation, the data it runs on, and the bytes it cannot avoid moving."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Forward without and with a graph, the backward that follows the latter, and those two together.
MODES = ("forward", "forward_grad", "backward", "both")
SHAPES = ((8, 16, 8, 8), (16, 36, 32, 32), (8, 64, 32, 32), (64, 64, 32, 32), (4, 64, 112, 112), (16, 256, 56, 56))
CACHED, STREAMED = SHAPES[1], SHAPES[4]  # where the variants of an op are compared: within the caches, and beyond them
BOUNDARY = (2, 8, 1, 1)  # too small for the memory to matter: what a call itself costs

Function = Callable[..., tuple[Tensor, ...]]


class Inputs(NamedTuple):
    """What a computation takes: tensors [N, C, H, W] and parameters, both with gradients, and buffers it writes."""

    activations: list[Tensor]
    vectors: list[Tensor]
    buffers: list[Tensor]

    def map(self, activation: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(
            [activation(t) for t in self.activations],
            [other(t) for t in self.vectors],
            [other(t) for t in self.buffers],
        )


class Traffic(NamedTuple):
    """Passes over an activation, reads and writes, that remain when nothing stays in a cache; and over a ReLU mask."""

    forward: int
    backward: int = 0
    masks: tuple[int, int] = (0, 0)  # (forward with a graph, backward)

    def bytes(self, numel: int, itemsize: int) -> dict[str, int]:
        mask = math.ceil(numel / 8)
        forward = self.forward * numel * itemsize
        forward_grad = forward + self.masks[0] * mask
        backward = self.backward * numel * itemsize + self.masks[1] * mask
        return {
            "forward": forward,
            "forward_grad": forward_grad,
            "backward": backward,
            "both": forward_grad + backward,
        }


class Workload(Protocol):
    """One variant of an op. Functions take ``(activations, vectors, buffers)``; the first tensor they return is
    differentiated (where ``differentiable``), and all of them are compared."""

    op: str
    name: str
    differentiable: bool
    relu: bool
    traffic: Traffic

    def draw(self, shape: tuple[int, ...], randn: Callable[..., Tensor]) -> Inputs: ...
    def ours(self, activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]: ...
    def peers(self) -> dict[str, Function]: ...
    def before_relu(self) -> Function: ...


@dataclass(frozen=True)
class Case:
    workload: Workload
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    main: bool = field(default=False, compare=False)  # also measured on one thread

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"

    @property
    def id(self) -> str:
        shape = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.workload.op}/{self.workload.name}/{shape}/{dtype}/{self.layout}"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def bytes(self) -> dict[str, int]:
        return self.workload.traffic.bytes(self.numel, self.dtype.itemsize)

    def draw(self, device: str) -> Inputs:
        """Normally distributed data, the same in every process; contiguous, without gradients."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.id.encode()))

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        drawn = self.workload.draw(self.shape, randn)
        return drawn.map(lambda t: t.to(device, self.dtype), lambda t: t.to(device))

    def seed(self, device: str) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.shape, generator=generator).to(device, self.dtype)


def grid(
    main: Workload, variants: Iterable[Workload], size: str, *, layouts: bool = True, boundary: bool = True
) -> Iterator[Case]:
    """The cases of an op: its main variant at every shape, the others at two, and what a call costs."""
    every = [main, *variants]
    if size == "tiny":
        yield from (Case(w, (2, 3, 5, 3), dtype) for w in every for dtype in (torch.float32, torch.bfloat16))
        return
    if boundary:
        yield Case(main, BOUNDARY, channels_last=False)
    if size == "quick":
        yield from (Case(main, shape) for shape in (CACHED, STREAMED))
        return
    yield from (Case(main, shape, main=True) for shape in SHAPES)
    yield from (Case(w, shape) for w in every[1:] for shape in (CACHED, STREAMED))
    yield from (Case(main, shape, torch.bfloat16) for shape in (CACHED, *SHAPES[3:]))
    if layouts:
        yield from (Case(main, shape, channels_last=False) for shape in (CACHED, STREAMED))
