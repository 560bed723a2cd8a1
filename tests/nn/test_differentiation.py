"""Fused modules differentiated in other ways than by one backward, beside stock ones with the same parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rkfast.nn import BasicBlock, PreActBranch, RKStep, SymmetricBranch
from tests.ops.tester import CPU_BACKENDS


def twice(block: nn.Module) -> nn.Module:
    return nn.Sequential(block, block)


def one_norm(branch: Any) -> nn.Module:
    branch.norm2 = branch.norm1
    return branch


# In most of them what one op reads was made of another of its inputs.
MODULES: dict[str, Callable[[bool], nn.Module]] = {
    "step": lambda fused: RKStep("midpoint", [nn.Conv2d(4, 4, 1) for _ in range(2)], fused=fused),
    "relu": lambda fused: RKStep("rk4", [nn.Conv2d(4, 4, 1) for _ in range(4)], variant="authors", fused=fused),
    "one_branch": lambda fused: RKStep("rk4", PreActBranch(4, fused=fused), fused=fused),
    "symmetric": lambda fused: RKStep("rk4", SymmetricBranch(4, fused=fused), fused=fused),
    "block": lambda fused: BasicBlock(4, 4, fused=fused),
    "one_block_twice": lambda fused: twice(BasicBlock(4, 4, fused=fused)),
    "gate": lambda fused: BasicBlock(4, 4, reduction=2, fused=fused),
    "one_norm": lambda fused: one_norm(PreActBranch(4, fused=fused)),
}


def twins(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    fused, stock = (MODULES[name](fused).double() for fused in (True, False))
    stock.load_state_dict(fused.state_dict())
    return fused, stock, torch.randn(2, 4, 5, 5, dtype=torch.float64).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", MODULES)
def test_gradients_with_a_graph(name: str, training: bool) -> None:
    """The first gradients, and those of a penalty on them."""
    fused, stock, x = twins(name)
    found = []
    for module in (fused, stock):
        t = x.clone(memory_format=torch.preserve_format).requires_grad_()
        inputs = [t, *module.train(training).parameters()]
        first = torch.autograd.grad(module(t).sin().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, allow_unused=True)  # type: ignore[arg-type]
        found.append([*first, *(torch.zeros(()) if g is None else g for g in second)])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", MODULES)
def test_gradients_in_batches(name: str) -> None:
    fused, stock, x = twins(name)
    found = [torch.autograd.functional.jacobian(m, x, vectorize=True) for m in (fused, stock)]  # type: ignore[no-untyped-call]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", MODULES)
def test_gradients_with_a_tangent(name: str) -> None:
    fused, stock, x = twins(name)
    found = []
    for module in (fused, stock):
        t = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = module(t)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(out), out.detach())
            (grad,) = torch.autograd.grad(out, t, dual)
            primal, tangent = forward_ad.unpack_dual(grad)
            assert tangent is not None and not grad.requires_grad
            found.append((primal.clone(), tangent.clone()))
    torch.testing.assert_close(*found)


@pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="the C++ kernels are not built")
def test_of_a_block_that_is_one_op() -> None:
    torch.manual_seed(0)
    fused, stock = (BasicBlock(16, 16, fused=fused).to(memory_format=torch.channels_last) for fused in (True, False))  # type: ignore[call-overload]
    stock.load_state_dict(fused.state_dict())
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    found = [torch.autograd.functional.jacobian(m, x, vectorize=True) for m in (fused, stock)]  # type: ignore[no-untyped-call]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
