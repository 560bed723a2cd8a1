"""One Runge-Kutta step, and a period of steps at one resolution."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rkfast import tableau as tableaux
from rkfast.nn.norm import hooked
from rkfast.ops import Moments, rk_sum
from rkfast.ops.channel_moments import moments_dtype
from rkfast.ops.checks import MAX_TERMS, autocasts, real
from rkfast.ops.rk_sum import can_share, shared, shared_sum
from rkfast.tableau import Tableau

LEARNABLE = ("a", "b", "h")
VARIANTS = ("textbook", "authors", "paper")
MIN_STEP, MAX_STEP = 0.125, 4.0  # of an adaptive step, as in Luo et al., section 3.4

# Where the Verner block that Luo et al. published differs from Verner's method, in rows and columns that begin at 1:
# sqrt(6) is left out of two entries of a and factored out of a third, and the weight of stage 8 has lost its sign.
_VERNER = ("verner8", "verner89")
_PUBLISHED_A = {(6, 1): 8 / 150, (12, 7): 114464 / 135, (12, 10): 11128 * math.sqrt(6) / 45}
_PUBLISHED_B = {8: 27 / 140}

# N_in in N_out by their equations 2, 7 and 9, where every k contains N_in.
_PRINTED = {"euler": 1.0, "midpoint": 1.0, "rk4": 2.0}


class RKStep(nn.Module):
    """An explicit Runge-Kutta step, ``y' = y + h * sum_i b_i k_i`` with ``k_i = F_i(y + h * sum_{j<i} a_ij k_j)``.

    Each sum is one pass over the memory, and in the backward each stage adds up the gradients of its sums in one. For
    that the first branch reads an alias of y: a hook on that tensor has the gradient of this reader alone. A branch
    with a method ``reads_moments()`` that answers True is called as ``branch(x, moments)``, with the moments of its
    input taken in the pass that wrote it (PreActBranch does, and a step, which may be the branch of another).

    Luo et al., "Rethinking ResNets: Improved Stacking Strategies With High Order Schemes", have three versions of it:

    - "textbook": the formula above.
    - "authors": their code, ``y' = relu(y + h * sum_i b_i k_i)``. Of verner8 and verner89 it has four coefficients
      that are not Verner's: a_6,1, a_12,7, a_12,10 and b_8.
    - "paper": their equations 2 and 6 to 9 as printed, for euler, midpoint and rk4, with h = 1. Every k contains y:
      ``k_1 = F_1(y) + y``, ``k_i = F_i(sum_{j<i} a_ij k_j) + y``; ``y' = k_1`` of euler, ``k_2`` of midpoint and
      ``y + sum_i b_i k_i`` of rk4. No order is left: on y' = z y a midpoint step is 1 + z/2 + z^2/2.

    With ``tol`` the step is adaptive (section 3.4): all stages are evaluated with h, once; then

        err = sqrt(mean((h * sum_i (b_i - b^_i) k_i)^2)),  h' = clip(kappa * h * (tol / err)^(1 / (p + 1)), 1/8, 4),
        y' = y + h' * sum_i b_i k_i, or the relu of it,

    with b^ the embedded weights, p the lower order of the pair, and the mean over the whole batch (of this process):
    one h' for all its images, in training and eval alike. h' is of this step and this call only: nothing is kept, the
    next step begins with its own h, and no step is rejected and repeated, however large err is. Gradients flow
    through h' and err to the k and to h, and not where h' is clipped. No value is read back from the device.

    Args:
        tableau: the method, or its name; a Tableau that is not explicit cannot be made.
        branches: the F_i, one module per stage, or a single module that serves all stages; they leave their input as
            it is.
        step: the step size h, or a Tensor [C] with one for each channel (dimension 1 of y).
        learn: which of "a", "b" and "h" are parameters, that start from the tableau and ``step``; ``learned``
            holds them, and ``coefficients()`` reads them. With all three this is g_i of RKNet (Zhu et al.,
            "Convolutional Neural Networks combined with Runge-Kutta Methods", equation 4): every a_ij with j < i
            takes part, also where it starts from 0.
        variant: "textbook", "authors" or "paper".
        tol: the error that an adaptive step aims at, absolute, in units of y; None: h is taken as it is.
        kappa: the safety factor of an adaptive step.
        fused: False takes stock PyTorch operations for the sums; the branches have their own ``fused``.

    Shape: Tensor [N, C, ...] -> [N, C, ...]; branches keep the shape.

    Raises:
        TypeError: tableau is neither a Tableau nor a name, learn is not a sequence of str, or a number is none.
        ValueError: there is no such method or variant, the number or the channels of the branches do not fit, step is
            not finite, learn names something else, or tableau, step and learn are not those that ``variant`` and
            ``tol`` need.
    """

    h: Tensor | None

    def __init__(
        self,
        tableau: Tableau | str,
        branches: nn.Module | Sequence[nn.Module],
        *,
        step: float | Tensor = 1.0,
        learn: Sequence[str] = (),
        variant: str = "textbook",
        tol: float | None = None,
        kappa: float = 0.9,
        fused: bool = True,
    ) -> None:
        super().__init__()
        tableau = tableaux.get(tableau) if isinstance(tableau, str) else tableau
        if not isinstance(tableau, Tableau):
            raise TypeError(f"tableau: expected a Tableau or the name of one, got {type(tableau).__name__}")
        learn = tuple(learn) if isinstance(learn, Iterable) and not isinstance(learn, str) else learn
        _check_options(tableau, step, learn, variant, tol, kappa)
        shared = isinstance(branches, nn.Module) and not isinstance(branches, nn.ModuleList)
        modules: list[nn.Module] = [branches] if shared else list(branches)  # type: ignore[list-item, arg-type]
        if not shared and len(modules) != tableau.stages:
            raise ValueError(
                f"branches: got {len(modules)} modules for the {tableau.stages} stages of {tableau.name}; "
                "give one per stage, or a single module that serves all"
            )
        self.tableau = tableau
        self.variant = variant
        self.tol = tol
        self.kappa = kappa
        self.fused = fused
        self.channels = _common_channels(modules)
        self.step = step.detach().clone() if isinstance(step, Tensor) else float(step)
        self.branches = nn.ModuleList(modules)
        # Row i of a, and after the last the weights b; as they are, and times a step size that is one float.
        self.rows = self._table()
        self.scaled = self._table(self.step) if isinstance(self.step, float) else self.rows
        # b - b^, of an adaptive step
        pair = zip(tableau.b, tableau.b_embedded or tableau.b, strict=True)
        self.differences = tuple(float(b + -1 * e) for b, e in pair)
        self.learned = self._parameters_of(learn)
        # A step size that is read from memory and not learned. Not in the state_dict, as ``step`` is not.
        self.register_buffer("h", None, persistent=False)
        if isinstance(self.step, Tensor) and "h" not in learn:
            self.h = self.step.clone()

    def forward(self, y: Tensor, moments: Moments | None = None) -> Tensor:
        return self.forward_with_moments(y, moments)[0]

    def forward_with_moments(
        self, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        """The step, taking y's moments if they are known, and leaving those of y' if asked for (and fused)."""
        h = self._step_size(y)
        share = self.fused and self.learned is None and self.tol is None and isinstance(h, float) and can_share()
        own = [self._own(i) for i in range(len(self.rows))]
        readers = Readers(y, own, self.scaled, share)
        slopes: list[Tensor] = []  # k_1, k_2, ...
        for i in range(self.tableau.stages):
            branch = self.branches[i % len(self.branches)]
            reader = self.reads_moments(i)
            x, x_moments = self._sum(i, readers, h, return_moments=reader) if i else (readers.y(), moments)
            k = branch(x, x_moments) if reader and x_moments is not None else branch(x)
            if k.shape != y.shape:
                raise ValueError(
                    f"branches[{i % len(self.branches)}]: made {list(k.shape)} of {list(y.shape)}; "
                    "expected a branch that keeps the shape"
                )
            slopes.append(k)
            readers.append(k)
        if self.tol is not None:
            h = self._adapted(slopes, h)
        return self._sum(len(slopes), readers, h, return_moments=return_moments)

    def set_step(self, step: float) -> None:
        """Take ``step`` as h from now on, any finite number.

        From the first call on, h lies in a buffer on the device and is written in place, so that a step that was
        compiled or captured after it goes on as it is. Like ``step`` it is not in the state_dict: whoever resumes a
        schedule sets it again, as he does a learning rate.

        Raises:
            TypeError: step is no number.
            ValueError: step is not finite, h is learned, or the variant is "paper", which has none.
        """
        real(step, "step")
        if not math.isfinite(step):
            raise ValueError(f"step: expected a finite number, got {step}")
        if self.learned is not None and "h" in self.learned:
            raise ValueError('set_step: h is learned; leave "h" out of learn, or write to learned["h"]')
        if self.variant == "paper":
            raise ValueError('set_step: variant "paper" has no step size; take "textbook"')
        if self.h is None:
            like = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
            dtype = torch.promote_types(like.dtype, torch.float32)
            self.h = torch.tensor(float(step), dtype=dtype, device=like.device)
        else:
            self.h.fill_(step)
        self.step = float(step)

    def coefficients(self) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...], Any]:
        """(a, b, h) as they are now: those of the tableau and variant, or what has been learned in their place. h is a
        float, or a list of one per channel."""
        *a, b = self.rows
        learned = {name: p.detach().double().tolist() for name, p in (self.learned or {}).items()}
        if "a" in learned:
            s = self.tableau.stages
            a = [(*learned["a"][_start(i) : _start(i + 1)], *(0.0,) * (s - i)) for i in range(s)]
        h = self.step if self.h is None else self.h
        now = learned["h"] if "h" in learned else h.tolist() if isinstance(h, Tensor) else h
        return tuple(a), tuple(learned.get("b", b)), now

    def _table(self, h: float = 1.0) -> tuple[tuple[float, ...], ...]:
        """The rows of h * a, and h * b."""
        a, b = self.tableau.floats(h)
        rows = [list(row) for row in (*a, b)]
        if self.variant == "authors" and _is_one_of(self.tableau, _VERNER):
            for (i, j), value in _PUBLISHED_A.items():
                rows[i - 1][j - 1] = h * value
            for i, value in _PUBLISHED_B.items():
                rows[-1][i - 1] = h * value
        return tuple(map(tuple, rows))

    def _parameters_of(self, learn: Sequence[str]) -> nn.ParameterDict | None:
        *a, b = self.rows
        below = [a[i][j] for i in range(self.tableau.stages) for j in range(i)]
        values = {"a": below, "b": b, "h": self.step}
        initial = {name: torch.as_tensor(v).clone() for name, v in values.items() if name in learn}
        # Of a method with one stage there is no a.
        found = {name: nn.Parameter(value) for name, value in initial.items() if value.numel()}
        return nn.ParameterDict(found) if found else None

    def _step_size(self, y: Tensor) -> float | Tensor:
        h = self.learned["h"] if self.learned is not None and "h" in self.learned else self.h
        if h is None:
            assert isinstance(self.step, float)
            return self.step
        if h.dim() and (y.dim() < 2 or y.shape[1] != len(h)):
            raise ValueError(f"y: shape {list(y.shape)} does not fit the step sizes of {len(h)} channels")
        return h

    def _sum(
        self, i: int, readers: Readers, h: float | Tensor, *, return_moments: bool
    ) -> tuple[Tensor, Moments | None]:
        """What stage i (from 0) reads, or after the last the result: row i of all k."""
        last = i == self.tableau.stages
        name = "b" if last else "a"
        weights: Sequence[float | Tensor]
        if self.learned is not None and name in self.learned:
            learned = self.learned[name]
            weights = (learned if last else learned[_start(i) : _start(i + 1)]).unbind()
        elif isinstance(h, Tensor):
            weights = self.rows[i]
        else:
            weights, h = self.scaled[i], 1.0
        return readers.sum(
            weights,
            scale=h,
            own=self._own(i),
            relu=last and self.variant == "authors",
            fused=self.fused,
            return_moments=return_moments,
        )

    def _own(self, i: int) -> float:
        """What y has in row i."""
        if self.variant != "paper":
            return 1.0
        return _PRINTED[self.tableau.name] if i == self.tableau.stages else sum(self.rows[i])

    def _adapted(self, slopes: list[Tensor], h: float | Tensor) -> Tensor:
        """h' of the docstring."""
        used = [(k, d) for k, d in zip(slopes, self.differences, strict=True) if d]
        (first, own), *rest = used
        e, _ = weighted_sum(first, [k for k, _ in rest], [d for _, d in rest], own=own, fused=self.fused)
        # In float32 of half precision, whose smallest number is an error like others.
        rms = torch.linalg.vector_norm(e, dtype=moments_dtype(e.dtype)) / max(e.numel(), 1) ** 0.5
        err = (abs(h) * rms).clamp_min(torch.finfo(rms.dtype).tiny)  # of 0 the gradient would be NaN
        p = min(self.tableau.order, self.tableau.order_embedded or 0)
        assert self.tol is not None
        change = torch.exp((math.log(self.tol) - err.log()) / (p + 1))
        return (self.kappa * h * change).clamp(MIN_STEP, MAX_STEP)

    def reads_moments(self, stage: int = 0) -> bool:
        """Whether the branch of a stage (the first, which reads y itself) makes use of its input's moments."""
        asks = getattr(self.branches[stage % len(self.branches)], "reads_moments", None)
        return self.fused and asks is not None and asks()

    def extra_repr(self) -> str:
        step = f"{self.step:g}" if isinstance(self.step, float) else f"Tensor[{len(self.step)}]"
        learn = f", learn={tuple(self.learned)}" if self.learned is not None else ""
        variant = f", variant={self.variant!r}" if self.variant != "textbook" else ""
        tol = f", tol={self.tol:g}, kappa={self.kappa:g}" if self.tol is not None else ""
        return f"{self.tableau.name}, step={step}{learn}{variant}{tol}, fused={self.fused}"


