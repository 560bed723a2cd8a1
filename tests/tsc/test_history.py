"""StepHistory: what it records, and that a file of it holds the same."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rkfast import tsc
from rkfast.tsc import StepHistory
from tests.tsc.nets import attached, made


def test_records_and_files(tmp_path: Path) -> None:
    model, history, file = attached("basic"), StepHistory(), tmp_path / "steps.json"
    expected = []
    for at in (None, 2.5):
        expected.append(tsc.steps(model))
        assert history(model, at).evolution_time == expected[-1].evolution_time
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
    assert len(history) == 2 and history.at == [0, 2.5]
    assert history.steps[0].evolution_time != history.steps[1].evolution_time
    history.save(file)
    read = StepHistory.load(file)
    assert read.at == history.at
    for found in (history, read):
        for record, truth in zip(found.steps, expected, strict=True):
            assert record.evolution_time == truth.evolution_time
            for block, other in zip(record.blocks, truth.blocks, strict=True):
                assert block[:4] == other[:4] and torch.equal(block.sizes, other.sizes)
    assert json.loads(file.read_text())["blocks"][0] == "layer1.0"
    assert list(tmp_path.iterdir()) == [file]


def test_nothing_is_recorded_of_what_is_wrong(tmp_path: Path) -> None:
    history, model = StepHistory(), attached("basic")
    history(model)
    with pytest.raises(ValueError, match="model: its blocks are others"):
        history(attached("bottleneck"))
    with pytest.raises(ValueError, match="model: no step sizes are attached"):
        history(made("basic"))
    with pytest.raises(ValueError, match="at: expected a finite number, got nan"):
        history(model, math.nan)
    with pytest.raises(TypeError, match="at: expected a number, got str"):
        history(model, "3")  # type: ignore[arg-type]
    assert len(history) == len(history.at) == 1
    history.save(tmp_path / "steps.json")
    with pytest.raises(OSError):
        history.save(tmp_path / "none" / "steps.json")
    assert [p.name for p in tmp_path.iterdir()] == ["steps.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    (
        ("{", "is no JSON: "),
        ("[]", "is not what rkfast.tsc.StepHistory.save writes"),
        ('{"blocks": ["a"], "records": [{"at": 0, "sizes": []}]}', "is not what"),
        ('{"blocks": ["a"], "records": [{"at": 0, "sizes": [["b"]]}]}', "is not what"),
        ('{"blocks": ["a"], "records": [{"at": 0, "sizes": [[]]}]}', "is not what"),
        ('{"blocks": ["a"], "records": [{"sizes": [[1.0]]}]}', "is not what"),
        ('{"blocks": [3], "records": []}', "is not what"),
    ),
)
def test_bad_files_are_named(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "steps.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"{file} {message}"):
        StepHistory.load(file)
    with pytest.raises(ValueError, match=r"none\.json cannot be read"):
        StepHistory.load(tmp_path / "none.json")
