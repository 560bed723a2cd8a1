"""``rkfast plot stacking``, made small: what it trains, what it does not train again, and what it draws."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from rkfast import cli
from rkfast.plot import stacking, training
from tests.plot.digits import made_few

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


class Bar:
    n = 0

    def update(self) -> None:
        self.n += 1


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacking, "METHODS", {"euler": "Euler", "rk8": "RK8"})
    monkeypatch.setattr(stacking, "LAYERS", 30)
    monkeypatch.setattr(stacking, "WIDTH", 4)
    made_few(monkeypatch)


def plotted(folder: Path, *arguments: str, status: int = 0) -> list[dict[str, Any]]:
    file = folder / "runs.json"
    command = ["plot", "stacking", "--epochs", "1", "--results", str(file), "--out", str(folder / "figure.svg")]
    assert cli.main([*command, *arguments]) == status
    return json.loads(file.read_text()) if file.exists() else []


def test_trains_only_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new"
    records = plotted(folder, "--lr", "0.05", "--target", "0")
    assert [(r["settings"]["method"], r["settings"]["lr"]) for r in records] == [("euler", 0.05), ("rk8", 0.05)]
    for record in records:
        (epoch,) = record["epochs"]
        assert epoch.keys() == {"seconds", *stacking.CURVES}
        assert epoch["seconds"] > 0 and 0 < epoch["test_accuracy"] < 1 and 1 < epoch["train_loss"] < 4
    printed = capsys.readouterr()
    assert "Euler x14" in printed.err and "RK8 x1" in printed.err and "learning rate 0.05" in printed.err
    figure = (folder / "figure.svg").read_bytes()
    assert figure.startswith(b"<?xml")

    again = plotted(folder, "--lr", "0.05")
    assert again == records
    assert "learning rate 0.05" not in capsys.readouterr().err
    monkeypatch.setattr(stacking, "METHODS", {"euler": "Euler"})
    more = plotted(folder, "--lr", "0.05", "0.01")
    assert more[:2] == records
    assert [(r["settings"]["method"], r["settings"]["lr"]) for r in more[2:]] == [("euler", 0.01)]
    other = plotted(folder, "--lr", "0.05", "--seed", "1")
    assert other[:3] == more and len(other) == 4
    assert sorted(p.name for p in folder.iterdir()) == ["figure.svg", "runs.json"]


def test_seeds_decide_weights_and_order() -> None:
    args = argparse.Namespace(epochs=1, device="cpu")
    curves = []
    for args.seed in (0, 0, 1):
        (found,) = training.train([stacking.settings("euler", 0.1, args)], torch.device("cpu"), Bar())
        (epoch,) = found["epochs"]
        curves.append([epoch[curve] for curve in stacking.CURVES])
    assert curves[0] == curves[1] != curves[2]


def record(method: str, lr: float, seconds: list[float], accuracies: list[float], epochs: int = 3) -> dict[str, Any]:
    return {
        "settings": {"method": method, "lr": lr, "epochs": epochs},
        "hardware": "cpu",
        "epochs": [
            {"seconds": s, "train_accuracy": a, "test_accuracy": a / 2, "train_loss": 1 - a, "test_loss": 2 - a}
            for s, a in zip(seconds, accuracies, strict=True)
        ],
    }


def test_draws_what_was_recorded() -> None:
    records = [
        record("euler", 0.1, [1, 2, 3], [0.5, 0.8, 0.9]),
        record("rk8", 0.1, [2, 4, 6], [0.7, 0.9, 0.95]),
        record("euler", 0.5, [], []),
        record("rk8", 0.5, [2, 4], [0.2, 0.1]),
    ]
    assert stacking.time_to(records[0], "train_accuracy", 0.8) == 2
    assert stacking.time_to(records[0], "test_accuracy", 0.8) is None
    figure = stacking.draw(records, 0.8)
    assert len(figure.axes) == 2 * 5
    lines = {line.get_label(): line for line in figure.axes[2].get_lines()}
    assert lines.keys() == {"Euler x14", "RK8 x1"}
    assert lines["RK8 x1"].get_ydata() == pytest.approx([0.3, 0.1, 0.05])
    assert list(lines["RK8 x1"].get_xdata()) == [1, 2, 3]
    assert figure.axes[2].get_title() == "training loss, learning rate 0.1"
    texts = [text.get_text() for text in figure.axes[4].texts]
    assert texts == ["train: 2.0 s", "test: not reached", "train: 4.0 s", "test: not reached"]
    assert {line.get_label() for line in figure.axes[5].get_lines()} == {"Euler x14, diverged", "RK8 x1, diverged"}
    table = stacking.table(records, 0.8).splitlines()
    assert table[2].split() == ["0.1", "RK8", "x1", "0.4750", "2.00", "4.0"]
    assert table[3].split() == ["0.5", "Euler", "x14,", "diverged"]


def test_a_training_that_diverges_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the other goes on."""
    step = training.Training.step
    steps: list[str] = []

    def broken(self: training.Training, *args: torch.Tensor) -> None:
        before = self.seconds
        step(self, *args)
        steps.extend([self.settings["method"]] * (self.seconds > before))
        if self.settings["method"] == "euler" and len(self.epochs) == 1:
            self.model.fc.bias.data.fill_(math.nan)

    monkeypatch.setattr(training.Training, "step", broken)
    args, bar = argparse.Namespace(epochs=4, seed=0, device="cpu"), Bar()
    found = training.train([stacking.settings(m, 0.1, args) for m in ("euler", "rk8")], torch.device("cpu"), bar)
    assert [len(record["epochs"]) for record in found] == [1, 4] and bar.n == 4
    assert steps[:4] == ["euler", "rk8", "rk8", "euler"]
    assert steps.count("euler") == steps.count("rk8") // 2  # the second epoch, and no more
    seconds = [epoch["seconds"] for epoch in found[1]["epochs"]]
    assert seconds == sorted(seconds) and len(set(seconds)) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    (
        ("{", "is no JSON: "),
        ("{}", "expected a list of what rkfast plot stacking has trained"),
        ("[3]", r"[0] is not what rkfast plot stacking writes"),
        ('[{"model": "densenet-7", "error": 3}]', "[0] is not what rkfast plot stacking writes"),
        ('[{"settings": {}, "epochs": [{"seconds": 1}]}]', "[0] is not what rkfast plot stacking writes"),
    ),
)
def test_bad_results_are_named(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.json"
    file.write_text(content)
    assert cli.main(["plot", "stacking", "--results", str(file), "--out", str(tmp_path / "a.png")]) == 2
    printed = capsys.readouterr().err
    assert f"rkfast plot: --results {file}" in printed and message in printed
    assert file.read_text() == content
    assert list(tmp_path.iterdir()) == [file]


def test_bad_arguments_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is trained."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--out", str(tmp_path / "a.gif")], "expected a name that ends in"),
        (["--out", str(tmp_path / "file" / "a.png")], "cannot be written"),
        (["--results", str(tmp_path / "file" / "a.json"), "--out", str(tmp_path / "a.png")], "cannot be written"),
        (["--device", "gpu", "--out", str(tmp_path / "a.png")], "device"),
    ):
        assert cli.main(["plot", "stacking", *arguments]) == 2
        assert message in capsys.readouterr().err
    for arguments in (["--lr", "0"], ["--target", "85"], ["--epochs", "0"], ["--dataset", "cifar10"]):
        with pytest.raises(SystemExit):
            cli.main(["plot", "stacking", *arguments])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
