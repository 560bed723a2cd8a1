"""The command line."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import rkfast
from rkfast.extras import MissingExtra

# Each but info has add_arguments(parser) and run(args) -> exit status; a module is imported only when asked for.
COMMANDS = {
    "info": ("rkfast.info", "versions, build, devices, and which backend serves which op"),
    "demo": ("rkfast.demo", "train a network of RK4 blocks on handwritten digits, stock and fused side by side"),
    "train": (
        "rkfast.commands.train",
        "train a network by a recipe of the papers, on one process or many; or go on with it",
    ),
    "eval": ("rkfast.commands.eval", "test a trained network: errors, calibration, noise; fused beside stock PyTorch"),
    "predict": ("rkfast.commands.predict", "the classes that a trained network sees in images"),
    "plot": (
        "rkfast.plot",
        "draw a figure: those of the papers, orders and stability of methods, the steps of a network",
    ),
    "fuse-report": ("rkfast.commands.fuse_report", "what rkfast.fuse does to a network, and why it leaves the rest"),
    "verify": ("rkfast.commands.verify", "compare a fused network with stock PyTorch and float64; PASS or FAIL"),
    "profile": (
        "rkfast.commands.profile",
        "where the time and the bytes of a step go, by kind of operation, stock and fused",
    ),
    "export": ("rkfast.commands.export", "write a network for inference as ONNX, torch.export or AOTInductor file"),
    "recipes": (
        "rkfast.commands.recipes",
        "list how the networks of the papers were trained, with the published errors",
    ),
    "table": ("rkfast.commands.table", "train the rows of a table of the papers, and write our errors beside theirs"),
    "bench": (
        "rkfast.bench.run",
        "measure the ops, our models, or a network of yours beside stock and compiled PyTorch",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="rkfast", description=rkfast.__doc__)
    parser.add_argument("--version", action="version", version=f"rkfast {rkfast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((argument for argument in argv if not argument.startswith("-")), None)
    try:
        for name, (module, summary) in COMMANDS.items():
            subparser = commands.add_parser(name, help=summary, description=summary)
            if name == asked and name != "info":
                importlib.import_module(module).add_arguments(subparser)
        args = parser.parse_args(argv)
        command = importlib.import_module(COMMANDS[args.command][0])
        status = command.main() if args.command == "info" else command.run(args) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader, such as head, has what it wanted; Python's own flush at exit must not find the pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MissingExtra as error:
        print(f"rkfast {asked}: {error}", file=sys.stderr)
        return 1
