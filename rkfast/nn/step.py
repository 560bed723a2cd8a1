"""One Runge-Kutta step, and a period of steps at one resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rkfast import tableau as tableaux
from rkfast.nn.norm import hooked
from rkfast.ops import Moments, rk_sum
from rkfast.ops.checks import MAX_TERMS
from rkfast.tableau import Tableau

LEARNABLE = ("a", "b", "h")


class RKStep(nn.Module):
    """An explicit Runge-Kutta step, ``y' = y + h * sum_i b_i k_i`` with ``k_i = F_i(y + h * sum_{j<i} a_ij k_j)``.

    Each sum is one pass over the memory. A branch with a method ``reads_moments()`` that answers True is called as
    ``branch(x, moments)``, with the moments of its input taken in the pass that wrote it (PreActBranch does).

    Args:
        tableau: the method, or its name.
        branches: the F_i, one module per stage, or a single module that serves all stages.
        step: the step size h.
        learn: which of "a", "b" and "h" are parameters, scalars that start from the tableau and ``step``; ``learned``
            holds them, and ``coefficients()`` reads them. With all three this is g_i of RKNet (Zhu et al.,
            "Convolutional Neural Networks combined with Runge-Kutta Methods", equation 4): every a_ij with j < i
            takes part, also where it starts from 0.
        fused: False takes stock PyTorch operations for the sums; the branches have their own ``fused``.

    Shape: Tensor [N, C, ...] -> [N, C, ...]; branches keep the shape.

    Raises:
        TypeError: tableau is neither a Tableau nor a name, or learn is not a sequence of str.
        ValueError: there is no such method, the number of branches does not fit, step is not finite, or learn names
            something else.
    """

    def __init__(
        self,
        tableau: Tableau | str,
        branches: nn.Module | Sequence[nn.Module],
        *,
        step: float = 1.0,
        learn: Sequence[str] = (),
        fused: bool = True,
    ) -> None:
        super().__init__()
        tableau = tableaux.get(tableau) if isinstance(tableau, str) else tableau
        if not isinstance(tableau, Tableau):
            raise TypeError(f"tableau: expected a Tableau or the name of one, got {type(tableau).__name__}")
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
        self.learned = self._parameters_of(learn)

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
            x, x_moments = (
                weighted_sum(y, slopes, self._row(i), fused=self.fused, return_moments=reader) if i else (y, moments)
            )
            slopes.append(branch(x, x_moments) if reader and x_moments is not None else branch(x))
        return weighted_sum(y, slopes, self._weights(), fused=self.fused, return_moments=return_moments)

    def coefficients(self) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...], float]:
        """(a, b, h) as they are now: the tableau's, or what has been learned in their place."""
        a, b = self.tableau.floats()
        learned = {name: p.detach().double().tolist() for name, p in (self.learned or {}).items()}
        if "a" in learned:
            s = self.tableau.stages
            a = tuple((*learned["a"][_start(i) : _start(i + 1)], *(0.0,) * (s - i)) for i in range(s))
        return a, tuple(learned.get("b", b)), learned.get("h", self.step)

    def _parameters_of(self, learn: Sequence[str]) -> nn.ParameterDict | None:
        if isinstance(learn, str) or not all(isinstance(name, str) for name in learn):
            raise TypeError(f"learn: expected a sequence of str, such as {LEARNABLE}, got {learn!r}")
        unknown = [name for name in learn if name not in LEARNABLE]
        if unknown:
            raise ValueError(f"learn: {unknown[0]!r} is not a coefficient; expected some of {', '.join(LEARNABLE)}")
        a, b = self.tableau.floats()
        below = [a[i][j] for i in range(self.tableau.stages) for j in range(i)]
        initial = {name: torch.tensor(v) for name, v in (("a", below), ("b", b), ("h", self.step)) if name in learn}
        # Of a method with one stage there is no a.
        found = {name: nn.Parameter(value) for name, value in initial.items() if value.numel()}
        return nn.ParameterDict(found) if found else None

    def _row(self, i: int) -> Sequence[float | Tensor]:
        """h * a_ij for all j < i."""
        if self.learned is None:
            return self.a[i]
        if "a" in self.learned:
            return self._times_h(self.learned["a"][_start(i) : _start(i + 1)].unbind())
        return self._times_h(self.tableau.floats()[0][i][:i])

    def _weights(self) -> Sequence[float | Tensor]:
        """h * b_i."""
        if self.learned is None:
            return self.b
        return self._times_h(self.learned["b"].unbind() if "b" in self.learned else self.tableau.floats()[1])

    def _times_h(self, values: Sequence[float | Tensor]) -> list[float | Tensor]:
        h = self.learned["h"] if self.learned is not None and "h" in self.learned else self.step
        # A zero of the tableau stays a float, which the sum leaves out.
        return [v if isinstance(v, float) and v == 0 else h * v for v in values]

    def reads_moments(self, stage: int = 0) -> bool:
        """Whether the branch of a stage (the first, which reads y itself) makes use of its input's moments."""
        asks = getattr(self.branches[stage % len(self.branches)], "reads_moments", None)
        return self.fused and asks is not None and asks()

    def extra_repr(self) -> str:
        learn = f", learn={tuple(self.learned)}" if self.learned is not None else ""
        return f"{self.tableau.name}, step={self.step:g}{learn}, fused={self.fused}"


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
            wanted = return_moments if i + 1 == len(steps) else asks_for_moments(steps[i + 1])
            y, moments = with_moments(step, y, moments, return_moments=wanted)
        return y, moments


