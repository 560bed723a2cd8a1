"""``rkfast demo``: the same network trained twice from the same seed on handwritten digits, stock and fused.

The two trainings take turns step by step, so that whatever the machine does meanwhile happens to both.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import rkfast
from rkfast import dispatch, measure, native, tsc
from rkfast.extras import require
from rkfast.plot import steps as steps_plot

VARIANTS = {"stock": False, "fused": True}
WIDTH = 16  # of an HO-ResNet, and of those in its layout
ITS_LAYOUT = ("ho_resnet", "revnet", "polynet", "lm_resnet", "hyperbolic")
RESIDUAL = re.compile(r"(tsc_|se|wide_)?resne[tx]")  # of which a name says all
GROWTH_RATE = 12  # of the others
BATCH = 32
SIZE = 32
MAX_LR, OTHERS_MAX_LR = 0.1, 0.03  # of both kinds; of the others, some of which end below 97 % with more
WARMUP = 3  # steps that are not timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="ho_resnet-18", help="%(default)s; see rkfast.list_models()")
    parser.add_argument("--method", help="Runge-Kutta method of every step of an HO-ResNet (rk4)")
    parser.add_argument("--epochs", type=positive, default=16, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order of the images (%(default)s)")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the report and figures (%(default)s)")


def has_its_layout(args: argparse.Namespace) -> bool:
    return args.model.lower().split("-")[0] in ITS_LAYOUT


def is_residual(args: argparse.Namespace) -> bool:
    return RESIDUAL.match(args.model.lower()) is not None


def options(args: argparse.Namespace) -> dict[str, Any]:
    """What the model is made with: small enough for a laptop's CPU."""
    method = args.method or ("rk4" if args.model.lower().startswith("ho_resnet") else None)
    size = {"width": WIDTH} if has_its_layout(args) else {} if is_residual(args) else {"growth_rate": GROWTH_RATE}
    return {**({"method": method} if method else {}), **size, "in_chans": 1}


