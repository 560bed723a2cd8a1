"""Fused models in DistributedDataParallel: two processes, gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import rkfast

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
MODELS = {
    "ho_resnet-10": {"width": 16},
    "erknet-2x1_2x1-b": {"growth_rate": 16},
    "irknet-2x1_2x1-ab": {"growth_rate": 8},
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return rkfast.create_model(name, **MODELS[name])


def batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(4, 3, 16, 16, generator=generator), torch.randint(10, (4,), generator=generator)


def trained(model: nn.Module, rank: int, steps: int = 2) -> list[Tensor]:
    """Gradients of the last of a few steps without an optimizer."""
    images, labels = batch(rank)
    for _ in range(steps):
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def worker(rank: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = nn.parallel.DistributedDataParallel(made(name))
        torch.save(trained(model, rank), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_averaged(name: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path), name), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    alone = [trained(made(name), rank) for rank in range(2)]
    expected = [(a + b) / 2 for a, b in zip(*alone, strict=True)]
    assert len(first) == len(expected)
    torch.testing.assert_close(first, expected, rtol=1e-3, atol=1e-4)
