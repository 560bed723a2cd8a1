"""RevNet (Gomez et al., "The Reversible Residual Network: Backpropagation Without Storing Activations")."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rkfast.nn.branch import slope, takes_moments
from rkfast.nn.norm import hooked, statistics_stay
from rkfast.nn.step import Period, weighted_sum
from rkfast.ops import Moments, checks, layout


class RevStep(nn.Module):
    """A reversible residual block, ``y1 = x1 + F(x2)``, ``y2 = x2 + G(y1)`` with x1, x2 the halves of the channels
    (Gomez et al., section 3.1). Its inverse is ``x2 = y2 - G(y1)``, ``x1 = y1 - F(x2)``.

    Args:
        f, g: F and G, which keep the shape of a half.
        fused: False takes stock PyTorch operations for the sums; the branches have their own ``fused``.

    Shape: Tensor [N, 2 * C, ...] -> [N, 2 * C, ...].

    Raises:
        ValueError: of forward and inverse, for an odd number of channels.
    """

    def __init__(self, f: nn.Module, g: nn.Module, *, fused: bool = True) -> None:
        super().__init__()
        self.f = f
        self.g = g
        self.fused = fused

    def forward(self, y: Tensor) -> Tensor:
        return self.forward_with_moments(y)[0]

    def forward_with_moments(
        self, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        """The step, taking y's moments if they are known, and leaving those of y' if asked for (and fused)."""
        return _joined(_run(_updates([self]), _halves(y, moments), return_moments))

    @torch.no_grad()
    def inverse(self, y: Tensor) -> Tensor:
        """x of y = forward(x), to rounding, if F and G draw no random numbers. Running statistics stay."""
        halves = _halves(y, None)
        with statistics_stay(self):
            for own, branch in ((1, self.g), (0, self.f)):
                halves[own] = _plus(halves[own], branch(halves[1 - own].value), -1.0, self.fused, False)
        return _joined(halves)[0]

    def reads_moments(self) -> bool:
        """Whether F makes use of its input's moments."""
        return self.fused and takes_moments(self.f)

    def extra_repr(self) -> str:
        return f"fused={self.fused}"


