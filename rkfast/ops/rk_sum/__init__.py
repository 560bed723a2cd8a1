"""The weighted sum of Runge-Kutta stages: one pass over the memory instead of one per term."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkfast import dispatch
from rkfast.ops import checks, layout
from rkfast.ops.channel_moments import channel_moments, moments_dtype, pairs, with_moments
from rkfast.ops.rk_sum import reference


def _fake(
    terms: list[Tensor],
    coeffs: list[float],
    steps: list[Tensor | None],
    shift: Tensor | None,
    channels_last: bool,
    relu: bool,
    moments: bool,
    mask: bool = False,
) -> list[Tensor]:
    x = terms[0]
    result = [layout.empty(x, channels_last)]
    if mask:
        result.append(x.new_empty(layout.mask_shape(x, channels_last), dtype=torch.uint8))
    if moments:
        result.extend(x.new_empty(x.shape[1], dtype=moments_dtype(x.dtype)) for _ in range(2))
    return result


def _fake_backward(
    grad: Tensor,
    mask: Tensor | None,
    coeffs: list[float],
    steps: list[Tensor | None],
    step_terms: list[Tensor],
    step_coeffs: list[float],
    per_sample: list[bool],
    shift: bool,
    channels_last: bool,
) -> list[Tensor]:
    n, c = grad.shape[:2]
    dtype = moments_dtype(grad.dtype)
    return [
        *(layout.empty(grad, channels_last) for _ in coeffs),
        *(grad.new_empty((n, c) if each else (c,), dtype=dtype) for each in per_sample),
        *([grad.new_empty(c, dtype=dtype)] if shift else []),
    ]


def _body_out(*args: Any) -> tuple[Tensor, ...]:
    result = pairs(_op(*args[:7], False, args[7]), args[6])
    torch.autograd.graph.increment_version(args[7])  # a backward that has saved it must not read what is there now
    return result


_op = dispatch.Op("rk_sum", dispatch.ordered("rkfast.ops.rk_sum", "forward"))
_ARGS = "Tensor[] terms, float[] coeffs, Tensor?[] steps, Tensor? shift, bool channels_last, bool relu, bool moments"

# Returns [out], then the ReLU mask where asked for (layout.mask_shape), then mean and variance where asked for.
_forward = dispatch.register(f"rk_sum({_ARGS}, bool mask) -> Tensor[]", _op, _fake)
# Writes out and returns its mean and variance, empty where not asked for.
_forward_out = dispatch.register(
    f"rk_sum_out({_ARGS}, Tensor(a!) out) -> (Tensor, Tensor)",
    _body_out,
    lambda *args: pairs(_fake(*args[:7]), args[6]),
)
_backward_op = dispatch.Op("rk_sum_backward", dispatch.ordered("rkfast.ops.rk_sum", "backward"))
# With g' the gradient where the mask is set, returns [coeffs[i] * steps[i] * g' ...], then [step_coeffs[j] *
# sum(g' * step_terms[j]) ...] over each channel (of each sample, where per_sample[j]), then [sum(g')] where shift is
# set.
_backward = dispatch.register(
    "rk_sum_backward(Tensor grad, Tensor? mask, float[] coeffs, Tensor?[] steps, Tensor[] step_terms, "
    "float[] step_coeffs, bool[] per_sample, bool shift, bool channels_last) -> Tensor[]",
    _backward_op,
    _fake_backward,
)


class _Call(NamedTuple):
    coeffs: list[float]
    onto: list[float]  # coeffs of the backward
    step_at: tuple[int, ...]
    has_shift: bool
    channels_last: bool
    relu: bool
    moments: bool
    plain: bool

    def gradients(self, grad: Tensor, kept: Sequence[Any], needed: Sequence[bool]) -> list[Tensor | None]:
        """kept: the mask, the steps, and the terms of those that need a gradient; nothing without any of them."""
        mask, *saved = kept or (None,)
        steps: list[Tensor] = saved[: len(self.step_at)]
        step_terms: list[Tensor | None] = saved[len(self.step_at) :]
        if checks.differentiated(grad):  # a gradient of the gradient is asked for: the same in differentiable PyTorch
            gradients: Any = reference.gradients
        else:
            run = _backward_op if self.plain and checks.plain(grad) else _backward
            gradients = functools.partial(_gradients, run)
        return gradients(
            grad, mask, self.onto, self.step_at, steps, step_terms, self.has_shift, needed, self.channels_last
        )


class _RkSum(torch.autograd.Function):
    """tensors: the terms, the steps of the terms in step_at, the shift if there is one."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Any:
        n = len(call.coeffs)
        terms, vectors = list(tensors[:n]), tensors[n:]
        shift = vectors[-1] if call.has_shift else None
        result = (_op if call.plain else _forward)(
            terms, call.coeffs, _placed(vectors, call.step_at, n), shift, call.channels_last, call.relu, call.moments,
            call.relu,
        )  # fmt: skip
        ctx.call = call
        if call.relu or call.step_at:
            needed = ctx.needs_input_grad[1 + n :]
            step_terms = [terms[i] if needed[k] else None for k, i in enumerate(call.step_at)]
            ctx.save_for_backward(result[1] if call.relu else None, *vectors[: len(call.step_at)], *step_terms)
        if not call.moments:
            return (result[0],)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*result[-2:])
        return result[0], result[-2], result[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        needed = ctx.needs_input_grad[1:]
        if grad is None:
            return (None,) * (1 + len(needed))
        return (None, *ctx.call.gradients(grad, ctx.saved_tensors, needed))


_apply_plain = checks.plain_apply(_RkSum)


def _placed(tensors: Sequence[Tensor], at: tuple[int, ...], n: int) -> list[Tensor | None]:
    placed: list[Tensor | None] = [None] * n
    for tensor, i in zip(tensors, at, strict=False):
        placed[i] = tensor
    return placed


def _gradients(
    run: Callable[..., list[Tensor]],
    grad: Tensor,
    mask: Tensor | None,
    coeffs: list[float],
    step_at: tuple[int, ...],
    steps: list[Tensor],
    step_terms: list[Tensor | None],
    has_shift: bool,
    needed: tuple[bool, ...],
    channels_last: bool,
) -> list[Tensor | None]:
    n = len(coeffs)
    step_of: dict[int, Tensor] = dict(zip(step_at, steps, strict=True))
    # Terms with the same coefficient and step share one gradient; a unit coefficient passes grad itself on.
    wanted: dict[tuple[float, int | None], int] = {}
    key_of = {}
    for i in range(n):
        if needed[i]:
            key_of[i] = key = (coeffs[i], i if i in step_of else None)
            if mask is not None or key != (1.0, None):
                wanted.setdefault(key, len(wanted))
    reduced = [k for k, term in enumerate(step_terms) if term is not None]
    shift = has_shift and needed[-1]
    result: list[Tensor] = []
    if wanted or reduced or shift:
        result = run(
            grad,
            mask,
            [c for c, _ in wanted],
            [None if i is None else step_of[i] for _, i in wanted],
            [step_terms[k] for k in reduced],
            [coeffs[step_at[k]] for k in reduced],
            [steps[k].dim() == 2 for k in reduced],
            shift,
            channels_last,
        )
    gradients: list[Tensor | None] = [None] * len(needed)
    for i, key in key_of.items():
        gradients[i] = result[wanted[key]] if key in wanted else grad
    for j, k in enumerate(reduced):
        gradients[n + k] = result[len(wanted) + j].to(steps[k].dtype)
    if shift:
        gradients[-1] = result[-1]
    return gradients


def rk_sum(
    terms: Sequence[Tensor],
    coeffs: Sequence[float],
    *,
    steps: Sequence[Tensor | None] | None = None,
    shift: Tensor | None = None,
    relu: bool = False,
    return_moments: bool = False,
    out: Tensor | None = None,
) -> Any:
    """Weighted sum of tensors, ``out = act(sum_j coeffs[j] * steps[j] * terms[j] + shift)``, in one pass.

    This is the combination of stages in every explicit Runge-Kutta step, ``y' = y + h * sum_i b_i * k_i`` (HO-ResNet,
    section 3; TSC, equation 3 with a step size per channel).

    Equivalent to::

        total = sum(c * (t if h is None else h.view(-1, C, 1, 1) * t) for c, h, t in zip(coeffs, steps, terms))
        total = total + shift.view(1, C, 1, 1)
        out = torch.relu(total) if relu else total

    Args:
        terms: 1 to 16 tensors [N, C], [N, C, L], [N, C, H, W] or [N, C, D, H, W] of one shape, dtype (float32, float64,
            bfloat16, float16) and device. Under autocast, mixed dtypes are promoted to the widest.
        coeffs: one float per term.
        steps: per term None or a factor per channel [C], or per sample and channel [N, C], of any floating dtype.
        shift: None or a vector [C] added to every channel.
        relu: apply max(0, .) to the sum; NaN stays NaN.
        return_moments: also return the mean and the biased variance of each channel of ``out``, as stored, computed in
            the same pass. They are not differentiable: the op that uses them carries their dependence on its input.
        out: a tensor of the result's shape and dtype to write into, dense or a channel slice ``buffer[:, i:j]``; not
            differentiable, so no argument may require grad.

    Returns:
        Tensor [N, C, ...], dense in the memory format of ``out`` or else of the first term; with ``return_moments`` a
        pair (Tensor, Moments). Sums accumulate in float32 (float64 for float64 terms) and round once.

    Differentiable any number of times in terms, steps and shift. Deterministic.

    Raises:
        TypeError: an argument is no tensor, not floating, or the dtypes are mixed; a coefficient requires grad.
        ValueError: no terms or more than 16, a shape, length or device that does not fit, or an ``out`` whose memory
            cannot be written.
        RuntimeError: ``out`` is given and an argument requires grad; or a backend was asked for that cannot serve this.
    """
    return _sum(terms, coeffs, steps, shift, relu, return_moments, out, False)


def _sum(
    terms: Sequence[Tensor],
    coeffs: Sequence[float],
    steps: Sequence[Tensor | None] | None,
    shift: Tensor | None,
    relu: bool,
    return_moments: bool,
    out: Tensor | None,
    deferred: bool,
) -> Any:
    if out is None:
        found = checks.whole_call("rk_sum_call", terms, coeffs, steps, shift, relu, return_moments, deferred)
        if found is not None:
            return with_moments(found) if return_moments else found
    if type(relu) is not bool or type(return_moments) is not bool:
        checks.flags(relu=relu, return_moments=return_moments)
    if steps is not None and type(steps) is not list:
        steps = checks.listed(steps, "steps")
    if type(terms) is not list and type(terms) is not tuple:
        terms = checks.listed(terms, "terms")
    seen = checks.survey(terms, (shift,), steps or ())
    terms, coeffs, steps, step_at = _checked(terms, coeffs, steps, shift, seen)
    if not seen:
        terms, steps, shift = [checks.held(t) for t in terms], [checks.held(h) for h in steps], checks.held(shift)
    first = terms[0]
    tensors: Sequence[Any] = (*terms, *(steps[i] for i in step_at)) if step_at else terms
    if shift is not None:
        tensors = (*tensors, shift)
    if seen:
        needs_grad, channels_last = bool(seen & checks.NEEDS_GRAD), bool(seen & checks.CHANNELS_LAST)
    else:
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        channels_last = layout.is_channels_last(first)
    if out is not None:
        channels_last = checks.slot(out, first, terms, (*steps, shift), needs_grad)
        result = _forward_out(terms, coeffs, steps, shift, channels_last, relu, return_moments, out)
        return with_moments([out, *result]) if return_moments else out
    plain = bool(seen & checks.PLAIN)
    if not plain and checks.transformed(tensors):
        total = reference.weighted_sum(terms, coeffs, steps, shift, relu)
        return (total, channel_moments(total)) if return_moments else total
    if needs_grad:
        if not seen:
            tensors = checks.distinct(tensors)
        onto = [1.0] * len(coeffs) if deferred else coeffs
        call = _Call(coeffs, onto, step_at, shift is not None, channels_last, relu, return_moments, plain)
        result = (_apply_plain if plain else _RkSum.apply)(call, *tensors)
    else:
        run = _op if plain else _forward
        result = run(terms, coeffs, steps, shift, channels_last, relu, return_moments, False)
    return with_moments(result) if return_moments else result[0]


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coeffs: Sequence[float], x: Tensor) -> tuple[Tensor, ...]:
        ctx.coeffs = coeffs
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in coeffs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor | None]:
        total: Tensor | None = None
        given = [(g, c) for g, c in zip(grads, ctx.coeffs, strict=True) if g is not None]
        while given:
            now = [] if total is None else [(total, 1.0)]
            room = checks.MAX_TERMS - len(now)
            now, given = now + given[:room], given[room:]
            total = rk_sum([g for g, _ in now], [c for _, c in now])
        return None, total


