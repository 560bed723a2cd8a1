"""``python bench/digits.py``: the recipes for the handwritten digits, fused with a seed beside stock PyTorch with two.

Each training has a process of its own, one after the other; with ``--out`` they go on where they stopped.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    import runpy

    sys.path.pop(0)  # this folder
    runpy.run_path(str(Path(__file__).with_name("checkout.py")))
    __package__ = "rkfast.bench"

import torch

from rkfast.train import engine, log
from rkfast.train.recipes import Recipe, overridden, recipe

from . import machine, report

RECIPES = ("digits/erknet", "digits/irknet", "digits/tsc_resnet", "digits/ho_resnet")
SIDES = (("auto", 0), ("off", 0), ("off", 1))  # fused, seed
POINTS = 0.5  # that the errors of fused and stock may differ by


def train(one: Recipe, out: Path, fused: str, seed: int, device: str, threads: int) -> None:
    torch.set_num_threads(threads)
    engine.train(one, out, fused=fused, seed=seed, device=device)


def trained(one: Recipe, folder: Path, fused: str, seed: int, device: str, threads: int) -> dict[str, Any]:
    out = folder / one.name / f"{fused}-{seed}"
    forked = device == "cpu" and "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if forked else "spawn")
    process = context.Process(target=train, args=(one, out, fused, seed, device, threads))  # type: ignore[attr-defined]
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"the training in {out} ended with {process.exitcode}")
    rows, speed = (log.read(out / name) for name in (log.METRICS, log.SPEED))
    return {
        "recipe": one.name,
        "fused": fused,
        "seed": seed,
        "error": rows[-1]["test_error"],
        "best": min(row["test_error"] for row in rows),
        "losses": [row["train_loss"] for row in rows],
        "test_loss": rows[-1]["test_loss"],
        "epoch_s": statistics.median(row["seconds"] for row in speed),
        "total_s": sum(row["seconds"] for row in speed),
    }


def compared(fused: dict[str, Any], stock: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Fused beside stock with the same seed, and how far another seed is from that.

    Differences of training losses are those of the last epoch, and the root of the mean square over all epochs: a
    single one of two seeds is small now and then by chance.
    """

    def apart(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float]:
        gaps = [x - y for x, y in zip(a["losses"], b["losses"], strict=True)]
        return {"last": abs(gaps[-1]), "epochs": math.sqrt(statistics.fmean(gap * gap for gap in gaps))}

    ours, noise = apart(fused, stock), apart(stock, other)
    points = abs(fused["error"] - stock["error"])
    return {
        "recipe": fused["recipe"],
        "error_points": points,
        "errors_agree": points <= POINTS,
        "loss_apart": ours,
        "seeds_apart": noise,
        "within_seeds": {name: ours[name] <= noise[name] for name in ours},
        "speedup": stock["epoch_s"] / fused["epoch_s"],
    }


def markdown(document: dict[str, Any]) -> str:
    lines = [
        report.where(document),
        "",
        f"{document['threads']} threads, {document['epochs']} epochs; the median of their times, tests and checkpoints "
        "not counted.",
        "",
        *(f"**{busy}**\n" for busy in report.disturbed(document)),
        "| recipe | fused | seed | test error, % | at best, % | training loss | test loss | s an epoch | s in all |",
        "|" + "---|" * 9,
    ]
    for row in document["rows"]:
        cells = (
            *(row["recipe"], row["fused"], str(row["seed"]), f"{row['error']:.2f}", f"{row['best']:.2f}"),
            *(f"{row['losses'][-1]:.5f}", f"{row['test_loss']:.4f}", f"{row['epoch_s']:.3f}", f"{row['total_s']:.1f}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Fused beside stock, both with seed 0. Losses: how far they are apart, of stock's two seeds in brackets.",
        "",
        f"| recipe | errors apart, points | at most {POINTS} | losses, last epoch | within | losses, all epochs (rms) "
        "| within | epochs faster by |",
        "|" + "---|" * 8,
    ]
    for row in document["compared"]:
        said = [row["recipe"], f"{row['error_points']:.2f}", _said(row["errors_agree"])]
        for which in ("last", "epochs"):
            apart = f"{row['loss_apart'][which]:.5f} ({row['seeds_apart'][which]:.5f})"
            said += [apart, _said(row["within_seeds"][which])]
        lines.append(f"| {' | '.join([*said, format(row['speedup'], '.2f')])} |")
    return "\n".join(lines) + "\n"


def _said(yes: bool) -> str:
    return "yes" if yes else "**no**"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/digits.py", description=__doc__)
    add = parser.add_argument
    add("recipes", nargs="*", default=list(RECIPES), metavar="RECIPE", help=f"({', '.join(RECIPES)})")
    add("--epochs", type=int, default=12, help="(%(default)s)")
    add("--threads", type=int, default=machine.cores(), help="(all cores)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--out", type=Path, metavar="FOLDER", help="of the runs (a temporary one)")
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE", help="the tables, which are also printed")
    args = parser.parse_args(argv)
    recipes = [overridden(recipe(name), epochs=args.epochs) for name in args.recipes]
    document: dict[str, Any] = {**machine.describe(args.device), "load": [machine.load(), None]}
    document |= {"threads": args.threads, "epochs": args.epochs, "rows": [], "compared": []}
    with tempfile.TemporaryDirectory() as folder:
        for one in recipes:
            found = [trained(one, args.out or Path(folder), *side, args.device, args.threads) for side in SIDES]
            document["rows"] += found
            document["compared"].append(compared(*found))
    document["load"][1] = machine.load()
    report.leave(document, markdown(document), args.json, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
