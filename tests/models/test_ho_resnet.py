"""HO-ResNet: the paper's tables and section 3.8, names and options, and training as in stock PyTorch."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import rkfast
from rkfast import papers, tableau
from tests.models.tester import check_checkpointing, check_fused, check_interface
from tests.ops.tester import assert_as_good_as

# layers: (branches, stem + convolutions + linear, the same with BatchNorm)
COUNTS = {
    10: (4, 297_290, 298_442),
    18: (8, 592_202, 594_378),
    26: (12, 887_114, 890_314),
    30: (14, 1_034_570, 1_038_282),
    34: (16, 1_182_026, 1_186_250),
    58: (28, 2_066_762, 2_074_058),
}
PUBLISHED = {10: "0.3", 18: "0.59", 26: "0.89", 30: "1.03", 34: "1.18", 58: "2.07"}  # millions, BatchNorm not counted
STAGES = {"euler": 1, "midpoint": 2, "rk4": 4, "rk8": 14}


def test_names() -> None:
    names = [name for name in rkfast.list_models() if name.startswith("ho_resnet")]
    assert names == [f"ho_resnet-{layers}" for layers in COUNTS]


@pytest.mark.parametrize("method", STAGES)
@pytest.mark.parametrize("layers", COUNTS)
def test_parameters(layers: int, method: str) -> None:
    branches, without_norms, with_norms = COUNTS[layers]
    if branches % STAGES[method]:
        with pytest.raises(ValueError, match=rf"layers: {layers} does not fit {method}, which has {STAGES[method]} .*"):
            rkfast.create_model(f"ho_resnet-{layers}", method=method)
        return
    with torch.device("meta"):
        model = rkfast.create_model(f"ho_resnet-{layers}", method=method)
    assert sum(p.numel() for p in model.parameters()) == with_norms
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert with_norms - sum(p.numel() for m in norms for p in m.parameters()) == without_norms
    digits = len(PUBLISHED[layers].split(".")[1])
    assert f"{without_norms / 1e6:.{digits}f}" == PUBLISHED[layers]
    assert sum(isinstance(m, rkfast.nn.PreActBranch) for m in model.modules()) == branches
    assert sum(isinstance(m, rkfast.nn.RKStep) for m in model.modules()) == branches // STAGES[method]
    # As printed: "Euler X4", "RK8 X2".
    assert len(model.period) == branches // STAGES[method]


@pytest.mark.parametrize("row", papers.HO_RESNET, ids=lambda row: f"{row.model}-{row.options}")
def test_every_row_of_the_tables(row: papers.Row) -> None:
    """Two 3x3 convolutions of 64 channels per branch, whatever their order; BatchNorm is not counted."""
    model = papers.on_meta(row.model, **row.options)
    layers = int(row.model.partition("-")[2])
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    assert weights + model.fc.out_features == COUNTS[layers][1]
    assert row.millions in (PUBLISHED[layers], None)
    step = model.period[0]
    assert step.tableau.name == {"rk8": "verner8"}.get(row.options["method"], row.options["method"])
    assert step.step == row.options.get("factor", 1.0)
    nested = 0
    while isinstance(step.branches[0], rkfast.nn.RKStep):
        nested, step = nested + 1, step.branches[0]
    assert nested == row.options.get("nested", 0)


def test_the_tables_as_the_paper_counts_blocks() -> None:
    """Table 2's "RK8 X1", Table 3's "Nest-Midpoint x8 twice": 2 x 2 x 2 midpoint steps."""
    steps = [len(papers.on_meta(row.model, **row.options).period) for row in papers.HO_RESNET]
    assert steps == [4, 2, 1, 8, 4, 2, 14, 1, 3, 1, 28, 14, 7, 2] + [4, 2, 8, 4, 2] + [1] * 5
    factors = {row.options.get("factor", 1.0): row.errors["cifar10"] for row in papers.HO_RESNET_TABLE_4}
    assert factors == {1.0: 6.61, 1.2: 6.44, 2.0: 5.83, 2.5: 5.91, 3.0: 6.33}
    twice = [row for row in papers.HO_RESNET_TABLE_2 if (row.model, row.options["method"]) == ("ho_resnet-30", "rk8")]
    assert [row.options.get("factor", 1.0) for row in twice] == [1.0, 2.0]
    assert all(row.errors["cifar10"] == factors[row.options.get("factor", 1.0)] for row in twice)


def test_costs_are_those_of_section_3_8() -> None:
    cost = {name: papers.step_cost(tableau.get(name)) for name in ("euler", "midpoint", "rk4", "verner8", "verner89")}
    assert [c.shortcuts for c in cost.values()] == [1, 1, 2, 15, 17]
    assert [cost[name].operations for name in ("euler", "midpoint", "rk4")] == [0, Fraction(1, 4), Fraction(9, 8)]
    # One product and one sum for each coefficient, less the 14 sums of Euler's steps, over 28 layers.
    a, b = tableau.get("verner8").floats()
    terms = sum(v != 0 for row in (*a, b) for v in row)
    assert cost["verner8"].operations == Fraction(2 * terms - 14, 28)


def test_58_layers_have_the_paper_s_operations() -> None:
    """Section 3.8's sum over layers of M^2 K^2 C C', at 32 x 32: 2.12e9 whatever the method."""
    expected = 32 * 32 * 9 * (3 * 64 + 56 * 64 * 64) + 64 * 10
    for method in STAGES:
        model = papers.on_meta("ho_resnet-58", method=method)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 32, 32, device="meta"))
        assert counter.get_total_flops() == 2 * expected
    assert f"{expected / 1e9:.2f}" == "2.12"


def test_keys() -> None:
    fused, stock = (rkfast.create_model("ho_resnet-10", width=4, fused=fused) for fused in (True, False))
    assert list(fused.state_dict()) == list(stock.state_dict())
    keys = {k for k in fused.state_dict() if not k.startswith("period.") or k.startswith("period.0.branches.0.")}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert keys == {
        "stem.weight",
        "fc.weight",
        "fc.bias",
        *(f"norm.{k}" for k in norm),
        *(f"period.0.branches.0.norm{i}.{k}" for i in (1, 2) for k in norm),
        *(f"period.0.branches.0.conv{i}.weight" for i in (1, 2)),
    }
    stock.load_state_dict(fused.state_dict())


def seen(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    out = model(x)
    F.cross_entropy(out, torch.arange(len(x)) % 10).backward()
    assert x.grad is not None
    found = {"out": out.detach(), "x.grad": x.grad}
    found |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers()}


def models(method: str, channels_last: bool) -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    layers = max(10, 2 + 2 * STAGES[method])
    fused = rkfast.create_model(f"ho_resnet-{layers}", method=method, width=8, step=0.5)
    stock = rkfast.create_model(f"ho_resnet-{layers}", method=method, width=8, step=0.5, fused=False)
    stock.load_state_dict(fused.state_dict())
    truth = copy.deepcopy(stock).double()
    if channels_last:
        fused, stock = (m.to(memory_format=torch.channels_last) for m in (fused, stock))  # type: ignore[call-overload]
    return fused, stock, truth


def compare(ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert ours.keys() == eager.keys() == truth.keys()
    for name, expected in truth.items():
        if expected.is_floating_point():
            assert_as_good_as(ours[name], eager[name], expected, name)
        else:
            assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("method", STAGES)
def test_fused_equals_stock(method: str, channels_last: bool) -> None:
    fused, stock, truth = models(method, channels_last)
    x = torch.randn(6, 3, 12, 12)
    compare(seen(fused, x), seen(stock, x), seen(truth, x.double()))


@pytest.mark.parametrize("method", STAGES)
def test_fused_equals_stock_after_training(method: str) -> None:
    """Parameters, statistics and the output in eval mode after a few steps, small enough for rounding not to grow."""
    trained = models(method, channels_last=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9, nesterov=True) for m in trained]
    for i in range(4):
        x = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(i))
        for model, optimizer in zip(trained, optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(next(model.parameters()).dtype)), torch.arange(6)).backward()
            optimizer.step()
    fused, stock, truth = trained
    compare(fused.state_dict(), stock.state_dict(), truth.state_dict())
    assert fused.state_dict()["norm.num_batches_tracked"] == 4
    x = torch.randn(6, 3, 12, 12)
    compare(*(seen(m.eval(), x.to(next(m.parameters()).dtype)) for m in trained))


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_compile(training: bool) -> None:
    torch._dynamo.reset()
    model, *_ = models("rk4", channels_last=True)
    model.train(training)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, 12, 12)
    ours = {name.removeprefix("_orig_mod."): value for name, value in seen(compiled, x).items()}
    torch.testing.assert_close(ours, seen(model, x), rtol=1e-4, atol=1e-5)


def test_export() -> None:
    model = models("midpoint", channels_last=False)[0].eval()
    x = torch.randn(2, 3, 12, 12)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def test_interface() -> None:
    check_interface("ho_resnet-10", width=4)
    check_interface("ho_resnet-18", width=4, method="midpoint", nested=1, factor=0.5)
    check_checkpointing("ho_resnet-18", width=4)
    check_checkpointing("ho_resnet-18", width=4, nested=1, method="midpoint", variant="authors")


@pytest.mark.parametrize(
    ("layers", "options"),
    (
        (18, {"method": "midpoint", "nested": 1, "step": 0.5}),
        (18, {"method": "rk4", "variant": "authors"}),
        (10, {"method": "rk4", "variant": "paper"}),
        (30, {"method": "rk8", "factor": 0.1}),
        (16, {"method": "dopri5", "tol": 0.1}),
        (10, {"method": "rk4", "learn": ("h",), "per_channel": True}),
    ),
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_options_fused_equal_stock(layers: int, options: dict[str, Any]) -> None:
    check_fused(f"ho_resnet-{layers}", width=6, **options)


def test_a_factor_scales_every_step() -> None:
    torch.manual_seed(0)
    model = rkfast.create_model("ho_resnet-18", method="midpoint", nested=1, width=4, step=0.5, factor=1.5)
    twin = rkfast.create_model("ho_resnet-18", method="midpoint", nested=1, width=4, step=0.75)
    steps = [m for m in model.modules() if isinstance(m, rkfast.nn.RKStep)]
    assert [m.step for m in steps] == 6 * [0.75]
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), twin(x))
    keys = list(model.state_dict())
    for factor in (2, 0.004, 0.0):  # section 4.6 decays it from 2 to 0
        model.set_factor(factor)
        assert [m.step for m in steps] == 6 * [0.5 * factor]
        assert torch.isfinite(model(x)).all()
        expected = rkfast.create_model("ho_resnet-18", method="midpoint", nested=1, width=4, step=0.5 * factor or 1e-30)
        expected.load_state_dict(model.state_dict())
        torch.testing.assert_close(model.eval()(x), expected.eval()(x))
        model.train()
    assert list(model.state_dict()) == keys


def test_a_factor_that_cannot_be_set_changes_nothing() -> None:
    model = rkfast.create_model("ho_resnet-18", width=4)
    for factor, error in ((float("inf"), ValueError), ("2", TypeError), (True, TypeError)):
        with pytest.raises(error, match="factor: expected a number"):
            model.set_factor(factor)
    assert {m.step for m in model.period} == {1.0} and model.period[0].h is None
    with pytest.raises(ValueError, match="set_step: h is learned"):
        rkfast.create_model("ho_resnet-18", width=4, learn=("h",)).set_factor(2)


def test_a_step_size_for_each_channel() -> None:
    model = rkfast.create_model("ho_resnet-10", width=4, learn=("h",), per_channel=True, factor=0.5)
    assert torch.equal(model.period[0].learned["h"], torch.full((4,), 0.5))
    assert model.no_weight_decay() == {"period.0.learned.h"}


def test_learned_coefficients() -> None:
    model = rkfast.create_model("ho_resnet-10", width=4, learn=("a", "b", "h"))
    assert model.no_weight_decay() == {f"period.0.learned.{name}" for name in "abh"}
    plain = rkfast.create_model("ho_resnet-10", width=4)
    assert plain.no_weight_decay() == set()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "learned" not in k})
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model(x), plain(x))


def test_hooks_and_replaced_modules() -> None:
    """Whoever listens to a module or puts another in its place gets what he asked for."""
    model, _, _ = models("midpoint", channels_last=False)
    x, heard = torch.randn(6, 3, 12, 12), []
    expected = copy.deepcopy(model)(x)
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: heard.append(name))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    silent = {n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    assert set(heard) == {n for n, _ in model.named_modules()} - silent


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    (
        ("ho_resnet", {}, ValueError, "name: 'ho_resnet' is not a model"),
        ("ho_resnet-18-x", {}, ValueError, "is not a model"),
        ("ho_resnet-１８", {}, ValueError, "is not a model"),
        ("ho_resnet-18\n", {}, ValueError, "is not a model"),
        ("net-18", {}, ValueError, "name: 'net-18' .* one of the families ho_resnet, .* such as ho_resnet-10"),
        ("x" * 10_000, {}, ValueError, "is not a model"),
        (18, {}, TypeError, "name: expected a str, got int"),
        ("ho_resnet-11", {}, ValueError, "layers: 11 does not fit rk4"),
        ("ho_resnet-12", {}, ValueError, "layers: 12 does not fit rk4, which has 4 branches .*, such as 10 or 34"),
        ("ho_resnet-0", {}, ValueError, "layers: expected 4 to 2050, got 0"),
        ("ho_resnet-2", {"method": "euler"}, ValueError, "layers: expected 4 to 2050, got 2"),
        ("ho_resnet-999999", {}, ValueError, "layers: expected 4 to 2050, got 999999"),
        ("ho_resnet-18", {"method": "rk5"}, ValueError, "method: 'rk5' is not"),
        ("ho_resnet-18", {"method": "rk5"}, ValueError, "expected .*midpoint or .* rk4 or .*verner89 or rk8"),
        ("ho_resnet-18", {"method": "rk8"}, ValueError, "layers: 18 does not fit rk8, which has 14 .*, such as 30"),
        ("ho_resnet-26", {"method": "midpoint", "nested": 2}, ValueError, "layers: 26 does not fit midpoint nested 2"),
        ("ho_resnet-18", {"nested": -1}, ValueError, "nested: expected 0 to 8, got -1"),
        ("ho_resnet-18", {"nested": 1.0}, TypeError, "nested: expected an int, got 1.0"),
        ("ho_resnet-18", {"factor": 0}, ValueError, r"factor: expected a number in \(0, 16\], got 0"),
        ("ho_resnet-18", {"factor": 2, "variant": "paper"}, ValueError, 'equations of "paper" have no step size'),
        ("ho_resnet-30", {"method": "rk8", "variant": "paper"}, ValueError, "none for verner8"),
        ("ho_resnet-18", {"variant": "code"}, ValueError, "variant: 'code' is not supported"),
        ("ho_resnet-18", {"tol": 1e-3}, ValueError, "tol: rk4 has no embedded weights"),
        ("ho_resnet-18", {"per_channel": True}, ValueError, 'per_channel: .* put "h" into learn'),
        ("ho_resnet-18", {"method": ["rk4"]}, TypeError, "method: expected a str"),
        ("ho_resnet-18", {"width": 0}, ValueError, "width: expected 1 to 4096, got 0"),
        ("ho_resnet-18", {"width": 10**9}, ValueError, "width: expected 1 to 4096"),
        ("ho_resnet-18", {"width": 16.0}, TypeError, "width: expected an int, got 16.0"),
        ("ho_resnet-18", {"num_classes": True}, TypeError, "num_classes: expected an int, got True"),
        ("ho_resnet-18", {"in_chans": -1}, ValueError, "in_chans: expected 1 to 4096, got -1"),
        ("ho_resnet-18", {"step": 0}, ValueError, r"step: expected a number in \(0, 16\], got 0"),
        ("ho_resnet-18", {"step": float("nan")}, ValueError, "step: expected a number in .* got nan"),
        ("ho_resnet-18", {"learn": "abh"}, TypeError, "learn: expected a sequence of str"),
        ("ho_resnet-18", {"step": "1"}, TypeError, "step: expected a number, got '1'"),
        ("ho_resnet-18", {"depth": 3}, TypeError, "depth: not an option of ho_resnet; supported are method, width"),
        ("ho_resnet-18", {"layers": 3}, TypeError, "layers: not an option of ho_resnet"),
    ),
)
def test_bad_arguments(name: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with torch.device("meta"), pytest.raises(error, match=message) as caught:
        rkfast.create_model(name, **options)
    assert len(str(caught.value)) < 500
