"""``rkfast table``: train the rows of a table of the papers, and write our errors beside theirs."""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from rkfast.commands.recipes import images, network, published
from rkfast.files import replacing
from rkfast.train.recipes import RECIPES, Recipe, matching, overridden

FOLDER = Path("tables")
FILE, PAGE = "table.json", "table.md"
SETTINGS = ("seed", "fused", "amp")  # which errors depend on
ENGINE = (*SETTINGS, "root", "device", "workers", "download")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", metavar="NAME", help="of a table, such as rknet/t2, or a pattern as of rkfast recipes")
    add("--only", nargs="+", metavar="PATTERN", help="of its rows those with one of these in their names, such as k80")
    add("--epochs", type=int, metavar="N", help="in place of the recipes'; drops keep their share")
    add("--out", type=Path, metavar="FOLDER", help=f"goes on where it stopped there ({FOLDER}/NAME)")
    add("--root", type=Path, metavar="FOLDER", help="of the data")
    add("--download", action="store_true", help="fetch the data where they are not there")
    add("--seed", type=int, default=0, help="of weights, order, augmentation and dropout (%(default)s)")
    add("--device", help="such as cpu or cuda (a GPU where there is one)")
    add("--fused", choices=("auto", "off"), default="auto", help="off is stock PyTorch (%(default)s)")
    add("--amp", choices=("fp32", "bf16", "fp16"), default="fp32", help="autocast (%(default)s for none)")
    add("--workers", type=int, default=0, metavar="N", help="processes that load images (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Train, and write table.json and table.md behind each row. Returns 2 for what is wrong with the command line or
    the data, 1 where a training failed."""
    out: Path = FOLDER / args.name if args.out is None else args.out
    try:
        recipes = wanted(args.name, args.only, args.epochs)
        known = read(out / FILE)
    except (TypeError, ValueError) as error:
        print(f"rkfast table: {error}", file=sys.stderr)
        return 2
    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, the one that writes
    settings = {name: getattr(args, name) for name in SETTINGS}
    train = importlib.import_module("rkfast.train.engine").train  # which needs far more than a list of recipes
    failures = []
    for recipe in recipes:
        row = json.loads(json.dumps({"recipe": dataclasses.asdict(recipe), "settings": settings}))
        if any(row.items() <= other.items() for other in known):
            continue
        # A training with other settings is another run.
        place = out / recipe.name / "-".join([str(recipe.epochs), *map(str, settings.values())])
        try:
            result = train(recipe, place, **{name: getattr(args, name) for name in ENGINE})
        except (TypeError, ValueError) as error:
            print(f"rkfast table: {recipe.name}: {error}", file=sys.stderr)
            return 2
        except RuntimeError as error:
            failures.append(f"{recipe.name}: {error}")
            continue
        known.append(row | {"error": result.error, "best": result.best})
        if first:
            write(out, known)
    if first:
        print(page(known), end="")
        print(f"wrote {out / PAGE} and {out / FILE}")
    for failure in failures:
        print(f"rkfast table: {failure}", file=sys.stderr)
    return int(bool(failures))


def wanted(name: str, only: list[str] | None, epochs: int | None) -> list[Recipe]:
    """The recipes of a table, or of a pattern.

    Raises:
        TypeError, ValueError: there are none, or they do not take these epochs.
    """
    table = name.strip("/")
    found = [one for key, one in RECIPES.items() if key.startswith(f"{table}/")] or matching(name)
    if only is not None:
        patterns = [pattern if set("*?[") & set(pattern) else f"*{pattern}*" for pattern in only]
        chosen = [one for one in found if any(fnmatch.fnmatchcase(one.name, pattern) for pattern in patterns)]
        if not chosen:
            raise ValueError(f"--only: {', '.join(only)} is in none of {', '.join(one.name for one in found[:8])}")
        found = chosen
    return found if epochs is None else [overridden(one, epochs=epochs) for one in found]


def read(file: Path) -> list[dict[str, Any]]:
    """What was trained before.

    Raises:
        ValueError: the file is not one that this command writes.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        for row in rows:
            if row.keys() != {"recipe", "settings", "error", "best"} or Recipe(**row["recipe"]).name not in RECIPES:
                raise ValueError(f"it has {row}")
    except FileNotFoundError:
        return []
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"--out: {file} is not what rkfast table writes ({error}); take another folder") from error
    return rows


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    for name, text in ((FILE, json.dumps(rows, indent=1) + "\n"), (PAGE, page(rows))):
        with replacing(out / name) as path:
            path.write_text(text, encoding="utf-8")


def page(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = ("recipe", "network", "data", "epochs", "error published, %", "ours, %", "ours at best, %")
    lines = [f"| {' | '.join(heads)} | {', '.join(SETTINGS)} |", "|---" * (len(heads) + 1) + "|"]
    order = list(RECIPES)
    for row in sorted(rows, key=lambda row: order.index(row["recipe"]["name"])):
        recipe = Recipe(**row["recipe"])
        usual = RECIPES[recipe.name].epochs
        cells = (
            recipe.name,
            network(recipe),
            images(recipe),
            f"{recipe.epochs}" + (f" of {usual}" if recipe.epochs != usual else ""),
            published(recipe),
            f"{row['error']:.2f}",
            f"{row['best']:.2f}",
            ", ".join(str(row["settings"][name]) for name in SETTINGS),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
