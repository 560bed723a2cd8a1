"""channel_moments in CUDA C++ (csrc/cuda/channel_moments.cu)."""

from rkfast import native

forward = native.cuda().channel_moments
update_running_stats = native.cuda().update_running_stats
