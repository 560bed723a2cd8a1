"""A fused network beside stock PyTorch, both measured against float64."""

from __future__ import annotations

import contextlib
import copy
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rkfast import dispatch
from rkfast.swap.copies import accelerators, has_fused, inside, stock, tensors, without_autocast
from rkfast.swap.fuse import fuse
from rkfast.swap.kind import without_chance

MODES = ("training", "evaluation")
DISTURBANCE = 0.1  # of the inputs' root mean square, in all draws but the first: much more than a rounding in bfloat16
NEARBY = 4  # steps of stock PyTorch on inputs that are off by a rounding, where gradients alone are too far off


class Check(NamedTuple):
    """One kind of tensor, all of a network's as one, each in units of its largest element.

    what: such as "training: output". ours, eager: distances from the float64 run. allowed: twice eager's and a rounding
    of the result. measure: "rms" or "maximum", whichever is nearer to what is allowed. where: the tensor that is
    farthest off, or what else is wrong.
    """

    what: str
    ours: float
    eager: float
    allowed: float
    measure: str
    where: str

    @property
    def ok(self) -> bool:
        return self.ours <= self.allowed

    @property
    def share(self) -> float:
        """Of what is allowed."""
        return self.ours / self.allowed if self.allowed > 0 else math.inf if self.ours > 0 else 0.0


class Verification(list[Check]):
    """One row per kind of tensor; true where all pass. Its ``str`` is a table that ends in PASS or FAIL.

    notes: what was compared that one might not expect. served: calls of kernels by (op, backend).
    """

    def __init__(self, rows: Sequence[Check], notes: Sequence[str], served: Counter[tuple[str, str]]) -> None:
        super().__init__(rows)
        self.notes = list(notes)
        self.served = served

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        width = max(len(row.what) for row in self)
        lines = ["distance from float64, in units of a tensor's largest element"]
        lines.append(f"{'':{width}}  {'ours':>8}  {'eager':>8}  {'allowed':>8}")
        for row in self:
            line = f"{row.what:{width}}  {row.ours:8.1e}  {row.eager:8.1e}  {row.allowed:8.1e}  {row.measure}"
            lines.append(line if row.ok else f"{line}  FAIL: {row.where}")
        served = ", ".join(f"{op} by {backend} ({n})" for (op, backend), n in sorted(self.served.items()))
        lines.append(f"served: {served}" if served else "verified, but stock PyTorch served everything")
        return "\n".join([*lines, *self.notes, "PASS" if self.ok else "FAIL"])


