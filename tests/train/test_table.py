"""``rkfast table`` as a user runs it: rows are trained once, and written beside the published errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from rkfast import cli
from rkfast.commands import table
from rkfast.train.recipes import Recipe


class Trained(NamedTuple):
    error: float
    best: float


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, Path, dict[str, Any]]]:
    """What the engine was asked to train, which it then did not."""
    calls: list[tuple[Recipe, Path, dict[str, Any]]] = []

    def train(recipe: Recipe, out: Path, **options: Any) -> Trained:
        calls.append((recipe, out, options))
        if "tsc" in recipe.model and recipe.epochs == 13:
            raise RuntimeError("the loss is nan")
        out.mkdir(parents=True, exist_ok=True)
        return Trained(7.25, 7.125)

    monkeypatch.setitem(sys.modules, "rkfast.train.engine", SimpleNamespace(train=train))
    return calls


def test_rows_are_trained_once(trained: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["table", "rknet/t1", "--out", str(tmp_path), "--seed", "3", "--amp", "bf16"]
    assert cli.main([*command, "--only", "erknet-6", "irknet"]) == 0
    assert [recipe.name for recipe, _, _ in trained] == [
        f"rknet/t1/{short}" for short in ("erknet-6", "irknet-3", "irknet-4_3_3", "irknet-4_4_3", "irknet-4")
    ]
    assert trained[0][1] == tmp_path / "rknet/t1/erknet-6" / "300-3-auto-bf16"
    assert trained[0][2]["seed"] == 3 and trained[0][2]["amp"] == "bf16"
    line = " | ".join(
        ["| rknet/t1/erknet-6", "erknet-6x1_6x1_6x1 drop_rate=0.2", "cifar10", "300", "7.08", "7.25", "7.12"]
    )
    line += " | 3, auto, bf16 |"
    assert line in capsys.readouterr().out.splitlines()
    assert line in (tmp_path / table.PAGE).read_text().splitlines()
    assert cli.main(command) == 0  # the rest
    assert len(trained) == len(list(table.wanted("rknet/t1", None, None))) == 8
    rows = json.loads((tmp_path / table.FILE).read_text())
    assert len(rows) == 8 and {row["error"] for row in rows} == {7.25}
    assert cli.main([*command, "--epochs", "20"]) == 0  # others
    assert len(trained) == 16 and trained[-1][0].milestones == (10, 15)
    assert "| 20 of 300 |" in (tmp_path / table.PAGE).read_text()
    assert cli.main([*command, "--epochs", "20"]) == 0
    assert len(trained) == 16


def test_what_fails_leaves_the_rest(trained: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["table", "tsc/t5", "--only", "c10+", "--epochs", "13", "--out", str(tmp_path)]
    assert cli.main(command) == 1
    assert "tsc/t5/tsc_densenet-40/c10+: the loss is nan" in capsys.readouterr().err
    assert [row["recipe"]["model"] for row in json.loads((tmp_path / table.FILE).read_text())] == [
        "densenet-40", "cliquenet-12",
    ]  # fmt: skip
    assert cli.main(command) == 1 and len(trained) == 6  # those that failed, again


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["rknet/t9"], "there is no 'rknet/t9'"),
        (["rknet/t1", "--only", "densenet"], "--only: densenet is in none of rknet/t1/erknet-6, "),
        (["rknet/t1", "--epochs", "0"], "epochs: expected 1 to"),
        (["rknet/t1"], "is not what rkfast table writes"),
    ),
)
def test_what_is_refused(
    arguments: list[str], message: str, trained: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / table.FILE).write_text("[3]")
    assert cli.main(["table", *arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not trained


def test_results_of_others_are_not_taken(
    trained: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"recipe": {"name": "digits", "model": "resnet-8"}, "settings": {}, "error": 1.0, "best": 1.0}
    assert table.page([row | {"settings": {"seed": 0, "fused": "auto", "amp": "fp32"}}])
    for change in ({"recipe": {"name": "of another version", "model": "resnet-8"}}, {"recipe": 3}, {"more": 1}):
        (tmp_path / table.FILE).write_text(json.dumps([row | change]))
        assert cli.main(["table", "digits", "--out", str(tmp_path)]) == 2
        assert "take another folder" in capsys.readouterr().err
    assert not trained


def test_a_real_table(tmp_path: Path) -> None:
    pytest.importorskip("rkfast.train.engine")
    for module in ("sklearn", "torchmetrics", "rich", "safetensors"):
        pytest.importorskip(module)
    command = ["table", "digits", "--only", "erknet", "--out", str(tmp_path), "--epochs"]
    assert cli.main([*command, "1"]) == 0
    assert cli.main([*command, "2"]) == 0
    written = (tmp_path / table.FILE).read_bytes()
    _, row = json.loads(written)
    assert row["recipe"]["name"] == "digits/erknet" and 0 < row["best"] <= row["error"] < 91
    assert "2 of 12" in (tmp_path / table.PAGE).read_text()
    assert cli.main([*command, "2"]) == 0
    assert (tmp_path / table.FILE).read_bytes() == written
