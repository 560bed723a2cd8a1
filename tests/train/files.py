"""Small files of the data sets, in the formats that they have on a disk."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.libraries import library

EACH = 12  # images in every file
CLASSES = 1000


def pixels(shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def write(name: str, root: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Path:
    """The files of a data set under ``root``, whose checksums torchvision then takes for the originals'."""
    {"svhn": svhn, "imagenet": imagenet}.get(name, cifar)(name, root, monkeypatch, **changes)
    return root


def cifar(
    name: str, root: Path, monkeypatch: pytest.MonkeyPatch, *, names: int | None = None, label: int | None = None
) -> None:
    made = getattr(library("torchvision.datasets"), name.upper())
    classes = {"cifar10": 10, "cifar100": 100}[name]
    key = "labels" if name == "cifar10" else "fine_labels"
    home = root / made.base_folder
    home.mkdir(parents=True)
    for split in ("train_list", "test_list"):
        sums = []
        for i, (file, _) in enumerate(getattr(made, split)):
            labels = [(3 * i + n) % classes for n in range(EACH)]
            if label is not None:
                labels[-1] = label
            content = {"data": pixels((EACH, 3072), seed=i + (split == "test_list") * 99), key: labels}
            sums.append([file, _pickled(home / file, content)])
        monkeypatch.setattr(made, split, sums)
    meta = made.meta
    content = {meta["key"]: [f"class {n}" for n in range(classes if names is None else names)]}
    monkeypatch.setattr(made, "meta", meta | {"md5": _pickled(home / meta["filename"], content)})


def _pickled(path: Path, content: object) -> str:
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def svhn(_: str, root: Path, monkeypatch: pytest.MonkeyPatch, *, label: int = 10) -> None:
    io = pytest.importorskip("scipy.io")
    made = library("torchvision.datasets").SVHN
    root.mkdir(parents=True, exist_ok=True)
    sums = {}
    for i, (split, (url, file, _)) in enumerate(made.split_list.items()):
        # 1 to 10 on the disk, of which 10 is the digit 0.
        labels = np.arange(1, EACH + 1, dtype=np.uint8)[:, None] % 10
        labels[labels == 0] = label
        io.savemat(root / file, {"X": pixels((32, 32, 3, EACH), seed=i), "y": labels})
        sums[split] = [url, file, hashlib.md5((root / file).read_bytes()).hexdigest()]
    monkeypatch.setattr(made, "split_list", sums)


def imagenet(_: str, root: Path, monkeypatch: pytest.MonkeyPatch, *, classes: int = CLASSES, side: int = 8) -> None:
    """One image of each class in every split, of random colours."""
    library("torchvision")
    image = library("PIL.Image")
    for seed, split in enumerate(("train", "val")):
        colours = pixels((classes, 2, 3, 3), seed)
        for n in range(classes):
            folder = root / split / f"n{n:08}"
            folder.mkdir(parents=True)
            image.fromarray(colours[n]).resize((side, side - 2)).save(folder / f"{split}_{n}.JPEG")
