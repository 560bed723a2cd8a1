"""The residual blocks of a trained network as stages of Runge-Kutta steps, with the same weights, and back."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from rkfast import tableau as tableaux
from rkfast.models.base import ImageModel, real
from rkfast.nn import Period, RKStep
from rkfast.nn.alike import alike
from rkfast.nn.branch import slope, takes_moments
from rkfast.nn.form import Form, children, form_of, present, sample
from rkfast.nn.norm import hooked
from rkfast.nn.step import Readers, asks_for_moments, with_moments
from rkfast.ops import Moments
from rkfast.ops.rk_sum import can_share
from rkfast.tableau import Tableau

MAX_STEP = 64


def restack(model: nn.Module, method: Tableau | str, *, step: float | None = None) -> nn.Module:
    """Make s consecutive residual blocks of one shape the stages of one Runge-Kutta step, in place.

    A block is ``act(y + F(y))``, with or without an activation, such as torchvision's ``relu(y + F(y))``. Of s blocks
    with F_1 ... F_s, s the stages of the method, a step makes::

        k_i = F_i(x_i),   x_1 = y,   x_i = act(y + step * sum_{j<i} a_ij k_j),   y' = act(y + step * sum_i b_i k_i)

    Every sum is followed by the activation that follows the sums of the network, so that each F_i reads what it was
    trained on. ``"euler"`` is the network as it was, to the bit.

    Modules, parameters and keys of the state_dict stay; ``unstack`` undoes it. Blocks are looked for in nn.Sequential
    and rkfast.nn.Period: BasicBlock and Bottleneck of torchvision, timm and rkfast without ``downsample``, fused or
    not, others with the same names of layers if they compute the same, and Euler RKSteps. What changes shape is left
    alone; so is what remains of a run of blocks that s does not divide, with a warning that names it. Blocks are not
    called any more, only their layers: a hook on a block is an error, on a layer it runs. The blocks' container can be
    called but not iterated.

    Args:
        model: a ResNet, or any module that holds such blocks.
        method: a tableau, or its name.
        step: the step size h. None is s, with which a step covers what the s blocks covered; 1 is HO-ResNet's, which
            covers one. (Of 8 blocks trained on handwritten digits to 99.7 %, midpoint steps get 92.8 % without further
            training with the former, 11.1 % with the latter; after one more epoch 99.4 % and 99.2 %, RK4 steps 99.7 %
            and 97.5 %.)

    Returns:
        model.

    Raises:
        TypeError: model is no module, or method neither a tableau nor a name.
        ValueError: there is no such method, no run of blocks is long enough, a block has a hook, the model is restacked
            already, or step is out of range. The model is as before.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    tableau = tableaux.get(method) if isinstance(method, str) else method
    if not isinstance(tableau, Tableau):
        raise TypeError(f"method: expected a Tableau or the name of one, got {type(method).__name__}")
    step = float(tableau.stages) if step is None else real("step", step, 0, MAX_STEP, "(]")
    if any(isinstance(module, Restacked) for module in model.modules()):
        raise ValueError("model: it is restacked already; call rkfast.unstack(model) first")
    if getattr(model, "grad_checkpointing", False) and not isinstance(model, ImageModel):
        raise ValueError("model: it checkpoints its blocks one by one; call model.set_grad_checkpointing(False) first")
    plans, left, runs = [], [], []
    for prefix, container in model.named_modules():
        if type(container) not in (nn.Sequential, Period):
            continue
        units: list[_Unit] = []
        for form, names in _runs(container):
            whole = len(names) - len(names) % tableau.stages if form else 0
            h = step * (getattr(container, names[0]).step if form == _OWN else 1.0)
            weights = tableau.floats(h) if whole else _NO_WEIGHTS
            units += [_Unit(form, names[i : i + tableau.stages], weights) for i in range(0, whole, tableau.stages)]
            units += [_Unit(None, (name,), _NO_WEIGHTS) for name in names[whole:]]
            if form:
                runs.append(len(names))
                left += [f"{prefix}.{name}".lstrip(".") for name in names[whole:]]
        if any(unit.form for unit in units):
            plans.append((prefix, container, units))
    if not plans:
        found = f"runs of {', '.join(map(str, runs))} residual blocks of one shape" if runs else "no residual blocks"
        raise ValueError(
            f"model: {type(model).__name__} has {found}; {tableau.name} takes {tableau.stages} in a row, such as "
            "BasicBlock or Bottleneck of torchvision, timm or rkfast without downsample, or Euler steps"
        )
    as_it_was = tableau.stages == 1 and tableau.floats(step)[1] == (1.0,)
    for prefix, container, units in plans:
        for unit in units:
            for name in unit.names if unit.form and not as_it_was else ():
                _refuse_hooks(getattr(container, name), f"{prefix}.{name}".lstrip("."), ValueError)
    for _, container, units in plans:
        if as_it_was:
            units = [unit._replace(form=None) for unit in units]
        container._plan = _Plan(type(container), tableau, step, units)
        container.__class__ = Restacked
    if left:
        warnings.warn(
            f"restack: {tableau.name} takes {tableau.stages} blocks of one shape in a row; left as they are: "
            f"{', '.join(left)}",
            stacklevel=2,
        )
    return model


