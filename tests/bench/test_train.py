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


def test_the_digits_fused_and_stock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rkfast.bench import digits

    files = ["--json", str(tmp_path / "found.json"), "--markdown", str(tmp_path / "found.md")]
    assert digits.main(["digits", "--epochs", "1", "--threads", "1", *files]) == 0
    document = json.loads((tmp_path / "found.json").read_text())
    assert [(row["fused"], row["seed"]) for row in document["rows"]] == [("auto", 0), ("off", 0), ("off", 1)]
    fused, stock, other = document["rows"]
    (row,) = document["compared"]
    assert row["error_points"] == pytest.approx(abs(fused["error"] - stock["error"]))
    assert row["loss_apart"]["epochs"] == pytest.approx(row["loss_apart"]["last"])  # of one epoch
    assert row["within_seeds"]["last"]  # an epoch of the same numbers, but for rounding
    assert row["seeds_apart"]["last"] == pytest.approx(abs(stock["losses"][0] - other["losses"][0])) != 0
    table = (tmp_path / "found.md").read_text()
    assert table.strip() == capsys.readouterr().out.strip() and "| digits | auto | 0 | " in table


def test_what_is_within_the_noise_of_two_seeds() -> None:
    from rkfast.bench import digits

    def run(error: float, *losses: float) -> dict[str, object]:
        return {"recipe": "digits", "error": error, "losses": list(losses), "epoch_s": 1.0}

    found = digits.compared(run(2.0, 1.0, 0.5), run(2.5, 1.0, 0.25), run(2.0, 2.0, 0.125))
    assert found["errors_agree"] and found["within_seeds"] == {"last": False, "epochs": True}
    assert found["loss_apart"] == pytest.approx({"last": 0.25, "epochs": 0.25 / 2**0.5})
    assert not digits.compared(run(2.0, 1.0), run(2.51, 1.0), run(2.0, 1.0))["errors_agree"]
