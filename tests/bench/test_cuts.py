"""Tiles of the fused products, tried in Triton's interpreter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.package.process import ROOT, python

pytest.importorskip("triton")
from rkfast.bench import cuts
from rkfast.ops import launches, products


def test_every_cut_is_tried_and_right(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    script = str(ROOT / "bench" / "cuts.py")
    args = ("--size", "tiny", "--device", "cpu", "--seconds", "0", "--json", str(file))
    said = python(script, *args, TRITON_INTERPRET="1")
    document = json.loads(file.read_text())
    assert [row["kernel"] for row in document["rows"]] == list(cuts.CUTS)
    for row in document["rows"]:
        asked = {launches.UNTUNED[row["kernel"], 4], *cuts.CUTS[row["kernel"]]}
        assert set(row["ms"]) == {*(str(tuple(cut)) for cut in asked), "copy"} and not row["failed"]
        assert document["chosen"][row["kernel"]]["cut"] in row["ms"]
        assert f"Cut{document['chosen'][row['kernel']]['cut']}`" in said


def test_the_fastest_that_serves_every_layer() -> None:
    rows = [
        {"kernel": kernel, "ms": {"a": 1.0, "b": 0.5, "c": 0.9, **extra, "copy": 0.1}}
        for kernel in cuts.CUTS
        for extra in ({"d": 0.1}, {"b": 4.0}, {})
    ]
    best = cuts.chosen(rows)
    assert set(best) == set(cuts.CUTS)
    assert all(each == {"cut": "c", "speed": pytest.approx(1 / 0.9)} for each in best.values())


@pytest.mark.parametrize("spoil", ("wrong", "nan", "raises"))
def test_a_cut_that_is_wrong_or_breaks_has_no_figure(spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt = cuts.CUTS["product"][1]

    def call(x: torch.Tensor, *_: torch.Tensor) -> list[torch.Tensor]:
        if launches.cut("product", "", 4, 8, 1 << 20, 1 << 20, 1 << 20) != spoilt:
            return [x]
        if spoil == "raises":
            raise RuntimeError("out of resource: shared memory\nreduce it")
        return [x * (1.01 if spoil == "wrong" else float("nan"))]

    monkeypatch.setitem(cuts.KERNELS, "product", call)
    found = cuts.measured("product", cuts.LAYERS["tiny"][0], torch.float32, "cpu", 0.0)
    why = found["failed"].pop(str(tuple(spoilt)))
    assert why == "RuntimeError: out of resource: shared memory" if spoil == "raises" else why.startswith("wrong")
    assert not found["failed"] and str(tuple(spoilt)) not in found["ms"]
    assert not launches.TUNED


def test_kernels_are_given_what_training_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms on both sides; and tensors that can be told by their channels."""
    layer = cuts.LAYERS["tiny"][0]
    given = cuts.drawn(layer, torch.float32, "cpu")
    asked = []
    monkeypatch.setattr(products, "product", lambda x, reads, conv, norm, moments: asked.append(norm) or (x, None))
    cuts.product(*given)
    assert asked[0].mean.shape == (layer.read,) and (asked[0].var > 0).all()
    incoming = cuts._incoming(given[2], given[3], given[4:])
    assert incoming.mean.shape == incoming.dweight.shape == (layer.width,) and incoming.relu
    assert incoming.count == layer.n * layer.side**2
    assert cuts.moved("data_gradient", layer, 2) == 2 * 16 * (2 * 24 + 2 * 16) * 2
