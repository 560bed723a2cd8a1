"""RKCNN: the names of the authors' code, counts, training as in stock PyTorch, and the options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rkfast
from tests.models.tester import check_checkpointing, check_dropout, check_fused, check_interface, on_meta, parameters

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
UPDATE = {"update_bn_1x1": NORM, "update_bn_3x3": NORM, "conv_1x1_update": NORM[:1], "conv_3x3_update": NORM[:1]}
INIT = {"init_bn_1x1": NORM, "init_bn_3x3": NORM, "conv_1x1": NORM[:1], "conv_3x3": NORM[:1]}


@pytest.mark.parametrize("attention", (False, True))
@pytest.mark.parametrize("method", ("e", "i", "r"))
def test_keys(method: str, attention: bool) -> None:
    """Those of the authors' checkpoints: the steps of all periods are numbered through."""
    steps, stages = (2, 1), (2, 3)
    model = on_meta(f"rkcnn-{method}-2_3", steps=steps, attention=attention)
    expected = {"fir_trans.weight", "fc.weight", "fc.bias", "list_trans.0.conv.weight"}
    expected |= {f"{norm}.{key}" for norm in ("list_trans.0.bn", "list_gb.0.bn", "list_gb.1.bn") for key in NORM}
    for n, s in enumerate((stages[0], stages[0], stages[1])):
        parts = INIT | (UPDATE if method != "e" else {})
        expected |= {
            f"list_block.{n}.{part}.{j}.{key}" for part, keys in parts.items() for j in range(s) for key in keys
        }
    if attention:
        expected |= {f"list_trans.0.attention.fc{i}.{key}" for i in (1, 2) for key in ("weight", "bias")}
    assert set(model.state_dict()) == expected


def test_options() -> None:
    model = on_meta("rkcnn-r-2_3", steps=(1, 2), rounds=(2, 3))
    assert [step.rounds for step in model.list_block] == [2, 3, 3]
    assert [step.stages for step in model.list_block] == [2, 3, 3]
    assert [info["module"] for info in model.feature_info] == ["list_block.0", "list_block.2"]


def closed_form(method: str, stages: tuple[int, ...], k: int, width: int) -> int:
    periods = len(stages)
    total = 27 * k + (periods - 1) * (k * k + 2 * k) + 2 * k * periods + 10 * k * periods + 10
    for s in stages:
        for read in range(1, s + 1):
            total += 2 * read * k + read * k * width + 2 * width + 9 * width * k
        if method != "e":
            total += s * (2 * s * k + s * k * width + 2 * width + 9 * width * k)
    return total


@pytest.mark.parametrize(("k", "neck"), ((36, 1), (80, 1), (12, 4)))
@pytest.mark.parametrize("method", ("e", "i", "r"))
def test_parameters(method: str, k: int, neck: int) -> None:
    expected = closed_form(method, (5, 4, 3), k, neck * k)
    assert parameters(f"rkcnn-{method}-5_4_3", growth_rate=k, neck=neck) == expected
    assert parameters(f"RKCNN-{method.upper()}-5_4_3", growth_rate=k, neck=neck) == expected


SMALL: list[tuple[str, dict[str, Any]]] = [
    ("rkcnn-e-2_3", {"growth_rate": 4}),
    ("rkcnn-i-2_3", {"growth_rate": 4, "attention": True, "steps": (1, 2)}),
    ("rkcnn-r-3_2", {"growth_rate": (4, 6), "neck": 2, "multiscale": False}),
    ("rkcnn-r-2_2", {"growth_rate": 4, "rounds": (2, 1)}),
]


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_fused_equals_stock(name: str, options: dict[str, Any]) -> None:
    check_fused(name, **options)


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_interface(name: str, options: dict[str, Any]) -> None:
    check_interface(name, **options)


def test_checkpointing() -> None:
    check_checkpointing("rkcnn-i-3_3", growth_rate=4)


@pytest.mark.parametrize(("method", "dropouts"), (("e", 2 * 5 + 1), ("i", 4 * 5 + 1), ("r", 4 * 5 + 1)))
def test_dropout(method: str, dropouts: int) -> None:
    check_dropout(f"rkcnn-{method}-2_3", dropouts, growth_rate=4)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    (
        ("rkcnn-5_5_5", {}, ValueError, "name: 'rkcnn-5_5_5' is not a model; expected rkcnn-<e|i|r>-<stages>_<stages>"),
        ("rkcnn-x-5_5_5", {}, ValueError, "is not a model"),
        ("rkcnn-ei-5_5_5", {}, ValueError, "is not a model"),
        ("rkcnn-i-5_5_5-a", {}, ValueError, "is not a model"),
        ("rkcnn-i-5__5", {}, ValueError, "is not a model"),
        ("rkcnn-i-5_1", {}, ValueError, "name: stages of period 2: expected 2 to 256, got 1"),
        ("rkcnn-e-5_0", {}, ValueError, "name: stages of period 2: expected 1 to 256, got 0"),
        ("rkcnn-e-" + "_".join("123456789"), {}, ValueError, "name: the number of periods: expected 1 to 8, got 9"),
        ("rkcnn-i-200_200", {"steps": 200}, ValueError, "name: stages, steps and rounds come to 160000 layers"),
        ("rkcnn-i-5_5", {"steps": (1, 2, 3)}, ValueError, "steps: 3 values for 2 periods"),
        ("rkcnn-i-5_5", {"steps": 0}, ValueError, "steps: expected 1 to 256, got 0"),
        ("rkcnn-i-5_5", {"rounds": 65}, ValueError, "rounds: expected 1 to 64, got 65"),
        ("rkcnn-e-5_5", {"rounds": 2}, ValueError, "rounds: RKCNN-E has no updates"),
        ("rkcnn-i-5_5", {"growth_rate": -1}, ValueError, "growth_rate: expected 1 to 4096, got -1"),
        ("rkcnn-i-5_5", {"growth_rate": (4, 4.0)}, TypeError, r"growth_rate\[1\]: expected an int, got 4.0"),
        ("rkcnn-i-5_5", {"neck": 0}, ValueError, "neck: expected 1 to 16, got 0"),
        ("rkcnn-i-5_5", {"attention": "a"}, TypeError, "attention: expected a bool, got 'a'"),
        ("rkcnn-i-5_5", {"multiscale": None}, TypeError, "multiscale: expected a bool, got None"),
        ("rkcnn-i-5_5", {"drop_rate": 2}, ValueError, r"drop_rate: expected a number in \[0, 1\), got 2"),
        ("rkcnn-i-5_5", {"method": "e"}, TypeError, "method: not an option of rkcnn; supported are growth_rate, steps"),
    ),
)
def test_bad_arguments(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with torch.device("meta"), pytest.raises(error, match=message) as caught:
        rkfast.create_model(name, **options)
    assert len(str(caught.value)) < 400
