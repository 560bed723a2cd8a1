"""Callbacks that fuse when a training starts, in real trainings of a few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import rkfast
from rkfast import dispatch
from rkfast.swap.kind import Kind
from tests.libraries import library
from tests.swap.test_fuse import fused_kinds, made

STEPS, BATCH = 3, 4
Images = list[tuple[Tensor, int]]


def images() -> Images:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(3, 10, 10, generator=generator), i % 5) for i in range(STEPS * BATCH)]


def plainly_trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for x, target in DataLoader(images(), batch_size=BATCH):  # type: ignore[arg-type]
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    return model


def check(fit: Callable[[nn.Module], Any], stays_fused: bool) -> None:
    """fit trains fused, to the weights of a plain training."""
    model, stock = made("densenet"), made("densenet")
    types = [type(module) for module in model.modules()]
    calls = dispatch.served()
    fit(model)
    served = dispatch.served() - calls
    assert sum(count for (op, _), count in served.items() if op == "bn_rk_sum_backward") >= STEPS
    assert ([type(module) for module in model.modules()] == types) is not stays_fused
    expected = plainly_trained(stock).state_dict()
    assert set(model.state_dict()) == set(expected)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value.cpu(), expected[key], rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("unfuse", (False, True))
def test_lightning(unfuse: bool, tmp_path: Path) -> None:
    lightning = library("lightning")
    from rkfast.lightning import FuseCallback

    class Module(lightning.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, _: int) -> Tensor:
            assert fused_kinds(self.net)
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05)

    callback = FuseCallback(unfuse=unfuse, memory="min")  # which lives longer than the training

    def fit(net: nn.Module) -> None:
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", callbacks=[callback], logger=False,
            enable_checkpointing=True, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(Module(net), DataLoader(images(), batch_size=BATCH))  # type: ignore[arg-type]
        if not unfuse:
            assert {module._rkfast.memory for module in net.modules() if isinstance(module, Kind)} == {"min"}
        (file,) = tmp_path.rglob("*.ckpt")
        kept = torch.load(file, weights_only=True)["state_dict"]
        assert kept.keys() == Module(made("densenet")).state_dict().keys()

    check(fit, stays_fused=not unfuse)


def test_lightning_undoes_it_after_an_error() -> None:
    lightning = library("lightning")
    from rkfast.lightning import FuseCallback

    class Failing(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = made("densenet")
            rkfast.fuse(self.net.features.denseblock1)  # type: ignore[union-attr, arg-type]

        def training_step(self, batch: Any, _: int) -> Tensor:
            assert fused_kinds(self.net)["dense block"] == 2
            raise ZeroDivisionError

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05)

    module = Failing()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[FuseCallback(unfuse=True)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, DataLoader(images(), batch_size=BATCH))  # type: ignore[arg-type]
    assert fused_kinds(module.net) == {"dense block": 1}  # which was so before


@pytest.mark.parametrize("unfuse", (False, True))
def test_transformers(unfuse: bool, tmp_path: Path) -> None:
    library("accelerate")
    transformers = library("transformers")
    from rkfast.transformers import FuseCallback

    class WithLoss(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
            assert fused_kinds(self.net)
            logits = self.net(pixel_values)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def collate(batch: Images) -> dict[str, Tensor]:
        return {"pixel_values": torch.stack([x for x, _ in batch]), "labels": torch.tensor([t for _, t in batch])}

    callback = FuseCallback(unfuse=unfuse)  # which lives longer than the training

    def fit(net: nn.Module) -> None:
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=0.05,
            lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to=[], disable_tqdm=True,
            save_strategy="no", remove_unused_columns=False, train_sampling_strategy="sequential",
        )  # fmt: skip
        transformers.Trainer(
            WithLoss(net), args, collate, images(), callbacks=[callback],
            optimizers=(torch.optim.SGD(net.parameters(), 0.05), None),
        ).train()  # fmt: skip

    check(fit, stays_fused=not unfuse)


@pytest.mark.parametrize("when", ("before", "after"))
def test_accelerate(when: str) -> None:
    accelerate = library("accelerate")

    def fit(net: nn.Module) -> None:
        if when == "before":
            rkfast.fuse(net)
        accelerator = accelerate.Accelerator(cpu=True)
        data: Any = DataLoader(images(), batch_size=BATCH)  # type: ignore[arg-type]
        model, optimizer, data = accelerator.prepare(net, torch.optim.SGD(net.parameters(), 0.05), data)
        if when == "after":
            rkfast.fuse(model)
        for x, target in data:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), target))
            optimizer.step()
        assert accelerator.unwrap_model(model) is net

    check(fit, stays_fused=True)
