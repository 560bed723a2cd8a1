"""Weights in autocast's dtype, all of a block at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rkfast.ops import checks


def cast(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """``[w.to(dtype) for w in weights]``, on a GPU in one launch, and their gradients in one."""
    if not _at_once(weights, dtype):
        return [w.to(dtype) for w in weights]
    return list(_Cast.apply(dtype, *weights))


def _at_once(weights: list[Tensor], dtype: torch.dtype) -> bool:
    return (
        len(weights) > 1
        and not torch.compiler.is_compiling()
        and all(type(w) in (Tensor, torch.nn.Parameter) and w.is_cuda and w.dtype != dtype for w in weights)
        and len({w.device for w in weights}) == 1
        and not checks.transformed(weights)
    )


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> Any:
        ctx.dtypes = [w.dtype for w in weights]
        ctx.set_materialize_grads(False)
        return tuple(_copies(weights, [dtype] * len(weights)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        given = [(g, dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True) if g is not None]
        if torch.is_grad_enabled():  # for the gradient of the gradient
            found = iter([g.to(dtype) for g, dtype in given])
        else:
            found = iter(_copies([g for g, _ in given], [dtype for _, dtype in given]))
        return (None, *(None if g is None else next(found) for g in grads))


def _copies(tensors: Any, dtypes: list[torch.dtype]) -> list[Tensor]:
    made = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    if made:
        torch._foreach_copy_(made, list(tensors))
    return made
