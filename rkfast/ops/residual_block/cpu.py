"""residual_block by the C++ kernels of csrc/cpu/residual_block.cpp; signatures as in reference.py."""

from rkfast import native

forward = native.cpu().residual_block
backward = native.cpu().residual_block_backward
