"""The kernels that take longest, on a CPU operators, and Nsight Compute's words."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from rkfast.bench import models, slowest

HEAD = '"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"'
SAID = (
    "==PROF== Connected to process 1",
    HEAD,
    "UserWarning: of the program",
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
    assert slowest.medians([line for line in SAID if line.startswith('"')]) == {
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
    start = time.monotonic()
    script("sleep 20 & wait")  # what it watches holds the output open
    assert slowest.counted("densenet", "full", ["_sum"], 0.1) == ({}, "ncu took longer than 0 s")
    assert time.monotonic() - start < 15
    assert slowest.counted("densenet", "full", [], 20) == ({}, "there are no kernels")
    monkeypatch.setattr(slowest.shutil, "which", lambda name: None)
    assert slowest.counted("densenet", "full", ["_sum"], 20) == ({}, "ncu was not found on the PATH")


def test_counters_behind_every_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    describe = slowest.machine.describe
    monkeypatch.setattr(slowest.machine, "describe", lambda device: describe("cpu"))
    happened: list[Any] = []
    file = tmp_path / "found.json"

    def measured(family: str, size: str, device: str) -> dict[str, Any]:
        happened.append(family)
        if family == "erknet":
            return {"id": family, "failure": "RuntimeError: no memory"}
        names = ("_sum", "void cutlass<1>(int)", "sm90_fprop")
        return {"id": family, "ms": 1.0, "kernels": [dict(kernel=n, launches=1, ms=0.1, share=0.1) for n in names]}

    def counted(family: str, size: str, kernels: list[str], seconds: float) -> tuple[dict[str, Any], str | None]:
        assert len(json.loads(file.read_text())["networks"]) == 3
        happened.append((family, kernels, 10 < seconds <= 30))
        return {"_sum": {"Achieved Occupancy": 75.0}}, None

    monkeypatch.setattr(slowest, "measured", measured)
    monkeypatch.setattr(slowest, "counted", counted)
    families = ["densenet", "erknet", "tsc"]
    assert slowest.main([*families, "--device", "cuda", "--seconds", "30", "--json", str(file)]) == 1
    names = ["_sum", "sm90_fprop"]
    assert happened == [*families, ("densenet", names, False), ("erknet", [], True), ("tsc", names, True)]
    networks = json.loads(file.read_text())["networks"]
    assert networks[2]["counters"] == {"_sum": {"Achieved Occupancy": 75.0}}
