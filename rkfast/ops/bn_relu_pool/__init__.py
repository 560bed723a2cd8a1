"""What stands before the convolution of a transition, ``avg_pool2d(relu(BN(x)), 2)``, in one pass over x."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkfast import dispatch
from rkfast.ops import checks, collective, layout
from rkfast.ops.bn_relu_pool import reference
from rkfast.ops.bn_rk_sum import with_mean_terms
from rkfast.ops.channel_moments import Moments, channel_moments, moments_dtype, update_running_stats
from rkfast.ops.channel_moments import reference as plain_moments
from rkfast.ops.norm import Norm, check_norm


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    channels_last: bool,
    eps: float,
) -> Tensor:
    n, c, height, width = x.shape
    shape = (n, c, height // 2, width // 2)
    return x.new_empty_strided(shape, layout.strides(shape, channels_last))


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    channels_last: bool,
    batch_stats: bool,
    eps: float,
    need_x: bool,
    need_affine: bool,
) -> list[Tensor]:
    return [
        *([layout.empty(x, channels_last)] if need_x else []),
        *(x.new_empty(x.shape[1], dtype=moments_dtype(x.dtype)) for _ in range(2 * need_affine)),
    ]


_KERNEL = {"cuda": "triton", "cpu": "cpu"}  # by device
_BACKENDS = ("triton", "cpu", "reference")
_HOME = "rkfast.ops.bn_relu_pool"
_NORM = "Tensor? weight, Tensor? bias, Tensor mean, Tensor var, bool channels_last"
_op = dispatch.Op("bn_relu_pool", dispatch.ordered(_HOME, "forward", _BACKENDS))
_forward = dispatch.register(f"bn_relu_pool(Tensor x, {_NORM}, float eps) -> Tensor", _op, _fake)
_backward_op = dispatch.Op("bn_relu_pool_backward", dispatch.ordered(_HOME, "backward", _BACKENDS), 1)
# Returns [dx], [dweight, dbias], each where needed.
_backward = dispatch.register(
    f"bn_relu_pool_backward(Tensor grad, Tensor x, {_NORM}, bool batch_stats, float eps, bool need_x, "
    "bool need_affine) -> Tensor[]",
    _backward_op,
    _fake_backward,
)


class _Call(NamedTuple):
    channels_last: bool
    batch_stats: bool
    eps: float
    moved: tuple[Any, ...] | None  # what update_running_stats takes after mean and var
    group: str


class _BnReluPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: _Call, mean: Tensor, var: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        out: Tensor = _forward(x, weight, bias, mean, var, call.channels_last, call.eps)
        if call.moved is not None:
            update_running_stats(mean, var, *call.moved)
        ctx.call = call
        ctx.save_for_backward(x, weight, bias, mean, var)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = ctx.needs_input_grad[3:]
        call: _Call = ctx.call
        x, weight, bias, mean, var = map(checks.held, ctx.saved_tensors)
        if checks.differentiated(grad):
            if call.group:
                raise RuntimeError(
                    "bn_relu_pool: with group the gradient of its gradient (create_graph) is not supported"
                )
            given = None if call.batch_stats else (mean, var)
            found = reference.gradients(grad, x, weight, bias, given, call.eps, needed)
        else:
            found = _gradients(grad, x, weight, bias, mean, var, call, needed)
        return (None, None, None, *found)


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    call: _Call,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    need_x, need_weight, need_bias = needed
    shared = bool(call.group) and need_x  # sums over all processes stand between the gradient's parts
    need_affine = need_weight or need_bias or shared
    found = iter(
        _backward(
            grad, x, weight, bias, mean, var, call.channels_last, call.batch_stats and not call.group, call.eps, need_x,
            need_affine,
        )
    )  # fmt: skip
    dx = next(found) if need_x else None
    dweight, dbias = (next(found), next(found)) if need_affine else (None, None)
    if shared and dx is not None and dweight is not None and dbias is not None:
        dx = with_mean_terms(dx, x, weight, mean, var, dweight, dbias, call.channels_last, call.eps, call.group)
    return [
        dx,
        dweight.to(weight.dtype) if need_weight and weight is not None and dweight is not None else None,
        dbias.to(bias.dtype) if need_bias and bias is not None and dbias is not None else None,
    ]


def kernel_reason(x: Tensor) -> str | None:
    """Why ``bn_rk_sum`` and then PyTorch's pool are the better choice; None where this op is, or one is forced."""
    if checks.transformed((x,)):
        return "torch.func, forward-mode AD and torch.jit.trace"
    if x.dim() != 4 or x.numel() == 0 or min(x.shape[2:]) < 2:
        return "an input without 2x2 pixels"
    forced = dispatch.forced()
    if forced is not None:
        return None if forced in _BACKENDS else f"there is no kernel of backend {forced!r}"
    if not layout.is_channels_last(x):
        return "an input that is not channels_last"
    device = x.device.type
    if device not in _KERNEL:
        return f"there is no kernel for {device} tensors"
    return checks.missing(_KERNEL[device], device)


