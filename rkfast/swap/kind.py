"""What the classes of swapped modules share: the stock class stays their base, and is one assignment away."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rkfast.nn.norm import hooked


@dataclasses.dataclass
class Options:
    """memory: as in ``fuse``. slower: why ``tune`` found the stock module the better choice. parts: the classes of the
    children that were compared; () for any."""

    memory: str = "speed"
    slower: str | None = None
    parts: tuple[type, ...] = ()


class Kind(nn.Module):
    """A kind of module that ``fuse`` serves. It is mixed into the module's own class, whose forward is then
    ``super().forward``, and serves call by call: what has changed since (a hook, another activation) is heard."""

    title: str
    stock: type[nn.Module]
    _rkfast: Options

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.__dict__["_rkfast"] = Options()  # nn.Sequential makes a part of itself so

    @classmethod
    def reads(cls, module: Any) -> Any:
        """What a fused forward needs of the module as it is now; a str is why it cannot be served, and None means that
        it is no candidate."""
        raise NotImplementedError

    def fused(self, found: Any, x: Tensor) -> Tensor:
        """The module's result from what ``reads`` found."""
        raise NotImplementedError

    def refuses(self, found: Any, x: Tensor) -> str | None:
        """Why stock PyTorch serves this x; None where it does not."""
        return None

    @classmethod
    def sample(cls, module: Any, found: Any) -> tuple[int, ...]:
        """The shape of a small input; of kinds that are known by their class there is none."""
        raise NotImplementedError

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        found = None if others or named else self.found(x)
        return super().forward(x, *others, **named) if found is None else self.fused(found, x)

    def found(self, x: Tensor) -> Any:
        """What ``fused`` takes, or None where stock PyTorch serves x."""
        if self._rkfast.slower is not None or not isinstance(x, Tensor):  # a Proxy of torch.fx
            return None
        if self._rkfast.parts and self._rkfast.parts != parts_of(self):
            return None
        found = self.reads(self)
        return None if found is None or isinstance(found, str) or self.refuses(found, x) else found

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made on the way cannot be found by its name.
        reduced = super().__reduce_ex__(protocol)
        return (_new, (_kind(type(self)), self.stock), *reduced[2:])

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}, rkfast" if own else "rkfast"


def _kind(cls: type[Kind]) -> type[Kind]:
    kind: type[Kind] = cls.__mro__[1]
    return kind


def _new(kind: type[Kind], stock: type[nn.Module]) -> nn.Module:
    cls = swapped(kind, stock)  # type: ignore[arg-type]  # classes are hashable
    return cls.__new__(cls)


@functools.cache
def swapped(kind: type[Kind], stock: type[nn.Module]) -> type[nn.Module]:
    """The class of a fused module whose class is ``stock``."""
    own = {"stock": stock, "__module__": stock.__module__, "__doc__": stock.__doc__}
    return type(stock.__name__, (kind, stock), own)


def parts_of(module: nn.Module) -> tuple[type, ...]:
    """The classes of its children, but for torch's own, which ``reads`` looks at."""
    found = map(stock_class, module._modules.values())
    return tuple(cls for cls in found if not cls.__module__.startswith("torch.nn"))


def swap(module: nn.Module, kind: type[Kind], options: Options) -> None:
    module.__dict__["_rkfast"] = options
    module.__class__ = swapped(kind, type(module))  # type: ignore[arg-type]


def restore(module: Kind) -> None:
    del module.__dict__["_rkfast"]
    module.__class__ = module.stock  # type: ignore[assignment]


def stock_class(module: object) -> Any:
    """A module's class without what ``fuse`` has mixed in."""
    return module.stock if isinstance(module, Kind) else type(module)


def leaves(module: nn.Module, prefix: str = "") -> dict[str, nn.Module]:
    """Modules that compute, by name: children, and those of an nn.Sequential among them."""
    found: dict[str, nn.Module] = {}
    for name, child in module._modules.items():
        if isinstance(child, nn.Sequential) and stock_class(child) is nn.Sequential and not hooked(child):
            found |= leaves(child, f"{prefix}{name}.")
        elif child is not None and not (type(child) is nn.Identity and not hooked(child)):
            found[prefix + name] = child
    return found


