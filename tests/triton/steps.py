"""What a step of each network of the benchmarks launches on a GPU, and how many bytes that moves, without one:

    python -m tests.triton.steps [NETWORK ...]

prints the kernels of each. The networks are on meta tensors; Triton's launchers are the real ones, and stop where they
would launch. PyTorch's operators count as the kernels that they launch on CUDA. Must run without TRITON_INTERPRET.

Bytes are those that a kernel must read and write: each tensor once, however often the kernel comes back to it. Weights
are bfloat16, as autocast casts them, and what casts them is not counted: at most two launches for each.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.jit import JITFunction

import rkfast
from rkfast import dispatch
from rkfast.nn import cudnn
from rkfast.nn.folded import FoldedConv
from rkfast.ops import kernels, layout
from rkfast.swap.profile import _moved, _once


class Plan(NamedTuple):
    """Of the design with fused 1x1 products: kernels on activations, and the gigabytes that they move."""

    launches: int
    gigabytes: float


class Network(NamedTuple):
    name: str
    size: int
    batch: int
    options: dict[str, Any]
    train: Plan | None
    inference: Plan | None

    @property
    def label(self) -> str:
        told = ("growth_rate", "m", "method")
        options = "".join(f", {key} {value}" for key, value in self.options.items() if key in told)
        return f"{self.name}{options}, {self.batch} x {self.size}²"


ERK = {"growth_rate": 32, "stem": "imagenet", "num_classes": 1000, "m": (2, 4, 8, 20)}
NETWORKS = (
    Network("densenet121", 224, 256, {}, Plan(616, 65.42), Plan(187, 13.38)),
    Network("erknet-3x1_3x1_4x1_2x1-b", 224, 256, ERK, Plan(944, 76.70), Plan(287, 15.95)),
    Network("erknet-7x1_7x1_7x1", 32, 64, {"growth_rate": 36}, Plan(204, 2.50), Plan(77, 0.74)),
    Network("irknet-5x1_5x1_5x1-ab", 32, 64, {"growth_rate": 80}, Plan(337, 5.79), Plan(106, 1.36)),
    Network("irknet-5x1_5x1_5x1-ab", 32, 64, {"growth_rate": 150}, Plan(337, 10.92), Plan(106, 2.55)),
    Network("tsc_resnet50", 224, 256, {}, Plan(320, 71.08), Plan(71, 15.51)),
    Network("resnet50", 224, 256, {}, None, None),
    Network("tsc_resnet-110", 32, 64, {}, Plan(816, 2.16), Plan(222, 0.61)),
    Network("ho_resnet-58", 32, 128, {"method": "rk4"}, Plan(404, 15.65), Plan(114, 4.64)),
    Network("ho_resnet-58", 32, 128, {"method": "rk8"}, Plan(399, 18.20), Plan(114, 5.99)),
)


class Launch(NamedTuple):
    kernel: str
    bytes: int
    activations: bool  # whether it reads or writes any


class Counted(TorchDispatchMode):
    """Lists what is launched inside. Our operators go on to their implementations, meta tensors or not."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "rkfast":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        result = func(*args, **kwargs)
        stem = func._schema.name.rpartition("::")[2]
        if stem in ("conv2d", "convolution") and layout.is_channels_last(args[0]):
            result = result.contiguous(memory_format=torch.channels_last)  # as cuDNN's is, and a meta tensor's is not
        split = SPLIT.get(stem)
        if split is not None:
            for name, *tensors in split(args, result):
                self.add(name, tensors)
        elif moved := _moved(func, args, kwargs, result):
            self.add(stem, [*_tensors((args, kwargs)), *_tensors(result)], moved)
        return result

    def add(self, kernel: str, tensors: list[Any], moved: int | None = None) -> None:
        given = [t for t in tensors if isinstance(t, Tensor)]
        large = any(t.dim() >= 4 and t.shape[0] == self.batch and t.shape[-1] not in (1, 3) for t in given)
        self.launches.append(Launch(kernel, _once(given) if moved is None else moved, large))

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        """In place of JITFunction.run."""
        named = dict(zip(kernel.arg_names, args, strict=False)) | constants
        # Of all slots a growth reads some channels; to what has been added up for those it adds.
        names = ("x", "total", "other") if "size0" in named else ()
        slots = {name: named[name] for name in names if named.get(name) is not None}
        moved = _once(_tensors([value for name, value in named.items() if name not in slots]))
        for slot in slots.values():
            read = (named["size0"] + named["size1"]) * named["UNIT"]
            moved += _once([slot]) * read // slot.shape[1]
        op, stem = kernel.fn.__module__.split(".")[2], kernel.fn.__name__.strip("_").removesuffix("_kernel")
        self.add(f"{op}: {stem}", _tensors(list(named.values())), moved)


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


