"""Fused models in DistributedDataParallel, and with SyncBatchNorm: two processes, gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import rkfast
from rkfast import dispatch, ops
from tests.libraries import library, network
from tests.ops import test_dense_block
from tests.ops.tester import CPU_BACKENDS

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
MODELS = {
    "ho_resnet-10": {"width": 16},
    "revnet-10": {"width": 16},
    "lm_resnet-10": {"width": 16},
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


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        found = {name: trained(nn.parallel.DistributedDataParallel(made(name)), rank) for name in MODELS}
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_gradients_are_averaged(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    for name in MODELS:
        alone = [trained(made(name), rank) for rank in range(2)]
        expected = [(a + b) / 2 for a, b in zip(*alone, strict=True)]
        assert len(first[name]) == len(expected), name
        torch.testing.assert_close(first[name], expected, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


SYNCED = {
    "densenet-16": {"growth_rate": 4},
    "densenet-16-bc": {"growth_rate": 4},
    "erknet-2x1_2x1-b": {"growth_rate": 16},
    "irknet-2x1_2x1-ab": {"growth_rate": 8},
    "ho_resnet-10": {"width": 16},
    "revnet-10": {"width": 16},
}
SIZES = (3, 5)  # the processes' parts of the batch
STEPS = 3


def synced_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(sum(SIZES), 3, 16, 16, generator=generator, dtype=torch.float64)
    # Each part with moments of its own, so that those of one process are far from those of all.
    images[: SIZES[0]] = 2 * images[: SIZES[0]] + 1
    return images, torch.randint(10, (sum(SIZES),), generator=generator)


def stepped(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Results and gradients of the summed loss, and statistics, after a few steps; and what evaluation gives then."""
    model.train()
    for _ in range(STEPS):
        model.zero_grad()
        out = model(images)
        F.cross_entropy(out, labels, reduction="sum").backward()
    found = {f"gradient of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found.update({name: b.clone() for name, b in model.named_buffers()})
    found["trained"], found["evaluated"] = out.detach(), model.eval()(images).detach()
    return found


def synced_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        part = slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], None)
        images, labels = synced_batch()
        every = {}
        for name, options in SYNCED.items():
            torch.manual_seed(0)
            model = nn.SyncBatchNorm.convert_sync_batchnorm(rkfast.create_model(name, **options).double())
            before = dispatch.served()
            every[name] = found = stepped(model, images[part], labels[part])
            found["served"] = torch.tensor((dispatch.served() - before)["dense_block", "reference"])
            # Gradients of parameters are those of this process, which DistributedDataParallel would add up.
            for key in [key for key in found if key.startswith("gradient")]:
                dist.all_reduce(found[key])
        torch.save(every, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_synchronised_statistics_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(synced_worker, (str(tmp_path),), nprocs=2)
    every = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, options in SYNCED.items():
        parts = [each[name] for each in every]
        torch.manual_seed(0)
        expected = stepped(rkfast.create_model(name, fused=False, **options).double(), *synced_batch())
        for key in ("trained", "evaluated"):
            together = torch.cat([part.pop(key) for part in parts])
            torch.testing.assert_close(together, expected.pop(key), rtol=1e-9, atol=1e-9)
        blocks = [int(part.pop("served")) for part in parts]
        assert blocks[0] == blocks[1] and (blocks[0] > 0) == ("net-10" not in name)
        for part in parts:
            torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-9)


def block_worker(rank: int, folder: str, backend: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        block, x, grad = block_of_the_whole_batch()
        block, group = block.to(dtype), dist.group.WORLD.group_name
        for name in ("norm1", "norm2"):
            setattr(block, name, [norm._replace(group=group) for norm in getattr(block, name)])
        part = slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], None)
        with dispatch.use(backend):
            found = dict(test_dense_block.outcome(block, block.ours, x[part].to(dtype), grad[part]))
        for key in [key for key in found if key.startswith("gradient") and key != "gradient 0"]:
            dist.all_reduce(found[key])
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def block_of_the_whole_batch() -> tuple[test_dense_block.Block, Tensor, Tensor]:
    torch.manual_seed(0)
    block = test_dense_block.Block("neck", "cumulative")
    x = torch.randn(sum(SIZES), block.inputs, 5, 6, dtype=torch.float64)
    x[: SIZES[0]] = 2 * x[: SIZES[0]] + 1
    return block, x, torch.randn(sum(SIZES), block.channels, 5, 6, dtype=torch.float64)


