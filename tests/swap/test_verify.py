"""rkfast.verify: that it passes what is right, that it finds what is wrong, and that it leaves the model alone."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rkfast
from rkfast.swap.dense import FusedDenseBlock
from rkfast.swap.kind import Kind
from rkfast.swap.residual import FusedBlock
from rkfast.swap.sequential import FusedSequential
from tests.libraries import network
from tests.swap.lookalikes import Block, DenseNet
from tests.swap.test_fuse import built, made


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


X = images(4, 3, 10, 10)


@pytest.mark.parametrize(
    ("name", "fused"), (("densenet", True), ("densenet", False), ("efficient", True), ("frozen", True), ("own", False))
)
def test_what_is_right_passes(name: str, fused: bool) -> None:
    model = made(name)
    if fused:
        rkfast.fuse(model, memory="min")
    elif name == "own":
        model = rkfast.create_model("erknet-2x1_2x1-b", growth_rate=4, num_classes=5)  # fused from the beginning
    found = rkfast.verify(model, X)
    assert found, found
    assert str(found).endswith("\nPASS")
    assert [row.what for row in found if row.what.endswith(("output", "gradients", "after"))] == [
        "training: output", "training: input gradients", "training: parameter gradients", "training: evaluation after",
        "evaluation: output", "evaluation: input gradients", "evaluation: parameter gradients",
        "evaluation: output without gradients",
    ]  # fmt: skip
    assert any(row.what == "training: running_var" for row in found)
    assert ("a fused copy was verified" in str(found)) == (not fused and name != "own")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    found = rkfast.verify(rkfast.fuse(made("resnet").to(dtype)), X.to(dtype))
    assert found, found


def test_autocast() -> None:
    model = rkfast.fuse(made("densenet"))
    with torch.autocast("cpu", torch.bfloat16):
        found = rkfast.verify(model, X)
    assert found, found
    assert found[0].eager > 1e-3  # bfloat16 was what ran


def wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fused blocks could get wrong, one at a time."""
    kind: type[Kind] = FusedBlock if name.startswith("residual") else FusedDenseBlock
    right: Any = kind.fused

    def fused(self: Any, found: Any, x: Tensor) -> Tensor:
        if name == "residual gradient":
            return right(self, found, x * 0.9 + x.detach() * 0.1)
        if name == "no statistics" and self.training:
            kept = [b.clone() for b in self.buffers()]
            out = right(self, found, x)
            for b, before in zip(self.buffers(), kept, strict=True):
                b.copy_(before)
            return out
        if name == "twice counted" and self.training:
            for b in self.buffers():
                if not b.is_floating_point():
                    b.add_(1)
        out = right(self, found, x)
        if name == "no gradient":
            return out.detach()
        if name == "not finite":
            return out.masked_fill(out == out.max(), torch.inf)
        if name == "inference" and not torch.is_grad_enabled():
            return out * 1.001
        return out.bfloat16().to(out.dtype) if name == "rounded" else out

    monkeypatch.setattr(kind, "fused", fused)
    if kind is FusedDenseBlock:
        monkeypatch.setattr(kind, "forward_with_moments", lambda self, y, moments=None, **_: (self(y), None))


