"""``python bench/probe.py``: what of cuDNN's the kernels could build on, correctness first.

Whether it writes a convolution's result straight into a slot of a wider buffer as fast as into a tensor of its own;
what its kernels of convolution, bias, sum and ReLU gain; and, where nvidia-cudnn-frontend is installed, those that
normalise what they read and take the moments of what they write.
"""

from __future__ import annotations

import argparse
import math
import sys
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

from . import gate, machine, report, timing
from .contest import said

Outcome = tuple[Tensor, ...]
ROUNDS = (11, 50)
TOLERANCE = 2  # times the error of the first contender, from fp64


class Shape(NamedTuple):
    """Of a convolution: batch, channels read, channels written, pixels a side, kernel."""

    n: int
    c: int
    k: int
    side: int
    kernel: int = 3

    @property
    def name(self) -> str:
        return f"{self.n}x{self.c}x{self.side}x{self.side}, {self.kernel}x{self.kernel} to {self.k}"


# DenseNet-121's blocks, ERKNet with 36 and 64 channels, IRKNet with 80 and 150.
GROWTHS = (
    *(Shape(256, 128, 32, side) for side in (56, 28, 14, 7)),
    *(Shape(64, c, k, 32) for c, k in ((36, 36), (144, 36), (80, 80), (150, 150))),
)
# ResNet-50's, the last of each block and those within.
FOLDED = (
    Shape(256, 64, 256, 56, 1),
    Shape(256, 64, 64, 56),
    Shape(256, 256, 1024, 14, 1),
    Shape(256, 256, 256, 14),
    Shape(256, 512, 2048, 7, 1),
)
TINY = (Shape(2, 8, 4, 6), Shape(2, 8, 8, 6, 1))
BEFORE, AFTER = 64, 32  # channels of the buffer on both sides of the slot


class Question(NamedTuple):
    """Contenders, the first of which is what the others are compared with, and what they must come to in fp64."""

    name: str
    shape: Shape
    dtype: torch.dtype
    contenders: dict[str, Callable[[], Outcome]]
    truth: Callable[[], Outcome]


class Data:
    """Images, weight and vectors of a shape, channels_last, never zeros."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def randn(*sizes: int) -> Tensor:
            drawn = torch.randn(*sizes, generator=generator, device=device).to(dtype)
            return drawn.contiguous(memory_format=torch.channels_last) if len(sizes) == 4 else drawn

        n, c, k, side, kernel = shape
        self.padding = kernel // 2
        self.x = randn(n, c, side, side)
        self.weight = randn(k, c, kernel, kernel) * (2 / (c * kernel**2)) ** 0.5
        self.other = randn(n, k, side, side)
        self.bias, self.scale, self.shift = randn(k), 1 + 0.1 * randn(c), 0.1 * randn(c)
        self.buffer = randn(n, BEFORE + k + AFTER, side, side)
        self.slot = self.buffer[:, BEFORE : BEFORE + k]

    def conv(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype), bias, padding=self.padding)

    def wide(self) -> Tensor:
        return self.x.double()


def slots(shape: Shape, dtype: torch.dtype, device: str) -> Question:
    data = Data(shape, dtype, device)
    around = [data.buffer[:, :BEFORE].clone(), data.buffer[:, BEFORE + shape.k :].clone()]
    sizes = ([data.padding] * 2, [1, 1], [1, 1], 1)

    def straight() -> Outcome:
        if device == "cpu":
            data.slot.copy_(data.conv(data.x))
        else:
            torch.ops.aten.cudnn_convolution.out(data.x, data.weight, *sizes, False, False, True, out=data.slot)
        return (data.slot, data.buffer[:, :BEFORE], data.buffer[:, BEFORE + shape.k :])

    contenders: dict[str, Callable[[], Outcome]] = {
        "a tensor of its own": lambda: (data.conv(data.x), *around),
        "straight into the slot": straight,
        "copied into the slot": lambda: (data.slot.copy_(data.conv(data.x)), *around),
    }
    return Question("a slot", shape, dtype, contenders, lambda: (data.conv(data.wide()), *around))


def folded(shape: Shape, dtype: torch.dtype, device: str) -> Question:
    """As ``rkfast.fold`` leaves a block's last convolution."""
    data = Data(shape, dtype, device)
    sizes = ([1, 1], [data.padding] * 2, [1, 1], 1)

    def fused() -> Outcome:
        if device == "cpu":
            return (F.relu(data.conv(data.x, data.bias) + data.other),)
        return (torch.cudnn_convolution_add_relu(data.x, data.weight, data.other, 1.0, data.bias, *sizes),)

    contenders: dict[str, Callable[[], Outcome]] = {
        "convolution, sum and ReLU": lambda: (data.conv(data.x, data.bias).add_(data.other).relu_(),),
        "one of cuDNN's kernels": fused,
    }

    def truth() -> Outcome:
        return (F.relu(data.conv(data.wide(), data.bias.double()) + data.other.double()),)

    return Question("bias, sum and ReLU", shape, dtype, contenders, truth)


def normalised(shape: Shape, dtype: torch.dtype, device: str) -> Question:
    """A growth in training: scale, shift and ReLU before the convolution, sums and sums of squares behind it."""
    data = Data(shape, dtype, device)
    scale, shift = (v.view(1, -1, 1, 1) for v in (data.scale, data.shift))

    def passes() -> Outcome:
        out = data.conv(torch.addcmul(shift, data.x, scale).relu_())
        var, mean = torch.var_mean(out.float(), (0, 2, 3), correction=0)
        return out, mean, var

    def truth() -> Outcome:
        out = data.conv(F.relu(data.wide() * scale.double() + shift.double()))
        var, mean = torch.var_mean(out, (0, 2, 3), correction=0)
        return out, mean, var

    def engine(into: Tensor) -> Callable[[], Outcome]:
        built: list[Callable[[], Outcome]] = []

        def run() -> Outcome:
            if not built:
                built.append(graph(data, scale, shift, into))
            return built[0]()

        return run

    own = torch.empty_like(data.other)
    contenders = {"three passes": passes, "one engine": engine(own), "one engine, into a slot": engine(data.slot)}
    return Question("BatchNorm and moments", shape, dtype, contenders, truth)