def check_blocks(folder: Path, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.multiprocessing.spawn(block_worker, (str(folder), backend, dtype), nprocs=2)
    parts = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    block, x, grad = block_of_the_whole_batch()
    expected = dict(test_dense_block.outcome(block, block.plain, x, grad))
    for key in ("out", "gradient 0"):
        together = torch.cat([part.pop(key) for part in parts])
        torch.testing.assert_close(together.double(), expected.pop(key), rtol=tolerance, atol=tolerance)
    for part in parts:
        for key, value in expected.items():
            torch.testing.assert_close(part[key].to(value.dtype), value, rtol=tolerance, atol=tolerance)


def test_blocks_of_two_processes(tmp_path: Path) -> None:
    check_blocks(tmp_path, "reference", torch.float64, 1e-9)


def convolved(x: Tensor, grad: Tensor, group: str = "", eager: bool = False) -> dict[str, Tensor]:
    """Result, gradients and statistics of a convolution behind BatchNorm and ReLU."""
    torch.manual_seed(1)
    conv, weight, bias = torch.randn(17, 16, 3, 3) / 12, 1 + torch.rand(16), torch.randn(16)
    leaves = [t.to(x.dtype).requires_grad_() for t in (x, conv, weight, bias)]
    mean, var = torch.zeros(16, dtype=x.dtype), torch.ones(16, dtype=x.dtype)
    x, conv, weight, bias = leaves
    if eager:
        out = F.conv2d(F.relu(F.batch_norm(x, mean, var, weight, bias, True)), conv, padding=1)
    else:
        out = ops.bn_relu_conv(x, conv, ops.Norm(weight, bias, mean, var, torch.tensor(0), group=group))
    gradients = torch.autograd.grad(out, leaves, grad.to(x.dtype))
    names = ("out", "x", "conv", "weight", "bias", "mean", "var")
    return dict(zip(names, (out.detach(), *gradients, mean, var), strict=True))


def pooled(x: Tensor, grad: Tensor, group: str = "", eager: bool = False) -> dict[str, Tensor]:
    """The same of an average behind BatchNorm and ReLU."""
    torch.manual_seed(1)
    leaves = [t.to(x.dtype).requires_grad_() for t in (x, 1 + torch.rand(16), torch.randn(16))]
    mean, var = torch.zeros(16, dtype=x.dtype), torch.ones(16, dtype=x.dtype)
    x, weight, bias = leaves
    if eager:
        out = F.avg_pool2d(F.relu(F.batch_norm(x, mean, var, weight, bias, True)), 2)
    else:
        out = ops.bn_relu_pool(x, ops.Norm(weight, bias, mean, var, torch.tensor(0), group=group))
    gradients = torch.autograd.grad(out, leaves, grad[:, :16, :3, :2].to(x.dtype))
    return dict(zip(("out", "x", "weight", "bias", "mean", "var"), (out.detach(), *gradients, mean, var), strict=True))


BEHIND_NORM = {"convolved": convolved, "pooled": pooled}


def images_and_gradient() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(sum(SIZES), 16, 6, 5, dtype=torch.float64)
    x[: SIZES[0]] = 2 * x[: SIZES[0]] + 1
    return x, torch.randn(sum(SIZES), 17, 6, 5, dtype=torch.float64)


def norm_worker(rank: int, folder: str, what: str, backend: str, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        part = slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], None)
        x, grad = (t[part] for t in images_and_gradient())
        x = x.to(dtype, memory_format=torch.channels_last)
        with dispatch.use(backend):
            found = BEHIND_NORM[what](x, grad, dist.group.WORLD.group_name)
        for key in sorted(found.keys() & {"conv", "weight", "bias"}):
            dist.all_reduce(found[key])
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("what", BEHIND_NORM)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_norms_of_two_processes(backend: str, what: str, tmp_path: Path) -> None:
    dtype, tolerance = (torch.float64, 1e-9) if backend == "reference" else (torch.float32, 1e-3)
    torch.multiprocessing.spawn(norm_worker, (str(tmp_path), what, backend, dtype), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = BEHIND_NORM[what](*images_and_gradient(), eager=True)
    for key in ("out", "x"):
        together = torch.cat([part.pop(key) for part in parts])
        torch.testing.assert_close(together.double(), expected.pop(key), rtol=tolerance, atol=tolerance)
    for part in parts:
        for key, value in expected.items():
            torch.testing.assert_close(part[key].double(), value, rtol=tolerance, atol=tolerance)


LIBRARIES: dict[str, Callable[[], nn.Module]] = {
    "DenseNet": lambda: network(
        "torchvision.DenseNet", growth_rate=8, block_config=(2, 2), num_init_features=16, bn_size=2
    ),
    "ResNet": lambda: network(
        "torchvision.ResNet", block=library("torchvision.models.resnet").Bottleneck, layers=(1, 1, 1, 1)
    ),
}
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "synchronised": nn.SyncBatchNorm.convert_sync_batchnorm,
    "fused": rkfast.fuse,
    "wrapped": nn.parallel.DistributedDataParallel,
}
# DistributedDataParallel refuses to wrap a CPU's SyncBatchNorms, but not that they come later.
ORDERS = ("wrapped synchronised fused", "wrapped fused synchronised", "fused wrapped synchronised")


def of_library(name: str) -> nn.Module:
    torch.manual_seed(0)
    return LIBRARIES[name]().double()


def library_worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        part = slice(0, SIZES[0]) if rank == 0 else slice(SIZES[0], None)
        images, labels = (t[part] for t in synced_batch())
        found = {}
        for name in LIBRARIES:
            with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
                nn.SyncBatchNorm.convert_sync_batchnorm(of_library(name))(images)
            for order in ORDERS:
                model = of_library(name)
                for wrapper in order.split():
                    model = WRAPPERS[wrapper](model)
                found[name, order] = stepped(model, images, labels)
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_networks_of_libraries(tmp_path: Path) -> None:
    """Fused, with SyncBatchNorm (which stock PyTorch has for GPUs alone) and in DistributedDataParallel."""
    library("torchvision")
    torch.multiprocessing.spawn(library_worker, (str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in LIBRARIES:
        expected = stepped(of_library(name), *synced_batch())
        together = {key: expected.pop(key) for key in ("trained", "evaluated")}
        for order in ORDERS:
            found = [part[name, order] for part in parts]
            for key, value in together.items():
                torch.testing.assert_close(torch.cat([f.pop(key) for f in found]), value, rtol=1e-9, atol=1e-9)
            for one in found:
                assert len(one) == len(expected)
                for key, value in one.items():
                    # The wrapper takes the mean of the processes' gradients.
                    value = 2 * value if key.startswith("gradient") else value
                    torch.testing.assert_close(value, expected[key.replace("module.", "")], rtol=1e-9, atol=1e-9)
