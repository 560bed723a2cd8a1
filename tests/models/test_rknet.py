"""ERKNet, IRKNet and RKNet: the rows of the paper's tables, training as in stock PyTorch, and the options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rkfast
from rkfast import papers
from rkfast.nn import ERKStep, IRKStep, NormPool, TimePeriod, Transition
from rkfast.ops import Moments
from tests.models.tester import (
    check_checkpointing,
    check_dropout,
    check_fused,
    check_interface,
    check_row,
    on_meta,
    parameters,
)

# Of each row of the tables.
EXACT = [
    *(744_382, 826_534, 908_686, 990_838, 322_534, 404_902, 487_270, 569_638),
    *(1_396_810, 4_368_010, 4_866_010, 6_276_490, 6_994_810, 8_628_010, 12_408_010),
    *(6_947_048, 14_485_992, 25_513_960),
]


def closed_form(method: str, stages: list[int], k: int, suffix: str) -> int:
    """Parameters of a CIFAR network with m = 1, even k and 10 classes."""
    total = 27 * k + 2 * (k * k + 2 * k) + 6 * k + 30 * k + 10
    if "a" in suffix:
        total += 2 * (k * k + 3 * k // 2)
    for s in stages:
        dense = s * (s + 1) // 2
        if method == "erk":
            total += 9 * k * k * dense + 2 * k * dense
        elif "b" in suffix:
            total += k * k * s * s + 9 * k * k * s + 2 * k * (dense + s * (s - 1) + 2 * s)
        else:
            total += 9 * k * k * s * s + 2 * k * (dense + s * (s - 1))
    return total


@pytest.mark.parametrize(("row", "exact"), list(zip(papers.RKNET, EXACT, strict=True)))
def test_tables(row: papers.Row, exact: int) -> None:
    imagenet = "imagenet" in row.errors
    assert row.millions is not None and row.billions is not None
    assert check_row(row, 224 if imagenet else 32) == exact
    if not imagenet:
        family, periods, *suffix = row.model.split("-")
        stages = [int(term.split("x")[0]) for term in periods.split("_")]
        assert exact == closed_form(family[:3], stages, row.options.get("growth_rate", 36), "".join(suffix))


def test_every_row_is_listed() -> None:
    assert {row.model for row in papers.RKNET} <= set(rkfast.list_models())


@pytest.mark.parametrize(("neck", "plain", "timed"), ((1, 215_530, 216_238), (None, 745_018, 747_814)))
def test_parameters_of_appendix_c(neck: int | None, plain: int, timed: int) -> None:
    options: dict[str, Any] = {"growth_rate": 12, "m": (2, 9, 12), "neck": neck}
    assert parameters("rknet-1x8_1x2_1x2-b", **options) == plain
    assert parameters("rknet-1x8_1x2_1x2-b", **options, time_channel=True) == timed


SMALL: list[tuple[str, dict[str, Any]]] = [
    ("erknet-2x1_3x2", {"growth_rate": 4}),
    ("erknet-2x1_1x2-b", {"growth_rate": 4, "m": (1, 3)}),
    ("erknet-2x1_1x1-b", {"growth_rate": 4, "m": (2, 4), "stem": "imagenet"}),
    ("irknet-2x1_3x2", {"growth_rate": 4}),
    ("irknet-3x1_2x1-ab", {"growth_rate": 4, "rounds": 2}),
    ("rknet-3x2_4x1_2x1-a", {"growth_rate": (4, 6, 4), "methods": ("erk", "irk", "erk"), "m": (1, 1, 2)}),
    ("rknet-1x3_1x2-b", {"growth_rate": 4, "m": (2, 3), "time_channel": True}),
    ("rknet-1x2_1x2", {"growth_rate": 4, "time_channel": True, "multiscale": False}),
]


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_fused_equals_stock(name: str, options: dict[str, Any]) -> None:
    check_fused(name, size=32 if "stem" in options else 9, **options)


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_interface(name: str, options: dict[str, Any]) -> None:
    check_interface(name, **options)


@pytest.mark.parametrize(("name", "options"), SMALL[1:5:2])
def test_checkpointing(name: str, options: dict[str, Any]) -> None:
    check_checkpointing(name, **options)


@pytest.mark.parametrize(
    ("name", "dropouts"),
    (
        ("erknet-2x1_3x2", 2 + 6 + 1),
        ("erknet-2x1_3x2-b", 2 * (2 + 6) + 1),
        ("irknet-2x1_3x1", 2 * (2 + 3) + 1),
        ("irknet-2x1_3x1-ab", 4 * (2 + 3) + 1),
    ),
)
def test_dropout(name: str, dropouts: int) -> None:
    check_dropout(name, dropouts, growth_rate=4)


def test_structure() -> None:
    """Section 3.2's example of the notation."""
    methods = ("erk", "irk", "irk", "erk")
    model = on_meta("rknet-3x2_4x1_2x5_1x1", methods=methods, growth_rate=4)
    kinds = [ERKStep if method == "erk" else IRKStep for method in methods]
    assert [[type(step) for step in period] for period in model.periods] == [
        [kind] * steps for kind, steps in zip(kinds, (2, 1, 5, 1), strict=True)
    ]
    assert [{step.stages for step in period} for period in model.periods] == [{3}, {4}, {2}, {1}]
    assert len(model.transitions) == 3
    # Every step has weights of its own.
    assert len({id(p) for p in model.parameters()}) == sum(1 for _ in model.parameters())


