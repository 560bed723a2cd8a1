"""Attach time stepping controllers to a network, look at the step sizes, and leave the controllers behind."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from rkfast.nn import CliqueBlock, DenseBlock
from rkfast.nn.controller import CONTROLLERS, Controller, FixedSteps, features
from rkfast.tsc.stepped import Controllers, Run, Stage, Stepped, stages, stepped, swap


class BlockSteps(NamedTuple):
    """Step sizes of a block: ``sizes`` is a Tensor [C], the numbers are over its channels."""

    name: str
    mean: float
    min: float
    max: float
    sizes: Tensor

    @classmethod
    def of(cls, name: str, sizes: Tensor) -> BlockSteps:
        wide = sizes.double()
        return cls(name, wide.mean().item(), wide.min().item(), wide.max().item(), sizes)


class StepSizes(NamedTuple):
    """Step sizes of a network; ``evolution_time`` is T, the sum of all blocks' means (Yang et al., equation 9)."""

    blocks: list[BlockSteps]
    evolution_time: float

    @classmethod
    def of(cls, blocks: list[BlockSteps]) -> StepSizes:
        return cls(blocks, sum(block.mean for block in blocks))

    def __str__(self) -> str:
        width = max(len(block.name) for block in self.blocks)
        rows = [f"{b.name:{width}}  {b.mean:6.3f}  {b.min:6.3f}  {b.max:6.3f}" for b in self.blocks]
        head = f"{'block':{width}}  {'mean':>6}  {'min':>6}  {'max':>6}"
        return "\n".join([head, *rows, f"evolution time T = {self.evolution_time:.3f}"])


def attach(
    model: nn.Module,
    controller: str = "lstm",
    reduction: int | None = None,
    preserve: bool = False,
    *,
    value: float = 1.0,
) -> list[nn.Parameter]:
    """Give each residual block a step size per channel, made from the weights by a controller per stage, in place.

    ``y' = act(shortcut(y) + dt * F(y))`` (Yang et al., equation 13; a projection shortcut is not scaled); in a
    DenseNet or CliqueNet dt multiplies what a layer makes before it joins the others (whose BatchNorms, in training,
    divide it out again but for their eps), and one dt of a CliqueNet's layer serves both stages. The controller runs in
    every forward, gradients flow through it into the convolutions' weights, and nothing is kept from one
    forward to the next; ``accumulate`` runs it once for several. Step sizes have the dtype of the controller's
    parameters, float32 under autocast.

    Served are BasicBlock and Bottleneck of torchvision, timm and rkfast (ResNet, Wide ResNet, ResNeXt, SE-ResNet) in an
    nn.Sequential, others with the same names of layers if they compute the same, and DenseBlocks and CliqueBlocks of
    rkfast. A stage is a run of blocks of one size. Blocks keep their parameters, but change their class.

    The controllers are ``model.tsc``, with keys ``tsc.0.input.weight`` and so on behind the stock keys, which stay. A
    frozen or "indp" checkpoint has ``tsc.0.steps`` and loads where "fixed" is attached.

    Args:
        model: a network, not yet wrapped in DistributedDataParallel.
        controller: "lstm", "2fc" or "indp" (Table 2 of the paper: one that knows earlier steps, one that does not, and
            step sizes that are parameters), or "fixed", all step sizes equal to ``value`` (the paper's baselines are 1
            and 0.01).
        reduction: r of "lstm" and "2fc"; None for the paper's, 4 for blocks without bottleneck, 8 for those with one.
        preserve: start at the network's own output: step sizes are equal at first (1/2 with "lstm" and "2fc") and F is
            divided by them, exactly, in the parameters into which ``fold`` multiplies. ``detach`` takes it back. A
            checkpoint does not say it: attach with the same before loading one.
        value: of "fixed".

    Returns:
        The controllers' parameters, for an optimizer that exists already.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: there is no such controller, an option that it does not have, no residual blocks, or controllers
            are attached already; or a block cannot be preserved. The model is as before.
    """
    _module(model)
    _options(controller, reduction, preserve, value)
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(f"model: attach to the module, then wrap it again; got {type(model).__name__}")
    if next(stepped(model), None) is not None:
        raise ValueError("model: step sizes are attached already; call rkfast.tsc.detach(model) or fold(model) first")
    if isinstance(model, (DenseBlock, CliqueBlock)):
        raise ValueError(f"model: a {type(model).__name__} has no place for controllers; attach to what holds it")
    if hasattr(model, "tsc"):
        raise ValueError("model: it has an attribute tsc already, which is where the controllers would be")
    made: list[tuple[nn.Module, type[Stepped], list[Run]]] = []
    changes: list[tuple[Tensor, Tensor]] = []
    uses = Counter(child for module in model.modules() for child in module._modules.values())
    for prefix, module in model.named_modules():
        found = stages(module, uses)
        if found is None:
            continue
        kind, runs = found[0], []
        for stage in found[1]:
            new = _new(controller, stage, kind.weights(module, stage), reduction, value).train(model.training)
            start = new.start_at() if preserve else 1.0
            if start != 1.0:
                factors = _uniform(1 / start, stage, kind.weights(module, stage))
                changes += kind.changes(module, stage, factors, prefix)
            runs.append(Run(new, stage, start))
        made.append((module, kind, runs))
    if not made:
        raise ValueError(
            f"model: {type(model).__name__} has no residual blocks; expected BasicBlock or Bottleneck of torchvision, "
            "timm or rkfast in an nn.Sequential, or a DenseNet or CliqueNet of rkfast"
        )
    _apply(changes)
    for module, kind, runs in made:
        swap(module, kind, runs)
    controllers = Controllers(run.controller for _, _, runs in made for run in runs)
    model.add_module("tsc", controllers)
    return list(controllers.parameters())


