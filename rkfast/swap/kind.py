"""What the classes of swapped modules share: the stock class stays their base, and is one assignment away."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from rkfast.nn.alike import alike
from rkfast.nn.norm import hooked
from rkfast.ops import checks


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
    def sample(cls, module: Any) -> tuple[int, ...]:
        """The shape of a small input; of kinds that are known by their class there is none."""
        raise NotImplementedError

    @classmethod
    def serving(cls, module: Any) -> Callable[[Tensor], Tensor]:
        """What module, which becomes one of this kind, computes where no backend refuses."""
        swap(module, cls, Options())

        def run(x: Tensor) -> Tensor:
            found = cls.reads(module)
            return module.stock.forward(module, x) if isinstance(found, str) else module.fused(found, x)

        return run

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

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"torch.jit.script: {type(self).__name__} is fused by rkfast, and TorchScript cannot compile that; call "
            "rkfast.unfuse(model) first, or write rkfast.fold(model) to a file with rkfast.export"
        )

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


def mixes(x: Tensor) -> str | None:
    """Why a block that joins x with what its convolutions make of it is not served: how stock PyTorch writes the join
    decides the dtype, in place that of the convolutions, else the wider one."""
    dtype = checks.dtype_of_call(x)
    return None if dtype == x.dtype else f"an input of {x.dtype}, and autocast makes {dtype} of it"


def takes_more(module: nn.Module) -> str | None:
    """Why a module whose forward may be called with something besides x is not swapped."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(stock_class(module).forward).parameters.values()
    if sum(p.kind in kinds for p in found) > 2:
        return f"{type(module).__name__}.forward takes more than one input"
    return None


def agrees(module: nn.Module, kind: type[Kind]) -> bool:
    """Whether kind computes what module does."""
    return alike(module, kind.serving, kind.sample)