def with_moments(
    module: nn.Module, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
) -> tuple[Tensor, Moments | None]:
    """``module.forward_with_moments(...)``; a plain ``module(y)`` where it has none, or hooks that only a call runs."""
    forward = getattr(module, "forward_with_moments", None)
    if forward is not None and not hooked(module):
        return forward(y, moments, return_moments=return_moments)
    return module(y), None


def weighted_sum(
    y: Tensor,
    terms: Sequence[Tensor],
    weights: Sequence[float | Tensor],
    *,
    fused: bool,
    return_moments: bool = False,
) -> tuple[Tensor, Moments | None]:
    """``y + sum_j weights[j] * terms[j]``, and the moments of the sum if asked for (and fused).

    A weight is a float or a learned scalar. Terms may be channel slices of one buffer, which are read where they are.
    """
    used = [(k, w) for k, w in zip(terms, weights, strict=False) if isinstance(w, Tensor) or w != 0]
    total = y
    if not fused:
        for k, w in used:
            if isinstance(w, Tensor):
                total = total + w * k
            else:
                # In place on the sum that the first term made: half the time of fresh memory for each term.
                total = torch.add(y, k, alpha=w) if total is y else total.add_(k, alpha=w)
        return total, None
    while True:
        now, used = used[: MAX_TERMS - 1], used[MAX_TERMS - 1 :]
        total, moments = _fused_sum(total, now, return_moments and not used)
        if not used:
            return total, moments


def _fused_sum(
    y: Tensor, weighted: Sequence[tuple[Tensor, float | Tensor]], return_moments: bool
) -> tuple[Tensor, Moments | None]:
    terms = [y, *(k for k, _ in weighted)]
    coeffs = [1.0, *(1.0 if isinstance(w, Tensor) else w for _, w in weighted)]
    steps = None
    if any(isinstance(w, Tensor) for _, w in weighted):
        steps = [None, *(w.expand(y.shape[1]) if isinstance(w, Tensor) else None for _, w in weighted)]
    if return_moments:
        return rk_sum(terms, coeffs, steps=steps, return_moments=True)
    return rk_sum(terms, coeffs, steps=steps), None


def _start(i: int) -> int:
    """Where row i begins among the entries of a below its diagonal."""
    return i * (i - 1) // 2


def asks_for_moments(module: nn.Module) -> bool:
    """Whether a step, transition or head makes use of its input's moments."""
    asks = getattr(module, "reads_moments", None)
    return asks is not None and not hooked(module) and asks()
