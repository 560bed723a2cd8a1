"""The pre-activation convolution, ``conv(relu(BN(x)))``, which keeps x and nothing normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkfast import dispatch
from rkfast.ops import checks, collective, layout
from rkfast.ops.bn_relu_conv import reference
from rkfast.ops.bn_rk_sum import with_mean_terms
from rkfast.ops.channel_moments import Moments, channel_moments, moments_dtype, update_running_stats
from rkfast.ops.channel_moments import reference as plain_moments
from rkfast.ops.conv import convolution_op, products
from rkfast.ops.conv import kernel_reason as conv_reason
from rkfast.ops.norm import Norm, check_norm


def _fake(
    x: Tensor,
    conv: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    channels_last: bool,
    eps: float,
    moments: bool,
) -> list[Tensor]:
    shape = (x.shape[0], conv.shape[0], *x.shape[2:])
    dtype = moments_dtype(x.dtype)
    vectors = [*([x.shape[1]] * 2 if mean is None else []), *([conv.shape[0]] * 2 if moments else [])]
    out = x.new_empty_strided(shape, layout.strides(shape, channels_last))
    return [out, *(x.new_empty(channels, dtype=dtype) for channels in vectors)]


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    conv: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    channels_last: bool,
    batch_stats: bool,
    eps: float,
    need_x: bool,
    need_conv: bool,
    need_affine: bool,
) -> list[Tensor]:
    return [
        *([layout.empty(x, channels_last)] if need_x else []),
        *([torch.empty_like(conv)] if need_conv else []),
        *([x.new_empty(x.shape[1], dtype=moments_dtype(x.dtype)) for _ in range(2)] if need_affine else []),
    ]


Shape = Sequence[int]


def _count(x: Shape, conv: Shape, *_: Any, **__: Any) -> int:
    return products(x, conv)


def _count_backward(grad: Shape, x: Shape, conv: Shape, *rest: Any, **__: Any) -> int:
    need_x, need_conv, need_affine = rest[-3:]
    return ((need_x or need_affine) + need_conv) * products(x, conv)


_ARGS = "Tensor x, Tensor conv, Tensor? weight, Tensor? bias"
# Normalises with the given mean and variance, else with those of x. Returns [out], then x's mean and variance where
# they were not given, then those of out where asked for.
forward = dispatch.register(
    f"bn_relu_conv({_ARGS}, Tensor? mean, Tensor? var, bool channels_last, float eps, bool moments) -> Tensor[]",
    convolution_op("bn_relu_conv", "forward"),
    _fake,
    _count,
)
# Returns [dx], [dconv], [dweight, dbias], each where needed.
_backward = dispatch.register(
    f"bn_relu_conv_backward(Tensor grad, {_ARGS}, Tensor mean, Tensor var, bool channels_last, bool batch_stats, "
    "float eps, bool need_x, bool need_conv, bool need_affine) -> Tensor[]",
    convolution_op("bn_relu_conv_backward", "backward", 1),
    _fake_backward,
    _count_backward,
)


class _Call(NamedTuple):
    channels_last: bool
    batch_stats: bool
    eps: float
    moments: bool
    moved: tuple[Any, ...] | None  # what update_running_stats takes after mean and var
    group: str


class _BnReluConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        mean: Tensor | None,
        var: Tensor | None,
        x: Tensor,
        conv: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Any:
        out, *vectors = forward(x, conv, weight, bias, mean, var, call.channels_last, call.eps, call.moments)
        if mean is None:
            mean, var = vectors[:2]
        if call.moved is not None:
            update_running_stats(mean, var, *call.moved)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, conv, weight, bias, mean, var)
        ctx.mark_non_differentiable(*vectors)
        return (out, *vectors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        needed = ctx.needs_input_grad[3:]
        if grad is None:
            return (None,) * 7
        call: _Call = ctx.call
        x, conv, weight, bias, mean, var = map(checks.held, ctx.saved_tensors)
        if checks.differentiated(grad):
            if call.group:
                raise RuntimeError(
                    "bn_relu_conv: with group the gradient of its gradient (create_graph) is not supported"
                )
            given = None if call.batch_stats else (mean, var)
            found = reference.gradients(grad, x, conv, weight, bias, given, call.eps, needed)
        else:
            found = _gradients(grad, x, conv, weight, bias, mean, var, call, needed)
        return (None, None, None, *found)


def _gradients(
    grad: Tensor,
    x: Tensor,
    conv: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    call: _Call,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    need_x, need_conv, need_weight, need_bias = needed
    shared = bool(call.group) and need_x  # sums over all processes stand between the gradient's parts
    need_affine = need_weight or need_bias or shared
    found = iter(
        _backward(
            grad, x, conv, weight, bias, mean, var, call.channels_last, call.batch_stats and not call.group, call.eps,
            need_x, need_conv, need_affine,
        )
    )  # fmt: skip
    dx = next(found) if need_x else None
    dconv = next(found) if need_conv else None
    dweight, dbias = (next(found), next(found)) if need_affine else (None, None)
    if shared and dx is not None and dweight is not None and dbias is not None:
        dx = with_mean_terms(dx, x, weight, mean, var, dweight, dbias, call.channels_last, call.eps, call.group)
    return [
        dx,
        dconv,
        dweight.to(weight.dtype) if need_weight and weight is not None and dweight is not None else None,
        dbias.to(bias.dtype) if need_bias and bias is not None and dbias is not None else None,
    ]


def kernel_reason(x: Tensor, conv: Tensor) -> str | None:
    """Why BatchNorm and ReLU by ``bn_rk_sum`` and then PyTorch's convolution are the better choice; None where this op
    is, or a backend that serves it is forced. On a GPU it keeps less, but has not been measured."""
    return conv_reason(x, conv.shape)


def bn_relu_conv(
    x: Tensor, conv: Tensor, norm: Norm, *, moments: Moments | None = None, return_moments: bool = False
) -> Any:
    """The pre-activation convolution, ``out = conv(relu(norm(x)))`` (He et al., "Identity Mappings in Deep Residual
    Networks", section 4).

    Equivalent to::

        normed = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        out = F.conv2d(torch.relu(normed), conv, padding=n // 2)

    The normalised tensor is not kept, and on a CPU never there as a whole where the convolution is one of 3x3 or 1x1.
    The backward makes it again: through the convolution and ReLU, with both sums of BatchNorm in the same pass, and
    then ``dx = w * rstd * (g' - mean(g') - x_hat * mean(g' * x_hat))``.

    Args:
        x: Tensor [N, C, H, W]; float32, float64, bfloat16 or float16. Under autocast x and conv are taken in autocast's
            dtype.
        conv: Tensor [K, C, n, n], n odd: a convolution of stride 1 without groups and bias that keeps the resolution.
        norm: a BatchNorm over C channels, in any of its modes.
        moments: the moments of x, if they are known already (``channel_moments(x)``, or ``return_moments`` of the op
            that wrote x); the gradient takes their dependence on x into account. Ignored where norm has statistics of
            its own.
        return_moments: also return the moments of ``out``, as stored; not differentiable.

    Returns:
        Tensor [N, K, H, W] in the memory format of x, channels_last being the fastest; with ``return_moments`` a pair
        (Tensor, Moments). Kept for the backward are x, conv and vectors.

    Differentiable any number of times in x, conv, weight and bias. Running statistics and counter advance once.
    Deterministic. On a CPU 3x3 convolutions go by 4x4 tiles, all of whose results a NaN or an infinity in one pixel
    reaches.

    Raises:
        TypeError: an argument is no tensor or Norm, not floating, or the dtypes are mixed.
        ValueError: a shape, number or device that does not fit; one value per channel in training; running statistics
            that cannot be written. Nothing is modified then.
        RuntimeError: running statistics require grad; what the backward needs is an inference tensor; or a backend was
            asked for that cannot serve this.
    """
    checks.flags(return_moments=return_moments)
    x, conv = _checked(x, conv, norm, moments)
    group = norm.group if norm.batch else ""
    collective.check(group, moments is not None)
    weight, bias, mean, var = norm[:4]
    count = layout.count(x)
    moved: tuple[Any, ...] | None = None
    if norm.training and mean is not None:
        counters = [] if norm.num_batches_tracked is None else [norm.num_batches_tracked]
        moved = (count, [mean], [var], counters, norm.momentum)
    if norm.batch:
        mean, var = (None, None) if moments is None else moments[:2]
    params = (x, conv, weight, bias)
    channels_last = layout.is_channels_last(x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in params):
        names = ("moments.mean", "moments.var") if norm.batch else ("norm.running_mean", "norm.running_var")
        given = {"x": x, "conv": conv, "norm.weight": weight, "norm.bias": bias}
        checks.keepable({**given, names[0]: mean, names[1]: var})
    update: Any = update_running_stats
    if checks.transformed(params):
        if group:
            raise RuntimeError("norm.group: not supported by torch.func, forward-mode AD and torch.jit.trace")
        if norm.batch:  # moments that are given do not carry their dependence on x
            mean = var = None
        out, *found = reference.composite(*params, mean, var, norm.eps, return_moments)
        found = [v.detach() for v in found]
        update = plain_moments.update_running_stats
    else:
        if group:
            with torch.no_grad():
                mean, var = collective.moments(*channel_moments(x)[:2], count, group)
                if moved is not None:
                    every = collective.unbiased(var, collective.count(count, x, group))
                    update_running_stats(mean, every, 1, *moved[1:])
                    moved = None
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in params):
            # Activation checkpointing stops what it computes again at the last tensor that is kept: as in a BatchNorm,
            # statistics move before. A compiler wants nothing changed within a Function.
            within = None if torch.compiler.is_compiling() else moved
            call = _Call(channels_last, norm.batch, norm.eps, return_moments, within, group)
            out, *found = _BnReluConv.apply(call, *checks.distinct((mean, var, *params)))
            moved = moved if within is None else None
        else:
            out, *found = forward(*params, mean, var, channels_last, norm.eps, return_moments)
    if moved is not None:
        if mean is None:
            mean, var = found[:2]
        with torch.no_grad():
            update(mean, var, *moved)
    return (out, Moments(found[-2], found[-1], count)) if return_moments else out


def _checked(x: Tensor, conv: Tensor, norm: Norm, moments: Moments | None) -> tuple[Tensor, Tensor]:
    """x and conv in the dtype of the call."""
    checks.activation(x, "x")
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C, H, W], got {x.dim()} dimensions")
    if checks.autocasts(x) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        conv = conv.to(dtype) if isinstance(conv, Tensor) else conv
    checks.convolution(conv, "conv", x)
    if conv.shape[1] != x.shape[1]:
        raise ValueError(
            f"conv: expected [K, {x.shape[1]}, n, n] for this x, got {list(conv.shape)}; for groups, "
            "strides and other paddings take F.conv2d(bn_rk_sum(x, ..., relu=True), conv, ...)"
        )
    check_norm(norm, "norm", x.shape[1], x)
    if moments is not None:
        checks.triple(moments)
        for name, moment in (("mean", moments[0]), ("var", moments[1])):
            checks.vector(moment, x, f"moments.{name}")
        checks.known(moments, x)
    return checks.held(x), checks.held(conv)
