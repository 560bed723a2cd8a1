"""A dense block: growths that read all that was made before them, in one buffer of slots; nothing is concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkfast import dispatch
from rkfast.ops import checks, layout
from rkfast.ops.channel_moments import Moments, moments_dtype, update_running_stats

MEMORY = ("speed", "min")


class Norm(NamedTuple):
    """A BatchNorm: what ``torch.nn.functional.batch_norm`` takes, and the counter of nn.BatchNorm2d.

    weight, bias, running_mean, running_var: [C] of any floating dtype, or None. training: normalise with the batch's
    own moments, and move the running ones; False takes the running ones. momentum None: the cumulative average.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None = None
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5

    @property
    def batch(self) -> bool:
        return self.training or self.running_mean is None


class Slots(NamedTuple):
    """Where growths read and write: channels of the buffer, the input's first."""

    reads: list[int]  # of each growth two ranges, begin and end; the second may be empty
    writes: list[int]
    channels: int
    summed: list[int]  # first channels of what is added to the input; none: the whole buffer is the result


_ARGS = (
    "Tensor x, Tensor[] conv1, Tensor[] conv2, Tensor?[] norms, Tensor?[] keeps, float keep_scale, int[] reads, "
    "int[] writes, float[] eps, int channels, int[] summed, Tensor? mean, Tensor? var, bool keep"
)


def _cpu_reason(x: Tensor, *args: Any) -> str | None:
    if x.dtype != torch.float32:
        return f"dtype {x.dtype}: the C++ kernel serves float32"
    return "an empty tensor has no rows" if x.numel() == 0 else None


def _backward_reason(grad: Tensor, buffer: Tensor, *args: Any) -> str | None:
    return _cpu_reason(buffer)


def _implementations(function: str, supports: Any) -> tuple[dispatch.Implementation, ...]:
    home = "rkfast.ops.dense_block"
    return (
        dispatch.Implementation("cpu", f"{home}.cpu", function, supports),
        dispatch.Implementation("reference", f"{home}.reference", function),
    )


def _fake(
    x: Tensor,
    conv1: list[Tensor],
    conv2: list[Tensor],
    norms: list[Tensor | None],
    keeps: list[Tensor | None],
    keep_scale: float,
    reads: list[int],
    writes: list[int],
    eps: list[float],
    channels: int,
    summed: list[int],
    mean: Tensor | None,
    var: Tensor | None,
    keep: bool,
) -> list[Tensor]:
    dtype = moments_dtype(x.dtype)

    def rows(channels: int) -> Tensor:
        shape = (x.shape[0], channels, *x.shape[2:])
        return x.new_empty_strided(shape, layout.strides(shape, True))

    result = [rows(channels), x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)]
    if keep and conv2:
        result += [x.new_empty(w.shape[0], dtype=dtype) for w in conv1 for _ in range(2)]
        result += [rows(w.shape[0]) for w in conv1]
    return [*result, rows(x.shape[1])] if summed else result


def _fake_backward(
    grad: Tensor,
    buffer: Tensor,
    mean: Tensor,
    var: Tensor,
    mid_moments: list[Tensor],
    mids: list[Tensor],
    conv1: list[Tensor],
    conv2: list[Tensor],
    norms: list[Tensor | None],
    keeps: list[Tensor | None],
    keep_scale: float,
    reads: list[int],
    writes: list[int],
    eps: list[float],
    inputs: int,
    summed: list[int],
) -> list[Tensor]:
    shape = (buffer.shape[0], inputs, *buffer.shape[2:])
    result = [buffer.new_empty_strided(shape, layout.strides(shape, True))]
    for i, weight in enumerate(conv1):
        result += [torch.empty_like(weight), *(mean.new_empty(weight.shape[1]) for _ in range(2))]
        if conv2:
            result += [torch.empty_like(conv2[i]), *(mean.new_empty(weight.shape[0]) for _ in range(2))]
    return result


