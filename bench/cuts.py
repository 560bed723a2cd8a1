"""``python bench/cuts.py``: which tiles of the fused products are fastest on this GPU, for TUNED in
``rkfast/ops/launches.py``, and how near to a copy they come. Needs Triton, and a GPU or TRITON_INTERPRET=1."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

if not __package__:
    import runpy

    sys.path.pop(0)  # this folder
    runpy.run_path(str(Path(__file__).with_name("checkout.py")))
    __package__ = "rkfast.bench"

import torch
from torch import Tensor

from rkfast.ops import kernels, launches, products
from rkfast.ops.launches import Cut

from . import gate, machine, report, timing
from .contest import said

ROUNDS = (5, 30)
EPS = 1e-5
COPY = "copy"


class Layer(NamedTuple):
    """A 1x1 convolution."""

    n: int
    side: int
    read: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.n}x{self.read}x{self.side}x{self.side} to {self.width}"


LAYERS = {
    # DenseNet-121's bottlenecks, in the middle of each block, and ResNet-50's first and last convolutions.
    "full": (
        *(Layer(256, side, read, 128) for side, read in ((56, 160), (28, 320), (14, 640), (7, 768))),
        *(Layer(256, side, *ends) for side, ends in ((56, (256, 64)), (56, (64, 256)), (14, (1024, 256)))),
        *(Layer(256, side, *ends) for side, ends in ((14, (256, 1024)), (7, (2048, 512)))),
    ),
    "tiny": (Layer(2, 4, 24, 16),),
}
# Of sm_90 those that spill nothing, or next to it.
CUTS = {
    "product": (
        *(Cut(128, 128, 64, 8, stages) for stages in (2, 3)),
        *(Cut(128, 64, 64, 8, stages) for stages in (2, 3)),
        *(Cut(64, 128, 64, 8, stages) for stages in (2, 3)),
        *(Cut(256, 64, 64, 8, 3), Cut(128, 128, 32, 8, 4), Cut(128, 128, 128, 8, 2)),
    ),
    "data_gradient": (
        *(Cut(128, 64, 64, 8, stages) for stages in (1, 2, 3)),
        *(Cut(64, 64, 64, 4, 1), Cut(64, 64, 64, 4, 2), Cut(64, 64, 64, 8, 2), Cut(128, 128, 64, 8, 1)),
        *(Cut(64, 128, 64, 8, 1), Cut(128, 64, 32, 8, 2)),
    ),
    "weight_gradient": (
        *(Cut(64, 128, 64, 8, stages) for stages in (2, 3, 4)),
        *(Cut(64, 128, 64, 4, 2), Cut(64, 128, 128, 8, 2), Cut(128, 128, 64, 8, 2), Cut(64, 64, 64, 4, 2)),
        *(Cut(64, 64, 64, 4, 3), Cut(32, 128, 64, 4, 3)),
    ),
}


def product(x: Tensor, conv: Tensor, grad: Tensor, mid: Tensor, *vectors: Tensor) -> list[Tensor]:
    """As in training: BatchNorm and ReLU as x is read, the moments of the result as it is written."""
    return [products.product(x, products.whole(x), conv, _norm(vectors), moments=True)[0]]


def data_gradient(x: Tensor, conv: Tensor, grad: Tensor, mid: Tensor, *vectors: Tensor) -> list[Tensor]:
    """Back through the BatchNorm behind the product as its gradient is read, and the one before as it is written."""
    total, incoming = torch.empty_like(x), _incoming(grad, mid, vectors)
    sums = products.data_gradient(incoming, conv, x, products.whole(x), _norm(vectors), total, None)
    assert sums is not None
    return [total, sums.sum(1)]


def weight_gradient(x: Tensor, conv: Tensor, grad: Tensor, mid: Tensor, *vectors: Tensor) -> list[Tensor]:
    return [products.weight_gradient(_incoming(grad, mid, vectors), conv, x, products.whole(x), _norm(vectors))]


KERNELS: dict[str, Callable[..., list[Tensor]]] = {
    "product": product,
    "data_gradient": data_gradient,
    "weight_gradient": weight_gradient,
}


def _norm(vectors: Sequence[Tensor]) -> products.Norm:
    mean, var, weight, bias = vectors[:4]
    return products.Norm(mean, var, weight, bias, EPS, False)


def _incoming(grad: Tensor, mid: Tensor, vectors: Sequence[Tensor]) -> products.Incoming:
    mean, var, weight, bias, dweight, dbias = vectors[4:]
    count = mid.numel() / mid.shape[1]
    return products.Incoming(grad, mid, mean, var, weight, bias, None, EPS, dweight, dbias, count)


def drawn(layer: Layer, dtype: torch.dtype, device: str) -> list[Tensor]:
    """What the kernels take, never zeros."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    def image(channels: int) -> Tensor:
        made = randn(layer.n, channels, layer.side, layer.side).to(dtype)
        return made.contiguous(memory_format=torch.channels_last)

    def norm(channels: int) -> list[Tensor]:
        return [0.1 * randn(channels), 1 + 0.1 * randn(channels).abs(), 1 + 0.1 * randn(channels), randn(channels)]

    conv = (randn(layer.width, layer.read, 1, 1) / layer.read**0.5).to(dtype)
    sums = [randn(layer.width) for _ in range(2)]
    return [
        image(layer.read),
        conv,
        image(layer.width),
        image(layer.width),
        *norm(layer.read),
        *norm(layer.width),
        *sums,
    ]


def moved(kernel: str, layer: Layer, itemsize: int) -> int:
    """Bytes that cannot be avoided, of activations."""
    read, width = {"product": (1, 1), "data_gradient": (2, 2), "weight_gradient": (1, 2)}[kernel]
    return layer.n * layer.side**2 * (read * layer.read + width * layer.width) * itemsize


