"""``rkfast bench ADDRESS``: one network, whoever wrote it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import rkfast
from rkfast import cli, native
from rkfast.bench import models, page
from tests.bench.test_run import PEER, ROW

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        features = self.features(x)
        return {"features": features, "logits": self.drop(features).mean((2, 3)), "size": 3}
"""
QUICK = ("--threads", "1", "--seconds", "0", "--malloc", "current", "--device", "cpu")


@pytest.fixture
def address(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(NET)
    return f"{tmp_path / 'mine.py'}:Net"


def bench(address: str, *args: str, peers: str = "eager,eager_channels_last") -> int:
    return cli.main(["bench", address, "--batch", "2", "--size", "9", "--peers", peers, *QUICK, *args])


def test_tables_json_plot_and_page(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    files = {kind: tmp_path / f"found.{kind}" for kind in ("json", "png", "html", "md")}
    given = ("--json", files["json"], "--plot", files["png"], "--html", files["html"], "--markdown", files["md"])
    assert bench(address, *map(str, given), "--max-batch", "--channels-last", "--memory", "min") == 0
    out = capsys.readouterr().out
    document = json.loads(files["json"].read_text())
    assert document["network"]["address"] == address
    assert document["max_batch"]["fused"] >= document["max_batch"]["stock"] > 2
    assert all(set(row) == ROW and row["layout"] == "channels_last" for row in document["rows"])
    assert all(set(peer) == PEER for row in document["rows"] for peer in row["peers"].values())
    found = dict(zip(("train", "inference"), page.contenders(document).values(), strict=True))
    ours = ["rkfast, cpu, min memory" if native.cpu_reason() is None else "rkfast, min memory"]
    assert [each["name"] for each in found["train"]] == ["eager", "eager_channels_last", *ours]
    assert [each["name"] for each in found["inference"]][:3] == ["eager", "eager_channels_last", *ours]
    assert found["inference"][-1]["name"].endswith(" folded")
    for each in (*found["train"], *found["inference"]):
        assert each["ms_low"] <= each["ms_p50"] <= each["ms_high"]
        assert each["per_second"] == pytest.approx(2e3 / each["ms_p50"])
        assert each["first_s"] > 0
    assert found["train"][0]["times"] == 1
    assert out.strip() == files["md"].read_text().strip()
    assert len(re.findall(r"^\| rkfast, ", out, re.MULTILINE)) == 3
    assert "largest batch that can be trained here, estimated: stock" in out
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    text = files["html"].read_text()
    assert text.count('<tr class="ours">') == 3
    assert 'src="data:image/png;base64,iVBOR' in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)


def test_either_mode_alone_on_weights_of_ones_own(address: str, tmp_path: Path) -> None:
    found, weights = tmp_path / "found.json", tmp_path / "net.pt"
    space: dict[str, Any] = {}
    exec(NET, space)
    state = space["Net"]().state_dict()
    state["features.1.running_mean"] += 0.5
    torch.save(state, weights)
    for mode, name in (("--train", "train"), ("--infer", "inference")):
        assert bench(address, mode, "--weights", str(weights), "--json", str(found), peers="eager") == 0
        assert {row["case"] for row in json.loads(found.read_text())["rows"]} == {name}


def test_further_shapes(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "found.json"
    assert bench(address, "--infer", "--also", "1x7", "2x9", "3x6", "--json", str(found), peers="eager") == 0
    assert list(page.contenders(json.loads(found.read_text()))) == [
        f"Inference, {shape}, 1 threads" for shape in ("2×3×9×9", "1×3×7×7", "3×3×6×6")
    ]
    assert bench(address, "--also", "4") == 2
    assert "--also: expected a batch and pixels, such as 32x96, got '4'" in capsys.readouterr().err


def test_fused_and_compiled(address: str, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    assert bench(address, "--infer", "--json", str(found), peers="eager,compile") == 0
    fused, compiled, folded = json.loads(found.read_text())["rows"]
    assert compiled["backend"].endswith("compiled")
    assert folded["backend"].endswith("folded")
    assert compiled["first_s"] > fused["first_s"]
    assert fused["peers"]["compile"]["compile_s"] > 0


@pytest.mark.parametrize("mode", ("--train", "--infer"))
def test_a_wrong_result_has_no_figure(
    mode: str, address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = models.Networks._contender

    def wrong(*args: Any) -> models.Steps:
        steps = right(*args)
        steps.model.register_forward_hook(lambda module, given, out: {**out, "features": out["features"] * 1.0001})
        return steps

    monkeypatch.setattr(models.Networks, "_contender", wrong)
    assert bench(address, mode, peers="eager") == 1
    out = capsys.readouterr().out
    assert "**wrong, no figure**" in out
    assert "| rkfast" not in out


@pytest.mark.parametrize(
    ("args", "message"),
    (
        (("torchvisoin:resnet18",), "torchvisoin cannot be imported"),
        (("rkfast:densenet120",), "densenet121"),
        (("resnet",), "'resnet' is neither ops nor models nor an address"),
        (("rkfast:densenet-10", "erknet"), "'erknet': one network at a time"),
        (("rkfast:densenet-10", "--size", "small"), "--size: of a network expected a number of pixels, got 'small'"),
        (("rkfast:densenet-10", "--batch", "0"), "--batch: expected at least 1, got 0"),
        (("models", "--size", "32"), "--size: of models expected one of tiny, quick, full, got '32'"),
        (("ops", "--html", "page.html"), "--html: there is a page of a network only"),
    ),
)
def test_wrong_arguments(args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *args]) == 2
    assert message in capsys.readouterr().err


def test_max_batch_of_the_stock_network() -> None:
    model, x = rkfast.create_model("densenet-10", fused=False), torch.randn(2, 3, 8, 8)
    stock = rkfast.max_batch(model, x, budget=10**9, fused=False)
    assert stock == rkfast.max_batch(rkfast.fuse(model), x, budget=10**9, fused=False)
    assert stock < rkfast.max_batch(model, x, budget=10**9)
