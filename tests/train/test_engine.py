"""The engine: a training that goes on is the one that was never interrupted, alone and shared by two processes."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import rkfast
from rkfast.train import checkpoint, engine, log
from rkfast.train.recipes import Recipe
from tests import libraries
from tests.package.process import python
from tests.train import tiny

libraries.prepare()  # torchmetrics imports torchvision
for package in ("safetensors", "torchmetrics"):
    pytest.importorskip(package)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "load", tiny.load)
    torch.set_num_threads(1)


def train(out: Path, recipe: Recipe | None = None, **options: Any) -> engine.Result:
    return engine.train(recipe or tiny.recipe(), out, device="cpu", **options)


class Killed(BaseException):
    pass


def killed(out: Path, at: int, monkeypatch: pytest.MonkeyPatch, recipe: Recipe, **options: Any) -> None:
    """A training that ends before its step ``at``."""
    right = engine._Run._train

    def wrong(self: Any, images: Tensor, labels: Tensor) -> None:
        if self.step == at:
            raise Killed
        right(self, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(engine._Run, "_train", wrong)
        with pytest.raises(Killed):
            train(out, recipe, **options)


def same(first: Path, second: Path) -> None:
    for name in ("model.safetensors", log.METRICS, log.CSV):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    last = [checkpoint.newest(out) for out in (first, second)]
    assert last[0] is not None and last[1] is not None
    torch.testing.assert_close(last[0].tensors, last[1].tensors, rtol=0, atol=0)
    kept = [{**found.state, "seconds": None} for found in last if found is not None]
    assert kept[0] == kept[1]


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("resnet-8", {}, {}),
    "stock": ("resnet-8", {}, {"fused": "off", "channels_last": False}),
    "dropout": ("erknet-2x1_1x1-b", {"growth_rate": 4, "drop_rate": 0.3}, {}),
    "dropout of a clique": ("irknet-2x1_2x1-ab", {"growth_rate": 4, "drop_rate": 0.3}, {"accumulate": 2}),
    "controller": ("tsc_resnet-8", {}, {"accumulate": 4}),
    "learned": ("ho_resnet-10", {"width": 4, "method": "rk4", "learn": ["a", "b", "h"]}, {"ema": 0.9}),
    "time": ("rknet-1x2_1x2", {"growth_rate": 4, "methods": "erk", "time_channel": True}, {}),
    "bf16": ("resnet-8", {}, {"amp": "bf16"}),
    "fp16": ("resnet-8", {}, {"amp": "fp16", "ema": 0.5}),
    # Without workers the augmentation of the last image would seed the network, too.
    "dropout with workers": ("densenet-10", {"growth_rate": 4, "drop_rate": 0.3}, {"workers": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_goes_on_to_the_last_bit(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made, options = CASES[case]
    recipe = tiny.recipe(model, made, epochs=2)
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    train(alone, recipe, every=2, **options)
    killed(stopped, 3, monkeypatch, recipe, every=2, **options)  # behind a checkpoint within an epoch
    killed(stopped, 6, monkeypatch, recipe, **options)  # of which an epoch's end is the last checkpoint
    killed(stopped, 11, monkeypatch, recipe, every=2, **options)
    result = train(stopped, recipe, every=2, **options)
    same(alone, stopped)
    assert [row["epoch"] for row in result.rows] == [1, 2]


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    train(tmp_path / "none", workers=0)
    train(tmp_path / "two", workers=2)
    same(tmp_path / "none", tmp_path / "two")


def test_another_seed_is_another_training(tmp_path: Path) -> None:
    rows = [train(tmp_path / str(seed), seed=seed).rows for seed in (0, 1)]
    assert rows[0][0]["train_loss"] != rows[1][0]["train_loss"]


def test_it_is_the_plain_loop(tmp_path: Path) -> None:
    """Same batches, same weights, by the usual lines of PyTorch."""
    recipe = tiny.recipe(augment=None)
    result = train(tmp_path, recipe)
    torch.manual_seed(0)
    model = rkfast.create_model("resnet-8", num_classes=tiny.CLASSES, in_chans=1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3], gamma=0.1)
    data = tiny.load("tiny")
    batches = engine.Batches(data.train, 16, 0)
    for epoch in range(3):
        losses = []
        for step in range(epoch * batches.steps, (epoch + 1) * batches.steps):
            images, labels = batches[step]
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        assert result.rows[epoch]["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert [row["lr"] for row in result.rows] == pytest.approx([0.05, 0.05, 0.005])
    torch.testing.assert_close(result.model.state_dict(), model.state_dict(), rtol=0, atol=0)
    model.eval()
    with torch.no_grad():
        images, labels = (torch.stack([torch.as_tensor(pair[i]) for pair in data.test]) for i in range(2))  # type: ignore[attr-defined]
        answers = model(images)
    wrong = 100 * (answers.argmax(1) != labels).double().mean().item()
    fifth = 100 * (answers.topk(5).indices != labels[:, None]).all(1).double().mean().item()
    last = result.rows[-1]
    assert last["test_error"] == pytest.approx(wrong, abs=1e-4)
    assert last["test_error5"] == pytest.approx(fifth, abs=1e-4)
    assert last["test_loss"] == pytest.approx(F.cross_entropy(answers, labels).item(), rel=1e-5)
    assert result.error == last["test_error"] and result.best == min(row["test_error"] for row in result.rows)


def test_an_epoch_is_every_image_once() -> None:
    data = tiny.load("tiny").train
    whole = engine.Batches(data, 16, 0)
    halves = [engine.Batches(data, 16, 0, rank, 2) for rank in range(2)]
    orders = []
    for epoch in range(2):
        steps = range(epoch * whole.steps, (epoch + 1) * whole.steps)
        order = whole._epoch(epoch)[0][:96]
        assert len(set(order)) == 96
        orders.append(order)
        for step in steps:
            parts = [half[step] for half in halves]
            images, labels = (torch.cat([part[i] for part in parts]) for i in range(2))
            torch.testing.assert_close((images, labels), whole[step], rtol=0, atol=0)
    assert orders[0] != orders[1]


def test_augmentation_is_another_in_each_epoch() -> None:
    batches = engine.Batches(tiny.Images(16, augmented=True), 16, 0)
    looks = []
    for epoch in range(2):
        images, _ = batches[epoch]
        looks.append(images[torch.tensor(batches._epoch(epoch)[0]).argsort()])
    assert not torch.isclose(looks[0], looks[1]).flatten(1).all(1).any()
    noise = (looks[0] - looks[1]).flatten(1)
    assert len(noise.unique(dim=0)) == 16  # nor the same for any two images


def test_accumulated_gradients_are_those_of_the_batch(tmp_path: Path) -> None:
    """Of a network without BatchNorm, which sees a batch and not a micro-batch."""

    def build(*_: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(tiny.SIZE**2, tiny.CLASSES))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "build", build)
        rows = [train(tmp_path / str(n), accumulate=n).rows for n in (1, 4)]
    for one, four in zip(*rows, strict=True):
        assert one["train_loss"] == pytest.approx(four["train_loss"], rel=1e-5)
        assert one["train_error"] == four["train_error"]


def test_ema_is_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    right = engine._Run._train

    def watched(self: Any, images: Tensor, labels: Tensor) -> None:
        right(self, images, labels)
        seen.append({k: v.clone() for k, v in self.model.state_dict().items()})

    monkeypatch.setattr(engine._Run, "_train", watched)
    result = train(tmp_path, ema=0.75)
    expected = {k: v.double() for k, v in seen[0].items() if v.is_floating_point()}
    for state in seen[1:]:
        expected = {k: 0.75 * v + 0.25 * state[k].double() for k, v in expected.items()}
    for key, value in expected.items():
        torch.testing.assert_close(result.model.state_dict()[key].double(), value, rtol=1e-4, atol=1e-6)
    assert result.error == result.rows[-1]["ema_error"] != result.rows[0]["test_error"]
    assert result.best == min(row["ema_error"] for row in result.rows)


def test_what_a_run_leaves(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    result = train(tmp_path, tiny.recipe("tsc_resnet-8"), every=2, keep=1)
    assert torch.equal(torch.get_rng_state(), before)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == result.rows and [row["step"] for row in rows] == [6, 12, 18]
    assert len(rows[0]["step_sizes"]) == 3
    speed = [json.loads(line) for line in (tmp_path / "speed.jsonl").read_text().splitlines()]
    assert all(row["images_per_second"] * row["seconds"] == pytest.approx(96) for row in speed)
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["test_loss"]) for row in table] == [row["test_loss"] for row in rows]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    images = torch.randn(3, 1, 8, 8)
    loaded = rkfast.from_pretrained(tmp_path)
    data = tiny.load("tiny")
    for network in (loaded, engine.trained(tmp_path, data)):
        torch.testing.assert_close(network(images), result.model(images), rtol=0, atol=0)
    run = engine.described(tmp_path)
    assert run.recipe == tiny.recipe("tsc_resnet-8") and run.settings["seed"] == 0


def test_the_best_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter((50.0, 10.0, 30.0))
    right = engine.evaluate
    monkeypatch.setattr(engine, "evaluate", lambda *a: {**right(*a), "error": next(errors)})
    result = train(tmp_path, every=2, keep=1)
    assert (result.error, result.best) == (30.0, 10.0)
    assert [int(path.name) for path in checkpoint.paths(tmp_path)] == [12, 18]
    found = checkpoint.read(checkpoint.at(tmp_path, 12)).tensors["model"]
    data = tiny.load("tiny")
    torch.testing.assert_close(engine.trained(tmp_path, data, weights="best").state_dict(), found, rtol=0, atol=0)
    last = engine.trained(tmp_path, data).state_dict()
    torch.testing.assert_close(last, result.model.state_dict(), rtol=0, atol=0)
    assert not torch.equal(last["fc.weight"], found["fc.weight"])


def test_a_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(tmp_path)
    monkeypatch.setattr(engine._Run, "_train", lambda *_: pytest.fail("trained"))
    again = train(tmp_path)
    assert (again.rows, again.error, again.best) == (first.rows, first.error, first.best)


@pytest.mark.parametrize("damaged", (1, 9))
def test_behind_damaged_checkpoints_it_goes_on_from_an_older_one(damaged: int, tmp_path: Path) -> None:
    alone, other = tmp_path / "alone", tmp_path / "other"
    train(alone)
    train(other, every=2)
    for path in checkpoint.paths(other)[-damaged:]:
        (path / "model.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="is damaged: the checksum of model.safetensors is another"):
        train(other)
    same(alone, other)


def test_a_torn_line_of_the_log_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, other = tmp_path / "alone", tmp_path / "other"
    train(alone)
    killed(other, 8, monkeypatch, tiny.recipe())
    with open(other / log.METRICS, "a") as file:
        file.write('{"epoch": 2, "step"')
    train(other)
    same(alone, other)
    (other / log.METRICS).write_text("nothing\n" + (other / log.METRICS).read_text())
    with pytest.raises(ValueError, match=r"metrics.jsonl:1 is damaged"):
        train(other)


def test_it_starts_again(tmp_path: Path) -> None:
    train(tmp_path)
    result = train(tmp_path, tiny.recipe(epochs=1), seed=3, resume=False)
    assert len(result.rows) == 1
    assert [path.name for path in checkpoint.paths(tmp_path)] == ["00000006"]


@pytest.mark.parametrize(
    ("values", "options", "message"),
    (
        ({}, {"seed": 1}, "seed: the run in .* has 0, and now it is 1; take another folder"),
        ({}, {"amp": "bf16"}, "amp: the run in"),
        ({"lr": 0.1}, {}, "lr: the run in .* has 0.05, and now it is 0.1"),
        ({"drops": (0.7,)}, {}, r"drops: the run in .* has \[0.5, 0.9\]"),
    ),
)
def test_another_training_does_not_go_on_there(
    values: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tmp_path, 7, monkeypatch, tiny.recipe())
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=message):
        train(tmp_path, tiny.recipe(**values), **options)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("values", "options", "message"),
    (
        ({}, {"accumulate": 0}, "accumulate: expected at least 1, got 0"),
        ({}, {"accumulate": 3}, "batch: 16 images cannot be shared evenly by 1 processes with 3 micro-batches"),
        ({}, {"every": 0}, "every: expected at least 1"),
        ({}, {"keep": 0}, "keep: expected at least 1"),
        ({}, {"ema": 1.0}, "ema: expected a decay between 0 and 1"),
        ({}, {"amp": "fp8"}, "amp: expected one of fp32, bf16, fp16, got 'fp8'"),
        ({}, {"fused": True}, "fused: expected one of auto, off, got True"),
        ({"batch": 101}, {}, "batch: 101 images are more than the 100 of cifar10"),
        ({"model": "resnet-9"}, {}, "name: depth"),
    ),
)
def test_what_is_refused(values: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", tiny.recipe(**values), **options)
    assert not (tmp_path / "run").exists()


def test_devices_and_types_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device: 'tpu' is not one, or not here"):
        engine.train(tiny.recipe(), tmp_path, device="tpu")
    with pytest.raises(TypeError, match="recipe: expected a Recipe, got str"):
        engine.train("digits", tmp_path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="workers: expected an int, got bool"):
        train(tmp_path, workers=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out: .*file cannot be written"):
        train(tmp_path / "file")


def test_checkpoints_that_are_of_who_knows_what(tmp_path: Path) -> None:
    train(tmp_path)
    (tmp_path / engine.RUN).unlink()
    with pytest.raises(ValueError, match=r"has checkpoints and no run\.json"):
        train(tmp_path)


def test_a_loss_that_is_no_longer_finite(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"the loss is (inf|nan) in epoch 1 of tiny; lower the learning rate of 1e"):
        train(tmp_path, tiny.recipe(lr=1e6, weight_decay=1e3))
    assert (tmp_path / log.METRICS).read_text() == ""


def test_compiled(tmp_path: Path) -> None:
    recipe = tiny.recipe(augment=None, epochs=1)
    rows = [train(tmp_path / str(how), recipe, compile=how).rows[0] for how in (False, True)]
    assert rows[0]["train_loss"] == pytest.approx(rows[1]["train_loss"], rel=1e-3)
    train(tmp_path / "True", recipe, compile=True)  # keys are those of the network itself


needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
SHARED = tiny.recipe(batch=32, lr=0.01)
SYNCED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "residual": ("resnet-8", {}, {}),
    "dense": ("erknet-2x1_1x1-b", {"growth_rate": 4}, {"ema": 0.9}),
    "controller": ("tsc_resnet-8", {}, {}),
}


def network(model: str, made: dict[str, Any]) -> Recipe:
    return dataclasses.replace(SHARED, model=model, options=made)


PROCESSES = engine._processes


@contextlib.contextmanager
def unwrapped(device: torch.device) -> Iterator[tuple[int, int]]:
    """The processes' group, which nothing of a training may hold when it is left."""
    with PROCESSES(device) as found:
        yield found
        assert not any(isinstance(kept, nn.parallel.DistributedDataParallel) for kept in gc.get_objects())


