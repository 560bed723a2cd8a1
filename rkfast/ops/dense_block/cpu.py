"""dense_block by the C++ kernels of csrc/cpu/dense_block.cpp; signatures as in reference.py."""

from typing import Any

from torch import Tensor

from rkfast import native

_forward = native.cpu().dense_block
_backward = native.cpu().dense_block_backward


def forward(*args: Any) -> list[Tensor]:
    return _forward(*args[:-1])  # group is "" where dispatch comes here


def backward(*args: Any) -> list[Tensor]:
    return _backward(*args[:-1])