def bn_relu_pool(x: Tensor, norm: Norm, *, moments: Moments | None = None) -> Tensor:
    """BatchNorm, ReLU and the average over 2x2 pixels, before the 1x1 convolution of a transition, with which the
    average commutes (Huang et al., "Densely Connected Convolutional Networks", section 3, where it comes behind).

    Equivalent to::

        normed = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        out = F.avg_pool2d(torch.relu(normed), 2)

    x is read once, and once or twice in the backward; nothing of its size is kept or written but its gradient: with
    ``g'`` a quarter of the gradient of its window where the ReLU is open, and 0 in a last row or column that belongs
    to none, ``dx = w * rstd * (g' - mean(g') - x_hat * mean(g' * x_hat))``.

    Args:
        x: Tensor [N, C, H, W], H and W at least 2; float32, float64, bfloat16 or float16; channels_last is the fastest,
            and a slice of its channels is not copied.
        norm: a BatchNorm over C channels, in any of its modes.
        moments: the moments of x, if they are known already (``channel_moments(x)``, or ``return_moments`` of the op
            that wrote x); the gradient takes their dependence on x into account. Ignored where norm has statistics of
            its own.

    Returns:
        Tensor [N, C, H // 2, W // 2] in the memory format of x. Kept for the backward are x and vectors.

    Differentiable any number of times in x, weight and bias. Running statistics and counter advance once.
    Deterministic.

    Raises:
        TypeError: an argument is no tensor or Norm, not floating, or the dtypes are mixed.
        ValueError: a shape, number or device that does not fit; one value per channel in training; running statistics
            that cannot be written. Nothing is modified then.
        RuntimeError: running statistics require grad; what the backward needs is an inference tensor; or a backend was
            asked for that cannot serve this.
    """
    x = _checked(x, norm, moments)
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
    params = (x, weight, bias)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in params)
    if needs_grad:
        names = ("moments.mean", "moments.var") if norm.batch else ("norm.running_mean", "norm.running_var")
        checks.keepable({"x": x, "norm.weight": weight, "norm.bias": bias, names[0]: mean, names[1]: var})
    update: Any = update_running_stats
    if checks.transformed(params):
        if group:
            raise RuntimeError("norm.group: not supported by torch.func, forward-mode AD and torch.jit.trace")
        if norm.batch:  # moments that are given do not carry their dependence on x
            mean = var = None
        out, *found = reference.composite(*params, mean, var, norm.eps)
        if norm.batch:
            mean, var = (v.detach() for v in found)
        update = plain_moments.update_running_stats
    else:
        if norm.batch and (mean is None or group):
            with torch.no_grad():
                mean, var = channel_moments(x)[:2]
                if group:
                    mean, var = collective.moments(mean, var, count, group)
                    if moved is not None:
                        every = collective.unbiased(var, collective.count(count, x, group))
                        update_running_stats(mean, every, 1, *moved[1:])
                        moved = None
        channels_last = layout.is_channels_last(x)
        if needs_grad:
            # Activation checkpointing stops what it computes again at the last tensor that is kept: as in a BatchNorm,
            # statistics move before. A compiler wants nothing changed within a Function.
            within = None if torch.compiler.is_compiling() else moved
            call = _Call(channels_last, norm.batch, norm.eps, within, group)
            out = _BnReluPool.apply(call, *checks.distinct((mean, var, *params)))
            moved = moved if within is None else None
        else:
            out = _forward(*params, mean, var, channels_last, norm.eps)
    if moved is not None:
        with torch.no_grad():
            update(mean, var, *moved)
    return out


def _checked(x: Tensor, norm: Norm, moments: Moments | None) -> Tensor:
    checks.activation(x, "x")
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C, H, W], got {x.dim()} dimensions")
    if x.shape[2] < 2 or x.shape[3] < 2:
        raise ValueError(f"x: expected at least 2x2 pixels to average, got {list(x.shape)}")
    check_norm(norm, "norm", x.shape[1], x)
    if moments is not None:
        checks.triple(moments)
        for name, moment in (("mean", moments[0]), ("var", moments[1])):
            checks.vector(moment, x, f"moments.{name}")
        checks.known(moments, x)
    held: Tensor = checks.held(x)
    return held
