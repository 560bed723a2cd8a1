"""DenseNet: torchvision's keys, the papers' parameters and FLOPs, training as in stock PyTorch, and the options."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import rkfast
from rkfast import measure, native, papers
from rkfast.nn import DenseBlock
from tests.libraries import library
from tests.models.tester import (
    check_checkpointing,
    check_dropout,
    check_fused,
    check_interface,
    check_row,
    on_meta,
    parameters,
)

# growth rate, layers, channels of the stem, parameters (torchvision's documentation)
IMAGENET = {
    "densenet121": (32, (6, 12, 24, 16), 64, 7_978_856),
    "densenet161": (48, (6, 12, 36, 24), 96, 28_681_000),
    "densenet169": (32, (6, 12, 32, 32), 64, 14_149_480),
    "densenet201": (32, (6, 12, 48, 32), 64, 20_013_928),
}


def torchvision_shapes(k: int, layers: tuple[int, ...], channels: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of torchvision's DenseNet, in its order."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, c: int) -> None:
        shapes.update({f"{name}.{key}": (c,) for key in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    shapes["features.conv0.weight"] = (channels, 3, 7, 7)
    norm("features.norm0", channels)
    for t, count in enumerate(layers, 1):
        for i in range(1, count + 1):
            layer = f"features.denseblock{t}.denselayer{i}"
            norm(f"{layer}.norm1", channels)
            shapes[f"{layer}.conv1.weight"] = (4 * k, channels, 1, 1)
            norm(f"{layer}.norm2", 4 * k)
            shapes[f"{layer}.conv2.weight"] = (k, 4 * k, 3, 3)
            channels += k
        if t < len(layers):
            norm(f"features.transition{t}.norm", channels)
            shapes[f"features.transition{t}.conv.weight"] = (channels // 2, channels, 1, 1)
            channels //= 2
    norm("features.norm5", channels)
    return shapes | {"classifier.weight": (1000, channels), "classifier.bias": (1000,)}


@pytest.mark.parametrize("name", IMAGENET)
def test_torchvision_keys(name: str) -> None:
    k, layers, channels, count = IMAGENET[name]
    ours = {key: tuple(value.shape) for key, value in on_meta(name).state_dict().items()}
    expected = torchvision_shapes(k, layers, channels)
    assert list(ours.items()) == list(expected.items())
    assert len(ours) == {"densenet121": 727}.get(name, len(ours))
    assert parameters(name) == count


def test_torchvision_itself() -> None:
    """Its state_dict as it is, and its output."""
    torch.manual_seed(0)
    theirs = library("torchvision.models").DenseNet(4, (4, 3), 8, num_classes=10).eval()
    x = torch.randn(2, 3, 64, 64)
    for fused in (True, False):
        ours = rkfast.models.DenseNet(4, (4, 3), 8, num_classes=10, fused=fused).eval()
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    converted = [rkfast.models.erknet_from_densenet(model)[1:] for model in (theirs, ours)]
    assert converted[0] == converted[1]


@pytest.mark.parametrize("row", papers.DENSENET_TABLE_2)
def test_tables(row: papers.Row) -> None:
    if row.billions == "14.53":
        # The printed FLOPs are those of a stem with 2k channels; the printed 27.2 million parameters of one with 16.
        check_row(row._replace(billions=None))
        row = row._replace(options=row.options | {"init_channels": 48}, millions=None)
    check_row(row)


SMALL: list[tuple[str, dict[str, Any]]] = [
    ("densenet-13", {"growth_rate": 4}),
    ("densenet-16-bc", {"growth_rate": 4, "num_classes": 7}),
]


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_fused_equals_stock(name: str, options: dict[str, Any]) -> None:
    check_fused(name, **options)


@pytest.mark.parametrize(
    ("name", "options"), [*SMALL, ("densenet121", {"growth_rate": 2, "init_channels": 4, "num_classes": 10})]
)
def test_interface(name: str, options: dict[str, Any]) -> None:
    check_interface(name, **options)


def test_checkpointing() -> None:
    check_checkpointing("densenet-22-bc", growth_rate=4)


def test_dropout() -> None:
    check_dropout("densenet-13", 9 + 2, growth_rate=4)
    check_dropout("densenet-16-bc", 2 * 6 + 2, growth_rate=4)


def test_stem_of_imagenet() -> None:
    """Its BatchNorm, its ReLU and the last ones are not left out, nor run twice."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    for fused in (True, False):
        model = rkfast.create_model("densenet121", growth_rate=2, init_channels=4, num_classes=10, fused=fused)
        f = model.features
        y = f.pool0(torch.relu(f.norm0(f.conv0(x))))
        for t in range(1, 5):
            y = getattr(f, f"denseblock{t}")(y)
            if t < 4:
                y = getattr(f, f"transition{t}")(y)
        y = torch.relu(f.norm5(y))
        before = rkfast.dispatch.served()
        torch.testing.assert_close(model.forward_features(x), y, rtol=1e-4, atol=1e-5)
        calls: Counter[str] = Counter()
        for (op, _), n in (rkfast.dispatch.served() - before).items():
            calls[op] += n
        assert calls["bn_rk_sum"] == (2 if fused else 0)  # norm0 and norm5
        assert calls["bn_relu_pool"] == (3 if fused else 0)  # of the transitions
        assert f.norm0.num_batches_tracked == f.norm5.num_batches_tracked == 2


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = rkfast.create_model("densenet-40", growth_rate=24)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            std = math.sqrt(2 / module.weight[0].numel())
            assert module.weight.std().item() == pytest.approx(std, rel=0.15)
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-5, 0.1)
    linear = model.classifier
    assert linear.weight.abs().max().item() == pytest.approx(linear.in_features**-0.5, rel=0.05)
    assert not linear.bias.any()


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    (
        ("densenet", {}, ValueError, "name: 'densenet' is not a model; expected densenet<121.*or densenet-<depth>"),
        ("densenet122", {}, ValueError, "name: 'densenet122' is not a model"),
        ("densenet121-bc", {}, ValueError, "is not a model"),
        ("densenet-40-b", {}, ValueError, "is not a model"),
        ("densenet-40-bcbc", {}, ValueError, "is not a model"),
        ("densenet--40", {}, ValueError, "is not a model"),
        ("densenet-41", {}, ValueError, r"name: depth: expected 4 \+ 3 \* layers, such as 40, got 41"),
        ("densenet-103-bc", {}, ValueError, r"name: depth: expected 4 \+ 6 \* layers, such as 76, got 103"),
        ("densenet-4", {}, ValueError, "name: depth: expected 7 to 2050, got 4"),
        ("densenet-7-bc", {}, ValueError, "name: depth: expected 10 to 2050, got 7"),
        ("densenet-999997", {}, ValueError, "name: depth: expected 7 to 2050, got 999997"),
        ("densenet121", {"growth_rate": 0}, ValueError, "growth_rate: expected 1 to 4096, got 0"),
        ("densenet-40", {"init_channels": 0.5}, TypeError, "init_channels: expected an int, got 0.5"),
        ("densenet-40", {"drop_rate": -0.1}, ValueError, r"drop_rate: expected a number in \[0, 1\), got -0.1"),
        ("densenet-40", {"num_classes": "10"}, TypeError, "num_classes: expected an int, got '10'"),
        ("densenet-40", {"in_chans": 10**6}, ValueError, "in_chans: expected 1 to 4096, got 1000000"),
        ("densenet-40", {"m": 1}, TypeError, "m: not an option of densenet; supported are growth_rate, init_channels"),
        ("densenet-40", {"depth": 1}, TypeError, "depth: not an option of densenet"),
    ),
)
def test_bad_arguments(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with torch.device("meta"), pytest.raises(error, match=message) as caught:
        rkfast.create_model(name, **options)
    assert len(str(caught.value)) < 400


@pytest.mark.skipif(native.cpu_reason() is not None, reason="the C++ kernels are not built")
def test_bytes_saved_for_backward() -> None:
    """DenseNet-121 at 224x224, batch 2: by saved-tensor hooks, without parameters."""
    x = torch.randn(2, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    saved = {}
    for fused, memory in ((False, "speed"), (True, "speed"), (True, "min")):
        model = rkfast.create_model("densenet121", fused=fused, memory=memory).to(memory_format=torch.channels_last)
        kept = measure.saved_bytes(lambda m=model: m(x), [*model.parameters(), *model.buffers()])
        saved[memory if fused else "stock"] = kept / 2**20
    assert saved["stock"] > 240
    assert saved["speed"] <= 70
    assert saved["min"] <= 40


def test_memory() -> None:
    model = rkfast.create_model("densenet-10-bc", growth_rate=4, memory="min")
    assert {m.memory for m in model.modules() if isinstance(m, DenseBlock)} == {"min"}
    with pytest.raises(ValueError, match="memory: expected one of speed, min, got 'most'"):
        rkfast.create_model("densenet-7", memory="most")
