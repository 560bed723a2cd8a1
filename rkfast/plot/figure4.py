"""``rkfast plot figure4``: error against parameters and against FLOPs, as in Figure 4 of the RKNet paper.

The figure of the paper is that of ImageNet; the same is drawn of every other dataset of its tables. A file of results
is a JSON list of objects with

    model     as create_model names it
    options   of create_model; may be left out
    dataset   one of rkfast.papers.DATASETS, and the same in all files of a figure
    error     in per cent, on the test or validation images
    label     what to write beside the point; may be left out: the model

Parameters and FLOPs are counted from the model, in the way of the papers' tables.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rkfast import papers
from rkfast.extras import require
from rkfast.papers import DATASETS, Row
from rkfast.plot import look

SUMMARY = "error against parameters and against FLOPs: Figure 4 of the RKNet paper"
OWN = "own results"
STYLES: dict[str, dict[str, Any]] = {
    "DenseNet": {"color": "#0072B2", "marker": "s", "linestyle": ":"},
    "DenseNet-BC": {"color": "#0072B2", "marker": "s", "linestyle": ":", "markerfacecolor": "white"},
    "CliqueNet": {"color": "#009E73", "marker": "^", "linestyle": "--"},
    "CliqueNet-ABC": {"color": "#009E73", "marker": "^", "linestyle": "--", "markerfacecolor": "white"},
    "ERKNet": {"color": "#D55E00", "marker": "o", "linestyle": "-"},
    "ERKNet-B": {"color": "#D55E00", "marker": "o", "linestyle": "-", "markerfacecolor": "white"},
    "IRKNet": {"color": "#CC79A7", "marker": "D", "linestyle": "-."},
    "IRKNet-A": {"color": "#CC79A7", "marker": "D", "linestyle": "-.", "fillstyle": "left"},
    "IRKNet-AB": {"color": "#CC79A7", "marker": "D", "linestyle": "-.", "markerfacecolor": "white"},
    OWN: {"color": "#000000", "marker": "*", "linestyle": "none", "markersize": 12},
}


class Point(NamedTuple):
    series: str  # a key of STYLES
    label: str
    millions: float  # parameters
    billions: float  # FLOPs
    error: float  # per cent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", choices=DATASETS, default="imagenet", help="(%(default)s, that of the paper)")
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help='JSON lists of {"model", "options", "dataset", "error", "label"}, drawn beside what is published',
    )


def data(args: argparse.Namespace) -> tuple[list[Point], str]:
    own = [point for file in args.results for point in results(file, args.dataset)]
    return [*published(args.dataset), *own], args.dataset


def published(dataset: str) -> list[Point]:
    """The rows of the papers with an error on this dataset. What a table does not print is counted from the model."""
    points = []
    for row in papers.ROWS:
        if dataset not in row.errors:
            continue
        millions, billions = row.millions, row.billions
        if millions is None or billions is None:
            counted = _counted(row.model, row.options, dataset)
        points.append(
            Point(
                series(row),
                _label(row),
                counted[0] if millions is None else float(millions),
                counted[1] if billions is None else float(billions),
                row.errors[dataset],
            )
        )
    return points


def series(row: Row) -> str:
    """The key of STYLES under which a row of the papers is drawn."""
    family, _, rest = row.model.partition("-")
    name = {"densenet": "DenseNet", "cliquenet": "CliqueNet", "erknet": "ERKNet", "irknet": "IRKNet"}[
        family.rstrip("0123456789")
    ]
    suffix = rest.rpartition("-")[2]
    return f"{name}-{suffix.upper()}" if suffix.isalpha() else name


def _label(row: Row) -> str:
    """What tells a row from the others of its series."""
    family, _, rest = row.model.partition("-")
    k = f"k={row.options['growth_rate']}" if "growth_rate" in row.options else ""
    if family in ("erknet", "irknet"):
        stages = "_".join(period.partition("x")[0] for period in rest.partition("-")[0].split("_"))
        return f"{stages}, {k}" if family == "irknet" and k else stages
    depth = rest.partition("-")[0] or family.removeprefix("densenet")
    return f"{depth}, {k}" if k else depth


def _counted(model: str, options: dict[str, Any], dataset: str) -> tuple[float, float]:
    whole = papers.on_meta(model, **options)
    return papers.parameters(whole) / 1e6, papers.flops(whole, DATASETS[dataset].size) / 1e9


def results(file: Path, dataset: str) -> list[Point]:
    """The points of a file of results.

    Raises:
        ValueError: what is wrong with it, by name.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--results {file} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"--results {file} is no JSON: {error}") from error
    if not isinstance(entries, list):
        demo = isinstance(entries, dict) and "stock" in entries
        hint = "; that of rkfast demo is on digits, which no paper has" if demo else ""
        raise ValueError(f"--results {file}: expected a list of results, got {_kind(entries)}{hint}")
    if not entries:
        raise ValueError(f"--results {file}: the list is empty")
    return [_point(f"--results {file}: [{i}]", entry, dataset) for i, entry in enumerate(entries)]


_KEYS: dict[str, type] = {"model": str, "dataset": str, "error": float, "options": dict, "label": str}
_NEEDED = ("model", "dataset", "error")
_NAMES = {str: "a string", float: "a number", int: "a number", bool: "a bool", list: "a list", dict: "an object"}


