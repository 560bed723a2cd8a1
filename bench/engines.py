"""cuDNN's convolutions that scale, shift and cut what they read by ReLU, by the graphs of nvidia-cudnn-frontend."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .contest import said

Engine = Callable[[], tuple[Tensor, ...]]


@functools.cache
def handle() -> Any:
    import cudnn  # type: ignore[import-not-found]  # nvidia-cudnn-frontend

    made = cudnn.create_handle()
    cudnn.set_stream(handle=made, stream=torch.cuda.current_stream().cuda_stream)
    return made


class Graph:
    """Begins with relu(scale * x + shift); ``between`` is the dtype of results that are not stored."""

    def __init__(self, x: Tensor, scale: Tensor, shift: Tensor, padding: int, between: torch.dtype) -> None:
        import cudnn

        self.cudnn, self.handle, self.device = cudnn, handle(), x.device
        named = cudnn.data_type
        self.kinds = {torch.bfloat16: named.BFLOAT16, torch.float16: named.HALF, torch.float32: named.FLOAT}
        self.plan = cudnn.pygraph(
            handle=self.handle,
            io_data_type=self.kinds[x.dtype],
            intermediate_data_type=self.kinds[between],
            compute_data_type=named.FLOAT,
        )
        self.given: dict[Any, Tensor] = {}
        factor, offset = (self.read(v.view(1, -1, 1, 1)) for v in (scale, shift))
        scaled = self.plan.scale(input=self.read(x), scale=factor)
        self.active = self.plan.relu(input=self.plan.bias(input=scaled, bias=offset))
        self.sizes = {"padding": [padding] * 2, "stride": [1, 1], "dilation": [1, 1]}

    def read(self, t: Tensor) -> Any:
        made = self.plan.tensor(dim=list(t.shape), stride=list(t.stride()), data_type=self.kinds[t.dtype])
        self.given[made] = t
        return made

    def write(self, made: Any, into: Tensor) -> None:
        made.set_output(True).set_dim(list(into.shape)).set_stride(list(into.stride()))
        made.set_data_type(self.kinds[into.dtype])
        self.given[made] = into

    def built(self) -> Callable[[], None]:
        self.plan.build([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
        space = torch.empty(max(self.plan.get_workspace_size(), 1), dtype=torch.uint8, device=self.device)
        return lambda: self.plan.execute(self.given, space, handle=self.handle)


def forward(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, padding: int, into: Tensor) -> Engine:
    """Into ``into`` the convolution, and the mean and variance of each of its channels."""

    def make(between: torch.dtype) -> Engine:
        graph = Graph(x, scale, shift, padding, between)
        out = graph.plan.conv_fprop(image=graph.active, weight=graph.read(weight), **graph.sizes)
        graph.write(out, into)
        found = [torch.full((1, into.shape[1], 1, 1), math.nan, device=into.device) for _ in range(2)]
        for total, t in zip(graph.plan.genstats(input=out), found, strict=True):
            graph.write(total, t)
        execute, count = graph.built(), into.numel() / into.shape[1]

        def run() -> tuple[Tensor, ...]:
            execute()
            mean, square = (t.flatten() / count for t in found)
            return into, mean, square - mean * mean

        return run

    return _lazy(make, x.dtype)


def weight_gradient(x: Tensor, scale: Tensor, shift: Tensor, grad: Tensor, padding: int, weight: Tensor) -> Engine:
    def make(between: torch.dtype) -> Engine:
        graph, into = Graph(x, scale, shift, padding, between), torch.full_like(weight, math.nan)
        made = graph.plan.conv_wgrad(image=graph.active, loss=graph.read(grad), **graph.sizes)
        graph.write(made, into)
        execute = graph.built()

        def run() -> tuple[Tensor, ...]:
            execute()
            return (into,)

        return run

    return _lazy(make, x.dtype)


def _lazy(make: Callable[[torch.dtype], Engine], dtype: torch.dtype) -> Engine:
    """What is built at the first call: with results between in dtype, or else in float32."""

    @functools.cache
    def built() -> Engine:
        try:
            return make(dtype)
        except ImportError:
            raise
        except Exception as narrow:
            try:
                return make(torch.float32)
            except Exception as wide:
                raise RuntimeError(f"{said(narrow)}; in float32 {said(wide)}") from wide

    return lambda: built()()
