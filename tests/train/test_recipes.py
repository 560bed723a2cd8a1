"""A recipe for every row of the papers' tables: its network, its settings, and two steps of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from rkfast import cli, papers
from rkfast.models import create_model
from rkfast.train import engine
from rkfast.train.data import DATA, Data, load
from rkfast.train.recipes import RECIPES, Recipe, from_toml, matching, overridden, recipe
from tests.libraries import library
from tests.package.process import ROOT
from tests.train.files import write

# As printed: RKNet's Tables 1 to 3, TSC's 2, 3 and 5, and 100 less HO-ResNet's accuracies.
PRINTED = {
    "rknet/t1/erknet-6": 7.08,
    "rknet/t1/erknet-7_7_6": 6.67,
    "rknet/t1/irknet-4_3_3": 6.89,
    "rknet/t2/irknet-5-ab-k80/c10": 5.27,
    "rknet/t2/irknet-5-ab-k80/c10+": 4.23,
    "rknet/t2/irknet-5-ab-k80/c100": 24.35,
    "rknet/t2/irknet-5-ab-k80/c100+": 20.85,
    "rknet/t2/irknet-6-a-k80/svhn": 1.52,
    "rknet/t2/irknet-5-ab-k240/c10+": 3.40,
    "rknet/t2/densenet-250-bc-k24/svhn": 1.74,
    "rknet/t2/cliquenet-18-k80/c10": 5.06,
    "rknet/t3/erknet-3_3_6_2-b-k32": 23.14,
    "tsc/t2/tsc_resnet50-2fc": 23.90,
    "tsc/t3/resnet50": 24.42,
    "tsc/t3/tsc_resnet50": 23.63,
    "tsc/t3/tsc_seresnet101": 21.82,
    "tsc/t5/tsc_cliquenet-12/c100+": 22.04,
    "ho/t2/rk4x7": 5.21,
    "ho/t2/eulerx28": 7.29,
    "ho/t2/rk8x1-factor2": 5.83,
    "ho/t3/midpointx8-nested2": 6.19,
    "ho/t4/rk8x1-factor2.5": 5.91,
}


def test_published_errors() -> None:
    assert {name: RECIPES[name].published for name in PRINTED} == PRINTED


def test_every_row_has_one() -> None:
    tables = {
        "rknet/t1": papers.RKNET_TABLE_1,
        "rknet/t2": [*papers.RKNET_TABLE_2, *papers.RKNET_TABLE_2_QUOTED],
        "rknet/t3": papers.RKNET_TABLE_3,
        "tsc/t2": papers.TSC_TABLE_2,
        "tsc/t3": papers.TSC_TABLE_3,
        "tsc/t5": papers.TSC_TABLE_5,
        "ho/t2": papers.HO_RESNET_TABLE_2,
        "ho/t3": papers.HO_RESNET_TABLE_3,
        "ho/t4": papers.HO_RESNET_TABLE_4,
    }
    for table, rows in tables.items():
        found = matching(f"{table}/*")
        errors = [error for row in rows for error in row.errors.values()]
        assert sorted(one.published or 0 for one in found) == sorted(errors)
        assert {one.model for one in found} == {row.model for row in rows}
    curves = {"rknet/f4": 4, "tsc/f4": 3, "tsc/f5": 28, "ho/f8": 2, "ho/f9": 3, "ho/f10": 4, "ho/f11": 3}
    assert {figure: len(matching(f"{figure}/*")) for figure in curves} == curves
    assert len(matching("rknet/t4/*")) == 1
    assert all(re.search(r"(Table|Figure) \d", one.source) for one in RECIPES.values() if one.data != "digits")


# RKNet's Table 2 and TSC's, by column.
COLUMNS = {
    "rknet/t2": {
        "c10": (10.56, 5.83, 5.19, 5.06, 5.06, 5.27, 4.60, 4.56),
        "c10+": (4.62, 4.27, 4.00, 3.74, 3.62, 3.46, 5.98, 5.27, 4.23, 3.60, 3.54, 3.40),
        "c100": (33.47, 23.42, 19.64, 23.14, 21.83, 24.35, 21.39, 20.88, 20.67, 20.58),
        "c100+": (22.71, 20.43, 19.25, 19.25, 17.60, 17.18, 26.11, 22.9, 16.79, 20.85, 19.42, 18.61, 18.11),
        "svhn": (1.54, 1.59, 1.74, 1.51, 1.64, 1.74, 1.63, 1.64, 1.52),
    },
    "tsc/t2": {"imagenet": (24.70, 24.42, 24.12, 23.90, 23.63)},
}


@pytest.mark.parametrize("table", COLUMNS)
def test_what_has_no_recipe_is_quoted(table: str) -> None:
    names = {"cifar10": "c10", "cifar10+": "c10+", "cifar100": "c100", "cifar100+": "c100+"}
    found: dict[str, list[float | None]] = {column: [] for column in COLUMNS[table]}
    for one in matching(f"{table}/*"):
        found[one.data if one.data in found else one.name.rpartition("/")[2]].append(one.published)
    for row in papers.QUOTED[table]:
        for column, error in row.errors.items():
            found[names.get(column, column)].append(error)
    assert {column: sorted(errors) for column, errors in found.items()} == {  # type: ignore[type-var]
        column: sorted(errors) for column, errors in COLUMNS[table].items()
    }
    text = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    assert all(row.title in text for row in papers.QUOTED[table])


def settings(name: str) -> tuple[Any, ...]:
    one = RECIPES[name]
    return (
        one.data,
        one.augment,
        one.batch,
        one.epochs,
        one.lr,
        one.milestones,
        one.nesterov,
        one.options.get("drop_rate"),
    )


def test_settings() -> None:
    """RKNet's Appendix A, TSC's Training Details, HO-ResNet's section 4."""
    long, every30 = (150, 225), (30, 60)
    expected = {
        "rknet/t1/erknet-6": ("cifar10", None, 64, 300, 0.1, long, True, 0.2),
        "rknet/t2/irknet-5-ab-k150/c100": ("cifar100", None, 32, 300, 0.1, long, True, 0.2),
        "rknet/t2/irknet-5-ab-k150/c100+": ("cifar100", "crop", 32, 300, 0.1, long, True, None),
        "rknet/t2/irknet-5-ab-k150/svhn": ("svhn", None, 64, 40, 0.1, (20, 30), True, 0.2),
        "rknet/t2/densenet-100-k24/c10+": ("cifar10", "crop", 64, 300, 0.1, long, True, None),
        "rknet/t3/erknet-3_3_3_1-b-k32": ("imagenet", "inception", 256, 90, 0.1, every30, True, None),
        "rknet/f4/densenet121": ("imagenet", "inception", 256, 90, 0.1, every30, True, None),
        "tsc/t3/tsc_resnet18": ("imagenet", "scale", 256, 100, 0.1, (30, 60, 90), True, None),
        "tsc/f5/tsc_resnet-506/c100+": ("cifar100", "crop", 64, 300, 0.1, long, True, None),
        "ho/t2/rk4x7": ("cifar10", "autoaugment", 128, 260, 0.1, (100, 150, 200, 230), False, None),
        "ho/f9/rk4x1": ("cifar10", None, 128, 260, 0.1, (100, 150, 200, 230), False, None),
        "ho/f10/rk8x2": ("cifar10", "autoaugment", 128, 260, 0.05, (100, 150, 200, 230), False, None),
    }
    assert {name: settings(name) for name in expected} == expected
    trained = [one for one in RECIPES.values() if one.data != "digits"]
    assert {(one.weight_decay, one.momentum, one.factor) for one in trained} == {(1e-4, 0.9, 0.1)}


