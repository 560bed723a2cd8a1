"""``python bench/train.py``: what the engine of ``rkfast train`` adds to the bare step loop.

Bare is the usual loop of PyTorch, with the same network, optimizer and batches of the same loader. Its steps and those
of the engine take turns, in one process; checkpoints and tests are in neither.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

if not __package__:
    import runpy

    sys.path.pop(0)  # this folder
    runpy.run_path(str(Path(__file__).with_name("checkout.py")))
    __package__ = "rkfast.bench"

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from rkfast.train import engine, log
from rkfast.train.data import load
from rkfast.train.recipes import Recipe, overridden, recipe

from . import machine, report, timing

WARM = 1  # epochs that do not count


def bare(one: Recipe, fused: str, device: torch.device) -> Iterator[float]:
    """Seconds of each step."""
    data = load(one.data, augment=one.augment)
    batches = engine.Batches(data.train, one.batch, 0, random=one.augment is not None)
    loader = iter(DataLoader(batches, batch_size=None, sampler=range(one.epochs * batches.steps)))
    layout = torch.channels_last
    torch.manual_seed(0)
    model = engine.build(one, data, fused).to(device, memory_format=layout)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), one.lr, momentum=one.momentum, weight_decay=one.weight_decay, nesterov=one.nesterov
    )
    while True:
        start = time.perf_counter()
        images, labels = next(loader)
        images = images.to(device, memory_format=layout, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - start


def measured(one: Recipe, fused: str, device: torch.device) -> dict[str, Any]:
    """Behind each step of the engine is a bare one, whose time is taken from the engine's epoch."""
    beside, away = bare(one, fused, device), 0.0
    times: dict[str, list[float]] = {"bare": [0.0], "engine": []}  # of each epoch
    step, row = log.Log.step, log.Log.row

    def between(self: log.Log, at: int, epoch: int) -> None:
        nonlocal away
        step(self, at, epoch)
        start = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.synchronize()
        waited = time.perf_counter() - start
        times["bare"][-1] += next(beside)
        away += time.perf_counter() - start - waited
        if len(times["engine"]) == len(times["bare"]):  # the epoch's last step, behind its row
            times["bare"].append(0.0)
            away = 0.0

    def ended(self: log.Log, found: dict[str, Any], speed: dict[str, Any]) -> None:
        row(self, found, speed)
        times["engine"].append(speed["seconds"] - away)

    nothing = mock.patch.object(engine, "evaluate", return_value={"loss": 0.0, "error": 0.0})
    hooks = mock.patch.multiple(log.Log, step=between, row=ended)
    with tempfile.TemporaryDirectory() as folder, nothing, hooks:
        engine.train(one, folder, fused=fused, device=device)
        steps = log.read(Path(folder, log.SPEED))[0]["step"]
    ms = {name: [1e3 * seconds / steps for seconds in times[name][WARM : one.epochs]] for name in times}
    share = timing.ratios(ms["engine"], ms["bare"])
    return {
        "recipe": one.name,
        "fused": fused,
        "threads": torch.get_num_threads(),
        "steps": steps,
        "epochs": one.epochs - WARM,
        **{f"{name}_ms": timing.summary(each)._asdict() for name, each in ms.items()},
        "added_percent": {name: 100 * (ratio - 1) for name, ratio in share._asdict().items()},
    }


def markdown(document: dict[str, Any]) -> str:
    lines = [
        report.where(document),
        "",
        "Milliseconds of a step, medians of epochs (20th to 80th percentile), whose steps take turns; `added`: of the "
        "medians (and epoch by epoch).",
        "",
        *(f"**{busy}**\n" for busy in report.disturbed(document)),
        "| recipe | fused | threads | steps × epochs | bare, ms | engine, ms | added, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        spread = ("{p50:.3f} ({p20:.3f}–{p80:.3f})".format(**row[f"{name}_ms"]) for name in ("bare", "engine"))
        added = "{p50:.1f} ({p20:.1f}–{p80:.1f})".format(**row["added_percent"])
        head = (row["recipe"], row["fused"], row["threads"], f"{row['steps']} × {row['epochs']}")
        lines.append(f"| {' | '.join(map(str, (*head, *spread, added)))} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/train.py", description=__doc__)
    add = parser.add_argument
    add("recipes", nargs="*", default=["digits"], metavar="RECIPE", help="(digits)")
    add("--epochs", type=int, default=40, help="of each side (%(default)s)")
    add("--fused", nargs="+", choices=engine.FUSED, default=list(engine.FUSED), help="(both)")
    add("--threads", type=int, default=machine.cores(), help="(all cores)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE", help="the table, which is also printed")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    document = {**machine.describe(device.type), "load": [machine.load(), None], "rows": []}
    for name in args.recipes:
        one = overridden(recipe(name), epochs=args.epochs + WARM)
        document["rows"] += [measured(one, fused, device) for fused in args.fused]
    document["load"][1] = machine.load()
    report.leave(document, markdown(document), args.json, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
