"""The command, from its arguments to its files."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import rkfast
from rkfast.bench import contest, gate, machine, models, ops, run
from rkfast.bench.workload import MODES
from tests.package.process import ROOT, environment, python

TINY = ["--size", "tiny", "--device", "cpu", "--peers", "eager", "--threads", "1", "--seconds", "0"]
NUMBERS = {
    "ms_p20", "ms_p50", "ms_p80", "ms_low", "ms_high", "first_s", "bytes", "gb_per_s", "copy_share", "peak_bytes",
    "saved_bytes", "page_faults",
}  # fmt: skip
ROW = {"op", "case", "backend", "device", "mode", "dtype", "layout", "shape", "threads", "malloc", "peers", *NUMBERS}
PEER = {
    "malloc", "ms_p20", "ms_p50", "ms_p80", "ms_low", "ms_high", "first_s", "peak_bytes", "saved_bytes", "page_faults",
    "speedup", "speedup_p20", "speedup_p80", "kept", "compile_s",
}  # fmt: skip


def measured(folder: Path, op: str, *args: str, status: int = 0) -> dict[str, Any]:
    assert run.main(["ops", op, *TINY, "--malloc", "current", "--json", str(folder / "found.json"), *args]) == status
    return json.loads((folder / "found.json").read_text())


def test_command_in_a_checkout_writes_everything_at_both_malloc_settings(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = {kind: tmp_path / f"found.{kind}" for kind in ("json", "csv", "md", "png")}
    command = [
        sys.executable, "bench/run.py", "ops", "bn_rk_sum", *TINY, "--filter", "/train+residual+relu/2x3x5x3/float32",
        "--json", files["json"], "--csv", files["csv"], "--markdown", files["md"], "--plot", files["png"],
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(None), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(files["json"].read_text())
    expected = {"default", "large"} if sys.platform == "linux" else {"current"}
    assert set(document["malloc"]) == expected
    assert {row["mode"] for row in document["rows"]} == set(MODES)
    assert {row["malloc"] for row in document["rows"]} <= expected
    for setting in expected:
        assert f"malloc {setting}" in done.stderr
    assert files["md"].read_text().strip() == done.stdout.strip()
    table = [line for line in done.stdout.splitlines() if line.startswith("| bn_rk_sum")]
    assert len(table) == len(MODES)
    with files["csv"].open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(MODES)
    for line, row in zip(lines, document["rows"], strict=True):
        assert line["shape"] == "2x3x5x3"
        assert float(line["ms_p50"]) == row["ms_p50"]
        assert float(line["eager_speedup"]) == row["peers"]["eager"]["speedup"]
        assert line["commit"] == (document["commit"] or "")
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_results_say_where_they_come_from_and_keep_their_schema(tmp_path: Path) -> None:
    document = measured(tmp_path, "rk_sum", "--filter", "n=4+steps")
    assert set(document) == {
        "schema", "machine", "versions", "commit", "dirty", "date", "load", "size", "malloc", "cold", "gate",
        "rows",
    }  # fmt: skip
    assert document["schema"] == 1
    assert document["machine"]["cpu"]
    assert document["machine"]["cores"] >= 1
    assert document["machine"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert document["versions"]["torch"] == torch.__version__
    assert set(document["versions"]) == {*("python", "torch", "cuda", "rkfast", "triton", "openvino", "onnxruntime")}
    assert document["rows"]
    for row in document["rows"]:
        assert set(row) == ROW
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms_p50"] / 1e6)
        assert set(row["peers"]["eager"]) == PEER
    for verdict in document["gate"]:
        assert set(verdict) == {
            "id", "backend", "device", "threads", "error", "eager_error", "failure", "failed_peers",
        }  # fmt: skip


def test_bytes_saved_are_those_of_the_terms_a_step_needs(tmp_path: Path) -> None:
    rows = measured(tmp_path, "rk_sum", "--filter", "/float32/")["rows"]
    saved = {row["case"]: row["saved_bytes"] for row in rows if row["mode"] == "both"}
    activation = 2 * 3 * 5 * 3 * 4
    assert saved["n=4"] == 0
    assert saved["n=4+steps"] == 3 * activation  # the steps themselves are parameters
    assert saved["n=4+relu"] < activation / 8 + 64  # a bit per element


def test_both_is_forward_and_backward_together(tmp_path: Path) -> None:
    rows = measured(tmp_path, "rk_sum", "--filter", "n=4+relu/2x3x5x3/float32")["rows"]
    found = {row["mode"]: row for row in rows}
    assert found["both"]["bytes"] == found["forward_grad"]["bytes"] + found["backward"]["bytes"]
    assert found["both"]["ms_p50"] > max(found["forward_grad"]["ms_p20"], found["backward"]["ms_p20"])


def test_the_backend_that_served_is_named(tmp_path: Path) -> None:
    rows = measured(tmp_path, "rk_sum", "--filter", "/n=2/", "--backend", "reference")["rows"]
    assert {row["backend"] for row in rows} == {"reference"}


def test_a_spent_budget_leaves_cases_that_resume_takes_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = measured(tmp_path, "channel_moments", "--budget", "0", status=run.UNFINISHED)
    assert first["rows"] == []
    measured(tmp_path, "channel_moments", "--filter", "float32")
    capsys.readouterr()
    whole = measured(tmp_path, "channel_moments", "--resume")
    assert "float32" not in capsys.readouterr().err
    assert sorted(row["dtype"] for row in whole["rows"]) == ["bfloat16", "float32"]


def test_a_case_that_is_ended_costs_none_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, ended = contest.run, []

    def run_or_end(suite: contest.Suite, case: Any, settings: contest.Contest) -> dict[str, Any]:
        if ended:
            raise KeyboardInterrupt  # as little caught as a signal that kills
        ended.append(case.id)
        return real(suite, case, settings)

    monkeypatch.setattr(contest, "run", run_or_end)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, "channel_moments", "--markdown", str(tmp_path / "found.md"))
    document = json.loads((tmp_path / "found.json").read_text())
    assert [g["id"] for g in document["gate"]] == ended
    assert len(document["rows"]) == 1
    assert (tmp_path / "found.md").read_text().count("\n| channel_moments") == 1


def test_a_wrong_case_leaves_the_others_to_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.gate, "check", lambda *_: gate.Verdict(1, 0, "wrong"))
    real = run.time.time
    cases: list[str] = []
    monkeypatch.setattr(run, "_progress", lambda job, i, case: cases.append(case.id))
    monkeypatch.setattr(run.time, "time", lambda: real() + 1000 * len(cases))  # one case, and the budget is spent
    measured(tmp_path, "channel_moments", "--budget", "500", status=run.UNFINISHED)
    monkeypatch.undo()
    document = measured(tmp_path, "channel_moments", "--resume", status=1)
    assert [bool(g["failure"]) for g in document["gate"]] == [True, False]


@pytest.mark.parametrize(("name", "at"), [("eager", 2), ("eager", 7), ("ours", 2), ("ours", 7), ("copy", 1)])
def test_a_contender_that_breaks_down_is_left_out(
    name: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = contest.Copy if name == "copy" else ops.Call
    right, counts = kind.forward, dict[int, int]()

    def break_down(self: Any) -> Any:
        if name == "copy" or (self.function.__name__ == "ours") == (name == "ours"):
            counts[id(self)] = counts.get(id(self), 0) + 1
            if counts[id(self)] >= at:
                raise RuntimeError("broken\nat length")
        return right(self)

    monkeypatch.setattr(kind, "forward", break_down)
    document = measured(tmp_path, "channel_moments", "--filter", "float32", status=int(name == "ours"))
    (verdict,) = document["gate"]
    if name == "ours":
        assert verdict["failure"] == "RuntimeError: broken"
        assert document["rows"] == []
    else:
        assert verdict["failed_peers"] == {name: "RuntimeError: broken"}
        assert [("eager" in row["peers"]) for row in document["rows"]] == [name == "copy"]


def test_a_case_that_raises_is_wrong_and_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("too large")

    for where, what in ((ops.gate, "check"), (contest.dispatch, "use"), (ops, "arranged")):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, out_of_memory)
            document = measured(tmp_path, "channel_moments", "--backend", "reference", status=1)
        assert [g["failure"] for g in document["gate"]] == ["OutOfMemoryError: too large"] * 2


def test_only_backends_that_implement_an_op_are_forced() -> None:
    assert contest.serving(("cuda", "triton"), "rk_sum") == ("cuda", "triton")
    assert contest.serving(("cuda", "triton"), "dense_block") == ("triton",)
    assert contest.serving(("cuda",), "dense_block") == ("auto",)
    assert contest.serving(("auto",), "dense_block") == ("auto",)


def test_an_op_without_the_backend_asked_for_is_measured_on_another(tmp_path: Path) -> None:
    rows = measured(tmp_path, "conv", "--backend", "cuda", "--backend", "reference")["rows"]
    assert {row["backend"] for row in rows} == {"reference"}


def test_drift_is_told_by_a_copy_beyond_the_caches() -> None:
    (case, *_) = models.cases("densenet", "tiny", "cuda")
    with FakeTensorMode():
        pairs = contest.Copy(case, "cuda").pairs
    assert set(pairs) == set(case.modes) - {"both"}
    assert all(t.nbytes >= 1 << 30 for pair in pairs.values() for t in pair)


@pytest.mark.parametrize(("said", "dirty"), [("abc123", False), ("abc123-dirty", True)])
def test_the_commit_is_told_where_git_is_absent(
    said: str, dirty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(machine.COMMIT, said)
    if (ROOT / ".git").exists():
        assert machine.commit()["commit"] != "abc123"
    monkeypatch.setattr(rkfast, "__file__", str(tmp_path / "rkfast" / "__init__.py"))
    document = measured(tmp_path, "channel_moments", "--filter", "float32")
    assert (document["commit"], document["dirty"]) == ("abc123", dirty)


def test_resume_starts_anew_where_the_code_is_another(tmp_path: Path) -> None:
    document = measured(tmp_path, "channel_moments", "--filter", "float32")
    (tmp_path / "found.json").write_text(json.dumps({**document, "commit": "another"}))
    assert {row["dtype"] for row in measured(tmp_path, "channel_moments", "--resume", "--filter", "bf")["rows"]} <= {
        "bfloat16"
    }


def test_baselines_are_measured_once_and_again_where_the_machine_drifted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, ...]] = []
    real = contest.run

    def watched(suite: contest.Suite, case: Any, settings: contest.Contest) -> dict[str, Any]:
        ran.append(settings.peers)
        found = real(suite, case, settings)
        if found["contenders"]:
            found["contenders"]["copy"]["ms"]["forward"] = [copy_ms] * 3
        return found

    monkeypatch.setattr(contest, "run", watched)
    args = ("channel_moments", "--filter", "float32", "--baselines", str(tmp_path / "baselines.json"))
    copy_ms = 1.0
    assert not measured(tmp_path, *args)["rows"][0]["peers"]["eager"]["kept"]
    copy_ms = 1.05
    assert measured(tmp_path, *args)["rows"][0]["peers"]["eager"]["kept"]
    copy_ms = 2.0
    assert not measured(tmp_path, *args)["rows"][0]["peers"]["eager"]["kept"]
    assert ran == [("eager",), (), (), ("eager",)]
    (key,) = json.loads((tmp_path / "baselines.json").read_text())
    assert f"torch {torch.__version__}" in key


def test_compiled_pytorch_is_a_peer(tmp_path: Path) -> None:
    rows = measured(tmp_path, "rk_sum", "--filter", "/n=2/", "--peers", "compile")["rows"]
    assert rows
    assert all(row["peers"]["compile"]["speedup"] > 0 for row in rows)
    assert all(row["peers"]["compile"]["compile_s"] > 0 for row in rows)


@pytest.mark.parametrize("suite", run.SUITES.values(), ids=run.SUITES)
def test_peers_that_are_no_matter_of_patience_are_usual(suite: contest.Suite) -> None:
    assert {"eager", "eager_channels_last", "compile"} <= set(suite.peers["cpu"])
    assert "compile_cuda_graphs" in set(suite.peers["cuda"]) - set(suite.peers["cpu"])
    assert set(suite.known_peers) == {*suite.peers["cpu"], *suite.peers["cuda"], "compile_max_autotune"}
    assert "compile_max_autotune" not in {*suite.peers["cpu"], *suite.peers["cuda"]}


@pytest.mark.parametrize(("load", "quotable"), [(0.1, True), (3.9, False)])
def test_figures_of_a_busy_machine_say_so(
    load: float, quotable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run.machine, "load", lambda: load)
    document = measured(tmp_path, "channel_moments", "--filter", "float32")
    assert document["load"] == [load, load]
    assert ("Not to be quoted" in capsys.readouterr().out) is not quotable


@pytest.mark.parametrize(
    ("args", "message"),
    (
        (("rk_summ",), "'rk_summ' is no op; there are rk_sum"),
        (("rk_sum", "--malloc", "current", "--peers", "jax"), "'jax' is not a peer; there are eager"),
    ),
)
def test_unknown_names_are_refused(args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["ops", args[0], *TINY, *args[1:]]) == 2
    assert message in capsys.readouterr().err


def test_sizes() -> None:
    listed = {
        size: python(str(ROOT / "bench" / "run.py"), "ops", "--list", "--size", size).split()
        for size in ("quick", "full")
    }
    assert set(listed["quick"]) < set(listed["full"])
    ids = "\n".join(listed["full"])
    for part in ("/n=2/", "/n=8/", "/n=14/", "+steps", "+moments", "/bfloat16/", "/contiguous", "64x64x32x32", "eval+"):
        assert part in ids
    assert len(set(listed["full"])) == len(listed["full"])


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_malloc_settings_decide_whether_pages_are_taken_anew(tmp_path: Path) -> None:
    # Blocks over 32 MiB, up to which glibc raises its threshold by itself.
    case = "bn_rk_sum/train+residual+relu/16x256x56x56/float32/channels_last"
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    args = parser.parse_args(["ops", "bn_rk_sum", "--device", "cpu", "--peers", "", "--seconds", "0"])
    reports: dict[str, dict[str, Any]] = {case: {}}
    assert run._measured([run._job(args, [case], 1, s, None, tmp_path / s) for s in run.MALLOC], reports)
    pages = 16 * 256 * 56 * 56 * 4 / 4096
    contenders = {setting: found["contenders"] for setting, found in reports[case].items()}
    ours = {s: next(c for c in each.values() if c["ours"])["faults"]["forward"] for s, each in contenders.items()}
    assert ours["default"] > 0.9 * pages
    assert ours["large"] < 0.05 * pages
    assert contenders["default"]["copy"]["faults"]["forward"] < 0.05 * pages  # it writes memory that is there
