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
# By device, small to large; the variants of an op are compared at two, one within the caches and one beyond them.
SHAPES = {
    "cpu": ((8, 16, 8, 8), (16, 36, 32, 32), (8, 64, 32, 32), (64, 64, 32, 32), (4, 64, 112, 112), (16, 256, 56, 56)),
    "cuda": (
        (64, 16, 32, 32),
        (64, 36, 32, 32),
        (64, 64, 32, 32),
        (256, 64, 56, 56),
        (128, 64, 112, 112),
        (256, 256, 56, 56),
    ),
}
CACHED, STREAMED = 1, 4
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float32)}  # the first is the usual one
TINY = (2, 3, 5, 3)
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


def dense(t: Tensor, channels_last: bool) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def arranged(inputs: Inputs, channels_last: bool) -> Inputs:
    return inputs.map(lambda t: dense(t, channels_last), torch.clone)


class Traffic(NamedTuple):
    """Passes over an activation, reads and writes, that remain when nothing stays in a cache; and over a ReLU mask."""

    forward: float
    backward: float = 0
    masks: tuple[int, int] = (0, 0)  # (forward with a graph, backward)

    def bytes(self, numel: int, itemsize: int) -> dict[str, int]:
        mask = math.ceil(numel / 8)
        forward = int(self.forward * numel * itemsize)
        forward_grad = forward + self.masks[0] * mask
        backward = int(self.backward * numel * itemsize) + self.masks[1] * mask
        return {
            "forward": forward,
            "forward_grad": forward_grad,
            "backward": backward,
            "both": forward_grad + backward,
        }


class Workload(Protocol):
    """One variant of an op. Functions take ``(activations, vectors, buffers)``; the first tensor they return is
    differentiated (where ``differentiable``), and all of them are compared, by root mean squares with ``rms``."""

    @property
    def op(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def differentiable(self) -> bool: ...
    @property
    def relu(self) -> bool: ...
    @property
    def rms(self) -> bool: ...
    @property
    def traffic(self) -> Traffic: ...
    def draw(self, shape: tuple[int, ...], randn: Callable[..., Tensor]) -> Inputs: ...
    def ours(self, activations: list[Tensor], vectors: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, ...]: ...
    def peers(self) -> dict[str, Function]: ...
    def before_relu(self) -> Function: ...


class AnyCase(Protocol):
    """What a contest and its report ask of a case, of whatever suite."""

    @property
    def id(self) -> str: ...
    @property
    def op(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def layout(self) -> str: ...
    @property
    def main(self) -> bool: ...  # measured first, and also on one thread
    @property
    def modes(self) -> tuple[str, ...]: ...  # of MODES; those after "forward" come together
    def bytes(self) -> dict[str, int] | None: ...  # that each mode cannot avoid moving, where that says anything


@dataclass(frozen=True)
class Case:
    """A case of an op."""

    workload: Workload
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = True
    main: bool = field(default=False, compare=False)

    @property
    def op(self) -> str:
        return self.workload.op

    @property
    def name(self) -> str:
        return self.workload.name

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.workload.differentiable else MODES[:1]

    @property
    def layout(self) -> str:
        return "channels_last" if self.channels_last else "contiguous"

    @property
    def id(self) -> str:
        shape = "x".join(map(str, self.shape))
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}/{self.name}/{shape}/{dtype}/{self.layout}"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def bytes(self) -> dict[str, int]:
        return self.workload.traffic.bytes(self.numel, self.dtype.itemsize)

    def draw(self, device: str) -> Inputs:
        """Normally distributed data, the same in every process; contiguous, without gradients."""
        generator = torch.Generator(device).manual_seed(zlib.crc32(self.id.encode()))

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        return self.workload.draw(self.shape, randn).map(lambda t: t.to(self.dtype), lambda t: t)

    def seed(self, device: str) -> Tensor:
        generator = torch.Generator(device).manual_seed(1)
        stride = getattr(self.workload, "stride", 1)  # the result's pixels are as many fewer
        shape = (*self.shape[:2], *(size // stride for size in self.shape[2:]))
        return torch.randn(shape, generator=generator, device=device).to(self.dtype)


def grid(main: Workload, variants: Iterable[Workload], size: str, device: str, boundary: bool = True) -> Iterator[Case]:
    """The cases of an op: what a call costs, its main variant at every shape, the others at two."""
    usual, other = DTYPES[device]
    shapes = SHAPES[device]
    compared = (shapes[CACHED], shapes[STREAMED])
    if size == "tiny":
        yield Case(main, TINY, other)
        yield Case(main, TINY, usual, main=True)
        yield from (Case(w, TINY, usual) for w in variants)
        return
    if boundary:
        yield Case(main, BOUNDARY, usual, channels_last=False, main=True)
    if size == "quick":
        yield from (Case(main, shape, usual, main=True) for shape in compared)
        return
    yield from (Case(main, shape, usual, main=True) for shape in shapes)
    yield from (Case(w, shape, usual) for w in variants for shape in compared)
    yield from (Case(main, shape, other) for shape in (shapes[CACHED], *shapes[3:]))
    yield from (Case(main, shape, usual, channels_last=False) for shape in compared)