def _convolution(args: Any, result: Any) -> Iterator[tuple[Any, ...]]:
    x, weight, bias = (*args, None)[:3]
    yield "convolution", x, weight, result
    if bias is not None:
        yield "convolution, bias", result, bias


def _convolution_backward(args: Any, result: Any) -> Iterator[tuple[Any, ...]]:
    grad, x, weight = args[:3]
    dx, dweight, dbias = result
    if dx is not None:
        yield "convolution, data gradient", grad, weight, dx
    if dweight is not None:
        yield "convolution, weight gradient", grad, x, dweight
    if dbias is not None:
        yield "convolution, bias gradient", grad, dbias


def _batch_norm(args: Any, result: Any) -> Iterator[tuple[Any, ...]]:
    x, training = args[0], args[5]
    if training:
        yield "batch_norm, statistics", x
    yield "batch_norm", x, result[0]


def _batch_norm_backward(args: Any, result: Any) -> Iterator[tuple[Any, ...]]:
    grad, x = args[:2]
    yield "batch_norm, gradient sums", grad, x
    if result[0] is not None:
        yield "batch_norm, gradient", grad, x, result[0]


# Operators of several kernels, each with what it reads and writes.
SPLIT: dict[str, Callable[[Any, Any], Iterator[tuple[Any, ...]]]] = {
    "conv2d": _convolution,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "native_batch_norm": _batch_norm,
    "native_batch_norm_backward": _batch_norm_backward,
}


