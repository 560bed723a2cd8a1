"""``rkfast bench ops``, ``models`` or ``ADDRESS``, or ``python bench/run.py`` with the same arguments: the ops, our
networks, or one of anybody's (such as torchvision:densenet121), beside eager and compiled PyTorch; inference of
networks also beside OpenVINO and ONNX Runtime.

Exit status: 0; 1 where a result was wrong or a measurement broke down; 75 where ``--budget`` ended the run early, which
``--resume`` then continues.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:
    import runpy

    sys.path.pop(0)  # this folder
    runpy.run_path(str(Path(__file__).with_name("checkout.py")))
    __package__ = "rkfast.bench"

import torch

from rkfast import dispatch
from rkfast.commands import network
from rkfast.extras import require

from . import address, contest, machine, models, ops, page, report, turns
from .contest import Contest
from .workload import AnyCase

SUITES = {"ops": ops.SUITE, "models": models.SUITE}
SIZES = ("tiny", "quick", "full")
UNFINISHED = 75
# glibc gives large blocks back to the system at once, and each step then takes its pages anew; or it keeps them.
MALLOC = {
    "default": {},
    "large": {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
        "MALLOC_TOP_PAD_": str(1 << 26),
    },
}
DRIFT = 0.1  # a kept baseline holds while the copy beside it stays this close to what it was then


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("suite", metavar="SUITE", help=f"what to measure: {', '.join(SUITES)}, or {network.ADDRESSES}")
    names = "; ".join(f"of {name}: {', '.join(suite.cases)}" for name, suite in SUITES.items())
    peers = "; ".join(f"of {name}: {', '.join(suite.known_peers)}" for name, suite in SUITES.items())
    add("names", nargs="*", metavar="NAME", help=f"all of the suite by default; {names}")
    add("--size", help=f"{', '.join(SIZES)}: how many cases, how large (full); of a network, pixels ({network.SIZE})")
    add("--quick", dest="size", action="store_const", const="quick", help="the same as --size quick")
    add("--filter", default="", metavar="TEXT", help="only cases whose id, as --list prints it, contains it")
    add("--main", action="store_true", help="only the main cases")
    add("--list", action="store_true", help="print the ids of the cases and stop")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", action="append", choices=["auto", *dispatch.BACKENDS], help="of ours; may be repeated")
    add("--peers", default=None, help=f"comma-separated, {peers}; by default those that do not tune for long")
    add("--threads", type=int, action="append", help="may be repeated; by default all cores, and 1 for the main cases")
    add("--seconds", type=float, default=None, help="per case and loop (default 1, quick 0.5)")
    add(
        "--malloc", nargs="+", choices=["current", *MALLOC], default=None,
        help="settings to take the better of; by default both on CPU with glibc, and on CUDA the current one",
    )  # fmt: skip
    add("--budget", type=float, default=None, metavar="SECONDS", help="start no case after so long")
    add("--cold", action="store_true", help="on a CPU, time single steps, each behind those of other contenders; else "
        "steps under 20 ms behind an untimed one of their own")  # fmt: skip
    add("--resume", action="store_true", help="keep what --json already holds of this machine, commit and torch")
    add("--baselines", type=Path, metavar="FILE", help="take peers from there instead of measuring them again")
    add("--json", type=Path, metavar="FILE")
    add("--csv", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE", help="the table, which is also printed")
    add("--plot", type=Path, metavar="FILE")
    add("--html", type=Path, metavar="FILE", help="of a network: tables and plot on a page that needs no other file")
    add("--job", type=Path, help=argparse.SUPPRESS)
    address.add_arguments(parser.add_argument_group("of a network"))


def run(args: argparse.Namespace) -> int:
    if args.job is not None:
        for _ in _work(json.loads(args.job.read_text())):
            pass
        return 0
    try:
        _check(args)
    except ValueError as error:
        print(f"rkfast bench: {error}", file=sys.stderr)
        return 2
    cases = select(args)
    if args.list:
        print("\n".join(case.id for case in cases))
        return 0
    if args.plot is not None or args.html is not None:  # before minutes are spent
        require("matplotlib", "plots")
    document = _document(args)
    previous = _previous(args, document)
    if previous is not None:
        document = previous
    deadline = None if args.budget is None else time.time() + args.budget
    settings = _settings(args)
    broken = unfinished = False
    with tempfile.TemporaryDirectory() as folder:
        for threads in args.threads or _threads(args.device):
            wanted = [c for c in cases if args.threads or threads == _threads(args.device)[0] or c.main]
            finished = {(g["id"], g["threads"]) for g in document["gate"]}
            wanted = [c for c in wanted if (c.id, threads) not in finished]
            reports: dict[str, dict[str, Any]] = {c.id: {} for c in wanted}
            left = {c.id: c for c in wanted}
            jobs = [
                _job(args, [c.id for c in wanted], threads, s, deadline, Path(folder) / f"{s}-{threads}")
                for s in settings
            ]
            finish = functools.partial(_finish, args, document, left, reports)
            broken |= not _measured(jobs, reports, finish)
            finish()
            unfinished |= bool(left)
    own = args.suite not in SUITES
    if own and args.max_batch:
        document["max_batch"] = address.largest(args)
    print(_write(args, document))
    if args.plot is not None:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        (page if own else report).plot(args.plot, document)
    if args.html is not None:
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(page.html(document))
    if broken:
        return 1
    return UNFINISHED if unfinished else int(any(g["failure"] for g in document["gate"]))


def _finish(
    args: argparse.Namespace, document: dict[str, Any], left: dict[str, AnyCase], reports: dict[str, dict[str, Any]]
) -> None:
    """Take what was measured at every malloc setting into the files, where no later case can lose it."""
    for id in [id for id in left if len(reports[id]) == len(_settings(args))]:
        case = left.pop(id)
        document["gate"].extend(report.gates(case, reports[id], args.device))
        document["rows"].extend(report.rows(case, reports[id], args.device))
    _write(args, document)


def _write(args: argparse.Namespace, document: dict[str, Any]) -> str:
    """The files that are cheap to write; the table."""
    document["load"][1] = machine.load()
    table = (report if args.suite in SUITES else page).markdown(document)
    if args.json is not None:
        report.write_json(args.json, document)
    if args.csv is not None:
        report.write_csv(args.csv, document)
    if args.markdown is not None:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        args.markdown.write_text(table)
    return table


def suite_of(args: argparse.Namespace) -> contest.Suite:
    return SUITES[args.suite] if args.suite in SUITES else address.suite(args)


def _check(args: argparse.Namespace) -> None:
    """Fill in the size, and see that the suite can be measured at all.

    Raises:
        ValueError: what is wrong with which argument.
    """
    if args.suite not in SUITES and ":" not in args.suite:
        raise ValueError(f"{args.suite!r} is neither {' nor '.join(SUITES)} nor an address, {network.ADDRESSES}")
    suite = suite_of(args)
    unknown = [peer for peer in _named_peers(args) if peer not in suite.known_peers]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a peer; there are {', '.join(suite.known_peers)}")
    if args.suite not in SUITES:
        if args.names:
            raise ValueError(f"{args.names[0]!r}: one network at a time")
        address.made(address.asked(args))
        return
    args.size = args.size or "full"
    if args.size not in SIZES:
        raise ValueError(f"--size: of {args.suite} expected one of {', '.join(SIZES)}, got {args.size!r}")
    unknown = [name for name in args.names if name not in suite.cases]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no {suite.kind}; there are {', '.join(suite.cases)}")
    if args.html is not None:
        raise ValueError("--html: there is a page of a network only, such as torchvision:densenet121")


def _named_peers(args: argparse.Namespace) -> list[str]:
    return [peer for peer in (args.peers or "").split(",") if peer]


def _cases(args: argparse.Namespace) -> Iterator[AnyCase]:
    cases = suite_of(args).cases
    return (case for name in args.names or cases for case in cases[name](args.size, args.device))


def select(args: argparse.Namespace) -> list[AnyCase]:
    chosen = [case for case in _cases(args) if args.filter in case.id and (case.main or not args.main)]
    return sorted(chosen, key=lambda case: not case.main)


def _document(args: argparse.Namespace) -> dict[str, Any]:
    own = {} if args.suite in SUITES else {"network": address.described(args)}
    return {
        "schema": report.SCHEMA,
        **machine.describe(args.device),
        "load": [machine.load(), None],
        "size": args.size,
        **own,
        "malloc": {name: MALLOC.get(name, {}) for name in _settings(args)},
        "cold": args.cold,
        "gate": [],
        "rows": [],
    }


def _previous(args: argparse.Namespace, document: dict[str, Any]) -> dict[str, Any] | None:
    if not args.resume or args.json is None or not args.json.is_file():
        return None
    found = json.loads(args.json.read_text())
    same = ("schema", "machine", "versions", "commit", "dirty", "size", "network", "malloc", "cold")
    return found if all(found.get(key) == document.get(key) for key in same) else None


def _settings(args: argparse.Namespace) -> list[str]:
    if args.malloc:
        return list(args.malloc)
    return list(MALLOC) if args.device == "cpu" and sys.platform == "linux" else ["current"]


def _threads(device: str) -> list[int]:
    every = machine.cores()
    return [every, 1] if device == "cpu" and every > 1 else [every]


def _job(
    args: argparse.Namespace, ids: list[str], threads: int, setting: str, until: float | None, out: Path
) -> dict[str, Any]:
    suite = suite_of(args)
    peers = suite.peers[args.device] if args.peers is None else _named_peers(args)
    return {
        "asked": json.loads(json.dumps(vars(args), default=str)),
        "ids": ids,
        "contest": {
            "device": args.device,
            "backends": args.backend or suite.backends(args.device),
            "peers": peers,
            "seconds": args.seconds if args.seconds is not None else 0.5 if args.size in SIZES[:-1] else 1.0,
            "threads": threads,
            "cold": args.cold,
        },
        "setting": setting,
        "until": until,
        "turns": None,
        "baselines": None if args.baselines is None else str(args.baselines),
        "out": str(out),
    }


def _measured(
    jobs: list[dict[str, Any]], reports: dict[str, dict[str, Any]], done: Callable[[], None] = lambda: None
) -> bool:
    """Do jobs, in this process or by turns in processes with the malloc settings they ask for; collect the reports.
    ``done`` is called after each case that this process has measured."""

    def take(job: dict[str, Any], found: dict[str, Any]) -> None:
        reports[found["id"]][job["setting"]] = found

    jobs = [job for job in jobs if job["ids"]]
    apart = [job for job in jobs if job["setting"] != "current"]
    for job in jobs:
        if job not in apart:
            for found in _work(job):
                take(job, found)
                done()
    statuses = turns.run([functools.partial(_start, job) for job in apart])
    for job, status in zip(apart, statuses, strict=True):
        if status:
            what = f"the process that measured at malloc setting {job['setting']!r}"
            print(f"rkfast bench: {what} exited {status}", file=sys.stderr)
    for job in apart:
        out = Path(job["out"])
        for line in out.read_text().splitlines() if out.exists() else ():
            take(job, json.loads(line))
    return not any(statuses)


def _start(job: dict[str, Any], ends: tuple[int, int]) -> subprocess.Popen[bytes]:
    out = Path(job["out"])
    file = out.with_suffix(".job")
    file.write_text(json.dumps({**job, "turns": ends}))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment = {**kept, **MALLOC[job["setting"]], "OMP_NUM_THREADS": str(job["contest"]["threads"])}
    # Fresh, so that what compiling takes is seen; the next malloc setting finds it done.
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(out.parent / "compiled")
    command = [sys.executable, str(Path(__file__).resolve()), job["asked"]["suite"], "--job", str(file)]
    return subprocess.Popen(command, env=environment, pass_fds=ends)


def _work(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure the cases of a job, each result written, and given, as soon as it is there."""
    asked = job["contest"]
    settings = Contest(**{**asked, "backends": tuple(asked["backends"]), "peers": tuple(asked["peers"])})
    if job["turns"] is not None:
        own = turns.Turns(*job["turns"])
        own.wait()
        settings = replace(settings, pause=own.pause)
    torch.set_num_threads(settings.threads)
    suite = suite_of(argparse.Namespace(**job["asked"]))
    baselines = Baselines(job["baselines"], settings.device)
    with open(job["out"], "w") as out:
        for i, case in enumerate(_named(job)):
            if job["until"] is not None and time.time() > job["until"]:
                return
            _progress(job, i, case)
            found = baselines.measure(suite, case, settings)
            out.write(json.dumps(found) + "\n")
            out.flush()
            yield found
            if settings.device == "cuda" and _context_lost():
                print("rkfast bench: the CUDA context is lost; --resume goes on behind this case", file=sys.stderr)
                return


