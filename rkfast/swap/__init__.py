"""Fused kernels in a network that somebody has already."""

from rkfast.swap.export import export as export
from rkfast.swap.fold import fold as fold
from rkfast.swap.fuse import fuse as fuse
from rkfast.swap.fuse import fused as fused
from rkfast.swap.fuse import unfuse as unfuse
from rkfast.swap.report import Report as Report
from rkfast.swap.report import report as report
