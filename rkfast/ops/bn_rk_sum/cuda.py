"""bn_rk_sum in CUDA C++ (csrc/cuda/bn_rk_sum.cu)."""

from rkfast import native

forward = native.cuda().bn_rk_sum
backward = native.cuda().bn_rk_sum_backward
