"""Checkpoints: all that a training needs to go on, in a folder that is there whole or not at all. Nothing is pickled.

``checkpoints/00000220`` in the folder of a run is its state behind 220 steps:

    NAME.safetensors   the tensors of a group: model, optimizer, ema
    state.json         all else, the SHA-256 of each of these files, and its own
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkfast.extras import require
from rkfast.files import making

FOLDER, STATE, SUFFIX = "checkpoints", "state.json", ".safetensors"
VERSION = 1


class Checkpoint(NamedTuple):
    """``tensors`` by group and name, on the CPU; ``state`` is what JSON can hold."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write(out: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint of the run in ``out``; killed at any instant, there is all of it or nothing.

    Returns:
        Its folder.
    """
    safetensors = require("safetensors.torch", "train")
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    path = at(out, checkpoint.step)
    with making(path) as new:
        sums = {}
        for group, tensors in checkpoint.tensors.items():
            content = safetensors.save({name: _plain(tensor) for name, tensor in tensors.items()})
            (new / f"{group}{SUFFIX}").write_bytes(content)
            sums[group] = hashlib.sha256(content).hexdigest()
        said = {"version": VERSION, "step": checkpoint.step, "files": sums, "state": checkpoint.state}
        (new / STATE).write_text(json.dumps({**said, "sha256": _sum(said)}) + "\n")
    return path


def _plain(tensor: Tensor) -> Tensor:
    """In memory of its own, which may be shared in the network."""
    return tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)


def _sum(said: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def read(path: Path) -> Checkpoint:
    """The checkpoint in a folder.

    Raises:
        ValueError: it is damaged: a file is missing, or is not what was written.
    """
    safetensors = require("safetensors.torch", "train")
    try:
        said = json.loads((path / STATE).read_bytes())
        if said.pop("sha256") != _sum(said):
            raise ValueError("its checksum is another")
        if said["version"] != VERSION:
            raise ValueError(f"it is of version {said['version']}, and this rkfast reads {VERSION}")
        tensors = {}
        for group, expected in said["files"].items():
            content = (path / f"{group}{SUFFIX}").read_bytes()
            if hashlib.sha256(content).hexdigest() != expected:
                raise ValueError(f"the checksum of {group}{SUFFIX} is another")
            tensors[group] = safetensors.load(content)
    except OSError as error:
        raise ValueError(f"{path} is damaged: {Path(error.filename or path).name}: {error.strerror}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return Checkpoint(said["step"], tensors, said["state"])


def newest(out: Path) -> Checkpoint | None:
    """The last checkpoint of a run that is intact; each damaged one is warned of. None where there is none."""
    for path in reversed(paths(out)):
        try:
            return read(path)
        except ValueError as error:  # noqa: PERF203  # each is warned of
            warnings.warn(f"{error}; the one before it is used, or none where there is none", stacklevel=2)
    return None


def at(out: Path, step: int) -> Path:
    """The folder of the checkpoint behind that many steps."""
    return out / FOLDER / f"{step:08d}"


def paths(out: Path) -> list[Path]:
    """The folders of a run's checkpoints, the oldest first."""
    return sorted((path for path in (out / FOLDER).glob("*") if path.name.isdigit()), key=lambda path: int(path.name))


def prune(out: Path, keep: int, best: int | None) -> None:
    """Remove all but the last ``keep`` and the one behind ``best`` steps."""
    _remove(path for path in paths(out)[:-keep] if best is None or int(path.name) != best)


def forget(out: Path, step: int) -> None:
    """Remove the checkpoints behind more steps, and what a killed process left half written."""
    _remove(path for path in paths(out) if int(path.name) > step)
    for path in (out / FOLDER).glob(".*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(found: Iterable[Path]) -> None:
    for path in list(found):
        # Renamed first: what is half removed when the process is killed is no checkpoint.
        shutil.rmtree(path.rename(path.with_name(f".{path.name}")), ignore_errors=True)
