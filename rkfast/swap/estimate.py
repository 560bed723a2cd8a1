"""What a training step keeps for its backward, from shapes alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rkfast import measure
from rkfast.ops import checks
from rkfast.swap.copies import chosen, has_fused, inside, is_fused, stock, tensors
from rkfast.swap.fuse import fuse_one, survey

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode


class Estimate(NamedTuple):
    """Bytes kept for the backward by stock PyTorch and by the fused network."""

    stock: int
    fused: int

    def __str__(self) -> str:
        share = f", {100 * self.fused / self.stock:.0f} %" if self.stock else ""
        return f"kept for the backward: stock {in_words(self.stock)}, fused {in_words(self.fused)}{share}"


def in_words(count: int) -> str:
    """Such as "12.3 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def estimate(model: nn.Module, *inputs: Any, memory: str | None = None) -> Estimate:
    """How many bytes autograd keeps between forward and backward, stock and fused, without computing anything.

    Copies of the network without numbers go through a forward with gradients, in the modes that its modules have and
    under the autocast around the call. Each storage counts once; parameters, buffers and inputs do not count. What the
    forward and the backward need for a while only comes on top: see ``max_batch``.

    Args:
        model: a network, which stays as it is and need not be fused; also one in DistributedDataParallel or
            torch.compile.
        inputs: what it is called with; of its tensors only shape, dtype, device and layout matter.
        memory: "speed" or "min", as in ``fuse``; None is what the network was fused with, and "speed" where it was not.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or value.
        RuntimeError: the forward asks for the value of a tensor.
    """
    net = inside(model)
    if memory is not None:
        checks.memory(memory)
    fake = fake_mode()
    given = pytree.tree_map_only(Tensor, fake.from_tensor, inputs)
    found = []
    for fused in (False, True):
        twin = shadow(net, fake)
        if not fused:
            stock(twin)
        elif memory is not None or not has_fused(net):
            fuse_shadow(net, twin, memory or "speed")
        found.append(kept(twin, given, fake))
    return Estimate(*found)


def fake_mode() -> FakeTensorMode:
    """In which tensors have no memory; the copies of one network share it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def shadow(net: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """A copy without numbers."""
    return copy.deepcopy(net, {id(t): fake.from_tensor(t) for t in (*net.parameters(), *net.buffers())})


def fuse_shadow(net: nn.Module, twin: nn.Module, memory: str | None) -> None:
    """``fuse(twin)``, as net's numbers allow it; where memory is None, what is fused stays as it was."""
    for name, module, kind, reason in survey(net):
        if reason is None and not (memory is None and is_fused(module)):
            fuse_one(twin.get_submodule(name), kind, memory or "speed")


def kept(net: nn.Module, inputs: tuple[Any, ...], fake: FakeTensorMode) -> int:
    """Bytes that the forward of a shadow keeps."""
    own = [*(t for _, t in tensors(inputs, "inputs")), *net.parameters(), *net.buffers()]
    with without_numbers(fake), torch.enable_grad():
        return measure.saved_bytes(lambda: net(*inputs), own)


@contextlib.contextmanager
def without_numbers(fake: FakeTensorMode) -> Iterator[None]:
    from torch._subclasses import fake_tensor

    try:
        with fake:
            yield
    except (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedOperatorException,
    ) as error:
        raise RuntimeError(
            f"model: its forward cannot go without numbers ({error}); measure it with rkfast.measure.saved_bytes"
        ) from error


def saved_by(module: nn.Module, x: Tensor, fake: FakeTensorMode) -> int | None:
    """How many bytes fewer a candidate of a fused shadow keeps than its stock form, called with x, which has no numbers
    either; None where that cannot be told. What is fused inside it stays so."""
    given = x.detach().requires_grad_(x.is_floating_point())
    own = [*module.parameters(), *module.buffers()]
    found = []
    try:
        for fused in (False, True):
            with chosen(module, fused), without_numbers(fake), torch.enable_grad():
                # A tensor counts where it is read: x does, and the result does not.
                found.append(measure.saved_bytes(lambda: module(given), own, exclude_result=True))
    except (RuntimeError, AttributeError):  # AttributeError: its result is no Tensor
        return None
    return found[0] - found[1]
