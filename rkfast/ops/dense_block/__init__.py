"""A dense block: growths that read all that was made before them, in one buffer of slots; nothing is concatenated."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkfast import dispatch
from rkfast.ops import autocast, checks, collective, layout
from rkfast.ops.channel_moments import Moments, moments_dtype, update_running_stats
from rkfast.ops.norm import Norm, check_norm, usual


class Slots(NamedTuple):
    """Where growths read and write: channels of the buffer, the input's first. Lists are never changed."""

    reads: list[int]  # of each growth two ranges, begin and end; the second may be empty
    writes: list[int]
    channels: int
    summed: list[int] = []  # first channels of what is added to the input; none: the buffer is the result
    first: int = 0  # the channel with which the result begins, where nothing is summed
    turns: list[tuple[int, int]] = []  # of each growth: see turned()

    def width(self, i: int) -> int:
        begin0, end0, begin1, end1 = self.reads[4 * i : 4 * i + 4]
        return end0 - begin0 + end1 - begin1


_ARGS = (
    "Tensor x, Tensor[] conv1, Tensor[] conv2, Tensor?[] norms, Tensor?[] keeps, float keep_scale, int[] reads, "
    "int[] writes, float[] eps, int channels, int[] summed, Tensor? mean, Tensor? var, bool keep, "
    "bool total_moments, str group"
)


def _cpu_reason(x: Tensor, dtype: torch.dtype, group: str = "") -> str | None:
    if group:
        return "a group of processes: their sums are shared by the Triton kernels and the reference"
    if dtype == torch.bfloat16 and not checks.multiplies_bfloat16():
        return "dtype torch.bfloat16: this processor has no instructions for its products (AVX512-BF16)"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"dtype {dtype}: the C++ kernel serves float32 and bfloat16"
    return _empty_reason(x)


def _triton_reason(x: Tensor, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return f"dtype {dtype}: the Triton kernels serve float32, bfloat16 and float16"
    return _empty_reason(x)


def _empty_reason(x: Tensor) -> str | None:
    return "an empty tensor has no rows" if x.numel() == 0 else None


_REASONS = {"triton": _triton_reason, "cpu": _cpu_reason}
_KERNEL = {"cuda": "triton", "cpu": "cpu"}  # by device


def _made(name: str, function: str, lead: int) -> dispatch.Op:
    """lead: which of the arguments is x, beside the group, the last."""
    supports = {
        "triton": lambda *args: _triton_reason(args[lead], args[lead].dtype),
        "cpu": lambda *args: _cpu_reason(args[lead], args[lead].dtype, args[-1]),
    }
    implementations = dispatch.ordered("rkfast.ops.dense_block", function, (*_REASONS, "reference"), supports)
    return dispatch.Op(name, implementations, lead, varies=True)


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
    total_moments: bool,
    group: str,
) -> list[Tensor]:
    dtype = moments_dtype(x.dtype)

    def rows(channels: int) -> Tensor:
        shape = (x.shape[0], channels, *x.shape[2:])
        return x.new_empty_strided(shape, layout.strides(shape, True))

    result = [rows(channels), x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)]
    if keep and conv2:
        result += [x.new_empty(w.shape[0], dtype=dtype) for w in conv1 for _ in range(2)]
        result += [rows(w.shape[0]) for w in conv1]
    if summed:
        result.append(rows(x.shape[1]))
        if total_moments:
            result += [x.new_empty(x.shape[1], dtype=dtype) for _ in range(2)]
    return result


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
    group: str,
) -> list[Tensor]:
    shape = (buffer.shape[0], inputs, *buffer.shape[2:])
    result = [buffer.new_empty_strided(shape, layout.strides(shape, True))]
    for i, weight in enumerate(conv1):
        result += [torch.empty_like(weight), *(mean.new_empty(weight.shape[1]) for _ in range(2))]
        if conv2:
            result += [torch.empty_like(conv2[i]), *(mean.new_empty(weight.shape[0]) for _ in range(2))]
    return result


