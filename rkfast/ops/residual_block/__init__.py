"""A residual block from its first convolution to the ReLU behind the sum, as one autograd function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkfast import dispatch
from rkfast.ops import autocast, checks, layout
from rkfast.ops.bn_relu_conv import forward as bn_relu_conv_forward
from rkfast.ops.channel_moments import moments_dtype, update_running_stats, update_running_stats_op
from rkfast.ops.channel_moments import reference as plain_moments
from rkfast.ops.conv import convolution_op, products
from rkfast.ops.conv import forward as conv_forward
from rkfast.ops.conv.reference import laid
from rkfast.ops.norm import Norm, check_norm, usual
from rkfast.ops.residual_block import reference

_ARGS = (
    "Tensor x, Tensor? shortcut, Tensor[] convs, Tensor?[] norms, Tensor? step, int[] strides, float[] eps, "
    "bool channels_last, bool keep"
)
Shape = Sequence[int]
MAX_STRIDE = 1 << 12


def _sizes(x: Shape, convs: Sequence[Shape], strides: Sequence[int]) -> list[tuple[int, ...]]:
    """Of the result of each convolution."""
    sizes: list[tuple[int, ...]] = []
    spatial = tuple(x[2:])
    for w, stride in zip(convs, strides, strict=False):
        spatial = _strided(spatial, stride)
        sizes.append((x[0], w[0], *spatial))
    return sizes if len(convs) == len(sizes) else [*sizes, (x[0], convs[-1][0], *spatial)]


def _strided(spatial: Shape, stride: int) -> tuple[int, ...]:
    return tuple(spatial) if stride == 1 else tuple((size - 1) // stride + 1 for size in spatial)


def _fake(
    x: Tensor,
    shortcut: Tensor | None,
    convs: list[Tensor],
    norms: list[Tensor | None],
    step: Tensor | None,
    strides: list[int],
    eps: list[float],
    channels_last: bool,
    keep: bool,
) -> list[Tensor]:
    sizes = _sizes(x.shape, [w.shape for w in convs], strides)
    outs = [x.new_empty_strided(shape, layout.strides(shape, channels_last)) for shape in sizes]
    out = torch.empty_like(outs[len(strides) - 1])
    result = [out]
    if keep:
        result += [x.new_empty(layout.mask_shape(out, channels_last), dtype=torch.uint8), *outs]
    for i, w in enumerate(convs):
        if norms[4 * i + 2] is None:
            result += [x.new_empty(w.shape[0], dtype=moments_dtype(x.dtype)) for _ in range(2)]
    return result


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    outs: list[Tensor],
    mask: Tensor,
    convs: list[Tensor],
    norms: list[Tensor | None],
    step: Tensor | None,
    strides: list[int],
    eps: list[float],
    batch: list[bool],
    channels_last: bool,
    own: bool,
    need_x: bool,
    need_shortcut: bool,
    need_convs: bool,
    need_step: bool,
) -> list[Tensor]:
    dtype = moments_dtype(x.dtype)
    result = [layout.empty(t, channels_last) for t, need in ((x, need_x), (grad, need_shortcut)) if need]
    if need_step and step is not None:
        result.append(x.new_empty(step.shape, dtype=dtype))
    for w in convs:
        result += [
            *([torch.empty_like(w)] if need_convs else []),
            *(x.new_empty(w.shape[0], dtype=dtype) for _ in "wb"),
        ]
    return result


def _count_each(x: Shape, convs: Sequence[Shape], strides: Sequence[int]) -> list[int]:
    return [products(size, w) for size, w in zip(_sizes(x, convs, strides), convs, strict=True)]


def _count(
    x: Shape, shortcut: Any, convs: Sequence[Shape], norms: Any, step: Any, strides: Any, *_: Any, **__: Any
) -> int:
    return sum(_count_each(x, convs, strides))


def _count_backward(grad: Shape, x: Shape, outs: Any, mask: Any, convs: Sequence[Shape], *rest: Any, **__: Any) -> int:
    strides = rest[2]
    need_x, _, need_convs, _ = rest[-4:]
    each = _count_each(x, convs, strides)
    of_x = each[0] + sum(each[len(strides) :])
    return sum(each) - of_x + need_x * of_x + need_convs * sum(each)


# convs: those of the branch, each with its stride, and the projection behind them, if x has one. norms: of each weight,
# bias, mean and var, these two None for the batch's. Returns [out], with keep the mask of the ReLU (layout.mask_shape)
# and the results of the convolutions, and then the mean and variance that were not given.
_op = convolution_op("residual_block", "forward")
_forward = dispatch.register(f"residual_block({_ARGS}) -> Tensor[]", _op, _fake, _count)
_backward_op = convolution_op("residual_block_backward", "backward", 1)
# norms have every mean and var; own: the shortcut is x, and its gradient part of that of x. Returns [dx], [dshortcut],
# [dstep], each where needed, and of each convolution [dconv] where needed, and dweight and dbias of its norm.
_backward = dispatch.register(
    "residual_block_backward(Tensor grad, Tensor x, Tensor[] outs, Tensor mask, Tensor[] convs, Tensor?[] norms, "
    "Tensor? step, int[] strides, float[] eps, bool[] batch, bool channels_last, bool own, bool need_x, "
    "bool need_shortcut, bool need_convs, bool need_step) -> Tensor[]",
    _backward_op,
    _fake_backward,
    _count_backward,
)


class _Call(NamedTuple):
    strides: list[int]
    eps: list[float]
    channels_last: bool
    own: bool  # the shortcut is x
    remake: bool  # what the last convolution makes, which is not kept
    plain: bool

    def gradients(self, grad: Tensor, kept: Sequence[Any], needed: Sequence[bool]) -> list[Tensor | None]:
        """Of x, shortcut and step, and of each convolution, and weight and bias of its norm."""
        x, step, mask, *rest = map(checks.held, kept)  # a hook may have given them back
        count = len(self.eps)
        outs, tensors = rest[: count - self.remake], rest[count - self.remake :]
        tensors, vectors = tensors[: 5 * count], tensors[5 * count :]
        convs, norms = _sorted(tensors)
        if checks.differentiated(grad):
            found = reference.gradients(
                grad, x, mask, convs, norms, step, self.strides, self.eps, self.channels_last, self.own
            )
        else:
            batch = [norms[4 * i + 2] is None for i in range(count)]
            given = iter(vectors)
            norms = [next(given) if t is None and i % 4 > 1 else t for i, t in enumerate(norms)]
            if self.remake:
                outs.insert(len(self.strides) - 1, _last(x, outs, convs, norms, self))
            need_x, need_shortcut, need_step, *rest = needed
            need_convs = any(rest[::3])
            run = _backward_op if self.plain and checks.plain(grad) else _backward
            made = iter(
                run(
                    grad, x, outs, mask, convs, norms, step, self.strides, self.eps, batch, self.channels_last,
                    self.own, need_x, need_shortcut, need_convs, need_step,
                )
            )  # fmt: skip
            found = [next(made) if need else None for need in needed[:3]]
            for _conv in convs:
                found += [next(made) if need_convs else None, next(made), next(made)]
        like = [x, None, step, *(t for i, t in enumerate(tensors) if i % 5 < 3)]
        result: list[Tensor | None] = []
        for d, t, need in zip(found, like, needed, strict=True):
            d = d if need else None
            result.append(d if d is None or t is None or d.dtype == t.dtype else d.to(t.dtype))
        return result


class _ResidualBlock(torch.autograd.Function):
    """tensors: of each convolution the weight, and weight, bias, mean and var of its norm. advance: the running
    statistics, by moments that were not given; they are not kept with the call."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        advance: Callable[[list[Tensor]], None] | None,
        x: Tensor,
        shortcut: Tensor | None,
        step: Tensor | None,
        *tensors: Any,
    ) -> Any:
        convs, norms = _sorted(tensors)
        run = _op if call.plain else _forward
        out, mask, *found = run(x, shortcut, convs, norms, step, call.strides, call.eps, call.channels_last, True)
        outs, vectors = found[: len(convs)], found[len(convs) :]
        if advance is not None:
            advance(vectors)
        if call.remake:
            del outs[len(call.strides) - 1]
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, step, mask, *outs, *tensors, *vectors)
        ctx.mark_non_differentiable(*vectors)
        return (out, *vectors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        needed = ctx.needs_input_grad
        result: list[Tensor | None] = [None] * len(needed)
        if grad is not None:
            # Not of the first two, nor of mean and var.
            wanted = [i for i in range(2, len(needed)) if i < 5 or (i - 5) % 5 < 3]
            found = ctx.call.gradients(grad, ctx.saved_tensors, [needed[i] for i in wanted])
            for i, d in zip(wanted, found, strict=True):
                result[i] = d
        return tuple(result)


_apply_plain = checks.plain_apply(_ResidualBlock)


def _last(x: Tensor, outs: list[Tensor], convs: list[Tensor], norms: list[Tensor | None], call: _Call) -> Tensor:
    """What the last convolution of the branch makes."""
    last = len(call.strides) - 1
    if last == 0:
        return conv_forward(x, convs[0], None, None, call.channels_last, False, False)[0]
    norm, eps = norms[4 * last - 4 : 4 * last], call.eps[last - 1]
    return bn_relu_conv_forward(outs[last - 1], convs[last], *norm, call.channels_last, eps, False)[0]


def _sorted(tensors: Sequence[Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """(convs, norms) of the tensors of ``_ResidualBlock``."""
    norms = [t for i, t in enumerate(tensors) if i % 5]
    return list(tensors[::5]), norms


def residual_block(
    x: Tensor,
    convs: Sequence[Tensor],
    norms: Sequence[Norm],
    *,
    shortcut: Tensor | None = None,
    projection: tuple[Tensor, Norm] | None = None,
    strides: Sequence[int] | None = None,
    step: Tensor | None = None,
    memory: str = "speed",
) -> Tensor:
    """A residual block (He et al., "Deep Residual Learning for Image Recognition"), with a step size that of a learned
    time step, ``relu(x + step * F(x))`` (TSC, equation 3)::

        y = convs[0](x)
        y = convs[i](relu(norms[i - 1](y)))               for each further convolution
        out = relu(shortcut + step * norms[-1](y))        shortcut: x, a tensor, or norm(conv(x)), its projection

    One function of autograd, which keeps nothing that is normalised. On a CPU what lies between the convolutions is
    never stored as a whole, nor is a projection normalised; each BatchNorm's moments come from the pass that wrote its
    input, and the backward of the sum is applied where the last convolution and the projection read their gradients if
    they are of 1x1. On a GPU all but that of the projection is so of 1x1 convolutions in bfloat16 and float16.

    Args:
        x: Tensor [N, C, H, W]; float32, float64, bfloat16 or float16. Under autocast x, shortcut and the convolutions
            are taken in autocast's dtype.
        convs: weights [K_i, K_{i-1}, n, n], n odd, of convolutions with n // 2 pixels of padding; K_0 = C.
        norms: for each convolution the BatchNorm behind it, over K_i channels, in any of its modes but with a group.
        shortcut: what is added, Tensor [N, K_last, H', W']; None is x, or its projection.
        projection: weight [K_last, C, 1, 1] of a convolution of x with the stride of all convs together, and the
            BatchNorm behind it; None is none.
        strides: of each convolution, from 1 to 4096; None is 1 for all.
        step: None for 1, else a factor per channel, Tensor [K_last].
        memory: "speed" keeps the results of all convolutions for the backward, "min" makes that of the last again,
            which has stride 1 then.

    Returns:
        Tensor [N, K_last, H', W'], H' = ceil(H / stride), in the memory format of x, channels_last being the fastest.
        Kept for the backward are x, the results of the convolutions, a bit for each element of the result, and vectors.

    Differentiable any number of times in x, shortcut, step, convolutions, weights and biases. Running statistics and
    counters advance once. Deterministic. On a CPU 3x3 convolutions of stride 1 go by 4x4 tiles, all of whose results a
    NaN or an infinity in one pixel reaches.

    Raises:
        TypeError: an argument is no tensor or Norm, not floating, or the dtypes are mixed.
        ValueError: a shape, length, number, device or memory that does not fit; one value per channel in training; a
            norm with a group; running statistics that cannot be written. Nothing is modified then.
        RuntimeError: running statistics require grad; what the backward needs is an inference tensor; or a backend was
            asked for that cannot serve this.
    """
    convs, norms = checks.listed(convs, "convs"), checks.listed(norms, "norms")
    checks.memory(memory)
    stepping = [1] * len(convs) if strides is None else checks.listed(strides, "strides")
    seen = _surveyed(x, shortcut, projection, convs, norms, stepping, step)
    if not seen:
        x, shortcut, convs = _checked(x, shortcut, projection, convs, norms, stepping, step)
        step = checks.held(step)
    elif projection is not None:
        convs = [*convs, projection[0]]
    if memory == "min" and stepping[-1] != 1:
        raise ValueError(f'memory: "min" makes the last convolution again if its stride is 1, got {stepping[-1]}')
    if projection is not None:
        norms = [*norms, projection[1]]
    plain = bool(seen & checks.PLAIN)
    tensors = []
    for conv, norm in zip(convs, norms, strict=True):
        statistics = (None, None) if norm.batch else norm[2:4]
        tensors += [conv, *norm[:2], *statistics]
    eps = [norm.eps for norm in norms]
    given = (x, shortcut, step, *tensors)
    if seen:
        needs_grad, channels_last = bool(seen & checks.NEEDS_GRAD), bool(seen & checks.CHANNELS_LAST)
    else:
        needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
        channels_last = layout.is_channels_last(x)
    sizes = _sizes(x.shape, [conv.shape for conv in convs], stepping)
    moved = [_moved(norm, n * h * w) for norm, (n, _, h, w) in zip(norms, sizes, strict=True)]
    if not plain and checks.transformed(given):
        out, *vectors = reference.composite(x, shortcut, *_sorted(tensors), step, stepping, eps)
        out = laid(out, channels_last)
        with torch.no_grad():
            _advance(plain_moments.update_running_stats, norms, moved, vectors)
        return out
    advance = functools.partial(_advance, update_running_stats_op if plain else update_running_stats, norms, moved)
    if needs_grad:
        if not seen:
            fields = ("convs[{}]", *(f"norms[{{}}].{field}" for field in Norm._fields[:4]))
            named = {fields[i % 5].format(i // 5): t for i, t in enumerate(tensors)}
            checks.keepable({"x": x, "step": step, **named})
        # Activation checkpointing stops what it computes again at the last tensor that is kept: as in a BatchNorm,
        # statistics move before. A compiler wants nothing changed within a Function.
        within = None if torch.compiler.is_compiling() else advance
        own = shortcut is None and projection is None
        call = _Call(stepping, eps, channels_last, own, memory == "min", plain)
        usual = plain and memory == "speed" and x.dtype == torch.float32 and x.numel() > 0
        recorded = checks.recorded(_op, x) if usual else None
        if recorded is not None:
            for each in moved:
                if each is not None:
                    update_running_stats_op.serves_itself(each[1][0])
            return recorded(x, shortcut, *_sorted(tensors), step, stepping, eps, channels_last, moved)
        apply = _apply_plain if plain else _ResidualBlock.apply
        out, *vectors = apply(call, within, *checks.distinct(given))
        if within is not None:
            return out
    else:
        run = _op if plain else _forward
        out, *vectors = run(x, shortcut, *_sorted(tensors), step, stepping, eps, channels_last, False)
    with torch.no_grad():
        advance(vectors)
    return out


def _moved(norm: Norm, count: int) -> tuple[Any, ...] | None:
    """What ``update_running_stats`` takes behind the moments of so many values; None where they move nothing."""
    if not norm.training or norm.running_mean is None:
        return None
    counters = [] if norm.num_batches_tracked is None else [norm.num_batches_tracked]
    return count, [norm.running_mean], [norm.running_var], counters, norm.momentum


def _advance(
    update: Callable[..., None],
    norms: Sequence[Norm],
    moved: Sequence[tuple[Any, ...] | None],
    vectors: Sequence[Tensor],
) -> None:
    """The running statistics of norms by vectors, mean and variance of each that normalises by its batch."""
    at = 0
    for norm, each in zip(norms, moved, strict=True):
        if each is not None:
            update(*vectors[at : at + 2], *each)
        at += 2 * norm.batch


def _surveyed(
    x: Any, shortcut: Any, projection: Any, convs: list[Any], norms: list[Any], strides: list[Any], step: Any
) -> int:
    """What ``checks.survey_block`` says, 0 where the norms are not usual ones."""
    if len(strides) != len(convs) or not all(type(stride) is int and stride <= MAX_STRIDE for stride in strides):
        return 0
    if projection is not None:
        if type(projection) is not tuple or len(projection) != 2:
            return 0
        convs, norms = [*convs, projection[0]], [*norms, projection[1]]
    vectors: list[Any] = []
    for norm in norms:
        if not usual(norm):
            return 0
        vectors += norm[:5]
    return checks.survey_block(x, shortcut, convs, vectors, step, strides)


def _checked(
    x: Tensor, shortcut: Any, projection: Any, convs: list[Any], norms: list[Any], strides: list[Any], step: Any
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """x, shortcut, and the convolutions with that of the projection, in the dtype of the call."""
    checks.activation(x, "x")
    if x.dim() != 4:
        raise ValueError(f"x: expected [N, C, H, W], got {x.dim()} dimensions")
    if not convs:
        raise ValueError("convs: expected at least one weight, got none")
    if len(norms) != len(convs):
        raise ValueError(f"norms: expected one for each of {len(convs)} convolutions, got {len(norms)}")
    if len(strides) != len(convs):
        raise ValueError(f"strides: expected one for each of {len(convs)} convolutions, got {len(strides)}")
    for stride in strides:
        if type(stride) is not int or not 1 <= stride <= MAX_STRIDE:
            raise ValueError(f"strides: expected numbers from 1 to {MAX_STRIDE}, got {stride!r}")
    branch = len(convs)
    if projection is not None:
        if not isinstance(projection, Sequence) or len(projection) != 2:
            raise TypeError(f"projection: expected a weight and a Norm, got {type(projection).__name__}")
        if shortcut is not None:
            raise ValueError("projection: it takes the place of shortcut, and both are given")
        convs, norms = [*convs, projection[0]], [*norms, projection[1]]
    if checks.autocasts(x) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        shortcut = shortcut.to(dtype) if isinstance(shortcut, Tensor) else shortcut
        if all(isinstance(w, Tensor) for w in convs):  # else they are refused below
            convs = autocast.cast(convs, dtype)
    spatial, channels = tuple(x.shape[2:]), x.shape[1]
    for i, (conv, norm) in enumerate(zip(convs[:branch], norms, strict=False)):
        checks.convolution(conv, f"convs[{i}]", x)
        if conv.shape[1] != channels:
            raise ValueError(
                f"convs[{i}]: expected [K, {channels}, n, n], got {list(conv.shape)}; for groups and other paddings "
                "take F.conv2d and rkfast.ops.bn_rk_sum"
            )
        channels = conv.shape[0]
        spatial = _strided(spatial, strides[i])
        _check_norm(norm, f"norms[{i}]", channels, x, x.shape[0] * spatial[0] * spatial[1])
    if projection is not None:
        conv, norm = convs[branch], norms[branch]
        checks.convolution(conv, "projection[0]", x)
        if conv.shape != (channels, x.shape[1], 1, 1):
            raise ValueError(f"projection[0]: expected [{channels}, {x.shape[1]}, 1, 1], got {list(conv.shape)}")
        _check_norm(norm, "projection[1]", channels, x, x.shape[0] * spatial[0] * spatial[1])
    elif shortcut is None and (channels, *spatial) != tuple(x.shape[1:]):
        raise ValueError(
            f"shortcut: x is {list(x.shape)} and the result {[x.shape[0], channels, *spatial]}; give what is added, or "
            "a projection"
        )
    if shortcut is not None:
        checks.like(shortcut, x, "shortcut", "the result", (x.shape[0], channels, *spatial))
    checks.vector(step, x, "step", channels=channels)
    return checks.held(x), checks.held(shortcut), [checks.held(w) for w in convs]


def _check_norm(norm: Any, name: str, channels: int, x: Tensor, count: int) -> None:
    check_norm(norm, name, channels, x, count)
    if norm.batch and norm.group:
        raise ValueError(
            f"{name}.group: expected statistics of this process; bn_relu_conv and bn_rk_sum take a group's"
        )
