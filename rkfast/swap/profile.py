"""Where the time and the bytes of a step go, by kind of operation, stock and fused."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, record_function
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rkfast.files import replacing
from rkfast.nn.alike import alone
from rkfast.swap.copies import accelerators, has_fused, inside, stock, tensors, without_autocast
from rkfast.swap.estimate import in_words
from rkfast.swap.fuse import fuse

OURS = "rkfast"
COPY = "copy, layout"
OTHER = "other operators"
BETWEEN = "Python, autograd"
# What an operator's name says, without its namespace and the underscores around it.
KINDS = {
    "convolution": re.compile(r"conv(olution|_|\d)"),
    "BatchNorm": re.compile(r"batch_norm"),
    "ReLU": re.compile(r"^(relu6?|threshold|threshold_backward|clamp_min|hardtanh|hardtanh_backward)$"),
    "concatenation": re.compile(r"^(cat|concat|concatenate|stack)$"),
    "sum, product": re.compile(r"^(foreach_)?(add|sub|rsub|mul|div|neg|sum|lerp|addcmul|addcdiv)$"),
    "pooling": re.compile(r"pool|^mean$"),
    "linear": re.compile(r"linear|^(addmm|addmm_activation|mm|bmm|baddbmm|addmv|mv|dot|matmul)$"),
    COPY: re.compile(
        r"^(to|to_copy|copy|clone|contiguous|fill|zero|zeros|zeros_like|new_zeros|ones|ones_like|full|full_like)$"
        r"|pad|^(slice|select|as_strided)_(backward|scatter)$"
    ),
}
ROWS = (*KINDS, OURS, OTHER, BETWEEN)
NOTHING_READ = re.compile(r"^(copy|fill|zero|normal|uniform|bernoulli|random)$")  # of what they write into
NOTHING_WRITTEN = re.compile(r"^(empty|new_empty)")
LABELS = ("rkfast.profile: stock", "rkfast.profile: fused")


class Share(NamedTuple):
    """Of one kind of operation in a step."""

    milliseconds: float
    bytes: int
    calls: int


class Row(NamedTuple):
    """A kind of operation, in the stock network and in the fused one."""

    kind: str
    stock: Share
    fused: Share


class Profile(list[Row]):
    """One row per kind of operation; its ``str`` is a table.

    title: such as "training step, 2x3x224x224 float32, cpu".
    """

    def __init__(self, rows: Iterable[Row], title: str) -> None:
        super().__init__(rows)
        self.title = title

    @property
    def total(self) -> Row:
        """The sums of all rows."""
        sums = (
            Share(*map(sum, zip(*shares, strict=True))) for shares in ([r.stock for r in self], [r.fused for r in self])
        )
        return Row("all", *sums)

    def __str__(self) -> str:
        rows, total = [*self, self.total], self.total
        width = max(len(row.kind) for row in rows)
        lines = [self.title, f"{'':{width}}  {'stock':^31}  {'fused':^31}"]
        each = f"{'ms':>8} {'%':>4} {'bytes':>10} {'calls':>6}"
        lines.append(f"{'':{width}}  {each}  {each}")
        for row in rows:
            cells = _cells(row.stock, total.stock), _cells(row.fused, total.fused)
            lines.append(f"{row.kind:{width}}  {'  '.join(cells)}".rstrip())
        return "\n".join(lines)


def _cells(share: Share, whole: Share) -> str:
    if not any(share):
        return " " * 31
    percent = 100 * share.milliseconds / (whole.milliseconds or 1)
    moved = in_words(share.bytes) if share.bytes else ""
    return f"{share.milliseconds:8.2f} {percent:4.0f} {moved:>10} {share.calls or '':>6}"


def profile(model: nn.Module, *inputs: Any, steps: int = 3, trace: str | os.PathLike[str] | None = None) -> Profile:
    """Time and bytes of a step of a network by kind of operation, stock and fused side by side.

    A step is forward and backward from a random gradient of the output (no loss, no optimizer) where the network is in
    training and gradients are on, else a forward that keeps nothing. Copies of the network take turns: the network as
    it is, or fused if nothing in it is, and without anything fused.

    Time is torch.profiler's, of the step of median length. On a CPU it is wall time, and the rows sum up to that of the
    step; the profiler itself takes some microseconds per operator. On a GPU it is that of the kernels that an operator
    launches. What an operator calls inside counts for it, but for conversions of dtype, as autocast makes them.

    Bytes are a model, not a measurement: what each operator must move by the shapes of its tensors, each input read
    once and each output written once; views are free, and so is what an operator does inside. Of a dense or clique
    block every layer counts so for itself. A kernel that reads a tensor twice (BatchNorm in training), or finds it in
    a cache, moves more or less than that.

    Args:
        model: a network, which stays as it is; also one in DistributedDataParallel or torch.compile, whose inside is
            run as it is without them.
        inputs: what it is called with.
        steps: of each of the two, after two that warm up.
        trace: a file for all steps as torch's profiler exports them, to be looked at in Perfetto or chrome://tracing.

    Returns:
        Profile: rows of (kind, stock, fused), each of these (milliseconds, bytes, calls), ``total``, and a table as its
        str. Calls are of operators that move something.

    Raises:
        TypeError: model is no module, or no tensor of its result has a gradient in a training step.
        ValueError: steps is less than 1.
        OSError: trace cannot be written.
    """
    net = inside(model)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: expected 1 or more, got {steps!r}")
    values = [*net.parameters(), *net.buffers(), *(t for _, t in tensors(inputs, "inputs"))]
    device = values[0].device if values else torch.device("cpu")
    trains = net.training and torch.is_grad_enabled()
    ours = copy.deepcopy(net)
    alone(ours)  # no other process answers
    if not has_fused(ours):
        fuse(ours)
    pair = [_Step(twin, inputs, trains) for twin in (stock(copy.deepcopy(ours)), ours)]
    with contextlib.ExitStack() as stack:
        file = None if trace is None else stack.enter_context(replacing(Path(trace)))
        stack.enter_context(torch.random.fork_rng(accelerators(values)))
        moved = [_counted(step) for step in pair]
        recorder = _recorded(pair, steps, device)
        if file is not None:
            recorder.export_chrome_trace(str(file))
    events = recorder.events()
    shares = []
    for label, mode in zip(LABELS, moved, strict=True):
        found = _times(events, label, device.type == "cuda")[1:]  # the first is the profiler's own
        times = sorted(found, key=lambda step: sum(step.values()))[len(found) // 2]
        shares.append({kind: Share(times[kind] / 1e3, mode.bytes[kind], mode.calls[kind]) for kind in ROWS})
    rows = [Row(kind, *(share[kind] for share in shares)) for kind in ROWS]
    shapes = " and ".join(
        f"{'x'.join(map(str, t.shape))} {str(t.dtype).removeprefix('torch.')}" for _, t in tensors(inputs, "inputs")
    )
    title = f"{'training step' if trains else 'inference'}, {shapes}, {device.type}"
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        title += f", autocast to {str(torch.get_autocast_dtype(device.type)).removeprefix('torch.')}"
    return Profile([row for row in rows if any((*row.stock, *row.fused))], title)


def _counted(step: _Step) -> _Moved:
    step.prepare()
    step()  # warms up
    step.prepare()
    with _Moved() as mode:
        step()
    return mode


def _recorded(pair: Sequence[_Step], steps: int, device: torch.device) -> torch.profiler.profile:
    on_device = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    with torch.profiler.profile(activities=activities) as recorder:
        for i in range(steps + 1):
            for which in (0, 1) if i % 2 else (1, 0):  # neither is always the one that finds caches warm
                pair[which].prepare()
                with record_function(LABELS[which]):
                    pair[which]()
                    if on_device:
                        torch.cuda.synchronize(device)
    return recorder


class _Step:
    """A step of a network, forward and, where it trains, backward."""

    def __init__(self, net: nn.Module, inputs: tuple[Any, ...], trains: bool) -> None:
        self.net, self.inputs, self.trains = net, inputs, trains
        self.given = inputs
        self.cotangents: list[Tensor] = []

    def prepare(self) -> None:
        """What is not of the step itself: fresh inputs, no gradients."""
        self.given = pytree.tree_map_only(Tensor, torch.clone, self.inputs)  # the network may write into them
        for p in self.net.parameters():
            p.grad = None
        torch.clear_autocast_cache()  # or weights would be cast once for all steps

    def __call__(self) -> None:
        if not self.trains:
            with torch.no_grad():
                self.net(*self.given)
            return
        outs = [t for _, t in tensors(self.net(*self.given), "output") if t.requires_grad]
        if not outs:
            raise TypeError("model: nothing in its result has a gradient; profile inference, under torch.no_grad()")
        if not self.cotangents:
            self.cotangents = [torch.randn_like(t) for t in outs]
        with without_autocast(outs):
            torch.autograd.backward(outs, self.cotangents)


def _times(events: Iterable[Any], label: str, on_device: bool) -> list[Counter[str]]:
    """Microseconds by kind, of each step with this label."""
    own = [event for event in events if event.device_type.name == "CPU"]
    found = []
    for mark in (event for event in own if event.name == label):
        within = [(mark, BETWEEN)]
        if on_device:  # whose backward has a thread of its own
            begin, end = mark.time_range.start, mark.time_range.end
            within += [
                (event, BETWEEN)
                for event in own
                if event.cpu_parent is None and event is not mark and begin <= event.time_range.start < end
            ]
        times: Counter[str] = Counter()
        while within:
            event, outer = within.pop()
            kind = _kind_within(event.name, outer)
            times[kind] += event.self_device_time_total if on_device else event.self_cpu_time_total
            within.extend((child, kind) for child in event.cpu_children)
        found.append(times)
    return found


def _kind_within(name: str, outer: str) -> str:
    """Of an event of the profiler inside one of kind ``outer``."""
    space, _, operator = name.partition("::")
    if outer == OURS or not operator or space == "autograd":
        return outer
    if operator == "to":
        return COPY
    return outer if outer in KINDS else _kind(space, operator)


def _kind(space: str, operator: str) -> str:
    if space == OURS:
        return OURS
    stem = operator.strip("_")
    return next((kind for kind, pattern in KINDS.items() if pattern.search(stem)), OTHER)


class _Moved(TorchDispatchMode):
    """Bytes and calls of all operators inside, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        moved = _moved(func, args, kwargs or {}, result)
        if moved:
            kind = _kind(*func._schema.name.split("::"))
            self.bytes[kind] += moved
            self.calls[kind] += 1
        return result


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Bytes that a call of an operator must read and write."""
    schema = func._schema
    stem = schema.name.rpartition("::")[2].strip("_")
    if NOTHING_WRITTEN.match(stem):
        return 0
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    layered = _LAYERED.get(schema.name)
    if layered is not None:
        return layered(given)
    changed = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    blind = {a.name for a in schema.arguments if a.is_out} | (changed if NOTHING_READ.match(stem) else set())
    read = _tensors([value for name, value in given.items() if name not in blind])
    written = _tensors([given.get(name) for name in changed])
    storages = {_storage(t) for t in (*read, *written)}
    made = [t for t in _tensors(result) if _storage(t) not in storages]
    if not made and not changed and _tensors(result):
        return 0  # views
    return _once(read) + _once([*written, *made])


def _tensors(values: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _once(values: Iterable[Tensor]) -> int:
    """Bytes of tensors, of which several may be of one storage, or one many times as large as its storage."""
    views = {(_storage(t), t.storage_offset(), t.shape, t.stride()): t for t in values}
    sizes: Counter[int] = Counter()
    limits = {}
    for (storage, *_), t in views.items():
        sizes[storage] += t.numel() * t.element_size()
        limits[storage] = t.untyped_storage().nbytes()
    return sum(min(size, limits[storage]) for storage, size in sizes.items())


def _dense_block(given: dict[str, Any]) -> int:
    """The input's way into the buffer, what each convolution reads and writes, and the sum."""
    x, summed = given["x"], given["summed"]
    convs = [*given["conv1"], *given["conv2"]]
    channels = 2 * x.shape[1] + sum(w.shape[0] + w.shape[1] for w in convs)
    channels += (len(summed) + 2) * x.shape[1] if summed else 0
    return channels * _channel(x) + _once(convs)


def _dense_block_backward(given: dict[str, Any]) -> int:
    """The gradient's way into its buffer. Each first convolution reads its input and the gradient of its output, and
    adds to the gradient of its input; a second one does the same, but that nothing else has added there."""
    buffer, conv1, conv2 = given["buffer"], given["conv1"], given["conv2"]
    channels = 2 * buffer.shape[1]
    channels += sum(w.shape[0] + 3 * w.shape[1] for w in conv1) + sum(w.shape[0] + 2 * w.shape[1] for w in conv2)
    if conv2 and not given["mids"]:  # made again
        channels += sum(w.shape[0] + w.shape[1] for w in conv1)
    return channels * _channel(buffer) + 2 * _once([*conv1, *conv2])


def _channel(x: Tensor) -> int:
    return x.shape[0] * math.prod(x.shape[2:]) * x.element_size()


_LAYERED: dict[str, Callable[[dict[str, Any]], int]] = {
    "rkfast::dense_block": _dense_block,
    "rkfast::dense_block_backward": _dense_block_backward,
}