def _kind(value: object) -> str:
    return _NAMES.get(type(value), "null")


def _point(where: str, entry: object, dataset: str) -> Point:
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object, got {_kind(entry)}")
    for key in _NEEDED:
        if key not in entry:
            raise ValueError(f"{where}.{key} is missing")
    for key, value in entry.items():
        if key not in _KEYS:
            raise ValueError(f"{where}.{key}: no such key; there are {', '.join(_KEYS)}")
        if _kind(value) != _NAMES[_KEYS[key]]:
            raise ValueError(f"{where}.{key}: expected {_NAMES[_KEYS[key]]}, got {_kind(value)}")
    for key in {"fused", "in_chans", "memory"} & entry.get("options", {}).keys():
        raise ValueError(f"{where}.options.{key}: not an option of a published network; leave it out")
    if not 0 <= entry["error"] <= 100:
        raise ValueError(f"{where}.error: expected per cent, 0 to 100, got {entry['error']}")
    if entry["dataset"] not in DATASETS:
        raise ValueError(f"{where}.dataset: {entry['dataset']!r} is none of {', '.join(DATASETS)}")
    if entry["dataset"] != dataset:
        raise ValueError(
            f"{where}.dataset: {entry['dataset']!r}, and this figure is of {dataset}; take --dataset {entry['dataset']}"
        )
    options = {"num_classes": DATASETS[dataset].num_classes, **entry.get("options", {})}
    model: str = entry["model"]
    try:
        millions, billions = _counted(model, options, dataset)
    except (RuntimeError, TypeError, ValueError) as error:  # the first: images too small for the network
        raise ValueError(f"{where}.model: {error}") from error
    return Point(OWN, entry.get("label", model), millions, billions, float(entry["error"]))


def draw(points: Iterable[Point], dataset: str) -> Any:
    """A figure of two panels: error against parameters, and against FLOPs."""
    figure = look.figure(12, 5.5)
    ticker = require("matplotlib.ticker", "plots")
    panels = figure.subplots(1, 2, sharey=True)
    found: dict[str, list[Point]] = {name: [] for name in STYLES}
    for point in points:
        found[point.series].append(point)
    drawn = []
    for axes, field, title in ((panels[0], "millions", "parameters (M)"), (panels[1], "billions", "FLOPs (G)")):
        lines = []
        for name, style in STYLES.items():
            row = sorted(found[name], key=lambda point: getattr(point, field))
            if not row:
                continue
            places = [(getattr(point, field), point.error) for point in row]
            axes.plot(*zip(*places, strict=True), label=name, **{"markersize": 6, "linewidth": 1.2, **style})
            lines.append((places, [point.label for point in row], style))
        drawn.append((axes, lines))
        axes.set(xlabel=title, xscale="log")
        axes.margins(x=0.12, y=0.1)
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        look.tidy(axes)
    panels[0].set_ylabel("error (%)")
    figure.suptitle(f"{DATASETS[dataset].title}: published" + (" and own results" if found[OWN] else ""))
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.draw_without_rendering()  # where labels go depends on where everything else has come to lie
    for axes, lines in drawn:
        _write_labels(axes, lines)
    return figure


def _write_labels(axes: Any, lines: list[tuple[list[tuple[float, float]], list[str], dict[str, Any]]]) -> None:
    """Each label on that side of its point where it hides least of markers, labels and lines."""
    bbox = require("matplotlib.transforms", "plots").Bbox
    taken, crossed = [], []
    for places, _, style in lines:
        centres = axes.transData.transform(places)
        half = 0.6 * style.get("markersize", 6) * axes.figure.dpi / 72
        taken += [bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in centres]
        if style["linestyle"] != "none":
            for (x0, y0), (x1, y1) in itertools.pairwise(centres):
                crossed += [(x0 + (x1 - x0) * t / 60, y0 + (y1 - y0) * t / 60) for t in range(61)]
    for places, labels, style in lines:
        for place, label in zip(places, labels, strict=True):
            text = axes.annotate(
                label, place, (0, 0), textcoords="offset points", fontsize=8, color=style["color"], parse_math=False
            )
            text.set_in_layout(False)
            best = None
            for order, (dx, dy, ha, va) in enumerate(_SIDES):
                text.set(position=(dx, dy), ha=ha, va=va)
                box = text.get_window_extent()
                cost = 10 * box.count_overlaps(taken) + box.padded(1).count_contains(crossed) + 0.3 * order
                cost += 50 * (not all(axes.bbox.contains(*corner) for corner in (box.min, box.max)))
                if best is None or cost < best[0]:
                    best = cost, (dx, dy), ha, va, box
            assert best is not None
            text.set(position=best[1], ha=best[2], va=best[3])
            taken.append(best[4])


# Of a label about its point, in points.
_SIDES = [
    (near * dx, near * dy, ha, va)
    for near in (1, 2.5)
    for dx, dy, ha, va in (
        (5, 4, "left", "bottom"),
        (7, 0, "left", "center"),
        (5, -4, "left", "top"),
        (0, 7, "center", "bottom"),
        (0, -7, "center", "top"),
        (-5, -4, "right", "top"),
        (-7, 0, "right", "center"),
        (-5, 4, "right", "bottom"),
    )
]
