"""What of a network is fused, and why the rest is not."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rkfast.swap.fuse import check_model, survey
from rkfast.swap.kind import Kind


class Row(NamedTuple):
    """A module that looks like one that is served.

    name: its path in the network, "" for the network itself. kind: what it is. layers: how many layers a dense block
    has, else 1. fused: whether the fused forward serves it. reason: why it does not.
    """

    name: str
    kind: str
    layers: int
    fused: bool
    reason: str


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
            state = "fused" if row.fused else f"stock: {row.reason}"
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


def report(model: nn.Module, *inputs: Any) -> Report:
    """Each module of a network that looks like one that is served: whether it is fused, and if not, why.

    Args:
        model: a network; it stays as it is.
        inputs: what the network is called with. A copy is run with it, and what depends on dtype, device and size of
            the blocks' inputs is told too.

    Raises:
        TypeError: model is no module.
    """
    check_model(model)
    seen = _inputs(model, inputs) if inputs else {}
    rows = Report()
    for name, module, kind, reason in survey(model):
        if kind is None:
            if not module.fused and reason is None:
                reason = "made with fused=False; rkfast.fuse(model) changes that"
            rows.append(Row(name, type(module).__name__, 1, reason is None, reason or ""))
            continue
        found = kind.reads(module)
        if reason is None and isinstance(module, Kind):
            reason = module._rkfast.slower
            if reason is None and name in seen:
                reason = module.refuses(found, seen[name])
        elif reason is None:
            reason = "not swapped; rkfast.fuse(model) swaps it, but for what filter_fn leaves out"
        layers = len(module._modules) if kind.title == "dense block" else 1
        rows.append(Row(name, kind.title, layers, reason is None, reason or ""))
    return rows


def _inputs(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """What each swapped module is called with."""
    twin = copy.deepcopy(model).eval()
    seen: dict[str, Tensor] = {}
    for name, module in twin.named_modules():
        if isinstance(module, Kind):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.setdefault(name, args[0]) if args else None
            )
    with torch.no_grad():
        twin(*inputs)
    return seen