def unstack(model: nn.Module) -> nn.Module:
    """Undo ``restack`` in place: the same modules compute what they computed before, with the weights they have now.

    Raises:
        TypeError: model is no module.
        ValueError: nothing in it is restacked.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    found = [module for module in model.modules() if isinstance(module, Restacked)]
    if not found:
        raise ValueError("model: nothing in it is restacked")
    for module in found:
        plan = module.__dict__.pop("_plan")
        module.__class__ = plan.original
    return model


class _Unit(NamedTuple):
    """Children that make one step, with (h * a, h * b), or with no form a child that is called as it is."""

    form: Form | None
    names: tuple[str, ...]
    weights: tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]


class _Plan(NamedTuple):
    original: type[nn.Sequential]
    tableau: Tableau
    step: float
    units: list[_Unit]


_OWN = Form((), "", (), "", ())  # an RKStep
_NO_WEIGHTS: Any = ((), ())


class Restacked(Period):
    """A container of residual blocks some of which are stages of Runge-Kutta steps; ``restack`` makes it."""

    _plan: _Plan

    def forward_with_moments(
        self, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        """The steps, taking y's moments if they are known, and leaving those of the result if asked for (and fused)."""
        units = self._plan.units
        if tuple(self._modules) != tuple(name for unit in units for name in unit.names):
            raise RuntimeError("blocks have been added or removed since restack(); call rkfast.unstack(model) first")
        parts = [[self._modules[name] for name in unit.names] for unit in units]
        for i, (unit, blocks) in enumerate(zip(units, parts, strict=True)):
            wanted = return_moments
            if i + 1 < len(units):
                wanted = _takes_moments(parts[i + 1][0]) if units[i + 1].form else asks_for_moments(parts[i + 1][0])
            if unit.form is None:
                y, moments = with_moments(blocks[0], y, moments, return_moments=wanted)
            else:
                for name, block in zip(unit.names, blocks, strict=True):
                    _refuse_hooks(block, f"block {name}", RuntimeError)
                y, moments = self._step(unit, blocks, y, moments, wanted)
        return y, moments

    def _step(
        self, unit: _Unit, blocks: list[Any], y: Tensor, moments: Moments | None, return_moments: bool
    ) -> tuple[Tensor, Moments | None]:
        form, (a, b) = unit.form, unit.weights
        assert form is not None
        own = form == _OWN
        acts = [getattr(block, form.activation) if form.activation else None for block in blocks]
        fused = blocks[0].fused if own else True
        rows = (*a, b)
        readers = Readers(y, [1.0] * len(rows), rows, share=fused and can_share())
        for i, block in enumerate(blocks):
            if any(a[i]):
                x = _sum(readers, a[i], acts[i - 1], fused, _takes_moments(block))
            else:
                x = readers.y(), moments
            readers.append(slope(block.branches[0], x[0], x[1] if fused else None) if own else _f(form, block, x[0]))
        return _sum(readers, b, acts[-1], fused, return_moments)

    def staged(self) -> Iterator[nn.Module]:
        """The blocks that are not called, only their layers."""
        return (self.get_submodule(name) for unit in self._plan.units if unit.form for name in unit.names)

    def __iter__(self) -> Iterator[nn.Module]:
        raise RuntimeError(
            "a restacked container is not the chain of its blocks; call it as a whole, take its blocks from "
            "children(), or call rkfast.unstack(model) first"
        )

    def extra_repr(self) -> str:
        steps = ", ".join("-".join(unit.names) for unit in self._plan.units if unit.form)
        return f"{self._plan.tableau.name}, step={self._plan.step:g}, steps of blocks {steps or 'as they are'}"


def _sum(
    readers: Readers, weights: Sequence[float], act: nn.Module | None, fused: bool, moments: bool
) -> tuple[Tensor, Moments | None]:
    """``act(y + sum_j weights[j] * k_j)``."""
    relu = type(act) is nn.ReLU and not hooked(act)
    total, found = readers.sum(weights, relu=relu, fused=fused, return_moments=moments and act is None)
    return (total if act is None or relu else act(total)), found


def _f(form: Form, block: nn.Module, x: Tensor) -> Tensor:
    for layer in present(block, (*form.inner, form.norm, *form.behind)):
        x = layer(x)
    return x


def _takes_moments(block: Any) -> bool:
    return type(block) is RKStep and block.fused and takes_moments(block.branches[0])


def _refuse_hooks(block: nn.Module, name: str, error: type[Exception]) -> None:
    if hooked(block):
        raise error(
            f"{name} has a hook, which would not run: a Runge-Kutta step calls the layers of a block, not the block; "
            "hook one of its layers, or remove the hook"
        )


def _runs(container: nn.Module) -> Iterator[tuple[Form | None, tuple[str, ...]]]:
    """Consecutive children whose steps may be taken together, and the others one by one (with no form)."""

    def signature(child: tuple[str, nn.Module]) -> Any:
        name, block = child
        form = _form_of(block)
        if form is None:
            return None, name
        act = form.activation and type(getattr(block, form.activation))
        shapes = tuple((key, value.shape) for key, value in block.state_dict().items())
        return form, act, getattr(block, "step", None) if form == _OWN else None, shapes

    for key, run in itertools.groupby(container.named_children(), signature):
        yield key[0], tuple(name for name, _ in run)


def _form_of(block: nn.Module) -> Form | None:
    """The form of a residual block that keeps shape; None for whatever else."""
    if type(block) is RKStep:
        euler = block.tableau.stages == 1 and block.tableau.floats()[1] == (1.0,)
        plain = block.variant == "textbook" and block.learned is None and block.h is None and block.tol is None
        return _OWN if euler and plain else None
    form = form_of(block)
    keeps_shape = form is not None and "downsample" not in children(block)
    return form if keeps_shape and alike(block, _summed, sample) else None


def _summed(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """``act(x + F(x))``."""
    form = form_of(block)
    assert form is not None
    return lambda x: getattr(block, form.activation)(x + _f(form, block, x))