_op = dispatch.Op("dense_block", _implementations("forward", _cpu_reason))
# Returns the buffer [N, channels, H, W] and its mean and var [channels]; with keep also, of each bottleneck, mean and
# var, and then the bottlenecks themselves; at last, where there is something to sum, the input and that.
_forward = dispatch.register(f"dense_block({_ARGS}) -> Tensor[]", _op, _fake)
# Returns the gradients of the input, and of each growth those of its first convolution, weight and bias, and of its
# second ones. mids may be empty: they are made again.
_backward = dispatch.register(
    "dense_block_backward(Tensor grad, Tensor buffer, Tensor mean, Tensor var, Tensor[] mid_moments, Tensor[] mids, "
    "Tensor[] conv1, Tensor[] conv2, Tensor?[] norms, Tensor?[] keeps, float keep_scale, int[] reads, int[] writes, "
    "float[] eps, int inputs, int[] summed) -> Tensor[]",
    dispatch.Op("dense_block_backward", _implementations("backward", _backward_reason)),
    _fake_backward,
)


class _Call(NamedTuple):
    slots: Slots
    statistics: list[Tensor | None]  # mean and var of each norm, None where they are the batch's
    keeps: list[Tensor | None]
    keep_scale: float
    eps: list[float]
    neck: bool
    remake: bool  # the bottlenecks are made again in the backward
    mean: Tensor | None
    var: Tensor | None
    found: list[Tensor]  # buffer, mean, var and the moments of the bottlenecks


