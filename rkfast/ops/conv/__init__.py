"""A convolution with what stands around it in a residual block: moments for the BatchNorm behind it, and the gradient
of the shortcut that reads the same input; for inference bias, sum and ReLU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkfast import dispatch
from rkfast.ops import checks, layout
from rkfast.ops.channel_moments import Moments, channel_moments, moments_dtype
from rkfast.ops.conv import reference


def _cpu_reason(x: Tensor, dtype: torch.dtype) -> str | None:
    if dtype != torch.float32:
        return f"dtype {dtype}: the C++ kernel serves float32"
    return _empty_reason(x, dtype)


def _empty_reason(x: Tensor, dtype: torch.dtype) -> str | None:
    return "an empty tensor has no rows" if x.numel() == 0 else None


REASONS = {"triton": _empty_reason, "cpu": _cpu_reason}


def convolution_op(name: str, function: str, lead: int = 0) -> dispatch.Op:
    """Of an op around one convolution. lead: which of the arguments is x."""
    supports = {
        backend: lambda *args, reason=reason: reason(args[lead], args[lead].dtype)
        for backend, reason in REASONS.items()
    }
    home = f"rkfast.ops.{name.removesuffix('_backward')}"
    return dispatch.Op(name, dispatch.ordered(home, function, (*REASONS, "reference"), supports), lead)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    channels_last: bool,
    relu: bool,
    moments: bool,
) -> list[Tensor]:
    outputs = weight.shape[2 if weight.dim() == 3 else 0]
    shape = (x.shape[0], outputs, *x.shape[2:])
    vectors = [x.new_empty(outputs, dtype=moments_dtype(x.dtype)) for _ in range(2 if moments else 0)]
    return [x.new_empty_strided(shape, layout.strides(shape, channels_last)), *vectors]


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    other: Tensor | None,
    channels_last: bool,
    need_x: bool,
    need_weight: bool,
) -> list[Tensor]:
    return [*([layout.empty(x, channels_last)] if need_x else []), *([torch.empty_like(weight)] if need_weight else [])]


Shape = Sequence[int]


def products(x: Shape, weight: Shape) -> int:
    """FLOPs of the convolution by its definition, also where it goes by tiles."""
    taps = 9 * math.prod(weight[1:]) if len(weight) == 3 else math.prod(weight)
    return 2 * x[0] * math.prod(x[2:]) * taps


def _count(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return products(x, weight)


def _count_backward(grad: Shape, x: Shape, weight: Shape, *rest: Any, **__: Any) -> int:
    need_x, need_weight = rest[-2:]
    return (need_x + need_weight) * products(x, weight)


# out = conv(x) + bias + other, or its ReLU. weight is [K, C, n, n], or by tiles [16, C, K]. Returns
# [out], and its mean and variance where asked for.
forward = dispatch.register(
    "conv(Tensor x, Tensor weight, Tensor? bias, Tensor? other, bool channels_last, bool relu, bool moments) "
    "-> Tensor[]",
    convolution_op("conv", "forward"),
    _fake,
    _count,
)
# Of the bare convolution. Returns [dx + other], [dweight], each where needed.
_backward = dispatch.register(
    "conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor? other, bool channels_last, bool need_x, "
    "bool need_weight) -> Tensor[]",
    convolution_op("conv_backward", "backward", 1),
    _fake_backward,
    _count_backward,
)


class _Call(NamedTuple):
    channels_last: bool
    moments: bool
    passes: bool  # x comes out again


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, weight: Tensor) -> Any:
        out, *vectors = forward(x, weight, None, None, call.channels_last, False, call.moments)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        ctx.mark_non_differentiable(*vectors)
        return (out, *vectors, x.view_as(x)) if call.passes else (out, *vectors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *rest: Any) -> Any:
        call: _Call = ctx.call
        other = rest[-1] if call.passes else None
        need_x, need_weight = ctx.needs_input_grad[1:]
        if grad is None:
            return None, other, None
        x, weight = map(checks.held, ctx.saved_tensors)
        if checks.differentiated(grad):
            dx, dweight = reference.gradients(grad, x, weight, need_x, need_weight)
            return None, dx if other is None or dx is None else dx + other, dweight
        found = iter(_backward(grad, x, weight, other, call.channels_last, need_x, need_weight))
        return None, next(found) if need_x else None, next(found) if need_weight else None


# Where the C++ kernels beat oneDNN's convolution, on two cores with AVX512: pixels, at least, for each channel of the
# wider side of a 3x3 convolution, as csrc/cpu/one_convolution.h has them.
LEAST_3X3 = 0.15  # forward and backward
LEAST_FORWARD = 1.5  # forward alone
LEAST_TRANSFORMED = 0.2  # the same of a weight that is transformed already


def kernel_reason(x: Tensor, weight: Shape) -> str | None:
    """Why PyTorch's convolution with a weight of this shape is the better choice; None where this op is, or a backend
    that serves it is forced. On a GPU it is cuDNN's in either case."""
    forced = dispatch.forced()
    if forced == "reference":
        return None
    trains = torch.is_grad_enabled()
    if not trains and forced is None and weight[2] == 1:
        return "forward alone, oneDNN's 1x1 convolution is no slower"
    reason = _refusal(x, forced)
    if reason is not None or forced:
        return reason
    return _layout_reason(x) or _slow_reason(x, weight, LEAST_3X3 if trains else LEAST_FORWARD)


