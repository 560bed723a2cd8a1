"""bn_relu_conv in Triton: BatchNorm and ReLU by bn_rk_sum's kernels around PyTorch's convolution. The backward
normalises again."""

import functools

from rkfast.ops.bn_relu_conv import reference
from rkfast.ops.bn_rk_sum import triton as norms
from rkfast.ops.channel_moments import triton as statistics

forward = functools.partial(reference.forward, norms=norms, statistics=statistics)
backward = functools.partial(reference.backward, norms=norms)
