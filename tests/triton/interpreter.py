"""A pytest plugin (-p tests.triton.interpreter) that makes Triton's interpreter fit to test with.

Its casts from float32 to bfloat16 cut bits off, where a GPU rounds to nearest even; its products of bfloat16 multiply
their bits; it ignores what kernels promise of their pointers, where a GPU ends the process if that is not so; and it
prepares triton.language for every call of a device function again, which takes most of its time. Needs
TRITON_INTERPRET=1.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

inexact = interpreter._convert_float


def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    if (source, target) == (tl.float32, tl.bfloat16):
        # Through torch, whose casts are exact.
        bits = torch.from_numpy(np.array(values).view(np.float32)).bfloat16().view(torch.int16)
        return bits.numpy().view(np.uint16)
    if (source, target) == (tl.bfloat16, tl.float32):
        return np.array(values).view(np.uint16).astype(np.uint32) << np.uint32(16)
    return inexact(values, source, target, rounding)


interpreter._convert_float = convert_float
multiply = interpreter.InterpreterBuilder.create_dot


def create_dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
    def wide(t: Any) -> Any:
        if t.dtype.scalar != tl.bfloat16:
            return t
        return interpreter.TensorHandle(
            convert_float(t.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32
        )

    return multiply(builder, wide(a), wide(b), *others)


interpreter.InterpreterBuilder.create_dot = create_dot
# Prepared once and for all.
interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = lambda function: interpreter._LangPatchScope()


def multiple_of(pointers: Any, values: Any) -> Any:
    """Each run of as many elements as are promised to lie in one piece must begin where it is promised to."""
    promised = int(getattr(values[-1], "value", values[-1]))
    addresses = pointers.handle.data[..., :: promised * 8 // pointers.dtype.element_ty.primitive_bitwidth]
    assert not (addresses % np.uint64(promised)).any(), f"pointers are no multiples of {promised} bytes"
    return pointers


tl.multiple_of = multiple_of
# Lanes that are masked off compute with zeros.
np.seterr(divide="ignore", invalid="ignore", over="ignore")
