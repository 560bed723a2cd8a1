"""residual_block in plain PyTorch: the definition of right, and what runs where no kernel can."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rkfast.ops import checks
from rkfast.ops.bn_rk_sum import reference as bn_rk_sum
from rkfast.ops.conv.reference import gradients as conv_gradients
from rkfast.ops.conv.reference import laid
from rkfast.ops.rk_sum.reference import masked

Vectors = list[Tensor | None]  # of each norm weight, bias, mean and var


def stride_of(i: int, strides: list[int]) -> int:
    """Of convs[i]; one behind those of the branch is the projection."""
    return strides[i] if i < len(strides) else math.prod(strides)


def _conv(x: Tensor, convs: list[Tensor], i: int, strides: list[int]) -> Tensor:
    return F.conv2d(x, convs[i], stride=stride_of(i, strides), padding=convs[i].shape[2] // 2)


def composite(
    x: Tensor,
    shortcut: Tensor | None,
    convs: list[Tensor],
    norms: Vectors,
    step: Tensor | None,
    strides: list[int],
    eps: list[float],
    joined: bool = True,
) -> list[Tensor]:
    """[out], or where not joined what is added to the shortcut and, if x is projected, the shortcut; then mean and
    variance of each norm that takes the batch's; differentiable."""
    with torch.autocast(x.device.type, enabled=False):
        vectors: list[list[Tensor]] = [[] for _ in convs]

        def normed(y: Tensor, i: int, terms: list[Tensor], step: Tensor | None, relu: bool) -> Tensor:
            weight, bias, mean, var = norms[4 * i : 4 * i + 4]
            act, *found = bn_rk_sum.composite(
                y, weight, bias, mean, var, terms, [1.0] * len(terms), step, relu, eps[i], False
            )
            vectors[i] = [v.detach() for v in found]
            return act

        last, act = len(strides) - 1, x
        for i in range(last):
            act = normed(_conv(act, convs, i, strides), i, [], None, True)
        projected = [normed(_conv(x, convs, i, strides), i, [], None, False) for i in range(last + 1, len(convs))]
        terms = (projected or [x if shortcut is None else shortcut]) if joined else []
        out = normed(_conv(act, convs, last, strides), last, terms, step, joined)
        return [out, *([] if joined else projected), *(v for each in vectors for v in each)]


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
    with torch.autocast(x.device.type, enabled=False):
        last = len(strides) - 1
        outs: list[Tensor] = [x] * len(convs)
        mask: list[Tensor] = []
        vectors: list[list[Tensor]] = [[] for _ in convs]

        def normed(read: Tensor, i: int, terms: list[Tensor], relu: bool) -> Tensor:
            outs[i] = laid(_conv(read, convs, i, strides), channels_last)
            masks = keep and i == last
            weight, bias, mean, var = norms[4 * i : 4 * i + 4]
            act, *found = bn_rk_sum.forward(
                outs[i], weight, bias, mean, var, terms, [1.0] * len(terms), step if i == last else None,
                channels_last, relu, eps[i], False, masks,
            )  # fmt: skip
            if masks:
                mask.append(found.pop(0))
            vectors[i] = found
            return act

        projected = [normed(x, i, [], False) for i in range(last + 1, len(convs))]
        act = x
        for i in range(last):
            act = normed(act, i, [], True)
        out = normed(act, last, projected or [x if shortcut is None else shortcut], True)
        return [out, *([*mask, *outs] if keep else []), *(v for each in vectors for v in each)]


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
    with torch.autocast(x.device.type, enabled=False):
        last, projects = len(strides) - 1, len(convs) > len(strides)
        shared = need_shortcut or (own and need_x) or projects
        parameters: list[list[Tensor]] = [[] for _ in convs]
        dshortcut: list[Tensor] = []
        dstep: list[Tensor] = []

        def through(i: int, grad: Tensor, read: Tensor, need_read: bool) -> Tensor | None:
            """The gradient of what convs[i] read."""
            nonlocal dstep, dshortcut
            weight, bias, mean, var = norms[4 * i : 4 * i + 4]
            assert mean is not None and var is not None
            joins = i == last
            dy, dweight, dbias, *rest = bn_rk_sum.backward(
                grad, outs[i], weight, bias, mean, var, step if joins else None, mask if joins else None,
                [1.0] if joins and shared else [], channels_last, i <= last, batch[i], eps[i], True, True,
                need_step and joins,
            )  # fmt: skip
            if joins:
                dstep, dshortcut = (rest[:1], rest[1:]) if need_step else ([], rest)
            wanted, dconv = (need_read, need_convs), None
            dread = None
            if any(wanted):
                dread, dconv = conv_gradients(dy, read, convs[i], *wanted, stride_of(i, strides))
            parameters[i] = [*([] if dconv is None else [torch.empty_like(convs[i]).copy_(dconv)]), dweight, dbias]
            return dread

        for i in reversed(range(last + 1)):
            read = x
            if i > 0:
                weight, bias, mean, var = norms[4 * i - 4 : 4 * i]
                read = bn_rk_sum.forward(
                    outs[i - 1], weight, bias, mean, var, [], [], None, channels_last, True, eps[i - 1], False, False
                )[0]
            found = through(i, grad, read, i > 0 or need_x)
            grad = grad if found is None else found
        dx = []
        if projects:
            found = through(last + 1, dshortcut.pop(), x, need_x)
            grad = grad if found is None else grad + found
        if need_x:
            dx = [laid(grad + dshortcut.pop() if own else grad, channels_last)]
        return [*dx, *dshortcut, *dstep, *(t for each in parameters for t in each)]


def gradients(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    convs: list[Tensor],
    norms: Vectors,
    step: Tensor | None,
    strides: list[int],
    eps: list[float],
    channels_last: bool,
    own: bool,
) -> list[Tensor | None]:
    """Those of x, shortcut, step, and of each convolution with weight and bias of its norm, where they require grad;
    differentiable in all of them and in grad. Of norms mean and var are given where they are not the batch's."""

    graph = torch.is_grad_enabled()
    with torch.autocast(x.device.type, enabled=False), torch.enable_grad():
        g = masked(grad, mask, channels_last)
        x, step, *tensors = map(checks.apart, (x, step, *convs, *norms))
        convs, norms = tensors[: len(convs)], tensors[len(convs) :]
        added = composite(x, None, convs, norms, step, strides, eps, joined=False)[: 1 + len(convs) - len(strides)]
        inputs = [x, step]
        for i, conv in enumerate(convs):
            inputs += [conv, *norms[4 * i : 4 * i + 2]]
        added = [t for t in added if t.requires_grad]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        made = iter(torch.autograd.grad(added, wanted, [g] * len(added), create_graph=graph) if wanted else ())
        dx, *rest = [next(made) if t is not None and t.requires_grad else None for t in inputs]
        return [dx if dx is None or not own else dx + g, g, *rest]
