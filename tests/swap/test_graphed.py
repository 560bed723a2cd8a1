"""rkfast.graphed without a GPU: what it refuses and why, and, with replays that compute anew, what it leaves behind.
tests/cuda/test_gpu.py captures."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import rkfast
from tests.swap.test_fuse import made

graphs = importlib.import_module("rkfast.swap.graphed")  # an attribute of that name is the function
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def hooked() -> nn.Module:
    model = made("resnet")
    model.get_submodule("stem.0").register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("model", "sample", "warmup", "error", "message"),
    (
        (3, X, 3, TypeError, "model_or_step: expected an nn.Module or a function, got int"),
        (nn.ReLU(), [X, 1.0], 3, TypeError, "sample: .* got a list of Tensor, float"),
        (nn.ReLU(), (), 3, TypeError, "sample: .* got a tuple of nothing"),
        (nn.ReLU(), X, 0, ValueError, "warmup: expected 1 or more, got 0"),
        (nn.ReLU(), X, True, ValueError, "warmup: .* got True"),
        (nn.DataParallel(nn.ReLU()), X, 3, ValueError, "DataParallel shares gradients by hooks.*the whole step"),
        (torch.compile(nn.ReLU()), X, 3, ValueError, "torch.compile.*give the module itself"),
        (hooked(), X, 3, ValueError, "model_or_step: stem.0 has hooks"),
        (nn.ReLU(), X, 3, RuntimeError, "need a GPU, and torch sees none"),
    ),
)
def test_refused(
    model: Any, sample: Any, warmup: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        rkfast.graphed(model, sample, warmup=warmup)


def test_tensors_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"sample\[0\]: a CUDA graph takes tensors on a GPU, got one on cpu"):
        rkfast.graphed(nn.ReLU(), X)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """graphed on the CPU: a replay calls what was captured again. Lists what was asked of CUDA."""
    asked: list[str] = []

    def warm(call: Callable[[], Any], device: torch.device, times: int) -> None:
        asked.append(f"warm {times}")
        for _ in range(times + 1):
            call()

    def captured(call: Callable[[], Any]) -> tuple[Any, Any]:
        asked.append("capture")
        result = pytree.tree_map_only(Tensor, torch.detach, call())

        class Graph:
            def replay(self) -> None:
                for own, new in zip(pytree.tree_leaves(result), pytree.tree_leaves(call()), strict=True):
                    own.copy_(new.detach())

        return Graph(), result

    def make(module: nn.Module, sample: tuple[Tensor, ...], **options: Any) -> nn.Module:
        asked.append(f"make {options['num_warmup_iters']}")
        assert not torch.is_autocast_cache_enabled()
        module(*sample)
        return module

    @contextlib.contextmanager
    def nothing(*args: Any) -> Iterator[None]:
        yield

    checked = graphs._checked

    def check(model: Any, sample: Any, warmup: Any) -> list[Tensor]:
        with contextlib.suppress(RuntimeError):
            checked(model, sample, warmup)
        return [sample] if isinstance(sample, Tensor) else list(sample)

    monkeypatch.setattr(graphs, "_warm", warm)
    monkeypatch.setattr(graphs, "_captured", captured)
    monkeypatch.setattr(graphs, "_checked", check)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", nothing)
    monkeypatch.setattr(torch.random, "fork_rng", nothing)
    monkeypatch.setattr(graphs, "_without_cache", lambda: torch.autocast("cpu", enabled=False, cache_enabled=False))
    return asked


def test_training(anywhere: list[str]) -> None:
    model = made("resnet").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graph = rkfast.graphed(model, X, warmup=2)
    assert anywhere == ["warm 1", "make 2"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    out = graph(X)
    assert out.requires_grad
    assert not torch.equal(model.get_buffer("stem.1.running_mean"), before["stem.1.running_mean"])
    assert graph.model is model
    model.eval()
    with pytest.raises(RuntimeError, match="captured in training mode, and it is in evaluation mode now"):
        graph(X)


def test_modes_inside_stay(anywhere: list[str]) -> None:
    model = made("resnet").train()
    model.get_submodule("stem.1").eval()
    rkfast.graphed(model, X)
    assert model.training and not model.get_submodule("stem.1").training


def test_inference(anywhere: list[str]) -> None:
    model = made("resnet").eval()
    graph = rkfast.graphed(model, X)
    assert anywhere == ["warm 3", "capture"]
    other = torch.randn_like(X)
    first = graph(X)
    assert not first.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(first, model(X))
        again = graph(other)
        assert again is first
        torch.testing.assert_close(again, model(other))


def test_training_without_gradients_is_captured_as_inference(anywhere: list[str]) -> None:
    model = made("resnet").train()
    with torch.no_grad():
        rkfast.graphed(model, X)
    assert anywhere == ["warm 3", "capture"]


def test_step(anywhere: list[str]) -> None:
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    calls: list[None] = []

    def step(x: Tensor, y: Tensor) -> Tensor:
        calls.append(None)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    x, y = torch.randn(8, 4), torch.randn(8, 2)
    graph = rkfast.graphed(step, (x, y), warmup=2)
    assert len(calls) == 3 + 1  # here the capture computes too
    losses = [graph(x, y).item() for _ in range(3)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    (
        ((), TypeError, "inputs: 1 were captured, got 0"),
        ((1.0,), TypeError, r"inputs\[0\]: expected a Tensor, got float"),
        ((X[:1],), ValueError, r"captured was \[2, 3, 16, 16\] torch.float32 on cpu, got \[1, 3, 16, 16\]"),
        ((X.double(),), ValueError, "torch.float64"),
        ((X.clone().requires_grad_(),), ValueError, "with a gradient"),
    ),
)
def test_inputs(anywhere: list[str], inputs: Any, error: type[Exception], message: str) -> None:
    graph = rkfast.graphed(nn.Flatten().eval(), X)
    with pytest.raises(error, match=message):
        graph(*inputs)


@pytest.mark.parametrize(
    ("said", "explained"),
    (
        ("called a synchronizing CUDA operation", "makes the host wait for the GPU .*traceback shows the line"),
        ("operation not permitted when stream is capturing", "not allowed while a stream captures"),
        ("mat1 and mat2 shapes cannot be multiplied", "cannot be captured: mat1 and mat2"),
    ),
)
def test_what_cannot_be_captured(
    anywhere: list[str], monkeypatch: pytest.MonkeyPatch, said: str, explained: str
) -> None:
    model = made("resnet").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def fails(call: Callable[[], Any], device: torch.device, times: int) -> None:
        call()
        raise RuntimeError(said)

    monkeypatch.setattr(graphs, "_warm", fails)
    with pytest.raises(RuntimeError, match=explained):
        rkfast.graphed(model, X)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
