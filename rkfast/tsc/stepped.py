"""The modules whose class is swapped: what they compute with step sizes, and how these go into their weights."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rkfast.nn import CliqueBlock, DenseBlock
from rkfast.nn.alike import alike
from rkfast.nn.controller import Controller
from rkfast.nn.form import Form, form_of, residual, sample
from rkfast.ops import Moments


class Stage(NamedTuple):
    """Blocks of one size: children of a module, or stages of a CliqueBlock.

    names, channels: of the blocks. reduction: the controller's, unless another is asked for. form: of residual blocks.
    """

    names: list[str]
    channels: int
    reduction: int
    form: Form | None = None


@dataclasses.dataclass
class Run:
    """A stage and its controller, which the model holds.

    preserved: what the blocks' weights were divided by, so that the model computes at first what it did before.
    """

    controller: Controller
    stage: Stage
    preserved: float = 1.0


class Controllers(nn.ModuleList):
    """The controllers of a network, as ``network.tsc``; where the network is an nn.Sequential, its last child, which
    does nothing."""

    def forward(self, x: Any) -> Any:
        return x


class Stepped(nn.Module):
    """A module whose blocks get step sizes; its class as it was is ``_tsc_class``, and ``_tsc_runs`` are its blocks."""

    _tsc_class: type[nn.Module]
    _tsc_runs: list[Run]

    @staticmethod
    def weights(module: Any, stage: Stage) -> list[list[Tensor]]:
        """Of each block what its controller reads, Tensors [C_out, C_in, ...]."""
        raise NotImplementedError

    @staticmethod
    def changes(module: Any, stage: Stage, factors: Tensor, prefix: str) -> list[tuple[Tensor, Tensor]]:
        """What must be multiplied, and by what, for the blocks' increments to be multiplied by factors, Tensor [L, C].
        prefix is the module's name.

        Raises:
            ValueError: it cannot be done, and why.
        """
        raise NotImplementedError

    def step_sizes(self, run: Run) -> Tensor:
        """Tensor [L, C], fresh from the weights, so that they cannot be stale."""
        held = run.controller.held
        return run.controller(self.weights(self, run.stage)) if held is None else held

    def restore(self) -> None:
        """Undo the swap."""
        del self._tsc_runs
        self.__class__ = self.__dict__.pop("_tsc_class")


class SteppedSequential(Stepped, nn.Sequential):
    """Residual blocks one behind the other, which get a step size as their second argument."""

    def __getitem__(self, index: Any) -> Any:
        """Of a slice a plain nn.Sequential: the controller is one of all blocks."""
        if not isinstance(index, slice):
            return super().__getitem__(index)
        return nn.Sequential(OrderedDict(list(self._modules.items())[index]))

    def forward(self, x: Tensor) -> Tensor:
        starts = {run.stage.names[0]: run for run in self._tsc_runs}
        sizes: dict[str, Tensor] = {}
        for name, block in self._modules.items():
            assert block is not None
            if name in starts:
                run = starts[name]
                sizes.update(zip(run.stage.names, self.step_sizes(run).unbind(), strict=True))
            x = block(x, sizes[name]) if name in sizes else block(x)
        return x

    @staticmethod
    def weights(module: Any, stage: Stage) -> list[list[Tensor]]:
        assert stage.form is not None
        blocks = [module._modules[name] for name in stage.names]
        return [[getattr(block, conv).weight for conv in stage.form.reads] for block in blocks]

    @staticmethod
    def changes(module: Any, stage: Stage, factors: Tensor, prefix: str) -> list[tuple[Tensor, Tensor]]:
        assert stage.form is not None
        found: list[tuple[Tensor, Tensor]] = []
        for name, factor in zip(stage.names, factors, strict=True):
            block = module._modules[name]
            home = f"{prefix}.{name}".lstrip(".")
            norm = getattr(block, stage.form.norm)
            if not isinstance(norm, _BatchNorm) or norm.weight is None:
                raise ValueError(
                    f"model: {home}.{stage.form.norm} is {type(norm).__name__}, into which no step size goes; expected "
                    "a BatchNorm with weight and bias"
                )
            if norm._parameters.keys() != {"weight", "bias"}:
                raise ValueError(
                    f"model: weight or bias of {home}.{stage.form.norm} is made from other parameters (pruned, "
                    "parametrized), into which no step size goes; make that permanent first"
                )
            found += [(norm.weight, factor), (norm.bias, factor)]
            gate = getattr(block, "se", None)
            if gate is not None and type(gate) is not nn.Identity:
                found.append(_squeezed(gate, factor, f"{home}.se"))
        return found

    def restore(self) -> None:
        for run in self._tsc_runs:
            for name in run.stage.names:
                block = self._modules[name]
                if isinstance(block, SteppedBlock):
                    del block._tsc_form
                    block.__class__ = block.__dict__.pop("_tsc_class")
        super().restore()


class SteppedBlock(nn.Module):
    """A residual block of another library, ``act(shortcut(x) + step * F(x))``, the join in one pass where F ends with a
    BatchNorm; ``_tsc_class`` is what it was."""

    _tsc_class: type[nn.Module]
    _tsc_form: Form

    def forward(self, x: Tensor, step: Tensor | None = None) -> Tensor:
        """step: Tensor [C]."""
        if step is None:
            raise RuntimeError(
                "this block has a step size, which its container gives it; call the container (and do not checkpoint "
                "single blocks), or call rkfast.tsc.detach(model) or rkfast.tsc.fold(model) first"
            )
        return residual(self._tsc_form, self, x, step)


class SteppedDenseBlock(Stepped, DenseBlock):
    """DenseNet's block; the step size goes into the convolution that makes the growth."""

    def forward(self, y: Tensor, steps: Tensor | None = None) -> Tensor:
        return super().forward(y, self.step_sizes(self._tsc_runs[0]) if steps is None else steps)

    def forward_with_moments(
        self, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        if self._group() or not self._fusible(y):
            return self.forward(y), None
        steps = self.step_sizes(self._tsc_runs[0])
        result = self._block(y, None, moments, return_moments, steps=steps)
        return result if return_moments else (result, None)

    @staticmethod
    def weights(module: Any, stage: Stage) -> list[list[Tensor]]:
        return [[module._modules[name].parts()[-1].weight] for name in stage.names]

    @staticmethod
    def changes(module: Any, stage: Stage, factors: Tensor, prefix: str) -> list[tuple[Tensor, Tensor]]:
        return _convolutions(SteppedDenseBlock.weights(module, stage), factors)


class SteppedCliqueBlock(Stepped, CliqueBlock):
    """CliqueNet's block; one step size per stage, which goes into the convolution that both stages share."""

    def forward(self, y: Tensor, steps: Tensor | None = None) -> Tensor:
        return super().forward(y, self.step_sizes(self._tsc_runs[0]) if steps is None else steps)

    @staticmethod
    def weights(module: Any, stage: Stage) -> list[list[Tensor]]:
        return [[w] for w in (module.weight1 if module.weight2 is None else module.weight2)]

    @staticmethod
    def changes(module: Any, stage: Stage, factors: Tensor, prefix: str) -> list[tuple[Tensor, Tensor]]:
        return _convolutions(SteppedCliqueBlock.weights(module, stage), factors)


def stages(module: nn.Module, uses: Counter[nn.Module | None]) -> tuple[type[Stepped], list[Stage]] | None:
    """What ``module`` becomes, and its blocks stage by stage; None where it has no blocks of its own.

    uses: how often each module of the network is somebody's child."""
    if type(module) is DenseBlock and len(module) and not module.time_channel:
        return SteppedDenseBlock, [Stage(list(module.keys()), module.growth_rate, 4)]
    if type(module) is CliqueBlock:
        return SteppedCliqueBlock, [Stage([str(i) for i in range(module.stages)], module.growth_rate, 4)]
    if type(module) is not nn.Sequential:
        return None

    def signature(child: tuple[str, nn.Module]) -> Any:
        name, block = child
        form = form_of(block)
        if form is None or uses[block] > 1:
            return None, name
        if not (takes_step(block) or alike(block, _with_step, sample)):
            return None, name
        convs = [getattr(block, conv) for conv in form.reads]
        return form, convs[-1].out_channels, tuple((c.weight.shape[0], c.weight.shape[2:]) for c in convs)

    found = []
    for key, children in itertools.groupby(module._modules.items(), signature):
        if key[0] is not None:
            form, channels, _ = key
            found.append(Stage([name for name, _ in children], channels, 8 if "conv3" in form.reads else 4, form))
    return (SteppedSequential, found) if found else None


def swap(module: nn.Module, kind: type[Stepped], runs: list[Run]) -> None:
    """Let ``module`` take step sizes from the controllers of ``runs``."""
    if kind is SteppedSequential:
        for run in runs:
            for name in run.stage.names:
                block = module._modules[name]
                assert block is not None and run.stage.form is not None
                if not takes_step(block):
                    _swap_block(block, run.stage.form)
    module.__dict__.update(_tsc_class=type(module), _tsc_runs=runs)
    module.__class__ = kind


def _swap_block(block: nn.Module, form: Form) -> None:
    block.__dict__.update(_tsc_class=type(block), _tsc_form=form)
    block.__class__ = SteppedBlock


def stepped(model: nn.Module) -> Iterator[tuple[str, Stepped]]:
    """The names and modules that ``swap`` made."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Stepped))


class Residual(NamedTuple):
    """A residual block; ``step`` is a Tensor [C], None where it is 1."""

    name: str
    block: nn.Module
    form: Form
    step: Tensor | None


def residual_blocks(model: nn.Module) -> list[Residual]:
    """The residual blocks that can have or have step sizes.

    Raises:
        ValueError: there are none, or some blocks are no residual ones.
    """
    found: list[Residual] = []
    uses = Counter(child for module in model.modules() for child in module._modules.values())
    for prefix, module in model.named_modules():
        pairs: list[tuple[Stage, Sequence[Tensor | None]]] = []
        if isinstance(module, Stepped):
            with torch.no_grad():
                pairs = [(run.stage, module.step_sizes(run).unbind()) for run in module._tsc_runs]
        else:
            of = stages(module, uses)
            pairs = [] if of is None else [(stage, [None] * len(stage.names)) for stage in of[1]]
        for stage, sizes in pairs:
            if stage.form is None:
                kind = "DenseBlock" if isinstance(module, DenseBlock) else "CliqueBlock"
                raise ValueError(
                    f"model: {prefix} is a {kind}, whose layers do not add to the state what they make, so that "
                    "y' = y + dt F(y) is not its formula; expected a network of residual blocks"
                )
            for name, size in zip(stage.names, sizes, strict=True):
                block = module._modules[name]
                assert block is not None
                found.append(Residual(f"{prefix}.{name}".lstrip("."), block, stage.form, size))
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} has no residual blocks; expected BasicBlock or Bottleneck of torchvision, "
            "timm or rkfast in an nn.Sequential"
        )
    return found


def takes_step(block: nn.Module) -> bool:
    """Whether a block's forward takes the step size, as those of rkfast do."""
    return not isinstance(block, SteppedBlock) and "step" in inspect.signature(block.forward).parameters


def _with_step(block: Any) -> Callable[[Tensor], Tensor]:
    """What block, which becomes a SteppedBlock, computes with step sizes of 1."""
    form = form_of(block)
    assert form is not None
    channels = getattr(block, form.reads[-1]).out_channels
    _swap_block(block, form)
    return lambda x: block(x, x.new_ones(channels))


def _convolutions(weights: list[list[Tensor]], factors: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(w, factor[:, None, None, None]) for (w,), factor in zip(weights, factors, strict=True)]


def _squeezed(gate: Any, factor: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """What the gate's first layer must be multiplied by, for ``gate(factor * x) = factor * gate(x)``."""
    if not factor.ne(0).all():
        raise ValueError(f"model: {name}: its first layer is divided by the step sizes, of which one is 0")
    weight = getattr(getattr(gate, "fc1", None), "weight", None)
    if weight is not None and weight.shape[1] == len(factor):
        inverse = factor.reciprocal().view(-1, *[1] * (weight.dim() - 2))
        if weight.is_meta:
            return weight, inverse
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            x = torch.rand(2, len(factor), 3, 3, dtype=torch.double, device="cpu").to(weight.device)
            before, after = (copy.deepcopy(gate).double().eval() for _ in range(2))
            wide = factor.double()[:, None, None]
            after.fc1.weight.div_(wide.view(inverse.shape))
            if torch.allclose(after(wide * x), wide * before(x), rtol=1e-9, atol=1e-12):
                return weight, inverse
    raise ValueError(
        f"model: {name} is {type(gate).__name__}, into which no step size goes; expected squeeze and excitation with a "
        "layer fc1 over the mean of each channel"
    )
