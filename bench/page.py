"""One network, a row per contender: as a table, a plot, and a page that needs no other file."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rkfast.extras import require

from . import report

MODES = {"train": "both", "inference": "forward"}
TITLES = {"train": "A training step (forward, loss, backward)", "inference": "Inference"}
HEAD = ("", "ms", "95 %", "images/s", "× eager", "MB peak", "MB kept", "s to first step")
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; } td, th { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } tr.ours { font-weight: 600; } img { max-width: 100%; }
</style>
<h1>{{ title }}</h1>
<p>{{ where }}</p>
{% for name, rows in tables %}
<h2>{{ name }}</h2>
<table>
<tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row, ours in rows %}<tr{% if ours %} class="ours"{% endif %}>
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endfor %}
{% if plot %}<img alt="milliseconds of each" src="data:image/png;base64,{{ plot }}">{% endif %}
<ul>{% for note in notes %}<li>{{ note }}</li>{% endfor %}</ul>
</html>
"""


def contenders(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """By a title that says what and of which shape, whoever took part, ours last; ``times`` is eager's time over its
    own."""
    found: dict[str, list[dict[str, Any]]] = {}
    steps = [row for row in document["rows"] if row["mode"] == MODES[row["case"]]]
    for (case, shape, threads), group in itertools.groupby(
        steps, lambda row: (row["case"], "×".join(map(str, row["shape"])), row["threads"])
    ):
        rows = list(group)
        every = [{**peer, "name": name, "ours": False} for name, peer in rows[0]["peers"].items()]
        every += [{**row, "name": f"rkfast, {row['backend']}", "ours": True} for row in rows]
        eager = next((each["ms_p50"] for each in every if each["name"] == "eager"), None)
        batch = rows[0]["shape"][0]
        for each in every:
            each["times"] = None if eager is None else eager / each["ms_p50"]
            each["per_second"] = 1e3 * batch / each["ms_p50"]
        found[f"{TITLES[case]}, {shape}, {threads} threads"] = every
    return found


def _cells(each: dict[str, Any]) -> list[str]:
    def number(value: float | None, form: str, unit: float = 1.0) -> str:
        return "" if value is None else format(value / unit, form)

    return [
        each["name"],
        number(each["ms_p50"], ".4g"),
        f"{each['ms_low']:.4g}–{each['ms_high']:.4g}",
        number(each["per_second"], ".4g"),
        number(each["times"], ".2f"),
        number(each["peak_bytes"], ".4g", 1e6),
        number(each["saved_bytes"], ".4g", 1e6),
        number(each["first_s"], ".2g"),
    ]


def _notes(document: dict[str, Any]) -> Iterator[str]:
    yield from report.disturbed(document)
    for gate in document["gate"]:
        if not gate["failure"]:
            yield (
                f"error against float64 of {gate['id']}, {gate['backend']}: {gate['error']:.1e} (eager: "
                f"{gate['eager_error']:.1e})"
            )
    yield from report.refused(document)
    largest = document.get("max_batch")
    if largest:
        yield f"largest batch that can be trained here, estimated: stock {largest['stock']}, fused {largest['fused']}"
    yield (
        "medians of interleaved rounds with the interval in which they lie by 95 %, on a CPU each at its better malloc "
        "setting; peak memory above the inputs; kept: for the backward"
    )


def markdown(document: dict[str, Any]) -> str:
    lines = [report.where(document), ""]
    for title, every in contenders(document).items():
        table = [list(HEAD), *(_cells(each) for each in every)]
        widths = [max(len(row[i]) for row in table) for i in range(len(HEAD))]
        padded = [
            "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in table
        ]
        rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
        lines += [f"{title}:", "", padded[0], rule, *padded[1:], ""]
    lines += [f"- {note}" for note in _notes(document)]
    return "\n".join(lines) + "\n"


def plot(file: Path | io.BytesIO, document: dict[str, Any]) -> None:
    """Bars: milliseconds of each, and between which the median lies."""
    require("matplotlib", "plots").use("Agg")
    pyplot = require("matplotlib.pyplot", "plots")
    found = contenders(document)
    heights = [len(every) for every in found.values()] or [1]
    figure, axes = pyplot.subplots(
        len(heights), 1, squeeze=False, figsize=(8, 1.2 * len(heights) + 0.35 * sum(heights)), height_ratios=heights
    )
    for axis, (title, every) in zip(axes[:, 0], found.items(), strict=False):
        for i, each in enumerate(every):
            middle = each["ms_p50"]
            spread = [[max(middle - each["ms_low"], 0)], [max(each["ms_high"] - middle, 0)]]
            axis.barh(i, middle, xerr=spread, color="tab:orange" if each["ours"] else "tab:blue")
        axis.set_yticks(range(len(every)), [each["name"] for each in every])
        axis.invert_yaxis()
        axis.set_xlabel("milliseconds")
        axis.set_title(title)
    figure.tight_layout()
    figure.savefig(file, format="png")
    pyplot.close(figure)


def html(document: dict[str, Any]) -> str:
    found = contenders(document)
    picture = io.BytesIO()
    if found:
        plot(picture, document)
    asked = document["network"]
    return str(
        require("jinja2", "bench")
        .Environment(autoescape=True, trim_blocks=True)
        .from_string(PAGE)
        .render(
            title=f"{asked['address']}, {asked['amp']}",
            where=report.where(document),
            head=HEAD,
            tables=[(title, [(_cells(each), each["ours"]) for each in every]) for title, every in found.items()],
            plot=base64.b64encode(picture.getvalue()).decode(),
            notes=list(_notes(document)),
        )
    )