def graph(data: Data, scale: Tensor, shift: Tensor, into: Tensor) -> Callable[[], Outcome]:
    """By cuDNN's graphs: scale, shift, ReLU, convolution and its sums, as one engine."""
    import cudnn  # type: ignore[import-not-found]  # nvidia-cudnn-frontend

    kinds, channels = cudnn.data_type, into.shape[1]
    handle = cudnn.create_handle()
    plan = cudnn.pygraph(
        handle=handle,
        io_data_type=kinds.BFLOAT16 if into.dtype == torch.bfloat16 else kinds.HALF,
        intermediate_data_type=kinds.FLOAT,
        compute_data_type=kinds.FLOAT,
    )
    image, weight, factor, offset = (plan.tensor_like(t) for t in (data.x, data.weight, scale, shift))
    active = plan.relu(input=plan.bias(input=plan.scale(input=image, scale=factor), bias=offset))
    ends = [data.padding] * 2
    out = plan.conv_fprop(image=active, weight=weight, padding=ends, stride=[1, 1], dilation=[1, 1])
    out.set_output(True).set_dim(list(into.shape)).set_stride(list(into.stride()))
    sums = plan.genstats(input=out)
    for each in sums:
        each.set_output(True).set_data_type(kinds.FLOAT)
    plan.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    found = [torch.empty(1, channels, 1, 1, device=into.device) for _ in sums]
    space = torch.empty(plan.get_workspace_size(), dtype=torch.uint8, device=into.device)
    given = {image: data.x, weight: data.weight, factor: scale, offset: shift, out: into}
    given |= dict(zip(sums, found, strict=True))
    count = into.numel() / channels

    def run() -> Outcome:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        plan.execute(given, space, handle=handle)
        mean, square = (t.flatten() / count for t in found)
        return into, mean, square - mean * mean

    return run


def questions(size: str, device: str) -> Iterator[Callable[[], Question]]:
    tiny = size == "tiny"

    def asked(make: Callable[[Shape, torch.dtype, str], Question], shape: Shape, dtype: torch.dtype) -> Any:
        return lambda: make(shape, dtype, device)

    for shape in TINY if tiny else GROWTHS:
        yield asked(slots, shape, torch.bfloat16)
    for shape in TINY if tiny else FOLDED:
        yield asked(folded, shape, torch.bfloat16)
    for shape in TINY[:1] if tiny else GROWTHS:
        for dtype in (torch.bfloat16, torch.float16):
            yield asked(normalised, shape, dtype)


def answered(question: Question, device: str, seconds: float) -> dict[str, Any]:
    """Milliseconds of every contender that runs and is right."""
    found: dict[str, Any] = {
        "question": question.name,
        "shape": question.shape.name,
        "dtype": str(question.dtype).removeprefix("torch."),
        "contenders": {},
        "failed": {},
    }
    truth = [t.clone() for t in question.truth()]
    first, *_ = question.contenders
    steps: dict[str, timing.Step] = {}
    with torch.no_grad():
        allowed = TOLERANCE * _error(question.contenders[first](), truth) + torch.finfo(question.dtype).eps
        for name, call in question.contenders.items():
            try:
                off = _error(call(), truth)
            except Exception as error:
                found["failed"][name] = said(error)
                continue
            if off <= allowed:
                steps[name] = timing.Step(call)
            else:
                found["failed"][name] = f"wrong: off by {off:.1e}, where {allowed:.1e} is allowed"
        samples = timing.interleave(steps, seconds, device, rounds=ROUNDS)
    ms = {name: timing.summary([sample.ms[0] for sample in taken]) for name, taken in samples.items()}
    for name, spread in ms.items():
        speed = ms[first].p50 / spread.p50
        found["contenders"][name] = {"ms_p20": spread.p20, "ms_p50": spread.p50, "ms_p80": spread.p80, "speed": speed}
    return found


def _error(results: Outcome, truth: Sequence[Tensor]) -> float:
    """The largest of any; NaN if one is."""
    errors = [gate.error(t.double(), wide.double()) for t, wide in zip(results, truth, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.nan


def markdown(document: dict[str, Any]) -> str:
    lines = [report.where(document), "", "Medians (20th to 80th percentile); `speed` beside the first of each.", ""]
    lines += ["| question | convolution | dtype | contender | ms | speed |", "|" + "---|" * 6]
    for row in document["rows"]:
        what = f"| {row['question']} | {row['shape']} | {row['dtype']} |"
        for name, each in row["contenders"].items():
            ms = f"{each['ms_p50']:.4g} ({each['ms_p20']:.4g}–{each['ms_p80']:.4g})"
            lines.append(f"{what} {name} | {ms} | {each['speed']:.2f} |")
        lines += [f"{what} {name} | | {why} |" for name, why in row["failed"].items()]
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
    every = list(questions(args.size, args.device))
    document: dict[str, Any] = {**machine.describe(args.device), "load": [machine.load(), None], "rows": []}
    for ask in every:
        document["rows"].append(answered(ask(), args.device, args.seconds / len(every)))
    document["load"][1] = machine.load()
    report.leave(document, markdown(document), args.json, args.markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
