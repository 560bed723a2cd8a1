"""Runge-Kutta stage combination for convolutional networks, fused."""

from rkfast import ops as ops
from rkfast.dispatch import explain as explain
from rkfast.dispatch import use as use

__version__ = "0.1.0"