def verify(model: nn.Module, *inputs: Any, draws: int = 5, modes: Sequence[str] = MODES) -> Verification:
    """Whether a fused network computes what stock PyTorch does.

    Three copies, the network as it is, without anything fused, and that in float64, go through a training step with a
    random gradient of the output, and through evaluation. Compared are outputs, gradients of inputs and parameters,
    running statistics and counters, and what evaluation gives on the statistics that training has left. Of each kind
    the fused copy may be twice as far from float64 as stock PyTorch, plus one rounding. A ReLU whose input is near zero
    may be on in one copy and off in another, and gradients are then far off, in stock PyTorch too: those of a draw may
    also be what it makes of inputs that are off by a rounding, and the majority of several draws decides.

    Dropout is off in the copies; what else draws random numbers draws the same in all. Hooks of the network run in
    the copies too. Autocast is as it is around the call (off for float64). If nothing in the network is fused, a fused
    copy of it is verified. Processes of a group (nn.SyncBatchNorm) call it together.

    Args:
        model: a network, which stays as it is; also one in DistributedDataParallel or torch.compile, whose inside is
            verified.
        inputs: what it is called with; its tensors may be in lists, tuples and dicts.
        draws: at most; the first is with the inputs as they are, the others with disturbed ones.
        modes: "training" (the modes that the modules have, where the network is in training), "evaluation", or both.

    Returns:
        Verification: rows of (what, ours, eager, allowed, ...), ``ok``, and a table as its str.

    Raises:
        TypeError: model is no module, or there is no floating-point tensor in its result.
        ValueError: draws or modes that there are not.
    """
    net = inside(model)
    if not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws: expected 1 or more, got {draws!r}")
    if isinstance(modes, str) or not modes or not set(modes) <= set(MODES):
        raise ValueError(f"modes: expected some of {', '.join(MODES)}, got {modes!r}")
    notes = []
    ours = copy.deepcopy(net)
    if not has_fused(net):
        fuse(ours)
        rest = "a fused copy was verified" if has_fused(ours) else "and nothing in it can be"
        notes.append(f"nothing in the model is fused: {rest}")
    without_chance(ours)
    eager = stock(copy.deepcopy(ours))
    served: Counter[tuple[str, str]] = Counter()
    found: dict[str, list[Check]] = {}
    for draw in range(draws):
        given = _disturbed(inputs, DISTURBANCE, draw) if draw else inputs
        for mode in modes:
            before = dispatch.served()
            mine = _step(copy.deepcopy(ours), given, mode, draw)
            served += dispatch.served() - before
            theirs = _step(copy.deepcopy(eager), given, mode, draw)
            truth = _truth(eager, given, mode, draw, theirs)
            rows = _rows(mode, mine, theirs, truth)
            rounding = max(torch.finfo(t.dtype).eps for t in theirs["output"].values())
            for i in range(NEARBY):
                far = [what for what, row in rows.items() if not row.ok]
                if not far or not all(what.endswith("gradients") for what in far):
                    break
                near = _step(copy.deepcopy(eager), _disturbed(given, rounding, i), mode, draw)
                others = _rows(mode, mine, near, truth)
                rows |= {what: min(rows[what], others[what], key=lambda row: row.share) for what in far}
            for what, row in rows.items():
                found.setdefault(what, []).append(row)
        passed = [(sum(row.ok for row in checks), len(checks)) for checks in found.values()]
        if all(2 * max(n, total - n) > draws for n, total in passed):
            break
    middle = [sorted(checks, key=lambda row: row.share)[(len(checks) - 1) // 2] for checks in found.values()]
    kernels = Counter({key: n for key, n in served.items() if key[1] != "reference"})
    return Verification(middle, notes, kernels)


Seen = dict[str, dict[str, Tensor]]  # kind, name


@contextlib.contextmanager
def _random_numbers_stay(net: nn.Module, inputs: Any) -> Iterator[None]:
    given = [t for _, t in tensors(inputs, "inputs")]
    with torch.random.fork_rng(accelerators([*given, *net.parameters()])):
        yield


def _disturbed(inputs: Any, share: float, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def one(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point() or not t.numel():
            return t
        scale = share * t.detach().double().square().mean().sqrt()
        noise = torch.randn(t.shape, generator=generator).to(t.device, torch.double) * scale
        return torch.empty_like(t).copy_(t.detach().double() + noise)

    return pytree.tree_map(one, inputs)


def _step(net: nn.Module, inputs: Any, mode: str, draw: int, dtypes: dict[str, torch.dtype] | None = None) -> Seen:
    """All that a step shows. dtypes: in which the gradients of the outputs are drawn; None for the outputs' own."""
    if mode == "evaluation":
        net.eval()
    elif not net.training:
        net.train()
    named = [(name, t) for name, t in tensors(inputs, "inputs") if t.is_floating_point()]
    leaves = {id(t): t.detach().clone().requires_grad_() for _, t in named}
    with _random_numbers_stay(net, inputs):
        with torch.enable_grad():
            outs = _outputs(net(*_replaced(inputs, leaves)))
            ends = {name: t for name, t in outs.items() if t.requires_grad}
        generator = torch.Generator().manual_seed(draw)
        starts = [
            torch.randn(t.shape, generator=generator).to((dtypes or {}).get(name, t.dtype)).to(t.device, t.dtype)
            for name, t in ends.items()
        ]
        if ends:
            with without_autocast([*ends.values(), *leaves.values()]):
                torch.autograd.backward(list(ends.values()), starts)
    seen: Seen = {
        "output": {name: t.detach() for name, t in outs.items()},
        "input gradients": {name: g for name, t in named if (g := leaves[id(t)].grad) is not None},
        "parameter gradients": {name: p.grad for name, p in net.named_parameters() if p.grad is not None},
    }
    if mode == "training":
        for name, b in net.named_buffers():
            last = name.rpartition(".")[2]
            kind = last if last in ("running_mean", "running_var") else "other buffers"
            seen.setdefault(kind if b.is_floating_point() else "counters", {})[name] = b.detach().clone()
        net.eval()
    with _random_numbers_stay(net, inputs), torch.no_grad():  # where nothing is kept kernels may go another way
        kind = "evaluation after" if mode == "training" else "output without gradients"
        seen[kind] = _outputs(net(*_replaced(inputs, leaves)))
    return {kind: found for kind, found in seen.items() if found}


def _truth(eager: nn.Module, inputs: Any, mode: str, draw: int, theirs: Seen) -> Seen:
    net = copy.deepcopy(eager)
    if any(p.device.type == "mps" for p in net.parameters()):  # which has no float64
        net, inputs = net.to("cpu"), pytree.tree_map_only(Tensor, lambda t: t.to("cpu"), inputs)
    net.double()
    inputs = pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)
    with without_autocast([*net.parameters(), *(t for _, t in tensors(inputs, "inputs"))]):
        return _step(net, inputs, mode, draw, {name: t.dtype for name, t in theirs["output"].items()})


def _replaced(inputs: Any, leaves: dict[int, Tensor]) -> Any:
    """Copies, so that nobody writes into the inputs or into a leaf."""

    def one(t: Tensor) -> Tensor:
        return leaves.get(id(t), t).clone()

    return pytree.tree_map_only(Tensor, one, inputs)


def _outputs(result: Any) -> dict[str, Tensor]:
    found = {name: t for name, t in tensors(result, "output") if t.is_floating_point()}
    if not found:
        raise TypeError(
            f"model: it returned {type(result).__name__}, in which there is no floating-point tensor to compare"
        )
    return found


class _Gap(NamedTuple):
    """Of one tensor: how many elements, the largest of them, and squares and maxima of both distances."""

    name: str
    elements: int
    size: float
    ours: tuple[float, float]
    eager: tuple[float, float]


def _rows(mode: str, mine: Seen, theirs: Seen, truth: Seen) -> dict[str, Check]:
    rows = [
        _compared(f"{mode}: {kind}", *(seen.get(kind, {}) for seen in (mine, theirs, truth))) for kind in theirs | mine
    ]
    return {row.what: row for row in rows}


def _compared(what: str, ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor]) -> Check:
    for name in [*eager, *ours]:
        wrong = _mismatch(ours.get(name), eager.get(name))
        if wrong or name not in truth:
            return Check(what, math.inf, 0.0, 0.0, "maximum", f"{name}: {wrong or 'missing in float64'}")
    if what.endswith("counters"):
        different = [name for name, t in eager.items() if not torch.equal(ours[name], t)]
        return Check(what, float(len(different)), 0.0, 0.0, "maximum", ", ".join(different[:3]))
    gaps = [_gap(name, ours[name], eager[name], truth[name]) for name in eager]
    eps = max(torch.finfo(t.dtype).eps for t in ours.values())
    units = _units(gaps, eps)
    count = sum(gap.elements for gap in gaps) or 1

    def total(which: str) -> tuple[float, float]:
        parts = [(getattr(gap, which), unit) for gap, unit in zip(gaps, units, strict=True)]
        return math.sqrt(sum(a[0] / unit**2 for a, unit in parts) / count), max(a[1] / unit for a, unit in parts)

    # In float64 the truth has roundings of its own.
    rounding = eps * (32 if eps < 1e-12 else 1)
    worst = max(zip(gaps, units, strict=True), key=lambda pair: pair[0].ours[1] / pair[1])[0].name
    mine, theirs = total("ours"), total("eager")
    # The worst element is a matter of luck: that of one more sum, product, mean and result is allowed.
    rows = [
        Check(what, mine[i], theirs[i], 2 * theirs[i] + factor * rounding, measure, worst)
        for i, (measure, factor) in enumerate((("rms", 1), ("maximum", 4)))
    ]
    return max(rows, key=lambda row: row.share)


def _mismatch(ours: Tensor | None, eager: Tensor | None) -> str | None:
    if ours is None or eager is None:
        return "missing in the fused copy" if ours is None else "missing in stock PyTorch"
    for what in ("shape", "dtype", "device"):
        mine, theirs = getattr(ours, what), getattr(eager, what)
        if mine != theirs:
            return f"{what} {mine}, and stock PyTorch's is {theirs}"
    return None


def _gap(name: str, ours: Tensor, eager: Tensor, truth: Tensor) -> _Gap:
    """Where stock PyTorch overflows there is nothing to compare; where ours alone does, it is infinitely far off."""
    truth = truth.to(ours.device) if truth.device.type != "cpu" else truth
    ours, eager = ours.to(truth.device), eager.to(truth.device)
    finite = eager.isfinite() & truth.isfinite()
    if truth.numel() and not finite.any():
        return _Gap(name, truth.numel(), 1.0, (math.inf, math.inf), (0.0, 0.0))
    truth = truth.where(finite, 0)
    size = truth.abs().max().item() if truth.numel() else 0.0
    gaps = []
    for t in (ours, eager):
        gap = (t.double() - truth).abs().where(finite, 0)
        gap = gap.where(gap.isfinite(), math.inf)
        gaps.append((gap.square().sum().item(), gap.max().item() if gap.numel() else 0.0))
    return _Gap(name, truth.numel(), size, gaps[0], gaps[1])


def _units(gaps: list[_Gap], eps: float) -> list[float]:
    """The largest element of each tensor. But one that stock PyTorch itself gets much more wrong than most (the
    gradient of a bias before a BatchNorm, a sum that cancels) would hide what is wrong elsewhere: it counts in units of
    that error."""
    largest = max(gap.size for gap in gaps) or 1.0
    if eps < 1e-12:  # stock PyTorch in float64 is the truth, and its error says nothing
        return [largest] * len(gaps)
    usual = 8 * statistics.median(gap.eager[1] / (gap.size or largest) for gap in gaps)
    return [max(gap.size, gap.eager[1] / usual if usual else 0.0) or 1.0 for gap in gaps]
