"""bn_rk_sum by the C++ kernels of csrc/cpu/bn_rk_sum.cpp; signatures as in reference.py."""

from rkfast import native

forward = native.cpu().bn_rk_sum
backward = native.cpu().bn_rk_sum_backward
