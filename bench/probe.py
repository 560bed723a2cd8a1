"""``python bench/probe.py``: what of cuDNN's the kernels could build on, correctness first.

Whether it writes a convolution's result straight into a slot of a wider buffer as fast as into a tensor of its own;
what its kernels of convolution, bias, sum and ReLU gain; and, where nvidia-cudnn-frontend is installed, those that
normalise what they read and take the moments of what they write.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:
    import runpy

    sys.path.pop(0)  # this folder
    runpy.run_path(str(Path(__file__).with_name("checkout.py")))
    __package__ = "rkfast.bench"

import torch
from torch import Tensor
from torch.nn import functional as F

from rkfast.ops import bn_rk_sum, channel_moments, rk_sum

from . import engines, gate, machine, report, timing
from .contest import said

Outcome = tuple[Tensor, ...]
ROUNDS = (11, 50)
ALL = "all of them"
SPARE = 40  # seconds for all that is not timed, behind which nothing is asked
TOLERANCE = 2  # times the error of the first contender, from fp64
LOAD = 8  # channels of 16 bits that are loaded at once, at whose multiples padded slots begin


class Shape(NamedTuple):
    """Of a convolution: batch, channels read, channels written, pixels a side, kernel, slots of the buffer."""

    n: int
    c: int
    k: int
    side: int
    kernel: int = 3
    slots: int = 3

    @property
    def name(self) -> str:
        return f"{self.n}x{self.c}x{self.side}x{self.side}, {self.kernel}x{self.kernel} to {self.k}"


# DenseNet-121's blocks, ERKNet behind its bottleneck of 4k channels, IRKNet behind that of k.
GROWTHS = (
    *(Shape(256, 128, 32, side, slots=slots) for side, slots in ((56, 8), (28, 16), (14, 32), (7, 32))),
    *(Shape(64, c, k, 32, slots=slots) for c, k, slots in ((144, 36, 7), (80, 80, 6), (150, 150, 6))),
)
# Of ResNet-50's bottlenecks the convolutions with ReLU behind them, and those with a sum besides.
ACTIVE = tuple(
    Shape(256, c, width, side, kernel)
    for width, side in ((64, 56), (128, 28), (256, 14), (512, 7))
    for c, kernel in ((4 * width, 1), (width, 3))
)
JOINED = tuple(Shape(256, width, 4 * width, side, 1) for width, side in ((64, 56), (128, 28), (256, 14), (512, 7)))
TINY = (Shape(2, 8, 4, 6), Shape(2, 8, 8, 6, 1))

# PyTorch keeps cuDNN's plans, each thread its own, by sizes and alignment, not by the strides of what they write: in
# one thread, the plan of a dense result may be taken for a slot.
OTHER_THREAD = concurrent.futures.ThreadPoolExecutor(1)


class Data:
    """Images, weight and vectors of a shape, channels_last, never zeros; and a buffer with a slot for the result."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str, padded: bool = True) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*sizes: int) -> Tensor:
            drawn = torch.randn(*sizes, generator=generator, device=device).to(dtype)
            return drawn.contiguous(memory_format=torch.channels_last) if len(sizes) == 4 else drawn

        n, c, k, side, kernel, slots = shape
        self.dtype, self.device, self.padding = dtype, device, kernel // 2
        self.read = randn(n, 2 * c, side, side)[:, :c]
        self.x = self.read.contiguous(memory_format=torch.channels_last)
        self.weight = randn(k, c, kernel, kernel) * (2 / (c * kernel**2)) ** 0.5
        self.other = randn(n, k, side, side)
        self.bias, self.scale, self.shift = randn(k), 1 + 0.1 * randn(c), 0.1 * randn(c)
        self.unit = torch.zeros_like(self.scale), torch.ones_like(self.scale)  # a mean and a variance
        pitch = math.ceil(k / LOAD) * LOAD if padded else k
        self.first = slots // 2 * pitch
        self.kept = randn(n, slots * pitch, side, side)
        self.buffer = self.kept.clone()
        self.slot = self.buffer[:, self.first : self.first + k]

    def conv(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), bias, padding=self.padding)

    def straight(self) -> Tensor:
        if self.device == "cpu":
            return self.slot.copy_(self.conv(self.x))
        sizes = ([self.padding] * 2, [1, 1], [1, 1], 1)
        return torch.ops.aten.cudnn_convolution.out(self.x, self.weight, *sizes, False, False, True, out=self.slot)

    def active(self) -> Tensor:
        """relu(scale * x + shift) as a pass of its own."""
        return bn_rk_sum(
            self.x, self.scale, self.shift, *self.unit, relu=True, training=False, momentum=None, eps=1e-12
        )

    def true_active(self) -> Tensor:
        scale, shift = (v.double().view(1, -1, 1, 1) for v in (self.scale, self.shift))
        return F.relu(self.x.double() * scale + shift)

    def weight_gradient(self, active: Tensor) -> Tensor:
        sizes = ([1, 1], [self.padding] * 2, [1, 1], False, [0, 0], 1)
        grad, weight = self.other.to(active.dtype), self.weight.to(active.dtype)
        return torch.ops.aten.convolution_backward(grad, active, weight, None, *sizes, [False, True, False])[1]

    def spoil(self) -> None:
        """The buffer as it was, its slot not yet written."""
        self.buffer.copy_(self.kept)
        self.slot.fill_(math.nan)

    def intact(self) -> bool:
        """Whether nothing was written beside the slot."""
        end = self.first + self.slot.shape[1]
        sides = (slice(0, self.first), slice(end, self.buffer.shape[1]))
        return all(torch.equal(self.buffer[:, side], self.kept[:, side]) for side in sides)


