"""``python bench/slowest.py``: the kernels that take longest in a training step of ours, by network, and what the
hardware's counters say of them where Nsight Compute is there."""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    import runpy

    sys.path.pop(0)  # this folder
    runpy.run_path(str(Path(__file__).with_name("checkout.py")))
    __package__ = "rkfast.bench"

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]  # missing in torch's stubs

from . import machine, report
from .contest import Contest, said
from .gpu import execute
from .models import FULL, ModelCase, Networks, Steps, cases

TOP = 10
STEPS = 3  # that are profiled
FAMILIES = {"cuda": ("densenet", "tsc", "irknet"), "cpu": ("erknet",)}  # of each its first network
LAUNCHES = 40  # that Nsight Compute looks at
SECTIONS = ("SpeedOfLight", "Occupancy")
COUNTERS = ("DRAM Throughput", "Memory Throughput", "Compute (SM) Throughput", "Achieved Occupancy")  # in per cent


def training(family: str, size: str, device: str) -> ModelCase:
    return next(case for case in cases(family, size, device) if case.training)


def started(case: ModelCase, device: str) -> tuple[Networks, Steps]:
    networks = Networks(case, Contest(device, ("auto",), (), 0.0, torch.get_num_threads()))
    contender, _ = networks._started(next(case.variants()), "auto")
    return networks, contender


def profiled(contender: Steps, device: str) -> list[dict[str, Any]]:
    """Per step, by kernel (on a CPU by operator), the longest first: launches, milliseconds and their share of all."""
    for _ in range(2):
        contender.both()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(STEPS):
            contender.both()
        if device == "cuda":
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    events = [event for event in profile.key_averages() if event.device_type == kind]
    taken = {e.key: e.self_device_time_total if device == "cuda" else e.self_cpu_time_total for e in events}
    whole = sum(taken.values())
    return [
        {
            "kernel": event.key,
            "launches": event.count / STEPS,
            "ms": taken[event.key] / STEPS / 1e3,
            "share": taken[event.key] / whole,
        }
        for event in sorted(events, key=lambda event: -taken[event.key])
    ]


def counted(family: str, size: str, kernels: Sequence[str], seconds: float) -> tuple[dict[str, Any], str | None]:
    """By kernel the median of each counter over its first launches in a step; or why there is none."""
    ncu = shutil.which("ncu")
    if ncu is None or not kernels:
        return {}, "ncu was not found on the PATH" if kernels else "there are no kernels"
    names = "|".join(re.escape(name) for name in kernels)
    command = [
        *(ncu, "--csv", "--page", "details", "--clock-control", "none", "--profile-from-start", "off"),
        *("--kernel-name", f"regex:^({names})$", "--launch-count", str(LAUNCHES)),
        *(word for section in SECTIONS for word in ("--section", section)),
        *(sys.executable, str(Path(__file__).resolve()), family, "--size", size, "--device", "cuda", "--watched"),
    ]
    code, output = execute(command, {}, seconds)
    if code is None:
        return {}, f"ncu took longer than {seconds:.0f} s"
    lines = [line for line in output.splitlines() if line.startswith('"')]  # among them are words of the program
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    return ({}, f"ncu: {output[-300:].strip()}") if head is None else (medians(lines[head:]), None)


def medians(lines: Sequence[str]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, list[float]]] = {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name") in COUNTERS:
            try:
                value = float(row["Metric Value"].replace(",", ""))
            except ValueError:
                continue  # n/a
            found.setdefault(row["Kernel Name"], {}).setdefault(row["Metric Name"], []).append(value)
    return {
        kernel: {name: statistics.median(values) for name, values in counters.items()}
        for kernel, counters in found.items()
    }


def measured(family: str, size: str, device: str) -> dict[str, Any]:
    case = training(family, size, device)
    try:
        networks, contender = started(case, device)
        verdict = networks._verdict(next(case.variants()))
        every = profiled(contender, device)
    except Exception as error:
        return {"id": case.id, "failure": said(error)}
    if verdict.failure is not None:
        return {"id": case.id, "failure": verdict.failure}
    return {"id": case.id, "kernels": every[:TOP], "ms": sum(row["ms"] for row in every)}


def watched(family: str, size: str, device: str) -> None:
    """One step, for Nsight Compute, behind those in which kernels are compiled and chosen."""
    _, contender = started(training(family, size, device), device)
    contender.both()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    contender.both()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def markdown(document: dict[str, Any]) -> str:
    lines = [report.where(document), ""]
    for network in document["networks"]:
        lines += [f"## {network['id']}", "", *_table(network), ""]
    return "\n".join(lines)


def _table(network: dict[str, Any]) -> Iterator[str]:
    if "failure" in network:
        yield f"**wrong, no figure**: {network['failure']}"
        return
    counters = network.get("counters", {})
    shown = COUNTERS if counters else ()
    yield f"{network['ms']:.3g} ms of kernels a step; the {len(network['kernels'])} that take longest:"
    yield ""
    yield "| kernel | launches | ms | share |" + "".join(f" {name}, % |" for name in shown)
    yield "|" + "---|" * (4 + len(shown))
    for row in network["kernels"]:
        own = counters.get(row["kernel"], {})
        values = "".join(f" {own[name]:.0f} |" if name in own else " |" for name in shown)
        name = row["kernel"].replace("|", "\\|")
        yield f"| `{name[:120]}` | {row['launches']:g} | {row['ms']:.3g} | {row['share']:.0%} |{values}"
    if network.get("no_counters"):
        yield ""
        yield f"No counters: {network['no_counters']}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/slowest.py", description=__doc__)
    add = parser.add_argument
    add("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FULL['cuda'])}")
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--size", choices=["tiny", "full"], default="full")
    add("--seconds", type=float, default=150, help="after which Nsight Compute is ended (%(default)s)")
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE", help="the tables, which are also printed")
    add("--watched", action="store_true", help="one step, for Nsight Compute")
    args = parser.parse_args(argv)
    unknown = [family for family in args.families if family not in FULL[args.device]]
    if unknown:
        parser.error(f"{unknown[0]!r} is no family of models; there are {', '.join(FULL[args.device])}")
    families = args.families or FAMILIES[args.device]
    if args.watched:
        watched(families[0], args.size, args.device)
        return 0
    deadline = time.monotonic() + args.seconds
    document: dict[str, Any] = {**machine.describe(args.device), "load": [machine.load(), None]}
    document["networks"] = [measured(family, args.size, args.device) for family in families]
    document["load"][1] = machine.load()
    if args.device == "cuda":
        if args.json is not None:
            report.write_json(args.json, document)  # whatever becomes of what follows
        torch.cuda.empty_cache()  # the process that ncu watches has a network of its own
        for i, (family, network) in enumerate(zip(families, document["networks"], strict=True)):
            names = (row["kernel"] for row in network.get("kernels", ()))
            plain = [name for name in names if re.fullmatch(r"\w+", name)]  # no templates
            share = (deadline - time.monotonic()) / (len(families) - i)
            network["counters"], network["no_counters"] = counted(family, args.size, plain, max(share, 1))
    report.leave(document, markdown(document), args.json, args.markdown)
    return int(any("failure" in network for network in document["networks"]))


if __name__ == "__main__":
    sys.exit(main())
