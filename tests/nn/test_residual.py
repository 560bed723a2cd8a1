"""Residual blocks against their formula in float64, with every part that they may have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rkfast import dispatch, measure, native
from rkfast.nn import BasicBlock, Bottleneck, PadShortcut, Projection, norm, residual
from tests.models.tester import difference, settled

Block = BasicBlock | Bottleneck


def basic(fused: bool = True, **options: Any) -> Block:
    return BasicBlock(6, 6, fused=fused, **options)


def basic_projected(fused: bool = True, **options: Any) -> Block:
    return BasicBlock(6, 8, 2, Projection(6, 8, 2, fused=fused), fused=fused, **options)


def basic_padded(fused: bool = True, **options: Any) -> Block:
    return BasicBlock(6, 8, 2, PadShortcut(2, 2), fused=fused, **options)


def bottleneck(fused: bool = True, **options: Any) -> Block:
    return Bottleneck(8, 2, fused=fused, **options)


def bottleneck_projected(fused: bool = True, **options: Any) -> Block:
    return Bottleneck(6, 2, 2, Projection(6, 8, 2, fused=fused), fused=fused, **options)


def original(fused: bool = True, **options: Any) -> Block:
    return bottleneck_projected(fused, stride_in_1x1=True, **options)


def grouped(fused: bool = True, **options: Any) -> Block:
    return Bottleneck(8, 2, groups=2, width_per_group=64, fused=fused, **options)


# Channels enough for one op.


def whole_basic(fused: bool = True, **options: Any) -> Block:
    return BasicBlock(16, 16, fused=fused, **options)


def whole_bottleneck(fused: bool = True, **options: Any) -> Block:
    return Bottleneck(64, 16, fused=fused, **options)


def whole_projected(fused: bool = True, **options: Any) -> Block:
    return Bottleneck(24, 16, 1, Projection(24, 64, fused=fused), fused=fused, **options)


def whole_strided(fused: bool = True, **options: Any) -> Block:
    return Bottleneck(24, 16, 2, Projection(24, 64, 2, fused=fused), fused=fused, **options)


def whole_original(fused: bool = True, **options: Any) -> Block:
    return whole_strided(fused, stride_in_1x1=True, **options)


def whole_halved(fused: bool = True, **options: Any) -> Block:
    return BasicBlock(16, 24, 2, Projection(16, 24, 2, fused=fused), fused=fused, **options)


def whole_padded(fused: bool = True, **options: Any) -> Block:
    return BasicBlock(16, 18, 2, PadShortcut(2, 2), fused=fused, **options)


WHOLE = (whole_basic, whole_bottleneck, whole_projected, whole_strided, whole_original, whole_halved, whole_padded)
BLOCKS = (basic, basic_projected, basic_padded, bottleneck, bottleneck_projected, original, grouped, *WHOLE)


def formula(block: Any, x: Tensor, step: Tensor | None) -> Tensor:
    """Of modules that are called one by one."""
    y, i = x, 1
    while hasattr(block, f"conv{i}"):
        y = F.relu(y) if i > 1 else y
        y = getattr(block, f"bn{i}")(getattr(block, f"conv{i}")(y))
        i += 1
    if block.se is not None:
        hidden = F.relu(block.se.fc1(y.mean((2, 3), keepdim=True)))
        y = y / (1 + torch.exp(-block.se.fc2(hidden)))
    if step is not None:
        y = y * step.view(1, -1, 1, 1)
    if isinstance(block.downsample, Projection):
        x = block.downsample[1](block.downsample[0](x))
    elif block.downsample is not None:
        x = x[:, :, ::2, ::2]
        x = torch.cat([x, x.new_zeros(x.shape[0], 2, *x.shape[2:])], 1)
    return F.relu(x + y)


def seen(block: nn.Module, x: Tensor, step: Tensor | None, how: Any = None) -> dict[str, Tensor]:
    dtype = next(block.parameters()).dtype
    x = x.detach().to(dtype).requires_grad_()
    step = None if step is None else step.detach().to(dtype).requires_grad_()
    out = (how or type(block).forward)(block, x, step)
    torch.manual_seed(7)
    out.backward(torch.randn(out.shape).to(dtype))
    assert x.grad is not None
    found = {"out": out.detach(), "x.grad": x.grad} | {f"{n}.grad": p.grad for n, p in block.named_parameters()}  # type: ignore[dict-item]
    if step is not None:
        found["step.grad"] = step.grad  # type: ignore[assignment]
    return found | {name: b.clone() for name, b in block.named_buffers()}


@pytest.mark.parametrize("reduction", (None, 2), ids=("", "gate"))
@pytest.mark.parametrize("scaled", (False, True), ids=("", "step"))
@pytest.mark.parametrize("make", BLOCKS)
def test_blocks(make: Any, scaled: bool, reduction: int | None) -> None:
    """Three of five draws decide, as in the tests of the models: a ReLU near zero is now on, now off."""
    failures, last = 0, None
    for seed in range(5):
        truth = settled(lambda: make(False, reduction=reduction), seed).double()
        fused, stock = make(True, reduction=reduction), make(False, reduction=reduction)
        fused.load_state_dict(truth.state_dict())
        stock.load_state_dict(truth.state_dict())
        layout = (torch.contiguous_format, torch.channels_last)[seed % 2]
        x = torch.randn(4, fused.conv1.in_channels, 7, 6).contiguous(memory_format=layout)
        fused.to(memory_format=layout)
        last_norm = fused.bn2 if isinstance(fused, BasicBlock) else fused.bn3
        step = torch.rand(last_norm.num_features) if scaled else None
        wrong = None
        for training in (True, False):
            for block in (fused, stock, truth):
                block.train(training)
            exact = seen(truth, x, step, formula)
            ours, eager = seen(fused, x, step), seen(stock, x, step)
            assert ours.keys() == eager.keys() == exact.keys()
            assert all(torch.equal(ours[key], t) for key, t in exact.items() if not t.is_floating_point())
            for kind in ("out", "x.grad", "parameters", "running_mean", "running_var"):
                wrong = wrong or difference(ours, eager, exact, kind)
        failures, last = failures + (wrong is not None), wrong or last
    assert failures < 3, last


@pytest.mark.parametrize("reduction", (None, 2), ids=("", "gate"))
@pytest.mark.parametrize("make", (basic_projected, bottleneck))
def test_the_join_is_one_op(make: Any, reduction: int | None) -> None:
    block = make(reduction=reduction)
    before = dispatch.served()
    block(torch.randn(2, block.conv1.in_channels, 4, 4), torch.ones(8))
    found = dispatch.served() - before
    assert sum(n for (op, _), n in found.items() if op == "bn_rk_sum") == 3  # as many as BatchNorms
    assert {op for op, _ in found} <= {"bn_rk_sum", "channel_moments", "update_running_stats"}


@pytest.mark.parametrize("name", ("bn1", "conv2", "bn2", "relu", "se", "se.fc1", "downsample", "downsample.1"))
def test_hooks_are_heard(name: str) -> None:
    block = settled(lambda: basic_projected(reduction=2))
    x = torch.randn(2, 6, 5, 5)
    expected = copy.deepcopy(block)(x)
    heard = []
    block.get_submodule(name).register_forward_hook(lambda *_: heard.append(name))
    torch.testing.assert_close(block(x), expected)
    assert len(heard) == (2 if name == "relu" else 1)


def test_replaced_activation() -> None:
    block = settled(basic)
    block.relu = nn.Tanh()
    x = torch.randn(2, 6, 5, 5)
    twin = copy.deepcopy(block)
    y = twin.bn2(twin.conv2(torch.tanh(twin.bn1(twin.conv1(x)))))
    torch.testing.assert_close(block(x), torch.tanh(x + y))


def test_step_of_ones_and_none() -> None:
    block = settled(lambda: bottleneck(reduction=2)).eval()
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(block(x, torch.ones(8)), block(x))
    torch.testing.assert_close(block(x, torch.zeros(8)), F.relu(x))


def test_gate_twice_differentiable() -> None:
    torch.manual_seed(0)
    block = BasicBlock(2, 2, reduction=1).double()
    block.relu = nn.Softplus()  # whose second derivative is not zero
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    for training in (True, False):
        block.train(training)
        assert torch.autograd.gradcheck(block, x)
        assert torch.autograd.gradgradcheck(block, x)


def test_padding_keeps_the_layout() -> None:
    x = torch.randn(2, 6, 5, 5).contiguous(memory_format=torch.channels_last)
    assert PadShortcut(2, 2)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(native.cpu_reason() is not None, reason="the C++ kernels are not built")
def test_what_is_normalised_is_not_kept() -> None:
    """Of a Bottleneck stay what its BatchNorms and its first convolution read, and bits; with memory "min" its last
    convolution is made again."""
    kept = {}
    for fused, memory in ((False, "speed"), (True, "speed"), (True, "min")):
        block = Bottleneck(64, 16, fused=fused).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        block.memory = memory
        x = torch.randn(4, 64, 16, 16).contiguous(memory_format=torch.channels_last)
        tensors = [*block.parameters(), *block.buffers(), x]
        kept[fused, memory] = measure.saved_bytes(lambda block=block, x=x: block(x), tensors) / (4 * 4 * 16 * 16)
    assert kept[False, "speed"] == pytest.approx(16 + 16 + 16 + 16 + 64 + 64, abs=1)
    assert kept[True, "speed"] == pytest.approx(16 + 16 + 64 + 64 / 32, abs=1)
    assert kept[True, "min"] == pytest.approx(16 + 16 + 64 / 32, abs=1)


@pytest.mark.skipif(native.cpu_reason() is not None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("make", (BasicBlock, Bottleneck))
def test_convolutions_leave_the_moments_of_their_result(make: type[Block], monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def spied(name: str) -> Any:
        op = getattr(norm, name)
        return lambda *args, **options: given.append((name, options["moments"] is not None)) or op(*args, **options)

    for name in ("bn_relu_conv", "bn_rk_sum"):
        monkeypatch.setattr(norm, name, spied(name))
    monkeypatch.setattr(residual, "whole_residual", lambda *_: None)  # as where a block is not one op
    block = make(64, 64 // make.expansion).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    block(torch.randn(2, 64, 8, 8).contiguous(memory_format=torch.channels_last))
    more = [] if make is BasicBlock else [("bn_relu_conv", True)]
    assert given == [("bn_relu_conv", True), *more, ("bn_rk_sum", True)]


@pytest.mark.skipif(native.cpu_reason() is not None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("make", WHOLE)
def test_which_blocks_are_one_op(make: Any) -> None:
    def ops_of(block: Any, x: Tensor, step: Tensor | None = None) -> int:
        before = dispatch.served()
        block(x, step).sum().backward()
        served = dispatch.served() - before
        assert served["residual_block", "cpu"] == served["residual_block_backward", "cpu"]
        return served["residual_block", "cpu"]

    block = make().to(memory_format=torch.channels_last)
    x = torch.randn(3, block.conv1.in_channels, 9, 8).contiguous(memory_format=torch.channels_last)
    channels = block.bn2.num_features if isinstance(block, BasicBlock) else block.bn3.num_features
    assert ops_of(block, x) == ops_of(block.eval(), x) == ops_of(block, x, torch.ones(channels)) == 1
    block.memory = "min"
    assert ops_of(block, x) == (block.downsample is None)  # a shortcut is made again, too
    block.memory = "speed"
    assert ops_of(block, x.contiguous()) == 0  # contiguous tensors would be copied
    for change in ("hook", "gate", "relu", "group"):
        other = make(reduction=2 if change == "gate" else None).to(memory_format=torch.channels_last)
        if change == "hook":
            other.bn2.register_forward_hook(lambda *_: None)
        elif change == "relu":
            other.relu = nn.SiLU()
        elif change == "group":
            conv = other.conv2
            other.conv2 = nn.Conv2d(conv.in_channels, conv.out_channels, 3, conv.stride, 1, groups=2, bias=False)
        assert ops_of(other.to(memory_format=torch.channels_last), x) == 0, change
    before = dispatch.served()
    with torch.no_grad():
        block(x)
    assert (dispatch.served() - before)["residual_block", "cpu"] == 1


@pytest.mark.parametrize("training", (True, False))
def test_twice_differentiable(training: bool) -> None:
    torch.manual_seed(0)
    block = BasicBlock(2, 2).double().train(training)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x)
    inputs = (x, block.bn1.weight, block.bn1.bias, block.conv2.weight)
    assert torch.autograd.gradgradcheck(lambda *_: block(x), inputs)
