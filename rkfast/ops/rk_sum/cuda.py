"""rk_sum in CUDA C++ (csrc/cuda/rk_sum.cu)."""

from rkfast import native

forward = native.cuda().rk_sum
backward = native.cuda().rk_sum_backward
