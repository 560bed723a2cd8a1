"""``rkfast plot depth``, made small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rkfast import cli
from rkfast.plot import depth
from tests.plot.digits import made_few

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


def test_trains_only_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_few(monkeypatch)
    command = ["plot", "depth", "--epochs", "1", "--out", str(tmp_path / "new" / "figure.svg")]
    assert cli.main([*command, "--depths", "8"]) == 0
    file = tmp_path / "new" / "figure.json"
    records = json.loads(file.read_text())
    assert [r["settings"]["model"] for r in records] == ["resnet-8", "tsc_resnet-8"]
    assert all(0 < r["epochs"][0]["test_accuracy"] < 1 for r in records)
    assert records[0]["epochs"][0]["train_loss"] != records[1]["epochs"][0]["train_loss"]
    assert (tmp_path / "new" / "figure.svg").read_bytes().startswith(b"<?xml")
    table = capsys.readouterr().err
    assert "8 layers" in table and "TSC-ResNet" in table
    assert cli.main([*command, "--depths", "14", "8", "14"]) == 0
    printed = capsys.readouterr().err
    assert "14 layers:" in printed and "8 layers:" not in printed
    more = json.loads(file.read_text())
    assert more[:2] == records and [r["settings"]["model"] for r in more[2:]] == ["resnet-14", "tsc_resnet-14"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["figure.json", "figure.svg"]


def record(model: str, accuracies: list[float]) -> dict[str, Any]:
    return {
        "settings": {"model": model, "epochs": 2},
        "hardware": "cpu",
        "epochs": [
            {"seconds": 2.0 * (i + 1), "test_accuracy": a, "test_loss": 1 - a} for i, a in enumerate(accuracies)
        ],
    }


def test_draws_what_was_recorded() -> None:
    records = [
        record("resnet-8", [0.5, 0.75]),
        record("tsc_resnet-8", [0.25, 0.5]),
        record("resnet-14", [0.9]),
        record("tsc_resnet-14", [0.5, 1.0]),
    ]
    figure = depth.draw(records)
    for axes, values in zip(figure.axes, ([0.75, 0.5, 1.0], [0.25, 0.5, 0.0]), strict=True):
        first, second = axes.get_lines()
        assert (first.get_label(), second.get_label()) == ("ResNet", "TSC-ResNet")
        assert list(first.get_xdata()) == list(second.get_xdata()) == [8, 14]
        assert first.get_ydata()[0] == values[0] and first.get_ydata()[1] != first.get_ydata()[1]
        assert list(second.get_ydata()) == values[1:]
    lines = depth.table(records).splitlines()
    assert lines[1].split() == ["8", "ResNet", "0.7500", "0.2500", "2.00"]
    assert lines[3].split() == ["14", "ResNet", "diverged", "2.00"]


@pytest.mark.parametrize("arguments", (["--depths", "9"], ["--depths", "2"], ["--lr", "0"], ["--epochs", "0"]))
def test_bad_arguments_are_named(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plot", "depth", *arguments, "--out", str(tmp_path / "a.png")])
    assert arguments[0] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