class Question(NamedTuple):
    """Contenders, the first of which is what the others are compared with, and what they must come to in fp64."""

    data: Data
    contenders: dict[str, Callable[[], Outcome]]
    truth: Callable[[], Outcome]


def with_moments(out: Tensor) -> Outcome:
    moments = channel_moments(out)
    return out, moments.mean, moments.var


def true_moments(out: Tensor) -> Outcome:
    var, mean = torch.var_mean(out, (0, 2, 3), correction=0)
    return out, mean, var


def slots(data: Data) -> Question:
    contenders: dict[str, Callable[[], Outcome]] = {
        "a tensor of its own": lambda: (data.conv(data.x),),
        "straight into the slot": lambda: (data.straight(),),
        "straight, by another thread": lambda: (OTHER_THREAD.submit(data.straight).result(),),
        "copied into the slot": lambda: (data.slot.copy_(data.conv(data.x)),),
    }
    return Question(data, contenders, lambda: (data.conv(data.x.double()),))


def measured_slots(data: Data) -> Question:
    """As a block's forward goes, which wants the moments of each slot."""

    def copied() -> Outcome:
        out, moments = rk_sum([data.conv(data.x)], [1.0], out=data.slot, return_moments=True)
        return out, moments.mean, moments.var

    contenders: dict[str, Callable[[], Outcome]] = {
        "copied with its moments": copied,
        "straight, by another thread, then moments": lambda: with_moments(OTHER_THREAD.submit(data.straight).result()),
    }
    return Question(data, contenders, lambda: true_moments(data.conv(data.x.double())))


def active(data: Data) -> Question:
    return folded(data, None)


def joined(data: Data) -> Question:
    return folded(data, data.other)


def folded(data: Data, other: Tensor | None) -> Question:
    """A convolution as ``rkfast.fold`` leaves it."""
    others = [] if other is None else [other]
    sizes = ([1, 1], [data.padding] * 2, [1, 1], 1)

    def eager(x: Tensor, dtype: torch.dtype) -> Outcome:
        out = data.conv(x, data.bias.to(dtype))
        return (out.relu_() if other is None else out.add_(other.to(dtype)).relu_(),)

    def ours() -> Outcome:
        return (rk_sum([data.conv(data.x), *others], [1.0] * (1 + len(others)), shift=data.bias, relu=True),)

    def fused() -> Outcome:
        if data.device == "cpu":
            return eager(data.x, data.dtype)
        if other is None:
            return (torch.cudnn_convolution_relu(data.x, data.weight, data.bias, *sizes),)
        return (torch.cudnn_convolution_add_relu(data.x, data.weight, other, 1.0, data.bias, *sizes),)

    contenders: dict[str, Callable[[], Outcome]] = {
        "convolution, then eager": lambda: eager(data.x, data.dtype),
        "convolution, then one pass of ours": ours,
        "one of cuDNN's kernels": fused,
    }
    return Question(data, contenders, lambda: eager(data.x.double(), torch.float64))


