"""The loop that trains a recipe's network, on one process or, under torchrun, on many.

What a step does is a function of recipe, seed and the step alone: the order of the images and the random numbers of
their augmentation are drawn from (seed, epoch), those of the network (dropout) from (seed, step, process). So a
training that goes on from a checkpoint is the one that was never interrupted; on a CPU to the last bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

import rkfast
from rkfast import tsc
from rkfast.extras import require
from rkfast.files import replacing
from rkfast.models import RKNet, create_model, save_pretrained
from rkfast.models.pretrained import WEIGHTS
from rkfast.nn import TimePeriod
from rkfast.train import checkpoint
from rkfast.train.checkpoint import Checkpoint
from rkfast.train.data import Data, load
from rkfast.train.lock import locked
from rkfast.train.log import Log
from rkfast.train.recipes import Recipe

RUN = "run.json"
AMP = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
FUSED = ("auto", "off")
WHICH = ("last", "best")
TOP = 5
# Of run.json, what may be another when a run goes on.
FREE = ("rkfast", "torch", "root")


class Result(NamedTuple):
    """What ``train`` returns: the folder of the run; its network, in eval mode on the CPU, of the averages if there are
    any; the rows of metrics.jsonl (none but on the first process); the network's test error in %, and that of the best
    epoch."""

    out: Path
    model: nn.Module
    rows: list[dict[str, Any]]
    error: float
    best: float


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """A process's part of each step's batch, by the number of the step since the training began.

    Every epoch has an order of its own; its last images that fill no batch are left out. An image's augmentation draws
    from torch's global generator, seeded for its place in the epoch: the same with any number of workers and processes.
    ``random`` False spares that where images are as they are.
    """

    def __init__(
        self, data: Dataset[Any], batch: int, seed: int, rank: int = 0, world: int = 1, *, random: bool = True
    ) -> None:
        self.data, self.batch, self.seed, self.random = data, batch, seed, random
        self.images = len(data)  # type: ignore[arg-type]
        self.steps = self.images // batch
        self.part = slice(rank * batch // world, (rank + 1) * batch // world)
        self._order: tuple[int, list[int], list[int]] = (-1, [], [])

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, at = divmod(step, self.steps)
        order, seeds = self._epoch(epoch)
        items = []
        for place in range(at * self.batch, (at + 1) * self.batch)[self.part]:
            if self.random:
                torch.default_generator.manual_seed(seeds[place])
            items.append(self.data[order[place]])
        images, labels = default_collate(items)
        return images, labels

    def _epoch(self, epoch: int) -> tuple[list[int], list[int]]:
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(_seed(self.seed, "order", epoch))
            order = torch.randperm(self.images, generator=generator).tolist()
            seeds = torch.randint(2**32, (self.images,), generator=generator).tolist()
            self._order = epoch, order, seeds
        return self._order[1:]


def _seed(*parts: Any) -> int:
    """Of an independent stream for each list of parts. torch's CPU generator reads the low 32 bits."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")


