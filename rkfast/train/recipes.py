"""How the networks of the papers were trained: a recipe for each row of their tables and each curve of their figures.

Names are ``paper/table or figure/network``, with the column where the table has several:
``rknet/t2/irknet-5-ab-k80/c10+``, ``tsc/t3/resnet50``, ``ho/t2/rk4x7``. A curve that is the training of a row has no
recipe besides. Those that begin with ``digits`` are of this package, small enough for a laptop.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rkfast import papers, tableau
from rkfast.extras import require
from rkfast.models.base import flag, real, whole
from rkfast.models.ho_resnet import ALIASES
from rkfast.papers import Row
from rkfast.train import data as images


@dataclass(frozen=True)
class Recipe:
    """A network, its images, and stochastic gradient descent with momentum.

    Attributes:
        name: as in RECIPES.
        model, options: what ``create_model`` makes the network of, besides the classes and channels of the images.
        data, augment: as in ``rkfast.train.data.load``.
        batch: images per step, over all processes.
        epochs: how many.
        lr: learning rate at first.
        drops: when it is multiplied by ``factor``: after that share of the epochs if below 1, else that many epochs.
        factor: above 0 and at most 1.
        weight_decay, momentum, nesterov: of torch.optim.SGD.
        published: error on the test images that the paper prints, in per cent; None where it prints none.
        source: paper, table and row.

    Raises:
        TypeError, ValueError: what a field is or holds.
    """

    name: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)
    data: str = "digits"
    augment: str | None = None
    batch: int = 64
    epochs: int = 300
    lr: float = 0.1
    drops: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    nesterov: bool = True
    published: float | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for key in ("name", "model", "source"):
            if not isinstance(getattr(self, key), str):
                raise TypeError(f"{key}: expected a str, got {getattr(self, key)!r}")
        if not isinstance(self.options, dict) or not all(isinstance(key, str) for key in self.options):
            raise TypeError(f"options: expected a dict with names of options, got {self.options!r}")
        for key in ("num_classes", "in_chans"):
            if key in self.options:
                raise ValueError(f"options: {key} is that of the data; leave it out")
        images.check(self.data, self.augment)
        whole("batch", self.batch, 1, 1 << 24)
        whole("epochs", self.epochs, 1, 1 << 24)
        real("lr", self.lr, 0, 1e6, "(]")
        if not isinstance(self.drops, (tuple, list)):
            raise TypeError(f"drops: expected a tuple of numbers, got {self.drops!r}")
        object.__setattr__(self, "drops", tuple(self.drops))  # files have lists
        for drop in self.drops:
            if real("drops", drop, 0, 1e6, "(]") >= 1 and drop != int(drop):
                raise ValueError(f"drops: expected shares of the epochs, below 1, or whole epochs, got {drop}")
        ends = [drop * self.epochs if drop < 1 else drop for drop in self.drops]
        if ends != sorted(set(ends)):
            raise ValueError(
                f"drops: expected each later than the one before, got {self.drops} of {self.epochs} epochs"
            )
        real("factor", self.factor, 0, 1, "(]")
        real("weight_decay", self.weight_decay, 0, 1e6, "[]")
        real("momentum", self.momentum, 0, 1, "[)")
        if flag("nesterov", self.nesterov) and not self.momentum:
            raise ValueError("nesterov: it is of a momentum above 0; set it to False, or give momentum")
        if self.published is not None:
            real("published", self.published, 0, 100, "[]")

    @property
    def milestones(self) -> tuple[int, ...]:
        """The drops in whole epochs: so many are trained before each. In a short training some may be equal."""
        return tuple(round(drop * self.epochs) if drop < 1 else int(drop) for drop in self.drops)


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        TypeError: name is no str.
        ValueError: there is none; the nearest names are told.
    """
    if not isinstance(name, str):
        raise TypeError(f"recipe: expected a str, got {type(name).__name__}")
    if name not in RECIPES:
        near = [known for known in RECIPES if known.startswith(f"{name}/")] or difflib.get_close_matches(name, RECIPES)
        told = f"near are {', '.join(near[:4])}" if near else "rkfast recipes lists them"
        raise ValueError(f"recipe: there is no {name!r}; {told}")
    return RECIPES[name]


def matching(pattern: str) -> list[Recipe]:
    """The recipes whose names contain ``pattern``, or match it if it has one of ``*?[``.

    Raises:
        ValueError: there is none; the nearest names are told.
    """
    wanted = pattern if set("*?[") & set(pattern) else f"*{pattern}*"
    names = [name for name in RECIPES if fnmatch.fnmatchcase(name, wanted)]
    return [RECIPES[name] for name in names] or [recipe(pattern)]


