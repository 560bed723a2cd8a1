"""Trainings whose losses must fall alike, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from rkfast.bench import curve

TINY = ("--size", "tiny", "--device", "cpu", "--steps", "60")


def trained(folder: Path, *args: str, status: int = 0) -> dict[str, Any]:
    assert curve.main([*TINY, "--json", str(folder / "found.json"), *args]) == status
    (network,) = json.loads((folder / "found.json").read_text())["networks"]
    return network


def test_fused_falls_as_stock_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = trained(tmp_path)
    assert network["steps"] == 60
    assert set(network["curves"]) == {"fused", *curve.STOCK}
    assert 0 < network["apart"] <= 2 * network["stock_apart"]
    assert capsys.readouterr().out.rstrip().endswith("| yes |")


@pytest.mark.parametrize("spoilt", ("gradient", "eps"))
def test_a_training_that_goes_astray_is_told(
    spoilt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = curve.Training.__init__

    def spoil(training: curve.Training, case: Any, model: nn.Module, name: str) -> None:
        if name == curve.FUSED:
            kind = nn.Conv2d if spoilt == "gradient" else nn.BatchNorm2d
            last = [m for m in model.modules() if isinstance(m, kind)][-1]
            if isinstance(last, nn.BatchNorm2d):
                last.eps = 0.1
            else:
                last.weight.register_hook(lambda gradient: gradient / 2)
        start(training, case, model, name)

    monkeypatch.setattr(curve.Training, "__init__", spoil)
    network = trained(tmp_path, status=1)
    assert network["apart"] > 2 * network["stock_apart"] and not network["alike"]
    assert capsys.readouterr().out.rstrip().endswith("| **no** |")


def test_a_training_that_learns_nothing_or_breaks_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(curve.SGD, "lr", 0.0)
    network = trained(tmp_path, "--steps", "20", status=1)
    assert not network["learned"]
    monkeypatch.setitem(curve.SGD, "lr", -1.0)
    assert trained(tmp_path, status=1)["failure"].startswith("ValueError: Invalid learning rate")


def test_the_nearest_stock_training_counts_and_any_window() -> None:
    flat = [2.0] * 50 + [1.0] * 50
    bump = [2.0] * 40 + [2.5] * 10 + [1.0] * 50
    losses = dict(zip(("fused", *curve.STOCK), (bump, flat, [x + 0.1 for x in flat], flat), strict=True))
    found = curve.compared(losses)
    assert found["apart"] == pytest.approx(0.4) and found["stock_apart"] == pytest.approx(0.1)
    assert found["learned"] and not found["alike"]


def test_a_family_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        curve.main(["vgg", *TINY])
    assert "'vgg' is no family of models; there are densenet" in capsys.readouterr().err