def test_initialisation() -> None:
    """He-normal (fan-in) convolutions, Xavier-uniform linear layers without bias, BatchNorm as the authors set it."""
    torch.manual_seed(0)
    model = rkfast.create_model("erknet-3x1_3x1-ab", growth_rate=32, num_classes=100)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.15)
            assert module.weight.abs().max() > 2.5 * (2 / fan_in) ** 0.5  # no uniform distribution reaches so far
        elif isinstance(module, nn.Linear):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert module.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
            assert not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.eps, module.momentum) == (1e-3, 0.01)


def test_time_channel() -> None:
    model = rkfast.create_model("rknet-1x3_1x2", growth_rate=4, time_channel=True)
    assert model.step_sizes() == [[1.0] * 3, [1.0] * 2]
    assert model.no_weight_decay() == {
        f"periods.{t}.{n}.sqrt_step" for t, n in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
    }
    with torch.no_grad():
        for n, step in enumerate(model.periods[0]):
            step.sqrt_step.fill_((0.5, 1e-41, -2.0)[n])
    sizes = model.step_sizes()[0]
    assert sizes[0] == 0.25 and sizes[2] == 4.0
    assert 0 < sizes[1] < 1e-81  # not lost to float32, like the smallest of Table 4
    assert model.times()[0] == pytest.approx([0, 0.25, 0.25, 4.25])
    assert all(isinstance(period, TimePeriod) for period in model.periods)
    with pytest.raises(RuntimeError, match="the model has no time channel"):
        rkfast.create_model("rknet-1x3", growth_rate=4).step_sizes()
    assert on_meta("rknet-1x3").no_weight_decay() == set()


