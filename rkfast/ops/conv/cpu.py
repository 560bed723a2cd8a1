"""conv by the C++ kernels of csrc/cpu/conv.cpp; signatures as in reference.py."""

from rkfast import native

forward = native.cpu().conv
backward = native.cpu().conv_backward
