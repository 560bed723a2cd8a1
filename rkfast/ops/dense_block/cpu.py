"""dense_block by the C++ kernels of csrc/cpu/dense_block.cpp; signatures as in reference.py."""

from rkfast import native

forward = native.cpu().dense_block
backward = native.cpu().dense_block_backward
