"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new name in the folder of ``path``, with its suffix. What is written there becomes ``path`` at the end; on an
    error it goes, and what was at ``path`` stays."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        new = Path(folder, path.name)
        yield new
        with open(new, "rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)


@contextlib.contextmanager
def making(path: Path) -> Iterator[Path]:
    """A new folder beside ``path``, which becomes it at the end, with all files in it on the disk; what was at ``path``
    goes then. On an error the new folder goes, and what was at ``path`` stays."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        new = Path(folder, path.name)
        new.mkdir()
        yield new
        for part in (*new.iterdir(), new):
            _to_disk(part)
        if path.exists():
            path.rename(Path(folder, "before"))
        new.rename(path)
        _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
