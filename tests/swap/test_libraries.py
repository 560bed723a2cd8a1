"""rkfast.fuse on the networks of torchvision and timm: those it was made for as they are, and many others."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import rkfast
from rkfast import dispatch, native, ops
from rkfast.nn import norm
from rkfast.nn.norm import frozen
from rkfast.swap import dense
from rkfast.swap.kind import Kind
from tests.libraries import library, network
from tests.swap.test_fold import settled
from tests.swap.test_fuse import built

DENSE = {"densenet121": 58, "densenet161": 78, "densenet169": 82, "densenet201": 98}  # layers, in four blocks
RESIDUAL = {"resnet18": 8, "resnet50": 16, "wide_resnet50_2": 16, "resnext50_32x4d": 16, "seresnet50": 16}  # blocks
NETWORKS = [f"{home}.{name}" for home in ("torchvision", "timm") for name in (*DENSE, *RESIDUAL)]
NETWORKS.remove("torchvision.seresnet50")


def images(size: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


@built
@pytest.mark.parametrize("address", NETWORKS)
def test_networks(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every BatchNorm is in a call of a kernel; names, parameters and buffers stay, and types come back."""
    torch.manual_seed(0)
    model, x, name = settled(network(address)), images(), address.partition(".")[2]
    types, state = [type(module) for module in model.modules()], model.state_dict(keep_vars=True)
    with torch.no_grad():
        expected = model(x)
    rkfast.fuse(model)
    fused = model.state_dict(keep_vars=True)
    assert list(fused) == list(state) and all(fused[key] is t for key, t in state.items())

    layers: list[int] = []
    in_blocks: list[int] = []

    @functools.wraps(dense.dense_block)
    def counted(x: Tensor, conv1: list[Tensor], *args: Any, **options: Any) -> Any:
        layers.append(len(conv1))
        return ops.dense_block(x, conv1, *args, **options)

    @functools.wraps(ops.residual_block)
    def counted_norms(x: Tensor, convs: list[Tensor], *args: Any, **options: Any) -> Any:
        in_blocks.append(len(convs) + (options["projection"] is not None))
        return ops.residual_block(x, convs, *args, **options)

    monkeypatch.setattr(dense, "dense_block", counted)
    monkeypatch.setattr(norm, "residual_block", counted_norms)
    before = dispatch.served()
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    served = dispatch.served() - before
    assert served["dense_block", "cpu"] == len(layers) == (4 if name in DENSE else 0)
    assert sum(layers) == DENSE.get(name, 0)
    norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
    assert served["residual_block", "cpu"] == len(in_blocks)
    alone = sum(served[op, "cpu"] for op in ("bn_rk_sum", "bn_relu_conv", "bn_relu_pool"))
    assert alone + sum(in_blocks) == norms - 2 * sum(layers)
    if name in DENSE:
        summary = f"1 of 1 sequences, {DENSE[name]} of {DENSE[name]} dense layers, 3 of 3 transitions fused"
    else:
        summary = f"1 of 1 stems, {RESIDUAL[name]} of {RESIDUAL[name]} residual blocks fused"
    assert rkfast.report(model).summary() == summary

    rkfast.unfuse(model)
    assert [type(module) for module in model.modules()] == types


# The same with two short stages: of the ReLUs of a deep network one is always at its edge, and gradients tell less.
SHORT: dict[str, dict[str, Any]] = {
    "torchvision.DenseNet": {"growth_rate": 32, "block_config": (3, 4)},
    "torchvision.DenseNet of 161": {"growth_rate": 48, "block_config": (3, 4), "num_init_features": 96},
    "torchvision.ResNet of 18": {"block": "BasicBlock"},
    "torchvision.ResNet of 50": {"block": "Bottleneck"},
    "torchvision.ResNet of wide_50_2": {"block": "Bottleneck", "width_per_group": 128},
    "torchvision.ResNet of next50_32x4d": {"block": "Bottleneck", "groups": 32, "width_per_group": 4},
    "timm.densenet121": {"block_config": (3, 4)},
    "timm.densenet161": {"block_config": (3, 4)},
    **{f"timm.{name}": {} for name in RESIDUAL},
}


