"""bench/gpu.sh on a CPU: its dry run, and how slices end, resume and are given up."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rkfast.bench import gpu
from rkfast.bench.models import TINY
from rkfast.bench.ops import OPS
from tests.package.process import ROOT, environment

KEY = {"device": "some GPU", "torch": "2", "triton": "3", "sources": "a", "dry_run": False}
pytestmark = pytest.mark.skipif(os.name == "nt", reason="a POSIX shell script")


def script(*args: str, status: int = 0) -> str:
    done = subprocess.run(
        [ROOT / "bench" / "gpu.sh", *args],
        env=environment(None, PYTHON=sys.executable),
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.mark.minutes
def test_dry_run_takes_the_whole_road_and_then_has_nothing_left(tmp_path: Path) -> None:
    said = script("--dry-run", "--out", str(tmp_path))
    assert said.rstrip().endswith("nothing is left")
    state = json.loads((tmp_path / "state.json").read_text())["slices"]
    assert list(state) == [
        *("build", "tests", "bench-densenet", "bench-main", "slowest", "cuts", "curve", "probe"),
        *("memcheck", "bench-models", "racecheck", "initcheck", "bench", "more-tests-0"),
    ]
    assert {each["status"] for each in state.values()} == {"done"}
    results = json.loads((tmp_path / "results.json").read_text())
    models = {network.name for network in TINY.values()}
    assert {row["op"] for row in results["rows"]} == {*OPS, *models}
    assert not any(verdict["failure"] for verdict in results["gate"])
    assert (tmp_path / "results.md").read_text().count("\n| ") == len(results["rows"]) + 1
    assert "rk_sum n=14 2x3x5x3 float32 channels_last" in said
    for name in gpu.LOOKED_AT:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["rows" if name in ("cuts", "probe") else "networks"]
        assert (tmp_path / f"{name}.md").read_text() in said
    goals = (tmp_path / "goals.md").read_text()
    assert "| densenet121: training step, × eager | 2.40 | 1.80 |  |  | not measured |" in goals and goals in said
    assert "0 wrong" in (tmp_path / "log.txt").read_text()
    (baselines,) = json.loads((tmp_path / "baselines.json").read_text()).values()
    assert len(baselines) == len({verdict["id"] for verdict in results["gate"]})

    before = (tmp_path / "log.txt").read_text()
    assert script("--dry-run", "--out", str(tmp_path)).rstrip().endswith("nothing is left")
    assert (tmp_path / "log.txt").read_text() == before


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "torch sees no CUDA device" in script("--out", str(tmp_path), status=1)


def shell(name: str, command: str, **more: object) -> gpu.Slice:
    return gpu.Slice(name, ["sh", "-c", command, name], **more)  # type: ignore[arg-type]


def test_what_a_slice_came_to_outlives_the_session(tmp_path: Path) -> None:
    planned = [shell("good", "exit 0"), shell("bad", "echo gone wrong; exit 3"), shell("none", "exit 5", fine=(0, 5))]
    session = gpu.Session(tmp_path, KEY)
    for each in session.left(planned):
        session.run(each, 10)
    again = gpu.Session(tmp_path, KEY)
    assert [again.status(s.name) for s in planned] == ["done", "failed", "done"]
    assert again.left(planned) == []
    assert "gone wrong" in gpu.summarise(again, planned)
    assert "[bad: exit 3" in (tmp_path / "log.txt").read_text()


def test_changed_sources_start_anew_and_keep_the_baselines(tmp_path: Path) -> None:
    planned = [shell("good", "exit 0")]
    session = gpu.Session(tmp_path, KEY)
    session.run(planned[0], 10)
    for name in ("results.json", "baselines.json", "curve.md"):
        (tmp_path / name).write_text("{}")
    changed = gpu.Session(tmp_path, {**KEY, "sources": "b"})
    assert changed.left(planned) == planned
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "curve.md").exists()
    assert (tmp_path / "baselines.json").exists()


def test_a_slice_that_outruns_its_time_is_ended_and_given_up_after_some_tries(tmp_path: Path) -> None:
    endless = shell("endless", "sleep 20 & wait")
    session = gpu.Session(tmp_path, KEY)
    start = time.monotonic()
    for _ in range(gpu.TRIES - 1):
        session.run(endless, 0.2)
        assert session.status("endless") == "unfinished"
    session.run(endless, 0.2)
    assert session.status("endless") == "failed"
    assert time.monotonic() - start < 30  # its children are ended with it


def test_a_slice_ends_for_good_at_its_cap_and_a_benchmark_begins_no_case_after_it(tmp_path: Path) -> None:
    session = gpu.Session(tmp_path, KEY)
    session.run(shell("endless", "sleep 20", cap=0.2), 100)
    assert session.status("endless") == "failed"
    session.run(shell("bench", f'echo "$@" > {tmp_path}/args; exit {gpu.UNFINISHED}', budgeted=True, cap=50), 100)
    assert (tmp_path / "args").read_text().split() == ["--budget", str(50 - gpu.SPARE)]


def test_a_benchmark_that_outran_the_session_comes_behind_the_others(tmp_path: Path) -> None:
    planned = [shell("long", "sleep 20", budgeted=True), shell("short", "exit 0")]
    session = gpu.Session(tmp_path, KEY)
    assert [s.name for s in session.left(planned)] == ["long", "short"]
    session.run(planned[0], 0.2)
    assert [s.name for s in gpu.Session(tmp_path, KEY).left(planned)] == ["short", "long"]


def test_no_slice_is_begun_that_the_budget_cannot_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = [shell("long", "exit 0", least=1000), shell("short", "exit 0", least=1)]
    monkeypatch.setattr(gpu, "slices", lambda *_: planned)
    assert gpu.main(["--dry-run", "--out", str(tmp_path), "--budget", "60"]) == gpu.UNFINISHED
    assert "- long: left\n- short: done" in capsys.readouterr().out


def test_shares_of_the_tests_are_all_of_them() -> None:
    with pytest.MonkeyPatch.context() as patch:
        shares = []
        for share in range(gpu.SHARES):
            patch.setenv(gpu.SHARE, str(share))
            items = [argparse.Namespace(nodeid=f"tests/test_{i}.py") for i in range(100)]
            gpu.pytest_collection_modifyitems(items)
            shares.append({item.nodeid for item in items})
    assert all(shares)
    assert sum(map(len, shares)) == len(set.union(*shares)) == 100


def test_a_benchmark_out_of_budget_is_taken_up_again_as_often_as_it_takes(tmp_path: Path) -> None:
    slow = shell("slow", f'echo "$@" > {tmp_path}/args; exit {gpu.UNFINISHED}', budgeted=True)
    session = gpu.Session(tmp_path, KEY)
    for _ in range(gpu.TRIES + 1):
        session.run(slow, 100)
    assert session.status("slow") == "unfinished"
    assert (tmp_path / "args").read_text().split() == ["--budget", str(100 - gpu.SPARE)]


def test_on_a_gpu_it_builds_watches_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: f"/usr/bin/{name}")
    planned = {s.name: s for s in gpu.slices(tmp_path, dry_run=False, arch="9.0")}
    assert planned["build"].command[1:] == ["setup.py", "build_ext", "--inplace"]
    assert planned["build"].environment == {"RKFAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    assert set(gpu.OPS) == set(OPS)
    for tool, op in itertools.product(("memcheck", "racecheck", "initcheck"), OPS):
        command = planned[f"{tool}-{op}"].command
        assert command[:5] == ["/usr/bin/compute-sanitizer", "--tool", tool, "--report-api-errors", "no"]
        assert command[-1] == op
    assert all(s.cap < 600 for s in planned.values() if s.name != "build")
    order = list(planned)
    valuable = ["build", "tests", "bench-densenet", "bench-main", *gpu.LOOKED_AT, "memcheck-rk_sum", "bench-models"]
    valuable += ["racecheck-rk_sum", "bench", "autotune-main"]
    assert order[:8] == valuable[:8]
    assert sorted(valuable, key=order.index) == valuable
    for name in gpu.LOOKED_AT:
        assert planned[name].least < planned[name].cap < 200
        assert "tiny" not in planned[name].command
    assert order[-gpu.SHARES :] == [f"more-tests-{share}" for share in range(gpu.SHARES)]
    for name in ("tests", "more-tests-0"):
        assert "-m gpu" in " ".join(planned[name].command)
        assert ("-n 8" in " ".join(planned[name].command)) == (importlib.util.find_spec("xdist") is not None)
        assert "--collect-only" not in planned[name].command
    benchmarks = [name for name in planned if name.startswith(("bench", "autotune"))]
    for name in benchmarks:
        assert planned[name].budgeted
        assert "tiny" not in planned[name].command
    assert {name for name in benchmarks if planned[name].least > gpu.LEAST} == {
        *("bench-densenet", "bench-models", "autotune-models"),
    }
    from rkfast.bench import run

    for name in benchmarks:  # the arguments are ones that bench/run.py takes
        parser = argparse.ArgumentParser()
        run.add_arguments(parser)
        args = parser.parse_args(planned[name].command[2:])
        assert args.device == "cuda"
        assert args.resume
        assert (args.peers is not None) == name.startswith("autotune")
        assert args.json.stem == ("autotune" if args.peers else "results")
        if args.suite == "ops" or args.names:
            run._check(args)


def test_compute_sanitizer_missing_fails_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    planned = {s.name: s for s in gpu.slices(tmp_path, dry_run=False, arch="9.0")}
    session = gpu.Session(tmp_path, KEY)
    session.run(planned["memcheck"], 10)
    assert session.status("memcheck") == "failed"
    assert "compute-sanitizer was not found" in session.done["memcheck"]["end"]