class _DenseBlock(torch.autograd.Function):
    """params: of each growth a convolution, and weight and bias of the norm before it, once or (bottleneck) twice."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *params: Tensor | None) -> Any:
        conv1, conv2, norms = _sorted(call, params)
        slots = call.slots
        result = _forward(
            x, conv1, conv2, norms, call.keeps, call.keep_scale, slots.reads, slots.writes, call.eps, slots.channels,
            slots.summed, call.mean, call.var, True,
        )  # fmt: skip
        middle = 3 + 2 * len(conv2)
        mids = result[middle : middle + len(conv2)]
        ctx.call = call
        ctx.inputs = x.shape[1]
        ctx.set_materialize_grads(False)
        kept = result[:middle] if call.remake else [*result[:middle], *mids]
        ctx.save_for_backward(*kept, *params, *call.statistics, *call.keeps)
        ctx.counts = (len(kept), len(params), len(call.statistics))
        moments = result[1:middle]
        ctx.mark_non_differentiable(*moments)
        out = result[-1] if slots.summed else result[0]
        return (out, *moments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return (None,) * (2 + ctx.counts[1])
        if torch.is_grad_enabled():
            raise RuntimeError(
                "dense_block: the gradient of its gradient (create_graph=True) is not supported; "
                "take the plain block (fused=False) for it"
            )
        call: _Call = ctx.call
        kept, params, statistics, keeps = _split(ctx.saved_tensors, ctx.counts)
        conv1, conv2, norms = _sorted(call._replace(statistics=statistics), params)
        middle = 3 + 2 * len(conv2)
        slots = call.slots
        found = _backward(
            grad, *kept[:3], kept[3:middle], kept[middle:], conv1, conv2, norms, keeps, call.keep_scale, slots.reads,
            slots.writes, call.eps, ctx.inputs, slots.summed,
        )  # fmt: skip
        needed = ctx.needs_input_grad[1:]
        gradients = [
            d.to(p.dtype) if need and p is not None else None
            for d, p, need in zip(found[1:], params, needed[1:], strict=True)
        ]
        return (None, found[0] if needed[0] else None, *gradients)


def _split(tensors: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    parts, first = [], 0
    for count in counts:
        parts.append(list(tensors[first : first + count]))
        first += count
    return [*parts, list(tensors[first:])]


def _sorted(call: _Call, params: Sequence[Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """(conv1, conv2, norms) from parameters in the order of the growths."""
    each = 6 if call.neck else 3
    conv1 = list(params[::each])
    conv2 = list(params[3::6]) if call.neck else []
    norms: list[Tensor | None] = []
    for i in range(len(params) // 3):
        norms += [*params[3 * i + 1 : 3 * i + 3], *call.statistics[2 * i : 2 * i + 2]]
    return conv1, conv2, norms


def dense_block(
    x: Tensor,
    conv1: Sequence[Tensor],
    norm1: Sequence[Norm],
    conv2: Sequence[Tensor] = (),
    norm2: Sequence[Norm] = (),
    *,
    sum_of: int | None = None,
    drop_rate: float = 0.0,
    training: bool = True,
    memory: str = "speed",
    moments: Moments | None = None,
    return_moments: bool = False,
) -> Any:
    """All growths of a dense block as one function, over one channels_last buffer with a slot for each.

    Growth i reads the prefix ``x_i = [x, g_1, ..., g_{i-1}]`` (Huang et al., "Densely Connected Convolutional
    Networks", equation 2)::

        g_i = conv1_i(relu(norm1_i(x_i)))                               without bottleneck
        g_i = conv2_i(relu(norm2_i(conv1_i(relu(norm1_i(x_i))))))       with one
        out = [x, g_1, ..., g_L]

    or, as an explicit Runge-Kutta step of RKNet (Zhu et al., "Convolutional Neural Networks combined with Runge-Kutta
    Methods", section 3.3.1), ``out = x + sum_i z_i`` with increments ``z_i`` of as many channels as x has.

    No concatenation is ever copied, nothing normalised is stored, the moments of a channel are taken once for all
    layers that read it, and in the backward the mean terms of all BatchNorms that read a slot are applied to it once.

    Args:
        x: Tensor [N, C, H, W]; float32, float64, bfloat16 or float16. Under autocast x and the convolutions are taken
            in autocast's dtype.
        conv1: L weights, [k, C_i, n, n] without a bottleneck and [B, C_i, 1, 1] with one; C_i = C + (i - 1) * k.
        norm1: L BatchNorms over C_i channels. Each may have statistics of its own (training=False) and its own eps.
        conv2, norm2: with a bottleneck L weights [k, B, n, n] and BatchNorms over B channels.
        sum_of: how many increments there are; the sum is returned in place of the buffer.
        drop_rate: of a dropout after each convolution, while training.
        training: whether dropout is on. BatchNorms have their own ``training``.
        memory: "speed" keeps the bottlenecks for the backward, "min" makes them again.
        moments: of x, if they are known already.
        return_moments: also return the moments of the buffer; not with sum_of.

    Returns:
        Tensor [N, C + L * k, H, W], or [N, C, H, W] with sum_of, channels_last; with return_moments a pair (Tensor,
        Moments). For the backward are kept: the buffer, the moments of its channels and, at "speed", the bottlenecks
        [N, B, H, W].

    Differentiable once in x, convolutions, weights and biases. Running statistics and counters advance once.

    Raises:
        TypeError: an argument is no tensor, not floating, or dtypes are mixed.
        ValueError: shapes or lengths that do not fit; one value per channel in training. Nothing is modified then.
        RuntimeError: the gradient of the gradient is asked for; or a backend was asked for that cannot serve this.
    """
    conv1, conv2, norm1, norm2 = list(conv1), list(conv2), list(norm1), list(norm2)
    x, conv1, conv2 = _checked(x, conv1, conv2, norm1, norm2, moments, memory)
    inputs = x.shape[1]
    writes, channels = [], inputs
    for weight in conv2 or conv1:
        writes.append(channels)
        channels += weight.shape[0]
    summed: list[int] = []
    if sum_of is not None:
        if return_moments:
            raise ValueError("return_moments: with sum_of the moments of the sum are not taken here")
        if channels - inputs != sum_of * inputs:
            raise ValueError(
                f"sum_of: {sum_of} increments of {inputs} channels are {sum_of * inputs}, and the growths have "
                f"{channels - inputs}"
            )
        summed = [inputs * (i + 1) for i in range(sum_of)]
    slots = Slots([bound for write in writes for bound in (0, write, 0, 0)], writes, channels, summed)
    out, found = run(x, slots, conv1, norm1, conv2, norm2, drop_rate if training else 0.0, memory, moments)
    return (out, found) if return_moments else out


def run(
    x: Tensor,
    slots: Slots,
    conv1: list[Tensor],
    norm1: list[Norm],
    conv2: list[Tensor],
    norm2: list[Norm],
    drop_rate: float,
    memory: str,
    moments: Moments | None,
) -> tuple[Tensor, Moments]:
    """Growths over any slots: (result, moments of the buffer). Arguments are checked already."""
    neck = bool(conv2)
    norms = [norm for pair in zip(norm1, norm2, strict=True) for norm in pair] if neck else norm1
    convs = [conv for pair in zip(conv1, conv2, strict=True) for conv in pair] if neck else conv1
    statistics = [t for norm in norms for t in ((None, None) if norm.batch else (norm.running_mean, norm.running_var))]
    keeps: list[Tensor | None] = []
    if drop_rate > 0:
        keeps = [_keep(x, weight.shape[0], drop_rate) for weight in convs]
    call = _Call(
        slots, statistics, keeps, 1 / (1 - drop_rate) if drop_rate < 1 else 0.0, [norm.eps for norm in norms], neck,
        memory == "min", *((None, None) if moments is None else moments[:2]), [],
    )  # fmt: skip
    params = [t for conv, norm in zip(convs, norms, strict=True) for t in (conv, norm.weight, norm.bias)]
    count = layout.count(x)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *params))
    tracked = any(norm.training and norm.running_mean is not None for norm in norms)
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "dense_block: transforms of torch.func are not supported; take the plain block (fused=False) for them"
        )
    if needs_grad:
        out, *found = _DenseBlock.apply(call, x, *params)
    else:
        sorted_params = _sorted(call, params)
        # Moments of the bottlenecks are returned with the bottlenecks only.
        result = _forward(
            x, *sorted_params, keeps, call.keep_scale, slots.reads, slots.writes, call.eps, slots.channels,
            slots.summed, call.mean, call.var, tracked and neck,
        )  # fmt: skip
        out = result[-1] if slots.summed else result[0]
        found = result[1:]
    if tracked:
        with torch.no_grad():
            _advance(norm1, norm2, slots, found, count)
    return out, Moments(found[0], found[1], count)


def _keep(x: Tensor, channels: int, drop_rate: float) -> Tensor:
    shape = (x.shape[0], channels, *x.shape[2:])
    # Drawn as F.dropout draws it, so that one seed gives the same.
    return x.new_empty_strided(shape, layout.strides(shape, True)).bernoulli_(1 - drop_rate).bool()


def _advance(norm1: list[Norm], norm2: list[Norm], slots: Slots, found: list[Tensor], count: int) -> None:
    mean, var = found[:2]
    for i, norm in enumerate(norm1):
        if norm.training and norm.running_mean is not None:
            ranges = [range_ for range_ in _pairs(slots.reads[4 * i : 4 * i + 4]) if range_[1] > range_[0]]
            if len(ranges) == 1 and ranges[0][0] == 0:
                own = (mean, var)
            else:
                own = tuple(torch.cat([t[begin:end] for begin, end in ranges]) for t in (mean, var))  # type: ignore[assignment]
            _advance_one(norm, *own, count)
    for i, norm in enumerate(norm2):
        if norm.training and norm.running_mean is not None:
            _advance_one(norm, found[2 + 2 * i], found[3 + 2 * i], count)


def _pairs(bounds: list[int]) -> list[tuple[int, int]]:
    return [(bounds[0], bounds[1]), (bounds[2], bounds[3])]


def _advance_one(norm: Norm, mean: Tensor, var: Tensor, count: int) -> None:
    counters = [] if norm.num_batches_tracked is None else [norm.num_batches_tracked]
    # Without a counter nn.BatchNorm2d leaves a cumulative average where it is.
    momentum = 0.0 if norm.momentum is None and not counters else norm.momentum
    update_running_stats(mean, var, count, [norm.running_mean], [norm.running_var], counters, momentum)


def _checked(
    x: Tensor,
    conv1: list[Tensor],
    conv2: list[Tensor],
    norm1: list[Norm],
    norm2: list[Norm],
    moments: Moments | None,
    memory: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    checks.activation(x, "x")
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C, H, W], got {x.dim()} dimensions")
    if memory not in MEMORY:
        raise ValueError(f"memory: expected one of {', '.join(MEMORY)}, got {memory!r}")
    if not conv1:
        raise ValueError("conv1: expected a weight for each growth, got none")
    for name, values, needed in (("norm1", norm1, len(conv1)), ("conv2", conv2, len(norm2)), ("norm2", norm2, 0)):
        if needed and len(values) != needed:
            raise ValueError(f"{name}: expected {needed} for {len(conv1)} growths, got {len(values)}")
    if conv2 and len(conv2) != len(conv1):
        raise ValueError(f"conv2: expected {len(conv1)}, one for each growth, got {len(conv2)}")
    if conv2 and not norm2:
        raise ValueError("norm2: a bottleneck has a BatchNorm before its second convolution; got none")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        if x.dtype != torch.float64:
            x = x.to(dtype)
            conv1 = [w.to(dtype) for w in conv1]
            conv2 = [w.to(dtype) for w in conv2]
    channels = x.shape[1]
    values = layout.count(x)
    for i in range(len(conv1)):
        width = _conv(conv1[i], f"conv1[{i}]", channels, x, neck=bool(conv2))
        _norm(norm1[i], f"norm1[{i}]", channels, x, values)
        if conv2:
            _norm(norm2[i], f"norm2[{i}]", width, x, values)
            width = _conv(conv2[i], f"conv2[{i}]", width, x, neck=False)
        channels += width
    if moments is not None:
        for name, moment in (("mean", moments.mean), ("var", moments.var)):
            checks.vector(moment, x, f"moments.{name}")
    return x, conv1, conv2


def _conv(weight: object, name: str, channels: int, x: Tensor, neck: bool) -> int:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(weight).__name__}")
    if weight.dtype != x.dtype:
        raise TypeError(f"{name}: dtype {weight.dtype} differs from x's {x.dtype}; convert one of them")
    if weight.device != x.device:
        raise ValueError(f"{name}: device {weight.device} differs from x's {x.device}; move one of them")
    shape = list(weight.shape)
    square = len(shape) == 4 and shape[2] == shape[3] and shape[2] % 2 == 1
    if not square or shape[1] != channels or (neck and shape[2] != 1):
        wanted = f"[B, {channels}, 1, 1]" if neck else f"[k, {channels}, n, n] with n odd"
        raise ValueError(f"{name}: expected {wanted}, got {shape}")
    return shape[0]


def _norm(norm: Norm, name: str, channels: int, x: Tensor, values: int) -> None:
    for field in ("weight", "bias", "running_mean", "running_var"):
        v = getattr(norm, field)
        if v is None:
            continue
        if not isinstance(v, Tensor):
            raise TypeError(f"{name}.{field}: expected a Tensor or None, got {type(v).__name__}")
        if not v.is_floating_point():
            raise TypeError(f"{name}.{field}: expected a floating-point tensor, got {v.dtype}")
        if tuple(v.shape) != (channels,):
            raise ValueError(f"{name}.{field}: expected [{channels}], got {list(v.shape)}")
        if v.device != x.device:
            raise ValueError(f"{name}.{field}: device {v.device} differs from x's {x.device}; move one of them")
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{name}: running_mean and running_var come together, or not at all")
    if norm.batch and values == 1:
        raise ValueError(f"{name}: expected more than 1 value per channel when training, got x of {list(x.shape)}")
