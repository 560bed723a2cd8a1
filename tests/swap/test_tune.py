"""rkfast.tune: what is slower becomes stock, decisions are kept and shared, and nothing else changes."""

from __future__ import annotations

import datetime
import itertools
import json
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import rkfast
from rkfast import dispatch, native
from rkfast.swap.kind import Kind
from rkfast.swap.residual import FusedBlock
from tests.libraries import network
from tests.swap.lookalikes import BasicBlock
from tests.swap.test_fuse import built, made

tuning: Any = sys.modules["rkfast.swap.tune"]  # the package's attribute is the function
X = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))
LATE = 0.01
BLOCKS = ("layer1.0", "layer1.1", "layer2.0", "layer2.1")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("RKFAST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("RKFAST_TUNE", raising=False)
    monkeypatch.setattr(tuning, "SECONDS", 0.02)
    clear = native.cache_dir.cache_clear
    clear()
    yield tmp_path / "cache"
    clear()


def late(target: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own, on which everything else takes next to no time."""
    right, now = getattr(target, name), [0.0]

    def forward(*args: Any) -> Any:
        now[0] += LATE
        return right(*args)

    def clock() -> float:
        now[0] += 1e-3
        return now[0]

    monkeypatch.setattr(target, name, forward)
    monkeypatch.setattr(tuning.time, "perf_counter", clock)


def slower(model: nn.Module) -> dict[str, str | None]:
    return {name: m._rkfast.slower for name, m in model.named_modules() if isinstance(m, Kind)}


@pytest.mark.parametrize("training", (True, False))
def test_what_is_slower_becomes_stock(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rkfast.fuse(made("resnet")).train(training)
    late(FusedBlock, "fused", monkeypatch)
    x = X.contiguous(memory_format=torch.channels_last)  # contiguous images are evaluated by the stock blocks
    state = {name: t.clone() for name, t in model.state_dict().items()}
    numbers, types = torch.get_rng_state(), [type(m) for m in model.modules()]
    with torch.set_grad_enabled(training):
        found = rkfast.tune(model, x)
    assert {name for row in found if row.reason for name in row.names} >= set(BLOCKS)
    row = next(row for row in found if row.names == ("layer1.0", "layer1.1"))
    assert row.kind == "residual block" and row.shape == (4, 8, 10, 10) and not row.cached
    assert row.fused > 1e3 * LATE > row.stock
    assert row.reason == slower(model)["layer1.1"] == f"measured slower ({row.stock / row.fused:.2f}x)"
    assert row.reason in str(rkfast.report(model)) and row.reason in str(found)
    assert "layer1.0 and 1 like it  residual block 4x8x10x10 float32" in str(found)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers)
    assert [type(m) for m in model.modules()] == types
    assert all(p.grad is None for p in model.parameters())
    begin = time.perf_counter()
    model(x)
    assert time.perf_counter() - begin < LATE  # nobody is late
    monkeypatch.undo()
    assert slower(rkfast.fuse(rkfast.unfuse(model)))["layer1.1"] is None


def test_what_is_faster_stays_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rkfast.fuse(made("resnet"))
    late(BasicBlock, "forward", monkeypatch)
    model.layer1[0]._rkfast.slower = "measured slower (0.5x)"  # type: ignore[union-attr]
    found = rkfast.tune(model, X)
    assert {name for row in found if not row.reason for name in row.names} >= set(BLOCKS)
    assert slower(model)["layer1.0"] is None


@pytest.mark.parametrize(
    ("costs", "stays"),
    (
        ((1.0, 1.0), True),
        ((1.02,), True),  # not clearly slower
        ((1.1,), False),
        ((1.1, 1.1, 0.9), True),  # not usually
        ((1.1, 1.1, 1.1, 1.1, 0.9), False),
    ),
)
def test_what_is_clearly_slower(costs: tuple[float, ...], stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of our own: milliseconds of the fused block in turn, and 1 of the stock one."""
    now, turn = [0.0], itertools.count()
    module: Any = rkfast.fuse(made("resnet")).layer1[0]  # type: ignore[union-attr,index]

    def run() -> None:
        now[0] += 1e-3 * (1.0 if module._rkfast.slower else costs[next(turn) // repeats % len(costs)])

    repeats = round(tuning.SHORTEST / 1e-3)
    monkeypatch.setattr(tuning, "_run", lambda *_: run)
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(tuning, "SECONDS", 0.25)
    stock, _, better = tuning._raced(module, X)
    assert stock == pytest.approx(1.0)
    assert better == stays
    assert module._rkfast.slower is None


@pytest.mark.parametrize(("fused", "choice"), ((1.02, "fused: slower (0.98x), but not clearly"), (0.5, "fused")))
def test_what_is_slower_and_stays_says_so(fused: float, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_raced", lambda *_: (1.0, fused, True))
    rows = str(rkfast.tune(rkfast.fuse(made("resnet")), X)).splitlines()
    assert rows and all(row.endswith(f"fused {fused:.3g} ms  {choice}") for row in rows)


def raced(module: Any, x: Tensor) -> tuple[float, float, bool]:
    return (1.0, 2.0, False) if isinstance(module, FusedBlock) else (2.0, 1.0, True)


def refuse(*_: Any) -> Any:
    raise AssertionError("timed")


def test_decisions_are_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_raced", raced)
    monkeypatch.setenv("RKFAST_TUNE", "cache")
    model = rkfast.fuse(made("resnet"))
    assert rkfast.tune(model, X) == [] and not list(folder.glob("*"))
    assert "nothing was decided" in str(rkfast.tune(model, X))
    monkeypatch.setenv("RKFAST_TUNE", "off")
    assert rkfast.tune(model, X) == []
    assert not any(slower(model).values())
    monkeypatch.delenv("RKFAST_TUNE")
    first = rkfast.tune(model, X)
    expected = slower(model)
    assert {name for name, reason in expected.items() if reason} == set(BLOCKS)

    (file,) = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    content = json.loads(file.read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert content["environment"]["rkfast"].startswith(rkfast.__version__)
    assert sorted(content["decisions"].values()) == sorted([row.stock, row.fused, not row.reason] for row in first)

    monkeypatch.setattr(tuning, "_raced", refuse)
    for how in ("", "cache"):
        monkeypatch.setenv("RKFAST_TUNE", how)
        other = rkfast.fuse(made("resnet", seed=1))
        again = rkfast.tune(other, X)
        assert again == [row._replace(cached=True) for row in first]
        assert slower(other) == expected
        assert "as decided before" in str(again)
    monkeypatch.setenv("RKFAST_TUNE", "force")
    with pytest.raises(AssertionError, match="timed"):
        rkfast.tune(other, X)


@pytest.mark.parametrize(
    "change", ("batch", "layout", "eval", "no_grad", "frozen", "min", "autocast", "backend", "threads")
)
def test_another_call_is_another_decision(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_raced", raced)
    model, x = rkfast.fuse(made("resnet")), X
    rkfast.tune(model, x)
    monkeypatch.setattr(tuning, "_raced", refuse)
    if change == "batch":
        x = X[:2]
    elif change == "layout":
        x = X.contiguous(memory_format=torch.channels_last)
    elif change == "eval":
        model.eval()
    elif change == "frozen":
        model.requires_grad_(False)
    elif change == "min":
        rkfast.fuse(model, memory="min")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1 if change == "threads" else threads)
        with (
            torch.set_grad_enabled(change != "no_grad"),
            torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"),
            dispatch.use("reference" if change == "backend" else "cpu" if native.cpu_reason() is None else "reference"),
            pytest.raises(AssertionError, match="timed"),
        ):
            rkfast.tune(model, x)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "text",
    (
        b"", b"\xff\xfe", b"[]", b"{}", b"null", b"[" * 100_000, b'{"format": 1, "environment": {}, "decisions": {}}',
        "format", "number", "length", "decisions",
    ),
    ids=range(11),
)  # fmt: skip
def test_a_file_that_is_none_is_ignored(text: bytes | str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_raced", raced)
    model = rkfast.fuse(made("resnet"))
    rkfast.tune(model, X)
    (file,) = folder.iterdir()
    if isinstance(text, bytes):
        file.write_bytes(text)
    else:
        content = json.loads(file.read_text())
        key = next(iter(content["decisions"]))
        if text == "format":
            content["format"] = 0
        elif text == "decisions":
            content["decisions"] = [1]
        else:
            content["decisions"][key] = [float("nan"), 1.0, True] if text == "number" else [1.0]
        file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"rkfast\.tune: .*\.json is ignored: "):
        found = rkfast.tune(model, X)
    assert found and not any(row.cached for row in found)
    assert all(row.cached for row in rkfast.tune(model, X))


def test_what_others_decided_meanwhile_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rkfast.fuse(made("resnet"))

    def other(module: Any, x: Tensor) -> tuple[float, float, bool]:
        monkeypatch.setattr(tuning, "_raced", raced)
        rkfast.tune(rkfast.fuse(made("densenet")), X)
        return raced(module, x)

    monkeypatch.setattr(tuning, "_raced", other)
    rkfast.tune(model, X)
    monkeypatch.setattr(tuning, "_raced", refuse)
    for name in ("resnet", "densenet"):
        assert all(row.cached for row in rkfast.tune(rkfast.fuse(made(name)), X))
    assert len(list(folder.iterdir())) == 1


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_raced", raced)
    (tmp_path / "file").touch()
    monkeypatch.setenv("RKFAST_CACHE_DIR", str(tmp_path / "file" / "cache"))
    native.cache_dir.cache_clear()
    assert rkfast.tune(rkfast.fuse(made("resnet")), X)
    monkeypatch.setattr(native, "cache_dir", lambda: tmp_path / "gone")
    with pytest.warns(UserWarning, match="decisions could not be kept"):
        assert rkfast.tune(rkfast.fuse(made("resnet")), X)


@built
def test_for_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rkfast.fuse(made("densenet"))
    found = rkfast.tune(model, X, goal="memory")
    assert not any(slower(model).values())
    block = next(row for row in found if row.names == ("features.denseblock1",))
    assert block.fused < 0.6 * block.stock
    model = rkfast.fuse(made("resnet"))
    right = FusedBlock.fused
    monkeypatch.setattr(FusedBlock, "fused", lambda self, form, x: right(self, form, x.exp().log().exp().log().sin()))
    assert "keeps more for the backward" in str(rkfast.tune(model, X, goal="memory"))
    assert all(slower(model)[name] for name in BLOCKS)
    assert not folder.exists()


def test_the_inner_ones_are_decided_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def first(module: Any, x: Tensor) -> tuple[float, float, bool]:
        order.append(module.title)
        inner = [m._rkfast.slower for m in module.modules() if isinstance(m, Kind) and m is not module]
        assert not inner or any(inner)
        return 1.0, 2.0, False

    monkeypatch.setattr(tuning, "_raced", first)
    rkfast.tune(rkfast.fuse(made("densenet")), X)
    assert order == ["dense block", "transition", "dense block", "sequence"]


def test_what_no_kernel_serves_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_raced", raced)
    model = rkfast.fuse(made("resnet"))
    model.layer1[0].bn1.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    model.layer1[1].relu = nn.Tanh()  # type: ignore[union-attr]
    assert rkfast.tune(made("resnet"), X) == []
    model.layer1[0].bn2.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    assert "layer1.0" not in {name for row in rkfast.tune(model, X) for name in row.names}


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    model = rkfast.fuse(made("resnet"))
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        rkfast.tune(3, X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="goal: expected one of time, memory, got 'speed'"):
        rkfast.tune(model, X, goal="speed")
    monkeypatch.setenv("RKFAST_TUNE", "on")
    with pytest.raises(ValueError, match="RKFAST_TUNE: 'on' is none of off, cache, force"):
        rkfast.tune(model, X)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=30)
    dist.init_process_group("gloo", f"file://{folder}/store", patience, world_size=2, rank=rank)
    try:
        tuning._raced = refuse if rank else raced
        model = nn.parallel.DistributedDataParallel(rkfast.fuse(made("resnet")))
        synced = rkfast.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(made("resnet")))
        found = [rkfast.tune(net, X[rank:]) for net in (model, synced)]
        try:
            rkfast.tune(model, X if rank else "image")
            message = ""
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        torch.save((slower(model.module), [list(map(tuple, rows)) for rows in found], message), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
def test_the_first_process_decides(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first[:2] == second[:2]
    assert all(first[0][name] == "measured slower (0.50x)" for name in BLOCKS)
    assert len(first[1][0]) >= 3
    assert first[1][1] == [], "stock PyTorch has no nn.SyncBatchNorm on a CPU"
    assert first[2].startswith("TypeError: ")
    assert second[2] == f"RuntimeError: rkfast.tune failed in the first process of the group: {first[2]}"


def test_a_network_of_a_library() -> None:
    model = rkfast.fuse(network("torchvision.resnet18"))
    found = rkfast.tune(model, torch.randn(2, 3, 32, 32))
    assert {name for row in found for name in row.names} == set(slower(model))
    assert rkfast.verify(model, torch.randn(4, 3, 32, 32), modes=("evaluation",))
