"""A BatchNorm inside an op."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from rkfast.ops import checks, layout


class Norm(NamedTuple):
    """A BatchNorm: what ``torch.nn.functional.batch_norm`` takes, and the counter of nn.BatchNorm2d.

    weight, bias, running_mean, running_var: [C] of any floating dtype, or None. training: normalise with the batch's
    own moments, and move the running ones; False takes the running ones. momentum None: the cumulative average. group:
    the name of a process group whose processes each have a part of the batch (nn.SyncBatchNorm), one for all norms.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None = None
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    group: str = ""

    @property
    def batch(self) -> bool:
        return self.training or self.running_mean is None


def usual(norm: object) -> bool:
    """Whether one of ``checks``' surveys of vectors says all that ``check_norm`` does."""
    if type(norm) is not Norm or norm.group:
        return False
    return type(norm.momentum) is float and type(norm.eps) is float and norm.eps > 0


def check_norm(norm: object, name: str, channels: int, x: Tensor, count: int | None = None) -> None:
    """norm is a Norm over so many channels that what comes of x can be normalised with, of so many values per channel,
    None for as many as x has."""
    if not isinstance(norm, Norm):
        raise TypeError(f"{name}: expected a Norm, got {type(norm).__name__}")
    checks.norm_numbers(norm.eps, norm.momentum, norm.batch, f"{name}.")
    for field in ("weight", "bias", "running_mean", "running_var"):
        v = getattr(norm, field)
        if v is None:
            continue
        checks.vector(v, x, f"{name}.{field}", channels=channels)
        checks.resolved(v, f"{name}.{field}")
    tracked = norm.training and norm.running_mean is not None
    checks.running(norm.running_mean, f"{name}.running_mean", tracked)
    checks.running(norm.running_var, f"{name}.running_var", tracked)
    if tracked:
        checks.counter(norm.num_batches_tracked, x, f"{name}.num_batches_tracked")
        if norm.momentum is None and norm.num_batches_tracked is None:
            raise ValueError(f"{name}.momentum: None (a cumulative average) needs num_batches_tracked")
    if (norm.running_mean is None) != (norm.running_var is None):
        raise ValueError(f"{name}: running_mean and running_var come together, or not at all")
    if norm.batch and (layout.count(x) if count is None else count) == 1 and not norm.group:
        raise ValueError(f"{name}: expected more than 1 value per channel when training, got x of {list(x.shape)}")