class RevPeriod(Period):
    """RevSteps at one resolution, which keep only the last result for the backward: however many there are, their
    memory is that of one.

    The backward goes from the last step to the first, inverts each from its result, and takes the gradients of F and G
    at what it finds. Random numbers (dropout), autocast and the running statistics are those of the forward: statistics
    move once. Hooks on modules within F and G run in the forward, without a graph, and again in the backward. Hooks on
    a step itself, a subclass of RevStep, torch.compile, torch.export and torch.func take the ordinary way, which keeps
    activations.

    What a sum has rounded away does not come back, and the error drifts on from step to step: the gradients of an
    untrained revnet-58 (14 steps, width 32) are off by 3e-6 of their size in float32, and by 1.5e-6 with activations
    kept; in bfloat16 by 0.37, and 0.29. An F or G that is no function of its input and of torch's random numbers gets
    wrong gradients.

    Args:
        steps: RevSteps.
        reversible: False keeps activations as any network does.

    Shape: Tensor [N, 2 * C, ...] -> [N, 2 * C, ...].

    Raises:
        TypeError: a step is no RevStep.
        RuntimeError: of the backward, with ``create_graph=True``, for which there is ``reversible=False``; or where
            ``train()`` or ``eval()`` came between it and its forward.
    """

    def __init__(self, *steps: RevStep, reversible: bool = True) -> None:
        super().__init__(*steps)
        for i, step in enumerate(self):
            if not isinstance(step, RevStep):
                raise TypeError(f"steps[{i}]: expected a RevStep, got {type(step).__name__}")
        self.reversible = reversible

    def forward_with_moments(
        self, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        """The steps, taking y's moments if they are known, and leaving those of the result if asked for (and fused)."""
        if not len(self) or any(hooked(step) or type(step) is not RevStep for step in self):
            return super().forward_with_moments(y, moments, return_moments=return_moments)
        parameters = list(self.parameters())
        if not self._recomputes(y, parameters):
            return _joined(_run(_updates(self), _halves(y, moments), return_moments))
        found = _Reversible.apply((self, moments, return_moments), y, *parameters)
        if isinstance(found, Tensor):
            return found, None
        return found[0], Moments(found[1], found[2], layout.count(y))

    def _recomputes(self, y: Tensor, parameters: Sequence[Tensor]) -> bool:
        return (
            self.reversible
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not checks.transformed((y,))
            and (y.requires_grad or any(p.requires_grad for p in parameters))
        )

    def extra_repr(self) -> str:
        return f"reversible={self.reversible}"


class _Half(NamedTuple):
    """One half of the channels, and its moments where they are known."""

    value: Tensor
    moments: Moments | None


class _Update(NamedTuple):
    """A period is a list of these in turn: the first adds F(x2) to x1, the second G(y1) to x2, and so on."""

    branch: nn.Module
    fused: bool


class _Reversible(torch.autograd.Function):
    """tensors: y, and the parameters, so that their gradients go through autograd and their hooks see each once."""

    @staticmethod
    def forward(ctx: Any, call: tuple[RevPeriod, Moments | None, bool], y: Tensor, *parameters: Tensor) -> Any:
        period, moments, return_moments = call
        updates = _updates(period)
        index = {id(p): i for i, p in enumerate(parameters)}
        names = [{name: index[id(p)] for name, p in u.branch.named_parameters()} for u in updates]
        drawn: list[Any] = []
        autocast = _autocast(y.device.type)
        with autocast():
            halves = _run(updates, _halves(y, moments), return_moments, drawn)
        result, moments = _joined(halves)
        ctx.period, ctx.updates, ctx.names, ctx.drawn, ctx.autocast = period, updates, names, drawn, autocast
        ctx.modes = [module.training for module in period.modules()]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(result, *parameters)
        if moments is None:
            return result
        ctx.mark_non_differentiable(moments.mean, moments.var)
        return result, moments.mean, moments.var

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        needed = ctx.needs_input_grad[2:]
        if grad is None:
            return (None,) * (2 + len(needed))
        if torch.is_grad_enabled():
            raise RuntimeError(
                "RevPeriod: the gradient of its gradient (create_graph=True) is not supported; "
                "keep activations (reversible=False) for it"
            )
        if ctx.modes != [module.training for module in ctx.period.modules()]:
            raise RuntimeError(
                "RevPeriod: train() or eval() has been called since the forward, which is computed again in the mode "
                "it had; call backward() first, or keep activations (reversible=False)"
            )
        y, *parameters = ctx.saved_tensors
        # Others than the parameters themselves, whose hooks would run here too.
        leaves = [p.detach().requires_grad_(need) for p, need in zip(parameters, needed, strict=True)]
        gradients: list[Tensor | None] = [None] * len(leaves)
        halves = _halves(y, None)
        flowing = [half.value for half in _halves(grad, None)]
        with statistics_stay(ctx.period), ctx.autocast():
            for i in reversed(range(len(ctx.updates))):
                own, (branch, fused) = i % 2, ctx.updates[i]
                read = halves[1 - own]
                x = read.value.detach().requires_grad_()
                given = {name: leaves[k] for name, k in ctx.names[i].items()}
                with torch.enable_grad(), _drawing(ctx.drawn[i], y.device):
                    arguments = (x,) if read.moments is None or not takes_moments(branch) else (x, read.moments)
                    f = functional_call(branch, given, arguments)
                wanted = [k for k in ctx.names[i].values() if needed[k]]
                found = torch.autograd.grad(
                    f, [x, *(leaves[k] for k in wanted)], flowing[own].to(f.dtype), allow_unused=True
                )
                for k, g in zip(wanted, found[1:], strict=True):
                    gradients[k] = g if gradients[k] is None else gradients[k] + g
                if found[0] is not None:
                    flowing[1 - own] = flowing[1 - own] + found[0]
                if i:
                    earlier = fused and takes_moments(ctx.updates[i - 1].branch)
                    halves[own] = _plus(halves[own], f.detach(), -1.0, fused, earlier)
        return None, torch.cat(flowing, 1) if ctx.needs_input_grad[1] else None, *gradients


def _updates(steps: Iterable[Any]) -> list[_Update]:
    return [_Update(branch, step.fused) for step in steps for branch in (step.f, step.g)]


def _run(
    updates: list[_Update], halves: list[_Half], return_moments: bool, drawn: list[Any] | None = None
) -> list[_Half]:
    """All updates. ``drawn`` receives, for each that drew random numbers, the states of the generators before it, and
    None for the others."""
    device = halves[0].value.device
    states = None if drawn is None else _generators(device)
    for i, (branch, fused) in enumerate(updates):
        own, read = i % 2, halves[1 - i % 2]
        f = slope(branch, read.value, read.moments if fused else None)
        if drawn is not None and states is not None:
            before, states = states, _generators(device)
            drawn.append(None if all(map(torch.equal, before, states)) else before)
        next_reads = i + 1 < len(updates) and takes_moments(updates[i + 1].branch)
        wanted = next_reads or (return_moments and i + 2 >= len(updates))
        halves[own] = _plus(halves[own], f, 1.0, fused, wanted)
    return halves


def _plus(half: _Half, f: Tensor, sign: float, fused: bool, return_moments: bool) -> _Half:
    return _Half(*weighted_sum(half.value, [f], [sign], fused=fused, return_moments=return_moments))


def _halves(y: Tensor, moments: Moments | None) -> list[_Half]:
    channels = y.shape[1]
    if channels % 2:
        raise ValueError(f"y: expected an even number of channels, of which x1 and x2 are halves, got {channels}")
    parts = (slice(channels // 2), slice(channels // 2, None))
    return [
        _Half(y[:, part], moments and Moments(moments.mean[part], moments.var[part], moments.count)) for part in parts
    ]


def _joined(halves: list[_Half]) -> tuple[Tensor, Moments | None]:
    (y1, m1), (y2, m2) = halves
    y = torch.cat([y1, y2], 1)
    if m1 is None or m2 is None:
        return y, None
    return y, Moments(torch.cat([m1.mean, m2.mean]), torch.cat([m1.var, m2.var]), m1.count)


def _autocast(device: str) -> Callable[[], Any]:
    """Makes contexts in which autocast is as it is now."""
    if not torch.amp.is_autocast_available(device):
        return contextlib.nullcontext
    dtype, on = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    # Without its cache: nobody reads a cast a second time, and all would stay until the outermost autocast ends.
    return functools.partial(torch.autocast, device, dtype=dtype, enabled=on, cache_enabled=False)


def _generators(device: torch.device) -> tuple[Tensor, ...]:
    """States of torch's generators, of the CPU and of the device."""
    states = (torch.get_rng_state(),)
    return (
        states if device.type in ("cpu", "meta") else (*states, torch.get_device_module(device).get_rng_state(device))
    )


@contextlib.contextmanager
def _drawing(states: tuple[Tensor, ...] | None, device: torch.device) -> Iterator[None]:
    """Random numbers as they were drawn from these states; afterwards the generators are as before."""
    if states is None:
        yield
        return
    before = _generators(device)
    try:
        _set_generators(states, device)
        yield
    finally:
        _set_generators(before, device)


def _set_generators(states: tuple[Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)