def overridden(recipe: Recipe, **values: Any) -> Recipe:
    """``recipe`` with other values for some fields.

    ``options`` are put over those of the recipe, unless the model is another, too. Where ``epochs`` are given without
    ``drops``, these keep their share of them. Another model, options or data have no published error.

    Raises:
        TypeError, ValueError: a field that there is not, or what one is or holds.
    """
    fields = [f.name for f in dataclasses.fields(Recipe)]
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            raise ValueError(
                f"{key}: not a field of a recipe" + (f"; {near[0]}?" if near else f"; there are {', '.join(fields)}")
            )
    if {"model", "options", "data"} & values.keys():
        values = {"published": None, **values}
    if values.get("model", recipe.model) != recipe.model:
        values = {"options": {}, **values}
    elif isinstance(values.get("options"), dict):
        values["options"] = recipe.options | values["options"]
    if "data" in values and "augment" not in values:
        values["augment"] = None
    if "epochs" in values and "drops" not in values:
        values["drops"] = tuple(drop if drop < 1 else drop / recipe.epochs for drop in recipe.drops)
    return dataclasses.replace(recipe, **values)


def from_toml(path: str | Path) -> Recipe:
    """A recipe of a TOML file, whose keys are the fields of Recipe. Those that it has not are of the recipe that its
    key ``recipe`` names, by default "digits"::

        recipe = "rknet/t2/irknet-5-ab-k80/c10+"
        epochs = 30

        [options]
        growth_rate = 40

    ``augment = "none"`` is None. The name is that of the file unless given.

    Raises:
        TypeError, ValueError: the file cannot be read, or what is wrong in it.
        MissingExtra: tomli is not installed, which Python 3.10 needs.
    """
    path = Path(path)
    toml = _toml()
    try:
        values = toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of the text or of what it says
        raise ValueError(f"{path} is no TOML: {error}") from error
    try:
        base = recipe(values.pop("recipe", "digits"))
        if values.get("augment") == "none":
            values["augment"] = None
        return overridden(base, **{"name": path.stem, **values})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def _toml() -> Any:
    try:
        return importlib.import_module("tomllib")
    except ImportError:  # before Python 3.11
        return require("tomli", "train")


_RKNET = "RKNet (Zhu et al., arXiv 1802.08831v6)"
_TSC = "TSC (Yang et al., Dynamical System Inspired Adaptive Time Stepping Controller)"
_HO = "HO-ResNet (Luo et al., Rethinking ResNets)"
_COLUMNS = {"cifar10": "c10", "cifar10+": "c10+", "cifar100": "c100", "cifar100+": "c100+", "svhn": "svhn"}
_LONG = {"batch": 64, "epochs": 300, "drops": (0.5, 0.75)}
_IMAGENET = {"batch": 256, "epochs": 90, "drops": (30, 60), "augment": "inception"}


def _made(name: str, row: Row, column: str, source: str, **settings: Any) -> Recipe:
    """Of a column of a table, whose key in papers.DATASETS says what is published, and ends in "+" with crops."""
    options = {key: value for key, value in row.options.items() if key != "num_classes"}
    title = ", ".join([row.model, *(f"{key}={value}" for key, value in options.items())])
    return Recipe(
        name,
        row.model,
        options | settings.pop("options", {}),
        column.rstrip("+"),
        published=row.errors.get(column),
        source=f"{source}: {title}; {papers.DATASETS[column].title}",
        **({"augment": "crop"} if column.endswith("+") else {}) | settings,
    )


def _short(row: Row) -> str:
    """irknet-5-ab-k80 of irknet-5x1_5x1_5x1-ab and its growth rate."""
    family, _, rest = row.model.partition("-")
    periods, _, suffix = rest.partition("-")
    stages = [term.removesuffix("x1") for term in periods.split("_")]
    if not any("x" in stage for stage in stages):
        periods = stages[0] if len(set(stages)) == 1 else "_".join(stages)
    k = f"k{row.options['growth_rate']}" if "growth_rate" in row.options else ""
    return "-".join(part for part in (family, periods, suffix, k) if part)


def _rknet() -> Iterator[Recipe]:
    """Appendix A. Dropout goes with images that are not augmented."""
    drop = {"options": {"drop_rate": 0.2}}
    for row in papers.RKNET_TABLE_1:
        yield _made(f"rknet/t1/{_short(row)}", row, "cifar10", f"{_RKNET}, Table 1", **_LONG | drop)
    quoted = papers.RKNET_TABLE_2_QUOTED
    for row in [*quoted, *papers.RKNET_TABLE_2]:
        # Of its own networks the paper says 32 on CIFAR; DenseNet and CliqueNet took 64.
        batch = 64 if row in quoted else 32
        for column in row.errors:
            settings: dict[str, Any] = _LONG | {"batch": batch}
            if column == "svhn":
                settings |= {"batch": 64, "epochs": 40}
            name = f"rknet/t2/{_short(row)}/{_COLUMNS[column]}"
            yield _made(name, row, column, f"{_RKNET}, Table 2", **settings | ({} if column.endswith("+") else drop))
    for row in papers.RKNET_TABLE_3:
        yield _made(f"rknet/t3/{_short(row)}", row, "imagenet", f"{_RKNET}, Table 3 and Figure 4", **_IMAGENET)
    for row in papers.RKNET_TABLE_4:
        yield _made(f"rknet/t4/{_short(row)}-time", row, "cifar10+", f"{_RKNET}, Table 4", **_LONG)
    for row in papers.DENSENET_IMAGENET:
        yield _made(f"rknet/f4/{row.model}", row, "imagenet", f"{_RKNET}, Figure 4", **_IMAGENET)


