"""One Runge-Kutta step, and a period of steps at one resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rkfast import tableau as tableaux
from rkfast.nn.norm import hooked
from rkfast.ops import Moments, rk_sum
from rkfast.tableau import Tableau


class RKStep(nn.Module):
    """An explicit Runge-Kutta step, ``y' = y + h * sum_i b_i k_i`` with ``k_i = F_i(y + h * sum_{j<i} a_ij k_j)``.

    Each sum is one pass over the memory. A branch with a method ``reads_moments()`` that answers True is called as
    ``branch(x, moments)``, with the moments of its input taken in the pass that wrote it (PreActBranch does).

    Args:
        tableau: the method, or its name.
        branches: the F_i, one module per stage, or a single module that serves all stages.
        step: the step size h.
        fused: False takes stock PyTorch operations for the sums; the branches have their own ``fused``.

    Shape: Tensor [N, C, ...] -> [N, C, ...]; branches keep the shape.

    Raises:
        ValueError: there is no such method, the number of branches does not fit, or step is not finite.
    """

    def __init__(
        self,
        tableau: Tableau | str,
        branches: nn.Module | Sequence[nn.Module],
        *,
        step: float = 1.0,
        fused: bool = True,
    ) -> None:
        super().__init__()
        tableau = tableaux.get(tableau) if isinstance(tableau, str) else tableau
        shared = isinstance(branches, nn.Module) and not isinstance(branches, nn.ModuleList)
        modules: list[nn.Module] = [branches] if shared else list(branches)  # type: ignore[list-item, arg-type]
        if not shared and len(modules) != tableau.stages:
            raise ValueError(
                f"branches: got {len(modules)} modules for the {tableau.stages} stages of {tableau.name}; "
                "give one per stage, or a single module that serves all"
            )
        if not math.isfinite(step):
            raise ValueError(f"step: expected a finite number, got {step}")
        self.tableau = tableau
        self.step = float(step)
        self.fused = fused
        self.branches = nn.ModuleList(modules)
        self.a, self.b = tableau.floats(self.step)

    def forward(self, y: Tensor) -> Tensor:
        return self.forward_with_moments(y)[0]

    def forward_with_moments(
        self, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        """The step, taking y's moments if they are known, and leaving those of y' if asked for (and fused)."""
        slopes: list[Tensor] = []  # k_1, k_2, ...
        for i in range(self.tableau.stages):
            branch = self.branches[i % len(self.branches)]
            reader = self.reads_moments(i)
            x, x_moments = self._sum(y, slopes, self.a[i], reader) if i else (y, moments)
            slopes.append(branch(x, x_moments) if reader and x_moments is not None else branch(x))
        return self._sum(y, slopes, self.b, return_moments)

    def _sum(
        self, y: Tensor, slopes: list[Tensor], weights: Sequence[float], return_moments: bool
    ) -> tuple[Tensor, Moments | None]:
        used = [(k, w) for k, w in zip(slopes, weights, strict=False) if w != 0]
        if not self.fused:
            total = y
            for k, w in used:
                # In place on the sum that the first term made: half the time of fresh memory for each term.
                total = torch.add(y, k, alpha=w) if total is y else total.add_(k, alpha=w)
            return total, None
        terms, coeffs = [y, *(k for k, _ in used)], [1.0, *(w for _, w in used)]
        if return_moments:
            return rk_sum(terms, coeffs, return_moments=True)
        return rk_sum(terms, coeffs), None

    def reads_moments(self, stage: int = 0) -> bool:
        """Whether the branch of a stage (the first, which reads y itself) makes use of its input's moments."""
        asks = getattr(self.branches[stage % len(self.branches)], "reads_moments", None)
        return self.fused and asks is not None and asks()

    def extra_repr(self) -> str:
        return f"{self.tableau.name}, step={self.step:g}, fused={self.fused}"


class Period(nn.Sequential):
    """Steps at one resolution. Each leaves the moments of its result to the next, unless a hook stands between them."""

    def forward(self, y: Tensor) -> Tensor:
        return self.forward_with_moments(y)[0]

    def forward_with_moments(
        self, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        """The steps, taking y's moments if they are known, and leaving those of the result if asked for (and fused)."""
        steps = list(self)
        for i, step in enumerate(steps):
            wanted = return_moments if i + 1 == len(steps) else _reads_moments(steps[i + 1])
            y, moments = with_moments(step, y, moments, return_moments=wanted)
        return y, moments


def with_moments(
    module: nn.Module, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
) -> tuple[Tensor, Moments | None]:
    """``module.forward_with_moments(...)``; a plain ``module(y)`` where it has none, or hooks that only a call runs."""
    if isinstance(module, (RKStep, Period)) and not hooked(module):
        return module.forward_with_moments(y, moments, return_moments=return_moments)
    return module(y), None


def _reads_moments(step: nn.Module) -> bool:
    return isinstance(step, RKStep) and not hooked(step) and step.reads_moments()