def run(args: argparse.Namespace) -> int:
    """Train, compare, write demo.json and demo.png; steps.png too, of a network with step sizes. Returns 1 where the
    reference stood in for a kernel."""
    tqdm = require("tqdm", "demo").tqdm
    require("matplotlib", "demo")
    before = dispatch.served()
    try:  # before minutes of training
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
    except OSError as error:
        print(f"rkfast demo: --out {args.out} cannot be written: {error}", file=sys.stderr)
        return 2
    try:
        device = torch.device(args.device)
        train, test = digits(args.seed, device)
        trainings = {name: Training(args, fused, device, len(train[1])) for name, fused in VARIANTS.items()}
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # the first two: no such device
        print(f"rkfast demo: {error}", file=sys.stderr)
        return 2
    order = torch.Generator().manual_seed(args.seed)
    steps = args.epochs * trainings["stock"].steps_per_epoch
    fused = trainings["fused"].model
    sizes = [tsc.steps(fused)] if hasattr(fused, "tsc") else []
    with tqdm(total=steps, desc=args.model, unit="step", file=sys.stderr) as bar:
        for _ in range(args.epochs):
            # The last, smaller batch is left out: every step does the same work.
            for batch in torch.randperm(len(train[1]), generator=order).split(BATCH)[
                : trainings["stock"].steps_per_epoch
            ]:
                images, labels = train[0][batch.to(device)], train[1][batch.to(device)]
                # Neither is always the one that finds the caches warm.
                for name in sorted(VARIANTS, reverse=bar.n % 2 == 0):
                    trainings[name].step(images, labels)
                bar.set_postfix({name: f"{t.losses[-1]:.4f}" for name, t in trainings.items()}, refresh=False)
                bar.update()
            if sizes:
                sizes.append(tsc.steps(fused))
    batch = train[0][:BATCH], train[1][:BATCH]
    results = {name: training.results(batch, test) for name, training in trainings.items()}
    calls = dispatch.served() - before
    report = {
        "rkfast": rkfast.__version__,
        "torch": torch.__version__,
        "device": hardware(device),
        **{key: getattr(args, key) for key in ("model", "epochs", "seed")},
        "options": options(args),
        "batch": BATCH,
        "steps": steps,
        "largest relative difference of losses": max(
            abs(a - b) / max(abs(a), abs(b), 1e-12)
            for a, b in zip(*(t.losses for t in trainings.values()), strict=True)
        ),
        "fused / stock step time": results["fused"]["step_ms"] / results["stock"]["step_ms"],
        "served": {f"{op} by {backend}": count for (op, backend), count in sorted(calls.items())},
        "failure": failure(calls, device.type),
        **({"step sizes": {block.name: block.mean for block in sizes[-1].blocks}} if sizes else {}),
        **{name: {**result, "losses": trainings[name].losses} for name, result in results.items()},
    }
    (args.out / "demo.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(report, args.out / "demo.png")
    print(table(report))
    if sizes:
        print(f"step sizes of the fused model:\n{sizes[-1]}")
        steps_plot.draw(sizes).savefig(args.out / "steps.png", dpi=120)
    written = ["demo.json", "demo.png", *(["steps.png"] if sizes else [])]
    print(f"wrote {', '.join(str(args.out / name) for name in written)}")
    if not built(device.type):
        reason = native.cpu_reason() if device.type == "cpu" else native.cuda_reason()
        print(f"no kernels here, so the reference computed the fused model: {reason}")
    if report["failure"]:
        print(f"rkfast demo: {report['failure']}", file=sys.stderr)
        return 1
    return 0


class Training:
    """One of the two models, with its optimizer and what was seen of it."""

    def __init__(self, args: argparse.Namespace, fused: bool, device: torch.device, images: int) -> None:
        torch.manual_seed(args.seed)
        model = rkfast.create_model(args.model, fused=fused, **options(args))
        # channels_last for both: the stock model's better layout (80 ms against 105 for 64 images, 2 AVX512 cores).
        self.model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        peak = MAX_LR if has_its_layout(args) or is_residual(args) else OTHERS_MAX_LR
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=peak, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        self.steps_per_epoch = images // BATCH
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=peak, total_steps=args.epochs * self.steps_per_epoch, pct_start=0.3
        )
        self.device = device
        self.losses: list[float] = []
        self.times: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        images = images.contiguous(memory_format=torch.channels_last)
        self.synchronize()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        self.synchronize()
        self.times.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        self.schedule.step()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def results(self, batch: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> dict[str, Any]:
        model = copy.deepcopy(self.model)  # measuring moves gradients and running statistics
        images, labels = batch[0].contiguous(memory_format=torch.channels_last), batch[1]

        def forward() -> Tensor:
            return F.cross_entropy(model(images), labels)

        forward().backward()  # what is allocated once and for all is not part of the peak
        kept = measure.saved_bytes(forward, [images, labels, *model.parameters(), *model.buffers()])
        peak = measure.peak_bytes(lambda: forward().backward(), self.device)
        model.eval()
        with torch.no_grad():
            answers = torch.cat([model(part).argmax(1) for part in test[0].split(BATCH)])
        times = self.times[min(WARMUP, len(self.times) - 1) :]
        low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else 3 * times
        return {
            "test_accuracy": (answers == test[1]).float().mean().item(),
            "step_ms": 1e3 * median,
            "step_ms_quartiles": [1e3 * low, 1e3 * high],
            "saved_bytes": kept,
            "peak_bytes": peak,
        }


def digits(seed: int, device: torch.device, size: int = SIZE) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's handwritten digits as (images [N, 1, size, size], labels [N]), four fifths of them for training.
    They are of 8 x 8 by themselves."""
    data = require("sklearn.datasets", "demo").load_digits()
    images = torch.from_numpy(data.images).float()[:, None]  # [N, 1, 8, 8], 0 to 16
    images = F.interpolate(images / 16, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    mean, std = images[train].mean(), images[train].std()
    images = ((images - mean) / std).to(device)
    labels = labels.to(device)
    return (images[train], labels[train]), (images[test], labels[test])


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def built(device: str) -> set[str]:
    """The ops that have a kernel on this device."""
    return {
        op.name
        for op in dispatch.OPS.values()
        if any(
            i.backend != "reference" and dispatch.backend_reason(i.backend, device) is None for i in op.implementations
        )
    }


def failure(calls: Counter[tuple[str, str]], device: str) -> str | None:
    """What the reference served although a kernel is built for it; None where that did not happen."""
    wrong = sorted(op for op in built(device) if calls[op, "reference"])
    if not wrong:
        return None
    return f"the reference served {', '.join(wrong)}, for which a kernel is built\n{dispatch.explain()}"


def title(report: dict[str, Any]) -> str:
    return f"{report['model']} {report['options'].get('method', '')}".rstrip()


def table(report: dict[str, Any]) -> str:
    stock, fused = report["stock"], report["fused"]

    def spread(result: dict[str, Any]) -> str:
        low, high = result["step_ms_quartiles"]
        return f"{result['step_ms']:.1f} ({low:.1f} to {high:.1f})"

    def ratio(key: str) -> str:
        return f"{fused[key] / stock[key]:.2f}" if fused[key] and stock[key] else ""

    rows = [
        ("", "stock", "fused", "fused / stock"),
        ("test accuracy", f"{stock['test_accuracy']:.4f}", f"{fused['test_accuracy']:.4f}", ""),
        ("step, ms: median (quartiles)", spread(stock), spread(fused), ratio("step_ms")),
        ("saved for backward, MB", *(_megabytes(r["saved_bytes"]) for r in (stock, fused)), ratio("saved_bytes")),
        ("peak memory of a step, MB", *(_megabytes(r["peak_bytes"]) for r in (stock, fused)), ratio("peak_bytes")),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(0, f"{title(report)}, {report['steps']} steps of {report['batch']} on {report['device']}")
    lines.append(f"largest relative difference of losses: {report['largest relative difference of losses']:.2e}")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    figure_type = require("matplotlib.figure", "demo").Figure  # needs no display
    figure = figure_type(figsize=(10, 4), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    for name, style in (("stock", "-"), ("fused", "--")):
        accuracy = report[name]["test_accuracy"]
        curves.plot(report[name]["losses"], style, label=f"{name}, test accuracy {accuracy:.3f}")
    curves.set(xlabel="step", ylabel="training loss", yscale="log", title=title(report))
    curves.legend()
    shown = [
        (label, report["fused"][key] / report["stock"][key])
        for key, label in (
            ("step_ms", "step time"),
            ("saved_bytes", "saved for\nbackward"),
            ("peak_bytes", "peak memory"),
        )
        if report["stock"][key]
    ]
    bars.axhline(1.0, color="grey", linewidth=1)
    bars.bar_label(bars.bar([label for label, _ in shown], [value for _, value in shown]), fmt="%.2f")
    bars.set(ylabel="fused / stock", title=report["device"])
    figure.savefig(path, dpi=120)


def _megabytes(value: int | None) -> str:
    return "not measured" if value is None else f"{value / 1e6:.1f}"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value
