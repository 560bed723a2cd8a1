"""dense_block in Triton: 1x1 products that normalise what they read and take the moments of what they write, and the
passes back through BatchNorm and ReLU into the slots, which take the second BatchNorm's as they read. The 3x3
convolutions are PyTorch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rkfast.ops import collective, kernels, layout, products
from rkfast.ops.bn_rk_sum import triton as bn_rk_sum
from rkfast.ops.channel_moments import triton as channel_moments
from rkfast.ops.channel_moments.reference import moments_dtype
from rkfast.ops.dense_block.reference import Growth, conv, conv_backward, dropped, growths, like
from rkfast.ops.products import Incoming, Norm, as_norm, without_autocast
from rkfast.ops.rk_sum import triton as rk_sum


class _Block:
    """The slots of one call, and the kernels on them."""

    def __init__(self, buffer: Tensor, mean: Tensor, var: Tensor, keep_scale: float, group: str) -> None:
        self.buffer, self.mean, self.var = buffer, mean, var
        self.keep_scale = keep_scale
        self.group = group
        self.zeros = torch.zeros_like(mean)

    def put(self, slot: slice, x: Tensor, moments: bool = True) -> None:
        """x into its slot, and its moments into theirs."""
        x = layout.conform(x, True)
        own = self.mean[slot], self.var[slot]
        into = own if moments and not self.group else None
        found = rk_sum.forward([x], [1.0], [None], None, True, False, moments, False, self.buffer[:, slot], into)
        if moments and self.group:
            shared = collective.moments(found[1], found[2], layout.count(x), self.group)
            torch._foreach_copy_(list(own), list(shared))

    def norm1(self, g: Growth) -> Norm:
        return as_norm(g.norm1, self.mean, self.var, g.eps1)

    def read(self, g: Growth, norm: Norm) -> Tensor:
        """relu(BN(what the growth reads))."""
        act = layout.empty(like(self.buffer, g.conv1.shape[1]), True)
        first = 0
        for begin, end in g.reads:
            size = end - begin
            if size:
                x, out = self.buffer[:, begin:end], act[:, first : first + size]
                weight, bias, mean, var = norm.range(first, begin, size)
                bn_rk_sum.forward(x, weight, bias, mean, var, [], [], None, True, True, norm.eps, False, False, out)
            first += size
        return act

    def bottleneck(self, g: Growth, norm: Norm, norm2: Norm | None, moments: bool) -> tuple[Tensor, Tensor | None]:
        """(the first convolution, or with norm2 relu(norm2(it)); partial moments)."""
        return products.product(
            self.buffer, g.reads, g.conv1, norm, then=norm2, keep=g.keep1, keep_scale=self.keep_scale, moments=moments
        )

    def incoming(
        self, g: Growth, norm2: Norm, grad: Tensor, mid: Tensor, gradients: tuple[Tensor, Tensor], count: Tensor
    ) -> Incoming:
        """gradients: of weight and bias of the second norm, by this process."""
        left: tuple[Tensor | None, Tensor | None] = (None, None) if norm2.own else gradients
        values = float(layout.count(mid))
        if self.group and not norm2.own:
            dweight, dbias = (collective.total(torch.stack(gradients), self.group) / count).to(self.mean.dtype)
            left, values = (dweight, dbias), 1.0
        mean, var, weight, bias, eps, _ = norm2
        return Incoming(grad, mid, mean, var, weight, bias, None, eps, *left, values, g.keep1, self.keep_scale)

    def read_backward(
        self, g: Growth, norm: Norm, incoming: Incoming, total: Tensor, left: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """From the gradient behind the bottleneck, or else of what was read, back into the slots; the gradients of
        weight and bias. ``left`` is what the BatchNorms leave to be added: slope and offset of each channel."""
        conv = None if incoming.mid is None else g.conv1
        sums = products.data_gradient(incoming, conv, self.buffer, g.reads, norm, total, total)
        assert sums is not None
        count = 1.0 if self.group else float(layout.count(self.buffer))
        return products.norm_gradients(sums, self.buffer, g.reads, norm, count, None if norm.own else left)

    def finished(self, slot: slice, total: Tensor, left: tuple[Tensor, Tensor], count: Tensor) -> Tensor:
        """The gradient of a slot, all of whose readers are done: total + slope * (x - mean) + offset. In a group these
        are sums, to be divided by the count of all."""
        slope, offset = (v[slot] for v in left)
        if self.group:
            slope, offset = (collective.total(torch.stack([slope, offset]), self.group) / count).to(slope.dtype)
        return bn_rk_sum.forward(
            self.buffer[:, slot], slope, offset, self.mean[slot], self.zeros[slot],
            [total[:, slot]], [1.0], None, True, False, 1.0, False, False,
        )[0]  # fmt: skip


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


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
    kernels.compile_ahead(
        ("dense_block", bool(conv2), bool(summed), keep, *{mean is None for mean in norms[2::4]}), _step,
        x, conv1, conv2, norms, keeps, keep_scale, reads, writes, eps, channels, summed, mean, var, keep, total_moments,
    )  # fmt: skip
    dtype = moments_dtype(x.dtype)
    inputs = x.shape[1]
    with without_autocast(x):
        buffer = layout.empty(like(x, channels), True)
        moments = (x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype))
        block = _Block(buffer, *moments, keep_scale, group)
        order = list(growths(conv1, conv2, norms, keeps, reads, writes, eps))
        wanted = keep or total_moments or any(g.norm1[2] is None for g in order)
        block.put(slice(0, inputs), x, wanted and mean is None)
        if mean is not None and var is not None:
            torch._foreach_copy_([block.mean[:inputs], block.var[:inputs]], [mean, var])
        mids: list[Tensor] = []
        mid_moments: list[Tensor] = []
        for g in order:
            norm = block.norm1(g)
            if g.conv2 is None:
                growth = dropped(conv(block.read(g, norm), g.conv1), g.keep1, keep_scale)
            else:
                own = g.norm2[2] is not None
                norm2 = as_norm(g.norm2, block.mean, block.var, g.eps2)
                in_tile = own and not keep
                mid, partials = block.bottleneck(g, norm, norm2 if in_tile else None, not own)
                act = mid
                if not in_tile:
                    moments = norm2[:2]
                    if partials is not None:
                        moments = collective.moments(*kernels.merge_moments(partials), layout.count(x), group)
                    mids.append(mid)
                    mid_moments.extend(m.clone() if own else m for m in moments)  # no result is an argument
                    act = _normalised(mid, norm2, moments)
                growth = dropped(conv(act, g.conv2), g.keep2, keep_scale)
            block.put(g.slot, growth, wanted)
        result = [buffer, block.mean, block.var]
        if keep:
            result += [*mid_moments, *mids]
        if summed:
            result += _summed(buffer, [0, *summed], inputs, total_moments)
        return result


def _step(*args: Any) -> None:
    """forward with these, and where that keeps what they take the running statistics and backward."""
    x, conv1, conv2, norms, keeps, keep_scale, reads, writes, eps, _, summed, _, _, keep, _ = args
    buffer, mean, var, *found = forward(*args, group="")
    if keep:
        moments, mids = found[: 2 * len(conv2)], found[2 * len(conv2) : 3 * len(conv2)]
        vectors, counters = [mean] * len(conv1), [mean.new_empty((), dtype=torch.int64)] * len(conv1)
        channel_moments.update_running_stats(mean, var, 2, vectors, vectors, counters, 0.1)
        backward(
            layout.empty(x if summed else buffer, True), buffer, mean, var, moments, mids, conv1, conv2, norms, keeps,
            keep_scale, reads, writes, eps, x.shape[1], summed, "",
        )  # fmt: skip


def _normalised(mid: Tensor, norm: Norm, moments: Any) -> Tensor:
    mean, var = moments
    return bn_rk_sum.forward(
        mid, norm.weight, norm.bias, mean, var, [], [], None, True, True, norm.eps, False, False
    )[0]  # fmt: skip


def _summed(buffer: Tensor, firsts: list[int], channels: int, moments: bool) -> list[Tensor]:
    """The sum of some slots, and its mean and variance if asked for; at most 16 terms in one pass."""
    terms = [buffer[:, first : first + channels] for first in firsts]
    total: list[Tensor] = []
    while terms:
        some, terms = [*total[:1], *terms[: 16 - len(total[:1])]], terms[16 - len(total[:1]) :]
        n = len(some)
        total = rk_sum.forward(some, [1.0] * n, [None] * n, None, True, False, moments and not terms, False)
    return total


def _spread(grad: Tensor, total: Tensor, firsts: list[int]) -> None:
    """grad into the slots that were added up, 0 into the others; those that adjoin at once."""
    width, end = grad.shape[1], 0
    while firsts:
        run = [first for i, first in enumerate(firsts) if first == firsts[0] + i * width]
        if run[0] > end:
            total[:, end : run[0]].zero_()
        end = run[-1] + width
        total[:, run[0] : end].unflatten(1, (-1, width)).copy_(grad[:, None])
        firsts = firsts[len(run) :]
    if end < total.shape[1]:
        total[:, end:].zero_()


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
    with without_autocast(buffer):
        block = _Block(buffer, mean, var, keep_scale, group)
        count = collective.count(layout.count(buffer), mean, group)
        total = layout.empty(buffer, True)
        if summed:
            _spread(grad, total, [0, *summed])
        else:
            total.copy_(grad)
        left = (torch.zeros_like(mean), torch.zeros_like(mean))
        found: list[list[Tensor]] = []
        order = list(growths(conv1, conv2, norms, keeps, reads, writes, eps))
        for i, g in reversed(list(enumerate(order))):
            norm = block.norm1(g)
            d = block.finished(g.slot, total, left, count)
            second: list[Tensor] = []
            if g.conv2 is None:
                d = dropped(d, g.keep1, keep_scale)
                d, dconv1 = conv_backward(d, block.read(g, norm), g.conv1)
                dweight, dbias = block.read_backward(g, norm, Incoming(_dense(d)), total, left)
            else:
                d = dropped(d, g.keep2, keep_scale)
                mid = mids[i] if mids else block.bottleneck(g, norm, None, False)[0]
                mean2, var2 = mid_moments[2 * i : 2 * i + 2]
                norm2 = as_norm(g.norm2, mean2, var2, g.eps2)
                dact = _dense(conv_backward(d, mid, g.conv2, need_weight=False)[0])
                act = layout.empty(mid, True)
                dweight2, dbias2 = bn_rk_sum.backward(
                    dact, mid, norm2.weight, norm2.bias, mean2, var2, None, None, [], True, True, False, norm2.eps,
                    False, True, False, act,
                )  # fmt: skip
                dconv2 = conv_backward(d, act, g.conv2, need_x=False)[1]
                incoming = block.incoming(g, norm2, dact, mid, (dweight2, dbias2), count)
                second = [dconv2, dweight2, dbias2]
                dconv1 = products.weight_gradient(incoming, g.conv1, block.buffer, g.reads, norm)
                dweight, dbias = block.read_backward(g, norm, incoming, total, left)
            found.append([dconv1, dweight, dbias, *second])
        dx = block.finished(slice(0, inputs), total, left, count)
        return [dx, *(t for gradients in reversed(found) for t in gradients)]
