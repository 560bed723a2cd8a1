"""Ordinary differential equations by the methods of ``rkfast.tableau``: is a method of its order, what does it do to an
equation, what do the steps of a network do, and is it stable."""

from rkfast.ode.increments import Probe, StepReport, probe
from rkfast.ode.noise import NoisePoint, noise_sweep
from rkfast.ode.order import OrderCheck, Run, check
from rkfast.ode.solver import Solution, integrate
from rkfast.ode.stability import BlockStability, Stability, spectral_norm, stability

__all__ = [
    "BlockStability",
    "NoisePoint",
    "OrderCheck",
    "Probe",
    "Run",
    "Solution",
    "Stability",
    "StepReport",
    "check",
    "integrate",
    "noise_sweep",
    "probe",
    "spectral_norm",
    "stability",
]