def _check_options(tableau: Tableau, step: Any, learn: Sequence[str], variant: Any, tol: Any, kappa: Any) -> None:
    _check_step(step)
    if not isinstance(learn, Iterable) or isinstance(learn, str) or not all(isinstance(name, str) for name in learn):
        raise TypeError(f"learn: expected a sequence of str, such as {LEARNABLE}, got {learn!r}")
    unknown = [name for name in learn if name not in LEARNABLE]
    if unknown:
        raise ValueError(f"learn: {unknown[0]!r} is not a coefficient; expected some of {', '.join(LEARNABLE)}")
    if not isinstance(variant, str):
        raise TypeError(f"variant: expected a str, got {variant!r}")
    if variant not in VARIANTS:
        raise ValueError(f"variant: {variant[:64]!r} is not supported; expected one of {', '.join(VARIANTS)}")
    if variant == "paper":
        if not _is_one_of(tableau, _PRINTED):
            raise ValueError(
                f'variant: "paper" has equations for {", ".join(_PRINTED)}, and none for {tableau.name}; '
                'take "textbook" or "authors"'
            )
        if isinstance(step, Tensor) or step != 1 or len(learn) or tol is not None:
            raise ValueError(
                'variant: the equations of "paper" have no step size and nothing to learn; take "textbook"'
            )
    for name, value in (("tol", tol), ("kappa", kappa)):
        if value is None and name == "tol":
            continue
        real(value, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a number above 0, got {value}")
    if tol is not None:
        if not isinstance(step, Tensor) and step <= 0:
            raise ValueError(f"step: an adapted step size is between 1/8 and 4; expected one above 0, got {step}")
        if tableau.b_embedded is None:
            raise ValueError(
                f"tol: {tableau.name} has no embedded weights to estimate an error with; take another method"
            )
        if (isinstance(step, Tensor) and step.dim()) or {"a", "b"} & set(learn):
            raise ValueError("tol: an adaptive step has the weights of its pair and one h for all channels")


def _is_one_of(tableau: Tableau, names: Container[str]) -> bool:
    """Whether it is a known method, and not only called like one."""
    return tableau.name in names and tableau == tableaux.get(tableau.name)


def _check_step(step: Any) -> None:
    if isinstance(step, Tensor):
        if step.dim() != 1 or not step.is_floating_point() or not len(step):
            raise ValueError(
                f"step: expected a number, or a floating tensor [C], got shape {list(step.shape)} of {step.dtype}"
            )
        finite = step.is_meta or bool(step.isfinite().all())
    else:
        real(step, "step")
        finite = math.isfinite(step)
    if not finite:
        raise ValueError(f"step: expected a finite number, got {step}")


def _common_channels(branches: Sequence[nn.Module]) -> int | None:
    """C of the branches that say so, as PreActBranch does."""
    known = [(i, c) for i, branch in enumerate(branches) if (c := getattr(branch, "channels", None)) is not None]
    for i, c in known:
        if c != known[0][1]:
            first, of = known[0]
            raise ValueError(f"branches: [{first}] has {of} channels, and [{i}] has {c}; expected blocks of one shape")
    return known[0][1] if known else None


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


class Readers:
    """y and then each k, for the sums of a step. With ``share`` each adds up its gradient once, in one pass.

    Args:
        y: Tensor [N, C, ...].
        own: what y has in each row.
        rows: what k_1, k_2, ... have in what each stage reads, and then in the result; read with ``share`` alone.
    """

    def __init__(self, y: Tensor, own: Sequence[float], rows: Sequence[Sequence[float]], share: bool) -> None:
        self.dtype, self.rows, self.share = y.dtype, rows, share
        self.at = [self._each(y, [1.0, *own[1:]])]  # the first stage reads y itself

    def _each(self, x: Tensor, weights: Sequence[float]) -> Iterator[Tensor]:
        return iter(shared(x, weights)) if self.share else itertools.repeat(x)

    def y(self) -> Tensor:
        """For a reader in place of a sum."""
        return next(self.at[0])

    def append(self, k: Tensor) -> None:
        if self.share and k.dtype != self.dtype and autocasts(k):
            # So that what the sums give back is not rounded before it is added up.
            k = k.to(torch.promote_types(k.dtype, self.dtype))
        i = len(self.at) - 1
        self.at.append(self._each(k, [row[i] for row in self.rows[i + 1 :] if row[i] != 0]))

    def sum(self, weights: Sequence[float | Tensor], **options: Any) -> tuple[Tensor, Moments | None]:
        """``weighted_sum`` of the next row."""
        y, *slopes = self.at
        used = [(next(k), w) for k, w in zip(slopes, weights, strict=False) if isinstance(w, Tensor) or w != 0]
        return weighted_sum(next(y), [k for k, _ in used], [w for _, w in used], share=self.share, **options)


def weighted_sum(
    y: Tensor,
    terms: Sequence[Tensor],
    weights: Sequence[float | Tensor],
    *,
    fused: bool,
    scale: float | Tensor = 1.0,
    own: float = 1.0,
    relu: bool = False,
    return_moments: bool = False,
    share: bool = False,
) -> tuple[Tensor, Moments | None]:
    """``act(own * y + scale * sum_j weights[j] * terms[j])``, and the moments of the sum if asked for (and fused).

    A weight is a float or a learned scalar; ``scale`` may also be a Tensor [C]. Terms may be channel slices of one
    buffer, which are read where they are. share: y and terms are ``shared`` with these weights.
    """
    used = [(k, *_factors(w, scale)) for k, w in zip(terms, weights, strict=False) if isinstance(w, Tensor) or w != 0]
    if not fused:
        return _stock_sum(y, used, own, relu), None
    total = y
    while True:
        now, used = used[: MAX_TERMS - 1], used[MAX_TERMS - 1 :]
        steps = None
        if any(v is not None for _, _, v in now):
            c = y.shape[1]
            steps = [None, *(v if v is None or v.dim() else v.expand(c) for _, _, v in now)]
        inputs, coeffs = [total, *(k for k, _, _ in now)], [own, *(f for _, f, _ in now)]
        act, wanted = relu and not used, return_moments and not used
        if share:
            found = shared_sum(inputs, coeffs, relu=act, return_moments=wanted)
        else:
            found = rk_sum(inputs, coeffs, steps=steps, relu=act, return_moments=wanted)
        if not used:
            return found if return_moments else (found, None)
        total, own = found, 1.0


def _stock_sum(y: Tensor, used: Sequence[tuple[Tensor, float, Tensor | None]], own: float, relu: bool) -> Tensor:
    start = y if own == 1 else own * y
    total = start
    for k, factor, v in used:
        if v is not None:
            # A scalar leaves the dtype of k alone; a vector has to be of it.
            v = v.to(k.dtype).view(-1, *(1,) * (k.dim() - 2)) if v.dim() else v
            total = total + factor * v * k
        else:
            # In place on the sum that the first term made: half the time of fresh memory for each term.
            total = torch.add(start, k, alpha=factor) if total is start else total.add_(k, alpha=factor)
    return F.relu(total, inplace=total is not start) if relu else total


def _factors(weight: float | Tensor, scale: float | Tensor) -> tuple[float, Tensor | None]:
    """weight * scale as a float, and a tensor if one of them is."""
    if isinstance(weight, Tensor):
        return (1.0, weight * scale) if isinstance(scale, Tensor) else (scale, weight)
    return (weight, scale) if isinstance(scale, Tensor) else (weight * scale, None)


def _start(i: int) -> int:
    """Where row i begins among the entries of a below its diagonal."""
    return i * (i - 1) // 2


def asks_for_moments(module: nn.Module) -> bool:
    """Whether a step, transition or head makes use of its input's moments."""
    asks = getattr(module, "reads_moments", None)
    return asks is not None and not hooked(module) and asks()
