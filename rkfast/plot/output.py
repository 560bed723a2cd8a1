"""Where a figure goes: whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

SUFFIXES = (".png", ".svg", ".pdf")


def partial_beside(out: Path, argument: str = "--out") -> Path:
    """An empty file beside out, which takes its place when it is whole.

    Raises:
        ValueError: there cannot be one.
    """
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if out.is_dir():
            raise IsADirectoryError(f"{out} is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as error:
        raise ValueError(f"{argument} {out} cannot be written: {error}") from error
    return partial
