"""What is written besides the rows, which tests/train/test_engine.py has."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from rkfast.train import log


def row(step: int) -> tuple[dict[str, Any], dict[str, Any]]:
    metrics = {"epoch": step, "step": step, "train_loss": 1 / 3, "test_loss": None, "step_sizes": {"a": 0.5}}
    return metrics, {"epoch": step, "step": step, "seconds": 0.25}


def test_a_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    written = log.Log(tmp_path, 0, 2, "tiny")
    written.step(1, 1)
    written.row(*row(1))
    written.step(2, 2)
    written.close()
    printed = capsys.readouterr().err
    assert "tiny" in printed and "2/2" in printed and "epoch 1, train_loss 0.3333, step_sizes/a 0.5" in printed


def test_lines_within_a_long_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((0.0, 1.0, 31.0, 32.0, 62.0))
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    written = log.Log(tmp_path, 0, 4, "tiny")
    for step in (1, 2, 3, 4):
        written.step(step, 1)
    assert capsys.readouterr().err == "epoch 1, step 2 of 4\n"


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    written = log.Log(tmp_path, 0, 3, "tiny")
    for step in (1, 2):
        written.row(*row(step))
    written.close()
    again = log.Log(tmp_path, 1, 3, "tiny")  # of which step 2 is done again
    again.row(*row(2))
    again.close()
    found = EventAccumulator(str(tmp_path / log.TENSORBOARD)).Reload()
    assert set(found.Tags()["scalars"]) == {"epoch", "step", "train_loss", "step_sizes/a", "seconds"}
    assert [event.step for event in found.Scalars("train_loss")] == [1, 2]


def test_what_is_no_number_is_empty_in_the_table(tmp_path: Path) -> None:
    written = log.Log(tmp_path, 0, 1, "tiny")
    written.row(*row(1))
    assert (tmp_path / log.CSV).read_text() == "epoch,step,train_loss,test_loss\n1,1,0.3333333333333333,\n"
    with pytest.raises(ValueError, match="not JSON compliant"):
        written.row({"epoch": 2, "step": 2, "train_loss": float("nan")}, {"step": 2})
