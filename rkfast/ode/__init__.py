"""Ordinary differential equations by the methods of ``rkfast.tableau``: is a method of its order, what does it do to an
equation, and what do the steps of a network do."""

from rkfast.ode.increments import Probe, StepReport, probe
from rkfast.ode.order import OrderCheck, Run, check
from rkfast.ode.solver import Solution, integrate

__all__ = ["OrderCheck", "Probe", "Run", "Solution", "StepReport", "check", "integrate", "probe"]
