"""RevNet, PolyNet, LM-ResNet and the second-order CNN: their formulas in plain PyTorch, parameters, names, options."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rkfast
from rkfast import measure
from tests.models.test_ho_resnet import COUNTS
from tests.models.tester import check_checkpointing, check_fused, check_interface, on_meta, parameters

FAMILIES = ("revnet", "polynet", "lm_resnet", "hyperbolic")
SMALL: list[tuple[str, dict[str, Any]]] = [
    ("revnet-14", {"width": 8}),
    ("polynet-10", {"width": 6}),
    ("lm_resnet-12", {"width": 6}),
    ("hyperbolic-12", {"width": 6, "step": 0.5}),
    ("hyperbolic-12", {"width": 6, "symmetric": True}),
]
ids = [f"{name}{'-symmetric' * ('symmetric' in options)}" for name, options in SMALL]
each = pytest.mark.parametrize(("name", "options"), SMALL, ids=ids)


def general(b: Any, x: Tensor) -> Tensor:
    return b.conv2(torch.relu(b.norm2(b.conv1(torch.relu(b.norm1(x))))))


def symmetric(b: Any, x: Tensor) -> Tensor:
    return -F.conv_transpose2d(torch.relu(b.norm(b.conv(x))), b.conv.weight, padding=1)


def rev(steps: list[Any], y: Tensor) -> Tensor:
    x1, x2 = y.chunk(2, 1)
    for step in steps:
        y1 = x1 + general(step.f, x2)
        y2 = x2 + general(step.g, y1)
        x1, x2 = y1, y2
    return torch.cat([x1, x2], 1)


def poly(steps: list[Any], y: Tensor) -> Tensor:
    for step in steps:
        f = general(step.branches[0], y)
        y = y + f + general(step.branches[1], f)
    return y


def lm(steps: list[Any], y: Tensor) -> Tensor:
    previous, y = y, y + general(steps[0].branch, y)
    for step in steps[1:]:
        k = step.learned["k"]
        previous, y = y, (1 - k) * y + k * previous + general(step.branch, y)
    return y


def leapfrog(steps: list[Any], y: Tensor) -> Tensor:
    previous = y
    for step in steps:
        f = symmetric if hasattr(step.branch, "conv") else general
        previous, y = y, 2 * y - previous + step.step**2 * f(step.branch, y)
    return y


FORMULAS: dict[str, Callable[[list[Any], Tensor], Tensor]] = {
    "revnet": rev,
    "polynet": poly,
    "lm_resnet": lm,
    "hyperbolic": leapfrog,
}


def plain(model: Any, family: str, x: Tensor) -> Tensor:
    y = FORMULAS[family](list(model.period), model.stem(x))
    return model.fc(torch.relu(model.norm(y)).mean((2, 3)))


@each
@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
def test_formula(name: str, options: dict[str, Any], fused: bool) -> None:
    """Outputs, gradients, statistics and counters of three training steps in float64, and then the output in eval."""
    torch.manual_seed(0)
    ours = rkfast.create_model(name, fused=fused, **options).double()
    theirs = copy.deepcopy(ours)
    family = name.split("-")[0]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (ours, theirs)]
    for _ in range(3):
        x = torch.randn(4, 3, 7, 6, dtype=torch.float64, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        for out, optimizer in zip((ours(x), plain(theirs, family, twin)), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(out, torch.arange(4)).backward()
            optimizer.step()
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-10, atol=1e-12)
        assert all(p.grad is not None for p in ours.parameters())
        for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
    state = theirs.state_dict()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-10, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")
        if key.endswith("num_batches_tracked"):
            assert value == 3, key
    torch.testing.assert_close(ours.eval()(x), plain(theirs.eval(), family, x), rtol=1e-10, atol=1e-12)


@each
def test_fused_equals_stock(name: str, options: dict[str, Any]) -> None:
    check_fused(name, **options)


@each
def test_interface(name: str, options: dict[str, Any]) -> None:
    check_interface(name, **options)


def test_checkpointing() -> None:
    for name in FAMILIES:
        check_checkpointing(f"{name}-34", width=4)


@pytest.mark.parametrize("layers", COUNTS)
def test_parameters(layers: int) -> None:
    """Those of HO-ResNet of the same depth; LM-ResNet has k besides, PolyNet two BatchNorms for each, RevNet's branches
    are half as wide, and half of the symmetric layers have no weights of their own."""
    branches, _, count = COUNTS[layers]
    assert parameters(f"hyperbolic-{layers}") == count
    assert parameters(f"polynet-{layers}") == count + branches * 4 * 64
    assert parameters(f"lm_resnet-{layers}") == count + branches - 1
    outside = count - branches * (2 * 9 * 64 * 64 + 4 * 64)
    assert parameters(f"revnet-{layers}") == outside + branches * (2 * 9 * 32 * 32 + 4 * 32)
    assert parameters(f"hyperbolic-{layers}", symmetric=True) == outside + branches * (9 * 64 * 64 + 2 * 64)
    wide = on_meta(f"revnet-{layers}", width=128)
    assert sum(p.numel() for p in wide.period.parameters()) == branches * (2 * 9 * 64 * 64 + 4 * 64)
    for name in FAMILIES:
        assert len(on_meta(f"{name}-{layers}").period) == (branches // 2 if name == "revnet" else branches)


def test_names_and_options() -> None:
    for name in FAMILIES:
        names = [listed for listed in rkfast.list_models() if listed.startswith(f"{name}-")]
        assert names == [f"{name}-{layers}" for layers in COUNTS]
        with pytest.raises(TypeError, match="nothing: not an option of") as caught:
            rkfast.create_model(f"{name}-10", nothing=0)
        for option in re.sub(".* are ", "", str(caught.value)).split(", "):
            assert re.search(rf"``{option}\b", rkfast.create_model.__doc__ or ""), option
        with torch.device("meta"):
            out = rkfast.create_model(f"{name}-10", num_classes=3, in_chans=2, width=4)(torch.empty(5, 2, 8, 8))
        assert out.shape == (5, 3)


def test_k_of_lm_resnet() -> None:
    """The first block has none; the others start in [-0.1, 0], and weight decay leaves them alone."""
    model = rkfast.create_model("lm_resnet-58", width=2)
    keys = {f"period.{i}.learned.k" for i in range(1, 28)}
    assert model.no_weight_decay() == keys == {key for key in model.state_dict() if key.endswith(".k")}
    values = torch.stack([model.get_parameter(key) for key in keys])
    assert -0.1 <= values.min() < -0.05 < values.max() <= 0
    # With k = 0 it is a residual network, as its authors train it first.
    nn.init.zeros_(values := model.period[1].learned["k"])
    x = torch.randn(2, 2, 5, 5)
    step = model.period[1].eval()
    assert values == 0
    torch.testing.assert_close(step(x, torch.randn_like(x)), x + step.branch(x))


def test_polynet_in_evaluation() -> None:
    """Convolutions run twice, with the statistics of each time: evaluation is what training was."""
    torch.manual_seed(0)
    model = rkfast.create_model("polynet-10", width=8)
    for step in model.period:
        first, second = step.branches
        assert first.conv1 is second.conv1 and first.conv2 is second.conv2
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        for _ in range(100):
            out = model(x)
        torch.testing.assert_close(model.eval()(x), out, rtol=0.05, atol=0.05)


def kept(layers: int, **options: Any) -> int:
    torch.manual_seed(0)
    model = rkfast.create_model(f"revnet-{layers}", width=8, **options)
    x = torch.randn(4, 3, 16, 16)
    return measure.saved_bytes(lambda: model(x), [x, *model.parameters(), *model.buffers()])


def test_revnet_keeps_as_much_whatever_its_depth() -> None:
    assert kept(6) == kept(34) < kept(6, reversible=False)
    assert kept(34, reversible=False) > 2 * kept(18, reversible=False) - kept(6, reversible=False)
    assert kept(34, fused=False) > kept(34, reversible=False) > 4 * kept(34)


@each
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
def test_compile(name: str, options: dict[str, Any], training: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = rkfast.create_model(name, **options).double().train(training)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    out, expected = compiled(x), model(x)
    torch.testing.assert_close(out, expected)
    for y in (out, expected):
        y.square().sum().backward()
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(twin.state_dict(), model.state_dict())


@each
def test_export(name: str, options: dict[str, Any]) -> None:
    model = rkfast.create_model(name, **options).eval()
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    (
        ("revnet", {}, ValueError, "expected revnet-<layers>, such as revnet-10, revnet-18"),
        ("revnet-12", {}, ValueError, r"layers: 12 does not fit, with 2 .* expected 2 \+ 4 \* steps, such as 18"),
        ("revnet-4", {}, ValueError, "layers: expected 6 to 2050, got 4"),
        ("polynet-9", {}, ValueError, r"layers: 9 does not fit, with 1 .* expected 2 \+ 2 \* steps, such as 10"),
        ("lm_resnet-2", {}, ValueError, "layers: expected 4 to 2050, got 2"),
        ("hyperbolic-999999", {}, ValueError, "layers: expected 4 to 2050, got 999999"),
        ("revnet-10", {"width": 7}, ValueError, "width: expected an even number, .* got 7"),
        ("revnet-10", {"reversible": 1}, TypeError, "reversible: expected a bool, got 1"),
        ("polynet-10", {"reversible": True}, TypeError, "reversible: not an option of polynet; supported are width"),
        ("polynet-10", {"width": 0}, ValueError, "width: expected 1 to 4096, got 0"),
        ("lm_resnet-10", {"num_classes": "3"}, TypeError, "num_classes: expected an int, got '3'"),
        ("lm_resnet-10", {"layers": 3}, TypeError, "layers: not an option of lm_resnet"),
        ("hyperbolic-10", {"step": 0}, ValueError, r"step: expected a number in \(0, 16\], got 0"),
        ("hyperbolic-10", {"symmetric": "yes"}, TypeError, "symmetric: expected a bool, got 'yes'"),
    ),
)
def test_bad_arguments(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with torch.device("meta"), pytest.raises(error, match=message) as caught:
        rkfast.create_model(name, **options)
    assert len(str(caught.value)) < 400