def build(recipe: Recipe, data: Data, fused: str = "auto") -> nn.Module:
    """The recipe's network for the data, of fused operations or with ``fused="off"`` of stock PyTorch's."""
    options = {"num_classes": data.classes, "in_chans": data.channels, **recipe.options}
    return create_model(recipe.model, fused=fused == "auto", **options)


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    root: str | Path | None = None,
    seed: int = 0,
    fused: str = "auto",
    compile: bool | str = False,
    amp: str = "fp32",
    channels_last: bool = True,
    accumulate: int = 1,
    ema: float | None = None,
    sync_batchnorm: bool = False,
    workers: int = 0,
    keep: int = 2,
    resume: bool = True,
    download: bool = False,
    every: int | None = None,
    device: str | torch.device | None = None,
) -> Result:
    """Train a recipe's network, with checkpoints and logs in the folder ``out``; go on where a run there stopped.

    Under torchrun the processes share each batch, with DistributedDataParallel over gloo on a CPU and NCCL on GPUs;
    only the first one writes, and only its ``out`` is read. The loss is the mean cross entropy of a batch; gradients of
    all processes and micro-batches are averaged.

    ``out`` has at the end ``model.safetensors`` and ``config.json`` for ``rkfast.from_pretrained``, the files of
    ``rkfast.train.log``, run.json with the recipe and the arguments, and in ``checkpoints`` the last ones and the best.

    Args:
        recipe: network, data and schedule; its batch is that of all processes and micro-batches together.
        out: folder of the run, made if missing.
        root, download: of ``rkfast.train.data.load``.
        seed: of weights, order of the images, augmentation and dropout.
        fused: "auto" or "off", stock PyTorch operations.
        compile: let torch.compile have the network; a str is its mode, such as "reduce-overhead" for CUDA graphs.
        amp: "fp32", or autocast with "bf16" or "fp16", the latter with a scaled loss.
        channels_last: layout of network and images.
        accumulate: micro-batches of a step.
        ema: decay of an exponential moving average of weights and buffers, which is then the trained network.
        sync_batchnorm: statistics over all processes, on a CPU too where the network is fused.
        workers: processes that load images.
        keep: checkpoints kept, besides the best.
        resume: False starts again, and removes what a run left in ``out``.
        every: steps between checkpoints; one is written behind each epoch in any case.
        device: None is a GPU where there is one (under torchrun that of LOCAL_RANK), else the CPU.

    Returns:
        A Result.

    Needs the extra: ``pip install 'rkfast[train]'``.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or value, the data cannot be read, or ``out`` has another
            run, or one that another process trains. Nothing in it is changed then.
        RuntimeError: the loss is no longer finite.
        MissingExtra: a package of the extra is not installed.
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe: expected a Recipe, got {type(recipe).__name__}; see rkfast.train.recipes.recipe")
    out = Path(out)
    _whole("seed", seed, 0)
    _whole("accumulate", accumulate, 1)
    _whole("workers", workers, 0)
    _whole("keep", keep, 1)
    if every is not None:
        _whole("every", every, 1)
    _choice("fused", fused, FUSED)
    _choice("amp", amp, AMP)
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"ema: expected a decay between 0 and 1, such as 0.999, got {ema}")
    require("safetensors", "train")
    require("torchmetrics", "train")
    settings = dict(
        seed=seed,
        fused=fused,
        compile=compile,
        amp=amp,
        channels_last=channels_last,
        accumulate=accumulate,
        ema=ema,
        sync_batchnorm=sync_batchnorm,
    )
    place = _device(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([place] if place.type == "cuda" else []))
        rank, world = stack.enter_context(_processes(place))
        if recipe.batch % (world * accumulate):
            raise ValueError(
                f"batch: {recipe.batch} images cannot be shared evenly by {world} processes with {accumulate} "
                "micro-batches each"
            )
        if sync_batchnorm and world > 1 and place.type == "cpu" and (fused == "off" or compile):
            raise ValueError(
                "sync_batchnorm: on a CPU PyTorch has none, nor under torch.compile; take fused='auto' and no compile"
            )
        data = _loaded(recipe, root, download, rank, world)
        batches = Batches(data.train, recipe.batch, seed, rank, world, random=recipe.augment is not None)
        if not batches.steps:
            raise ValueError(f"batch: {recipe.batch} images are more than the {batches.images} of {recipe.data}")
        torch.manual_seed(seed)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = build(recipe, data, fused).to(place, memory_format=layout)  # type: ignore[call-overload]
        found = None
        if rank == 0:
            said = {**settings, "root": None if root is None else str(root)}
            try:
                stack.enter_context(locked(out))
                found = _prepared(out, recipe, said, resume)
            except OSError as error:
                raise ValueError(f"out: {out} cannot be written: {error.strerror}") from error
        if world > 1:
            told = [found]
            dist.broadcast_object_list(told, device=place)
            found = told[0]
        run = _Run(recipe, out, data, batches, model, place, rank, world, settings, workers, keep, every, found)
        return run()


class _Run:
    """A training between its start, or a checkpoint, and its end."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        data: Data,
        batches: Batches,
        model: nn.Module,
        device: torch.device,
        rank: int,
        world: int,
        settings: dict[str, Any],
        workers: int,
        keep: int,
        every: int | None,
        found: Checkpoint | None,
    ) -> None:
        self.recipe, self.out, self.batches, self.model, self.device = recipe, out, batches, model, device
        self.rank, self.world, self.settings, self.keep, self.every = rank, world, settings, keep, every
        self.data = data
        self.layout = torch.channels_last if settings["channels_last"] else torch.contiguous_format
        amp = AMP[settings["amp"]]
        self.autocast: Any = contextlib.nullcontext() if amp is None else torch.autocast(device.type, amp)
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda epoch: recipe.factor ** sum(epoch >= drop for drop in recipe.milestones)
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings["amp"] == "fp16")
        self.average: AveragedModel | None = None
        if settings["ema"] is not None:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings["ema"]), use_buffers=True)
        self.step = 0
        self.total = recipe.epochs * batches.steps
        # Of this epoch: loss and which answers are wrong of each micro-batch, and the sums of those counted before.
        self.fresh: list[tuple[Tensor, Tensor]] = []
        self.loss, self.wrong = 0.0, 0.0
        self.seconds = 0.0  # of training in this epoch
        self.best: dict[str, Any] | None = None
        if found is not None:
            self._restore(found)
        self.stepped = self._wrapped()
        options = dict(batch_size=None, num_workers=workers, pin_memory=device.type == "cuda")
        self.loader = DataLoader(batches, sampler=range(self.step, self.total), **options)  # type: ignore[arg-type]
        part = Subset(data.test, range(rank, len(data.test), world))  # type: ignore[arg-type]
        options |= dict(batch_size=recipe.batch // world, persistent_workers=workers > 0)
        self.tests = DataLoader(part, **options)  # type: ignore[arg-type]

    def _wrapped(self) -> Any:
        stepped: Any = self.model
        if self.world > 1:
            sync = self.settings["sync_batchnorm"]
            stepped = nn.parallel.DistributedDataParallel(
                self.model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=not sync,
            )
            if sync:  # behind the wrapping, which on a CPU refuses a network that has it
                stepped.module = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        if mode := self.settings["compile"]:
            stepped = torch.compile(stepped, mode=mode if isinstance(mode, str) else None)
        return stepped

    def __call__(self) -> Result:
        log = Log(self.out, self.step, self.total, self.recipe.name) if self.rank == 0 else None
        try:
            self.model.train()
            start = time.perf_counter()
            for images, labels in self.loader:
                self._train(images, labels)
                self.step += 1
                epoch, at = divmod(self.step, self.batches.steps)
                if at == 0:
                    self._end_epoch(epoch, start, log)
                elif self.every is not None and self.step % self.every == 0:
                    self._save(self.seconds + time.perf_counter() - start)
                if log is not None:
                    log.step(self.step, epoch + 1)
                if at == 0:
                    start = time.perf_counter()
            rows = log.rows if log is not None else []
        finally:
            # DistributedDataParallel must not be the last that holds the process group: it would end it holding
            # Python's lock, which a thread of Gloo's may be waiting for to end its last sum.
            del self.stepped
            if log is not None:
                log.close()
        assert self.best is not None
        # Made anew, so that nothing of the training clings to it, such as SyncBatchNorm, which config.json cannot name.
        with torch.random.fork_rng([]):
            model = build(self.recipe, self.data, self.settings["fused"])
        model.load_state_dict((self.model if self.average is None else self.average.module).state_dict())
        if self.rank == 0:
            save_pretrained(model, self.out)
        return Result(self.out, model.eval(), rows, self.best["last"], self.best["error"])

    def _train(self, images: Tensor, labels: Tensor) -> None:
        images = images.to(self.device, memory_format=self.layout, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        # torch.manual_seed would also format a stack where CUDA has not started, which takes longer than all else here.
        seed = _seed(self.settings["seed"], "network", self.step, self.rank)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        self.optimizer.zero_grad()
        parts = self.settings["accumulate"]
        pairs = zip(images.chunk(parts), labels.chunk(parts), strict=True) if parts > 1 else [(images, labels)]
        for i, (x, y) in enumerate(pairs):
            more = self.world > 1 and i < parts - 1
            with self.stepped.no_sync() if more else contextlib.nullcontext():
                with self.autocast:
                    answers = self.stepped(x)
                    loss = F.cross_entropy(answers, y)
                self.scaler.scale(loss / parts if parts > 1 else loss).backward()
            # Counted later, all at once: beside a small network each further call is seen.
            self.fresh.append((loss.detach(), answers.detach().argmax(1) != y))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _end_epoch(self, epoch: int, start: float, log: Log | None) -> None:
        images = self.batches.steps * self.recipe.batch
        loss, wrong = (value / images for value in self._seen())
        self.seconds += time.perf_counter() - start
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss is {loss} in epoch {epoch} of {self.recipe.name}; lower the learning rate of "
                f"{self.recipe.lr:g}, or with fp16 take bf16"
            )
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": loss,
            "train_error": 100 * wrong,
        }
        for name, model in (("test", self.model), ("ema", self.average)):
            if model is not None:
                found = self._evaluated(model)
                # JSON has no number for what is not finite.
                row |= {f"{name}_{key}": value if math.isfinite(value) else None for key, value in found.items()}
        if sizes := step_sizes(self.model):
            row["step_sizes"] = sizes
        error = row["test_error" if self.average is None else "ema_error"]
        best = self.best
        if best is None or error < best["error"]:
            best = {"step": self.step, "epoch": epoch, "error": error}
        self.best = {**best, "last": error}
        speed = {
            "epoch": epoch,
            "step": self.step,
            "seconds": self.seconds,
            "images_per_second": images / self.seconds,
            "peak_bytes": _peak(self.device),
        }
        if log is not None:
            log.row(row, speed)
        self.schedule.step()
        self.loss = self.wrong = 0.0
        self.seconds = 0.0
        self._save(0.0)

    def _evaluated(self, model: nn.Module) -> dict[str, float]:
        if self.world > 1:  # each process has running statistics of its own
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        with self.autocast:
            return evaluate(model, self.tests, self.data.classes, self.device, self.layout)

    def _seen(self) -> list[float]:
        """Sum of the losses of this epoch's images, and how many answers were wrong, of all processes."""
        if self.fresh:
            losses, wrong = zip(*self.fresh, strict=True)
            for loss in torch.stack(losses).tolist():  # one by one, so that it does not matter when it is counted
                self.loss += loss * len(wrong[0])
            self.wrong += torch.cat(wrong).sum().item()
            self.fresh.clear()
        if self.world == 1:
            return [self.loss, self.wrong]
        seen = torch.tensor([self.loss, self.wrong], dtype=torch.float64, device=self.device)
        dist.all_reduce(seen)
        return seen.tolist()

    def _save(self, seconds: float) -> None:
        seen = self._seen()
        if self.rank:
            return
        optimizer = self.optimizer.state_dict()
        tensors = {"model": self.model.state_dict(), "optimizer": {}}
        rest: dict[str, dict[str, Any]] = {}
        for index, values in optimizer["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    tensors["optimizer"][f"{index}.{key}"] = value
                else:
                    rest.setdefault(str(index), {})[key] = value
        if self.average is not None:
            tensors["ema"] = self.average.state_dict()
        state = {
            "optimizer": {"state": rest, "param_groups": optimizer["param_groups"]},
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "seen": seen,
            "seconds": seconds,
            "best": self.best,
        }
        checkpoint.write(self.out, Checkpoint(self.step, tensors, state))
        checkpoint.prune(self.out, self.keep, None if self.best is None else self.best["step"])

    def _restore(self, found: Checkpoint) -> None:
        state = found.state
        self.step = found.step
        self.model.load_state_dict(found.tensors["model"])
        values: dict[int, dict[str, Any]] = {int(i): dict(rest) for i, rest in state["optimizer"]["state"].items()}
        parameters = list(self.model.parameters())
        for name, tensor in found.tensors["optimizer"].items():
            index, _, key = name.partition(".")
            like = parameters[int(index)]
            if tensor.shape == like.shape:  # in the layout of its parameter, in which the step is one pass
                tensor = torch.empty_like(like).copy_(tensor)
            values.setdefault(int(index), {})[key] = tensor
        self.optimizer.load_state_dict({"state": values, "param_groups": state["optimizer"]["param_groups"]})
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(found.tensors["ema"])
        if self.rank == 0:  # the sums are of all processes
            self.loss, self.wrong = state["seen"]
        self.seconds = state["seconds"]
        self.best = state["best"]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    classes: int,
    device: torch.device,
    layout: torch.memory_format = torch.channels_last,
) -> dict[str, float]:
    """What a classifier makes of images, in eval mode: ``loss``, the mean cross entropy; ``error`` and ``error5``, how
    many % of the labels are not the first, nor among the first five answers (all answers where they are fewer); and
    ``calibration``, the expected calibration error in %, of 15 bins. Of all processes' batches in a group."""
    classification = require("torchmetrics.classification", "train")
    options: dict[str, Any] = dict(num_classes=classes, validate_args=False)
    loss = require("torchmetrics", "train").MeanMetric(nan_strategy="disable").to(device)
    metrics = {
        "error": classification.MulticlassAccuracy(**options, average="micro").to(device),
        "error5": classification.MulticlassAccuracy(**options, average="micro", top_k=min(TOP, classes)).to(device),
        "calibration": classification.MulticlassCalibrationError(**options).to(device),
    }
    training = model.training
    model.eval()
    for images, labels in batches:
        images = images.to(device, memory_format=layout, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        answers = model(images).float()
        loss.update(F.cross_entropy(answers, labels, reduction="none"))
        probabilities = answers.softmax(1)
        for metric in metrics.values():
            metric.update(probabilities, labels)
    model.train(training)
    found = {name: 100 * metric.compute().item() for name, metric in metrics.items()}
    return {
        "loss": loss.compute().item(),
        "error": 100 - found["error"],
        "error5": 100 - found["error5"],
        "calibration": found["calibration"],
    }


def step_sizes(model: nn.Module) -> dict[str, float]:
    """Mean step size of each block of a network with controllers, of each step of one with a time channel; of others
    nothing."""
    if hasattr(model, "tsc"):
        return {block.name: block.mean for block in tsc.steps(model).blocks}
    if isinstance(model, RKNet) and any(isinstance(period, TimePeriod) for period in model.periods):
        sizes = model.step_sizes()
        return {f"period {p}, step {n}": size for p, period in enumerate(sizes, 1) for n, size in enumerate(period, 1)}
    return {}


class Run(NamedTuple):
    """What a folder of ``train`` is of: its recipe, and the other arguments."""

    recipe: Recipe
    settings: dict[str, Any]


def described(out: str | Path) -> Run:
    """What run.json in a folder says.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = Path(out, RUN)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        values = said.pop("recipe")
        return Run(Recipe(**{**values, "drops": tuple(values["drops"])}), said)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; expected the folder of a training") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def trained(out: str | Path, data: Data, *, weights: str = "last", fused: str | None = None) -> nn.Module:
    """The network of a run, in eval mode on the CPU.

    Args:
        out: the folder.
        data: of the run's recipe.
        weights: "last", those of the newest intact checkpoint; "best", those of the epoch with the least test error.
            Of a run with ``ema`` the averages.
        fused: as in ``train``; None is what the run has.

    Raises:
        ValueError: weights is neither, or there is no such checkpoint.
    """
    _choice("weights", weights, WHICH)
    recipe, settings = described(out)
    found = checkpoint.newest(Path(out))
    if found is None:
        raise ValueError(f"{out}: there is no intact checkpoint in it")
    if weights == "best" and found.state["best"] is not None:
        found = checkpoint.read(checkpoint.at(Path(out), found.state["best"]["step"]))
    tensors = found.tensors["model"]
    if "ema" in found.tensors:  # an AveragedModel's, which counts its updates besides
        tensors = {k.removeprefix("module."): t for k, t in found.tensors["ema"].items() if k.startswith("module.")}
    with torch.random.fork_rng([]):
        model = build(recipe, data, fused or settings["fused"])
    model.load_state_dict(tensors)
    return model.eval()


def _prepared(out: Path, recipe: Recipe, settings: dict[str, Any], resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from; None starts anew. The folder is then that of this run."""
    said = {"rkfast": rkfast.__version__, "torch": torch.__version__, "recipe": dataclasses.asdict(recipe), **settings}
    said = json.loads(json.dumps(said))
    found = None
    if resume and (out / RUN).is_file():
        before = described(out)
        _same(out, {"recipe": json.loads(json.dumps(dataclasses.asdict(before.recipe))), **before.settings}, said)
        found = checkpoint.newest(out)
    elif checkpoint.paths(out) and resume:
        raise ValueError(
            f"out: {out} has checkpoints and no {RUN}, so they may be another training's; take another folder"
        )
    with replacing(out / RUN) as path:
        path.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    checkpoint.forget(out, -1 if found is None else found.step)
    if found is None:
        (out / WEIGHTS).unlink(missing_ok=True)
    return found


def _same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ValueError where a run would go on as another."""
    old, new = ({**said, **said["recipe"]} for said in (before, now))
    for key in new:
        if key not in (*FREE, "recipe", "published", "source") and old.get(key) != new[key]:
            raise ValueError(
                f"{key}: the run in {out} has {old.get(key)!r}, and now it is {new[key]!r}; take another folder, or "
                "start it again with resume=False"
            )


def _loaded(recipe: Recipe, root: str | Path | None, download: bool, rank: int, world: int) -> Data:
    """The recipe's data, which only the first process of a machine downloads."""
    first = int(os.environ.get("LOCAL_RANK", rank)) == 0
    data = load(recipe.data, root, augment=recipe.augment, download=download) if first else None
    if world > 1:
        dist.barrier()
    return data or load(recipe.data, root, augment=recipe.augment)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(0, device=found)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device: {device!r} is not one, or not here: {str(error).splitlines()[0]}") from error
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


@contextlib.contextmanager
def _processes(device: torch.device) -> Iterator[tuple[int, int]]:
    """Rank and number of the processes, which torchrun tells in the environment."""
    ours = "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    finally:
        if ours:
            dist.destroy_process_group()


def _peak(device: torch.device) -> int | None:
    """Most bytes in use so far: of PyTorch's allocator on a GPU, resident ones on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")


def _choice(name: str, value: object, choices: Collection[object]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}")