Shape = Sequence[int]


def _count(x: Shape, conv1: Sequence[Shape], conv2: Sequence[Shape], *_: Any, **__: Any) -> int:
    return _products(x, [*conv1, *conv2])


def _count_backward(
    grad: Shape,
    buffer: Shape,
    mean: Shape,
    var: Shape,
    mid_moments: Sequence[Shape],
    mids: Sequence[Shape],
    conv1: Sequence[Shape],
    conv2: Sequence[Shape],
    *_: Any,
    **__: Any,
) -> int:
    made_again = conv1 if conv2 and not mids else []
    return 2 * _products(buffer, [*conv1, *conv2]) + _products(buffer, made_again)


def _products(x: Shape, weights: Sequence[Shape]) -> int:
    """Of convolutions at the resolution of x, by their definition also where they go by tiles."""
    return 2 * x[0] * math.prod(x[2:]) * sum(math.prod(w) for w in weights)


_op = _made("dense_block", "forward", 0)
# Returns the buffer [N, channels, H, W] and its mean and var [channels], which mean nothing where no norm takes the
# batch's and neither keep nor total_moments asks for them; with keep also, of each bottleneck, mean and var, and then
# the bottlenecks themselves; at last, where there is something to sum, the input and that, and with total_moments its
# mean and var.
_forward = dispatch.register(f"dense_block({_ARGS}) -> Tensor[]", _op, _fake, _count)
# Returns the gradients of the input, and of each growth those of its first convolution, weight and bias, and of its
# second ones. mids may be empty: they are made again.
_backward_op = _made("dense_block_backward", "backward", 1)
_backward = dispatch.register(
    "dense_block_backward(Tensor grad, Tensor buffer, Tensor mean, Tensor var, Tensor[] mid_moments, Tensor[] mids, "
    "Tensor[] conv1, Tensor[] conv2, Tensor?[] norms, Tensor?[] keeps, float keep_scale, int[] reads, int[] writes, "
    "float[] eps, int inputs, int[] summed, str group) -> Tensor[]",
    _backward_op,
    _fake_backward,
    _count_backward,
)


class _Call(NamedTuple):
    slots: Slots
    counts: tuple[int, int, int]  # parameters, statistics and dropout masks among the tensors
    keep_scale: float
    eps: list[float]
    neck: bool
    remake: bool  # the bottlenecks are made again in the backward
    moments: bool  # of the sum
    group: str
    plain: bool  # nobody watches the dispatcher
    advance: Callable[[list[Tensor]], None] | None  # the running statistics, by moments


