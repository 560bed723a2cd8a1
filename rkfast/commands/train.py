"""``rkfast train``: a network by a recipe, with values of one's own."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rkfast.train import engine, recipes
from rkfast.train.recipes import Recipe

FOLDER = Path("runs")
RECIPE = ("model", "data", "augment", "batch", "epochs", "lr", "factor", "weight_decay", "momentum", "nesterov")
ENGINE = (
    *("root", "seed", "fused", "compile", "amp", "channels_last", "accumulate", "ema", "sync_batchnorm"),
    *("workers", "keep", "resume", "download", "every", "device"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument
    add("--recipe", metavar="NAME", help="(digits)")
    add("--config", type=Path, metavar="FILE", help="a recipe in TOML, in place of --recipe")
    add("--out", type=Path, metavar="FOLDER", help=f"of the run, which goes on where it stopped ({FOLDER}/<recipe>)")
    add = parser.add_argument_group("values in place of the recipe's").add_argument
    add("--model", metavar="NAME", help="see rkfast.list_models()")
    add("--options", metavar="JSON", help="what it is made with, such as '{\"width\": 16}'")
    add("--data", metavar="NAME")
    add("--augment", metavar="NAME", help='of the training images; "none" for none')
    add("--batch", type=int, metavar="N", help="images of a step, of all processes together")
    add("--epochs", type=int, metavar="N")
    add("--lr", type=float, metavar="RATE")
    add(
        "--drops", type=float, nargs="*", metavar="EPOCH", help="of the learning rate; below 1 a fraction of all epochs"
    )
    add("--factor", type=float, help="of each drop")
    add("--weight-decay", type=float, metavar="RATE")
    add("--momentum", type=float)
    add("--nesterov", action=flag, default=None)
    add = parser.add_argument_group("how it is done").add_argument
    add("--root", type=Path, metavar="FOLDER", help="of the data")
    add("--download", action="store_true", help="fetch the data where they are not there")
    add("--seed", type=int, default=0, help="of weights, order, augmentation and dropout (%(default)s)")
    add("--device", help="such as cpu or cuda (a GPU where there is one)")
    add("--fused", choices=engine.FUSED, default=engine.FUSED[0], help="off is stock PyTorch (%(default)s)")
    add("--compile", nargs="?", const=True, default=False, metavar="MODE", help="by torch.compile; reduce-overhead "
        "takes CUDA graphs")  # fmt: skip
    add("--amp", choices=engine.AMP, default="fp32", help="autocast (%(default)s for none)")
    add("--channels-last", action=flag, default=True, help="layout of network and images")
    add("--accumulate", type=int, default=1, metavar="N", help="micro-batches of a step (%(default)s)")
    add("--ema", type=float, metavar="DECAY", help="train, test and keep a moving average, such as 0.999")
    add("--sync-batchnorm", action="store_true", help="statistics over all processes")
    add("--workers", type=int, default=0, metavar="N", help="processes that load images (%(default)s)")
    add("--keep", type=int, default=2, metavar="N", help="checkpoints kept, besides the best (%(default)s)")
    add("--every", type=int, metavar="STEPS", help="between checkpoints, besides one behind each epoch")
    add("--resume", action=flag, default=True, help="go on with the run in --out; --no-resume starts it again")


def wanted(args: argparse.Namespace) -> Recipe:
    """The recipe that a command line names.

    Raises:
        TypeError, ValueError: what is wrong with an argument.
    """
    if args.config is not None and args.recipe is not None:
        raise ValueError("--config: goes without --recipe; name the recipe in the file")
    found = recipes.recipe(args.recipe or "digits") if args.config is None else recipes.from_toml(args.config)
    values: dict[str, Any] = {name: getattr(args, name) for name in RECIPE if getattr(args, name) is not None}
    if values.get("augment") == "none":
        values["augment"] = None
    if args.drops is not None:
        values["drops"] = tuple(args.drops)
    if args.options is not None:
        try:
            values["options"] = json.loads(args.options)
        except ValueError as error:
            raise ValueError(f"--options: {args.options!r} is no JSON: {error}") from error
        if not isinstance(values["options"], dict):
            raise ValueError(f'--options: expected an object, such as {{"width": 16}}, got {args.options!r}')
    return recipes.overridden(found, **values)


def run(args: argparse.Namespace) -> int:
    """Returns 2 for what is wrong with the command line or the data, 1 for a training that failed."""
    try:
        recipe = wanted(args)
        out = FOLDER / recipe.name if args.out is None else args.out
        result = engine.train(recipe, out, **{name: getattr(args, name) for name in ENGINE})
    except (TypeError, ValueError) as error:
        print(f"rkfast train: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"rkfast train: {error}", file=sys.stderr)
        return 1
    if result.rows:  # of the process that writes
        beside = "" if recipe.published is None else f"; published {recipe.published:.2f} % ({recipe.source})"
        print(f"test error {result.error:.2f} %, at best {result.best:.2f} %{beside}")
        print(f"wrote {out}")
    return 0
