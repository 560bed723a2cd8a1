"""From samples to rows, and from rows to JSON, CSV, Markdown and a plot."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import timing
from .workload import BOUNDARY, MODES, AnyCase

SCHEMA = 1
COLUMNS = (
    "op", "case", "backend", "device", "mode", "dtype", "layout", "shape", "threads", "malloc",
    "ms_p20", "ms_p50", "ms_p80", "bytes", "gb_per_s", "copy_share", "peak_bytes", "saved_bytes", "page_faults",
)  # fmt: skip
BUSY = 0.5  # load before a run from which on its figures time the scheduler: a thread without a core waits for a slice
TINY_US = 100  # up to here a table says microseconds

Reports = dict[str, dict[str, Any]]  # what contest.run gave, by malloc setting


def rows(case: AnyCase, reports: Reports, device: str) -> Iterator[dict[str, Any]]:
    """One row per backend of ours and mode; every contender stands at its better malloc setting."""
    moved = case.bytes()
    names = list(dict.fromkeys(name for r in reports.values() for name in r["contenders"]))
    for mode in MODES:
        best = {name: found for name in names if (found := _better(reports, name, mode)) is not None}
        for name, (setting, ours) in best.items():
            if not ours["ours"]:
                continue
            ms = timing.summary(ours["ms"][mode])
            copy = best.get("copy")
            yield {
                "op": case.op,
                "case": case.name,
                "backend": name,
                "device": device,
                "mode": mode,
                "dtype": str(case.dtype).removeprefix("torch."),
                "layout": case.layout,
                "shape": list(case.shape),
                "threads": reports[setting]["threads"],
                "malloc": setting,
                **_spread(ours["ms"][mode]),
                "first_s": _first_s(reports, name),
                "bytes": moved[mode] if moved else None,
                "gb_per_s": moved[mode] / ms.p50 / 1e6 if moved else None,
                "copy_share": statistics.median(copy[1]["ms"][mode]) / ms.p50 if moved and copy else None,
                **_footprint(ours, mode),
                "peers": {
                    peer: {**_peer(found, at, mode, ours["ms"][mode]), **_started(reports, peer, found)}
                    for peer, (at, found) in best.items()
                    if not found["ours"] and peer != "copy"
                },
            }


def _better(reports: Reports, name: str, mode: str) -> tuple[str, dict[str, Any]] | None:
    stood = [(setting, r["contenders"][name]) for setting, r in reports.items() if name in r["contenders"]]
    measured = [(setting, contender) for setting, contender in stood if mode in contender["ms"]]
    return min(measured, key=lambda pair: statistics.median(pair[1]["ms"][mode]), default=None)


def _first_s(reports: Reports, name: str) -> float | None:
    """At the setting that came first, which found nothing compiled."""
    stood = (r["contenders"][name].get("first_s") for r in reports.values() if name in r["contenders"])
    return max((seconds for seconds in stood if seconds is not None), default=None)


def _started(reports: Reports, name: str, found: dict[str, Any]) -> dict[str, float | None]:
    first_s = _first_s(reports, name)
    return {"first_s": first_s, "compile_s": first_s if found.get("compiled") else None}


def _spread(ms: list[float]) -> dict[str, float]:
    middle, (low, high) = timing.summary(ms), timing.confidence(ms)
    return {"ms_p20": middle.p20, "ms_p50": middle.p50, "ms_p80": middle.p80, "ms_low": low, "ms_high": high}


def _footprint(contender: dict[str, Any], mode: str) -> dict[str, Any]:
    return {
        "peak_bytes": contender["peak_bytes"].get(mode),
        "saved_bytes": contender["saved_bytes"] if mode in ("forward_grad", "both") else None,
        "page_faults": contender["faults"][mode],
    }


def _peer(peer: dict[str, Any], setting: str, mode: str, ours: list[float]) -> dict[str, Any]:
    ratio = timing.ratios(peer["ms"][mode], ours)
    return {
        "malloc": setting,
        **_spread(peer["ms"][mode]),
        **_footprint(peer, mode),
        "speedup": ratio.p50,
        "speedup_p20": ratio.p20,
        "speedup_p80": ratio.p80,
        "kept": peer.get("kept", False),
    }


def gates(case: AnyCase, reports: Reports, device: str) -> Iterator[dict[str, Any]]:
    """What the gate said, per backend; the worse where it was asked at several malloc settings."""
    for backend in dict.fromkeys(b for r in reports.values() for b in r["gate"]):
        asked = [r["gate"][backend] for r in reports.values() if backend in r["gate"]]
        failure = next((verdict["failure"] for verdict in asked if verdict["failure"]), None)
        errors = {side: [verdict[side] for verdict in asked] for side in ("ours", "eager")}
        worst = {side: None if any(map(math.isnan, found)) else max(found) for side, found in errors.items()}
        yield {
            "id": case.id,
            "backend": backend,
            "device": device,
            "threads": next(iter(reports.values()))["threads"],
            "error": worst["ours"],
            "eager_error": worst["eager"],
            "failure": failure,
            "failed_peers": {name: why for r in reports.values() for name, why in r["failed"].items()},
        }


def write_json(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    beside.replace(path)


def leave(document: dict[str, Any], table: str, json_path: Path | None, markdown_path: Path | None) -> None:
    """What was measured, printed and in the files that were asked for."""
    print(table)
    if json_path is not None:
        write_json(json_path, document)
    if markdown_path is not None:
        markdown_path.parent.mkdir(parents=True, exist_ok=True)
        markdown_path.write_text(table)


def write_csv(path: Path, document: dict[str, Any]) -> None:
    peers = peer_names(document["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        measured = (
            *("ms_p20", "ms_p50", "ms_p80", "speedup", "speedup_p20", "speedup_p80"),
            *("page_faults", "saved_bytes", "compile_s"),
        )
        context = ("machine", "torch", "commit", "dirty", "date")
        writer.writerow([*COLUMNS, *(f"{p}_{m}" for p in peers for m in measured), *context])
        machine = document["machine"]
        where = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']}, {machine['cores']} cores"
        said = [where, document["versions"]["torch"], document["commit"], document["dirty"], document["date"]]
        for row in document["rows"]:
            own = ["x".join(map(str, row[c])) if c == "shape" else row[c] for c in COLUMNS]
            beside = [row["peers"].get(p, {}).get(m) for p in peers for m in measured]
            writer.writerow([*own, *beside, *said])


def peer_names(found: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(peer for row in found for peer in row["peers"]))


def _time(row: dict[str, Any]) -> str:
    p20, p50, p80 = (row[f"ms_{p}"] for p in ("p20", "p50", "p80"))
    if p50 * 1e3 < TINY_US:
        return f"{p50 * 1e3:.1f} µs ({p20 * 1e3:.1f}–{p80 * 1e3:.1f})"
    return f"{p50:.3g} ms ({p20:.3g}–{p80:.3g})"


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _mb(count: float | None) -> str:
    return "" if count is None else f"{count / 1e6:.3g}"


def _compiling(row: dict[str, Any]) -> str:
    taken = ((name, peer["compile_s"]) for name, peer in row["peers"].items())
    return ", ".join(f"{name} {seconds:.2g}" for name, seconds in taken if seconds is not None)


def _speedup(peer: dict[str, Any] | None) -> str:
    if peer is None:
        return ""
    kept = "*" if peer["kept"] else ""
    return f"{peer['speedup']:.2f} ({peer['speedup_p20']:.2f}–{peer['speedup_p80']:.2f}){kept}"


def where(document: dict[str, Any]) -> str:
    """On what, with what, of which commit and when the figures were measured."""
    machine, versions = document["machine"], document["versions"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['capability']}"
    if machine["gpu"]:
        gpu = machine["gpu"]
        where = f"{gpu['name']} ({gpu['capability']}, driver {gpu['driver']}); {where}"
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"{where}. {named}. Commit {document['commit'] or 'unknown'}{' with changes' if document['dirty'] else ''}, "
        f"{document['date']}, load {document['load'][0]} to {document['load'][1]}."
    )


def disturbed(document: dict[str, Any]) -> Iterator[str]:
    """Why the figures mean little, if they do."""
    if document["machine"]["gpu"] is None and (document["load"][0] or 0) > BUSY:
        yield f"Not to be quoted: other work ran on this machine (load {document['load'][0]} at the start)."


def refused(document: dict[str, Any]) -> Iterator[str]:
    """What has no figure, and why."""
    for g in document["gate"]:
        if g["failure"]:
            yield f"**wrong, no figure**: {g['id']} on {g['backend']}, {g['threads']} threads: {g['failure']}"
    broken = ((g["id"], name, why) for g in document["gate"] for name, why in g["failed_peers"].items())
    yield from (f"{name} could not run {id}: {why}" for id, name, why in dict.fromkeys(broken))


CACHES = {
    False: "each step under 20 ms behind an untimed one of its own, the caches as that leaves them",
    True: "inputs left where the caches keep them behind the other contenders' steps",
}


def markdown(document: dict[str, Any]) -> str:
    """The conditions, one table, what calls cost, and what the gate refused."""
    found = document["rows"]
    lines = [
        where(document),
        "",
        f"Medians (20th to 80th percentile) of interleaved rounds, {CACHES[document.get('cold', True)]}. `×` columns: "
        "a peer's median over ours (percentiles of the ratio round by round); on CPU each side at its better malloc "
        "setting, which are measured by turns. `GB/s` counts the bytes that cannot be avoided; `copy`: the time of an "
        "`out.copy_(x)` that moves as many over ours. `MB saved` is kept for backward, `MB peak` taken above the "
        "inputs; eager's in brackets. `s to compile`: what peers took that compile or convert, with their first step."
        + (" `*`: measured in an earlier run on this machine." if _any_kept(found) else ""),
        "",
    ]
    lines += [f"**{busy}**\n" for busy in disturbed(document)]
    if found:
        peers = peer_names(found)
        head = ["op", "case", "backend", "mode", "dtype", "layout", "shape", "threads", "time", "GB/s", "copy"]
        head += ["MB saved", "MB peak", "faults", *(f"× {p}" for p in peers), "s to compile"]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in found:
            eager = row["peers"].get("eager")

            def beside(key: str, show: Any, row: dict[str, Any] = row, eager: dict[str, Any] | None = eager) -> str:
                own = show(row[key])
                return f"{own} ({show(eager[key])})" if own and eager else own

            lines.append(
                "| "
                + " | ".join(
                    [
                        row["op"], row["case"], row["backend"], row["mode"], row["dtype"], row["layout"],
                        "×".join(map(str, row["shape"])), str(row["threads"]), _time(row),
                        _or_blank(row["gb_per_s"], "{:.3g}"), _or_blank(row["copy_share"], "{:.0%}"),
                        beside("saved_bytes", _mb), beside("peak_bytes", _mb), beside("page_faults", "{:.0f}".format),
                        *(_speedup(row["peers"].get(p)) for p in peers), _compiling(row),
                    ]
                )
                + " |"
            )  # fmt: skip
        lines += ["", *_boundary(found)]
    lines += [f"- {line}" for line in refused(document)]
    return "\n".join(lines).rstrip() + "\n"


def _any_kept(found: list[dict[str, Any]]) -> bool:
    return any(peer["kept"] for row in found for peer in row["peers"].values())


def _boundary(found: list[dict[str, Any]]) -> Iterator[str]:
    for row in found:
        if tuple(row["shape"]) == BOUNDARY and row["mode"] in ("forward_grad", "both"):
            what = "forward with grad" if row["mode"] == "forward_grad" else "forward and backward"
            eager = row["peers"].get("eager")
            beside = f" (eager {eager['ms_p50'] * 1e3:.1f})" if eager else ""
            yield (
                f"- a call of {row['op']} ({row['case']}), {what}, {row['backend']}, {row['threads']} threads: "
                f"{row['ms_p50'] * 1e3:.1f} µs{beside}"
            )


def plot(path: Path, document: dict[str, Any]) -> None:
    """Bars: how many times faster than each peer, per case, for forward alone and for forward and backward."""
    from rkfast.extras import require

    matplotlib = require("matplotlib", "plots")
    matplotlib.use("Agg")
    pyplot = require("matplotlib.pyplot", "plots")
    modes = [m for m in ("forward", "both") if any(row["mode"] == m for row in document["rows"])]
    peers = peer_names(document["rows"])
    figure, axes = pyplot.subplots(1, max(len(modes), 1), squeeze=False, sharey=True)
    widest = 0
    for axis, mode in zip(axes[0], modes, strict=False):
        shown = [row for row in document["rows"] if row["mode"] == mode]
        widest = max(widest, len(shown))
        height = 0.8 / max(len(peers), 1)
        for i, peer in enumerate(peers):
            bars = [(k, row["peers"][peer]) for k, row in enumerate(shown) if peer in row["peers"]]
            middle = [p["speedup"] for _, p in bars]
            spread = [
                [max(p["speedup"] - p["speedup_p20"], 0) for _, p in bars],
                [max(p["speedup_p80"] - p["speedup"], 0) for _, p in bars],
            ]
            axis.barh([k + i * height for k, _ in bars], middle, height, xerr=spread, label=peer)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(shown)))
        axis.set_yticklabels(
            [
                f"{r['op']} {r['case']} {'×'.join(map(str, r['shape']))} {r['dtype']} {r['backend']} {r['threads']}t"
                for r in shown
            ],
            fontsize=6,
        )
        axis.invert_yaxis()
        axis.set_xlabel("times faster")
        axis.set_title({"forward": "forward", "both": "forward and backward"}[mode])
        axis.legend(fontsize=6)
    figure.set_size_inches(7 * max(len(modes), 1), 2 + 0.3 * widest)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
