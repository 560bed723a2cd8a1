"""rkfast's models by timm.create_model."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rkfast
from tests.libraries import library
from tests.package.process import python


@pytest.fixture
def timm() -> Any:
    found = library("timm")
    importlib.import_module("rkfast.timm")
    return found


def test_names(timm: Any) -> None:
    names = [importlib.import_module("rkfast.timm").timm_name(name) for name in rkfast.list_models()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z0-9_]+", name) for name in names)
    listed = timm.list_models(module="timm")
    assert sorted(listed) == sorted(names)
    assert "erknet_7x1_7x1_7x1" in timm.list_models("erknet*")
    assert {"rk_densenet121", "rk_resnet_20", "tsc_resnet50", "ho_resnet_18"} <= set(listed)
    for name, home in (("densenet121", "densenet"), ("resnet50", "resnet"), ("seresnet50", "resnet")):
        assert timm.models.model_entrypoint(name).__module__ == f"timm.models.{home}"  # timm's own stay


def test_import_of_all(timm: Any) -> None:
    home = importlib.import_module("rkfast.timm")
    assert all(hasattr(home, name) for name in home.__all__)


NAMES = (
    "erknet_6x1_6x1_6x1", "irknet_3x1_3x1_3x1", "rkcnn_i_5_5_5", "cliquenet_12", "ho_resnet_10", "rk_resnet_20",
    "rk_densenet_40", "tsc_resnet_32",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_model(timm: Any, name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, in_chans=1, drop_rate=0.0).eval()
    ours = rkfast.create_model(model.config["name"], num_classes=7, in_chans=1).eval()
    ours.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), ours(x))
        assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.num_features)
        model.reset_classifier(3)
        assert isinstance(model.get_classifier(), nn.Linear)
        assert model(x).shape == (2, 3)
    cfg = model.default_cfg
    assert model.pretrained_cfg is cfg
    assert cfg["architecture"] == name
    assert cfg["num_classes"] == 10
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 32, 32)


@pytest.mark.parametrize("name", NAMES)
def test_features(timm: Any, name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True)
    x = torch.randn(2, 3, 32, 32)
    outs = model(x)
    assert [t.shape[1] for t in outs] == model.feature_info.channels()
    assert [32 // t.shape[2] for t in outs] == model.feature_info.reduction()
    last = timm.create_model(name, features_only=True, out_indices=(-1,))
    assert last.feature_info.channels() == model.feature_info.channels()[-1:]
    sum(t.sum() for t in outs).backward()


def test_features_are_what_the_model_computes(timm: Any) -> None:
    torch.manual_seed(0)
    extractor = timm.create_model("rk_densenet_40", features_only=True).eval()
    heard: list[Tensor] = []
    plain = rkfast.create_model("densenet-40", fused=False, num_classes=10).eval()
    plain.load_state_dict(extractor.body.state_dict(), strict=False)
    for info in plain.feature_info:  # type: ignore[union-attr]
        plain.get_submodule(info["module"]).register_forward_hook(lambda module, args, out: heard.append(out.clone()))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain(x)
        for ours, theirs in zip(extractor(x), heard, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_sizes_of_imagenet(timm: Any) -> None:
    with torch.device("meta"):
        model = timm.create_model("rk_densenet121", num_classes=0)
    assert model.default_cfg["num_classes"] == 1000
    assert model.default_cfg["input_size"] == (3, 224, 224)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert timm.get_pretrained_cfg("tsc_resnext50_32x4d").input_size == (3, 224, 224)
    assert timm.get_pretrained_cfg("tsc_densenet_40").input_size == (3, 32, 32)


def test_what_there_is_not(timm: Any) -> None:
    with pytest.raises(ValueError, match="pretrained: there are no weights of erknet_6x1_6x1_6x1"):
        timm.create_model("erknet_6x1_6x1_6x1", pretrained=True)
    with pytest.raises(TypeError, match=r"global_pool: not an option of erknet; supported are .*growth_rate"):
        timm.create_model("erknet_6x1_6x1_6x1", global_pool="max")


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    (
        ("timm", ("timm",), "timm"),
        ("lightning", ("lightning", "pytorch_lightning"), "lightning"),
        ("transformers", ("transformers",), "transformers"),
    ),
)
def test_a_missing_package_is_named(module: str, missing: tuple[str, ...], extra: str) -> None:
    hide = (
        "import importlib.util as u\nfind = u.find_spec\n"
        f"u.find_spec = lambda name, package=None: None if name in {missing} else find(name, package)\n"
    )
    code = f"{hide}import rkfast\ntry: import rkfast.{module}\nexcept rkfast.extras.MissingExtra as e: print(e)"
    assert python("-c", f"import rkfast.extras\n{code}").strip().endswith(f"pip install 'rkfast[{extra}]'")
