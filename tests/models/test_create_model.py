"""create_model and list_models over all families; each family's own test has its options and what it refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import rkfast
from rkfast.models import ImageModel
from tests.models.tester import on_meta


def test_every_listed_model_is_built() -> None:
    names = rkfast.list_models()
    assert len(names) == len(set(names)) == 99
    for name in names:
        model = on_meta(name)
        assert isinstance(model, ImageModel)
        assert not any(getattr(module, "fused", False) for module in model.modules())
        with torch.device("meta"):
            fused = rkfast.create_model(name)
        assert fused.fused
        assert {k: v.shape for k, v in fused.state_dict().items()} == {
            k: v.shape for k, v in model.state_dict().items()
        }


def test_the_docstring_names_every_option() -> None:
    text = rkfast.create_model.__doc__ or ""
    for name in (
        "ho_resnet-10",
        "erknet-1x1",
        "irknet-2x1",
        "rknet-1x1",
        "rkcnn-i-2",
        "densenet-40",
        "cliquenet",
        "tsc_resnet-8",
    ):
        with pytest.raises(TypeError, match="nothing: not an option of") as caught:
            rkfast.create_model(name, nothing=0)
        options = re.sub(".* are ", "", str(caught.value)).split(", ")
        assert len(options) >= 5
        for option in options:
            assert re.search(rf"``{option}\b", text), option


def test_options_of_all() -> None:
    for name, options in (
        ("ho_resnet-10", {"width": 4}),
        ("erknet-1x1", {"growth_rate": 4}),
        ("irknet-2x1", {"growth_rate": 4}),
        ("rknet-1x1", {"growth_rate": 4}),
        ("rkcnn-i-2", {"growth_rate": 4}),
        ("densenet-7", {"growth_rate": 4}),
        ("densenet121", {"growth_rate": 2, "init_channels": 4}),
        ("cliquenet-6", {"growth_rate": 4}),
        ("resnet-8", {"shortcut": "a"}),
        ("resnet18", {}),
        ("seresnet50", {"stride_in_1x1": True}),
    ):
        with torch.device("meta"):
            out = rkfast.create_model(name, num_classes=3, in_chans=2, **options)(torch.empty(5, 2, 32, 32))
        assert out.shape == (5, 3), name


@pytest.mark.parametrize(
    ("name", "error", "message"),
    (
        (None, TypeError, "name: expected a str, got NoneType"),
        ("", ValueError, "name: '' is not a model; expected one of the families ho_resnet, revnet"),
        ("resnet19", ValueError, r"name: 'resnet19' is not a model; expected resnet<18\|34"),
        ("__import__('os')", ValueError, "is not a model"),
        ("erknet-" + "9" * 10_000, ValueError, "is not a model"),
        ("ﬀ", ValueError, "is not a model"),
        ("r\N{KELVIN SIGN}cnn-e-5_5", ValueError, "is not a model"),
    ),
)
def test_bad_names(name: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        rkfast.create_model(name)
    assert len(str(caught.value)) < 400


def test_unfused_models_are_stock() -> None:
    """No operation of ours runs in them."""
    served = rkfast.dispatch.served()
    for name in ("erknet-2x1", "irknet-2x1-ab", "rkcnn-r-2", "densenet-7", "cliquenet-6-c"):
        model = rkfast.create_model(name, growth_rate=4, fused=False)
        model(torch.randn(2, 3, 16, 16)).sum().backward()
        assert isinstance(model, nn.Module)
    assert rkfast.dispatch.served() == served