def network(one: Recipe, **options: Any) -> torch.nn.Module:
    kind = DATA[one.data]
    return create_model(one.model, num_classes=kind.classes, in_chans=kind.channels, **one.options, **options)


def of_each_kind() -> list[str]:
    """One recipe for each family of networks and set of data."""
    found: dict[tuple[str, str], str] = {}
    for name, one in RECIPES.items():
        found.setdefault((one.model.partition("-")[0].rstrip("0123456789"), one.data), name)
    return list(found.values())


@pytest.mark.parametrize("name", of_each_kind())
def test_its_network_on_its_batch(name: str) -> None:
    """On the meta device; dropout has neither shape nor parameters."""
    one, kind = RECIPES[name], DATA[RECIPES[name].data]
    with torch.device("meta"), torch.no_grad():
        x = torch.empty(one.batch, kind.channels, kind.size, kind.size)
        assert network(one)(x).shape == (one.batch, kind.classes)


def test_every_network_is_made() -> None:
    with torch.device("meta"):
        for one in RECIPES.values():
            assert any(p.shape[:1] == (DATA[one.data].classes,) for p in network(one).parameters()), one.name


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    library("torchvision.datasets")
    with pytest.MonkeyPatch.context() as patch:
        files = [name for name in DATA if name != "digits"]
        yield {name: write(name, tmp_path_factory.mktemp(name), patch) for name in files}


