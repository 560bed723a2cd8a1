"""``rkfast recipes``: how the networks of the papers were trained, and the errors that they published."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from rkfast.train.recipes import Recipe, matching


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pattern",
        nargs="?",
        default="*",
        metavar="PATTERN",
        help="part of a name, or a pattern such as 'ho/*/rk4*' (all)",
    )
    parser.add_argument("--json", action="store_true", help="every field of them, as a JSON list")


def run(args: argparse.Namespace) -> int:
    """Print the recipes. Returns 2 where there is none."""
    try:
        found = matching(args.pattern)
    except ValueError as error:
        print(f"rkfast recipes: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps([dataclasses.asdict(recipe) for recipe in found], indent=1))
    else:
        print(table(found))
    return 0


def table(recipes: list[Recipe]) -> str:
    rows = [
        ("recipe", "network", "data", "batch", "epochs", "error published, %"),
        *((one.name, network(one), images(one), str(one.batch), str(one.epochs), published(one)) for one in recipes),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def network(recipe: Recipe) -> str:
    return " ".join([recipe.model, *(f"{key}={_plain(value)}" for key, value in recipe.options.items())])


def images(recipe: Recipe) -> str:
    return f"{recipe.data}, {recipe.augment}" if recipe.augment else recipe.data


def published(recipe: Recipe) -> str:
    return "" if recipe.published is None else f"{recipe.published:.2f}"


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
