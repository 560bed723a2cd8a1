"""rk_sum by the C++ kernels of csrc/cpu/rk_sum.cpp; signatures as in reference.py."""

from rkfast import native

forward = native.cpu().rk_sum
backward = native.cpu().rk_sum_backward
