"""Modules: the parts of which the models are built, with the parameters and keys of their stock PyTorch twins."""

from rkfast.nn.branch import PreActBranch as PreActBranch
from rkfast.nn.norm import batch_norm_relu as batch_norm_relu
from rkfast.nn.step import Period as Period
from rkfast.nn.step import RKStep as RKStep

__all__ = ["Period", "PreActBranch", "RKStep", "batch_norm_relu"]
