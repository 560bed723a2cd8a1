"""Images to train on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rkfast import demo

DATA = ("digits",)


class Data(NamedTuple):
    """Datasets of (image Tensor [channels, size, size] in float32, label), and what they are of."""

    train: Dataset[tuple[Tensor, int]]
    test: Dataset[tuple[Tensor, int]]
    classes: int
    channels: int
    size: int
    names: tuple[str, ...]


class _Pairs(Dataset[tuple[Tensor, int]]):
    """Images [N, C, H, W] and labels [N] in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def load(
    name: str,
    root: str | Path | None = None,
    *,
    augment: str | None = None,
    download: bool = False,
    size: int | None = None,
) -> Data:
    """The data of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in DATA:
        raise ValueError(f"data: there is no {name!r}; expected one of {', '.join(DATA)}")
    size = size or 8
    train, test = demo.digits(0, torch.device("cpu"), size)
    return Data(_Pairs(*train), _Pairs(*test), 10, 1, size, tuple("0123456789"))