def detach(model: nn.Module) -> nn.Module:
    """Undo ``attach`` in place: blocks with the weights they have now, whose step size is 1.

    Returns:
        model.

    Raises:
        TypeError: model is no module.
        ValueError: nothing is attached to it.
    """
    found = attached(model)
    changes: list[tuple[Tensor, Tensor]] = []
    for prefix, module, run in found:
        if run.preserved != 1.0:
            factors = _uniform(run.preserved, run.stage, module.weights(module, run.stage))
            changes += module.changes(module, run.stage, factors, prefix)
    _apply(changes)
    _restore(model)
    return model


def freeze(model: nn.Module) -> nn.Module:
    """Make the step sizes buffers and drop the controllers, in place; ``model.tsc.0.steps`` is a Tensor [L, C].

    Returns:
        model.

    Raises:
        TypeError, ValueError: as in ``detach``.
    """
    found = attached(model)
    fixed: dict[Controller, Controller] = {}
    for _, module, run in found:
        with torch.inference_mode(False), torch.no_grad():
            sizes = module.step_sizes(run).clone()
        new = FixedSteps(*sizes.shape).train(model.training)
        new.steps = sizes
        fixed[run.controller] = run.controller = new
    for home in _homes(model):
        home.tsc = Controllers(fixed[cast(Controller, old)] for old in home.tsc)
    return model


def fold(model: nn.Module) -> nn.Module:
    """Multiply the step sizes into the weights and give back the stock network, in place: with the same output, the
    stock classes and the stock keys.

    They go into weight and bias of the BatchNorm that ends a residual branch; behind a gate (squeeze and excitation)
    the columns of its first layer are divided by them besides; in a DenseNet or CliqueNet they go into the convolution
    that makes the new channels.

    Returns:
        model.

    Raises:
        TypeError: model is no module.
        ValueError: nothing is attached to it, or a block cannot be folded (no BatchNorm at its end, a gate of another
            kind, a gate and a step size of 0). The model is as before.
    """
    found = attached(model)
    changes: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for prefix, module, run in found:
            changes += module.changes(module, run.stage, module.step_sizes(run), prefix)
    _apply(changes)
    _restore(model)
    return model


