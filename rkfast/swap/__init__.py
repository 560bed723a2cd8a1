"""Fused kernels in a network that somebody has already."""

from rkfast.swap.estimate import Estimate as Estimate
from rkfast.swap.estimate import estimate as estimate
from rkfast.swap.export import export as export
from rkfast.swap.fold import fold as fold
from rkfast.swap.fuse import fuse as fuse
from rkfast.swap.fuse import fused as fused
from rkfast.swap.fuse import unfuse as unfuse
from rkfast.swap.graphed import Graphed as Graphed
from rkfast.swap.graphed import graphed as graphed
from rkfast.swap.max_batch import max_batch as max_batch
from rkfast.swap.profile import Profile as Profile
from rkfast.swap.profile import profile as profile
from rkfast.swap.report import Report as Report
from rkfast.swap.report import report as report
from rkfast.swap.tune import Decision as Decision
from rkfast.swap.tune import Tuning as Tuning
from rkfast.swap.tune import tune as tune
from rkfast.swap.verify import Verification as Verification
from rkfast.swap.verify import verify as verify
