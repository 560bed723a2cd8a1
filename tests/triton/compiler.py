"""Compiles what the real launchers launch, for a GPU that is not there, and reads what ptxas made of it.

    python -m tests.triton.compiler [80,90,100]

prints a line per compiled kernel. Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

from rkfast.ops.bn_relu_pool import triton as bn_relu_pool
from rkfast.ops.bn_rk_sum import triton as bn_rk_sum
from rkfast.ops.channel_moments import triton as channel_moments
from rkfast.ops.dense_block import triton as dense_block
from rkfast.ops.rk_sum import triton as rk_sum

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

    @property
    def tensor_cores(self) -> bool:
        """Whether it multiplies as this GPU does fastest."""
        return {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[self.cc] in self.ptx

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that run at once."""
        registers = -(-32 * self.registers // 256) * 256  # of a warp, which takes 256 at a time
        blocks = min(32, 64 // self.warps, 65536 // registers // self.warps)
        return min(blocks, (SHARED[self.cc] + 1024) // (self.shared + 1024)) * self.warps / 64

    def accesses(self, kind: str) -> set[int]:
        """How many bytes a thread loads ("ld") or stores ("st") in global memory at once, here and there."""
        found = re.findall(rf"\b{kind}\.global\S*?(?:\.v(\d))?\.b(\d+)", self.ptx)
        widths = {int(width or 1) * int(bits) // 8 for width, bits in found}
        if kind == "ld":
            copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", self.ptx)
            widths |= {int(size, 0) for size in copies}
        return widths


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


class Launch(NamedTuple):
    """A call of a launcher at a size that benchmarks use."""

    name: str
    call: Callable[[], Any]
    bytes: int  # that a thread may load and store at once; 0 where none are asked for


def launches(dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool, slots: int = 1) -> list[Launch]:
    """Every kernel on the last of so many slots; nothing is read or written, so that meta tensors do."""
    n, c, h, w = shape
    memory = torch.channels_last if channels_last else torch.contiguous_format
    buffer = torch.empty((n, c * slots, h, w), dtype=dtype, device="meta", memory_format=memory)
    x = buffer[:, c * (slots - 1) :]
    vector, gate = torch.empty(c, device="meta"), torch.empty(n, c, device="meta")
    row = c if channels_last else h * w
    at_once = math.gcd(row * dtype.itemsize, 16)

    def sums() -> None:
        rk_sum.forward([x] * 4, [1.0, 0.5, 0.25, 0.3], [None] * 4, None, channels_last, False, False, False)
        _, mask = rk_sum.forward([x] * 2, [1.0, 0.5], [None] * 2, None, channels_last, True, False, True)
        rk_sum.backward(x, mask, [1.0], [None], [], [], [], False, channels_last)

    def steps() -> None:
        _, mask, *_ = rk_sum.forward([x] * 2, [1.0, 0.5], [None, vector], vector, channels_last, True, True, True)
        rk_sum.backward(x, mask, [1.0, 0.5], [None, vector], [x], [0.5], [False], True, channels_last)

    def gates() -> None:
        _, mask, *_ = rk_sum.forward([x] * 2, [1.0, 0.5], [None, gate], None, channels_last, True, True, True)
        rk_sum.backward(x, mask, [1.0, 0.5], [None, gate], [x], [0.5], [True], False, channels_last)

    def norm() -> None:
        bn_rk_sum.forward(x, vector, vector, None, None, [], [], None, channels_last, True, 1e-5, False, False)
        bn_rk_sum.backward(
            x, x, vector, vector, vector, vector, None, None, [], channels_last, True, True, 1e-5, True, True, False
        )

    def join() -> None:
        _, mask, *_ = bn_rk_sum.forward(
            x, vector, vector, None, None, [x], [1.0], vector, channels_last, True, 1e-5, True, True
        )
        bn_rk_sum.backward(
            x, x, vector, vector, vector, vector, vector, mask, [1.0], channels_last, True, True, 1e-5, True, True, True
        )

    def frozen() -> None:
        bn_rk_sum.backward(
            x, x, vector, vector, vector, vector, gate, None, [], channels_last, True, False, 1e-5, True, True, True
        )

    def pools() -> None:
        grad = torch.empty((n, c, h // 2, w // 2), dtype=dtype, device="meta").contiguous(memory_format=memory)
        bn_relu_pool.forward(x, vector, vector, vector, vector, True, 1e-5)
        for batch_stats in (True, False):
            bn_relu_pool.backward(grad, x, vector, vector, vector, vector, True, batch_stats, 1e-5, True, True)

    found = (sums, steps, gates, norm, join, frozen, *([pools] if channels_last else []))
    return [Launch(f.__name__, f, at_once) for f in found]


def most(dtype: torch.dtype, channels_last: bool) -> Launch:
    """As many terms and steps as there may be: what registers must suffice for."""
    x = torch.empty((64, 64, 56, 56), dtype=dtype, device="meta")
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    vector = torch.empty(64, device="meta")

    def call() -> None:
        coeffs, steps = [0.5] * 16, [vector] * 16
        _, mask, *_ = rk_sum.forward([x] * 16, coeffs, steps, vector, channels_last, True, True, True)
        rk_sum.backward(x, mask, coeffs, steps, [x] * 16, coeffs, [False] * 16, True, channels_last)

    return Launch("sixteen", call, 0)


def growths(dtype: torch.dtype, shape: tuple[int, ...], growth: int, width: int | None) -> Launch:
    """Two growths, the second of which reads two ranges: in training, also with frozen statistics and dropout, and
    afterwards."""
    c = shape[1]
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    reads, writes = [0, c, 0, 0, 0, c // 2, c, c + growth], [c, c + growth]
    read = [c, c // 2 + growth]

    def weight(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def norm(channels: int, own: bool) -> list[torch.Tensor | None]:
        vectors: list[torch.Tensor | None] = [torch.empty(channels, device="meta") for _ in range(4)]
        return vectors if own else [*vectors[:2], None, None]

    def kept(channels: int) -> torch.Tensor:
        return torch.empty((shape[0], channels, *shape[2:]), dtype=torch.bool, device="meta").contiguous(
            memory_format=torch.channels_last
        )

    def call() -> None:
        for own, trains in ((False, True), (True, True), (True, False)):
            norms: list[torch.Tensor | None] = []
            for r in read:
                norms += [*norm(r, own), *([] if width is None else norm(width, own))]
            conv1 = [weight(width or growth, r, *((1, 1) if width else (3, 3))) for r in read]
            conv2 = [] if width is None else [weight(growth, width, 3, 3) for _ in read]
            eps = [1e-5] * (len(norms) // 4)
            dropout = own and trains
            keeps = [kept(w) for w in ([growth] if width is None else [width, growth]) * 2] if dropout else []
            common = (conv1, conv2, norms, keeps, 1.0, reads, writes, eps)
            buffer, mean, var, *found = dense_block.forward(
                x, *common, c + 2 * growth, [], None, None, trains, False, ""
            )
            if trains:
                moments, mids = found[: 2 * len(conv2)], found[2 * len(conv2) :]
                dense_block.backward(buffer, buffer, mean, var, moments, mids, *common, c, [], "")

    return Launch(
        "growths" if width is None else "bottlenecks",
        call,
        math.gcd((c // 2) * dtype.itemsize, growth * dtype.itemsize, 16),
    )


def running() -> Launch:
    vectors = [torch.empty(64, device="meta") for _ in range(5)]
    counters = [torch.empty((), dtype=torch.int64, device="meta") for _ in range(5)]

    def call() -> None:
        for momentum in (0.1, None):
            channel_moments.update_running_stats(vectors[0], vectors[0], 100, vectors, vectors, counters, momentum)

    return Launch("running", call, 0)


def table(targets: list[int]) -> Iterator[str]:
    yield f"{'kernel':28} {'tensors':28}   sm warps registers local shared  bytes loaded, stored at once"
    for cc in targets:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for channels_last in (False, True):
                kind = f"{str(dtype)[6:]} {'channels_last' if channels_last else 'contiguous'}"
                for launch in (*launches(dtype, (256, 64, 112, 112), channels_last), most(dtype, channels_last)):
                    with compiling_for(cc) as compiled:
                        launch.call()
                    for each in compiled:
                        k = inspect(each, cc)
                        name = f"{launch.name}: {k.name.strip('_').removesuffix('_kernel')}"
                        yield (
                            f"{name:28} {kind:28} {cc:4} {k.warps:5} {k.registers:9} {k.local:5} {k.shared:6}  "
                            f"{sorted(k.accesses('ld'))}, {sorted(k.accesses('st'))}"
                        )


if __name__ == "__main__":
    for line in table([int(cc) for cc in (sys.argv[1] if len(sys.argv) > 1 else "80,90,100").split(",")]):
        print(line, flush=True)