def steps(model: nn.Module) -> StepSizes:
    """The step sizes as they are now: mean, smallest and largest of each block (Table 4 of the paper), and the sum of
    the means. Its ``str`` is a table.

    Raises:
        TypeError, ValueError: as in ``detach``.
    """
    blocks = []
    for prefix, module, run in attached(model):
        with torch.no_grad():
            sizes = module.step_sizes(run).clone()
        for name, block in zip(run.stage.names, sizes.unbind(), strict=True):
            blocks.append(BlockSteps.of(f"{prefix}.{name}".lstrip("."), block))
    return StepSizes.of(blocks)


def _module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def _options(controller: object, reduction: object, preserve: object, value: object) -> None:
    if not isinstance(controller, str):
        raise TypeError(f"controller: expected a str, got {type(controller).__name__}")
    if controller not in CONTROLLERS:
        raise ValueError(f"controller: {controller[:64]!r} is not one; expected one of {', '.join(CONTROLLERS)}")
    if reduction is not None:
        if isinstance(reduction, bool) or not isinstance(reduction, int):
            raise TypeError(f"reduction: expected an int, got {reduction!r}")
        if controller not in ("lstm", "2fc"):
            raise ValueError(f"reduction: {controller} has none; leave it out, or take lstm or 2fc")
        if reduction < 1:
            raise ValueError(f"reduction: expected at least 1, got {reduction}")
    if not isinstance(preserve, bool):
        raise TypeError(f"preserve: expected a bool, got {preserve!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"value: expected a number, got {value!r}")
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise ValueError(f"value: expected a finite number that float32 holds, got {str(value)[:64]}")
    if controller != "fixed" and value != 1.0:
        raise ValueError(f"value: {controller} finds its step sizes itself; leave it out, or take controller='fixed'")
    if preserve and value == 0:
        raise ValueError("value: with step sizes of 0 nothing can be preserved")


def _new(name: str, stage: Stage, weights: list[list[Tensor]], reduction: int | None, value: float) -> Controller:
    options: list[float] = []
    if name in ("lstm", "2fc"):
        options = [features(weights[0]), stage.reduction if reduction is None else reduction]
    elif name == "fixed":
        options = [value]
    like = weights[0][0]
    return CONTROLLERS[name](len(weights), stage.channels, *options).to(like.device, like.dtype)


def _uniform(size: float, stage: Stage, weights: list[list[Tensor]]) -> Tensor:
    """Tensor [L, C]."""
    return weights[0][0].detach().new_full((len(weights), stage.channels), size)


def attached(model: nn.Module) -> list[tuple[str, Stepped, Run]]:
    """All stages that have step sizes, by the name of their module."""
    _module(model)
    found = [(prefix, module, run) for prefix, module in stepped(model) for run in module._tsc_runs]
    if not found:
        raise ValueError("model: no step sizes are attached to it; call rkfast.tsc.attach(model) first")
    if {run.controller for _, _, run in found} != {
        controller for home in _homes(model) for controller in home.tsc.children()
    }:
        raise ValueError("model: it is a part of the network whose controllers it uses; pass all of that network")
    if any(run.controller.held is not None for _, _, run in found):
        raise ValueError("model: it is inside `with rkfast.tsc.accumulate(model)`; do this behind it")
    return found


def _homes(model: nn.Module) -> list[Any]:
    """The networks that controllers are attached to: model itself, or parts of it."""
    return [module for module in model.modules() if isinstance(module._modules.get("tsc"), Controllers)]


def _apply(changes: list[tuple[Tensor, Tensor]]) -> None:
    if len({tensor.data_ptr() if not tensor.is_meta else id(tensor) for tensor, _ in changes}) < len(changes):
        raise ValueError("model: blocks share weights into which different step sizes would go")
    with torch.no_grad():
        for tensor, factor in changes:
            tensor.mul_(factor)


def _restore(model: nn.Module) -> None:
    homes = _homes(model)
    for _, module in list(stepped(model)):
        module.restore()
    for home in homes:
        del home.tsc
