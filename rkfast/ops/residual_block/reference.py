"""residual_block in plain PyTorch: the definition of right, and what runs where no kernel can."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from rkfast.ops import checks
from rkfast.ops.bn_rk_sum import reference as bn_rk_sum
from rkfast.ops.conv.reference import gradients as conv_gradients
from rkfast.ops.conv.reference import laid
from rkfast.ops.rk_sum.reference import masked

Vectors = list[Tensor | None]  # of each norm weight, bias, mean and var


def composite(
    x: Tensor,
    shortcut: Tensor | None,
    convs: list[Tensor],
    norms: Vectors,
    step: Tensor | None,
    eps: list[float],
    joined: bool = True,
) -> list[Tensor]:
    """[out], or what is added to the shortcut where not joined, then mean and variance of each norm that takes the
    batch's; differentiable."""
    with torch.autocast(x.device.type, enabled=False):
        act = x
        vectors: list[Tensor] = []
        for i, conv in enumerate(convs):
            y = F.conv2d(act, conv, padding=conv.shape[2] // 2)
            weight, bias, mean, var = norms[4 * i : 4 * i + 4]
            last = i == len(convs) - 1
            terms = [x if shortcut is None else shortcut] if last and joined else []
            relu = joined or not last
            act, *found = bn_rk_sum.composite(
                y, weight, bias, mean, var, terms, [1.0] * len(terms), step if last else None, relu, eps[i], False
            )
            vectors.extend(v.detach() for v in found)
        return [act, *vectors]


def forward(
    x: Tensor,
    shortcut: Tensor | None,
    convs: list[Tensor],
    norms: Vectors,
    step: Tensor | None,
    eps: list[float],
    channels_last: bool,
    keep: bool,
    sums: ModuleType = bn_rk_sum,
) -> list[Tensor]:
    """sums: a backend's bn_rk_sum."""
    with torch.autocast(x.device.type, enabled=False):
        act, outs, vectors, mask = x, [], [], []
        for i, conv in enumerate(convs):
            outs.append(laid(F.conv2d(act, conv, padding=conv.shape[2] // 2), channels_last))
            last = i == len(convs) - 1
            terms = [x if shortcut is None else shortcut] if last else []
            act, *found = sums.forward(
                outs[-1], *norms[4 * i : 4 * i + 4], terms, [1.0] * len(terms), step if last else None, channels_last,
                True, eps[i], False, keep and last,
            )  # fmt: skip
            mask = [found.pop(0)] if keep and last else []
            vectors.extend(found)
        return [act, *([*mask, *outs] if keep else []), *vectors]


def backward(
    grad: Tensor,
    x: Tensor,
    outs: list[Tensor],
    mask: Tensor,
    convs: list[Tensor],
    norms: Vectors,
    step: Tensor | None,
    eps: list[float],
    batch: list[bool],
    channels_last: bool,
    own: bool,
    need_x: bool,
    need_shortcut: bool,
    need_convs: bool,
    need_step: bool,
    sums: ModuleType = bn_rk_sum,
) -> list[Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        shared = need_shortcut or (own and need_x)
        parameters: list[Tensor] = []
        dshortcut: list[Tensor] = []
        dstep: list[Tensor] = []
        dx: list[Tensor] = []
        for i in reversed(range(len(convs))):
            weight, bias, mean, var = norms[4 * i : 4 * i + 4]
            assert mean is not None and var is not None
            last = i == len(convs) - 1
            dy, dweight, dbias, *rest = sums.backward(
                grad, outs[i], weight, bias, mean, var, step if last else None, mask if last else None,
                [1.0] if last and shared else [], channels_last, True, batch[i], eps[i], True, True,
                need_step and last,
            )  # fmt: skip
            if last:
                dstep, dshortcut = (rest[:1], rest[1:]) if need_step else ([], rest)
            read = x
            if i > 0:
                given = norms[4 * i - 4 : 4 * i]
                read = sums.forward(outs[i - 1], *given, [], [], None, channels_last, True, eps[i - 1], False, False)[0]
            wanted = i > 0 or need_x, need_convs
            dread, dconv = conv_gradients(dy, read, convs[i], *wanted) if any(wanted) else (None, None)
            found = [] if dconv is None else [torch.empty_like(convs[i]).copy_(dconv)]
            parameters = [*found, dweight, dbias, *parameters]
            if dread is not None:
                grad = dread
        if need_x:
            dx = [laid(grad + dshortcut.pop() if own else grad, channels_last)]
        return [*dx, *dshortcut, *dstep, *parameters]


def gradients(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    convs: list[Tensor],
    norms: Vectors,
    step: Tensor | None,
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
        added = composite(x, None, convs, norms, step, eps, joined=False)[0]
        inputs = [x, step]
        for i, conv in enumerate(convs):
            inputs += [conv, *norms[4 * i : 4 * i + 2]]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        made = iter(torch.autograd.grad(added, wanted, g, create_graph=graph) if wanted else ())
        dx, *rest = [next(made) if t is not None and t.requires_grad else None for t in inputs]
        return [dx if dx is None or not own else dx + g, g, *rest]
