"""``rkfast plot figure4``: what it draws, and what it says of what it cannot read or write."""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from rkfast import cli, papers
from rkfast.papers import DATASETS
from rkfast.plot import figure4 as plot
from tests.package.process import python

GOOD = {"model": "irknet-3x1_3x1_3x1", "options": {"growth_rate": 4}, "dataset": "cifar10", "error": 9}


def written(folder: Path, value: Any) -> Path:
    file = folder / "results.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


@functools.cache
def counted(name: str, options: str, size: int) -> tuple[int, int]:
    model = papers.on_meta(name, **json.loads(options))
    return papers.parameters(model), papers.flops(model, size)


@pytest.mark.parametrize("dataset", DATASETS)
def test_published(dataset: str) -> None:
    """Every error that is published is a point, and its coordinates are those of its model within what is printed."""
    points = plot.published(dataset)
    rows = [row for row in papers.ROWS if dataset in row.errors]
    assert [p.error for p in points] == [row.errors[dataset] for row in rows]
    assert len({(p.series, p.label) for p in points}) == len(points)
    for row, point in zip(rows, points, strict=True):
        assert point.series in plot.STYLES and 1 < point.error < 40
        parameters, flops = counted(row.model, json.dumps(row.options), DATASETS[dataset].size)
        assert point.millions == pytest.approx(parameters / 1e6, abs=0.051)
        # As printed, of other channels in the stem.
        rel = 0.06 if row.billions == "14.53" else 0.01
        assert point.billions == pytest.approx(flops / 1e9, rel=rel, abs=0.006)


def test_figure_4_is_of_the_rows_of_table_3() -> None:
    found = {p.label: p for p in plot.published("imagenet") if p.series == "ERKNet-B"}
    assert {label: p[2:] for label, p in found.items()} == {
        "3_3_3_1": (6.95, 5.20, 25.47),
        "3_3_4_2": (14.49, 6.35, 24.12),
        "3_3_6_2": (25.51, 8.50, 23.14),
    }
    dense = {p.label: p for p in plot.published("imagenet") if p.series == "DenseNet"}
    assert dense["121"].millions == 7.978856
    assert 5.6 < dense["121"].billions < 5.8