def short(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    options = {"num_classes": 10, **SHORT[name]}
    if "ensenet" in name.lower():
        return settled(network(name.partition(" ")[0], **options))
    if "block" in options:
        options["block"] = getattr(library("torchvision.models.resnet"), options["block"])
    model: Any = network(name.partition(" ")[0], layers=(2, 2, 1, 1), **options)
    model.fc = nn.Linear(model.layer3[0].conv1.in_channels, 10)
    model.layer3 = model.layer4 = nn.Identity()
    return settled(model)


class Viewing(nn.Module):
    """Takes contiguous tensors alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1).view(x.shape)


@built
@pytest.mark.parametrize("address", ("torchvision.resnet18", "timm.resnet18"))
def test_contiguous_images_of_a_known_resnet(address: str) -> None:
    """The blocks get large ones channels_last, but for networks in which somebody could mind."""
    torch.manual_seed(0)
    model: Any = settled(network(address))
    large, small = images(96).repeat(2, 1, 1, 1), images(64)
    with torch.no_grad():
        expected = [model(x) for x in (large, small)]
    rkfast.fuse(model)

    def turned(x: Tensor) -> bool:
        before = dispatch.served()
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected[x is small], rtol=1e-3, atol=1e-4)
        served = dispatch.served() - before
        return served["residual_block", "cpu"] == 8  # contiguous ones are evaluated by stock blocks

    assert turned(large) and not turned(small)
    if address.startswith("timm"):
        assert model.forward_features(large).is_contiguous()
    handle = model.layer3.register_forward_hook(lambda *_: None)
    assert not turned(large)
    handle.remove()
    assert turned(large)
    stage, model.layer4 = model.layer4, nn.Sequential(Viewing(), model.layer4)
    assert not turned(large)
    model.layer4 = stage
    if address.startswith("torchvision"):
        model.avgpool = nn.Sequential(Viewing(), model.avgpool)
        assert turned(large)


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_verifies(name: str, dtype: torch.dtype) -> None:
    layout = torch.channels_last if dtype == torch.bfloat16 else torch.contiguous_format
    model = rkfast.fuse(short(name)).to(memory_format=layout)  # type: ignore[call-overload]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = rkfast.verify(model, images().contiguous(memory_format=layout), draws=3)
    assert found, found
    assert found.served or dtype == torch.bfloat16 or native.cpu_reason() is not None


@pytest.mark.parametrize("name", SHORT)
def test_an_optimizer_made_before_trains(name: str) -> None:
    steps = 20 if name in ("torchvision.DenseNet", "torchvision.ResNet of 18") else 5
    losses: dict[bool, list[float]] = {}
    for fused in (True, False):
        model = short(name).train()
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        losses[fused] = []
        for step in range(steps):
            if step == 2 and fused:
                rkfast.fuse(model)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images()), torch.arange(2))
            loss.backward()
            optimizer.step()
            losses[fused].append(loss.item())
    assert losses[False][-1] < 0.9 * losses[False][0]
    assert losses[True] == pytest.approx(losses[False], rel=2e-3)


@pytest.mark.parametrize("name", SHORT)
def test_checkpoints(name: str) -> None:
    """Saved of a fused network and loaded into a stock one, and the other way round."""

    def saved(model: nn.Module) -> Any:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    stock, fused = short(name), rkfast.fuse(short(name))
    others = short(name, seed=1), rkfast.fuse(short(name, seed=1))
    x = images()
    with torch.no_grad():
        for source, twin, other in ((fused, stock, others[0]), (stock, fused, others[1])):
            assert not torch.equal(other(x), twin(x))
            other.load_state_dict(saved(source))
            assert torch.equal(other(x), twin(x))


# The smallest of every family of convolutional networks in timm. Something in these is fused:
SOME = (
    "densenetblur121d", "dla34", "dla46_c", "ecaresnet26t", "ghostnet_050", "hrnet_w18_small", "legacy_seresnet18",
    "legacy_xception", "repghostnet_050", "res2net50_14w_8s", "resnest14d", "resnet10t", "resnetaa34d",
    "resnetblur18", "skresnet18", "vgg11_bn",
)  # fmt: skip
# Nothing in these is:
NONE = (
    "convmixer_768_32", "convnext_zepto_rms", "convnextv2_atto", "cs3darknet_focus_s", "cspnext_tiny", "cspresnet50",
    "darknet17", "dpn68", "efficientnet_b0", "efficientnet_b0_gn", "efficientnet_es", "efficientnet_lite0",
    "ese_vovnet19b_slim_dw", "fasternet_t0", "fbnetc_100", "gernet_s", "hardcorenas_a", "hgnet_tiny", "hgnetv2_b0",
    "inception_next_atto", "inception_v3", "lcnet_035", "lcnetv2_small", "mambaout_femto", "mixnet_s",
    "mnasnet_small", "mobilenetv2_035", "mobilenetv3_small_050", "mobilenetv4_conv_small_035", "mobileone_s0",
    "nf_regnet_b0", "nf_resnet26", "rdnet_tiny", "regnetx_002", "regnety_002", "regnetz_005", "repvgg_a0",
    "repvit_m0_9", "resnetv2_18", "rexnet_100", "starnet_s050", "tf_efficientnetv2_b0", "tinynet_e", "tresnet_m",
    "xception41",
)  # fmt: skip
SHORTER: dict[str, dict[str, Any]] = {
    "densenetblur121d": {"block_config": (3, 4)},
    "vgg11_bn": {"mlp_ratio": 0.02},
    **{
        name: {"layers": (1, 1, 1, 1)}
        for name in (
            "ecaresnet26t",
            "legacy_seresnet18",
            "res2net50_14w_8s",
            "resnetaa34d",
            "resnetblur18",
            "skresnet18",
        )
    },
}


@pytest.mark.parametrize("name", (*SOME, *NONE))
def test_others_of_timm(name: str) -> None:
    torch.manual_seed(0)
    model = settled(network(f"timm.{name}", num_classes=10, **SHORTER.get(name, {})))
    types, x = [type(module) for module in model.modules()], images(size=96 if name == "inception_v3" else 64)
    rows = rkfast.report(rkfast.fuse(model), x)
    assert all(row.fused or row.reason for row in rows)
    fused = [type(module) for module in model.modules()] != types
    assert fused == any(row.fused for row in rows) == (name in SOME), rows
    if fused:
        found = rkfast.verify(model, x, draws=3)
        assert found, found


def fasterrcnn() -> nn.Module:
    detection: Any = library("torchvision.models.detection.backbone_utils")
    return detection.resnet_fpn_backbone(backbone_name="resnet50", weights=None)


def deeplabv3() -> nn.Module:
    segmentation: Any = library("torchvision.models.segmentation")
    return segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)


@pytest.mark.parametrize(("make", "size"), ((fasterrcnn, 64), (deeplabv3, 32)))
def test_backbones(make: Any, size: int) -> None:
    """In detection, where no layer trains its BatchNorm, and in segmentation, where some convolutions are dilated."""
    torch.manual_seed(0)
    model = settled(make())
    for module in model.modules():
        if frozen(module):
            for buffer in module.buffers():
                buffer.uniform_(0.5, 1.5)
    rkfast.fuse(model)
    assert sum(isinstance(module, Kind) and module.title == "residual block" for module in model.modules()) == 16
    found = rkfast.verify(model, images(size), draws=1)
    assert found, found
