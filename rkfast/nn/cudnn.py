"""cuDNN's convolution with bias, sum and ReLU in one kernel, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rkfast.ops import checks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CHANNELS = 8  # that tensor cores take at once; what reads others is padded, and slower than in two kernels

# Calls for which cuDNN has found no engine: a search that fails takes long.
_refused: set[tuple[Any, ...]] = set()


def relu_of_conv(conv: Any, x: Tensor, other: Tensor | None) -> Tensor | None:
    """``relu(conv(x) + other)`` of a FoldedConv, without a gradient; None where cuDNN has no such kernel. Under
    autocast in its dtype, with copies of the weight and bias that are made once. A NaN may become 0."""
    dtype = _dtype(conv, x, other)
    if dtype is None:
        return None
    weight, bias = _cast(conv, dtype)
    sizes = (conv.stride, conv.padding, conv.dilation, conv.groups)
    key = (x.shape, weight.shape, other is None, dtype, x.device, *sizes[:3])
    if key in _refused:
        return None
    x, *rest = (
        t.to(dtype).contiguous(memory_format=torch.channels_last) for t in ((x,) if other is None else (x, other))
    )
    try:
        if not rest:
            return torch.cudnn_convolution_relu(x, weight, bias, *sizes)
        return torch.cudnn_convolution_add_relu(x, weight, rest[0], 1.0, bias, *sizes)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        _refused.add(key)
        return None


def _dtype(conv: Any, x: Tensor, other: Tensor | None) -> torch.dtype | None:
    """In which this is one call; None where it is none."""
    given = (x,) if other is None else (x, other)
    if not all(type(t) is Tensor and on_gpu(t) and t.layout == torch.strided and t.dim() == 4 for t in given):
        return None
    weight = conv._weight
    autocast = checks.autocasts(x)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    served = (
        all(t.device == weight.device and (autocast or t.dtype == weight.dtype) for t in given)
        and dtype in DTYPES
        and x.dtype in DTYPES
        and x.numel() > 0
        and conv._zeros
        and conv.groups == 1
        and weight.shape[0] % CHANNELS == weight.shape[1] % CHANNELS == 0
        and torch.backends.cudnn.enabled
        and not torch.backends.cudnn.deterministic
        and not torch.are_deterministic_algorithms_enabled()
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in given))
        and not checks.transformed(given)
    )
    return dtype if served else None


def on_gpu(t: Tensor) -> bool:
    return t.is_cuda


def _cast(conv: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weight and bias in dtype and channels_last, kept until the module has others, which it tells by None."""
    kept: tuple[Tensor, Tensor | None] | None = conv._cast
    if kept is None or kept[0].dtype != dtype:
        with torch.inference_mode(False):
            weight = conv._weight.to(dtype).contiguous(memory_format=torch.channels_last)
            bias = None if conv.bias is None else conv.bias.to(dtype)
        kept = conv._cast = weight, bias
    return kept
