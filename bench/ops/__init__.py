"""The cases, one file per op."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..workload import Case
from . import bn_rk_sum, channel_moments, dense_block, rk_sum

# Each yields its cases of one size ("tiny": every kernel once, "quick": a sample, "full") for one device.
OPS: dict[str, Callable[[str, str], Iterator[Case]]] = {
    "rk_sum": rk_sum.cases,
    "bn_rk_sum": bn_rk_sum.cases,
    "channel_moments": channel_moments.cases,
    "dense_block": dense_block.cases,
}