def block_reason(x: Tensor, pointwise: bool) -> str | None:
    """The same of several convolutions and what stands around them in one op, within which each takes the better.
    pointwise: one of them is of 1x1, which on a GPU are products of ours, of two bytes an element."""
    forced = dispatch.forced()
    if forced == "reference":
        return None
    backend = "cpu" if x.is_cpu else "triton"
    reason = _refusal(x, forced, backend)
    if reason is not None or forced:
        return reason
    if backend == "triton" and not (
        pointwise and checks.dtype_of_call(x).itemsize == 2 and checks.multiplies_16_bits(x.device)
    ):
        return "every convolution would be PyTorch's, and in one op gain nothing"
    return _layout_reason(x)


def transformed_reason(x: Tensor, weight: Shape) -> str | None:
    """``kernel_reason`` of an inference whose weight of this shape is by tiles already."""
    if weight[2] == 1:
        return "there are no tiles of 1x1 convolutions"
    return _refusal(x, dispatch.forced()) or _layout_reason(x) or _slow_reason(x, weight, LEAST_TRANSFORMED)


def _refusal(x: Tensor, forced: str | None, default: str = "cpu") -> str | None:
    """Why no kernel can serve x."""
    backend = forced or default
    if backend not in REASONS:
        return f"there is no kernel of {backend}"
    if checks.tracing():
        return "torch.jit.trace records no op of rkfast"
    return checks.missing(backend, x.device.type, forced is not None) or REASONS[backend](x, checks.dtype_of_call(x))


def _layout_reason(x: Tensor) -> str | None:
    return None if layout.is_channels_last(x) else "a contiguous tensor is copied: kernels work channels_last here"


def _slow_reason(x: Tensor, weight: Shape, least: float) -> str | None:
    """Where the C++ kernel gains nothing on PyTorch."""
    images, _, height, width = x.shape
    outputs, channels, size, _ = weight
    if size == 1:
        return None
    # As csrc/cpu/convolution.h says.
    if size != 3 or min(outputs, channels) < (8 if narrow(weight) else 16) or min(height, width) < 4:
        return "the convolution would be PyTorch's, which gains nothing"
    if not narrow(weight) and images * height * width < least * max(outputs, channels):
        return "too few pixels pay for the transform of the weight"
    return None


def narrow(weight: Shape) -> bool:
    """Whether a weight of this shape goes by tiles of 1x4 pixels; so small a one is transformed at each call."""
    return max(weight[:2]) <= 16