def normalised(data: Data) -> Question:
    """A growth in training: scale, shift and ReLU before the convolution, sums and sums of squares behind it."""

    def engine(x: Tensor, into: Tensor) -> Callable[[], Outcome]:
        return engines.forward(x, data.scale, data.shift, data.weight, data.padding, into)

    def own() -> Tensor:
        return torch.full_like(data.other, math.nan)

    contenders: dict[str, Callable[[], Outcome]] = {
        "three passes": lambda: with_moments(data.conv(data.active())),
        "one engine": engine(data.x, own()),
        "one engine, into a slot": engine(data.x, data.slot),
        "one engine, from a slot": engine(data.read, own()),
    }
    return Question(data, contenders, lambda: true_moments(data.conv(data.true_active())))


def renormalised(data: Data) -> Question:
    """The gradient of a growth's weight, of which what it read is not kept but made again."""

    def engine(x: Tensor) -> Callable[[], Outcome]:
        return engines.weight_gradient(x, data.scale, data.shift, data.other, data.padding, data.weight)

    contenders: dict[str, Callable[[], Outcome]] = {
        "two passes": lambda: (data.weight_gradient(data.active()),),
        "one engine": engine(data.x),
        "one engine, from a slot": engine(data.read),
    }
    return Question(data, contenders, lambda: (data.weight_gradient(data.true_active()),))


class Asked(NamedTuple):
    question: str
    shape: Shape
    dtype: torch.dtype = torch.bfloat16
    padded: bool = True


QUESTIONS: dict[str, Callable[[Data], Question]] = {
    "a slot": slots,
    "a slot and its moments": measured_slots,
    "bias and ReLU": active,
    "bias, sum and ReLU": joined,
    "BatchNorm and moments": normalised,
    "BatchNorm and weight gradient": renormalised,
}


def questions(size: str) -> Iterator[Asked]:
    """In order of value."""
    tiny = size == "tiny"
    growths = TINY[:1] if tiny else GROWTHS
    for question in ("a slot", "a slot and its moments"):
        for shape in growths:
            yield Asked(question, shape)
            if shape.k % LOAD:
                yield Asked(question, shape, padded=False)
    yield from (Asked("bias and ReLU", shape) for shape in (TINY if tiny else ACTIVE))
    yield from (Asked("bias, sum and ReLU", shape) for shape in (TINY if tiny else JOINED))
    for question in ("BatchNorm and moments", "BatchNorm and weight gradient"):
        for shape in growths:
            yield from (Asked(question, shape, dtype) for dtype in (torch.bfloat16, torch.float16))


def answered(asked: Asked, device: str, seconds: float) -> dict[str, Any]:
    """Milliseconds of every contender that runs and is right."""
    row: dict[str, Any] = {
        "question": asked.question,
        "shape": asked.shape.name + ("" if asked.padded else ", slots not padded"),
        "dtype": str(asked.dtype).removeprefix("torch."),
        "contenders": {},
        "failed": {},
    }
    try:
        with torch.no_grad():
            question = QUESTIONS[asked.question](Data(asked.shape, asked.dtype, device, asked.padded))
            steps = right(question, row["failed"])
            if len(steps) == 1:
                return row  # a figure beside none answers nothing
            samples = timing.interleave(steps, seconds, device, rounds=ROUNDS)
    except Exception as error:
        row["failed"][ALL] = said(error)
        return row
    ms = {name: [sample.ms[0] for sample in taken] for name, taken in samples.items()}
    first = next(iter(question.contenders))
    for name, taken in ms.items():
        spread, speed = timing.summary(taken), timing.ratios(ms[first], taken)
        found = {"ms_p20": spread.p20, "ms_p50": spread.p50, "ms_p80": spread.p80}
        row["contenders"][name] = found | {"speed": speed.p50, "speed_p20": speed.p20, "speed_p80": speed.p80}
    return row


