"""residual_block in Triton: bn_rk_sum's kernels around PyTorch's convolutions. The backward normalises again."""

import functools

from rkfast.ops.bn_rk_sum import triton as sums
from rkfast.ops.residual_block import reference

forward = functools.partial(reference.forward, sums=sums)
backward = functools.partial(reference.backward, sums=sums)
