"""What the launchers launch at sizes of benchmarks, compiled for three GPUs.

Run by tests/triton/test_compiler.py, in a process of its own.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from rkfast.ops import kernels, products
from rkfast.ops.rk_sum import triton as rk_sum
from tests.ops.tester import DTYPES
from tests.triton import compiler, steps

TARGETS = (80, 90, 100)
STREAMS = ("_forward_kernel", "_backward_kernel", "_moments_kernel")  # they read and write whole tensors
PRODUCTS = ("_product_kernel", "_data_gradient_kernel", "_weight_gradient_kernel")
# Dtypes, layouts, sizes and slots go round the targets; sm_90 gets every kernel of each.
WORK = [
    (90, torch.float32, (256, 64, 112, 112), False, 1),
    (90, torch.float32, (64, 36, 32, 32), True, 1),
    (90, torch.bfloat16, (256, 64, 112, 112), True, 1),
    (90, torch.bfloat16, (128, 64, 32, 32), True, 2),
    (90, torch.float16, (256, 64, 112, 112), False, 1),
    (90, torch.float64, (128, 64, 32, 32), True, 1),
    (80, torch.float32, (128, 64, 32, 32), True, 2),
    (80, torch.bfloat16, (256, 64, 112, 112), False, 1),
    (80, torch.float16, (256, 64, 112, 112), True, 1),
    (80, torch.float64, (64, 36, 32, 32), True, 1),
    (100, torch.float32, (128, 64, 32, 32), False, 2),
    (100, torch.bfloat16, (256, 64, 112, 112), True, 1),
    (100, torch.float64, (256, 64, 112, 112), False, 1),
    # Of these channels, slots begin at no multiple of 16 bytes, but at some of 8 and of 4.
    (90, torch.bfloat16, (64, 36, 32, 32), True, 2),
    (80, torch.bfloat16, (64, 36, 32, 32), True, 2),
    (90, torch.bfloat16, (64, 150, 32, 32), True, 2),
    (100, torch.bfloat16, (64, 150, 32, 32), True, 2),
    (90, torch.float32, (64, 150, 32, 32), True, 2),
]


def check(launch: compiler.Launch, cc: int, itemsize: int) -> None:
    with compiler.compiling_for(cc) as compiled:
        launch.call()
    for each in compiled:
        kernel = compiler.inspect(each, cc)
        what = f"{launch.name}: {kernel.name} for sm_{cc}"
        assert kernel.local == 0, f"{what} spills: {kernel.local} bytes of local memory"
        assert kernel.shared <= compiler.SHARED[cc] // 2, f"{what} takes {kernel.shared} bytes of shared memory"
        if kernel.name in PRODUCTS and launch.name == "bottlenecks":
            assert kernel.tensor_cores, f"{what} multiplies without tensor cores"
        if launch.bytes and kernel.name in STREAMS + PRODUCTS:
            loads, stores = kernel.accesses("ld"), kernel.accesses("st")
            told = f"{what} loads {sorted(loads)} and stores {sorted(stores)} bytes at once"
            # Besides: vectors and partial results [C] in the dtype of sums, of up to as many channels, and bytes of the
            # mask.
            beside = {1, max(4, itemsize), 2 * launch.bytes, 16}
            if kernel.name in STREAMS:
                assert loads | stores <= beside | {launch.bytes}, told
            assert max(loads) >= launch.bytes, told
            if kernel.name == "_forward_kernel":
                assert max(stores) >= launch.bytes, told
            if launch.name == "sums":  # nothing beside tensors and masks
                assert loads | stores <= {1, launch.bytes}, told


@pytest.mark.parametrize(("cc", "dtype", "shape", "channels_last", "slots"), WORK, ids=str)
def test_compiles_without_spills(
    cc: int, dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool, slots: int
) -> None:
    for launch in compiler.launches(dtype, shape, channels_last, slots):
        if cc == 90 or launch.name in ("sums", "steps", "join"):
            check(launch, cc, dtype.itemsize)


@pytest.mark.parametrize("cc", TARGETS)
def test_most_terms(cc: int) -> None:
    check(compiler.most(torch.bfloat16, channels_last=True), cc, 2)


# DenseNet's first block, IRKNet and ERKNet without bottleneck (dtype, input, growth rate, bottleneck).
GROWTHS = [
    (torch.bfloat16, (256, 64, 56, 56), 32, 128),
    (torch.float32, (256, 64, 56, 56), 32, 128),
    (torch.float16, (64, 80, 32, 32), 80, 160),
    (torch.bfloat16, (64, 36, 32, 32), 36, None),
]


@pytest.mark.parametrize(("dtype", "shape", "growth", "width"), GROWTHS, ids=str)
@pytest.mark.parametrize("cc", TARGETS)
def test_dense_blocks(cc: int, dtype: torch.dtype, shape: tuple[int, ...], growth: int, width: int | None) -> None:
    check(compiler.growths(dtype, shape, growth, width), cc, dtype.itemsize)


def test_layers_do_not_compile_again() -> None:
    """Neither a longer prefix nor another resolution."""

    def call(shape: tuple[int, ...]) -> int:
        with compiler.compiling_for(90) as compiled:
            compiler.growths(torch.bfloat16, shape, 32, 128).call()
        return len({each.metadata.name for each in compiled if each.metadata.name in PRODUCTS})

    call((256, 64, 56, 56))
    assert call((256, 96, 56, 56)) == 0
    assert call((64, 512, 28, 28)) == 0


@pytest.mark.parametrize("name", ("densenet121", "resnet50"))
def test_a_first_step_compiles_by_all_cores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What blocks launch, forward and backward, before the first of it is launched; also what Triton launches it by."""
    made_in: dict[str, set[bool]] = defaultdict(set)  # by kernel, whether by the thread that launches
    launcher_in: dict[str, set[bool]] = defaultdict(set)

    def made(*, metadata: dict[str, Any], **_: Any) -> None:
        made_in[metadata["name"]].add(threading.current_thread() is threading.main_thread())

    def launcher(src: Any, metadata: Any) -> None:
        assert src.fn.fn.__name__ == metadata.name
        launcher_in[metadata.name].add(threading.current_thread() is threading.main_thread())
        raise RuntimeError("no C compiler")  # is told where the kernel is launched, if that asks for one again

    monkeypatch.setattr(compiler.Driver, "launcher_cls", staticmethod(launcher), raising=False)
    monkeypatch.setattr(kernels, "_compiled", set())
    monkeypatch.setattr(triton.knobs.compilation, "listener", made)
    for jitted in (f for f in vars(products).values() if isinstance(f, JITFunction)):
        monkeypatch.setattr(jitted, "device_caches", defaultdict(jitted.create_binder))
    network = next(n for n in steps.NETWORKS if n.name == name)
    with compiler.compiling_for(90), steps.running(steps.Counted(network.batch)):
        steps.step(network, steps.made(network, training=True))()
    assert all(made_in[kernel] == {False} for kernel in PRODUCTS), dict(made_in)
    assert all(launcher_in[kernel] == {False} for kernel in PRODUCTS), dict(launcher_in)


@pytest.mark.parametrize("cc", TARGETS)
def test_running_statistics(cc: int) -> None:
    check(compiler.running(), cc, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_coefficients_and_sizes_do_not_compile_again(dtype: torch.dtype) -> None:
    def call(coeffs: list[float], shape: tuple[int, ...]) -> int:
        x = torch.empty(shape, dtype=dtype, device="meta")
        with compiler.compiling_for(90) as compiled:
            rk_sum.forward([x] * 3, coeffs, [None] * 3, None, False, True, False, True)
        return len(compiled)

    call([0.1, 0.2, 0.7], (64, 48, 56, 56))
    assert call([1.0, 2.0, 16.0], (64, 48, 56, 56)) == 0
    assert call([0.0, -1 / 3, 1e-40], (32, 80, 28, 28)) == 0


def test_a_first_step_compiles_few_kernels() -> None:
    """Each takes a fraction of a second, and the user waits."""
    network = steps.NETWORKS[0]
    call = steps.step(network, steps.made(network, training=True))
    with compiler.compiling_for(89) as compiled, steps.running(steps.Counted(network.batch)):  # as no other test does
        call()
    assert len(compiled) <= 27
