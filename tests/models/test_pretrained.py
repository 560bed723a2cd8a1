"""rkfast.save_pretrained and from_pretrained: what is written is what is read, and nothing is unpickled."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rkfast
from rkfast import extras

safetensors = pytest.importorskip("safetensors.torch")

MODELS: list[tuple[str, dict[str, Any]]] = [
    ("resnet-8", {"shortcut": "a", "num_classes": 3}),
    ("HO_ResNet-10", {"width": 8, "method": "rk4", "learn": ("b", "h")}),
    ("erknet-1x1_1x1", {"growth_rate": (4, 6)}),
    ("irknet-2x1_2x1-ab", {"growth_rate": 6}),
    ("tsc_resnet-8", {"controller": "lstm"}),
    ("densenet-10", {"growth_rate": 4}),
]


def made(name: str = "resnet-8", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = rkfast.create_model(name, **options)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(0.01 * torch.rand_like(tensor)) if tensor.is_floating_point() else tensor.add_(3)
    return model.eval()


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "options"), MODELS)
def test_round_trip(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model, x = made(name, **options), torch.randn(2, 3, 16, 16)
    folder = tmp_path / "a" / "b"
    rkfast.save_pretrained(model, folder)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    twin = rkfast.from_pretrained(folder)
    assert torch.equal(torch.rand(1), expected)  # the caller's generator is where it was
    assert type(twin) is type(model) and not twin.training
    assert_same(twin, model)
    assert torch.equal(twin(x), model(x))
    stock = rkfast.from_pretrained(folder, fused=False, memory="min")
    assert not stock.fused
    torch.testing.assert_close(stock(x), model(x))


def test_config_disturbs_nothing() -> None:
    model = made("resnet-8", num_classes=3)
    assert model.config == {"name": "resnet-8", "options": {"num_classes": 3}}
    assert not [key for key in model.state_dict() if "config" in key]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), rkfast.fuse(copy.deepcopy(model))):
        assert twin.config == model.config
    given: dict[str, Any] = {"num_classes": 3}
    assert rkfast.create_model("resnet-8", **given).reset_classifier(7) is None and given == {"num_classes": 3}  # type: ignore[operator]


def test_the_classifier_that_is_there_now(tmp_path: Path) -> None:
    model = made("resnet-8")
    model.reset_classifier(7)  # type: ignore[operator]
    rkfast.save_pretrained(rkfast.fuse(model), tmp_path)
    assert_same(rkfast.from_pretrained(tmp_path), model)


def test_dtypes(tmp_path: Path) -> None:
    model = made("densenet-10", growth_rate=4).bfloat16()
    rkfast.save_pretrained(model, tmp_path)
    twin = rkfast.from_pretrained(tmp_path)
    assert_same(twin, model)
    wide = rkfast.from_pretrained(tmp_path, made("densenet-10", growth_rate=4).double().train())
    assert wide.training and next(wide.parameters()).dtype == torch.double
    torch.testing.assert_close(wide.bfloat16().state_dict(), model.state_dict())


class Tied(nn.Module):
    """A weight in two places, a view of another, channels_last, and nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("view", self.a.weight.detach()[1:])
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.register_buffer("nothing", torch.empty(0))


def test_weights_alone_and_shared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, twin = Tied(), Tied()
    rkfast.save_pretrained(model, tmp_path)
    assert "b.weight" not in safetensors.load_file(tmp_path / "model.safetensors")
    assert rkfast.from_pretrained(tmp_path, twin) is twin
    assert_same(twin, model)
    assert twin.b.weight is twin.a.weight
    with pytest.raises(ValueError, match=r"config\.json names no network, there are the weights alone; give a model"):
        rkfast.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", ("restack", "fold", "head", "attach"))
