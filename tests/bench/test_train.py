"""What the engine adds to the bare loop, and the digits, from the arguments to the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import libraries

libraries.prepare()  # torchmetrics imports torchvision
for package in ("safetensors", "torchmetrics", "sklearn"):
    pytest.importorskip(package)


def test_the_engine_beside_the_bare_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rkfast.bench import train

    files = ["--json", str(tmp_path / "found.json"), "--markdown", str(tmp_path / "found.md")]
    assert train.main(["digits", "--epochs", "2", "--fused", "off", "--threads", "1", "--device", "cpu", *files]) == 0
    document = json.loads((tmp_path / "found.json").read_text())
    assert document["versions"]["torch"]
    (row,) = document["rows"]
    assert (row["recipe"], row["fused"], row["threads"], row["steps"], row["epochs"]) == ("digits", "off", 1, 44, 2)
    ratio = row["engine_ms"]["p50"] / row["bare_ms"]["p50"]
    assert 0.2 < ratio < 5
    assert row["added_percent"]["p50"] == pytest.approx(100 * (ratio - 1))
    table = (tmp_path / "found.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip() and "| digits | off | 1 | 44 × 2 | " in table
