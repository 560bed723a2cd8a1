"""residual_block in Triton. Of two bytes an element 1x1 convolutions are products that normalise what they read, take
the moments of what they write, and go back through BatchNorm as they read; other convolutions are PyTorch's, between
bn_rk_sum's kernels. The backward normalises again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rkfast.ops import kernels, layout, products
from rkfast.ops.bn_rk_sum import triton as bn_rk_sum
from rkfast.ops.channel_moments import triton as channel_moments
from rkfast.ops.channel_moments.reference import moments_dtype
from rkfast.ops.conv.reference import gradients as conv_gradients
from rkfast.ops.conv.reference import laid
from rkfast.ops.products import Incoming
from rkfast.ops.residual_block.reference import Vectors, stride_of


class _Layer(NamedTuple):
    """A convolution, and weight, bias, mean and var of the BatchNorm behind it, these two None for the batch's."""

    conv: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float
    stride: int
    channels_last: bool

    @property
    def multiplies(self) -> bool:
        """Whether the convolution is a product of ours."""
        return self.channels_last and self.stride == 1 and self.conv.shape[2] == 1 and self.conv.element_size() == 2

    def norm(self) -> products.Norm:
        assert self.mean is not None and self.var is not None
        dtype = moments_dtype(self.conv.dtype)
        mean, var = self.mean.to(dtype).contiguous(), self.var.to(dtype).contiguous()
        return products.as_norm([self.weight, self.bias, None, None], mean, var, self.eps)

    def normed(self, out: Tensor, relu: bool) -> Tensor:
        vectors = self.weight, self.bias, self.mean, self.var
        return bn_rk_sum.forward(out, *vectors, [], [], None, self.channels_last, relu, self.eps, False, False)[0]

    def read(self, read: Tensor, below: _Layer | None, finishes: bool) -> tuple[Tensor, _Layer]:
        """The convolution of relu(norm(read)), the norm of the layer below, or where there is none of read; and the
        layer with the moments of that. finishes: relu(norm(it)) in place of the convolution."""
        batch = self.mean is None
        if self.multiplies:
            norm, then = None if below is None else below.norm(), self.norm() if finishes else None
            out, partials = products.product(read, products.whole(read), self.conv, norm, then=then, moments=batch)
            found = None if partials is None else kernels.merge_moments(partials)
        else:
            act = read if below is None else below.normed(read, True)
            out = laid(
                F.conv2d(act, self.conv, stride=self.stride, padding=self.conv.shape[2] // 2), self.channels_last
            )
            found = channel_moments.forward(out, self.channels_last) if batch else None
        return out, self if found is None else self._replace(mean=found[0], var=found[1])

    def back(
        self,
        grad: Tensor,
        out: Tensor,
        batch: bool,
        *,
        relu: bool,
        mask: Tensor | None = None,
        step: Tensor | None = None,
        need_step: bool = False,
        shared: bool = False,
        act: Tensor | None = None,
    ) -> tuple[Incoming, list[Tensor], list[Tensor]]:
        """From the gradient of what stands behind the norm to that of the convolution's result, which a product makes
        as it reads; the gradients of weight and bias; and [that of step, where needed, and grad by the mask, where
        shared]. act: where relu(norm(out)) is written as well."""
        masks = mask is not None
        found = bn_rk_sum.backward(
            grad, out, self.weight, self.bias, self.mean, self.var, step, mask,  # type: ignore[arg-type]
            [1.0] if shared or (masks and self.multiplies) else [], self.channels_last, relu, batch, self.eps,
            not self.multiplies, True, need_step, act,
        )  # fmt: skip
        if not self.multiplies:
            d, dweight, dbias, *rest = found
            return Incoming(d), [dweight, dbias], rest
        dweight, dbias, *rest = found
        mean, var, weight, bias, eps, _ = self.norm()
        factor = kernels.vector(step, mean.dtype)
        incoming = Incoming(
            rest[-1] if masks else grad, out, mean, var, weight, bias, factor, eps, relu=not masks and relu
        )
        if batch:
            incoming = incoming._replace(dweight=dweight, dbias=dbias, count=float(layout.count(out)))
        return incoming, [dweight, dbias], rest

    def both(self, d: Tensor, read: Tensor, need_read: bool, need_conv: bool) -> tuple[Tensor | None, list[Tensor]]:
        """PyTorch's gradients of what was read, and [of the convolution]."""
        if not (need_read or need_conv):
            return None, []
        dread, dconv = conv_gradients(d, read, self.conv, need_read, need_conv, self.stride)
        dread = None if dread is None else laid(dread, self.channels_last)
        return dread, [] if dconv is None else [torch.empty_like(self.conv).copy_(dconv)]


def _layers(
    convs: list[Tensor], norms: Vectors, strides: list[int], eps: list[float], channels_last: bool
) -> list[_Layer]:
    found = []
    for i, conv in enumerate(convs):
        weight, bias, mean, var = norms[4 * i : 4 * i + 4]
        found.append(_Layer(conv, weight, bias, mean, var, eps[i], stride_of(i, strides), channels_last))
    return found


def forward(
    x: Tensor,
    shortcut: Tensor | None,
    convs: list[Tensor],
    norms: Vectors,
    step: Tensor | None,
    strides: list[int],
    eps: list[float],
    channels_last: bool,
    keep: bool,
) -> list[Tensor]:
    form = (*strides, *(w.shape[2] for w in convs), *(mean is None for mean in norms[2::4]))
    key = ("residual_block", form, shortcut is None, step is None, channels_last, keep)
    kernels.compile_ahead(key, _step, x, shortcut, convs, norms, step, strides, eps, channels_last, keep)
    with products.without_autocast(x):
        x = layout.conform(x, channels_last)
        layers = _layers(convs, norms, strides, eps, channels_last)
        branch = len(strides)
        outs: list[Tensor] = []
        below: _Layer | None = None  # whose norm stands before the next convolution
        for i, layer in enumerate(layers):
            if i == branch:
                below = None
            finishes = not keep and layer.multiplies and layer.mean is not None and i < branch - 1
            out, layers[i] = layer.read(outs[-1] if 0 < i < branch else x, below, finishes)
            outs.append(out)
            below = None if finishes else layers[i]
        last = layers[branch - 1]
        projected = [layer.normed(out, False) for layer, out in zip(layers[branch:], outs[branch:], strict=True)]
        result = bn_rk_sum.forward(
            outs[branch - 1], last.weight, last.bias, last.mean, last.var,
            projected or [x if shortcut is None else shortcut], [1.0], step, channels_last, True, last.eps, False, keep,
        )  # fmt: skip
        vectors = [v for i, layer in enumerate(layers) if norms[4 * i + 2] is None for v in (layer.mean, layer.var)]
        return [*result, *(outs if keep else []), *vectors]  # type: ignore[list-item]


def _step(*args: Any) -> None:
    """forward with these, and where that keeps what it takes the running statistics and backward."""
    x, shortcut, convs, norms, step, strides, eps, channels_last, keep = args
    out, *found = forward(*args)
    if keep:
        mask, outs, vectors = found[0], found[1 : 1 + len(convs)], iter(found[1 + len(convs) :])
        batch = [norms[4 * i + 2] is None for i in range(len(convs))]
        norms = [next(vectors) if t is None and i % 4 > 1 else t for i, t in enumerate(norms)]
        if any(batch):
            mean, var = norms[4 * batch.index(True) + 2 : 4 * batch.index(True) + 4]
            counter = mean.new_empty((), dtype=torch.int64)
            channel_moments.update_running_stats(mean, var, 2, [mean], [var], [counter], 0.1)
        own = shortcut is None and len(convs) == len(strides)
        backward(
            out, x, outs, mask, convs, norms, step, strides, eps, batch, channels_last, own, True, shortcut is not None,
            True, step is not None,
        )  # fmt: skip


def backward(
    grad: Tensor,
    x: Tensor,
    outs: list[Tensor],
    mask: Tensor,
    convs: list[Tensor],
    norms: Vectors,
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
    with products.without_autocast(x):
        x = layout.conform(x, channels_last)
        outs = [laid(t, channels_last) for t in outs]  # as a hook may not have given them back
        layers = _layers(convs, norms, strides, eps, channels_last)
        last, projects = len(strides) - 1, len(convs) > len(strides)
        shared = need_shortcut or (own and need_x) or projects
        dconvs: list[list[Tensor]] = [[] for _ in convs]
        affine: list[list[Tensor]] = [[] for _ in convs]
        incoming, affine[last], rest = layers[last].back(
            grad, outs[last], batch[last], relu=True, mask=mask, step=step, need_step=need_step, shared=shared
        )
        dstep, dshortcut = rest[: int(need_step)], rest[-1:]
        other = dshortcut[0] if own and need_x else None  # what is added to the gradient of x
        if projects:
            p = last + 1
            through, affine[p], _ = layers[p].back(dshortcut[0], outs[p], batch[p], relu=False)
            other, dconvs[p] = _first(layers[p], through, x, None, need_x, need_convs)
        for i in reversed(range(1, last + 1)):
            layer, below, read = layers[i], layers[i - 1], outs[i - 1]
            if layer.multiplies:
                norm, reads = below.norm(), products.whole(read)
                if need_convs:
                    dconvs[i] = [products.weight_gradient(incoming, layer.conv, read, reads, norm)]
                total = layout.empty(read, True)
                sums = products.data_gradient(incoming, layer.conv, read, reads, norm, total, None)
                assert sums is not None
                slope, offset, zeros = norm.mean.new_zeros((3, norm.mean.shape[0]))
                left = (slope, offset) if batch[i - 1] else None
                affine[i - 1] = [*products.norm_gradients(sums, read, reads, norm, float(layout.count(read)), left)]
                if left is not None:
                    total = bn_rk_sum.forward(
                        read, slope, offset, norm.mean, zeros, [total], [1.0], None, True, False, 1.0, False, False
                    )[0]  # fmt: skip
                incoming = Incoming(total)
            else:
                d = incoming.grad
                dact, _ = layer.both(d, read, True, False)
                assert dact is not None
                act = layout.empty(read, channels_last) if need_convs else None
                incoming, affine[i - 1], _ = below.back(dact, read, batch[i - 1], relu=True, act=act)
                if act is not None:
                    _, dconvs[i] = layer.both(d, act, False, True)
        dx, dconvs[0] = _first(layers[0], incoming, x, other, need_x, need_convs)
        return [
            *([] if dx is None else [dx]),
            *(dshortcut if need_shortcut else []),
            *dstep,
            *(t for each in zip(dconvs, affine, strict=True) for part in each for t in part),
        ]


def _first(
    layer: _Layer, incoming: Incoming, x: Tensor, other: Tensor | None, need_x: bool, need_conv: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of x, which the convolution reads as it is, with other added, and [of the convolution]."""
    if not layer.multiplies:
        dx, dconv = layer.both(incoming.grad, x, need_x, need_conv)
        return dx if dx is None or other is None else dx + other, dconv
    reads = products.whole(x)
    dconv = [products.weight_gradient(incoming, layer.conv, x, reads, None)] if need_conv else []
    if not need_x:
        return None, dconv
    # In place, where no other program reads that.
    dx = layout.empty(x, True) if other is None or other is incoming.grad else other
    products.data_gradient(incoming, layer.conv, None, reads, None, dx, other)
    return dx, dconv
