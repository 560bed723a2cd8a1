"""Fused or stock, whichever is better on this machine, block by block."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rkfast import dispatch, measure, native
from rkfast.nn.alike import alone
from rkfast.ops import checks, layout
from rkfast.swap.copies import accelerators, chosen, inside, tensors
from rkfast.swap.estimate import in_words
from rkfast.swap.kind import Kind

GOALS = ("time", "memory")
HOW = ("auto", "off", "cache", "force")
FORMAT = 1  # of the file
CLEARLY = 0.97  # fused stays unless it is slower than this share of stock's speed,
USUALLY = 0.75  # and slower in so many rounds
ROUNDS = (3, 51)
SECONDS = 1.0  # for each block, but for ROUNDS
SHORTEST = 2e-3  # seconds; shorter steps are repeated within a round


class Decision(NamedTuple):
    """For all blocks of one structure and input.

    names: of the blocks. kind: as in ``report``. shape, dtype: of their input. stock, fused: milliseconds, or bytes
    kept for the backward. reason: why stock was chosen, "" where fused was. cached: whether it was decided before.
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    dtype: str
    stock: float
    fused: float
    reason: str
    cached: bool


class Tuning(list[Decision]):
    """One row per distinct block; its ``str`` is a table.

    goal: "time" or "memory".
    """

    def __init__(self, rows: list[Decision], goal: str) -> None:
        super().__init__(rows)
        self.goal = goal

    def __str__(self) -> str:
        if not self:
            return "nothing was decided: there is no block that kernels serve, or RKFAST_TUNE forbids to time it"
        lines = []
        for row in self:
            name = row.names[0] or "(the network)"
            if len(row.names) > 1:
                name += f" and {len(row.names) - 1} like it"
            shape = "x".join(map(str, row.shape))
            stock, fused = (
                (f"{row.stock:.3g} ms", f"{row.fused:.3g} ms")
                if self.goal == "time"
                else (in_words(int(row.stock)), in_words(int(row.fused)))
            )
            choice = f"stock: {row.reason}" if row.reason else "fused"
            if not row.reason and row.fused > row.stock:
                choice += f": slower ({row.stock / row.fused:.2f}x), but not clearly"
            cached = ", as decided before" if row.cached else ""
            lines.append(f"{name}  {row.kind} {shape} {row.dtype}  stock {stock}, fused {fused}  {choice}{cached}")
        return "\n".join(lines)


class _Case(NamedTuple):
    """A distinct block: those that are like it, and what the first of them is called with."""

    names: list[str]
    x: Tensor


def tune(model: nn.Module, *inputs: Any, goal: str = "time") -> Tuning:
    """Keep of a fused network's blocks those fused that are better so on this machine, in place.

    Blocks of one structure that are called with inputs of one shape, dtype and layout are decided once, each alone:
    stock and fused forward, and backward where the network is in training and gradients are on, run in turns on a copy.
    A block becomes stock only where that is clearly faster: fused at less than 0.97 of its speed in the median, and
    slower in three of four rounds. ``report`` then says "measured slower (0.93x)"; tune again, or ``unfuse`` and
    ``fuse``, to undo it. Decisions about time are kept in a file in RKFAST_CACHE_DIR or the user's cache folder, for
    this device, number of threads, torch and build of rkfast. The environment variable RKFAST_TUNE is "off" (nothing is
    changed), "cache" (only what the file has is decided) or "force" (all is timed anew).

    In a process group all processes call it, and the first one decides for all. Blocks with nn.SyncBatchNorm on a CPU,
    where stock PyTorch has none, stay fused.

    Args:
        model: a network after ``fuse``; also one in DistributedDataParallel or torch.compile (before its first call).
            Only the choice between fused and stock blocks changes in it.
        inputs: what it is called with.
        goal: "time", or "memory": what keeps less for the backward.

    Raises:
        TypeError, ValueError: an argument, or RKFAST_TUNE, is of a wrong type or value.
        RuntimeError: the first process of a group failed.
    """
    net = inside(model)
    if goal not in GOALS:
        raise ValueError(f"goal: expected one of {', '.join(GOALS)}, got {goal!r}")
    how = os.environ.get("RKFAST_TUNE") or "auto"
    if how not in HOW:
        raise ValueError(f"RKFAST_TUNE: {how!r} is none of off, cache, force")
    if how == "off":
        return Tuning([], goal)
    decisions = _together(lambda: _decided(net, inputs, goal, how))
    for decision in decisions:
        for name in decision.names:
            module: Any = net.get_submodule(name)
            module._rkfast.slower = decision.reason or None
    return Tuning(decisions, goal)