class _DenseBlock(torch.autograd.Function):
    """tensors: parameters (of each growth a convolution, and weight and bias of the norm before it, once or, with a
    bottleneck, twice), then mean and var of each norm that has its own, dropout masks, and mean and var of x."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *tensors: Tensor | None) -> Any:
        params, statistics, keeps, moments = _split(tensors, call.counts)
        conv1, conv2, norms = _sorted(call.neck, params, statistics)
        slots = call.slots
        run = _op if call.plain else _forward
        result = run(
            x, conv1, conv2, norms, keeps, call.keep_scale, slots.reads, slots.writes, call.eps, slots.channels,
            slots.summed, *moments, True, call.moments, call.group,
        )  # fmt: skip
        if call.advance is not None:
            call.advance(result[1:])
        middle = 3 + 2 * len(conv2)
        kept = result[: middle if call.remake else middle + len(conv2)]
        ctx.call = call
        ctx.counts = (len(kept), *call.counts)
        ctx.inputs = x.shape[1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *params, *statistics, *keeps)
        moments = [*result[1:middle], *_sum_moments(result, call.moments)]
        ctx.mark_non_differentiable(*moments)
        return (_result(result, slots, call.moments), *moments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        needed: tuple[bool, ...] = ctx.needs_input_grad[1:]
        if grad is None:
            return (None,) * (1 + len(needed))
        if checks.differentiated(grad):
            raise RuntimeError(
                "dense_block: the gradient of its gradient (create_graph=True) is not supported; "
                "take the plain block (fused=False) for it"
            )
        call: _Call = ctx.call
        kept, params, statistics, keeps, _moments = _split(ctx.saved_tensors, ctx.counts)
        # As a hook may not have given them back.
        kept = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in kept]
        conv1, conv2, norms = _sorted(call.neck, params, statistics)
        middle = 3 + 2 * len(conv2)
        slots = call.slots
        if slots.first:
            whole = layout.empty(kept[0], True)
            whole[:, : slots.first] = 0
            whole[:, slots.first :] = grad
            grad = whole
        run = _backward_op if call.plain and checks.plain(grad) else _backward
        found = run(
            grad, *kept[:3], kept[3:middle], kept[middle:], conv1, conv2, norms, keeps, call.keep_scale, slots.reads,
            slots.writes, call.eps, ctx.inputs, slots.summed, call.group,
        )  # fmt: skip
        gradients = [
            d.to(p.dtype) if need and p is not None else None
            for d, p, need in zip(found[1:], params, needed[1:], strict=False)
        ]
        others = [None] * (len(needed) - 1 - len(params))  # statistics, dropout masks, moments
        return (None, found[0] if needed[0] else None, *gradients, *others)


_apply_plain = checks.plain_apply(_DenseBlock)


def _sum_moments(result: list[Tensor], moments: bool) -> list[Tensor]:
    return result[-2:] if moments else []


def _result(result: list[Tensor], slots: Slots, moments: bool) -> Tensor:
    if slots.summed:
        return result[-3 if moments else -1]
    if not slots.first:
        return result[0]
    last = result[0][:, slots.first :]
    return layout.empty(last, True).copy_(last)  # not a view, which would keep the buffer


def turned(t: Tensor, turn: tuple[int, int], axis: int = 0, back: bool = False) -> Tensor:
    """t with its channels from turn[0] on rolled, turn[1] of them from their beginning to their end: from the order in
    which parameters are stored to that of the slots."""
    if not turn[1]:
        return t
    plain = torch.compiler.is_compiling() or not (torch.is_grad_enabled() and t.requires_grad)
    return _rolled(t, turn, axis, back) if plain or checks.transformed((t,)) else _Turned.apply(t, turn, axis, back)


def _rolled(t: Tensor, turn: tuple[int, int], axis: int, back: bool) -> Tensor:
    first, shift = turn
    size = t.shape[axis] - first
    shift = size - shift if back else shift
    parts = (t.narrow(axis, 0, first), t.narrow(axis, first + shift, size - shift), t.narrow(axis, first, shift))
    return torch.cat(parts, axis)


class _Turned(torch.autograd.Function):
    """Whose backward is one copy, where that of views and their concatenation is a dozen."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, turn: tuple[int, int], axis: int, back: bool) -> Tensor:
        ctx.call = turn, axis, not back
        return _rolled(t, turn, axis, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return turned(grad, *ctx.call), None, None, None


def _split(tensors: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    parts, first = [], 0
    for count in counts:
        parts.append(list(tensors[first : first + count]))
        first += count
    return [*parts, list(tensors[first:])]


def _sorted(
    neck: bool, params: Sequence[Any], statistics: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """(conv1, conv2, norms) from parameters in the order of the growths."""
    conv1 = list(params[:: 6 if neck else 3])
    conv2 = list(params[3::6]) if neck else []
    norms: list[Tensor | None] = []
    for i in range(len(params) // 3):
        norms += [*params[3 * i + 1 : 3 * i + 3], *statistics[2 * i : 2 * i + 2]]
    return conv1, conv2, norms


def kernel_reason(x: Tensor, group: str = "") -> str | None:
    """Why no kernel serves x, and plain PyTorch is the better choice; None where one does, or a backend is forced, or
    PyTorch has none: its SyncBatchNorm takes no CPU tensors."""
    if dispatch.forced() is not None or (group and x.device.type == "cpu"):
        return None
    device = x.device.type
    if device not in _KERNEL:
        return f"there is no kernel for {device} tensors"
    if checks.tracing():
        return "torch.jit.trace records no op of rkfast"
    return checks.missing(_KERNEL[device], device) or _REASONS[_KERNEL[device]](x, checks.dtype_of_call(x))


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
        return_moments: also return the moments of the result, from the passes that wrote it; not differentiable.

    Returns:
        Tensor [N, C + L * k, H, W], or [N, C, H, W] with sum_of, channels_last; with return_moments a pair (Tensor,
        Moments). For the backward are kept: the buffer, the moments of its channels and, at "speed", the bottlenecks
        [N, B, H, W].

    Differentiable once in x, convolutions, weights and biases. Running statistics and counters advance once. On a CPU
    3x3 convolutions go by 4x4 tiles, all of whose results a NaN or an infinity in one pixel reaches.

    Raises:
        TypeError: an argument is no tensor, not floating, or dtypes are mixed.
        ValueError: shapes, lengths or numbers that do not fit; one value per channel in training. Nothing is modified
            then.
        RuntimeError: the gradient of the gradient is asked for; or a backend was asked for that cannot serve this.
    """
    conv1, conv2, norm1, norm2 = list(conv1), list(conv2), list(norm1), list(norm2)
    x, conv1, conv2 = checked(x, conv1, conv2, norm1, norm2, moments, memory, drop_rate)
    inputs = x.shape[1]
    writes, channels = [], inputs
    for weight in conv2 or conv1:
        writes.append(channels)
        channels += weight.shape[0]
    summed: list[int] = []
    if sum_of is not None:
        if channels - inputs != sum_of * inputs:
            raise ValueError(
                f"sum_of: {sum_of} increments of {inputs} channels are {sum_of * inputs}, and the growths have "
                f"{channels - inputs}"
            )
        summed = [inputs * (i + 1) for i in range(sum_of)]
    slots = Slots([bound for write in writes for bound in (0, write, 0, 0)], writes, channels, summed)
    rate = drop_rate if training else 0.0
    out, found = run(x, slots, conv1, norm1, conv2, norm2, rate, memory, moments, return_moments)
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
    return_moments: bool,
) -> tuple[Tensor, Moments | None]:
    """Growths over any slots: the result and, if asked for, its moments. Nothing is modified where an argument does
    not fit."""
    neck = bool(conv2)
    mean, var = (None, None) if moments is None else moments[:2]
    group = _group([*norm1, *norm2], moments is not None or return_moments)
    seen = _surveyed(x, slots, conv1, norm1, conv2, norm2, mean, var)
    if not seen:
        for i in range(len(conv1)):
            _fit(slots.width(i), i, conv1, norm1, conv2, norm2, x)
    plain = bool(seen & checks.PLAIN)
    stored = norm1
    if slots.turns:
        conv1 = [turned(w, turn, 1) for w, turn in zip(conv1, slots.turns, strict=True)]
        norm1 = [_turned(norm, turn) for norm, turn in zip(norm1, slots.turns, strict=True)]
    norms = [norm for pair in zip(norm1, norm2, strict=True) for norm in pair] if neck else norm1
    convs = [conv for pair in zip(conv1, conv2, strict=True) for conv in pair] if neck else conv1
    statistics = [t for norm in norms for t in ((None, None) if norm.batch else (norm.running_mean, norm.running_var))]
    params = [t for conv, norm in zip(convs, norms, strict=True) for t in (conv, norm.weight, norm.bias)]
    if not plain and checks.transformed((x, *params)):
        raise RuntimeError(
            "dense_block: torch.func, forward-mode AD and torch.jit.trace are not supported; take the plain block "
            "(fused=False) for them"
        )
    keeps: list[Tensor | None] = []
    if drop_rate > 0:
        keeps = [_keep(x, weight.shape[0], drop_rate) for weight in convs]
    count = layout.count(x)
    tracked = any(norm.training and norm.running_mean is not None for norm in norms)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *params))
    advance = functools.partial(_advance, stored, norm2, slots, count, group)
    # Activation checkpointing stops what it computes again at the last tensor that is kept: as in a BatchNorm,
    # statistics move before. A compiler wants nothing changed within a Function.
    within = tracked and needs_grad and not torch.compiler.is_compiling()
    call = _Call(
        slots=slots,
        counts=(len(params), len(statistics), len(keeps)),
        keep_scale=1 / (1 - drop_rate) if drop_rate < 1 else 0.0,
        eps=[norm.eps for norm in norms],
        neck=neck,
        remake=memory == "min",
        moments=return_moments and bool(slots.summed),
        group=group,
        plain=plain,
        advance=advance if within else None,
    )
    if needs_grad:
        apply = _apply_plain if plain else _DenseBlock.apply
        out, *found = apply(call, *checks.distinct((x, *params, *statistics, *keeps, mean, var)))
    else:
        # Moments of the bottlenecks come with the bottlenecks only.
        forward = _op if plain else _forward
        result = forward(
            x, *_sorted(neck, params, statistics), keeps, call.keep_scale, slots.reads, slots.writes, call.eps,
            slots.channels, slots.summed, mean, var, tracked and neck, return_moments, call.group,
        )  # fmt: skip
        out = _result(result, slots, call.moments)
        found = result[1:]
    if tracked and not within:
        with torch.no_grad():
            advance(found)
    if not return_moments:
        return out, None
    own = found[-2:] if slots.summed else [t[slots.first :] for t in found[:2]]
    return out, Moments(own[0], own[1], count)


def _surveyed(
    x: Tensor,
    slots: Slots,
    conv1: list[Tensor],
    norm1: list[Norm],
    conv2: list[Tensor],
    norm2: list[Norm],
    mean: Tensor | None,
    var: Tensor | None,
) -> int:
    """What ``checks.survey_growths`` says, 0 where the norms are not usual ones."""
    vectors: list[Any] = []
    for i, first in enumerate(norm1):
        for norm in (first, norm2[i]) if norm2 else (first,):
            if not usual(norm):
                return 0
            vectors += norm[:5]
    widths = [slots.width(i) for i in range(len(conv1))]
    return checks.survey_growths(x, conv1, conv2, widths, vectors, mean, var)


def _keep(x: Tensor, channels: int, drop_rate: float) -> Tensor:
    """Drawn as F.dropout draws it, so that one seed gives the same."""
    shape = (x.shape[0], channels, *x.shape[2:])
    rows = x.new_empty_strided(shape, layout.strides(shape, True))
    if x.is_cuda:
        return torch.native_dropout(rows, drop_rate, True)[1]
    return rows.bernoulli_(1 - drop_rate).bool()


def _group(norms: list[Norm], moments: bool) -> str:
    groups = {norm.group for norm in norms if isinstance(norm, Norm) and norm.batch}
    if len(groups) > 1:
        raise ValueError(f"norms: expected one group for all that take the batch's statistics, got {groups}")
    group = groups.pop() if groups else ""
    collective.check(group, moments)
    return group


def _advance(norm1: list[Norm], norm2: list[Norm], slots: Slots, count: int, group: str, found: list[Tensor]) -> None:
    if group:
        every = collective.count(count, found[0], group)
        moments = found[: 2 + 2 * len(norm2)]
        found = [collective.unbiased(t, every) if i % 2 else t for i, t in enumerate(moments)]
        count = 1  # so that nothing is corrected twice
    prefixes: dict[tuple[float | None, bool], list[Norm]] = {}
    for i, norm in enumerate(norm1):
        if norm.training and norm.running_mean is not None:
            ranges = [range_ for range_ in _pairs(slots.reads[4 * i : 4 * i + 4]) if range_[1] > range_[0]]
            if len(ranges) == 1 and ranges[0][0] == 0:
                prefixes.setdefault((norm.momentum, norm.num_batches_tracked is None), []).append(norm)
                continue
            turn = slots.turns[i] if slots.turns else (0, 0)
            mean, var = (torch.cat([t[begin:end] for begin, end in ranges]) for t in found[:2])
            _advance_all([norm], turned(mean, turn, back=True), turned(var, turn, back=True), count)
    for norms in prefixes.values():
        _advance_all(norms, found[0], found[1], count)
    for i, norm in enumerate(norm2):
        if norm.training and norm.running_mean is not None:
            _advance_all([norm], found[2 + 2 * i], found[3 + 2 * i], count)


def _pairs(bounds: list[int]) -> list[tuple[int, int]]:
    return [(bounds[0], bounds[1]), (bounds[2], bounds[3])]


def _advance_all(norms: list[Norm], mean: Tensor, var: Tensor, count: int) -> None:
    """Norms of one momentum, all with a counter or all without, over the first channels of mean and var."""
    means, variances, counters = ([n[field] for n in norms if n[field] is not None] for field in (2, 3, 4))
    update_running_stats(mean, var, count, means, variances, counters, norms[0].momentum)


def _turned(norm: Norm, turn: tuple[int, int]) -> Norm:
    """As far as it is read: beside the batch's statistics its own are not."""
    weight, bias, mean, var = (
        t if t is None or (norm.batch and i > 1) else turned(t, turn) for i, t in enumerate(norm[:4])
    )
    return norm._replace(weight=weight, bias=bias, running_mean=mean, running_var=var)


def checked(
    x: Tensor,
    conv1: list[Tensor],
    conv2: list[Tensor],
    norm1: list[Norm],
    norm2: list[Norm],
    moments: Moments | None,
    memory: str,
    drop_rate: float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """x and the convolutions in the dtype of the call, and all of them such that slots can be laid out."""
    checks.activation(x, "x")
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C, H, W], got {x.dim()} dimensions")
    checks.memory(memory)
    if not 0 <= drop_rate <= 1:
        raise ValueError(f"drop_rate: expected a number in [0, 1], got {drop_rate}")
    if not conv1:
        raise ValueError("conv1: expected a weight for each growth, got none")
    second = len(conv1) if conv2 or norm2 else 0
    for name, values, needed in (("norm1", norm1, len(conv1)), ("conv2", conv2, second), ("norm2", norm2, second)):
        if len(values) != needed:
            raise ValueError(f"{name}: expected {needed} for {len(conv1)} growths, got {len(values)}")
    if checks.autocasts(x) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        if all(isinstance(w, Tensor) for w in (*conv1, *conv2)):  # else they are refused below
            cast = autocast.cast([*conv1, *conv2], dtype)
            conv1, conv2 = cast[: len(conv1)], cast[len(conv1) :]
    for name, weights in (("conv1", conv1), ("conv2", conv2)):
        for i, weight in enumerate(weights):
            checks.convolution(weight, f"{name}[{i}]", x)
    if moments is not None:
        checks.triple(moments)
        for name, moment in (("mean", moments[0]), ("var", moments[1])):
            checks.vector(moment, x, f"moments.{name}")
        checks.known(moments, x)
    return x, conv1, conv2


def _fit(
    width: int,
    i: int,
    conv1: list[Tensor],
    norm1: list[Norm],
    conv2: list[Tensor],
    norm2: list[Norm],
    x: Tensor,
) -> None:
    shape = list(conv1[i].shape)
    if shape[1] != width or (conv2 and shape[2] != 1):
        wanted = f"[B, {width}, 1, 1]" if conv2 else f"[k, {width}, n, n]"
        raise ValueError(f"conv1[{i}]: expected {wanted}, got {shape}")
    check_norm(norm1[i], f"norm1[{i}]", width, x)
    if conv2:
        check_norm(norm2[i], f"norm2[{i}]", shape[0], x)
        if conv2[i].shape[1] != shape[0]:
            raise ValueError(f"conv2[{i}]: expected [k, {shape[0]}, n, n], got {list(conv2[i].shape)}")
