"""``rkfast plot steps``: what is drawn is what was recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rkfast import cli, tsc
from rkfast.plot import look, steps
from rkfast.tsc import StepHistory
from tests.tsc.nets import attached

pytest.importorskip("matplotlib")


def recorded() -> StepHistory:
    model, history = attached("basic"), StepHistory()
    for epoch in (1, 2, 4):
        history(model, epoch)
        with torch.no_grad():
            for p in model.tsc.parameters():
                p.add_(0.1)
    return history


def test_a_line_for_each_block() -> None:
    history = recorded()
    axes = look.figure(3, 3).subplots()
    steps.draw(history.steps, axes)
    lines = axes.get_lines()
    for i, line in enumerate(lines):
        assert list(line.get_xdata()) == [0, 1, 2]
        assert list(line.get_ydata()) == [record.blocks[i].mean for record in history.steps]
    assert len(lines) == 5
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["layer1, 3 blocks", "layer2, 2 blocks"]
    assert len({line.get_color() for line in lines}) == 2
    (axes,) = steps.draw(history.steps, None, history.at).axes
    assert list(axes.get_lines()[0].get_xdata()) == [1, 2, 4]


def test_one_record_is_drawn_block_by_block() -> None:
    found = tsc.steps(attached("basic"))
    (axes,) = steps.draw([found]).axes
    values = [v for line in axes.get_lines() for v in line.get_ydata()]
    places = [v for line in axes.get_lines() for v in line.get_xdata()]
    assert values == [block.mean for block in found.blocks] and places == [0, 1, 2, 3, 4]
    ends = [path[:, 1].tolist() for ranges in axes.collections for path in ranges.get_segments()]
    assert ends == [[block.min, block.max] for block in found.blocks]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "steps.json", tmp_path / "a.png"
    recorded().save(file)
    assert cli.main(["plot", "steps", str(file), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    StepHistory().save(file)
    for name, message in (("steps.json", "nothing was recorded in it"), ("none.json", "cannot be read")):
        assert cli.main(["plot", "steps", str(tmp_path / name), "--out", str(tmp_path / "b.png")]) == 2
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "steps.json"]


def test_what_cannot_be_drawn() -> None:
    history = recorded()
    with pytest.raises(ValueError, match="steps: there is nothing to draw"):
        steps.draw([])
    with pytest.raises(ValueError, match=r"steps: \[1\] has other blocks than \[0\]"):
        steps.draw([history.steps[0], tsc.steps(attached("bottleneck"))])
    with pytest.raises(ValueError, match="at: expected 3, one for each record, got 1"):
        steps.draw(history.steps, None, [1])
