"""HO-ResNet: the paper's parameter counts, names and options, and training as in stock PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rkfast
from tests.models.tester import check_checkpointing, check_interface
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
STAGES = {"euler": 1, "midpoint": 2, "rk4": 4}


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
    fused = rkfast.create_model("ho_resnet-10", method=method, width=8, step=0.5)
    stock = rkfast.create_model("ho_resnet-10", method=method, width=8, step=0.5, fused=False)
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
    check_checkpointing("ho_resnet-18", width=4)


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
        ("resnet-18", {}, ValueError, "name: 'resnet-18' .* one of the families ho_resnet, .* such as ho_resnet-10"),
        ("x" * 10_000, {}, ValueError, "is not a model"),
        (18, {}, TypeError, "name: expected a str, got int"),
        ("ho_resnet-11", {}, ValueError, "layers: 11 does not fit rk4"),
        ("ho_resnet-12", {}, ValueError, "layers: 12 does not fit rk4, which has 4 branches .*, such as 10 or 34"),
        ("ho_resnet-0", {}, ValueError, "layers: expected 4 to 2050, got 0"),
        ("ho_resnet-2", {"method": "euler"}, ValueError, "layers: expected 4 to 2050, got 2"),
        ("ho_resnet-999999", {}, ValueError, "layers: expected 4 to 2050, got 999999"),
        ("ho_resnet-18", {"method": "rk5"}, ValueError, "method: 'rk5' is not"),
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
    assert len(str(caught.value)) < 400