def _tsc() -> Iterator[Recipe]:
    """Section "Training Details"; "a 224x224 crop is randomly sampled from the image or its horizontal flip"."""
    imagenet: dict[str, Any] = {"batch": 256, "epochs": 100, "drops": (30, 60, 90), "augment": "scale"}
    for row in papers.TSC_TABLE_2:
        short = "-".join([row.model, *([row.options["controller"]] if "controller" in row.options else [])])
        source = f"{_TSC}, Table 2" + ("" if short.endswith(("indp", "2fc")) else " and Figure 3")
        yield _made(f"tsc/t2/{short}", row, "imagenet", source, **imagenet)
    for row in papers.TSC_TABLE_3:
        yield _made(f"tsc/t3/{row.model}", row, "imagenet", f"{_TSC}, Table 3", **imagenet)
    for row in papers.TSC_TABLE_5:
        for column in row.errors:
            yield _made(f"tsc/t5/{row.model}/{_COLUMNS[column]}", row, column, f"{_TSC}, Table 5", **_LONG)
    figure4 = [
        _unpublished("resnet-56"),
        _unpublished("tsc_resnet-56", controller="fixed", value=0.01),
        _unpublished("tsc_resnet-56"),
    ]
    for row in figure4:
        short = row.model + (f"-step{row.options['value']}" if row.options else "")
        yield _made(f"tsc/f4/{short}", row, "cifar10+", f"{_TSC}, Figure 4", **_LONG)
    for model in ("resnet", "tsc_resnet"):
        for depth in (32, 56, 110, 146, 290, 362, 506):
            row = _unpublished(f"{model}-{depth}")
            for column in ("cifar10+", "cifar100+"):
                yield _made(f"tsc/f5/{row.model}/{_COLUMNS[column]}", row, column, f"{_TSC}, Figure 5", **_LONG)


def _ho() -> Iterator[Recipe]:
    """Sections 4.1 and 4.2, which have no Nesterov. Figures 8 and 9 are of images as they are, the rest augmented."""
    settings: dict[str, Any] = {"batch": 128, "epochs": 260, "drops": (100, 150, 200, 230), "nesterov": False}
    augmented = settings | {"augment": "autoaugment"}
    tables = (
        ("t2", "Table 2", papers.HO_RESNET_TABLE_2),
        ("t3", "Table 3 and Figure 12", papers.HO_RESNET_TABLE_3),
        ("t4", "Table 4", papers.HO_RESNET_TABLE_4),
    )
    for table, title, rows in tables:
        for row in rows:
            yield _made(f"ho/{table}/{_blocks(row)}", row, "cifar10", f"{_HO}, {title}", **augmented)
    figures: tuple[tuple[int, int, tuple[str, ...], dict[str, Any]], ...] = (
        (8, 6, ("euler", "midpoint"), settings),
        (9, 10, ("euler", "midpoint", "rk4"), settings),
        (10, 58, ("euler", "midpoint", "rk4", "rk8"), augmented | {"lr": 0.05}),
        (11, 58, ("midpoint", "rk4", "rk8"), augmented),
    )
    for figure, layers, methods, chosen in figures:
        for method in methods:
            row = _unpublished(f"ho_resnet-{layers}", method=method)
            yield _made(f"ho/f{figure}/{_blocks(row)}", row, "cifar10", f"{_HO}, Figure {figure}", **chosen)


def _unpublished(model: str, **options: Any) -> Row:
    return Row(model, options, None, None, {})


def _blocks(row: Row) -> str:
    """rk4x7 of ho_resnet-58 with method rk4."""
    method = row.options["method"]
    branches = (int(row.model.rpartition("-")[2]) - 2) // 2
    count = branches // tableau.get(ALIASES.get(method, method)).stages
    more = [f"{key}{row.options[key]:g}" for key in ("factor", "nested") if key in row.options]
    return "-".join([f"{method}x{count}", *more])


def _digits() -> Iterator[Recipe]:
    networks: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("digits", "ho_resnet-10", {"method": "rk4", "width": 16}),
        ("digits/ho_resnet", "ho_resnet-18", {"method": "rk4", "width": 16}),
        ("digits/erknet", "erknet-3x1_3x1", {"growth_rate": 12}),
        ("digits/irknet", "irknet-3x1_3x1-ab", {"growth_rate": 16}),
        ("digits/tsc_resnet", "tsc_resnet-20", {}),
    )
    for name, model, options in networks:
        yield Recipe(name, model, options, batch=32, epochs=12, lr=0.05, source="rkfast: for trying out")


def _by_name(recipes: Iterable[Recipe]) -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for one in recipes:
        assert one.name not in found, one.name
        found[one.name] = one
    return found


RECIPES = _by_name([*_digits(), *_rknet(), *_tsc(), *_ho()])
