"""What a network is trained with: one recipe for each row of the papers' tables."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from rkfast.extras import require


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A network, its data, and how stochastic gradient descent trains it.

    Attributes:
        name: of the recipe, such as "digits".
        model, options: of ``rkfast.create_model``; classes and channels are those of the data.
        data, augment: of ``rkfast.train.data.load``.
        batch: images of a step, of all processes together.
        epochs: passes over the training images.
        lr: learning rate of the first epoch.
        drops: where the learning rate is multiplied by ``factor``: below 1 a fraction of all epochs, else an epoch.
        factor: see drops.
        weight_decay, momentum, nesterov: of torch.optim.SGD.
        published: test error in the paper, in %.
        source: paper, table and row.
    """

    name: str
    model: str
    options: dict[str, Any]
    data: str
    augment: str | None
    batch: int
    epochs: int
    lr: float
    drops: tuple[float, ...]
    factor: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    nesterov: bool = True
    published: float | None = None
    source: str = ""

    @property
    def milestones(self) -> tuple[int, ...]:
        """The drops in epochs: so many are trained before each."""
        return tuple(round(drop * self.epochs) if drop < 1 else int(drop) for drop in self.drops)


RECIPES = {
    "digits": Recipe(
        name="digits",
        model="resnet-8",
        options={},
        data="digits",
        augment=None,
        batch=32,
        epochs=10,
        lr=0.1,
        drops=(0.5, 0.75),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        ValueError: there is none; the nearest names are told.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, 3)
        raise ValueError(f"recipe: there is no {name!r}" + (f"; near are {', '.join(near)}" if near else ""))
    return RECIPES[name]


def overridden(recipe: Recipe, **values: Any) -> Recipe:
    """The recipe with other values.

    Raises:
        ValueError: a recipe has no such field.
    """
    fields = {field.name for field in dataclasses.fields(Recipe)}
    for name in values:
        if name not in fields:
            raise ValueError(f"{name}: not a field of a recipe; expected one of {', '.join(sorted(fields))}")
    return dataclasses.replace(recipe, **values)


def from_toml(path: str | Path) -> Recipe:
    """The recipe of a TOML file: ``recipe``, the one it starts from ("digits"), and other values.

    Raises:
        ValueError: it cannot be read, or a value is wrong.
    """
    try:
        values = require("tomllib", "train").loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    found = recipe(values.pop("recipe", "digits"))
    return overridden(found, **{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
