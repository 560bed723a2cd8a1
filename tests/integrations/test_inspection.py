"""Tools that look into a network: class activation maps by hooks, and features by torch.fx, of a fused DenseNet-121."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rkfast
from rkfast import dispatch, native
from tests.libraries import library, network

built = pytest.mark.skipif(native.cpu_reason() is not None, reason="the C++ kernels are not built")


@pytest.fixture(scope="module")
def stock() -> nn.Module:
    torch.manual_seed(0)
    return network("torchvision.densenet121").eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def grad_cam(model: nn.Module, layer: str, x: Tensor) -> Tensor:
    """Selvaraju et al., "Grad-CAM", equations 1 and 2. The gradient comes from a hook on the activation: one on the
    module does not bear the ReLU in place behind some of these layers, stock or fused."""
    kept: dict[str, Tensor] = {}

    def note(module: nn.Module, args: Any, out: Tensor) -> None:
        kept["activation"] = out.detach().clone()
        out.register_hook(lambda gradient: kept.update(gradient=gradient.clone()))

    handle = model.get_submodule(layer).register_forward_hook(note)
    model(x)[0, 3].backward()
    handle.remove()
    return (kept["gradient"].mean((2, 3), keepdim=True) * kept["activation"]).sum(1).relu()


@built
@pytest.mark.parametrize(
    ("layer", "blocks"),
    (
        ("features.denseblock4", 4),
        ("features.denseblock4.denselayer16.conv2", 3),
        ("features.denseblock2.denselayer3.norm1", 3),
        ("features.transition2.conv", 4),
        ("features.norm5", 4),
    ),
)
def test_grad_cam(layer: str, blocks: int, stock: nn.Module, x: Tensor) -> None:
    """A hook inside a block makes that one block run unfused, while it is there."""
    model = rkfast.fuse(copy.deepcopy(stock))
    calls = dispatch.served()
    ours = grad_cam(model, layer, x)
    assert (dispatch.served() - calls)["dense_block", "cpu"] == blocks
    theirs, truth = grad_cam(copy.deepcopy(stock), layer, x), grad_cam(copy.deepcopy(stock).double(), layer, x.double())
    error, eager = ((t.double() - truth).abs().max().item() for t in (ours, theirs))
    assert error <= 2 * eager + torch.finfo(torch.float32).eps * truth.max().item()
    calls = dispatch.served()
    model(x)
    assert (dispatch.served() - calls)["dense_block", "cpu"] == 4


def test_feature_extraction(stock: nn.Module, x: Tensor) -> None:
    """torchvision's extractor traces the stock forward of a fused network, to any depth."""
    create = library("torchvision.models.feature_extraction").create_feature_extractor
    nodes = ["features.denseblock2", "features.denseblock3.denselayer5.conv1", "features.norm5", "classifier"]
    model = rkfast.fuse(copy.deepcopy(stock))
    with torch.no_grad():
        ours, theirs = create(model, nodes)(x), create(copy.deepcopy(stock), nodes)(x)
        assert model(x).shape == (1, 1000)
    assert list(ours) == nodes
    for name in nodes:
        assert torch.equal(ours[name], theirs[name]), name


@built
def test_an_extractor_that_is_fused_has_what_stock_has(stock: nn.Module, x: Tensor) -> None:
    """Hooks on whole blocks leave them fused."""
    heard: dict[str, list[Tensor]] = {}
    served: Counter[tuple[str, str]] = Counter()
    for kind, model in (("stock", copy.deepcopy(stock)), ("fused", rkfast.fuse(copy.deepcopy(stock)))):
        for i in range(1, 5):
            block = model.get_submodule(f"features.denseblock{i}")
            block.register_forward_hook(
                lambda module, args, out, kind=kind: heard.setdefault(kind, []).append(out.clone())
            )
        before = dispatch.served()
        with torch.no_grad():
            model(x)
        served = dispatch.served() - before
    assert served["dense_block", "cpu"] == 4
    for ours, theirs in zip(heard["fused"], heard["stock"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
