"""dense_block in plain PyTorch: the definition of right, and what runs where no kernel can."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rkfast.ops import collective, layout
from rkfast.ops.channel_moments import reference as channel_moments
from rkfast.ops.channel_moments.reference import moments_dtype, per_channel, sums


class Growth(NamedTuple):
    reads: list[tuple[int, int]]
    write: int
    conv1: Tensor
    conv2: Tensor | None
    norm1: Sequence[Tensor | None]  # weight, bias, mean, var
    norm2: Sequence[Tensor | None]
    keep1: Tensor | None
    keep2: Tensor | None
    eps1: float
    eps2: float

    @property
    def slot(self) -> slice:
        last = self.conv1 if self.conv2 is None else self.conv2
        return slice(self.write, self.write + last.shape[0])

    def read(self, slots: Tensor) -> Tensor:
        """The channels that are read, of a buffer [N, C, H, W] or a vector [C]."""
        axis = 1 if slots.dim() > 1 else 0
        return torch.cat([slots.narrow(axis, begin, end - begin) for begin, end in self.reads if end > begin], axis)

    def add_to(self, slots: Tensor, x: Tensor) -> None:
        axis = 1 if slots.dim() > 1 else 0
        first = 0
        for begin, end in self.reads:
            slots.narrow(axis, begin, end - begin).add_(x.narrow(axis, first, end - begin))
            first += end - begin


def growths(
    conv1: Sequence[Tensor],
    conv2: Sequence[Tensor],
    norms: Sequence[Tensor | None],
    keeps: Sequence[Tensor | None],
    reads: Sequence[int],
    writes: Sequence[int],
    eps: Sequence[float],
) -> Iterator[Growth]:
    convs = 2 if conv2 else 1
    for i, (weight, write) in enumerate(zip(conv1, writes, strict=True)):
        norm = norms[4 * convs * i : 4 * convs * (i + 1)]
        keep = keeps[convs * i : convs * (i + 1)] if keeps else [None] * convs
        begin0, end0, begin1, end1 = reads[4 * i : 4 * i + 4]
        yield Growth(
            reads=[(begin0, end0), (begin1, end1)],
            write=write,
            conv1=weight,
            conv2=conv2[i] if conv2 else None,
            norm1=norm[:4],
            norm2=norm[4:],
            keep1=keep[0],
            keep2=keep[-1],
            eps1=eps[convs * i],
            eps2=eps[convs * (i + 1) - 1],
        )


class _Read(NamedTuple):
    """relu(scale * x + shift) and what its gradient needs."""

    act: Tensor
    scale: Tensor
    mean: Tensor
    rstd: Tensor
    batch: bool


def _read(x: Tensor, norm: Sequence[Tensor | None], mean: Tensor, var: Tensor, eps: float) -> _Read:
    weight, bias, own_mean, own_var = norm
    dtype = mean.dtype
    batch = own_mean is None or own_var is None
    if own_mean is not None and own_var is not None:
        mean, var = own_mean.to(dtype), own_var.to(dtype)
    rstd = torch.rsqrt(var + eps)
    scale = rstd if weight is None else weight.to(dtype) * rstd
    normed = per_channel(scale, x) * (x.to(dtype) - per_channel(mean, x))
    if bias is not None:
        normed = normed + per_channel(bias.to(dtype), x)
    return _Read(torch.relu(normed).to(x.dtype), scale, mean, rstd, batch)


def conv(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=weight.shape[2] // 2)


def dropped(x: Tensor, keep: Tensor | None, keep_scale: float) -> Tensor:
    return x if keep is None else x * keep * keep_scale


def forward(
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
    inputs = x.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        buffer = layout.empty(like(x, channels), True)
        means, variances = x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)

        def put(slot: slice, growth: Tensor) -> None:
            buffer[:, slot] = growth
            means[slot], variances[slot] = moments(buffer[:, slot], group)

        put(slice(0, inputs), x)
        if mean is not None and var is not None:
            means[:inputs], variances[:inputs] = mean, var
        mids: list[Tensor] = []
        mid_moments: list[Tensor] = []
        for g in growths(conv1, conv2, norms, keeps, reads, writes, eps):
            act = _read(g.read(buffer), g.norm1, g.read(means), g.read(variances), g.eps1).act
            growth = dropped(conv(act, g.conv1), g.keep1, keep_scale)
            if g.conv2 is not None:
                mid = layout.empty(growth, True).copy_(growth)
                own = _mid_moments(mid, g, group)
                mids.append(mid)
                mid_moments.extend(own)
                act = _read(mid, g.norm2, *own, g.eps2).act
                growth = dropped(conv(act, g.conv2), g.keep2, keep_scale)
            put(g.slot, growth)
        result = [buffer, means, variances]
        if keep:
            result += [*mid_moments, *mids]
        if summed:
            total = buffer[:, :inputs].to(dtype)
            for first in summed:
                total = total + buffer[:, first : first + inputs]
            result.append(layout.empty(x, True).copy_(total))
            if total_moments:
                result.extend(channel_moments.forward(result[-1], True))
        return result


def like(x: Tensor, channels: int) -> Tensor:
    """A tensor of x's shape with other channels, for its shape and dtype only."""
    return x.new_empty(1).expand(x.shape[0], channels, *x.shape[2:])


