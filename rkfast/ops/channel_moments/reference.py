"""channel_moments in plain PyTorch, and what the other references share with it."""

from __future__ import annotations

import torch
from torch import Tensor


def moments_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 tensors, else float32: the dtype of everything that is per channel, and of every sum."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """v [C] or [N, C] so that it broadcasts against x [N, C, ...]."""
    return v.reshape(*(v.shape if v.dim() == 2 else (1, *v.shape)), *[1] * (x.dim() - 2))


def sums(x: Tensor, per_sample: bool) -> Tensor:
    """Sum of x [N, C, ...] over each channel -> [C], or over each channel of each sample -> [N, C], in float64."""
    axes = [*([] if per_sample else [0]), *range(2, x.dim())]
    return x.sum(axes, dtype=torch.float64).to(x.dtype) if axes else x


def forward(x: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    wide = x.to(moments_dtype(x.dtype))
    if x.numel() == 0:
        return wide.new_zeros(x.shape[1]), wide.new_zeros(x.shape[1])
    var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    return mean, var


def update_running_stats(
    mean: Tensor,
    var: Tensor,
    count: int,
    running_mean: list[Tensor],
    running_var: list[Tensor],
    num_batches_tracked: list[Tensor],
    momentum: float | None,
) -> None:
    if not torch.compiler.is_compiling():
        _batched_alike(mean, [*running_mean, *running_var])
    for n in num_batches_tracked:
        n.add_(1)
    if count == 0:
        return
    # PyTorch keeps the unbiased variance; one value per channel has none.
    unbiased = var * (count / max(count - 1, 1))
    for i, (r_mean, r_var) in enumerate(zip(running_mean, running_var, strict=True)):
        channels = r_mean.shape[0]
        # A tensor, so that a cumulative average does not wait for the device.
        weight = momentum if momentum is not None else 1.0 / num_batches_tracked[i].to(mean.dtype)
        r_mean.add_(weight * (mean[:channels] - r_mean))
        r_var.add_(weight * (unbiased[:channels] - r_var))


def _batched_alike(mean: Tensor, running: list[Tensor]) -> None:
    is_batched = torch._C._functorch.is_batchedtensor
    if is_batched(mean) and not all(map(is_batched, running)):
        raise RuntimeError(
            "running_mean, running_var: torch.func.vmap gives each of its samples statistics of its own, and these are "
            "not batched; let it map over them too, or take a norm without running statistics or in evaluation mode "
            "(torch.func.replace_all_batch_norm_modules_ does it for a network)"
        )