def right(question: Question, failed: dict[str, str]) -> dict[str, timing.Step]:
    """Those that come to what they must, also behind the others; into ``failed`` why the others do not.

    Raises:
        RuntimeError: the first is none of them.
    """
    first, truth = next(iter(question.contenders)), question.truth()
    allowed = TOLERANCE * _error(question.contenders[first](), truth) + torch.finfo(question.data.dtype).eps
    for name in 2 * list(question.contenders):
        if name not in failed:
            question.data.spoil()
            why = _wrong(question, name, truth, allowed)
            if why is not None:
                failed[name] = why
    if first in failed:
        raise RuntimeError(f"{first}: {failed[first]}")
    return {name: timing.Step(call) for name, call in question.contenders.items() if name not in failed}


def _wrong(question: Question, name: str, truth: Outcome, allowed: float) -> str | None:
    try:
        off = _error(question.contenders[name](), truth)
        if not question.data.intact():
            return "wrong: wrote beside the slot"
    except Exception as error:
        return said(error)
    return None if off <= allowed else f"wrong: off by {off:.1e}, where {allowed:.1e} is allowed"


def _error(results: Outcome, truth: Outcome) -> float:
    """The largest of any; NaN if one is."""
    errors = [gate.error(t.double(), wide.double()) for t, wide in zip(results, truth, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.nan


def outcomes(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A sentence a question: how often each contender was right, and how fast it then was beside the first."""
    for question in dict.fromkeys(row["question"] for row in rows):
        own = [row for row in rows if row["question"] == question]
        timed = list(dict.fromkeys(name for row in own for name in row["contenders"]))
        names = dict.fromkeys([*timed, *(name for row in own for name in row["failed"])])
        parts = []
        for name in names:
            speeds = [row["contenders"][name]["speed"] for row in own if name in row["contenders"]]
            part = f"{name}: right in {len(speeds)} of {len(own)}"
            if speeds and name != timed[0]:
                part += f", {statistics.geometric_mean(speeds):.2f} times as fast"
                part += f" ({min(speeds):.2f}–{max(speeds):.2f})"
            reasons = [row["failed"][name] for row in own if name in row["failed"]]
            parts.append(part + (f" ({statistics.mode(reasons)})" if reasons else ""))
        yield f"**{question}**: {'; '.join(parts)}."


def markdown(document: dict[str, Any]) -> str:
    lines = [report.where(document), "", *(f"- {line}" for line in document["outcomes"]), ""]
    if document["left"]:
        lines += [f"**{document['left']} convolutions were left out: there was no time.**", ""]
    lines += ["Medians (20th to 80th percentile); `speed`: how many times as fast as the first of each.", ""]
    lines += ["| question | convolution | dtype | contender | ms | speed | |", "|" + "---|" * 7]
    for row in document["rows"]:
        what = f"| {row['question']} | {row['shape']} | {row['dtype']} |"
        for name, each in row["contenders"].items():
            ms = f"{each['ms_p50']:.4g} ({each['ms_p20']:.4g}–{each['ms_p80']:.4g})"
            speed = f"{each['speed']:.2f} ({each['speed_p20']:.2f}–{each['speed_p80']:.2f})"
            lines.append(f"{what} {name} | {ms} | {speed} | right |")
        lines += [f"{what} {name} | | | {why.replace('|', '/')} |" for name, why in row["failed"].items()]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/probe.py", description=__doc__)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--size", choices=["tiny", "full"], default="full")
    add("--seconds", type=float, default=30, help="for all questions (%(default)s)")
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE", help="the table, which is also printed")
    args = parser.parse_args(argv)
    every = list(questions(args.size))
    document: dict[str, Any] = {**machine.describe(args.device), "load": [machine.load(), None], "rows": [], "left": 0}
    document["versions"]["cudnn"] = torch.backends.cudnn.version()
    deadline = time.monotonic() + args.seconds + SPARE
    for i, asked in enumerate(every):
        if time.monotonic() > deadline:
            document["left"] = len(every) - i
            break
        document["rows"].append(answered(asked, args.device, args.seconds / len(every)))
        if args.json is not None:
            report.write_json(args.json, document)  # whatever becomes of what follows
    document["load"][1] = machine.load()
    document["outcomes"] = list(outcomes(document["rows"]))
    report.leave(document, markdown(document), args.json, args.markdown)
    return int(not any(row["contenders"] for row in document["rows"]))


if __name__ == "__main__":
    sys.exit(main())
