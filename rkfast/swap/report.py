"""What of a network is fused, and why the rest is not."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from rkfast.swap.dense import FusedDenseBlock
from rkfast.swap.estimate import fake_mode, fuse_shadow, in_words, saved_by, shadow
from rkfast.swap.fuse import check_model, survey
from rkfast.swap.kind import Kind, parts_of

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


class Row(NamedTuple):
    """A module that looks like one that is served.

    name: its path in the network, "" for the network itself. kind: what it is. layers: how many layers a dense block
    has, else 1. fused: whether the fused forward serves it. reason: why it does not. saved: how many bytes fewer than
    its stock form it keeps for the backward, or would if it were fused; None where that was not asked or cannot be
    told, 0 where it cannot be fused.
    """

    name: str
    kind: str
    layers: int
    fused: bool
    reason: str
    saved: int | None = None


class Report(list[Row]):
    """One row per candidate; its ``str`` is a table."""

    def __str__(self) -> str:
        if not self:
            return "nothing here looks like a module that rkfast serves"
        names = [row.name or "(the network)" for row in self]
        width = max(map(len, names))
        kinds = max(len(row.kind) for row in self)
        lines = [self.summary()]
        for name, row in zip(names, self, strict=True):
            state = f"fused{_less(row)}" if row.fused else f"stock{_less(row)}: {row.reason}"
            lines.append(f"{name:{width}}  {row.kind:{kinds}}  {state}")
        return "\n".join(lines)

    def summary(self) -> str:
        """Such as "58 of 58 dense layers, 3 of 3 transitions fused"."""
        parts = []
        for kind in dict.fromkeys(row.kind for row in self):
            rows = [row for row in self if row.kind == kind]
            done = sum(row.layers for row in rows if row.fused)
            noun = "dense layer" if kind == "dense block" else kind
            parts.append(f"{done} of {sum(row.layers for row in rows)} {noun}s")
        return ", ".join(parts) + " fused"


def _less(row: Row) -> str:
    if not row.saved:
        return ""
    if row.fused:
        return f", keeps {in_words(abs(row.saved))} {'less' if row.saved > 0 else 'more'}"
    return f", fused it would keep {in_words(abs(row.saved))} {'less' if row.saved > 0 else 'more'}"


def report(model: nn.Module, *inputs: Any) -> Report:
    """Each module of a network that looks like one that is served: whether it is fused, and if not, why.

    Args:
        model: a network; it stays as it is.
        inputs: what the network is called with. A copy is run with it, and what depends on dtype, device and size of
            the blocks' inputs is told too, and how many bytes each block keeps less for the backward of a training
            step in the modes that the modules have.

    Raises:
        TypeError: model is no module.
    """
    check_model(model)
    found = list(survey(model))
    fake = fake_mode() if inputs else None
    seen = {} if fake is None else _inputs(model, {name for name, *_ in found}, inputs, fake)
    rows = Report()
    servable = set()
    for name, module, kind, reason in found:
        if kind is None:
            title, layers = type(module).__name__, 1
            if reason is None and not module.fused:
                servable.add(name)
                reason = "made with fused=False; rkfast.fuse(model) changes that"
        else:
            title, layers = kind.title, len(module._modules) if kind is FusedDenseBlock else 1
            if reason is None and isinstance(module, Kind):
                if module._rkfast.parts and module._rkfast.parts != parts_of(module):
                    reason = "its layers have been replaced since rkfast.fuse(model)"
                elif name in seen:
                    reason = module.refuses(kind.reads(module), seen[name])
                if reason is None and module._rkfast.slower is not None:
                    servable.add(name)
                    reason = module._rkfast.slower
            elif reason is None:
                servable.add(name)
                reason = "not swapped; rkfast.fuse(model) swaps it, but for what filter_fn leaves out"
        if reason is None:
            servable.add(name)
        rows.append(
            Row(name, title, layers, reason is None, reason or "", 0 if seen and name not in servable else None)
        )
    if fake is not None:
        twin = shadow(model, fake)
        fuse_shadow(model, twin, None)
        for i, row in enumerate(rows):
            if row.name in servable and row.name in seen:
                rows[i] = row._replace(saved=saved_by(twin.get_submodule(row.name), seen[row.name], fake))
    return rows


def _inputs(model: nn.Module, names: set[str], inputs: tuple[Any, ...], fake: FakeTensorMode) -> dict[str, Tensor]:
    """What each candidate is called with, without its numbers: all of them at once might not fit into memory."""
    twin = copy.deepcopy(model).eval()
    seen: dict[str, Tensor] = {}

    def note(name: str, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            seen.setdefault(name, fake.from_tensor(args[0].detach()))

    for name, module in twin.named_modules():
        if name in names:
            module.register_forward_pre_hook(lambda _, args, name=name: note(name, args))
    with torch.no_grad():
        twin(*inputs)
    return seen