class _Lstm(torch.autograd.Function):
    """cuDNN's, in place of the steps that other devices make of it: one launch forward and two backward."""

    @staticmethod
    def forward(ctx: Any, counted: Counted, hidden: int, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.counted = counted
        ctx.save_for_backward(x, *weights)
        out = x.new_empty((*x.shape[:-1], hidden))
        counted.add("lstm", [x, *weights, out])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gradients = [torch.empty_like(t) for t in ctx.saved_tensors]
        ctx.counted.add("lstm, data gradient", [grad, *ctx.saved_tensors, gradients[0]])
        ctx.counted.add("lstm, weight gradient", [grad, ctx.saved_tensors[0], *gradients[1:]])
        return None, None, *gradients


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Let the Triton backend serve meta tensors, as it serves those of a GPU."""
    reason = dispatch.backend_reason

    def meta(backend: str, device: str, explicit: bool = False) -> str | None:
        if device != "meta":
            return reason(backend, device, explicit)
        return None if backend in ("triton", "reference") else "not here"

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(dispatch, "backend_reason", meta))
        for op in ("dense_block", "bn_relu_pool"):
            kernel_of = importlib.import_module(f"rkfast.ops.{op}")._KERNEL
            stack.enter_context(mock.patch.dict(kernel_of, meta="triton"))
        try:
            yield
        finally:
            for op in dispatch.OPS.values():
                op._chosen.clear()


def made(network: Network, training: bool, fused: bool = True) -> nn.Module:
    """On meta; in bfloat16 what autocast would cast."""
    model = rkfast.create_model(network.name, in_chans=3, fused=fused, **network.options).to("meta")
    if fused and not training:
        model = rkfast.fold(model)
    model = model.train(training).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for name, module in model.named_modules():
        if isinstance(module, FoldedConv) or (isinstance(module, nn.Linear) and not name.startswith("tsc.")):
            module.to(torch.bfloat16)
    for p in model.parameters():
        if p.dim() == 4:
            p.data = p.data.to(torch.bfloat16)
    return model


def step(network: Network, model: nn.Module) -> Callable[[], None]:
    shape = (network.batch, 3, network.size, network.size)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta").contiguous(memory_format=torch.channels_last)
    labels = torch.empty(network.batch, dtype=torch.int64, device="meta")

    def train() -> None:
        F.cross_entropy(model(x).float(), labels).backward()

    def infer() -> None:
        with torch.no_grad():
            model(x)

    return train if model.training else infer


@contextlib.contextmanager
def running(counted: Counted) -> Iterator[None]:
    """Steps on meta tensors as on a GPU, all but the launches themselves; those of PyTorch are counted."""

    def lstm(x: Tensor, state: Any, weights: list[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _Lstm.apply(counted, weights[1].shape[1], x, *weights), *state

    def convolution(*args: Any) -> Tensor:
        with _disable_current_modes():
            return F.conv2d(*args).contiguous(memory_format=torch.channels_last)

    def relu(x: Tensor, weight: Tensor, bias: Tensor, *sizes: Any) -> Tensor:
        out = convolution(x, weight, bias, *sizes)
        counted.add("cudnn_convolution_relu", [x, weight, out])
        return out

    def add_relu(x: Tensor, weight: Tensor, other: Tensor, alpha: float, bias: Tensor, *sizes: Any) -> Tensor:
        out = convolution(x, weight, bias, *sizes)
        counted.add("cudnn_convolution_add_relu", [x, weight, other, out])
        return out

    with contextlib.ExitStack() as stack:
        stack.enter_context(on_meta())
        patches = {"lstm": lstm, "cudnn_convolution_relu": relu, "cudnn_convolution_add_relu": add_relu}
        stack.enter_context(mock.patch.multiple(torch, **patches))
        stack.enter_context(mock.patch.object(cudnn, "on_gpu", lambda t: t.is_meta))
        stack.enter_context(counted)
        yield


def count(network: Network, training: bool, fused: bool = True) -> list[Launch]:
    """The launches of a step, in order."""
    call = step(network, made(network, training, fused))
    counted = Counted(network.batch)

    def run(self: Any, *args: Any, **options: Any) -> None:
        counted.run(self, *args, **options)

    ahead = mock.patch.object(kernels, "compile_ahead", return_value=None)  # which makes a step on meta tensors
    with mock.patch.object(JITFunction, "run", run), ahead, running(counted):
        call()
    return counted.launches


class Total(NamedTuple):
    launches: int  # on activations
    small: int  # on vectors and weights alone
    gigabytes: float


def total(launches: list[Launch]) -> Total:
    large = sum(launch.activations for launch in launches)
    return Total(large, len(launches) - large, sum(launch.bytes for launch in launches) / 1e9)


if __name__ == "__main__":
    for each in NETWORKS:
        if sys.argv[1:] and each.name not in sys.argv[1:]:
            continue
        for training in (True, False):
            found = count(each, training)
            plan = each.train if training else each.inference
            print(f"\n{each.label}, {'training' if training else 'inference'}: {total(found)}, {plan}")
            launched: Counter[tuple[str, bool]] = Counter()
            moved: Counter[tuple[str, bool]] = Counter()
            for launch in found:
                launched[launch.kernel, launch.activations] += 1
                moved[launch.kernel, launch.activations] += launch.bytes
            for (name, large), n in sorted(launched.items(), key=lambda item: -moved[item[0]]):
                print(f"  {n:5}  {moved[name, large] / 1e9:8.3f} GB  {'' if large else '(small) '}{name}")