def test_the_count_leaves_the_model_as_it_was() -> None:
    model = papers.on_meta("irknet-3x1_3x1-a")
    assert papers.flops(model, 16) == papers.flops(model, 16)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("suffix", "start"), ((".png", b"\x89PNG\r\n\x1a\n"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG"))
)
def test_writes(suffix: str, start: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / f"figure{suffix}"
    assert cli.main(["plot", "figure4", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert out.read_bytes().startswith(start)
    assert list(out.parent.iterdir()) == [out]


def test_own_results_stand_beside(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    entries = [GOOD | {"label": "mine $_", "error": 8.5}, {"model": "densenet-7", "dataset": "cifar10", "error": 12}]
    own = plot.results(written(tmp_path, entries), "cifar10")
    assert [(p.series, p.label, p.error) for p in own] == [
        (plot.OWN, "mine $_", 8.5),
        (plot.OWN, "densenet-7", 12.0),
    ]
    model = papers.on_meta("irknet-3x1_3x1_3x1", growth_rate=4)
    assert own[0].millions == papers.parameters(model) / 1e6
    assert own[0].billions == papers.flops(model, 32) / 1e9
    points = [*plot.published("cifar10"), *own]
    figure = plot.draw(points, "cifar10")
    for axes, field in zip(figure.axes, ("millions", "billions"), strict=True):
        lines = {line.get_label(): sorted(line.get_xydata().tolist()) for line in axes.get_lines()}
        assert lines == {
            name: sorted([getattr(p, field), p.error] for p in points if p.series == name)
            for name in {p.series for p in points}
        }
        texts = [text for text in axes.texts if text.get_text()]
        assert sorted(text.get_text() for text in texts) == sorted(p.label for p in points)
    assert "own results" in figure.get_suptitle()


@pytest.mark.parametrize("dataset", DATASETS)
def test_labels_can_be_read(dataset: str) -> None:
    pytest.importorskip("matplotlib")
    for axes in plot.draw(plot.published(dataset), dataset).axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert all(axes.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
        # Two of CIFAR-100's labels touch.
        assert sum(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]) <= (dataset == "cifar100")


def test_options_are_those_of_create_model(tmp_path: Path) -> None:
    options = {"growth_rate": 8, "stem": "imagenet", "m": [2, 4]}
    entry = {"model": "erknet-1x1_1x1-b", "options": options, "dataset": "imagenet", "error": 60}
    (point,) = plot.results(written(tmp_path, [entry]), "imagenet")
    model = papers.on_meta("erknet-1x1_1x1-b", growth_rate=8, stem="imagenet", m=(2, 4), num_classes=1000)
    assert point.millions == papers.parameters(model) / 1e6


@pytest.mark.parametrize(
    ("content", "message"),
    (
        ("{", "is no JSON: Expecting"),
        ("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), "is no JSON"),
        ({"stock": {}, "fused": {}}, "expected a list of results, got an object; that of rkfast demo is on digits"),
        (3, "expected a list of results, got a number"),
        ("null", "expected a list of results, got null"),
        ([], "the list is empty"),
        ([GOOD, 3], r"\[1\]: expected an object, got a number"),
        ([{"model": "densenet-7", "error": 3}], r"\[0\].dataset is missing"),
        ([GOOD | {"params": 3}], r"\[0\].params: no such key; there are model, dataset, error, options, label"),
        ([GOOD | {"error": "9"}], r"\[0\].error: expected a number, got a string"),
        ([GOOD | {"error": True}], r"\[0\].error: expected a number, got a bool"),
        ([GOOD | {"error": float("nan")}], r"\[0\].error: expected per cent, 0 to 100, got nan"),
        ([GOOD | {"error": 100.5}], r"\[0\].error: expected per cent, 0 to 100, got 100.5"),
        ([GOOD | {"error": -1}], r"\[0\].error: expected per cent"),
        ([GOOD | {"dataset": "mnist"}], r"\[0\].dataset: 'mnist' is none of imagenet, cifar10,"),
        ([GOOD | {"dataset": "svhn"}], r"\[0\].dataset: 'svhn', and this figure is of cifar10; take --dataset svhn"),
        ([GOOD | {"model": "net18"}], r"\[0\].model: name: 'net18' is not a model"),
        ([GOOD | {"options": {"width": 3}}], r"\[0\].model: width: not an option of irknet"),
        ([GOOD | {"options": [1]}], r"\[0\].options: expected an object, got a list"),
        ([GOOD | {"options": {"fused": True}}], r"\[0\].options.fused: not an option of a published network"),
        ([GOOD | {"options": {"in_chans": 1}}], r"\[0\].options.in_chans: not an option of"),
        ([GOOD | {"label": 3}], r"\[0\].label: expected a string, got a number"),
    ),
)
def test_bad_results_are_named(content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file, out = written(tmp_path, content), tmp_path / "out" / "figure.png"
    command = ["plot", "figure4", "--dataset", "cifar10", "--results", str(file), "--out", str(out)]
    assert cli.main(command) == 2
    printed = capsys.readouterr().err
    assert re.search(rf"^rkfast plot: --results {re.escape(str(file))}:? ?{message}", printed), printed
    assert not out.parent.exists()


def test_bad_arguments_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    for out, message in (
        (tmp_path / "figure.gif", "expected a name that ends in .png, .svg, .pdf"),
        (tmp_path / "figure", "expected a name that ends in"),
        (tmp_path / "file" / "figure.png", "cannot be written"),
    ):
        assert cli.main(["plot", "figure4", "--out", str(out)]) == 2
        assert f"rkfast plot: --out {out}" in (printed := capsys.readouterr().err) and message in printed
    (tmp_path / "folder.png").mkdir()
    assert cli.main(["plot", "figure4", "--out", str(tmp_path / "folder.png")]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert cli.main(["plot", "figure4", "--results", str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err
    for arguments in (["figure5"], ["figure4", "--dataset", "mnist"]):
        with pytest.raises(SystemExit):
            cli.main(["plot", *arguments])
        assert "invalid choice" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.png"]


def test_a_figure_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "figure4.png"
    out.write_bytes(b"old")

    def fail(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(plot, "draw", fail)
    with pytest.raises(MemoryError):
        cli.main(["plot", "figure4", "--out", str(out)])
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_missing_extra_is_named_first(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['matplotlib'] = None\nfrom rkfast.cli import main\n"
        f"sys.exit(main(['plot', 'figure4', '--results', '{tmp_path}/none.json', '--out', '{tmp_path}/out/a.png']))"
    )
    out = python("-c", code, status=1)
    assert "pip install 'rkfast[plots]'" in out and "Traceback" not in out
    assert not list(tmp_path.iterdir())