def _context_lost() -> bool:
    """Whether a kernel has broken down, after which no other runs in this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _named(job: dict[str, Any]) -> Iterator[AnyCase]:
    args = argparse.Namespace(**job["asked"])
    every = {case.id: case for case in _cases(args)}
    return (every[id] for id in job["ids"])


def _progress(job: dict[str, Any], i: int, case: AnyCase) -> None:
    where = f"{job['contest']['threads']} threads, malloc {job['setting']}"
    print(f"[{i + 1}/{len(job['ids'])}] {case.id} ({where})", file=sys.stderr, flush=True)


class Baselines:
    """Peers measured in earlier runs on the same device with the same torch, so that none is measured twice."""

    def __init__(self, path: str | None, device: str) -> None:
        self.path = None if path is None else Path(path)
        described = machine.describe(device)
        versions = described["versions"]
        self.key = f"{machine.kind(described)}, torch {versions['torch']}, triton {versions['triton']}"
        self.all: dict[str, Any] = {}
        if self.path is not None and self.path.is_file():
            self.all = json.loads(self.path.read_text())
        self.known = self.all.setdefault(self.key, {})

    def measure(self, suite: contest.Suite, case: AnyCase, settings: Contest) -> dict[str, Any]:
        if self.path is None:
            return contest.run(suite, case, settings)
        kept = self.known.get(f"{case.id}, {settings.threads} threads", {})
        peers = tuple(peer for peer in settings.peers if peer not in kept)
        found = contest.run(suite, case, replace(settings, peers=peers))
        if not found["contenders"]:
            return found
        if kept and _drifted(kept.get("copy"), found["contenders"].get("copy")):
            kept = {}
            found = contest.run(suite, case, settings)
        for peer, samples in kept.items():
            if peer in settings.peers:
                found["contenders"].setdefault(peer, {**samples, "kept": True})
        self._keep(f"{case.id}, {settings.threads} threads", found)
        return found

    def _keep(self, name: str, found: dict[str, Any]) -> None:
        assert self.path is not None
        self.known[name] = {
            peer: {k: v for k, v in samples.items() if k != "kept"}
            for peer, samples in found["contenders"].items()
            if not samples["ours"]
        }
        report.write_json(self.path, self.all)


def _drifted(then: dict[str, Any] | None, now: dict[str, Any] | None) -> bool:
    if then is None or now is None:
        return True
    mode = next(iter(now["ms"]))
    before, after = (statistics.median(c["ms"][mode]) for c in (then, now))
    return abs(after / before - 1) > DRIFT


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
