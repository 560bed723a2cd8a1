"""CliqueNet: the paper's parameters and FLOPs, training as in stock PyTorch, and the options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rkfast
from rkfast import papers
from tests.models.tester import (
    check_checkpointing,
    check_dropout,
    check_fused,
    check_interface,
    check_row,
    on_meta,
    parameters,
)

EXACT = (935_994, 4_485_706, 6_937_546, 10_135_594, 10_480_938)


@pytest.mark.parametrize(("row", "exact"), list(zip(papers.CLIQUENET, EXACT, strict=True)))
def test_tables(row: papers.Row, exact: int) -> None:
    assert row.millions is not None and row.billions is not None
    assert check_row(row) == exact


def test_names() -> None:
    assert parameters("cliquenet") == parameters("cliquenet-15")
    assert parameters("cliquenet-ab") == parameters("cliquenet-30-ab")
    model = on_meta("cliquenet-18-c")
    assert [block.stages for block in model.blocks] == [6, 6, 6]
    assert len(model.compressions) == 3
    assert all(transition.attention is None for transition in model.transitions)
    assert len(on_meta("cliquenet-15-a").compressions) == 0
    assert all(transition.attention is not None for transition in on_meta("cliquenet-15-a").transitions)


def test_blocks_give_their_input_and_stage_two() -> None:
    torch.manual_seed(0)
    model = rkfast.create_model("cliquenet-6", growth_rate=4, init_channels=6).eval()
    x = torch.randn(2, 3, 8, 8)
    y = model.stem(x)
    for t, feature in enumerate(model.forward_features(x)):
        z = model.blocks[t](y)
        torch.testing.assert_close(feature, torch.cat([y, z], 1))
        if t < 2:
            y = model.transitions[t](z)


SMALL: list[tuple[str, dict[str, Any]]] = [
    ("cliquenet-6", {"growth_rate": 4, "init_channels": 6}),
    # Of few channels: oneDNN's channels_last convolutions, which ours are, add all products in one chain. With 64
    # channels they are as far from float64 as eager channels_last, and 1.5 times as far as eager contiguous.
    ("cliquenet-9-c", {"growth_rate": 4, "init_channels": 6, "transition_channels": 5}),
    ("cliquenet-12-abc", {"growth_rate": 4, "init_channels": 6}),
]


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_fused_equals_stock(name: str, options: dict[str, Any]) -> None:
    check_fused(name, **options)


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_interface(name: str, options: dict[str, Any]) -> None:
    check_interface(name, **options)


def test_checkpointing() -> None:
    check_checkpointing("cliquenet-9", growth_rate=8, init_channels=4)


def test_dropout() -> None:
    check_dropout("cliquenet-6", 2 * 6 + 2, growth_rate=4)
    check_dropout("cliquenet-12-abc", 4 * 6 + 2 + 3, growth_rate=4)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    (
        ("cliquenet-x", {}, ValueError, r"name: 'cliquenet-x' is not a model; expected cliquenet\[-<T>\]"),
        ("cliquenet-15-ba", {}, ValueError, "is not a model"),
        ("cliquenet-15-", {}, ValueError, "is not a model"),
        ("cliquenet15", {}, ValueError, "is not a model"),
        ("cliquenet-16", {}, ValueError, "name: T counts the convolutions of 3 equal blocks; 16 is no multiple of 3"),
        ("cliquenet-15-b", {}, ValueError, "name: T counts .* 15 is no multiple of 6"),
        ("cliquenet-3", {}, ValueError, "name: T: expected 6 to 1025, got 3"),
        ("cliquenet-6-b", {}, ValueError, "name: T: expected 12 to 1025, got 6"),
        ("cliquenet-999999", {}, ValueError, "name: T: expected 6 to 1025, got 999999"),
        ("cliquenet-15", {"growth_rate": 0}, ValueError, "growth_rate: expected 1 to 4096, got 0"),
        ("cliquenet-15", {"growth_rate": (1, 2, 3)}, TypeError, "growth_rate: expected an int, got"),
        ("cliquenet-15", {"init_channels": 5000}, ValueError, "init_channels: expected 1 to 4096, got 5000"),
        ("cliquenet-15", {"transition_channels": 0}, ValueError, "transition_channels: expected 1 to 4096, got 0"),
        ("cliquenet-15", {"num_classes": None}, TypeError, "num_classes: expected an int, got None"),
        ("cliquenet-15", {"in_chans": 0}, ValueError, "in_chans: expected 1 to 4096, got 0"),
        ("cliquenet-15", {"drop_rate": 1}, ValueError, r"drop_rate: expected a number in \[0, 1\), got 1"),
        ("cliquenet-15", {"T": 15}, TypeError, "T: not an option of cliquenet; supported are growth_rate, init"),
    ),
)
def test_bad_arguments(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with torch.device("meta"), pytest.raises(error, match=message) as caught:
        rkfast.create_model(name, **options)
    assert len(str(caught.value)) < 400
