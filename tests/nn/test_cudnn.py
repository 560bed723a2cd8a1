"""Which folded convolutions cuDNN's kernels with a ReLU are asked for, and with what; a stand-in computes them here.
tests/cuda/test_gpu.py has the kernels themselves."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rkfast.nn import cudnn
from rkfast.nn.folded import FoldedConv

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 16, 5, 4, generator=GENERATOR)


def conv(**options: Any) -> FoldedConv:
    torch.manual_seed(0)
    given = {"in_channels": 16, "out_channels": 8, "kernel_size": 3, "padding": 1} | options
    return FoldedConv(nn.Conv2d(**given), relu=True).requires_grad_(False)


Z = torch.randn(2, 8, 5, 4, generator=GENERATOR)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, ...]]]:
    """What cuDNN is asked to compute."""
    calls: list[tuple[Tensor, ...]] = []

    def relu(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, *rest: Any) -> Tensor:
        calls.append((x, weight))
        return torch.relu(F.conv2d(x, weight, bias, stride, padding, *rest))

    def add_relu(x: Tensor, w: Tensor, z: Tensor, alpha: float, bias: Tensor | None, *sizes: Any) -> Tensor:
        calls.append((x, w, z))
        return torch.relu(F.conv2d(x, w, bias, *sizes) + alpha * z)

    monkeypatch.setattr(cudnn, "on_gpu", lambda t: True)
    monkeypatch.setattr(cudnn, "_refused", set())
    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        yield calls


@pytest.mark.parametrize("options", ({}, {"stride": 2}, {"kernel_size": 1, "padding": 0}, {"bias": False}), ids=str)
def test_served(asked: list[tuple[Tensor, ...]], options: dict[str, Any]) -> None:
    layer = conv(**options)
    right = F.conv2d(X, layer.weight, layer.bias, layer.stride, layer.padding)
    torch.testing.assert_close(layer(X), torch.relu(right))
    z = torch.randn_like(right)
    torch.testing.assert_close(layer.added(X, z), torch.relu(right + z))
    layer(X[:0])  # which is PyTorch's
    assert [len(call) for call in asked] == [2, 3]
    for t in (t for call in asked for t in call):
        assert t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "options",
    (
        {"in_channels": 3},  # the stem
        {"out_channels": 12},
        {"groups": 2},
        {"padding_mode": "reflect"},
        {"padding": "same"},
        {"dtype": torch.float64},
    ),
    ids=str,
)
def test_not_served(asked: list[tuple[Tensor, ...]], options: dict[str, Any]) -> None:
    layer = conv(**options)
    x = X[:, : layer.in_channels].to(layer.weight.dtype)
    torch.testing.assert_close(layer(x), torch.relu(layer._stock(x)))
    layer(x[:0])
    assert not asked


def test_not_where_more_is_asked_for(asked: list[tuple[Tensor, ...]]) -> None:
    layer = conv()
    torch.use_deterministic_algorithms(True)
    try:
        layer(X)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.enable_grad():
        assert layer(X.clone().requires_grad_()).requires_grad
        assert layer.added(X, Z.clone().requires_grad_()).requires_grad
    with torch.backends.cudnn.flags(enabled=False):
        layer(X)
    with torch.backends.cudnn.flags(deterministic=True):
        layer(X)
    torch.func.vmap(layer)(X[None])
    assert not asked


def test_an_engine_that_is_missing_is_not_looked_for_again(
    asked: list[tuple[Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[None] = []

    def fails(*args: Any) -> Tensor:
        tried.append(None)
        raise RuntimeError("GET was unable to find an engine to execute this computation")

    layer, right = conv(), torch.relu(conv()._stock(X))
    monkeypatch.setattr(torch, "cudnn_convolution_relu", fails)
    for _ in range(2):
        torch.testing.assert_close(layer(X), right)
    assert len(tried) == 1
    layer.added(X, Z)
    assert len(asked) == 1  # which is another kernel


def test_memory_that_runs_out_is_no_missing_engine(
    asked: list[tuple[Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fails)
    with pytest.raises(torch.OutOfMemoryError):
        conv()(X)
    assert not cudnn._refused


def test_autocast(asked: list[tuple[Tensor, ...]]) -> None:
    """In its dtype, by a copy of the weight that is made once, and again where the weight is another."""
    layer = conv()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert layer(X).dtype == torch.bfloat16
        assert layer.added(X, Z).dtype == torch.bfloat16
        (_, first), (_, second), (_, third, z) = asked
        assert first is second is third and first.dtype == z.dtype == torch.bfloat16
        layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()})
        layer(X)
        torch.testing.assert_close(asked[-1][1], 2 * first)
        layer.load_state_dict({"bias": layer.bias + 100}, strict=False)
        assert (layer(X) > 10).all()
    assert layer(X).dtype == torch.float32


def test_copies_and_files_hold_no_second_weight(asked: list[tuple[Tensor, ...]]) -> None:
    layer = conv()
    right = layer(X)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False), layer.double().float()):
        assert twin._cast is None
        torch.testing.assert_close(twin(X), right)