@pytest.mark.parametrize(
    ("name", "rows"),
    (
        ("residual gradient", ("training: input gradients", "evaluation: input gradients")),
        ("no statistics", ("training: running_mean", "training: running_var", "training: counters")),
        ("twice counted", ("training: counters",)),
        ("no gradient", ("training: parameter gradients",)),
        ("not finite", ("training: output",)),
        ("inference", ("training: evaluation after", "evaluation: output without gradients")),
        ("rounded", ("training: output", "training: evaluation after")),
    ),
)
def test_what_is_wrong_fails(name: str, rows: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = rkfast.fuse(made("resnet" if name.startswith("residual") else "densenet"))
    wrong(name, monkeypatch)
    found = rkfast.verify(model, X)
    assert not found and not found.ok
    assert str(found).endswith("\nFAIL")
    assert {row.what for row in found if not row.ok} >= set(rows)
    if name in ("twice counted", "inference"):
        assert {row.what for row in found if not row.ok} == set(rows)


def test_a_gradient_that_cancels_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a bias before a BatchNorm is rounding noise, in stock PyTorch too."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return rkfast.fuse(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *made("resnet").layer1))  # type: ignore[misc]

    for dtype in (torch.float32, torch.float64):
        found = rkfast.verify(model().to(dtype), X.to(dtype))
        assert found, found
    broken = model()
    wrong("residual gradient", monkeypatch)
    assert not all(row.ok for row in rkfast.verify(broken, X) if row.what == "training: parameter gradients")


def test_a_relu_at_its_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs so near zero that stock PyTorch, too, would have them on the other side if they were off by a rounding."""
    model, x = rkfast.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())), X.clone()
    x[0, 0, 0] = 3e-8
    right: Any = FusedSequential.fused
    monkeypatch.setattr(FusedSequential, "fused", lambda self, found, x: right(self, found, x - 1e-7))
    found = rkfast.verify(model, x, draws=1, modes=["evaluation"])
    assert found, found


def test_the_model_is_left_as_it_was() -> None:
    model = made("densenet").train()
    model.features.norm5.eval()  # type: ignore[union-attr]
    noise: list[Tensor] = []
    model.register_forward_pre_hook(lambda *_: noise.append(torch.rand(3)))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    types, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    numbers, x = torch.get_rng_state(), X.clone()
    assert rkfast.verify(model, x)
    assert [type(m) for m in model.modules()] == types
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert torch.equal(x, X) and not x.requires_grad
    assert all(torch.equal(drawn, noise[0]) for drawn in noise)


class Wrapped(nn.Module):
    """A network with other inputs and outputs than a tensor, in-place ops on its input, and dropouts."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.net = DenseNet(Block, drop_rate=0.5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, given: Any, scale: Tensor | None = None) -> Any:
        x = given["x"].add_(1) if isinstance(given, dict) else given
        y = self.dropout(self.net(x if scale is None else x * scale))
        if self.kind == "tuple":
            return y, [y.argmax(1), y.square()]
        if self.kind == "dataclass":
            return Result(y, None)
        return OrderedDict(logits=y, label=y.argmax(1)) if self.kind == "dict" else "nothing"


@dataclasses.dataclass
class Result:
    logits: Tensor
    loss: Tensor | None


@pytest.mark.parametrize("kind", ("tuple", "dict", "dataclass"))
def test_inputs_and_outputs(kind: str) -> None:
    for inputs in ((X, torch.tensor(2.0)), ({"x": X},)):
        found = rkfast.verify(Wrapped(kind), *inputs)
        assert found, found


def test_what_wraps_the_network() -> None:
    model = rkfast.fuse(made("resnet"))
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert rkfast.verify(wrapped, X)  # type: ignore[arg-type]


def test_modes_and_arguments() -> None:
    model = made("densenet")
    found = rkfast.verify(model, X[:1, :, :4, :4], modes=["evaluation"], draws=1)
    assert all(row.what.startswith("evaluation: ") for row in found)
    cases: list[tuple[Any, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        (3, (X,), {}, TypeError, r"model: expected an nn\.Module, got int"),
        (model, (X,), {"draws": 0}, ValueError, "draws: expected 1 or more, got 0"),
        (model, (X,), {"modes": ("train",)}, ValueError, "modes: expected some of training, evaluation, got"),
        (Wrapped("nothing"), (X,), {}, TypeError, "model: it returned str, in which there is no floating-point tensor"),
    ]
    for given, inputs, options, error, message in cases:
        with pytest.raises(error, match=message):
            rkfast.verify(given, *inputs, **options)


@built
def test_says_who_served() -> None:
    assert "dense_block by cpu" in str(rkfast.verify(made("densenet"), X, draws=1))
    plain = rkfast.verify(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()), X)
    assert plain
    assert "verified, but stock PyTorch served everything" in str(plain)
    assert "nothing in the model is fused: and nothing in it can be" in str(plain)


@built
def test_a_network_of_a_library() -> None:
    torch.manual_seed(0)
    model = network("torchvision.DenseNet", growth_rate=16, block_config=(2, 3), num_init_features=16)
    found = rkfast.verify(rkfast.fuse(model), images(4, 3, 64, 64))
    assert found, found
    assert found.served["dense_block", "cpu"]