def worker(rank: int, folder: Path) -> None:
    """Everything that two processes do here, as it takes them long to start."""
    torch.set_num_threads(1)
    engine.load = tiny.load  # type: ignore[assignment]
    engine._processes = unwrapped
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for name, (model, made, options) in SYNCED.items():
            result = train(folder / name, network(model, made), sync_batchnorm=True, **options)
            torch.save(result.model.state_dict(), folder / f"{name}{rank}.pt")
        train(folder / "begun alone", SHARED, sync_batchnorm=True)
        train(folder / "local", SHARED, every=2)
        with pytest.MonkeyPatch.context() as patch:
            killed(folder / "stopped", 2, patch, SHARED, every=1)
            killed(folder / "stopped", 5, patch, SHARED, every=2)
        train(folder / "stopped", SHARED, every=2)
        train(folder / "parts", SHARED, accumulate=2)
        with pytest.raises(ValueError, match="sync_batchnorm: on a CPU PyTorch has none"):
            train(folder / "refused", SHARED, sync_batchnorm=True, fused="off")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what two processes trained."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "load", tiny.load)
        killed(folder / "begun alone", 4, patch, SHARED, every=2, sync_batchnorm=True)
    torch.multiprocessing.spawn(worker, (folder,), nprocs=2)
    return folder


