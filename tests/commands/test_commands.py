"""``rkfast fuse-report``, ``verify``, ``profile`` and ``export`` as a user runs them, and the addresses of networks."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rkfast import cli, native
from rkfast.commands import network
from tests.libraries import library

SMALL = ("--batch", "2", "--size", "16")
DENSENET = ("rkfast:densenet-10", *SMALL, "--options", '{"num_classes": 5}')


def test_fuse_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.json"
    assert cli.main(["fuse-report", *DENSENET, "--memory", "min", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    rows = json.loads(file.read_text())
    assert len(rows) == len(out.splitlines()) - 1 > 3
    assert {"name", "kind", "layers", "fused", "reason", "saved"} == rows[0].keys()
    assert all(row["fused"] for row in rows)


def test_strict_report_of_what_is_not_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def net(act='ReLU'):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), getattr(nn, act)())\n"
        "class Number:\n    pass\n"
        "number = 3\n"
    )
    assert cli.main(["fuse-report", f"{file}:net", *SMALL, "--strict"]) == 0
    assert "1 of 1 sequences fused" in capsys.readouterr().out
    assert cli.main(["fuse-report", f"{file}:net", *SMALL, "--strict", "--options", '{"act": "SiLU"}']) == 1
    assert "2 is SiLU, not nn.ReLU" in capsys.readouterr().out
    for name, message in (
        ("number", "mine.py:number is int, expected a function"),
        ("Number", "mine.py:Number made Number, expected an nn.Module"),
        ("nett", "has no 'nett'; near are net"),
    ):
        assert cli.main(["verify", f"{file}:{name}", *SMALL]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(native.cpu_reason() is not None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("more", ((), ("--amp", "bf16"), ("--channels-last",)))
def test_verify(more: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", *DENSENET, *more]) == 0
    assert capsys.readouterr().out.rstrip().endswith("PASS")


def test_verify_fails_with_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rkfast.swap.dense import FusedDenseBlock

    right = FusedDenseBlock.fused
    monkeypatch.setattr(FusedDenseBlock, "fused", lambda self, found, x: 1.01 * right(self, found, x))
    monkeypatch.setattr(sys.modules["rkfast.swap.fuse"], "agrees", lambda *_: True)
    monkeypatch.setattr("rkfast.commands.network.find", lambda *_: _densenet())
    assert cli.main(["verify", "mine:densenet", *SMALL]) == 1
    assert capsys.readouterr().out.rstrip().endswith("FAIL")


def _densenet() -> nn.Module:
    from tests.swap.lookalikes import Block

    return nn.Sequential(nn.Conv2d(3, 8, 3), Block(2, 8, 4))


@pytest.mark.parametrize("mode", ("training step", "inference"))
def test_profile(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, trace = tmp_path / "rows.json", tmp_path / "trace.json"
    more = ["--infer"] if mode == "inference" else []
    assert cli.main(["profile", *DENSENET, *more, "--steps", "1", "--json", str(file), "--trace", str(trace)]) == 0
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["title"] == f"{mode}, 2x3x16x16 float32, cpu" == out.splitlines()[0]
    assert len(found["rows"]) == len(out.splitlines()) - 4
    for row in found["rows"]:
        assert {"milliseconds", "bytes", "calls"} == row["stock"].keys() == row["fused"].keys()
        assert row["kind"] in out
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"rkfast.profile: stock", "rkfast.profile: fused"} <= names


def test_profile_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", *DENSENET, "--steps", "0"]) == 2
    assert "rkfast profile: --steps: expected at least 1, got 0" in capsys.readouterr().err
    for option in ("--json", "--trace"):
        assert cli.main(["profile", *DENSENET, "--steps", "1", option, str(tmp_path / "none" / "file")]) == 1
        assert f"rkfast profile: {tmp_path / 'none'}" in capsys.readouterr().err


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net.pt2"
    assert cli.main(["export", *DENSENET, "--out", str(file)]) == 0
    out = torch.export.load(file).module()(torch.randn(2, 3, 16, 16))
    assert out.shape == (2, 5)
    assert cli.main(["export", *DENSENET, "--out", str(tmp_path / "net.txt")]) == 1
    assert "rkfast export: " in capsys.readouterr().err


def test_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = network.find("rkfast:resnet-8", {})
    torch.save(model.state_dict(), tmp_path / "net.pt")
    torch.save(model, tmp_path / "whole.pt")
    parser = argparse.ArgumentParser()
    network.add_arguments(parser)
    args = parser.parse_args(["rkfast:resnet-8", *SMALL, "--weights", str(tmp_path / "net.pt")])
    found, images = network.made(args)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))
    assert images.shape == (2, 3, 16, 16)
    for file in ("whole.pt", "none.pt"):  # nothing is unpickled
        assert cli.main(["verify", "rkfast:resnet-8", *SMALL, "--weights", str(tmp_path / file)]) == 2
        assert f"--weights: {tmp_path / file}: " in capsys.readouterr().err
    assert cli.main(["verify", "rkfast:resnet-14", *SMALL, "--weights", str(tmp_path / "net.pt")]) == 2
    assert "--weights: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["resnet18"], "'resnet18' is no address of a network; expected torchvision:NAME, timm:NAME, rkfast:NAME"),
        (["rkfast:densenet11"], "name: 'densenet11'"),
        (["nosuchpackage:net"], "nosuchpackage cannot be imported: No module named 'nosuchpackage'"),
        (["nosuchfile.py:net"], "nosuchfile.py: there is no such file"),
        (["rkfast:resnet-8", "--options", "3"], "--options: expected an object"),
        (["rkfast:resnet-8", "--options", "{"], "--options: '{' is no JSON"),
        (["rkfast:resnet-8", "--options", '{"depth": 3}'], "depth"),
        (["rkfast:resnet-8", "--batch", "0"], "--batch: expected at least 1, got 0"),
        (["rkfast:resnet-8", "--device", "gpu"], "--device: 'gpu' is not one, or not here"),
    ),
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("fuse-report", "verify", "profile"):
        assert cli.main([command, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"rkfast {command}: ")
        assert message in error
        assert "Traceback" not in error


def test_a_network_of_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    library("torchvision")
    assert isinstance(network.find("torchvision:resnet18", {"num_classes": 7}), nn.Module)
    with pytest.raises(ValueError, match=r"torchvision has no 'densenet12'; near are densenet121"):
        network.find("torchvision:densenet12", {})