def _together(decide: Callable[[], list[Decision]]) -> list[Decision]:
    """What the first process decides."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return decide()
    shared: list[Any] = [None, None]
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            shared[0] = decide()
        except Exception as error:  # the others wait for an answer, whatever it is
            shared[1], failure = f"{type(error).__name__}: {error}", error
    dist.broadcast_object_list(shared, src=0)
    if failure is not None:
        raise failure
    if shared[1] is not None:
        raise RuntimeError(f"rkfast.tune failed in the first process of the group: {shared[1]}")
    decisions: list[Decision] = shared[0]
    return decisions


def _decided(net: nn.Module, inputs: Any, goal: str, how: str) -> list[Decision]:
    values = [*net.parameters(), *net.buffers(), *(t for _, t in tensors(inputs, "inputs"))]
    twin = copy.deepcopy(net)
    synced = {name for name, part in net.named_modules() if any(type(m) is nn.SyncBatchNorm for m in part.modules())}
    alone(twin)  # what the processes of a group exchange is the same either way
    for part in twin.modules():
        if isinstance(part, Kind):
            part._rkfast.slower = None
    with torch.random.fork_rng(accelerators(values)):
        cases = _cases(twin, inputs, synced)
        # Those inside others first: the outer ones run with what was decided for them.
        order = sorted(cases, key=lambda key: -max(name.count(".") + bool(name) for name in cases[key].names))
        file = _path(values[0].device) if cases and goal == "time" else None
        known = _load(file, values[0].device) if file is not None and how != "force" else {}
        decisions: dict[str, Decision] = {}
        new: dict[str, Any] = {}
        for key in order:
            names, x = cases[key]
            module: Any = twin.get_submodule(names[0])
            stock: float
            fused: float
            stored = known.get(key)
            if stored is None and how == "cache" and goal == "time":
                continue
            if goal == "memory":
                stock, fused = (_saved(module, x, choice) for choice in (False, True))
                better = fused <= stock
                reason = (
                    ""
                    if better
                    else f"keeps more for the backward ({in_words(int(fused))}, stock {in_words(int(stock))})"
                )
            else:
                stock, fused, better = stored or _raced(module, x)
                reason = "" if better else f"measured slower ({stock / fused:.2f}x)"
                if stored is None:
                    new[key] = [stock, fused, better]
            for name in names:
                twin.get_submodule(name)._rkfast.slower = reason or None  # type: ignore[union-attr]
            dtype = str(x.dtype).removeprefix("torch.")
            decisions[key] = Decision(
                tuple(names), module.title, tuple(x.shape), dtype, stock, fused, reason, stored is not None
            )
    if new and file is not None:
        _save(file, new, values[0].device)
    return [decisions[key] for key in cases if key in decisions]


def _cases(twin: nn.Module, inputs: Any, synced: set[str]) -> dict[str, _Case]:
    """The distinct blocks that kernels serve, but on a CPU those that stock PyTorch would not."""
    cases: dict[str, _Case] = {}

    def note(name: str, module: Kind, args: tuple[Any, ...]) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and module.found(x) is not None and not (x.device.type == "cpu" and name in synced):
            case = cases.setdefault(_key(module, x), _Case([], x.detach().requires_grad_(x.requires_grad)))
            if name not in case.names:
                case.names.append(name)

    blocks = [(name, module) for name, module in twin.named_modules() if isinstance(module, Kind)]
    handles = [
        module.register_forward_pre_hook(lambda module, args, name=name: note(name, module, args))
        for name, module in blocks
    ]
    twin(*pytree.tree_map_only(Tensor, torch.clone, inputs))
    for handle in handles:
        handle.remove()
    return cases


def _key(module: Kind, x: Tensor) -> str:
    """Blocks with equal keys take equal time."""
    modes = "".join("ft"[part.training] for part in module.modules())
    needs = "".join("ft"[p.requires_grad] for p in module.parameters())
    structure = hashlib.sha256(f"{module!r} {modes} {needs}".encode()).hexdigest()[:16]
    parts = [
        module.title, type(module).__name__, structure, "x".join(map(str, x.shape)), str(x.dtype), x.device.type,
        str(checks.dtype_of_call(x)), "channels_last" if layout.is_channels_last(x) else str(x.stride()),
        f"memory={module._rkfast.memory}", f"backward={_goes_back(module)}", f"x={x.requires_grad}",
        f"backend={dispatch.forced()}",
    ]  # fmt: skip
    return " ".join(parts)


def _goes_back(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled()


def _saved(module: Any, x: Tensor, fused: bool) -> int:
    own = [*module.parameters(), *module.buffers()]
    with chosen(module, fused), torch.enable_grad():
        return measure.saved_bytes(lambda: module(x), own)


def _raced(module: nn.Module, x: Tensor) -> tuple[float, float, bool]:
    """Milliseconds of stock and fused, and whether fused stays."""
    run = _run(module, x)
    each: tuple[list[float], list[float]] = ([], [])

    def seconds(fused: bool, repeats: int) -> float:
        with chosen(module, fused):
            _wait(x.device)
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            _wait(x.device)
            return (time.perf_counter() - start) / repeats

    shortest = min(min(seconds(fused, 1) for _ in range(2)) for fused in (False, True))  # the first ones warm up
    repeats = max(1, math.ceil(SHORTEST / shortest))
    begin = time.perf_counter()
    for i in range(ROUNDS[1]):
        if i >= ROUNDS[0] and time.perf_counter() - begin > SECONDS:
            break
        for fused in (False, True) if i % 2 else (True, False):  # neither is always the one that finds caches warm
            each[fused].append(seconds(fused, repeats))
    stock, fused_time = (statistics.median(times) for times in each)
    lost = sum(b > a for a, b in zip(*each, strict=True))
    better = stock >= CLEARLY * fused_time or lost < USUALLY * len(each[0])
    return 1e3 * stock, 1e3 * fused_time, better


def _run(module: nn.Module, x: Tensor) -> Callable[[], None]:
    """A step of the block: forward, and backward where the network trains."""
    targets = [t for t in (x, *module.parameters()) if t.requires_grad]
    if not (_goes_back(module) and targets):
        return lambda: module(x)
    cotangents: list[Tensor] = []

    def run() -> None:
        torch.clear_autocast_cache()  # or weights would be cast once for all rounds
        outs = [t for _, t in tensors(module(x.clone()), "out") if t.requires_grad]  # x may be written into
        if not cotangents:
            cotangents.extend(torch.randn_like(t) for t in outs)
        torch.autograd.grad(outs, targets, cotangents, allow_unused=True)

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _environment(device: torch.device) -> dict[str, str]:
    """What decisions hold for."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    rkfast = sys.modules[__name__.partition(".")[0]]  # above this layer
    build = json.dumps(native.build(), sort_keys=True, default=str)
    return {
        "device": f"{device.type}: {name}",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "rkfast": f"{rkfast.__version__} {hashlib.sha256(build.encode()).hexdigest()[:16]}",
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _path(device: torch.device) -> Path:
    digest = hashlib.sha256(json.dumps(_environment(device), sort_keys=True).encode()).hexdigest()[:16]
    return native.cache_dir() / f"tune-{digest}.json"


def _load(file: Path, device: torch.device) -> dict[str, tuple[float, float, bool]]:
    """Decisions by key. A file that is no such file is as good as none."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(file, str(error))
    try:
        content = json.loads(text)
        if content["format"] != FORMAT or content["environment"] != _environment(device):
            return _ignored(file, "it is of another format, machine, torch or rkfast")
        return {str(key): _decision(value) for key, value in content["decisions"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return _ignored(file, f"it is damaged ({type(error).__name__}: {error})")


def _decision(value: Any) -> tuple[float, float, bool]:
    stock, fused, better = value
    if type(better) is not bool or not all(type(t) in (int, float) and 0 < t < math.inf for t in (stock, fused)):
        raise ValueError(f"{value!r} is no decision")
    return float(stock), float(fused), better


def _ignored(file: Path, why: str) -> dict[str, tuple[float, float, bool]]:
    warnings.warn(f"rkfast.tune: {file} is ignored: {why}", stacklevel=2)
    return {}


def _save(file: Path, new: dict[str, Any], device: torch.device) -> None:
    """Beside what another process has put there meanwhile; whoever reads finds the old file or the new one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reading has warned
        decisions = {key: list(value) for key, value in _load(file, device).items()} | new
    content = {"format": FORMAT, "environment": _environment(device), "decisions": decisions}
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")  # of mode 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump(content, out, indent=1)
            os.replace(name, file)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        warnings.warn(f"rkfast.tune: decisions could not be kept in {file}: {error}", stacklevel=2)