def close(run: Path, alone: engine.Result) -> None:
    for row, expected in zip(log.read(run / log.METRICS), alone.rows, strict=True):
        for key in ("train_loss", "test_loss"):
            assert row[key] == pytest.approx(expected[key], rel=1e-4), key


@needs_gloo
@pytest.mark.parametrize("case", SYNCED)
def test_two_processes_follow_one(case: str, two: Path, tmp_path: Path) -> None:
    model, made, options = SYNCED[case]
    expected = train(tmp_path, network(model, made), **options)
    close(two / case, expected)
    states = [torch.load(two / f"{case}{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    assert rkfast.from_pretrained(two / case).config == expected.model.config


@needs_gloo
def test_two_processes_go_on_where_one_stopped(two: Path, tmp_path: Path) -> None:
    close(two / "begun alone", train(tmp_path, SHARED))


@needs_gloo
def test_two_processes_go_on_to_the_last_bit(two: Path) -> None:
    same(two / "local", two / "stopped")


@needs_gloo
def test_two_processes_test_the_network_that_is_kept(two: Path) -> None:
    """Not one with statistics of its own on each."""
    data = tiny.load("tiny")
    batches = torch.utils.data.DataLoader(data.test, batch_size=10)
    model = engine.trained(two / "local", data).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = engine.evaluate(model, batches, data.classes, torch.device("cpu"))
    last = log.read(two / "local" / log.METRICS)[-1]
    assert found == pytest.approx({key: last[f"test_{key}"] for key in found}, rel=1e-5, abs=1e-4)


@needs_gloo
def test_without_synchronised_statistics_they_do_not_follow(two: Path, tmp_path: Path) -> None:
    expected = train(tmp_path, SHARED).rows[0]["train_loss"]
    for run in ("local", "parts"):
        assert log.read(two / run / log.METRICS)[0]["train_loss"] != pytest.approx(expected, rel=1e-4)


@needs_gloo
def test_torchrun_and_the_command(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    command = (
        "-m torch.distributed.run --standalone --nproc-per-node 2 -m tests.command train --epochs 1 --lr 0.01 --seed 5"
    )
    out = python(*command.split(), "--device", "cpu", "--out", str(tmp_path), OMP_NUM_THREADS="1")
    assert out.count("wrote") == 1
    assert len(log.read(tmp_path / log.METRICS)) == 1
