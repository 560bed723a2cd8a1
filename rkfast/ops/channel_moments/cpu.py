"""channel_moments by the C++ kernels of csrc/cpu/channel_moments.cpp; signatures as in reference.py."""

from rkfast import native

forward = native.cpu().channel_moments
update_running_stats = native.cpu().update_running_stats
