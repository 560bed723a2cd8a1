"""The fused operations. Each stands in a folder of its own: contract and autograd, then one file per backend."""

from rkfast.ops.bn_relu_conv import bn_relu_conv as bn_relu_conv
from rkfast.ops.bn_relu_pool import bn_relu_pool as bn_relu_pool
from rkfast.ops.bn_rk_sum import bn_rk_sum as bn_rk_sum
from rkfast.ops.channel_moments import Moments as Moments
from rkfast.ops.channel_moments import channel_moments as channel_moments
from rkfast.ops.clique_block import Stages as Stages
from rkfast.ops.clique_block import clique_block as clique_block
from rkfast.ops.conv import conv as conv
from rkfast.ops.dense_block import dense_block as dense_block
from rkfast.ops.norm import Norm as Norm
from rkfast.ops.residual_block import residual_block as residual_block
from rkfast.ops.rk_sum import rk_sum as rk_sum

__all__ = [
    "Moments",
    "Norm",
    "Stages",
    "bn_relu_conv",
    "bn_relu_pool",
    "bn_rk_sum",
    "channel_moments",
    "clique_block",
    "conv",
    "dense_block",
    "residual_block",
    "rk_sum",
]
