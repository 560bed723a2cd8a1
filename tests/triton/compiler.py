"""Compiles what the real launchers launch, for a GPU that is not there, and reads what ptxas made of it.

    python tests/triton/compiler.py [80,90,100]

prints one line per compiled kernel. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Shared memory that a thread block may use, in bytes.
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


class Kernel(NamedTuple):
    name: str
    cc: int
    warps: int
    registers: int
    local: int  # bytes of stack and local memory: where spills go
    shared: int
    ptx: str

    def accesses(self) -> set[tuple[str, int]]:
        """("ld" | "st", bytes) of every access to global memory."""
        found = re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.b(\d+)", self.ptx)
        return {(kind, int(width or 1) * int(bits) // 8) for kind, width, bits in found}


class Driver:
    """Stands where Triton expects the driver of a GPU with compute capability ``cc``."""

    def __init__(self, cc: int) -> None:
        self.cc = cc

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.cc, 32)

    def get_current_device(self) -> int:
        return self.cc  # one cache of compiled kernels per target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compiling_for(cc: int) -> Iterator[list[Any]]:
    """Launches compile and go no further; yields the list that the compiled kernels are added to."""
    compiled: list[Any] = []

    def keep(kernel: CompiledKernel) -> None:
        compiled.append(kernel)
        kernel._run = lambda *args: None

    initialise, active = CompiledKernel._init_handles, triton.runtime.driver._active
    CompiledKernel._init_handles = lambda kernel: None if kernel._run is not None else keep(kernel)
    triton.runtime.driver.set_active(Driver(cc))
    try:
        yield compiled
    finally:
        CompiledKernel._init_handles = initialise
        triton.runtime.driver._active = active


def inspect(compiled: Any, cc: int) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    metadata = compiled.metadata
    return Kernel(
        metadata.name, cc, metadata.num_warps, found["REG"], found["STACK"] + found["LOCAL"], metadata.shared,
        compiled.asm["ptx"],
    )  # fmt: skip
