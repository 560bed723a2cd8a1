"""The kernels that take longest, on a CPU operators, and Nsight Compute's words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rkfast.bench import models, slowest

HEAD = '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
SAID = (
    "==PROF== Connected to process 1",
    HEAD,
    '"0","1","_sum","GPU Speed Of Light Throughput","DRAM Throughput","%","91.5"',
    '"1","1","_sum","GPU Speed Of Light Throughput","DRAM Throughput","%","81.5"',
    '"1","1","_sum","GPU Speed Of Light Throughput","Duration","us","1,081.5"',
    '"2","1","_other","Occupancy","Achieved Occupancy","%","1,050.0"',
    '"3","1","_other","Occupancy","Achieved Occupancy","%","n/a"',
)


def looked_at(folder: Path, *args: str, status: int = 0) -> dict[str, Any]:
    files = ["--json", str(folder / "found.json"), "--markdown", str(folder / "found.md")]
    assert slowest.main([*args, "--size", "tiny", "--device", "cpu", *files]) == status
    (network,) = json.loads((folder / "found.json").read_text())["networks"]
    return network


def test_the_longest_of_a_step(tmp_path: Path) -> None:
    network = looked_at(tmp_path)
    kernels = network["kernels"]
    assert len(kernels) == slowest.TOP
    assert [row["ms"] for row in kernels] == sorted((row["ms"] for row in kernels), reverse=True)
    assert 0 < sum(row["share"] for row in kernels) < 1
    assert sum(row["ms"] for row in kernels) == pytest.approx(network["ms"] * sum(row["share"] for row in kernels))
    (blocks,) = (row for row in kernels if row["kernel"] == "rkfast::dense_block")
    assert blocks["launches"] == 2  # a step
    assert "| `rkfast::dense_block` | 2 | " in (tmp_path / "found.md").read_text()


def test_a_wrong_network_has_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = models.Networks._contender

    def wrong(*args: Any) -> models.Steps:
        steps = right(*args)
        next(steps.model.parameters()).data.mul_(1.01)
        return steps

    monkeypatch.setattr(models.Networks, "_contender", wrong)
    network = looked_at(tmp_path, status=1)
    assert set(network) == {"id", "failure"} and network["failure"].startswith("outputs")
    assert "wrong, no figure" in (tmp_path / "found.md").read_text()


def test_counters_by_kernel() -> None:
    assert slowest.medians(SAID[1:]) == {
        "_sum": {"DRAM Throughput": 86.5},
        "_other": {"Achieved Occupancy": 1050.0},
    }


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell script")
def test_nsight_compute_is_asked_for_those_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    ncu = tmp_path / "ncu"

    def script(command: str) -> None:
        ncu.write_text(f"#!/bin/sh\n{command}\n")
        ncu.chmod(0o755)

    lines = "\n".join(SAID)
    script(f"echo \"$@\" > {tmp_path}/args; cat <<'E'\n{lines}\nE")
    counters, missing = slowest.counted("densenet", "full", ["_sum", "_other"], 20)
    assert counters["_sum"] == {"DRAM Throughput": 86.5} and missing is None
    args = (tmp_path / "args").read_text()
    assert "--kernel-name regex:^(_sum|_other)$ " in args
    assert args.endswith("slowest.py densenet --size full --device cuda --watched\n")
    table = "\n".join(
        slowest._table(
            {"ms": 1.0, "kernels": [{"kernel": "_sum", "launches": 3, "ms": 1.0, "share": 1.0}], "counters": counters}
        )
    )
    assert "| `_sum` | 3 | 1 | 100% | 86 | | | |" in table

    script("echo the driver is busy; exit 1")
    assert slowest.counted("densenet", "full", ["_sum"], 20) == ({}, "ncu: the driver is busy")
    script("exec sleep 20")
    assert slowest.counted("densenet", "full", ["_sum"], 0.1) == ({}, "ncu took longer than 0 s")
    monkeypatch.setattr(slowest.shutil, "which", lambda name: None)
    assert slowest.counted("densenet", "full", ["_sum"], 20) == ({}, "ncu was not found on the PATH")
