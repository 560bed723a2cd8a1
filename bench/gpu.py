"""What ``bench/gpu.sh`` runs: build, tests, benchmarks, trainings, a profile and compute-sanitizer, the most valuable
unfinished one first.

State, log, baselines, results and ``goals.md``, what is asked beside what was measured, stand in one folder; whoever
runs it again with that folder continues. Sources that changed start everything but the peers' baselines anew. Exit
status: 0 when all is done and right, 1 when something failed, 75 when something is left to do.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
UNFINISHED = 75
TESTED, WATCHED, MEASURED = 240, 120, 240  # seconds for tests, for an op under compute-sanitizer, for a benchmark
TRAINED, PROFILED, TRIED, PROBED = 110, 110, 60, 30  # seconds that trainings and so on are asked to take
COMPILED = 240  # seconds that a network may take for which torch.compile takes a minute or two, twice
STARTED = 60  # seconds that such a slice may take besides
SPARE = 15  # seconds kept back for what a slice does after its last measurement
LEAST = 20  # seconds under which no slice is begun, but for those that need more
TRIES = 3  # a slice that no budget suffices for is given up
NO_TESTS = 5  # pytest's exit status where none was selected
# In order of value; each is watched by itself, so that one that takes too long costs no other.
OPS = (
    "rk_sum",
    "bn_rk_sum",
    "channel_moments",
    "dense_block",
    "bn_relu_conv",
    "bn_relu_pool",
    "conv",
    "residual_block",
)
LOOKED_AT = ("slowest", "cuts", "curve", "probe")  # slices with results of their own
SHARES = 8  # of the tests outside tests/cuda, over ten thousand; each share is a fair sample
SHARE = "RKFAST_SHARE"

FACTS = """
import json, torch
from rkfast import native
cuda = torch.cuda.is_available()
try:
    import triton
    version = triton.__version__
except ImportError:
    version = None
