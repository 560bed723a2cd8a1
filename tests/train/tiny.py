"""Data and recipes of which a training takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from rkfast.train.data import Data
from rkfast.train.recipes import Recipe

IMAGES, TESTS, CLASSES, SIZE = 100, 30, 7, 8


class Images(Dataset[tuple[Tensor, int]]):
    """Each class is a pattern under noise; augmented ones are mirrored or not, and get more noise at each look."""

    def __init__(self, images: int, augmented: bool) -> None:
        generator = torch.Generator().manual_seed(images)
        patterns = torch.randn(CLASSES, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        self.labels = torch.randint(CLASSES, (images,), generator=generator).tolist()
        self.images = patterns[self.labels] + torch.randn(images, 1, SIZE, SIZE, generator=generator)
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        if self.augmented:
            image = image.flip(-1) if torch.rand(()) < 0.5 else image
            image = image + 0.1 * torch.randn(image.shape)
        return image, self.labels[index]


def load(name: str, root: str | Path | None = None, *, augment: str | None = None, download: bool = False) -> Data:
    names = tuple(f"class {c}" for c in range(CLASSES))
    return Data(Images(IMAGES, augment is not None), Images(TESTS, False), CLASSES, 1, SIZE, names)


def recipe(model: str = "resnet-8", options: dict[str, Any] | None = None, **values: Any) -> Recipe:
    made: dict[str, Any] = dict(
        name="tiny",
        model=model,
        options=options or {},
        data="cifar10",
        augment="crop",
        batch=16,
        epochs=3,
        lr=0.05,
        drops=(0.5, 0.9),
    )
    return Recipe(**{**made, **values})
