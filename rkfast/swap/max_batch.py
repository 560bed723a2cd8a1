"""How large a batch may be, from shapes alone."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rkfast.ops import checks, layout
from rkfast.swap.copies import has_fused, inside, stock, tensors
from rkfast.swap.estimate import fake_mode, fuse_shadow, in_words, shadow, without_numbers

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

OPTIMIZERS = {"sgd": 1, "adamw": 2}  # tensors that they keep per parameter; SGD with momentum
ROUNDS = 8


def max_batch(
    model: nn.Module,
    *inputs: Any,
    budget: int | None = None,
    optimizer: str | float = "sgd",
    memory: str | None = None,
    fused: bool = True,
) -> int:
    """The largest batch whose training step fits into memory: an estimate, without computing anything.

    Counted are parameters, buffers, gradients, what the optimizer keeps, inputs, and what forward and backward hold at
    their peak, by the sizes of all their tensors. Not counted is what a call uses inside (workspaces of cuDNN, scratch
    of the C++ kernel of ``dense_block``, which without bottlenecks is some tensors as large as what a layer reads) and
    what an allocator loses between blocks: leave memory for it.

    Args:
        model: a network as it is going to be trained, on its device; also one in DistributedDataParallel or
            torch.compile. It stays as it is; if nothing in it is fused, a fused one is meant.
        inputs: what it is called with, in a batch of any size that it can be trained with: dimension 0 of the first
            tensor, and of every tensor that is as long there.
        budget: bytes for all of this. None is what is free on the model's device (on a CPU in the whole machine,
            whatever a container may use of it), and what its parameters, buffers and gradients have already.
        optimizer: "sgd" with momentum, "adamw", or how many tensors it keeps per parameter.
        memory: "speed" or "min", as in ``fuse``; None is what the network was fused with, and "speed" where it was not.
        fused: False asks for that of stock PyTorch.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or value.
        RuntimeError: not even a batch of one fits; the forward asks for the value of a tensor; or it is not known how
            much memory is free.
    """
    net = inside(model)
    if memory is not None:
        checks.memory(memory)
    states = _states(optimizer)
    batch = _batch(inputs)
    own = [*net.parameters(), *net.buffers()]
    fixed = sum(_bytes(t) for t in own)
    fixed += sum(round(_bytes(p) * (1 + states)) for p in net.parameters() if p.requires_grad)
    if budget is None:
        device = (own or [t for _, t in tensors(inputs, "inputs")])[0].device
        held = own + [p.grad for p in net.parameters() if p.grad is not None]
        budget = free_bytes(device) + sum(_bytes(t) for t in held)
    elif isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise ValueError(f"budget: expected a number of bytes, got {budget!r}")
    fake = fake_mode()
    twin = shadow(net, fake)
    if not fused:
        stock(twin)
    elif memory is not None or not has_fused(net):
        fuse_shadow(net, twin, memory or "speed")

    def needed(n: int) -> int:
        return fixed + peak(twin, _resized(inputs, batch, n, fake), fake)

    # Nearly affine in the batch: a line through two sizes, and then through the two around the answer.
    low, high = batch, 2 * batch
    bytes_low, bytes_high = needed(low), needed(high)
    for _ in range(ROUNDS):
        each = (bytes_high - bytes_low) / (high - low)
        if each <= 0:
            raise RuntimeError(
                "inputs: the memory of a step does not grow with dimension 0 of the inputs, so no batch is too large"
            )
        found = int(low + (budget - bytes_low) // each)
        if found < 1:
            raise RuntimeError(
                f"not even a batch of one fits: it needs about {in_words(int(bytes_low - each * (low - 1)))} and there "
                f'are {in_words(budget)}; memory="min" or smaller inputs need less'
            )
        if found in (low, high):
            break
        low, bytes_low = (high, bytes_high) if abs(high - found) < abs(low - found) else (low, bytes_low)
        high, bytes_high = found, needed(found)
    return found


def _states(optimizer: object) -> float:
    if isinstance(optimizer, str) and optimizer in OPTIMIZERS:
        return OPTIMIZERS[optimizer]
    if isinstance(optimizer, (int, float)) and not isinstance(optimizer, bool) and optimizer >= 0:
        return float(optimizer)
    known = ", ".join(OPTIMIZERS)
    raise ValueError(
        f"optimizer: expected one of {known}, or how many tensors it keeps per parameter, got {optimizer!r}"
    )


def _batch(inputs: Any) -> int:
    for _, t in tensors(inputs, "inputs"):
        if t.dim() and t.shape[0]:
            return t.shape[0]
    raise ValueError("inputs: there is no tensor with a batch in dimension 0")


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _resized(inputs: Any, batch: int, n: int, fake: FakeTensorMode) -> Any:
    def one(t: Tensor) -> Tensor:
        if not t.dim() or t.shape[0] != batch:
            return fake.from_tensor(t)
        with fake:
            shape = (n, *t.shape[1:])
            last = t.dim() > 2 and layout.is_channels_last(t)
            return torch.empty_strided(shape, layout.strides(shape, last), dtype=t.dtype, device=t.device)

    return pytree.tree_map_only(Tensor, one, inputs)


def peak(twin: nn.Module, inputs: tuple[Any, ...], fake: FakeTensorMode) -> int:
    """Bytes that a training step of a shadow holds at its peak: inputs, and all that is made on the way, but for the
    gradients of the parameters."""
    given = sum(_bytes(t) for _, t in tensors(inputs, "inputs"))
    with without_numbers(fake), torch.enable_grad():
        for p in twin.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        with _Live() as live:
            outs = [t for _, t in tensors(twin(*inputs), "output") if t.requires_grad]
            torch.autograd.backward(outs, [torch.empty_like(t) for t in outs])
    return given + live.peak


class _Live(TorchDispatchMode):
    """Bytes of all storages made inside that are still there, and how many they were at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(result):
            if not isinstance(t, Tensor):
                continue
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self.seen:
                self.seen.add(key)
                self.now += size
                weakref.finalize(storage, self._gone, key, size)
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses.

    Raises:
        RuntimeError: the system does not tell.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu":
        try:
            for line in Path("/proc/meminfo").read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return 1024 * int(line.split()[1])
        except OSError:
            pass
    raise RuntimeError(f"budget: how much memory is free on {device} is not known here; give a number of bytes")
