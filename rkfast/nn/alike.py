"""Whether another way to run a module computes what the module does, tried on copies of it with other numbers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

KNOWN = ("torchvision", "timm", "rkfast")
SIZES = {"in_channels", "out_channels", "num_features", "in_features", "out_features", "output_padding"}
DROP_RATES = ("drop_rate", "drop_prob", "dropout")
MEMORY_FLAGS = ("memory_efficient", "grad_checkpointing", "efficient")
_found: dict[Any, bool] = {}

Run = Callable[[Tensor], Tensor]


def alike(module: nn.Module, other: Callable[[Any], Run], sample: Callable[[Any], Sequence[int]]) -> bool:
    """Whether ``other(twin)(x)`` is what ``twin(x)`` is, for copies of module with other numbers and without hooks, in
    float64: results, gradients of x and of all parameters, and running statistics behind them, in training and in
    evaluation, with the dropout that it has and without any.

    Of classes of known libraries one of several sizes is tried; what others do must not depend on their input's numbers
    or size, and use every layer once.

    other: a function (one and the same for the same question) that may change the copy it gets.
    sample: the shape of a small input of module.
    """
    if type(module).__module__.partition(".")[0] not in KNOWN:
        return _is_straight(module) and _computes(module, other, sample)
    if any("forward" in vars(part) for part in module.modules()):
        return _computes(module, other, sample)
    key = other, type(module).forward, _signature(module)
    if key not in _found:
        _found[key] = _computes(module, other, sample)
    return _found[key]


def _signature(module: nn.Module) -> Any:
    """What a class may make its forward depend on, but for sizes and the number of equal children."""
    own = {
        name: value
        for name, value in vars(module).items()
        if name not in SIZES and isinstance(value, (bool, int, float, str, tuple, type(None)))
    }
    children = {(_name(name), None if child is None else _signature(child)) for name, child in module._modules.items()}
    return type(module), tuple(sorted(own.items())), frozenset(children)


def _name(name: str) -> str:
    return name.rstrip("0123456789") if name.startswith("denselayer") else name


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, (nn.Sequential, nn.ModuleDict, nn.ModuleList)) and (
            not m._modules or isinstance(m, _BatchNorm) or type(m).__module__.startswith("torch.nn")
        )


def _is_straight(module: nn.Module) -> bool:
    """Whether forward, called with x alone, has no branches on it, and calls every layer with parameters once."""
    try:
        twin = _copied(module).to("meta")
        root = nn.Sequential(twin)
        calls = [str(node.target) for node in _Tracer().trace(root).nodes if node.op == "call_module"]
    except Exception:
        return False
    called = [p for name in calls for p in root.get_submodule(name).parameters()]
    return len(called) == len(set(called)) == len(list(twin.parameters()))


def _computes(module: nn.Module, other: Callable[[Any], Run], sample: Callable[[Any], Sequence[int]]) -> bool:
    try:
        with torch.inference_mode(False), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            twin = _copied(module).to_empty(device="cpu").double().requires_grad_()
            alone(twin)  # it computes the same, and no other process would answer
            torch.default_generator.manual_seed(0)
            with torch.no_grad():
                for p in twin.parameters():
                    p.uniform_(-1, 1).div_(max(p[0].numel(), 1) ** 0.5 if p.dim() > 1 else 1)
                for b in twin.buffers():
                    b.uniform_(0.5, 1.5) if b.is_floating_point() else b.zero_()
            shape = sample(module)
            return _agree(twin, other, shape) and (not without_chance(twin) or _agree(twin, other, shape))
    except Exception:  # whatever it is, it is no such module
        return False


def _agree(twin: nn.Module, other: Callable[[Any], Run], shape: Sequence[int]) -> bool:
    theirs, ours = copy.deepcopy(twin), copy.deepcopy(twin)
    ways: tuple[tuple[nn.Module, Run], ...] = ((theirs, theirs), (ours, other(ours)))
    for training in (True, False):
        seen = []
        for net, run in ways:
            torch.default_generator.manual_seed(1)
            seen.append(_outcome(net.train(training), run, torch.randn(*shape, dtype=torch.double)))
        if not all(map(_close, *seen)):
            return False
    return True


def _outcome(net: nn.Module, run: Run, x: Tensor) -> list[Tensor]:
    """What run makes of x, the gradients, and what is then in the buffers."""
    with torch.enable_grad():
        out = run(x.requires_grad_() * 1)  # which may be written into
        sources = [x, *net.parameters()]
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        found = torch.autograd.grad(out, sources, cotangent, allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(sources, found, strict=True)]
    return [out.detach(), *gradients, *(b.detach().double() for b in net.buffers())]


def _close(ours: Tensor, theirs: Tensor) -> bool:
    size = theirs.abs().max().item() if theirs.numel() else 0.0
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9 * (1 + size))


def alone(module: nn.Module) -> None:
    """With nn.BatchNorm2d in place of every nn.SyncBatchNorm."""
    for part in module.modules():
        if type(part) is nn.SyncBatchNorm:
            part.__class__ = nn.BatchNorm2d  # type: ignore[assignment]


def _copied(module: nn.Module) -> nn.Module:
    """A copy without hooks and activation checkpointing, which do not decide what a module computes."""
    memo = {}  # of tensors that are neither parameters nor buffers, as pruning leaves some
    for t in (t for part in module.modules() for t in vars(part).values() if isinstance(t, Tensor)):
        memo[id(t)] = t.detach().to("cpu", torch.double if t.is_floating_point() else t.dtype, copy=True)
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    without_checkpoints(twin)
    return twin


def without_checkpoints(module: nn.Module) -> None:
    """Without activation checkpointing, which moves running statistics again."""
    _set(module, MEMORY_FLAGS, bool, False)


def without_chance(module: nn.Module) -> bool:
    """Without dropout; whether there was any."""
    dropouts = [part for part in module.modules() if isinstance(part, nn.modules.dropout._DropoutNd) and part.p]
    for part in dropouts:
        part.p = 0.0
    return _set(module, DROP_RATES, (int, float), 0.0) or bool(dropouts)


def _set(module: nn.Module, names: Sequence[str], known: Any, value: object) -> bool:
    """Whether one of these attributes had another value."""
    found = False
    for part in module.modules():
        for name in names:
            old = getattr(part, name, None)
            if isinstance(old, known) and old != value:
                with contextlib.suppress(AttributeError):  # a property
                    setattr(part, name, value)
                    found = True
    return found
