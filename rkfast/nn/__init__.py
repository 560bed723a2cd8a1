"""Modules: the parts of which the models are built, with the parameters and keys of their stock PyTorch twins."""

from rkfast.nn.branch import PreActBranch as PreActBranch
from rkfast.nn.branch import SymmetricBranch as SymmetricBranch
from rkfast.nn.clique import CliqueBlock as CliqueBlock
from rkfast.nn.clique import IRKStep as IRKStep
from rkfast.nn.clique import RKCNNStep as RKCNNStep
from rkfast.nn.dense import DenseBlock as DenseBlock
from rkfast.nn.dense import DenseLayer as DenseLayer
from rkfast.nn.dense import ERKStep as ERKStep
from rkfast.nn.dense import TimePeriod as TimePeriod
from rkfast.nn.multistep import LeapfrogStep as LeapfrogStep
from rkfast.nn.multistep import LMStep as LMStep
from rkfast.nn.multistep import MultistepPeriod as MultistepPeriod
from rkfast.nn.norm import batch_norm_relu as batch_norm_relu
from rkfast.nn.poly import PolyStep as PolyStep
from rkfast.nn.poly import poly_branches as poly_branches
from rkfast.nn.residual import BasicBlock as BasicBlock
from rkfast.nn.residual import Bottleneck as Bottleneck
from rkfast.nn.residual import PadShortcut as PadShortcut
from rkfast.nn.residual import Projection as Projection
from rkfast.nn.residual import SqueezeExcite as SqueezeExcite
from rkfast.nn.reversible import RevPeriod as RevPeriod
from rkfast.nn.reversible import RevStep as RevStep
from rkfast.nn.step import Period as Period
from rkfast.nn.step import RKStep as RKStep
from rkfast.nn.transition import Attention as Attention
from rkfast.nn.transition import MultiscaleHead as MultiscaleHead
from rkfast.nn.transition import NormPool as NormPool
from rkfast.nn.transition import Transition as Transition

__all__ = [
    "Attention",
    "BasicBlock",
    "Bottleneck",
    "CliqueBlock",
    "DenseBlock",
    "DenseLayer",
    "ERKStep",
    "IRKStep",
    "LMStep",
    "LeapfrogStep",
    "MultiscaleHead",
    "MultistepPeriod",
    "NormPool",
    "PadShortcut",
    "Period",
    "PolyStep",
    "PreActBranch",
    "Projection",
    "RKCNNStep",
    "RKStep",
    "RevPeriod",
    "RevStep",
    "SqueezeExcite",
    "SymmetricBranch",
    "TimePeriod",
    "Transition",
    "batch_norm_relu",
    "poly_branches",
]