@contextlib.contextmanager
def trying(kernel: str, cut: Cut, x: Tensor) -> Iterator[None]:
    name = torch.cuda.get_device_name(x.device) if x.is_cuda else ""
    with mock.patch.dict(launches.TUNED, {(launches.gpu(name), kernel, x.element_size()): cut}):
        yield


def measured(kernel: str, layer: Layer, dtype: torch.dtype, device: str, seconds: float) -> dict[str, Any]:
    """Milliseconds of every cut that compiles and comes to what the first one does, which tests hold to fp64."""
    given = drawn(layer, dtype, device)
    x, call = given[0], KERNELS[kernel]
    cuts = {str(tuple(cut)): cut for cut in (launches.UNTUNED[kernel, dtype.itemsize], *CUTS[kernel])}

    def every(*tensors: Tensor) -> None:
        for cut in cuts.values():
            with trying(kernel, cut, x):
                call(*tensors)

    kernels.compile_ahead(("cuts", kernel, layer), every, *given)
    found: dict[str, Any] = {"kernel": kernel, "layer": layer.name, "ms": {}, "failed": {}}
    truth: list[Tensor] = []
    steps: dict[str, timing.Step] = {}
    for name, cut in cuts.items():
        try:
            with trying(kernel, cut, x):
                result = call(*given)
            truth = truth or [t.double() for t in result]
            off = max(gate.error(t.double(), wide, rms=True) for t, wide in zip(result, truth, strict=True))
        except Exception as error:
            found["failed"][name] = said(error)
            continue
        if off <= 4 * torch.finfo(dtype).eps:
            steps[name] = timing.Step(lambda: call(*given))
        else:
            found["failed"][name] = f"wrong: {off:.1e} from the first"
    source = torch.randn(moved(kernel, layer, dtype.itemsize) // (2 * dtype.itemsize), device=device).to(dtype)
    target = torch.empty_like(source)
    steps[COPY] = timing.Step(lambda: target.copy_(source))
    entered = contextlib.ExitStack()

    def entering(name: str) -> None:
        entered.close()
        if name in cuts:
            entered.enter_context(trying(kernel, cuts[name], x))

    with entered:
        samples = timing.interleave(steps, seconds, device, entering, ROUNDS)
    found["ms"] = {name: timing.summary([s.ms[0] for s in taken]).p50 for name, taken in samples.items()}
    return found


def chosen(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By kernel the cut that is fastest on the geometric mean of its layers, of those that serve all of them, and how
    many times as fast as the first."""
    best = {}
    for kernel in CUTS:
        own = [row["ms"] for row in rows if row["kernel"] == kernel]
        first = next(iter(own[0]))
        serving = [name for name in own[0] if name != COPY and all(name in ms for ms in own)]
        speed = {name: math.exp(sum(math.log(ms[first] / ms[name]) for ms in own) / len(own)) for name in serving}
        name = max(speed, key=lambda each: speed[each])
        best[kernel] = {"cut": name, "speed": speed[name]}
    return best


def markdown(document: dict[str, Any]) -> str:
    lines = [report.where(document), ""]
    for kernel, best in document["chosen"].items():
        key = (document["gpu"], kernel, document["itemsize"])
        lines.append(f"- `{key}: Cut{best['cut']}`, {best['speed']:.2f} times as fast as the one for any GPU")
    lines += ["", "Milliseconds; `copy` moves the bytes that cannot be avoided. In bold the fastest.", ""]
    for kernel in CUTS:
        own = [row for row in document["rows"] if row["kernel"] == kernel]
        names = list(dict.fromkeys(name for row in own for name in (*row["ms"], *row["failed"])))
        lines += [f"| {kernel} | {' | '.join(names)} |", "|" + "---|" * (1 + len(names))]
        for row in own:
            least = min(ms for name, ms in row["ms"].items() if name != COPY)
            shown = {name: f"**{ms:.4g}**" if ms == least else f"{ms:.4g}" for name, ms in row["ms"].items()}
            lines.append(f"| {row['layer']} | {' | '.join(shown.get(name, '') for name in names)} |")
        lines.append("")
    failed = {(row["kernel"], name, why) for row in document["rows"] for name, why in row["failed"].items()}
    lines += [f"- {kernel} {name}: {why}" for kernel, name, why in sorted(failed)]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench/cuts.py", description=__doc__)
    add = parser.add_argument
    add("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--size", choices=list(LAYERS), default="full")
    add("--seconds", type=float, default=60, help="for all kernels and layers (%(default)s)")
    add("--json", type=Path, metavar="FILE")
    add("--markdown", type=Path, metavar="FILE", help="the tables, which are also printed")
    args = parser.parse_args(argv)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32  # Triton's interpreter truncates the former
    name = torch.cuda.get_device_name() if args.device == "cuda" else ""
    document: dict[str, Any] = {**machine.describe(args.device), "load": [machine.load(), None]}
    document |= {"gpu": launches.gpu(name), "itemsize": dtype.itemsize}
    every = [(kernel, layer) for kernel in CUTS for layer in LAYERS[args.size]]
    with torch.no_grad():
        document["rows"] = [measured(*each, dtype, args.device, args.seconds / len(every)) for each in every]
    document["load"][1] = machine.load()
    document["chosen"] = chosen(document["rows"])
    report.leave(document, markdown(document), args.json, args.markdown)
    return int(any("wrong" in why for row in document["rows"] for why in row["failed"].values()))


if __name__ == "__main__":
    sys.exit(main())
