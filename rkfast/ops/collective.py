"""What processes that share a batch tell each other: moments of all of it, and sums over all of it.

A group is the name of a process group (``ProcessGroup.group_name``), which fits the schema of an op; ``""`` is none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check(group: object, moments: bool) -> None:
    """group can be one; ``moments``: whether some are given or asked for."""
    if not isinstance(group, str):
        raise TypeError(f"group: expected the name of a process group, as group.group_name gives it, got {group!r}")
    if not group:
        return
    if moments:
        raise ValueError("moments: those of one process; with a group they are taken over all of it, give and ask none")
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise RuntimeError("group: there are no process groups; call torch.distributed.init_process_group first")


def total(values: Tensor, group: str) -> Tensor:
    """The sum of ``values`` over the processes of a group."""
    if not group:
        return values
    return _wait(torch.ops._c10d_functional.all_reduce(values.contiguous(), "sum", group))


def moments(mean: Tensor, var: Tensor, count: int, group: str) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] over all processes, merged by Chan's rule; the same bits on each of them."""
    if not group:
        return mean, var
    own = torch.cat([mean.double(), var.double(), mean.new_full((1,), count, dtype=torch.float64)])
    # There is no public way from a name to its group.
    size = torch.distributed.distributed_c10d._resolve_process_group(group).size()  # type: ignore[attr-defined, arg-type]
    every = _wait(torch.ops._c10d_functional.all_gather_into_tensor(own, size, group)).view(size, -1)
    means, variances, counts = every.split([len(mean), len(mean), 1], 1)
    share = counts / counts.sum().clamp(min=1)
    middle = (share * means).sum(0)
    spread = (share * (variances + (means - middle).square())).sum(0)
    return middle.to(mean.dtype), spread.to(mean.dtype)


def count(values: int, like: Tensor, group: str) -> Tensor:
    """How many values a channel has over all processes, Tensor [] like ``like``."""
    return total(like.new_full((), values, dtype=torch.float64), group)


def unbiased(var: Tensor, count: Tensor) -> Tensor:
    return (var * (count / (count - 1).clamp(min=1))).to(var.dtype)


def mean_terms(
    weight: Tensor | None, var: Tensor, eps: float, dweight: Tensor, dbias: Tensor, count: Tensor, group: str
) -> tuple[Tensor, Tensor]:
    """What the moments' dependence on x adds to a BatchNorm's gradient, ``slope * (x - mean) + offset``, from the
    gradients of weight and bias of this process."""
    rstd = torch.rsqrt(var + eps)
    scale = -rstd / count if weight is None else -rstd * weight / count
    slope, offset = (scale * total(torch.stack([dweight * rstd, dbias]), group)).to(var.dtype)
    return slope, offset


def _wait(t: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(t)
