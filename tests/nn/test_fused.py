"""Fused modules used as any nn.Module is used, beside stock ones with the same parameters."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rkfast import dispatch, native
from rkfast.nn import CliqueBlock, DenseBlock, ERKStep, IRKStep, Period, RKCNNStep
from rkfast.nn.norm import batch_norm_relu
from rkfast.ops.dense_block import kernel_reason
from tests.models.tester import settled
from tests.ops.tester import CPU_BACKENDS, assert_as_good_as, assert_gradients_as_good_as

MODULES: dict[str, Callable[..., nn.Module]] = {
    "dense": lambda **kw: DenseBlock(4, 5, 4, **kw),
    "dense_neck": lambda **kw: DenseBlock(4, 5, 4, bottleneck=8, **kw),
    "erk": lambda **kw: Period(ERKStep(3, 5, **kw), ERKStep(2, 5, bottleneck=8, **kw)),
    "irk": lambda **kw: Period(IRKStep(3, 5, bottleneck=5, **kw), IRKStep(2, 5, rounds=2, **kw)),
    "clique": lambda **kw: CliqueBlock(5, 4, 3, **kw),
    "rkcnn": lambda **kw: RKCNNStep("i", 3, 5, neck=2, **kw),
}


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """(fused, stock), of the same values."""
    fused = settled(lambda: MODULES[name](fused=True, **options))
    stock = MODULES[name](fused=False, **options)
    stock.load_state_dict(fused.state_dict())
    return fused, stock


def images() -> Tensor:
    return torch.randn(3, 5, 7, 6, generator=torch.Generator().manual_seed(1))


def seen(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Result, gradients and buffers of a copy's forward and backward by ``call(copy, x)``."""
    module = copy.deepcopy(module)
    x = x.clone().requires_grad_()
    out = call(module, x)
    (out.double() * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
    found = {"out": out.detach(), "x.grad": x.grad}
    found |= {f"{name}.grad": p.grad for name, p in module.named_parameters() if p.requires_grad}
    return found | dict(module.named_buffers())


def assert_fused(backend: str, before: Any) -> int:
    """How many blocks the backend has served; no other has."""
    served = dispatch.served() - before
    assert {b for op, b in served if op.startswith("dense_block")} == {backend}
    return served["dense_block", backend]


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("memory", ("speed", "min"))
@pytest.mark.parametrize("reentrant", (False, True), ids=("", "reentrant"))
@pytest.mark.parametrize("name", MODULES)
def test_activation_checkpointing(name: str, reentrant: bool, memory: str, backend: str) -> None:
    """What is computed again gives the same to the bit. Running statistics move a second time, as those of stock
    BatchNorms do."""

    def checkpointed(module: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(module, x, use_reentrant=reentrant)

    fused, stock = pair(name, memory=memory)
    x = images()
    plain, again = nn.Module.__call__, checkpointed
    with dispatch.use(backend):
        before = dispatch.served()
        once = seen(fused, plain, x)
        blocks = assert_fused(backend, before)
        before = dispatch.served()
        twice = seen(fused, again, x)
        assert assert_fused(backend, before) == 2 * blocks
    theirs = seen(stock, again, x)
    assert_same(twice, theirs)
    for key, value in twice.items():
        if key == "out" or key.endswith(".grad"):
            assert torch.equal(value, once[key]), key
        elif key.endswith("num_batches_tracked"):
            assert value == 2 * once[key] == theirs[key], key


@pytest.mark.parametrize("reentrant", (False, True), ids=("", "reentrant"))
def test_a_norm_that_comes_last_is_checkpointed(reentrant: bool) -> None:
    results = []
    for fused in (True, False):
        norm = nn.BatchNorm2d(5)
        x = images().requires_grad_()
        before = dispatch.served()
        run = functools.partial(batch_norm_relu, norm, fused=fused)
        checkpoint(run, x, use_reentrant=reentrant).square().sum().backward()
        assert (dispatch.served() != before) == fused
        results.append({"x.grad": x.grad, "weight.grad": norm.weight.grad, **dict(norm.named_buffers())})
    assert_same(*results)
    assert results[0]["num_batches_tracked"] == 2


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", MODULES)
def test_graphs_are_kept_and_overlap(name: str, backend: str) -> None:
    """Two forwards before their backwards, and each backward twice."""
    fused, _ = pair(name)
    xs = [images().requires_grad_(), images().flip(0).mul(2).requires_grad_()]
    with dispatch.use(backend):
        alone = [torch.autograd.grad(fused(x).square().sum(), [x, *fused.parameters()]) for x in xs]
        outs = [fused(x).square().sum() for x in xs]
        for x, out, expected in zip(xs, outs, alone, strict=True):
            for keep in (True, False):
                found = torch.autograd.grad(out, [x, *fused.parameters()], retain_graph=keep)
                assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("name", MODULES)
def test_dropout_is_that_of_stock(name: str, backend: str) -> None:
    """One seed gives the same masks, in channels_last."""

    def seeded(module: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(2)
        return module(x)

    fused, stock = (m.to(memory_format=torch.channels_last) for m in pair(name, drop_rate=0.3))  # type: ignore[call-overload]
    x = images().contiguous(memory_format=torch.channels_last)
    with dispatch.use(backend):
        before = dispatch.served()
        ours = seen(fused, seeded, x)
        assert_fused(backend, before)
        torch.manual_seed(3)
        assert not torch.allclose(copy.deepcopy(fused)(x), ours["out"])
    assert_same(ours, seen(stock, seeded, x))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("every", (2, 3))
@pytest.mark.parametrize("name", MODULES)
def test_some_norms_are_frozen(name: str, every: int, backend: str) -> None:
    fused, stock = pair(name)
    for module in (fused, stock):
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms[::every]:
            norm.eval()
            norm.weight.requires_grad_(every == 2)
    before, x = dispatch.served(), images()
    with dispatch.use(backend):
        ours = seen(fused, nn.Module.__call__, x)
        assert_fused(backend, before)
    assert_same(ours, seen(stock, nn.Module.__call__, x))
    assert {int(value) for key, value in ours.items() if key.endswith("num_batches_tracked")} == {0, 1}


@pytest.mark.parametrize("how", ("module", "op"))
@pytest.mark.parametrize("bottleneck", (None, 8))
def test_autocast(bottleneck: int | None, how: str) -> None:
    """24 layers in bfloat16: at most twice as far from float64 as stock PyTorch. Where the processor does not multiply
    bfloat16, a module takes plain PyTorch; the op is the reference's."""
    gaps = []
    for seed in range(3):
        torch.manual_seed(seed)
        fused = DenseBlock(24, 8, 4, bottleneck=bottleneck)
        stock = DenseBlock(24, 8, 4, bottleneck=bottleneck, fused=False)
        stock.load_state_dict(fused.state_dict())
        # As a convolution would leave it: of a float32 input torch.cat makes float32.
        x = torch.randn(4, 8, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)

        def autocast(module: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return module(x)

        before = dispatch.served()
        with dispatch.use("reference") if how == "op" else contextlib.nullcontext():
            ours = seen(fused, autocast, x)
        if how == "op":
            assert_fused("reference", before)
        elif native.cpu_reason() is None and torch.cpu._is_avx512_bf16_supported():
            assert_fused("cpu", before)
        else:
            assert not {op for op, _ in dispatch.served() - before if op.startswith("dense_block")}
            assert kernel_reason_under_autocast(x) is not None
        eager = seen(stock, autocast, x)
        truth = seen(copy.deepcopy(stock).double(), nn.Module.__call__, x.double())
        assert ours["out"].dtype == eager["out"].dtype == x.dtype
        gaps.append((ours, eager, truth))
    assert_as_good_as(*(torch.stack([gap[i]["out"] for gap in gaps]) for i in range(3)), "out")
    keys = [key for key in gaps[0][2] if key.endswith(("grad", "running_mean", "running_var"))]
    stacked = [{key: torch.stack([gap[i][key] for gap in gaps]) for key in keys} for i in range(3)]
    assert_gradients_as_good_as(*stacked)


def kernel_reason_under_autocast(x: Tensor) -> str | None:
    with torch.autocast("cpu", torch.bfloat16):
        return kernel_reason(x)