def test_multiscale() -> None:
    """On with the CIFAR stem, off with ImageNet's, unless said otherwise."""
    assert on_meta("erknet-1x1_1x1").num_features == 72
    assert on_meta("erknet-1x1_1x1", multiscale=False).num_features == 36
    assert on_meta("erknet-1x1_1x1", stem="imagenet").num_features == 36
    assert on_meta("erknet-1x1_1x1", stem="imagenet", multiscale=True).num_features == 72


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_moments_come_from_the_sums(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transitions and head take the moments that the step's sum leaves, in training."""
    model = rkfast.create_model("erknet-2x1_2x1", growth_rate=4).train(training)
    given: list[bool] = []
    for cls in (Transition, NormPool):
        # A hook, or a forward on the instance, would keep the moments away.
        def forward(self: Any, y: Tensor, moments: Moments | None = None, right: Any = cls.forward) -> Tensor:
            given.append(moments is not None)
            return right(self, y, moments)

        monkeypatch.setattr(cls, "forward", forward)
    model(torch.randn(2, 3, 16, 16))
    assert given == [training] * 3


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    (
        (
            "erknet",
            {},
            ValueError,
            "name: 'erknet' is not a model; expected erknet-<stages>x<steps>_.*such as erknet-6x1",
        ),
        ("erknet-3", {}, ValueError, "name: 'erknet-3' is not a model"),
        ("erknet-3x1_", {}, ValueError, "is not a model"),
        ("erknet-3x1-ba", {}, ValueError, "is not a model"),
        ("erknet-3x1-aa", {}, ValueError, "is not a model"),
        ("erknet-3x1_3x1-c", {}, ValueError, "is not a model"),
        ("erknet-3x1__3x1", {}, ValueError, "is not a model"),
        ("erknet-3x10000", {}, ValueError, "is not a model"),
        ("erknet-3x1\n", {}, ValueError, "is not a model"),
        ("erknet-３x1", {}, ValueError, "is not a model"),
        ("erknet-" + "_".join(["1x1"] * 9), {}, ValueError, "name: the number of periods: expected 1 to 8, got 9"),
        ("erknet-" + "_".join(["1x1"] * 90), {}, ValueError, "is not a model"),
        ("erknet-3x1_0x1", {}, ValueError, "name: stages of period 2: expected 1 to 256, got 0"),
        ("erknet-3x1_3x0", {}, ValueError, "name: steps of period 2: expected 1 to 256, got 0"),
        ("erknet-257x1", {}, ValueError, "name: stages of period 1: expected 1 to 256, got 257"),
        ("erknet-200x200", {}, ValueError, "name: stages, steps and m come to 40000 layers; expected at most 2050"),
        ("irknet-40x40", {}, ValueError, "name: stages, steps and m come to 3200 layers"),
        ("irknet-3x1_1x1", {}, ValueError, "name: an irk period has at least 2 stages, but period 2 has 1"),
        ("irknet-3x1", {"m": 2}, TypeError, "m: not an option of irknet; supported are growth_rate, stem"),
        ("irknet-3x1", {"methods": "erk"}, TypeError, "methods: not an option of irknet"),
        ("irknet-3x1", {"rounds": 0}, ValueError, "rounds: expected 1 to 64, got 0"),
        ("erknet-3x1", {"rounds": 2}, TypeError, "rounds: not an option of erknet"),
        ("erknet-3x1", {"periods": "3x1"}, TypeError, "periods: not an option of erknet"),
        ("erknet-3x1_3x1", {"m": (1, 2, 3)}, ValueError, "m: 3 values for 2 periods; give one for all, or one per"),
        ("erknet-3x1_3x1", {"m": (1, 0)}, ValueError, r"m\[1\]: expected 1 to 2050, got 0"),
        ("erknet-3x1_3x1", {"m": "12"}, TypeError, "m: expected an int, or one per period, got '12'"),
        ("erknet-3x1_3x1", {"m": 2000}, ValueError, "name: stages, steps and m come to 12000 layers"),
        ("erknet-3x1", {"growth_rate": 0}, ValueError, "growth_rate: expected 1 to 4096, got 0"),
        ("erknet-3x1", {"growth_rate": 12.0}, TypeError, "growth_rate: expected an int, or one per period, got 12.0"),
        ("erknet-3x1", {"growth_rate": True}, TypeError, "growth_rate: expected an int, got True"),
        ("erknet-3x1", {"stem": "svhn"}, ValueError, "stem: 'svhn' is not supported; expected cifar or imagenet"),
        ("erknet-3x1", {"stem": 3}, TypeError, "stem: expected a str, got 3"),
        ("erknet-3x1", {"neck": 4}, ValueError, "neck: the width of a bottleneck, which goes with .* -b or -ab"),
        ("erknet-3x1-b", {"neck": 17}, ValueError, "neck: expected 1 to 16, got 17"),
        ("erknet-3x1", {"drop_rate": 1.0}, ValueError, r"drop_rate: expected a number in \[0, 1\), got 1.0"),
        ("erknet-3x1", {"drop_rate": "0.2"}, TypeError, "drop_rate: expected a number, got '0.2'"),
        ("erknet-3x1", {"drop_rate": float("nan")}, ValueError, "drop_rate: expected a number in .* got nan"),
        ("erknet-3x1", {"multiscale": 1}, TypeError, "multiscale: expected a bool, got 1"),
        ("erknet-3x1", {"num_classes": 0}, ValueError, "num_classes: expected 1 to 1000000, got 0"),
        ("erknet-3x1", {"in_chans": 0}, ValueError, "in_chans: expected 1 to 4096, got 0"),
        ("erknet-3x1", {"fused": "no"}, TypeError, "fused: expected a bool, got 'no'"),
        ("erknet-3x1", {"time_channel": True}, ValueError, "time_channel: .* 1 stage, but period 1 is erk with 3"),
        ("erknet-1x1", {"time_channel": 1}, TypeError, "time_channel: expected a bool, got 1"),
        ("rknet-3x1_3x1", {"methods": ("erk",)}, ValueError, "methods: 1 values for 2 periods"),
        (
            "rknet-3x1_3x1",
            {"methods": ("erk", "rk4")},
            ValueError,
            "methods: 'rk4' is not supported; expected erk or irk",
        ),
        ("rknet-3x1_3x1", {"methods": 3}, TypeError, "methods: expected a str, or one per period, got 3"),
        (
            "rknet-3x1_3x1",
            {"methods": ("irk", "erk"), "m": (2, 2)},
            ValueError,
            "m: expected 1 in an irk period, got 2",
        ),
    ),
)
def test_bad_arguments(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with torch.device("meta"), pytest.raises(error, match=message) as caught:
        rkfast.create_model(name, **options)
    assert len(str(caught.value)) < 400


def test_upper_case() -> None:
    assert parameters("ERKNet-6x1_6x1_6x1") == parameters("erknet-6x1_6x1_6x1")
    assert parameters("IRKNet-5x1_5x1_5x1-AB") == parameters("irknet-5x1_5x1_5x1-ab")


@pytest.mark.parametrize(("name", "options"), (SMALL[0], SMALL[3], SMALL[6]))
def test_compile(name: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = rkfast.create_model(name, **options)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(compiled, model(x), rtol=1e-4, atol=1e-5)