def trained(one: Recipe, found: Data, steps: int) -> torch.nn.Module:
    """A network after so many steps, or all, of a recipe."""
    torch.manual_seed(0)
    net = network(one).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        net.parameters(), one.lr, momentum=one.momentum, weight_decay=one.weight_decay, nesterov=one.nesterov
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, one.milestones, one.factor)
    for _ in range(one.epochs):
        for x, y in itertools.islice(DataLoader(found.train, one.batch, shuffle=True, drop_last=True), steps):
            loss = F.cross_entropy(net(x.contiguous(memory_format=torch.channels_last)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert loss.isfinite()
        schedule.step()
    return net


class Enough(BaseException):
    pass


@pytest.mark.parametrize("name", of_each_kind())
def test_two_steps(name: str, roots: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the engine, on files as the data set has them."""
    one = overridden(RECIPES[name], batch=2)
    right, seen = engine._Run._train, []

    def step(run: Any, images: Tensor, labels: Tensor) -> None:
        seen.append([parameter.detach().clone() for parameter in run.model.parameters()])
        if len(seen) == 3:
            raise Enough
        right(run, images, labels)

    monkeypatch.setattr(engine._Run, "_train", step)
    with pytest.raises(Enough):
        engine.train(one, tmp_path, root=roots.get(one.data), device="cpu")
    changed = [not torch.equal(a, b) for a, b in zip(seen[0], seen[2], strict=True)]
    assert sum(changed) > 0.9 * len(changed)
    assert all(parameter.isfinite().all() for parameter in seen[2])


def test_the_digits_are_learned() -> None:
    pytest.importorskip("sklearn")
    one = recipe("digits")
    found = load(one.data)
    net = trained(one, found, 1000).eval()
    images, labels = next(iter(DataLoader(found.test, batch_size=360)))
    with torch.no_grad():
        assert (net(images).argmax(1) == labels).float().mean() > 0.97


def test_unknown_names() -> None:
    with pytest.raises(
        ValueError, match="there is no 'rknet/t2/irknet-5-ab-k80'; near are rknet/t2/irknet-5-ab-k80/c10"
    ):
        recipe("rknet/t2/irknet-5-ab-k80")
    with pytest.raises(ValueError, match=r"'tsc/t3/resnet5'; near are .*tsc/t3/resnet50"):
        recipe("tsc/t3/resnet5")
    with pytest.raises(ValueError, match=r"'\*nothing'; rkfast recipes lists them"):
        matching("*nothing")
    with pytest.raises(TypeError, match="recipe: expected a str, got int"):
        recipe(3)  # type: ignore[arg-type]


def test_overridden() -> None:
    one = recipe("ho/t2/rk4x7")
    assert overridden(one) == one
    short = overridden(one, epochs=26, lr=0.2)
    assert (short.milestones, short.lr, short.published) == ((10, 15, 20, 23), 0.2, one.published)
    assert overridden(one, epochs=26, drops=(13,)).milestones == (13,)
    assert overridden(one, epochs=2).milestones == (1, 1, 2, 2)
    assert overridden(recipe("rknet/t1/erknet-6"), epochs=10).milestones == (5, 8)
    narrow = overridden(one, options={"width": 8})
    assert (narrow.options, narrow.published) == ({"method": "rk4", "width": 8}, None)
    assert overridden(one, model="resnet-8").options == {}
    assert overridden(one, model=one.model).options == one.options
    assert overridden(one, model="irknet-2x1-b", options={"growth_rate": 4}).options == {"growth_rate": 4}
    assert overridden(one, data="digits").augment is None
    assert one == recipe("ho/t2/rk4x7")


@pytest.mark.parametrize(
    ("values", "message"),
    (
        ({"epoch": 3}, "epoch: not a field of a recipe; epochs?"),
        ({"batch": 0}, "batch: expected 1 to "),
        ({"batch": "8"}, "batch: expected an int, got '8'"),
        ({"epochs": 1.5}, "epochs: expected an int"),
        ({"lr": 0}, "lr: expected a number in"),
        ({"lr": float("nan")}, "lr: expected a number in"),
        ({"drops": 0.5}, "drops: expected a tuple of numbers"),
        ({"drops": (0.5, 2.5)}, "drops: expected shares of the epochs, below 1, or whole epochs, got 2.5"),
        ({"drops": (0.75, 0.5)}, "drops: expected each later than the one before"),
        ({"factor": 2}, "factor: expected a number in"),
        ({"momentum": 0}, "nesterov: it is of a momentum above 0"),
        ({"nesterov": 1}, "nesterov: expected a bool"),
        ({"data": "mnist"}, "data: expected one of digits"),
        ({"augment": "scale"}, "augment: of cifar10 expected crop, autoaugment or None"),
        ({"options": {"num_classes": 3}}, "options: num_classes is that of the data"),
        ({"options": [1]}, "options: expected a dict"),
        ({"model": 3}, "model: expected a str"),
        ({"published": 101}, "published: expected a number in"),
    ),
)
def test_what_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        overridden(recipe("rknet/t1/erknet-6"), **values)


def test_json_gives_the_same_recipe() -> None:
    for one in RECIPES.values():
        again = Recipe(**json.loads(json.dumps(dataclasses.asdict(one))))
        assert dataclasses.replace(again, options=one.options) == one  # which may have tuples
    network(Recipe(**json.loads(json.dumps(dataclasses.asdict(recipe("rknet/t4/rknet-1x8_1x2_1x2-b-k12-time"))))))


def toml(folder: Path, text: str) -> Path:
    file = folder / "mine.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_toml(tmp_path: Path) -> None:
    pytest.importorskip("tomllib" if __import__("sys").version_info >= (3, 11) else "tomli")
    text = 'recipe = "rknet/t2/irknet-5-ab-k80/c10+"\nepochs = 30\naugment = "none"\ndrops = [10, 20]\n'
    one = from_toml(toml(tmp_path, text + "[options]\ngrowth_rate = 40\n"))
    assert (one.name, one.model, one.options) == ("mine", "irknet-5x1_5x1_5x1-ab", {"growth_rate": 40})
    assert (one.augment, one.batch, one.milestones, one.published) == (None, 32, (10, 20), None)
    assert from_toml(toml(tmp_path, 'name = "other"\nmodel = "resnet-8"\n')).name == "other"
    for text, message in (
        ("epochs = ", "is no TOML"),
        ('recipe = "digit"', "mine.toml: recipe: there is no 'digit'; near are digits"),
        ("epoch = 3", "mine.toml: epoch: not a field"),
        ("batch = 0", "mine.toml: batch: expected 1"),
    ):
        with pytest.raises(ValueError, match=message):
            from_toml(toml(tmp_path, text))
    with pytest.raises(ValueError, match=r"no\.toml cannot be read: No such file"):
        from_toml(tmp_path / "no.toml")


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(RECIPES) + 1
    assert cli.main(["recipes", "irknet-5-ab-k80/c10+"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert re.split(r"  +", line) == [
        "rknet/t2/irknet-5-ab-k80/c10+", "irknet-5x1_5x1_5x1-ab growth_rate=80", "cifar10, crop", "32", "300", "4.23",
    ]  # fmt: skip
    assert cli.main(["recipes", "ho/*/rk4*", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found] == [one.name for one in matching("ho/*/rk4*")]
    assert found[0].keys() == {field.name for field in dataclasses.fields(Recipe)}
    assert cli.main(["recipes", "tsc/t3/resnet5"]) == 0
    assert "tsc/t3/resnet50 " in capsys.readouterr().out
    assert cli.main(["recipes", "tsc/t3/resnot"]) == 2
    assert "near are tsc/t3/resnet" in capsys.readouterr().err
