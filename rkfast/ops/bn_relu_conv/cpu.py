"""bn_relu_conv by the C++ kernels of csrc/cpu/bn_relu_conv.cpp; signatures as in reference.py."""

from rkfast import native

forward = native.cpu().bn_relu_conv
backward = native.cpu().bn_relu_conv_backward