def can_share() -> bool:
    """Whether ``shared`` makes sense here: where a gradient is wanted, and by autograd as it is."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not checks.transforms()


def shared(x: Tensor, coeffs: Sequence[float]) -> tuple[Tensor, ...]:
    """x once for each of several sums, whose ``shared_sum`` has it with these coefficients.

    The sums leave it to x to multiply their gradients, and x adds all of them up in one pass, where autograd would
    write one product for each sum, and then add them two by two. A coefficient of 1 is also right for any other use.
    """
    return _Shared.apply(coeffs, x) if x.requires_grad else (x,) * len(coeffs)


def shared_sum(terms: Sequence[Tensor], coeffs: Sequence[float], *, relu: bool, return_moments: bool) -> Any:
    """``rk_sum`` of terms from ``shared``, with the coefficients that they were told there (or others, of 1)."""
    return _sum(terms, coeffs, None, None, relu, return_moments, None, True)


def _checked(
    terms: Sequence[Tensor],
    coeffs: Sequence[float],
    steps: Sequence[Tensor | None] | None,
    shift: Tensor | None,
    seen: int,
) -> tuple[list[Tensor], list[float], list[Tensor | None], tuple[int, ...]]:
    if type(terms) is not list:
        terms = checks.listed(terms, "terms")
    n = len(terms)
    if not 1 <= n <= checks.MAX_TERMS:
        raise ValueError(f"terms: expected 1 to {checks.MAX_TERMS} tensors, got {n}; sum the rest in a second call")
    coeffs = checks.coefficients(coeffs, terms)
    if not seen:
        checks.activation(terms[0], "terms[0]")
        for i in range(1, n):
            if isinstance(terms[i], Tensor) and terms[i].dtype != terms[0].dtype:
                terms = checks.promoted(terms)
            checks.like(terms[i], terms[0], f"terms[{i}]", "terms[0]")
        checks.vector(shift, terms[0], "shift")
    if steps is None:
        return terms, coeffs, [None] * n, ()
    steps = list(steps)
    if len(steps) != n:
        raise ValueError(f"steps: {len(steps)} entries for {n} terms; give None for a term without one")
    if not seen:
        for i, step in enumerate(steps):
            checks.vector(step, terms[0], f"steps[{i}]", per_sample=True)
    return terms, coeffs, steps, tuple(i for i, step in enumerate(steps) if step is not None)