gpu = torch.cuda.get_device_properties(0) if cuda else None
print(json.dumps({
    "torch": torch.__version__, "triton": version,
    "device": gpu.name if cuda else "cpu", "arch": f"{gpu.major}.{gpu.minor}" if cuda else None,
    "missing": native.cuda_reason() if cuda else native.cpu_reason(),
}))
"""


class Slice(NamedTuple):
    name: str
    command: list[str]
    environment: dict[str, str] = {}
    fine: tuple[int, ...] = (0,)  # exit statuses that are success
    budgeted: bool = False  # the command takes --budget and exits 75 where it did not suffice
    cap: float = math.inf  # seconds, at which it is ended for good; a budgeted one begins no case after it
    least: float = LEAST  # seconds, under which it is not begun


def slices(out: Path, dry_run: bool, arch: str | None) -> list[Slice]:
    """In order of value. A dry run takes the same road on CPU, with the smallest cases and nothing built."""
    python = sys.executable
    device = "cpu" if dry_run else "cuda"
    collect = ["--collect-only"] if dry_run else ["--maxfail=20"]
    if importlib.util.find_spec("xdist") is not None and not dry_run:
        collect += ["-n", "8"]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *collect, "-m", "gpu"]
    sanitizer = shutil.which("compute-sanitizer")

    # Without PyTorch's caching allocator each tensor is an allocation of its own, whose ends memcheck knows.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def watched(tool: str) -> list[Slice]:
        sanitize = [python, "bench/sanitize.py", "--device", device]
        if dry_run:
            return [Slice(tool, sanitize, uncached, cap=WATCHED)]
        if sanitizer is None:
            missing = "raise SystemExit('compute-sanitizer was not found; put it on the PATH')"
            return [Slice(tool, [python, "-c", missing])]
        # Libraries provoke errors of the API on purpose, and handle them.
        under = [sanitizer, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
        return [Slice(f"{tool}-{op}", [*under, *sanitize, op], uncached, cap=WATCHED) for op in OPS]

    def measured(name: str, what: Sequence[str], *more: str, to: str = "results") -> Slice:
        tiny = ["--size", "tiny", "--peers", "eager", "--seconds", "0.01", "--threads", "1", "--malloc", "current"]
        command = [
            python, "bench/run.py", *what, "--device", device, "--resume",
            "--json", str(out / f"{to}.json"), "--markdown", str(out / f"{to}.md"), *more, *(tiny if dry_run else []),
        ]  # fmt: skip
        least = COMPILED if what[0] == "models" and not dry_run else LEAST
        return Slice(name, command, budgeted=True, cap=MEASURED, least=least)

    def looked_at(name: str, seconds: float, *tiny: str, **environment: str) -> Slice:
        command = [
            python, f"bench/{name}.py", "--device", device, "--seconds", str(seconds),
            "--json", str(out / f"{name}.json"), "--markdown", str(out / f"{name}.md"),
            *(("--size", "tiny", *tiny) if dry_run else ()),
        ]  # fmt: skip
        return Slice(name, command, environment, cap=seconds + STARTED, least=LEAST if dry_run else seconds)

    kept = ("--baselines", str(out / "baselines.json"))
    tuned = ("--peers", "eager,compile_max_autotune")  # takes minutes to compile, hence last and in files of its own

    build = [python, "setup.py", "build_ext", "--inplace"]
    required = {"RKFAST_CUDA": "1", **({"TORCH_CUDA_ARCH_LIST": arch} if arch else {})}
    return [
        Slice("build", [python, "setup.py", "--version"] if dry_run else build, {} if dry_run else required),
        Slice("tests", [*pytest, "tests/cuda"], cap=TESTED),
        measured("bench-densenet", ["models", "densenet", "tsc"], *kept),
        measured("bench-main", ["ops"], "--main", *kept),
        looked_at("slowest", PROFILED),
        looked_at("cuts", 0.0 if dry_run else TRIED, **({"TRITON_INTERPRET": "1"} if dry_run else {})),
        looked_at("curve", TRAINED, "--steps", "60"),
        looked_at("probe", PROBED),
        *watched("memcheck"),
        measured("bench-models", ["models"], *kept),
        *(each for tool in ("racecheck", "initcheck") for each in watched(tool)),
        measured("bench", ["ops"], *kept),
        *([] if dry_run else [measured("autotune-models", ["models"], *tuned, to="autotune")]),
        *([] if dry_run else [measured("autotune-main", ["ops"], "--main", *tuned, to="autotune")]),
        *(
            Slice(
                f"more-tests-{share}",
                [*pytest, "-p", "bench.gpu", "tests", "--ignore=tests/cuda"],
                {SHARE: str(share)},
                (0, NO_TESTS) if dry_run else (0,),  # without a GPU no test of an op asks for one
                cap=TESTED,
            )
            for share in range(1 if dry_run else SHARES)
        ),
    ]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """As a plugin of pytest: leave the share of the tests that SHARE says, the same in every process."""
    share = int(os.environ[SHARE])
    items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % SHARES == share]


class Session:
    """The folder of results, and what is left to do in it."""

    def __init__(self, out: Path, key: dict[str, Any]) -> None:
        self.out = out
        self.file = out / "state.json"
        out.mkdir(parents=True, exist_ok=True)
        state = json.loads(self.file.read_text()) if self.file.is_file() else {}
        if state.get("key") != key:
            state = {"key": key, "slices": {}}
            for name in ("results", "autotune", "goals", *LOOKED_AT):
                for file in (f"{name}.json", f"{name}.md"):
                    (out / file).unlink(missing_ok=True)
        self.done: dict[str, dict[str, Any]] = state["slices"]
        self.key = key
        self._write()

    def _write(self) -> None:
        self.file.write_text(json.dumps({"key": self.key, "slices": self.done}, indent=1) + "\n")

    def status(self, name: str) -> str:
        return self.done.get(name, {}).get("status", "left")

    def left(self, planned: Sequence[Slice]) -> list[Slice]:
        """Those that outran a session come behind the others, whom they would otherwise keep from their turn."""
        left = [s for s in planned if self.status(s.name) in ("left", "unfinished")]
        return sorted(left, key=lambda s: self.done.get(s.name, {}).get("outran", 0))

    def run(self, planned: Slice, seconds: float) -> None:
        """Run one slice for at most ``seconds``, or its cap, and note how it went."""
        before = self.done.get(planned.name, {})
        tries = before.get("tries", 0) + 1
        given_up = tries >= TRIES or seconds >= planned.cap
        command = list(planned.command)
        if planned.budgeted:
            command += ["--budget", str(max(min(seconds, planned.cap) - SPARE, 1))]
        else:
            seconds = min(seconds, planned.cap)
        start = time.monotonic()
        code, output = execute(command, planned.environment, seconds)
        spent = round(time.monotonic() - start, 1)
        if code is None:
            output += f"\nended after {spent} s"
        with (self.out / "log.txt").open("a") as log:
            log.write(f"$ {' '.join(command)}\n{output}\n[{planned.name}: exit {code} after {spent} s]\n\n")
        if code in planned.fine:
            status = "done"
        elif code is None or (planned.budgeted and code == UNFINISHED):
            status = "unfinished" if planned.budgeted or not given_up else "failed"
        else:
            status = "failed"
        self.done[planned.name] = {
            "status": status,
            "tries": tries,
            "outran": before.get("outran", 0) + (planned.budgeted and code is None),
            "seconds": round(before.get("seconds", 0) + spent, 1),
            "end": output[-2500:],
        }
        self._write()


def execute(command: list[str], environment: dict[str, str], seconds: float) -> tuple[int | None, str]:
    """Exit status and output of a command; None where it was ended for taking too long."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        env={**os.environ, "PYTHONPATH": path, **environment}, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def sources() -> str:
    """A digest of everything that is built, tested or measured."""
    digest = hashlib.sha256()
    for folder in ("csrc", "rkfast", "bench", "tests"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".h", ".cuh", ".cpp", ".cu"):
                digest.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    digest.update((ROOT / "setup.py").read_bytes())
    return digest.hexdigest()[:16]