def transformed(weight: Tensor) -> Tensor:
    """A weight, Tensor [K, C, 3, 3], by tiles [16, C, K], or where ``narrow`` as it is: ``forward`` takes it where
    ``transformed_reason`` is None."""
    return weight.detach() if narrow(weight.shape) else reference.tiled(weight.detach())


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    other: Tensor | None = None,
    relu: bool = False,
    return_moments: bool = False,
    return_input: bool = False,
) -> Any:
    """``out = act(conv(x) + bias + other)``, a convolution of stride 1 that keeps the resolution, with what a residual
    block has around it (He et al., "Deep Residual Learning for Image Recognition").

    Equivalent to::

        out = F.conv2d(x, weight, bias, padding=n // 2) + other
        out = torch.relu(out) if relu else out

    On a CPU 3x3 convolutions go by 4x4 tiles of 2x2 results (Lavin and Gray, "Fast Algorithms for Convolutional Neural
    Networks"), of up to 16 channels by 1x4 tiles, and what follows is done while a band of the result is in cache. With
    gradients bias, other and relu are operations of PyTorch behind the convolution.

    Args:
        x: Tensor [N, C, H, W]; float32, float64, bfloat16 or float16. Under autocast x and weight are taken in
            autocast's dtype.
        weight: Tensor [K, C, n, n], n odd.
        bias: None or Tensor [K].
        other: None or a tensor like the result, such as a shortcut.
        relu: whether act is a ReLU, else nothing.
        return_moments: also return the moments of ``out``, as stored; not differentiable.
        return_input: also return x, for whoever reads it besides: gradients of what is returned are added where those
            of the convolution are written, and not in a pass of their own.

    Returns:
        Tensor [N, K, H, W] in the memory format of x, channels_last being the fastest; with ``return_moments`` and
        ``return_input`` a tuple (Tensor, Moments, x) of what was asked for. Kept for the backward are x and weight.

    Differentiable any number of times. Deterministic. A NaN or an infinity in one pixel reaches all results of the 4x4
    tiles it is in.

    Raises:
        TypeError: an argument is no tensor, not floating, or the dtypes are mixed.
        ValueError: a shape or device that does not fit.
        RuntimeError: a backend was asked for that cannot serve this.
    """
    checks.flags(relu=relu, return_moments=return_moments, return_input=return_input)
    given = x
    x, weight, bias, other = _checked(x, weight, bias, other)
    inputs = (x, weight, bias, other)
    channels_last = layout.is_channels_last(x)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    behind = bias is not None or other is not None or relu
    if checks.transformed(inputs) or (needs_grad and behind):
        out = reference.laid(reference.composite(x, weight, bias, other, relu), channels_last)
        vectors: Sequence[Tensor] = channel_moments(out.detach())[:2] if return_moments else ()
    elif needs_grad:
        passes = return_input and given is x and not torch.compiler.is_compiling()
        out, *vectors = _Conv.apply(_Call(channels_last, return_moments, passes), *checks.distinct((x, weight)))
        if passes:
            *vectors, given = vectors
    else:
        out, *vectors = forward(x, weight, bias, other, channels_last, relu, return_moments)
    found: list[Any] = [out]
    if return_moments:
        found.append(Moments(vectors[0], vectors[1], layout.count(out)))
    if return_input:
        found.append(given)
    return found[0] if len(found) == 1 else tuple(found)


def _checked(x: Tensor, weight: Any, bias: Any, other: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The arguments in the dtype of the call."""
    checks.activation(x, "x")
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C, H, W], got {x.dim()} dimensions")
    if checks.autocasts(x) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        weight, bias, other = (t.to(dtype) if isinstance(t, Tensor) else t for t in (weight, bias, other))
    checks.convolution(weight, "weight", x)
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"weight: expected [K, {x.shape[1]}, n, n] for this x, got {list(weight.shape)}; for groups, strides and "
            "other paddings take F.conv2d"
        )
    if bias is not None:
        checks.vector(bias, x, "bias", channels=weight.shape[0])
        if bias.dtype != x.dtype:
            raise TypeError(f"bias: dtype {bias.dtype} differs from x's {x.dtype}; convert one of them")
    if other is not None:
        checks.like(other, x, "other", "the result", (x.shape[0], weight.shape[0], *x.shape[2:]))
    return checks.held(x), checks.held(weight), checks.held(bias), checks.held(other)
