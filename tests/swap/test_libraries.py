"""rkfast.fuse on the networks of torchvision and timm: those it was made for as they are, and many others."""

from __future__ import annotations

import copy
import functools
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import rkfast
from rkfast import dispatch
from rkfast.swap import dense
from rkfast.swap.kind import Kind
from tests.libraries import library, network
from tests.swap.test_fold import settled
from tests.swap.test_fuse import built

DENSE = {"densenet121": 58, "densenet161": 78, "densenet169": 82, "densenet201": 98}  # layers, in four blocks
RESIDUAL = {"resnet18": 8, "resnet50": 16, "wide_resnet50_2": 16, "resnext50_32x4d": 16, "seresnet50": 16}  # blocks
NETWORKS = [
    *(f"torchvision.{name}" for name in (*DENSE, *RESIDUAL) if name != "seresnet50"),
    *(f"timm.{name}" for name in (*DENSE, *RESIDUAL)),
]


def images(batch: int = 4, size: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=NETWORKS)
def address(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def stock(address: str) -> nn.Module:
    """One network at a time, no BatchNorm of which is as it was made: timm's last ones of a block are zero."""
    torch.manual_seed(0)
    return settled(network(address))


@built
def test_every_block_is_served(address: str, stock: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what kernels were called with: every BatchNorm is in one of them."""
    name = address.partition(".")[2]
    model, x = rkfast.fuse(copy.deepcopy(stock)).train(), images()
    layers: list[int] = []

    @functools.wraps(dense.dense_block)
    def block(x: Tensor, conv1: list[Tensor], *args: Any, **options: Any) -> Any:
        layers.append(len(conv1))
        return rkfast.ops.dense_block(x, conv1, *args, **options)

    monkeypatch.setattr(dense, "dense_block", block)
    before = dispatch.served()
    model(x)
    served = dispatch.served() - before
    assert served["dense_block", "cpu"] == len(layers) == (4 if name in DENSE else 0)
    assert sum(layers) == DENSE.get(name, 0)
    norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
    assert served["bn_rk_sum", "cpu"] + served["bn_relu_conv", "cpu"] == norms - 2 * sum(layers)
    if name in DENSE:
        expected = f"1 of 1 sequences, {DENSE[name]} of {DENSE[name]} dense layers, 3 of 3 transitions fused"
    else:
        expected = f"1 of 1 stems, {RESIDUAL[name]} of {RESIDUAL[name]} residual blocks fused"
    assert rkfast.report(model, x).summary() == expected


def test_nothing_else_changes(stock: nn.Module) -> None:
    model = copy.deepcopy(stock)
    types, state = [type(module) for module in model.modules()], model.state_dict(keep_vars=True)
    rkfast.fuse(model)
    fused = model.state_dict(keep_vars=True)
    assert list(fused) == list(state) and all(fused[key] is t for key, t in state.items())
    assert [type(module) for module in model.modules()] != types
    rkfast.unfuse(model)
    assert [type(module) for module in model.modules()] == types


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_verifies(stock: nn.Module, dtype: torch.dtype) -> None:
    layout = torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format
    model = rkfast.fuse(copy.deepcopy(stock)).to(memory_format=layout)  # type: ignore[call-overload]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = rkfast.verify(model, images().contiguous(memory_format=layout), draws=1)
    assert found, found
    assert found[0].eager < 0.1, found  # else there is nothing to see


def test_an_optimizer_made_before_trains(address: str, stock: nn.Module) -> None:
    steps = 20 if "resnet18" in address else 3
    losses = []
    for fuse_after in (1, None):
        model = copy.deepcopy(stock).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        losses.append([])
        for step in range(steps):
            if step == fuse_after:
                rkfast.fuse(model)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images(seed=step)), torch.arange(4))
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_checkpoints(stock: nn.Module) -> None:
    """Saved of fused networks and loaded into stock ones, and the other way round."""

    def saved(model: nn.Module) -> Any:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    x = images()
    fused, other = rkfast.fuse(copy.deepcopy(stock)).eval(), copy.deepcopy(stock).eval()
    with torch.no_grad():
        for source, target in ((fused, other), (other, fused)):
            expected = target(x)
            for t in (*target.parameters(), *target.buffers()):
                t.zero_()
            assert not torch.equal(target(x), expected)
            target.load_state_dict(saved(source))
            assert torch.equal(target(x), expected)


# The smallest of every family of convolutional networks in timm. Something in these is fused:
SOME = (
    "cspresnet50", "densenetblur121d", "dla34", "dla46_c", "dpn48b", "ecaresnet26t", "hrnet_w18_small",
    "inception_resnet_v2", "legacy_seresnet18", "res2net50_14w_8s", "resnest14d", "resnet10t", "resnetblur18",
    "resnetaa34d", "resnetrs50", "resnetv2_18", "selecsls42", "skresnet18", "vgg11_bn", "xception41",
)  # fmt: skip
# Nothing in these is:
NONE = (
    "convmixer_768_32", "convnext_zepto_rms", "convnextv2_atto", "cs3darknet_focus_s", "cspnext_tiny", "darknet17",
    "efficientnet_b0", "efficientnet_b0_gn", "efficientnet_es", "efficientnet_lite0", "ese_vovnet19b_slim_dw",
    "fasternet_t0", "fbnetc_100", "gernet_s", "ghostnet_050", "ghostnetv2_100", "hardcorenas_a", "hgnet_tiny",
    "hgnetv2_b0", "inception_next_atto", "inception_v3", "lcnet_035", "lcnetv2_small", "legacy_xception",
    "mambaout_femto", "mixnet_s", "mnasnet_small", "mobilenetv2_035", "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035", "mobileone_s0", "nf_regnet_b0", "nf_resnet26", "rdnet_tiny", "regnetx_002",
    "regnety_002", "regnetz_005", "repghostnet_050", "repvgg_a0", "repvit_m0_9", "rexnet_100", "starnet_s050",
    "tf_efficientnetv2_b0", "tinynet_e", "tresnet_m",
)  # fmt: skip
SIZES = {"inception_resnet_v2": 96, "inception_v3": 96}
OPTIONS = {"vgg11_bn": {"mlp_ratio": 0.02}}


@pytest.mark.parametrize("name", (*SOME, *NONE))
def test_others_of_timm(name: str) -> None:
    torch.manual_seed(0)
    model = settled(network(f"timm.{name}", num_classes=10, **OPTIONS.get(name, {})))
    types, x = [type(module) for module in model.modules()], images(size=SIZES.get(name, 64))
    rows = rkfast.report(rkfast.fuse(model), x)
    assert all(row.fused or row.reason for row in rows)
    fused = [type(module) for module in model.modules()] != types
    assert fused == any(row.fused for row in rows) == (name in SOME), rows
    if fused:
        found = rkfast.verify(model, x, draws=1)
        assert found, found


def fasterrcnn() -> nn.Module:
    detection: Any = library("torchvision.models.detection.backbone_utils")
    return detection.resnet_fpn_backbone(backbone_name="resnet50", weights=None)


def deeplabv3() -> nn.Module:
    segmentation: Any = library("torchvision.models.segmentation")
    return segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)


@pytest.mark.parametrize("make", (fasterrcnn, deeplabv3))
def test_backbones(make: Any) -> None:
    """In detection, where no layer trains its BatchNorm, and in segmentation, where some convolutions are dilated."""
    torch.manual_seed(0)
    model = settled(make())
    for name, buffer in model.named_buffers():
        if isinstance(model.get_submodule(name.rpartition(".")[0]), _BatchNorm):
            continue
        buffer.uniform_(0.5, 1.5)
    rkfast.fuse(model)
    assert sum(isinstance(module, Kind) and module.title == "residual block" for module in model.modules()) == 16
    found = rkfast.verify(model, images(), draws=1)
    assert found, found
