"""bn_relu_pool by the C++ kernels of csrc/cpu/bn_relu_pool.cpp; signatures as in reference.py."""

from rkfast import native

forward = native.cpu().bn_relu_pool
backward = native.cpu().bn_relu_pool_backward
