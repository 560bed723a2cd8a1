"""``python bench/goals.py RESULTS.json``: what is asked of the kernels and networks on one H200, what was measured, and
the gap; a Markdown table. Needs Python alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

EAGER = ("eager_channels_last",)
COMPILED = ("compile", "compile_cuda_graphs")  # the faster of the two
KERNELS = ("rk_sum", "bn_rk_sum", "channel_moments", "bn_relu_pool")
COPY = 0.9  # of a copy's bandwidth, where tensors are several times larger than the second-level cache
STREAMED = 200e6  # bytes, from which on they are
FIRST = ("densenet121", 5.0)  # seconds of its first training step, nothing compiled before


class Goal(NamedTuple):
    """Of a network: times faster than eager and than compiled PyTorch, first what is asked and then what is accepted,
    and how many times less memory a training step takes, with ``memory="min"`` too where that is set apart."""

    train: tuple[float, float]
    accepted: tuple[float, float] | None
    inference: tuple[float, float]
    memory: float
    least: float | None = None


GOALS = {
    "densenet121": Goal((2.4, 2.0), (1.8, 1.45), (2.7, 1.75), 3.8, 7),
    "erknet-3x1_3x1_4x1_2x1-b": Goal((2.5, 2.0), (1.8, 1.45), (2.8, 1.8), 4.3, 8),
    "erknet-7x1_7x1_7x1": Goal((3.5, 1.85), (2.6, 1.35), (3.2, 1.4), 4),
    "irknet-5x1_5x1_5x1-ab": Goal((3.6, 2.1), (2.5, 1.5), (3.8, 1.7), 3, 4.5),
    "irknet-5x1_5x1_5x1-ab-k150": Goal((2.0, 1.7), (1.6, 1.35), (2.2, 1.45), 3, 4.5),
    "tsc_resnet50": Goal((2.1, 1.5), (1.65, 1.2), (2.4, 1.38), 1.4, 1.9),
    "resnet50": Goal((1.9, 1.4), (1.5, 1.15), (2.2, 1.3), 1.4),
    "tsc_resnet-110": Goal((20, 3.4), (10, 2.2), (9, 1.5), 1.2),
    "ho_resnet-58-rk4": Goal((1.75, 1.45), (1.35, 1.15), (2.3, 1.4), 1.25, 1.8),
    "ho_resnet-58-rk8": Goal((2.2, 1.38), (1.7, 1.1), (3.0, 1.4), 1.2, 1.7),
}


class Line(NamedTuple):
    """One goal, beside what was found; a figure of None was not measured. ``below``: less is better."""

    what: str
    asked: float
    accepted: float | None
    figure: float | None
    by: str  # which of ours, and beside whom
    form: str = "{:.2f}"
    below: bool = False

    def gap(self) -> str:
        """How far the figure is from what is asked, in per cent of that; above 0 it is better."""
        if self.figure is None:
            return ""
        return f"{100 * ((self.figure / self.asked - 1) * (-1 if self.below else 1)):+.0f} %"

    def met(self) -> str:
        if self.figure is None:
            return "not measured"
        if self._reaches(self.asked):
            return "met"
        return "accepted" if self.accepted is not None and self._reaches(self.accepted) else "**missed**"

    def _reaches(self, wanted: float) -> bool:
        assert self.figure is not None
        return self.figure <= wanted if self.below else self.figure >= wanted


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[Line]:
    """Every goal, in order of the networks, then the kernels that were measured."""
    for op, goal in GOALS.items():
        yield from _network(op, goal, [row for row in rows if row["op"] == op])
    op, seconds = FIRST
    first = [r for r in rows if r["op"] == op and r["mode"] == "both" and _own(r, "") and r["first_s"] is not None]
    figure = min((row["first_s"] for row in first), default=None)
    yield Line(f"{op}: first training step, s", seconds, None, figure, "", "{:.1f}", below=True)
    for row in rows:
        if row["op"] in KERNELS and row["bytes"] is not None and row["bytes"] >= STREAMED and row["copy_share"]:
            shape = "x".join(map(str, row["shape"]))
            what = f"{row['op']} {row['case']} {shape} {row['dtype']} {row['layout']} {row['mode']}: of a copy's speed"
            yield Line(what, COPY, None, row["copy_share"], row["backend"], "{:.0%}")


def _network(op: str, goal: Goal, rows: Sequence[dict[str, Any]]) -> Iterator[Line]:
    for mode, case, asked, accepted in (
        ("both", "training step", goal.train, goal.accepted),
        ("forward", "inference", goal.inference, None),
    ):
        for i, (peers, against) in enumerate(((EAGER, "eager"), (COMPILED, "compile"))):
            figure, by = _fastest([row for row in rows if row["mode"] == mode], peers)
            yield Line(f"{op}: {case}, × {against}", asked[i], accepted[i] if accepted else None, figure, by)
    for variant, least in (("", goal.memory), ("min memory", goal.least)):
        if least is not None:
            own = [row for row in rows if row["mode"] == "both" and _own(row, variant)]
            found = [(_memory(row), row["backend"]) for row in own if _memory(row) is not None]
            figure, by = max(found, default=(None, ""))
            name = 'training memory, memory="min"' if variant else "training memory"
            yield Line(f"{op}: {name}, eager / ours", least, None, figure, by)


def _own(row: dict[str, Any], variant: str) -> bool:
    """Whether it is that variant of ours: what its name says besides the backends that served it."""
    return row["backend"].partition(", ")[2] == variant


def _fastest(rows: Sequence[dict[str, Any]], peers: Sequence[str]) -> tuple[float | None, str]:
    """Ours at its fastest against the fastest of those peers that could run."""
    found = []
    for row in rows:
        beside = [(row["peers"][name]["speedup"], name) for name in peers if name in row["peers"]]
        if beside:
            speedup, name = min(beside)
            found.append((speedup, f"{row['backend']}, {name}"))
    return max(found, default=(None, ""))


def _memory(row: dict[str, Any]) -> float | None:
    eager = next((row["peers"][name]["peak_bytes"] for name in EAGER if name in row["peers"]), None)
    return eager / row["peak_bytes"] if eager and row["peak_bytes"] else None


def table(documents: Sequence[dict[str, Any]]) -> str:
    rows = [row for document in documents for row in document["rows"]]
    out = ["| goal | asked | accepted | measured | gap | | ours, beside |", "|" + "---|" * 7]
    for line in lines(rows):
        asked, accepted, figure = (
            "" if value is None else line.form.format(value) for value in (line.asked, line.accepted, line.figure)
        )
        out.append(f"| {line.what} | {asked} | {accepted} | {figure} | {line.gap()} | {line.met()} | {line.by} |")
    return "\n".join(out) + "\n"


def main(argv: Sequence[str]) -> int:
    if not argv:
        print(__doc__)
        return 2
    print(table([json.loads(Path(name).read_text()) for name in argv]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
