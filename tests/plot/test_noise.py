"""``rkfast plot noise``, made small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rkfast
from rkfast import cli, demo, ode
from rkfast.plot import noise
from tests.plot.digits import made_few

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


def test_trains_once_and_sweeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_few(monkeypatch)
    file = tmp_path / "runs.json"
    command = ["plot", "noise", "--epochs", "1", "--model", "tsc_resnet-8", "--results", str(file)]
    command += ["--out", str(tmp_path / "a.png"), "--sigmas", "1", "0"]
    assert cli.main(command) == 0
    records = json.loads(file.read_text())
    assert [(r["settings"]["controller"], r["settings"].get("value")) for r in records] == [
        ("fixed", 1.0),
        ("fixed", 0.01),
        ("lstm", None),
    ]
    for record in records:
        clean, noisy = record["noise"]
        (epoch,) = record["epochs"]
        assert (clean["sigma"], noisy["sigma"]) == (0.0, 1.0)
        assert clean["accuracy"] == pytest.approx(epoch["test_accuracy"])
        assert clean["loss"] == pytest.approx(epoch["test_loss"], rel=1e-4) and noisy["loss"] != clean["loss"]
    assert "dt = 0.01" in capsys.readouterr().err
    monkeypatch.setattr("rkfast.plot.training.train", None)
    assert cli.main(command) == 0
    assert json.loads(file.read_text()) == records
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "runs.json"]


def test_a_checkpoint_is_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_few(monkeypatch)
    torch.manual_seed(0)
    model = rkfast.create_model("resnet-8", in_chans=1)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    seen = []
    draw = noise.draw
    monkeypatch.setattr(noise, "draw", lambda *data: seen.append(data) or draw(*data))
    arguments = ["--model", "resnet-8", "--weights", str(tmp_path / "weights.pt"), "--sigmas", "0.5", "--size", "12"]
    assert cli.main(["plot", "noise", *arguments, "--seed", "3", "--out", str(tmp_path / "a.png")]) == 0
    _, test = demo.digits(3, torch.device("cpu"), 12)
    loader = zip(test[0].split(demo.BATCH), test[1].split(demo.BATCH), strict=True)
    (point,) = ode.noise_sweep(model, loader, [0.5], generator=torch.Generator().manual_seed(3))
    assert seen == [({"weights.pt": [point._asdict()]}, "resnet-8")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "weights.pt"]


def test_draws_what_was_found() -> None:
    found = {
        "TSC": [{"sigma": 0.0, "accuracy": 0.9, "loss": 0.1}, {"sigma": 2.0, "accuracy": 0.5, "loss": 3.0}],
        "b": [],
    }
    accuracy, loss = noise.draw(found, "title").axes
    assert list(accuracy.get_lines()[0].get_xdata()) == [0.0, 2.0]
    assert list(accuracy.get_lines()[0].get_ydata()) == [0.9, 0.5]
    assert list(loss.get_lines()[0].get_ydata()) == [0.1, 3.0]
    assert [line.get_label() for line in loss.get_lines()] == ["TSC", "b, diverged"]


@pytest.mark.parametrize("arguments", (["--sigmas", "-1"], ["--sigmas", "nan"], ["--sigmas", "inf"], ["--size", "0"]))
def test_bad_arguments_are_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plot", "noise", *arguments])
    assert arguments[0] in capsys.readouterr().err
