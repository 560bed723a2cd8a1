"""rkfast.estimate, max_batch and the bytes in rkfast.report, beside what is measured."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rkfast
from rkfast import measure
from rkfast.swap.estimate import fake_mode, in_words, shadow
from rkfast.swap.max_batch import peak
from tests.libraries import network
from tests.swap.test_fuse import made

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def measured(model: nn.Module, x: Tensor = X) -> int:
    return measure.saved_bytes(lambda: model(x), [x, *model.parameters(), *model.buffers()])


def erknet(fused: bool) -> nn.Module:
    return rkfast.create_model("erknet-2x1_2x1-b", growth_rate=16, fused=fused)


@pytest.mark.parametrize("name", ("densenet", "resnet", "own", "erknet"))
@pytest.mark.parametrize("memory", ("speed", "min"))
def test_as_measured(name: str, memory: str) -> None:
    model, stock = (erknet(fused) if name == "erknet" else made(name) for fused in (True, False))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = X.contiguous(memory_format=layout)
        expected = measured(stock, x), measured(rkfast.fuse(model, memory=memory), x)
        assert expected[1] < expected[0]
        for net, options in ((model, {}), (stock, {"memory": memory})):
            found = rkfast.estimate(net, x, **options)
            assert found == pytest.approx(expected, rel=0.05)
    assert rkfast.estimate(rkfast.unfuse(model) if name != "erknet" else stock, X).fused > 0


def test_modes_and_autocast() -> None:
    model = rkfast.fuse(made("densenet"))
    training = rkfast.estimate(model, X)
    assert rkfast.estimate(model.eval(), X) == pytest.approx(
        (measured(rkfast.unfuse(made("densenet").eval())), measured(model)), rel=0.05
    )
    assert rkfast.estimate(model.train(), X) == training
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = rkfast.estimate(model, X)
        with torch.enable_grad():
            expected = measured(model)
    assert found.fused == pytest.approx(expected, rel=0.05)
    assert found.fused < 0.75 * training.fused


def test_nothing_is_computed_or_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("resnet")
    model.dropout = nn.Dropout()
    model.fc.register_forward_pre_hook(lambda module, args: (model.dropout(args[0]),))
    state = {name: t.clone() for name, t in model.state_dict().items()}
    types, numbers = [type(m) for m in model.modules()], torch.get_rng_state()
    served = rkfast.dispatch.served()
    large = torch.empty(10**5, 3, 1, 1).expand(-1, -1, 400, 400)  # 192 GB
    found = rkfast.estimate(model, large)
    assert found.stock > found.fused > 10**12
    assert (rkfast.dispatch.served() - served).total() < 50  # of fuse, which compares small copies
    assert [type(m) for m in model.modules()] == types
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers)


def test_wrapped_and_nested() -> None:
    model = rkfast.fuse(made("resnet"))
    expected = rkfast.estimate(model, X)
    assert rkfast.estimate(nn.DataParallel(model), X) == expected

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, given: dict[str, Any]) -> dict[str, Tensor]:
            return {"y": self.net(given["x"])}

    assert rkfast.estimate(Outer(), {"x": X}) == expected


class Peeks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


def test_bad_arguments() -> None:
    model = made("resnet")
    cases: list[tuple[Any, tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
        (rkfast.estimate, (3, X), {}, TypeError, r"model: expected an nn\.Module, got int"),
        (rkfast.estimate, (model, X), {"memory": "max"}, ValueError, "memory: expected one of speed, min, got 'max'"),
        (rkfast.estimate, (Peeks(), X), {}, RuntimeError, "model: its forward cannot go without numbers"),
        (rkfast.max_batch, (Peeks(), X), {}, RuntimeError, "model: its forward cannot go without numbers"),
        (rkfast.max_batch, (model, X), {"budget": 0}, ValueError, "budget: expected a number of bytes, got 0"),
        (rkfast.max_batch, (model, X), {"optimizer": "lion"}, ValueError, "optimizer: expected one of sgd, adamw, or"),
        (rkfast.max_batch, (model, 3), {}, ValueError, "inputs: there is no tensor with a batch in dimension 0"),
        (
            rkfast.max_batch,
            (model, X),
            {"budget": 10**5},
            RuntimeError,
            r"not even a batch of one fits: it needs about",
        ),
    ]
    for function, given, options, error, message in cases:
        with pytest.raises(error, match=message):
            function(*given, **options)


def test_report_says_how_many_bytes() -> None:
    model = made("densenet")
    total = rkfast.estimate(model, X)
    assert all(row.saved is None for row in rkfast.report(model))
    before = rkfast.report(model, X)
    rows = rkfast.report(rkfast.fuse(model), X)
    assert [row.saved for row in rows] == [row.saved for row in before]
    assert sum(row.saved or 0 for row in rows) == pytest.approx(total.stock - total.fused, rel=0.05)
    block = next(row for row in rows if row.name == "features.denseblock1")
    assert block.saved is not None and block.saved > 0.3 * (total.stock - total.fused)
    assert f"fused, keeps {in_words(block.saved)} less" in str(rows)
    assert f"stock, fused it would keep {in_words(block.saved)} less: not swapped" in str(before)
    model.features.denseblock1.denselayer2.relu2 = nn.Tanh()  # type: ignore[union-attr]
    assert [row.saved for row in rkfast.report(model, X) if row.name == "features.denseblock1"] == [0]
    own = rkfast.report(made("own"), X)
    assert max(row.saved or 0 for row in own) > 0
    assert in_words(3) == "3 bytes" and in_words(-2_500_000) == "-2.5 MB"


@pytest.mark.parametrize("memory", ("speed", "min"))
def test_max_batch(memory: str) -> None:
    model = rkfast.fuse(made("densenet"), memory=memory)
    budget = 50_000_000
    found = rkfast.max_batch(model, X, budget=budget)
    assert rkfast.max_batch(model, X[:2], budget=budget) == found
    parameters = sum(4 * p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    fake = fake_mode()
    twin = shadow(model, fake)

    def needed(batch: int) -> int:
        return 3 * parameters + buffers + peak(twin, (fake.from_tensor(torch.empty(batch, 3, 16, 16)),), fake)

    assert needed(found) <= budget < needed(found + 1)
    assert peak(twin, (fake.from_tensor(X),), fake) > rkfast.estimate(model, X).fused
    large = rkfast.max_batch(model, X, budget=budget, optimizer=100)
    assert large < rkfast.max_batch(model, X, budget=budget, optimizer="adamw") <= found
    assert rkfast.max_batch(model, X) > 100  # of what is free


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            y = x.view(-1) * self.w
        return y


def test_the_peak_of_known_tensors() -> None:
    """x, the result while the one before is still there; and then x, result, its gradient, and their product."""
    fake = fake_mode()
    x = fake.from_tensor(torch.empty(1000, 1000))
    assert peak(shadow(Product(), fake), (x,), fake) == pytest.approx(16e6, rel=0.001)


def test_the_peak_as_measured() -> None:
    """By the allocator's own events."""
    model, x = rkfast.fuse(made("resnet")), torch.randn(16, 3, 32, 32)

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(x).sum().backward()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    expected = max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    fake = fake_mode()
    found = peak(shadow(model, fake), (fake.from_tensor(x),), fake) - x.nbytes
    assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("address", ("torchvision.densenet121", "timm.resnet50"))
def test_networks_of_libraries(address: str) -> None:
    model, x = network(address), torch.randn(2, 3, 64, 64)
    stock = measured(model, x)
    found = rkfast.estimate(model, x)
    assert found == pytest.approx((stock, measured(rkfast.fuse(model), x)), rel=0.05)
    saved = sum(row.saved or 0 for row in rkfast.report(model, x))
    assert saved == pytest.approx(found.stock - found.fused, abs=0.005 * found.stock)
