"""PreActBranch: one op for each convolution with its BatchNorm and ReLU, where a kernel serves that."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from rkfast import dispatch, native
from rkfast.nn import PreActBranch
from rkfast.ops import channel_moments
from tests.ops.tester import assert_as_good_as

pytestmark = pytest.mark.skipif(native.cpu_reason() is not None, reason="the C++ kernels are not built")


def pair(channels: int = 18) -> tuple[PreActBranch, PreActBranch]:
    torch.manual_seed(0)
    fused = PreActBranch(channels).to(memory_format=torch.channels_last)
    stock = copy.deepcopy(fused)
    stock.fused = False
    return fused, stock


def image(channels: int = 18) -> Tensor:
    return torch.randn(3, channels, 9, 8).to(memory_format=torch.channels_last)


def served(branch: PreActBranch, x: Tensor) -> Counter[str]:
    before = dispatch.served()
    branch(x).float().sum().backward()
    return Counter({op: count for (op, _), count in (dispatch.served() - before).items()})


def kept(branch: PreActBranch, x: Tensor) -> int:
    """Bytes that autograd keeps for the backward, parameters apart."""
    storages = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        branch(x)
    for parameter in branch.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def test_two_tensors_are_kept() -> None:
    (fused, stock), x = pair(), torch.randn(4, 18, 32, 32).to(memory_format=torch.channels_last)
    x.requires_grad_()
    vectors = 2 * 4 * 18 * 4  # mean and var, twice, with room to spare
    assert 2 * x.nbytes <= kept(fused, x) <= 2 * x.nbytes + vectors
    assert kept(fused, x) <= 0.7 * kept(stock, x)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("given", (True, False))
def test_as_good_as_stock(training: bool, given: bool) -> None:
    (fused, stock), x = pair(), image().requires_grad_()
    truth = copy.deepcopy(stock).double()
    for branch in (fused, stock, truth):
        branch.train(training)
    outs = (fused(x, channel_moments(x) if given else None), stock(x), truth(x.double()))
    assert_as_good_as(*outs, "out")
    grad = torch.randn(outs[0].shape)
    found = [
        torch.autograd.grad(out, [x, *branch.parameters()], grad.to(out.dtype))
        for out, branch in zip(outs, (fused, stock, truth), strict=True)
    ]
    for name, *each in zip(["x", *dict(fused.named_parameters())], *found, strict=True):
        assert_as_good_as(*each, name)
    for name, *buffers in zip(dict(fused.named_buffers()), *(b.buffers() for b in (fused, stock, truth)), strict=True):
        assert_as_good_as(*buffers, name) if "running" in name else torch.testing.assert_close(buffers[0], buffers[2])


def test_moments_go_from_one_op_to_the_next() -> None:
    """The second BatchNorm takes none of its own: what is given to it decides."""
    fused, _ = pair()
    calls = []

    def record(*args: object) -> None:
        calls.append(args)

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if str(func) == "rkfast.bn_relu_conv.default":
                record(*args)
            return func(*args, **(kwargs or {}))

    with Recorder(), torch.no_grad():
        fused(image())
        fused.norm2.eval()
        fused(image())
    means, asked = [args[4] is not None for args in calls], [args[-1] for args in calls]
    assert means == [False, True, False, True]
    assert asked == [True, False, False, False]  # frozen statistics ask for none


@pytest.mark.parametrize(
    ("what", "ops"),
    (
        ("nothing", {"bn_relu_conv": 2}),
        ("a hook on a norm", {"bn_relu_conv": 1}),
        ("a hook on a convolution", {"bn_relu_conv": 1, "bn_rk_sum": 1}),
        ("another convolution", {"bn_relu_conv": 1, "bn_rk_sum": 1}),
        ("another norm", {"bn_relu_conv": 1}),
        ("autocast", {"bn_rk_sum": 2}),
        ("double", {"bn_rk_sum": 2}),
        ("contiguous", {"bn_rk_sum": 2}),
    ),
)
def test_what_takes_the_op(what: str, ops: dict[str, int]) -> None:
    (fused, stock), x = pair(), image()
    seen = []
    for branch in (fused, stock):
        if what == "a hook on a norm":
            branch.norm1.register_forward_hook(lambda *_: seen.append(1))
        elif what == "a hook on a convolution":
            branch.conv2.register_forward_hook(lambda *_: seen.append(1))
        elif what == "another convolution":
            branch.conv2 = nn.Conv2d(18, 18, 3, padding=1).requires_grad_(False)
            nn.init.ones_(branch.conv2.weight), nn.init.ones_(branch.conv2.bias)
        elif what == "another norm":
            branch.norm1 = nn.GroupNorm(2, 18)
        elif what == "double":
            branch.double()
        elif what == "contiguous":  # or the convolution's result is channels_last
            branch.to(memory_format=torch.contiguous_format)
    x = x.double() if what == "double" else x.contiguous() if what == "contiguous" else x
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        torch.testing.assert_close(fused(x), stock(x), rtol=1e-4, atol=3e-2 if what == "autocast" else 1e-4)
        seen.clear()
        found = served(fused, x)
    assert {op: found[op] for op in ("bn_relu_conv", "bn_rk_sum") if found[op]} == ops
    assert len(seen) == what.startswith("a hook")


def test_compiles_whole() -> None:
    (fused, _), x = pair(), image().requires_grad_()
    expected = torch.autograd.grad(fused(x).square().sum(), [x, *fused.parameters()])
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).square().sum(), [x, *fused.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
