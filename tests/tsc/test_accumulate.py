"""accumulate: the gradients of as many full passes, from one evaluation of the controllers."""

from __future__ import annotations

import contextlib
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from rkfast import tsc
from tests.tsc.nets import NETS, attached

MICRO_BATCHES = 3


def micro_batches(rank: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(rank)
    return [
        (torch.randn(3, 3, 8, 8, generator=generator).double(), torch.randint(10, (3,), generator=generator))
        for _ in range(MICRO_BATCHES)
    ]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


def accumulated(model: Any, batches: list[tuple[Tensor, Tensor]], scale: float = 1.0) -> None:
    for x, y in batches:
        (scale * F.cross_entropy(model(x), y) / MICRO_BATCHES).backward()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("controller", ("lstm", "indp"))
def test_as_many_full_passes(name: str, controller: str) -> None:
    """With a loss scale, and the norm that clipping sees."""
    model, twin = (attached(name, controller).double() for _ in range(2))
    calls: list[Any] = []
    for part in model.tsc:
        part.register_forward_hook(lambda *args: calls.append(args[0]))
    with tsc.accumulate(model):
        accumulated(model, micro_batches(), 1024.0)
    assert calls == list(model.tsc)
    accumulated(twin, micro_batches(), 1024.0)
    expected = gradients(twin)
    assert expected.keys() == dict(model.named_parameters()).keys()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-9)
    norms = [nn.utils.clip_grad_norm_(m.parameters(), 1.0) for m in (model, twin)]
    torch.testing.assert_close(*norms)
    torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-9, atol=1e-12)
    calls.clear()
    accumulated(model, micro_batches()[:1])
    assert calls == list(model.tsc)


def test_nothing_to_differentiate() -> None:
    model = attached("basic", "fixed").double()
    x = micro_batches()[0][0]
    with tsc.accumulate(model):
        model(x).sum().backward()
    model = attached("basic").double()
    expected = model.eval()(x)
    calls = []
    for controller in model.tsc:
        controller.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.no_grad(), tsc.accumulate(model):
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert calls == list(model.tsc)
    with tsc.accumulate(model):
        pass
    assert not gradients(model)


def test_copies_made_inside_are_free_of_it() -> None:
    model = attached("basic").double().eval()
    x = micro_batches()[0][0]
    with tsc.accumulate(model):
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        before = twin(x)
        with torch.no_grad():
            for parameter in twin.tsc.parameters():
                parameter.add_(1)
        assert not torch.equal(twin(x), before)
        tsc.steps(twin)


def test_errors() -> None:
    model = attached("basic").double()
    with tsc.accumulate(model), pytest.raises(ValueError, match="model: it is inside `with rkfast"):
        tsc.fold(model)
    with contextlib.suppress(KeyError), tsc.accumulate(model):
        accumulated(model, micro_batches())
        raise KeyError
    assert all(p.grad is None for p in model.tsc.parameters())
    assert all(controller.held is None for controller in model.tsc)
    tsc.fold(model)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = nn.parallel.DistributedDataParallel(attached("basic").double())
        *most, last = micro_batches(rank)
        with model.no_sync(), tsc.accumulate(model):
            accumulated(model, most)
        accumulated(model, [last])
        torch.save(gradients(model), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
def test_distributed(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    alone = []
    for rank in range(2):
        model = attached("basic").double()
        accumulated(model, micro_batches(rank))
        alone.append(gradients(model))
    expected = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-10)
