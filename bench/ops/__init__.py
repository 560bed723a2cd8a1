"""The cases, one file per op."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rkfast.bench.ops import bn_rk_sum, channel_moments, rk_sum
from rkfast.bench.workload import Case

# Each yields its cases of one size: "tiny" (every kernel once), "quick" (a sample) or "full".
OPS: dict[str, Callable[[str], Iterator[Case]]] = {
    "rk_sum": rk_sum.cases,
    "bn_rk_sum": bn_rk_sum.cases,
    "channel_moments": channel_moments.cases,
}