def unserved(module: nn.Module) -> str | None:
    """Why no module like this can be swapped, whatever it computes."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is scripted"
    if isinstance(module, torch.fx.GraphModule):
        return "it is a traced graph"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    if any(type(p).__name__ == "DTensor" for p in module.parameters()):  # importing it takes most of a second
        return "its parameters are sharded"
    return None


def takes_more(module: nn.Module) -> str | None:
    """Why a module whose forward may be called with something besides x is not swapped."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(stock_class(module).forward).parameters.values()
    if sum(p.kind in kinds for p in found) > 2:
        return f"{type(module).__name__}.forward takes more than one input"
    return None


KNOWN = ("torchvision", "timm")
SIZES = {"in_channels", "out_channels", "num_features", "in_features", "out_features", "output_padding"}
DROP_RATES = ("drop_rate", "drop_prob", "dropout")
MEMORY_FLAGS = ("memory_efficient", "grad_checkpointing", "efficient")
_agreed: dict[Any, bool] = {}


def agrees(module: nn.Module, kind: type[Kind]) -> bool:
    """Whether a copy of module with other numbers computes what its kind does, in float64, in training and evaluation:
    results, and running statistics behind them. Of classes of known libraries one of several sizes is tried; what
    others do must not depend on their input's numbers or size, and use every layer once."""
    if type(module).__module__.partition(".")[0] not in KNOWN:
        return _is_straight(module) and _computes(module, kind)
    key = kind, type(module).forward, _signature(module)
    if key not in _agreed:
        _agreed[key] = _computes(module, kind)
    return _agreed[key]


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
    """Whether forward has no branches on its input, and calls every layer with parameters once."""
    try:
        twin = copy.deepcopy(module).to("meta")
        _plainly(twin)
        calls = [str(node.target) for node in _Tracer().trace(twin).nodes if node.op == "call_module"]
    except Exception:
        return False
    layers = [twin.get_submodule(name) for name in calls]
    called = [p for layer in layers for p in layer.parameters()]
    return len(called) == len(set(called)) == len(list(twin.parameters()))


def _computes(module: nn.Module, kind: type[Kind]) -> bool:
    try:
        twin: Any = copy.deepcopy(module).to_empty(device="cpu").double().requires_grad_()
        _plainly(twin)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for p in twin.parameters():
                p.uniform_(-1, 1).div_(max(p[0].numel(), 1) ** 0.5 if p.dim() > 1 else 1)
            for b in twin.buffers():
                b.uniform_(0.5, 1.5) if b.is_floating_point() else b.zero_()
            alone(twin)  # it computes the same, and no other process would answer
            ours = copy.deepcopy(twin)
            swap(ours, kind, Options())
            for training in (True, False):
                twin.train(training)
                ours.train(training)
                found = kind.reads(ours)
                x = torch.randn(kind.sample(ours, found), dtype=torch.double)
                if not _same(_outcome(ours, functools.partial(ours.fused, found), x), _outcome(twin, twin, x)):
                    return False
                pairs = zip(ours.buffers(), twin.buffers(), strict=True)
                if not all(torch.allclose(a, b, rtol=1e-9) for a, b in pairs):
                    return False
    except Exception:  # whatever it is, it is no such module
        return False
    return True


def _outcome(module: nn.Module, run: Any, x: Tensor) -> list[Tensor]:
    """What run makes of x, and the gradients."""
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        out = run(x * 1)  # which may be written into
        sources = [x, *module.parameters()]
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        found = torch.autograd.grad(out, sources, cotangent, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(sources, found, strict=True))]


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-7, atol=1e-9 * (1 + b.abs().max().item()))
        for a, b in zip(ours, theirs, strict=True)
    )


def alone(module: nn.Module) -> None:
    """With nn.BatchNorm2d in place of every nn.SyncBatchNorm."""
    for part in module.modules():
        if type(part) is nn.SyncBatchNorm:
            part.__class__ = nn.BatchNorm2d  # type: ignore[assignment]


def _plainly(module: nn.Module) -> None:
    """Without hooks, dropout and activation checkpointing, none of which decides what a module computes."""
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
            hooks.clear()
    without_chance(module)


def without_chance(module: nn.Module) -> None:
    """Without dropout, and without activation checkpointing, which moves running statistics again."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        for names, known, value in ((DROP_RATES, (int, float), 0.0), (MEMORY_FLAGS, bool, False)):
            for name in names:
                if isinstance(getattr(part, name, None), known):
                    with contextlib.suppress(AttributeError):  # a property
                        setattr(part, name, value)