def test_a_changed_network_has_no_name(change: str, tmp_path: Path) -> None:
    model = made("resnet-20")
    if change == "restack":
        model = rkfast.restack(made("ho_resnet-10", method="euler", width=8), "midpoint")
    elif change == "fold":
        model = rkfast.fold(model)
        model(torch.randn(1, 3, 8, 8))
    elif change == "head":
        model.fc = nn.Linear(64, 4)
    else:
        rkfast.tsc.attach(model)
    with pytest.warns(UserWarning, match="no longer what create_model"):
        rkfast.save_pretrained(model, tmp_path)
    twin = copy.deepcopy(model)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data.zero_()
    assert_same(rkfast.from_pretrained(tmp_path, twin), model)


def test_errors(tmp_path: Path) -> None:
    model = made("resnet-8")
    before = copy.deepcopy(model.state_dict())
    good = tmp_path / "good"
    rkfast.save_pretrained(model, good)
    file = tmp_path / "file"
    file.write_text("")

    class Extra(nn.Module):
        def get_extra_state(self) -> Any:
            return {1}

        def set_extra_state(self, state: Any) -> None: ...

    save, load, deeper = rkfast.save_pretrained, rkfast.from_pretrained, made("resnet-14")
    cases: list[tuple[Any, tuple[Any, ...], type[Exception], str]] = [
        (save, (3, tmp_path), TypeError, r"model: expected an nn\.Module, got int"),
        (save, (model, 3), TypeError, "folder: expected a path, got int"),
        (save, (model, file), ValueError, "folder: .* is a file"),
        (save, (Extra(), tmp_path), TypeError, "model: _extra_state is set"),
        (save, (nn.Linear(2, 2, device="meta"), tmp_path), TypeError, "weight is on the meta"),
        (load, (3,), TypeError, "folder: expected a path, got int"),
        (load, (good, "resnet-8"), TypeError, r"model: expected an nn\.Module or None, got str"),
        (load, (tmp_path / "no",), ValueError, r"folder: there is no config\.json in "),
        (load, (tmp_path, model), ValueError, r"folder: there is no model\.safetensors in "),
        (load, (good, deeper), ValueError, r"has no layer1\.1\.\S+, .* and \d+ more"),
        (load, (good, nn.Linear(2, 2)), ValueError, "has no weight, bias and has bn1.bias, .* besides"),
        (load, (good, made("resnet-8", num_classes=3)), ValueError, r"fc\.weight is \[10, 64\]"),
    ]
    for call, args, error, message in cases:
        with pytest.raises(error, match=message):
            call(*args)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "good"]


def test_damaged_files(tmp_path: Path) -> None:
    rkfast.save_pretrained(made("resnet-8"), tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good, tensors = json.loads(config.read_text()), weights.read_bytes()
    for text, message in (
        ("{", r"config\.json is no JSON"),
        ("[1]", "is none that this rkfast wrote"),
        (json.dumps(good | {"rkfast": 99}), "expected version 1"),
        (json.dumps(good | {"name": "erknet-99999999x1"}), r"config\.json: name: "),
        (json.dumps(good | {"name": 3}), "expected a name and options"),
        (json.dumps(good | {"options": {"color": 1}}), r"config\.json: color: not an option of resnet"),
        (json.dumps(good | {"options": {"fused": False}}), r"config\.json: fused: not an option"),
        (" " * (1 << 20) + "{}", "is larger than"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            rkfast.from_pretrained(tmp_path)
    config.write_text(json.dumps(good))
    for damaged in (tensors[:100], b"", pickle.dumps({"a": 1})):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            rkfast.from_pretrained(tmp_path)


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("resnet-8")
    rkfast.save_pretrained(model, tmp_path)

    def fails(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(safetensors, "save_file", fails)
    with pytest.raises(OSError, match="no space left"):
        rkfast.save_pretrained(made("resnet-8", num_classes=3), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert_same(rkfast.from_pretrained(tmp_path), model)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    for call in (lambda: rkfast.save_pretrained(model, tmp_path), lambda: rkfast.from_pretrained(tmp_path)):
        with pytest.raises(extras.MissingExtra, match=r"safetensors is not installed; .*'rkfast\[hub\]'"):
            call()
