"""Steps that read the two last states: LM-ResNet's and the second-order CNN's, and the period that hands both on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rkfast.nn.branch import slope, takes_moments
from rkfast.nn.norm import hooked
from rkfast.nn.step import asks_for_moments, weighted_sum
from rkfast.ops import Moments

INITIAL_K = (-0.1, 0.0)


class LMStep(nn.Module):
    """A linear two-step method, ``y_{n+1} = (1 - k) y_n + k y_{n-1} + F(y_n)`` (Lu et al., "Beyond Finite Layer Neural
    Networks: Bridging Deep Architectures and Numerical Differential Equations").

    k is a parameter, ``learned["k"]``, drawn from U(-0.1, 0) as the authors do. They train as a plain residual network
    first; ``k`` at 0 with ``requires_grad_(False)`` is that.

    Args:
        branch: F.
        first: whether this is the first step of a period, ``y + F(y)``, which has no k.
        fused: False takes stock PyTorch operations for the sum; the branch has its own ``fused``.

    Shape: y_n and y_{n-1}: Tensor [N, C, ...] -> [N, C, ...]; the branch keeps the shape. Without y_{n-1} it is y_n.
    """

    def __init__(self, branch: nn.Module, *, first: bool = False, fused: bool = True) -> None:
        super().__init__()
        self.branch = branch
        self.fused = fused
        k = None if first else nn.Parameter(torch.empty(()).uniform_(*INITIAL_K))
        self.learned = None if k is None else nn.ParameterDict({"k": k})

    def forward(self, y: Tensor, previous: Tensor | None = None) -> Tensor:
        return self.forward_with_moments(y, previous=previous)[0]

    def forward_with_moments(
        self,
        y: Tensor,
        moments: Moments | None = None,
        *,
        previous: Tensor | None = None,
        return_moments: bool = False,
    ) -> tuple[Tensor, Moments | None]:
        """The step, taking y's moments if they are known, and leaving those of the result if asked for (and fused)."""
        f = slope(self.branch, y, moments if self.fused else None)
        if self.learned is None or previous is None:
            return weighted_sum(y, [f], [1.0], fused=self.fused, return_moments=return_moments)
        k = self.learned["k"]
        return weighted_sum(f, [y, previous], [1 - k, k], fused=self.fused, return_moments=return_moments)

    def reads_moments(self) -> bool:
        """Whether the branch makes use of its input's moments."""
        return self.fused and takes_moments(self.branch)

    def extra_repr(self) -> str:
        return f"{'first, ' if self.learned is None else ''}fused={self.fused}"


class LeapfrogStep(nn.Module):
    """A step of ``y'' = F(y)``, ``y_{n+1} = 2 y_n - y_{n-1} + h^2 F(y_n)`` (the second-order CNN of Ruthotto and Haber,
    "Deep Neural Networks Motivated by Partial Differential Equations").

    Theirs has the symmetric F of SymmetricBranch; any other, such as PreActBranch, is the row of Luo et al.,
    "Rethinking ResNets", Table 1.

    Args:
        branch: F.
        step: the step size h.
        fused: False takes stock PyTorch operations for the sum; the branch has its own ``fused``.

    Shape: y_n and y_{n-1}: Tensor [N, C, ...] -> [N, C, ...]; the branch keeps the shape. Without y_{n-1} it is y_n.

    Raises:
        ValueError: step is not finite.
    """

    def __init__(self, branch: nn.Module, *, step: float = 1.0, fused: bool = True) -> None:
        super().__init__()
        if not math.isfinite(step):
            raise ValueError(f"step: expected a finite number, got {step}")
        self.branch = branch
        self.step = float(step)
        self.fused = fused

    def forward(self, y: Tensor, previous: Tensor | None = None) -> Tensor:
        return self.forward_with_moments(y, previous=previous)[0]

    def forward_with_moments(
        self,
        y: Tensor,
        moments: Moments | None = None,
        *,
        previous: Tensor | None = None,
        return_moments: bool = False,
    ) -> tuple[Tensor, Moments | None]:
        """The step, taking y's moments if they are known, and leaving those of the result if asked for (and fused)."""
        f = slope(self.branch, y, moments if self.fused else None)
        h2 = self.step**2
        if previous is None:
            return weighted_sum(y, [f], [h2], fused=self.fused, return_moments=return_moments)
        return weighted_sum(y, [previous, f], [-1.0, h2], own=2.0, fused=self.fused, return_moments=return_moments)

    def reads_moments(self) -> bool:
        """Whether the branch makes use of its input's moments."""
        return self.fused and takes_moments(self.branch)

    def extra_repr(self) -> str:
        return f"step={self.step:g}, fused={self.fused}"


class MultistepPeriod(nn.Sequential):
    """LMSteps or LeapfrogSteps at one resolution, each of which reads the two last states. At the start the state
    before the first is taken to be the first, so that the first step is ``y + F(y)``, or ``y + h^2 F(y)``."""

    def forward(self, y: Tensor) -> Tensor:
        return self.forward_with_moments(y)[0]

    def forward_with_moments(
        self, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        """The steps, taking y's moments if they are known, and leaving those of the result if asked for (and fused)."""
        steps: list[Any] = list(self)
        previous: Tensor | None = None
        for i, step in enumerate(steps):
            wanted = return_moments if i + 1 == len(steps) else asks_for_moments(steps[i + 1])
            before = y
            if hooked(step):  # hooks that only a call runs
                y, moments = step(y, previous), None
            else:
                y, moments = step.forward_with_moments(y, moments, previous=previous, return_moments=wanted)
            previous = before
        return y, moments