def summarise(session: Session, planned: Sequence[Slice]) -> str:
    lines = [f"{session.key['device']}, torch {session.key['torch']}, triton {session.key['triton']}"]
    for each in planned:
        found = session.done.get(each.name, {})
        seconds = f", {found['seconds']:.0f} s" if found else ""
        lines.append(f"- {each.name}: {session.status(each.name)}{seconds}")
    failed = [s.name for s in planned if session.status(s.name) == "failed"]
    lines += [f"\n{name} failed; its last words:\n{session.done[name]['end']}" for name in failed]
    for name in ("results.json", "autotune.json"):
        lines += figures(session.out / name)
    for name in (*LOOKED_AT, "goals"):
        file = session.out / f"{name}.md"
        lines += ["", file.read_text()] if file.is_file() else []
    left = [s.name for s in session.left(planned)]
    lines.append(f"left to do: {', '.join(left)}; run this again with the same --out" if left else "nothing is left")
    return "\n".join(lines)


def figures(results: Path) -> list[str]:
    """A line per case: forward alone, and forward and backward; the whole table stands in results.md."""
    if not results.is_file():
        return []
    document = json.loads(results.read_text())
    lines = []
    for row in document["rows"]:
        if row["mode"] in ("forward", "both"):
            beside = " ".join(f"{name} {peer['speedup']:.2f}x" for name, peer in row["peers"].items())
            shape = "x".join(map(str, row["shape"]))
            moved = "" if row["bytes"] is None else f", {row['gb_per_s']:.0f} GB/s, {row['copy_share']:.0%} of copy"
            lines.append(
                f"{row['op']} {row['case']} {shape} {row['dtype']} {row['layout']} {row['backend']} {row['mode']}: "
                f"{row['ms_p50'] * 1e3:.4g} us{moved}; {beside}"
            )
    wrong = [f"WRONG: {g['id']} on {g['backend']}: {g['failure']}" for g in document["gate"] if g["failure"]]
    broken = {f"{name} could not run: {why}" for g in document["gate"] for name, why in g["failed_peers"].items()}
    return [*lines, *wrong, *sorted(broken)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of state and results")
    parser.add_argument("--budget", type=float, default=540, help="seconds for this call (default 540)")
    parser.add_argument("--retry", action="store_true", help="run failed slices again")
    parser.add_argument("--dry-run", action="store_true", help="the same road on a CPU, in about a minute")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.budget
    out = args.out.resolve()
    code, output = execute([sys.executable, "-c", FACTS], {}, args.budget)
    if code != 0:
        print(output)
        return 1
    facts = json.loads(output.splitlines()[-1])
    if facts["device"] == "cpu" and not args.dry_run:
        print("torch sees no CUDA device; --dry-run takes the same road on a CPU")
        return 1
    key = {k: facts[k] for k in ("device", "torch", "triton")} | {"sources": sources(), "dry_run": args.dry_run}
    session = Session(out, key)
    planned = slices(out, args.dry_run, facts["arch"])
    # A fresh machine brings the results of the last one, but nothing that was built there.
    if facts["missing"] and not args.dry_run:
        session.done.pop("build", None)
    if args.retry:
        for name in [n for n in session.done if session.status(n) == "failed"]:
            del session.done[name]
    for each in session.left(planned):
        remaining = deadline - time.monotonic()
        if remaining < each.least:
            continue
        print(f"{each.name} ...", file=sys.stderr, flush=True)
        session.run(each, remaining)
        if each.name == "build" and session.status("build") != "done":
            break  # the rest would say the same in more words
    if (out / "results.json").is_file():
        _, table = execute([sys.executable, "bench/goals.py", str(out / "results.json")], {}, SPARE)
        (out / "goals.md").write_text(table)
    print(summarise(session, planned))
    if any(session.status(s.name) == "failed" for s in planned):
        return 1
    return UNFINISHED if session.left(planned) else 0


if __name__ == "__main__":
    sys.exit(main())