def moments(x: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Of all of the batch, of which each process of a group has a part."""
    mean, var = channel_moments.forward(x, True)
    return collective.moments(mean, var, layout.count(x), group)


def _mid_moments(mid: Tensor, g: Growth, group: str) -> tuple[Tensor, Tensor]:
    if g.norm2[2] is not None and g.norm2[3] is not None:
        dtype = moments_dtype(mid.dtype)
        return g.norm2[2].to(dtype, copy=True), g.norm2[3].to(dtype, copy=True)
    return moments(mid, group)


def backward(
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
    dtype = mean.dtype
    count = collective.count(layout.count(buffer), mean, group).clamp(min=1).to(dtype)
    with torch.autocast(buffer.device.type, enabled=False):
        # What the readers of each slot add up to, and the sums that their BatchNorms leave to its end.
        total = layout.empty(buffer, True, dtype).zero_()
        if summed:
            for first in (0, *summed):
                total[:, first : first + inputs] = grad
        else:
            total.copy_(grad)
        s1, s2 = torch.zeros_like(mean), torch.zeros_like(mean)

        def finished(slot: slice) -> Tensor:
            x = buffer[:, slot].to(dtype) - per_channel(mean[slot], buffer)
            left, slope = collective.total(torch.stack([s1[slot], s2[slot]]), group) / count
            d = total[:, slot] - per_channel(left, buffer) - x * per_channel(slope, buffer)
            return d.to(buffer.dtype)

        def through(read: _Read, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """g' behind the ReLU, and the gradients of bias and weight."""
            g = torch.where(read.act <= 0, 0, d.to(dtype))
            x_hat = (x.to(dtype) - per_channel(read.mean, x)) * per_channel(read.rstd, x)
            return g, sums(g, False), sums(g * x_hat, False)

        found: list[list[Tensor]] = []
        order = list(growths(conv1, conv2, norms, keeps, reads, writes, eps))
        for i, g in reversed(list(enumerate(order))):
            x = g.read(buffer)
            read = _read(x, g.norm1, g.read(mean), g.read(var), g.eps1)
            d = finished(g.slot)
            second: list[Tensor] = []
            if g.conv2 is not None:
                d = dropped(d, g.keep2, keep_scale)
                mid = mids[i] if mids else dropped(conv(read.act, g.conv1), g.keep1, keep_scale)
                read2 = _read(mid, g.norm2, mid_moments[2 * i], mid_moments[2 * i + 1], g.eps2)
                d, dconv2 = conv_backward(d, read2.act, g.conv2)
                g2, dbias2, dweight2 = through(read2, mid, d)
                if read2.batch:
                    x_hat = (mid.to(dtype) - per_channel(read2.mean, mid)) * per_channel(read2.rstd, mid)
                    left, slope = collective.total(torch.stack([dbias2, dweight2]), group) / count
                    g2 = g2 - per_channel(left, mid) - x_hat * per_channel(slope, mid)
                d = (per_channel(read2.scale, mid) * g2).to(buffer.dtype)
                second = [dconv2, dweight2, dbias2]
            d = dropped(d, g.keep1, keep_scale)
            d, dconv1 = conv_backward(d, read.act, g.conv1)
            g1, dbias1, dweight1 = through(read, x, d)
            g.add_to(total, per_channel(read.scale, x) * g1)
            if read.batch:
                g.add_to(s1, read.scale * dbias1)
                g.add_to(s2, read.scale * read.rstd * dweight1)
            found.append([dconv1, dweight1, dbias1, *second])
        dx = layout.empty(like(buffer, inputs), True).copy_(finished(slice(0, inputs)))
        return [dx, *(t for gradients in reversed(found) for t in gradients)]


def conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool = True, need_weight: bool = True
) -> tuple[Tensor, Tensor]:
    pad = weight.shape[2] // 2
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        grad.contiguous(memory_format=torch.channels_last), x, weight, None,
        [1, 1], [pad, pad], [1, 1], False, [0, 0], 1, [need_x, need_weight, False],
    )  # fmt: skip
    # As the operator promises: strided as the weight is.
    if need_weight and dweight.stride() != weight.stride():
        dweight = torch.empty_like(weight).copy_(dweight)
    return dx, dweight
