"""Mean and variance of each channel, which travel with the tensor they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rkfast import dispatch
from rkfast.ops import checks, layout
from rkfast.ops.channel_moments import reference
from rkfast.ops.channel_moments.reference import moments_dtype as moments_dtype


class Moments(NamedTuple):
    """Moments of each channel of a tensor [N, C, ...] as stored: ``mean`` and biased ``var`` [C] in float32 (float64
    for float64 tensors), and the ``count`` N * H * W they were taken over. Variance is kept rather than its inverse
    root, because eps may differ from one reader to the next."""

    mean: Tensor
    var: Tensor
    count: int  # type: ignore[assignment]  # the field's name; nobody looks for values in moments with tuple.count


def with_moments(found: Sequence[Tensor]) -> tuple[Tensor, Moments]:
    """(out, its moments) of [out, mean, var]."""
    out, mean, var = found
    return out, Moments(mean, var, layout.count(out))


def pairs(result: list[Tensor], *present: bool) -> tuple[Tensor, ...]:
    """(mean, variance, ...) from what follows result[0], two empty tensors for each pair that was not asked for: an
    operator that writes one of its arguments cannot return a list."""
    found = iter(result[1:])
    return tuple(
        next(found) if given else result[0].new_empty(0, dtype=moments_dtype(result[0].dtype))
        for given in present
        for _ in range(2)
    )


def _fake(x: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    dtype = moments_dtype(x.dtype)
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


_forward = dispatch.register(
    "channel_moments(Tensor x, bool channels_last) -> (Tensor, Tensor)",
    dispatch.Op("channel_moments", dispatch.ordered("rkfast.ops.channel_moments", "forward")),
    _fake,
)
update_running_stats_op = dispatch.Op(
    "update_running_stats", dispatch.ordered("rkfast.ops.channel_moments", "update_running_stats")
)
# running_mean[i] and running_var[i] take their first channels' share of mean and var; count 0 counts and changes
# nothing else.
update_running_stats = dispatch.register(
    "update_running_stats(Tensor mean, Tensor var, SymInt count, Tensor(a!)[] running_mean, Tensor(b!)[] running_var, "
    "Tensor(c!)[] num_batches_tracked, float? momentum) -> ()",
    update_running_stats_op,
    lambda *_: None,
)


def channel_moments(x: Tensor) -> Moments:
    """Mean and biased variance of each channel, in one pass, by Welford's recurrence and Chan's merging.

    Equivalent to ``torch.var_mean(x.float(), (0, 2, 3), correction=0)``.

    Args:
        x: Tensor [N, C], [N, C, L], [N, C, H, W] or [N, C, D, H, W]; float32, float64, bfloat16 or float16; contiguous,
            channels_last or a channel slice of either.

    Returns:
        Moments(mean [C], var [C], count). Of an empty tensor: zeros, and count 0. Not differentiable: the op that uses
        them (``bn_rk_sum(..., moments=)``) carries their dependence on x. Deterministic.

    Raises:
        TypeError: x is no dense floating-point tensor.
        ValueError: x has fewer than 2 or more than 5 dimensions.
    """
    checks.activation(x, "x")
    x = checks.held(x)
    if checks.transformed((x,)):
        mean, var = reference.forward(x, False)
    else:
        mean, var = _forward(x.detach(), layout.is_channels_last(x))
    return Moments(mean, var, layout.count(x))
