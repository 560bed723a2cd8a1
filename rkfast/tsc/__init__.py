"""Time stepping controllers in whole networks (Yang et al., "Dynamical System Inspired Adaptive Time Stepping
Controller for Residual Network Families"): ``attach``, train, ``freeze`` or ``fold``."""

from rkfast.tsc.accumulate import accumulate as accumulate
from rkfast.tsc.attach import BlockSteps as BlockSteps
from rkfast.tsc.attach import StepSizes as StepSizes
from rkfast.tsc.attach import attach as attach
from rkfast.tsc.attach import detach as detach
from rkfast.tsc.attach import fold as fold
from rkfast.tsc.attach import freeze as freeze
from rkfast.tsc.attach import steps as steps
from rkfast.tsc.history import StepHistory as StepHistory

__all__ = ["BlockSteps", "StepHistory", "StepSizes", "accumulate", "attach", "detach", "fold", "freeze", "steps"]
