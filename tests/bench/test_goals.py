"""What was asked on a GPU beside what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rkfast.bench import goals, models
from tests.package.process import ROOT, python

GIB = 1 << 30


def network(backend: str, mode: str = "both", ours: int | None = 10, **speedups: float) -> dict[str, Any]:
    peers = {name: {"speedup": speedup, "peak_bytes": 40 * GIB} for name, speedup in speedups.items()}
    peak = None if ours is None else ours * GIB
    return {
        "op": "densenet121", "case": "train", "backend": backend, "mode": mode, "shape": [256, 3, 224, 224],
        "first_s": 4.0, "peak_bytes": peak, "bytes": None, "copy_share": None, "peers": peers,
    }  # fmt: skip


def kernel(moved: float, share: float) -> dict[str, Any]:
    return {
        "op": "rk_sum", "case": "n=4", "backend": "triton", "mode": "forward", "shape": [256, 64, 56, 56],
        "dtype": "bfloat16", "layout": "channels_last", "bytes": moved, "copy_share": share, "peers": {},
    }  # fmt: skip


def found(*rows: dict[str, Any]) -> dict[str, goals.Line]:
    return {line.what: line for line in goals.lines(rows)}


def test_ours_at_its_fastest_beside_the_fastest_peer() -> None:
    rows = [
        network("triton", eager_channels_last=1.9, compile=2.0, compile_cuda_graphs=1.5),
        network("triton, graphed", ours=None, eager_channels_last=2.3, compile=2.5, compile_cuda_graphs=1.9),
        network("triton, min memory", ours=5, eager_channels_last=1.5, compile=1.7, compile_cuda_graphs=1.3),
        network("triton", "backward", eager_channels_last=9.0),
    ]
    lines = found(*rows)
    eager, compiled = (lines[f"densenet121: training step, × {peer}"] for peer in ("eager", "compile"))
    assert (eager.figure, eager.by, eager.gap(), eager.met()) == (
        2.3, "triton, graphed, eager_channels_last", "-4 %", "accepted",
    )  # fmt: skip
    assert (compiled.figure, compiled.by) == (1.9, "triton, graphed, compile_cuda_graphs")
    assert lines["densenet121: training memory, eager / ours"].figure == 4
    assert lines['densenet121: training memory, memory="min", eager / ours'].figure == 8
    first = lines["densenet121: first training step, s"]
    assert (first.figure, first.gap(), first.met()) == (4.0, "+20 %", "met")
    assert lines["densenet121: inference, × eager"].met() == "not measured"


@pytest.mark.parametrize(
    ("speedup", "met"), [(2.4, "met"), (2.39, "accepted"), (1.8, "accepted"), (1.79, "**missed**")]
)
def test_met_accepted_missed(speedup: float, met: str) -> None:
    assert found(network("triton", eager_channels_last=speedup))["densenet121: training step, × eager"].met() == met


def test_kernels_that_stream_count() -> None:
    lines = found(kernel(1e9, 0.91), kernel(1e6, 0.2))
    (line,) = (line for what, line in lines.items() if what.startswith("rk_sum"))
    assert (line.what, line.met()) == (
        "rk_sum n=4 256x64x56x56 bfloat16 channels_last forward: of a copy's speed", "met",
    )  # fmt: skip


def test_every_network_with_a_goal_is_measured_on_a_gpu() -> None:
    measured = {case.op: case for family in models.FULL["cuda"] for case in models.cases(family, "full", "cuda")}
    assert set(measured) == set(goals.GOALS)
    assert all("min" in measured[op].network.memory for op, goal in goals.GOALS.items() if goal.least)


def test_as_a_program(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"rows": [network("triton", eager_channels_last=2.5)]}))
    said = python(str(ROOT / "bench" / "goals.py"), str(tmp_path / "results.json"))
    assert "| densenet121: training step, × eager | 2.40 | 1.80 | 2.50 | +4 % | met | triton, eager_" in said
