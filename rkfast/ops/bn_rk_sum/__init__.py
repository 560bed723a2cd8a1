"""BatchNorm inside the sum: ResNet's join, TSC's step, plain BatchNorm with ReLU, in two passes over the memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rkfast import dispatch
from rkfast.ops import checks, collective, layout
from rkfast.ops.bn_rk_sum import reference
from rkfast.ops.channel_moments import (
    Moments,
    moments_dtype,
    pairs,
    update_running_stats,
    update_running_stats_op,
    with_moments,
)
from rkfast.ops.channel_moments import channel_moments as moments_of
from rkfast.ops.channel_moments import reference as channel_moments


def _fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    terms: list[Tensor],
    coeffs: list[float],
    step: Tensor | None,
    channels_last: bool,
    relu: bool,
    eps: float,
    moments: bool,
    mask: bool = False,
) -> list[Tensor]:
    result = [layout.empty(x, channels_last)]
    if mask:
        result.append(x.new_empty(layout.mask_shape(x, channels_last), dtype=torch.uint8))
    vectors = 2 * ((mean is None) + moments)
    return [*result, *(x.new_empty(x.shape[1], dtype=moments_dtype(x.dtype)) for _ in range(vectors))]


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    step: Tensor | None,
    mask: Tensor | None,
    coeffs: list[float],
    channels_last: bool,
    relu: bool,
    batch_stats: bool,
    eps: float,
    need_x: bool,
    need_affine: bool,
    need_step: bool,
) -> list[Tensor]:
    dtype = moments_dtype(x.dtype)
    return [
        *([layout.empty(x, channels_last)] if need_x else []),
        *([x.new_empty(x.shape[1], dtype=dtype) for _ in range(2)] if need_affine else []),
        *([x.new_empty(step.shape, dtype=dtype)] if need_step and step is not None else []),
        *(layout.empty(x, channels_last) for _ in coeffs),
    ]


def _body_out(*args: Any) -> tuple[Tensor, ...]:
    result = pairs(_op(*args[:12], False, args[12]), args[3] is None, args[11])
    torch.autograd.graph.increment_version(args[12])  # a backward that has saved it must not read what is there now
    return result


_op = dispatch.Op("bn_rk_sum", dispatch.ordered("rkfast.ops.bn_rk_sum", "forward"))
_ARGS = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor[] terms, float[] coeffs, Tensor? step, "
    "bool channels_last, bool relu, float eps, bool moments"
)

# Normalises with the given mean and variance, else with those of x. Returns [out], then the ReLU mask where asked for
# (layout.mask_shape), then x's mean and variance where they were not given, then those of out where asked for.
_forward = dispatch.register(f"bn_rk_sum({_ARGS}, bool mask) -> Tensor[]", _op, _fake)
# Writes out and returns x's mean and variance, empty where they were given, and out's, empty where not asked for.
_forward_out = dispatch.register(
    f"bn_rk_sum_out({_ARGS}, Tensor(a!) out) -> (Tensor, Tensor, Tensor, Tensor)",
    _body_out,
    lambda *args: pairs(_fake(*args[:12]), args[3] is None, args[11]),
)
_backward_op = dispatch.Op("bn_rk_sum_backward", dispatch.ordered("rkfast.ops.bn_rk_sum", "backward"))
# With g' the gradient where the mask is set (relu without a mask: where the output recomputed from x, which then has no
# terms beside it, is not <= 0), returns [dx], [dweight, dbias], [dstep], each where needed, then [coeffs[i] * g' ...].
_backward = dispatch.register(
    "bn_rk_sum_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor? step, "
    "Tensor? mask, float[] coeffs, bool channels_last, bool relu, bool batch_stats, float eps, bool need_x, "
    "bool need_affine, bool need_step) -> Tensor[]",
    _backward_op,
    _fake_backward,
)


class _Call(NamedTuple):
    coeffs: list[float]
    channels_last: bool
    relu: bool
    batch_stats: bool
    eps: float
    moments: bool
    group: str
    plain: bool

    def gradients(self, grad: Tensor, kept: Sequence[Any], needed: Sequence[bool]) -> list[Tensor | None]:
        arguments = [*kept, self.coeffs, self.channels_last, self.relu, self.batch_stats, self.eps]
        gradients: Any = _gradients
        if checks.differentiated(grad):
            if self.group:
                raise RuntimeError("bn_rk_sum: with group the gradient of its gradient (create_graph) is not supported")
            gradients = reference.gradients  # plain, differentiable PyTorch
        else:
            arguments += [self.group, self.plain and checks.plain(grad)]
        return gradients(grad, *arguments, needed)


class _BnRkSum(torch.autograd.Function):
    """inputs: mean, var, x, weight, bias, step, terms. found: what is returned besides goes there, if given."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, moved: tuple[Any, ...] | None, found: list[Tensor] | None, *inputs: Tensor | None
    ) -> Any:
        mean, var, x, weight, bias, step, *terms = inputs
        # Without terms the sign of the output follows from x, so that nothing need be kept for it.
        mask = call.relu and len(terms) > 0
        total, *vectors = (_op if call.plain else _forward)(
            x, weight, bias, mean, var, terms, call.coeffs, step, call.channels_last, call.relu, call.eps, call.moments,
            mask,
        )  # fmt: skip
        bits = vectors.pop(0) if mask else None
        if mean is None:
            mean, var = vectors[:2]
        if moved is not None:
            (update_running_stats_op if call.plain else update_running_stats)(mean, var, *moved)
        ctx.call = call
        ctx.save_for_backward(x, weight, bias, mean, var, step, bits)
        if found is not None:  # outputs that nobody differentiates cost apply as much as the others
            found.extend(vectors)
            return total
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*vectors)
        return (total, *vectors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        needed = ctx.needs_input_grad[5:]
        if grad is None:
            return (None,) * (5 + len(needed))
        return (None, None, None, None, None, *ctx.call.gradients(grad, ctx.saved_tensors, needed))


_apply_plain = checks.plain_apply(_BnRkSum)


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    step: Tensor | None,
    mask: Tensor | None,
    coeffs: list[float],
    channels_last: bool,
    relu: bool,
    batch_stats: bool,
    eps: float,
    group: str,
    plain: bool,
    needed: tuple[bool, ...],
) -> list[Tensor | None]:
    need_x, need_weight, need_bias, need_step, *need_terms = needed
    # Terms with the same coefficient share one gradient; a unit coefficient passes grad itself on.
    wanted: dict[float, int] = {}
    for c, need in zip(coeffs, need_terms, strict=True):
        if need and (mask is not None or c != 1.0):
            wanted.setdefault(c, len(wanted))
    shared = bool(group) and need_x  # sums over all processes stand between the gradient's parts
    need_affine = need_weight or need_bias or shared
    result: list[Tensor] = []
    if need_x or need_affine or need_step or wanted:
        result = list(
            (_backward_op if plain else _backward)(
                grad, x, weight, bias, mean, var, step, mask, list(wanted),
                channels_last, relu, batch_stats and not group, eps, need_x, need_affine, need_step,
            )
        )  # fmt: skip
    dx = result.pop(0) if need_x else None
    dweight, dbias = (result.pop(0), result.pop(0)) if need_affine else (None, None)
    if shared and dx is not None and dweight is not None and dbias is not None:
        dx = with_mean_terms(dx, x, weight, mean, var, dweight, dbias, channels_last, eps, group)
    dstep = result.pop(0) if need_step else None
    return [
        dx,
        dweight.to(weight.dtype) if need_weight and weight is not None and dweight is not None else None,
        dbias.to(bias.dtype) if need_bias and bias is not None and dbias is not None else None,
        dstep.to(step.dtype) if step is not None and dstep is not None else None,
        *(
            (result[wanted[c]] if c in wanted else grad) if need else None
            for c, need in zip(coeffs, need_terms, strict=True)
        ),
    ]


def with_mean_terms(
    dx: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    channels_last: bool,
    eps: float,
    group: str,
) -> Tensor:
    """dx, to which the dependence of a group's moments on x is added; dweight and dbias are this process's."""
    count = collective.count(layout.count(x), x, group)
    slope, offset = collective.mean_terms(weight, var, eps, dweight, dbias, count, group)
    return _forward(
        x, slope, offset, mean, torch.zeros_like(var), [dx], [1.0], None, channels_last, False, 1.0, False, False
    )[0]  # fmt: skip


def bn_rk_sum(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    terms: Sequence[Tensor] = (),
    coeffs: Sequence[float] = (),
    step: Tensor | None = None,
    relu: bool = False,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None = None,
    moments: Moments | None = None,
    return_moments: bool = False,
    out: Tensor | None = None,
    group: str = "",
) -> Any:
    """BatchNorm scaled and joined with other tensors, ``out = act(sum_j coeffs[j] * terms[j] + step * BN(x))``.

    With terms and ReLU this is ResNet's ``relu(identity + bn(conv))``; with a step the join of a learned time step,
    ``y' = y + step * F(y)`` (TSC, equation 3); with neither, plain BatchNorm and ReLU. Backward reduces once and
    applies once: ``dx = h * w * rstd * (g' - mean(g') - x_hat * mean(g' * x_hat))`` with ``g'`` the gradient behind
    the ReLU.

    Equivalent to::

        normed = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
        total = sum(c * t for c, t in zip(coeffs, terms)) + step.view(-1, C, 1, 1) * normed
        out = torch.relu(total) if relu else total

    Args:
        x: Tensor [N, C], [N, C, L], [N, C, H, W] or [N, C, D, H, W]; float32, float64, bfloat16 or float16.
        weight, bias: [C] of any floating dtype, or None.
        running_mean, running_var: [C], updated in place by PyTorch's rules in training; or both None.
        terms: at most 16 tensors like x. Under autocast, mixed dtypes are promoted to the widest.
        coeffs: one float per term.
        step: None, a factor per channel [C], or per sample and channel [N, C] (attention).
        relu: apply max(0, .) to the sum; NaN stays NaN.
        training: normalise with the batch's own moments (True) or with the running ones (False).
        momentum: weight of the new moments in the running ones; None takes the cumulative average, 1 / counter.
        eps: added to the variance.
        num_batches_tracked: the counter, advanced by one in training where there are running statistics.
        moments: the moments of x, if they are known already (``channel_moments(x)``, or ``return_moments`` of the op
            that wrote x); the gradient takes their dependence on x into account. Ignored unless training.
        return_moments: also return the moments of ``out``, as stored, from the same pass; not differentiable.
        out: a tensor to write into, dense or a channel slice; not differentiable.
        group: in training, the name of a process group (``ProcessGroup.group_name``) whose processes each have a part
            of the batch: statistics are those of all of it, as in nn.SyncBatchNorm, on a CPU too (gloo).

    Returns:
        Tensor [N, C, ...] in the memory format of ``out`` or else of x; with ``return_moments`` a pair (Tensor,
        Moments).

    Differentiable any number of times in x, weight, bias, step and terms. Deterministic.

    Raises:
        TypeError: an argument is no tensor, not floating, or the dtypes are mixed.
        ValueError: a shape, length, number or device that does not fit; one value per channel in training; no running
            statistics where they are needed, or such as cannot be written; an ``out`` whose memory cannot be written.
            Nothing is modified then.
        RuntimeError: ``out`` is given and an argument requires grad; running statistics require grad; what the backward
            needs is an inference tensor; or a backend was asked for that cannot serve this.
    """
    if out is None and group == "":
        whole = checks.whole_call(
            "bn_rk_sum_call", x, weight, bias, running_mean, running_var, terms, coeffs, step, relu, training, momentum,
            eps, num_batches_tracked, moments, return_moments,
        )  # fmt: skip
        if whole is not None:
            return with_moments(whole) if return_moments else whole
    if type(training) is not bool or type(relu) is not bool or type(return_moments) is not bool:
        checks.flags(training=training, relu=relu, return_moments=return_moments)
    if not training:
        moments = None
        group = ""
    if group or type(group) is not str:
        collective.check(group, moments is not None)
    vectors: tuple[Tensor | None, ...] = (weight, bias, running_mean, running_var)
    if moments is not None:
        checks.triple(moments)
        vectors = (moments[0], moments[1], *vectors)
    tensors = (x, *terms) if isinstance(terms, (list, tuple)) else ()
    seen = checks.survey(tensors, vectors, (step,), 2, num_batches_tracked)
    x, terms, coeffs = _checked(x, vectors, terms, coeffs, step, seen)
    if type(eps) is not float or type(momentum) is not float or not eps > 0:
        checks.norm_numbers(eps, momentum, training)
    tracked = training and running_mean is not None
    if not seen:
        checks.running(running_mean, "running_mean", tracked)
        checks.running(running_var, "running_var", tracked)
        if tracked:
            checks.counter(num_batches_tracked, x)
        x, weight, bias, step = map(checks.held, (x, weight, bias, step))
        terms = [checks.held(t) for t in terms]
    count = _count(x, moments, bool(group)) if training else 0
    if training:
        if tracked and momentum is None and num_batches_tracked is None:
            raise ValueError("num_batches_tracked: momentum=None averages over all batches and needs the counter")
        mean, var = (None, None) if moments is None else moments[:2]
    elif running_mean is None:
        raise ValueError(
            "running_mean: expected running statistics when training=False; pass training=True to use x's own"
        )
    else:
        mean, var = running_mean, running_var
    if seen:
        needs_grad, channels_last = bool(seen & checks.NEEDS_GRAD), bool(seen & checks.CHANNELS_LAST)
    else:
        mean, var = checks.held(mean), checks.held(var)
        inputs: Sequence[Tensor | None] = (x, weight, bias, step, *terms)
        needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        channels_last = layout.is_channels_last(x)
        if needs_grad:
            statistics = (
                {"moments.mean": mean, "moments.var": var} if training else {"running_mean": mean, "running_var": var}
            )
            checks.keepable({"x": x, "weight": weight, "bias": bias, "step": step, **statistics})
    plain = bool(seen & checks.PLAIN)
    update: Any = update_running_stats
    moved: tuple[Any, ...] | None = None
    if tracked:
        counters = [] if num_batches_tracked is None else [num_batches_tracked]
        moved = (count, [running_mean], [running_var], counters, momentum)
    if out is not None:
        channels_last = checks.slot(out, x, [x, *terms], (weight, bias, step, mean, var), needs_grad)
    if group:
        if checks.transformed((x, weight, bias, step, *terms)):
            raise RuntimeError("group: not supported by torch.func, forward-mode AD and torch.jit.trace")
        with torch.no_grad():
            mean, var = collective.moments(*moments_of(x), group)
            if moved is not None:
                every = collective.unbiased(var, collective.count(count, x, group))
                update_running_stats(mean, every, 1, *moved[1:])
                moved = None
    tail = (relu, eps, return_moments)
    if out is not None:
        found = _forward_out(x, weight, bias, mean, var, terms, coeffs, step, channels_last, *tail, out)
        total = out
    elif not plain and checks.transformed((x, weight, bias, step, mean, var, *terms)):
        if training:  # moments that are given do not carry their dependence on x
            mean = var = None
        total, *found = reference.composite(x, weight, bias, mean, var, terms, coeffs, step, *tail)
        found = [v.detach() for v in found]
        update = channel_moments.update_running_stats
    elif needs_grad:
        found = []
        inputs = (mean, var, x, weight, bias, step, *terms)
        if not seen:
            inputs = checks.distinct(inputs)
        # Activation checkpointing stops what it computes again at the last tensor that is kept: as in a BatchNorm,
        # statistics move before. A compiler wants nothing changed within a Function.
        within = None if torch.compiler.is_compiling() else moved
        call = _Call(coeffs, channels_last, relu, training, eps, return_moments, group, plain)
        if plain:
            total = _apply_plain(call, within, found, *inputs)
        else:
            total, *found = _BnRkSum.apply(call, within, None, *inputs)
        moved = moved if within is None else None
    else:
        run = _op if plain else _forward
        total, *found = run(x, weight, bias, mean, var, terms, coeffs, step, channels_last, *tail, False)
    if moved is not None:
        if mean is None:
            mean, var = found[:2]
        if plain:  # nothing here requires grad
            update_running_stats_op(mean, var, *moved)
        else:
            with torch.no_grad():
                update(mean, var, *moved)
    return with_moments([total, *found[-2:]]) if return_moments else total


def _checked(
    x: Tensor,
    vectors: tuple[Tensor | None, ...],
    terms: Sequence[Tensor],
    coeffs: Sequence[float],
    step: Tensor | None,
    seen: int,
) -> tuple[Tensor, list[Tensor], list[float]]:
    if type(terms) is not list:
        terms = checks.listed(terms, "terms")
    if len(terms) > checks.MAX_TERMS:
        raise ValueError(
            f"terms: expected at most {checks.MAX_TERMS} tensors, got {len(terms)}; sum some of them first"
        )
    coeffs = checks.coefficients(coeffs, terms)
    names = ("moments.mean", "moments.var", "weight", "bias", "running_mean", "running_var")[-len(vectors) :]
    if not seen:
        checks.activation(x, "x")
        for i in range(len(terms)):
            if isinstance(terms[i], Tensor) and terms[i].dtype != x.dtype:
                x, *terms = checks.promoted([x, *terms])
            checks.like(terms[i], x, f"terms[{i}]", "x")
        for vector, name in zip(vectors, names, strict=True):
            checks.vector(vector, x, name)
        checks.vector(step, x, "step", per_sample=True)
    if (vectors[-2] is None) != (vectors[-1] is None):
        missing = names[-2] if vectors[-2] is None else names[-1]
        raise ValueError(f"{missing}: one of the running statistics is missing; give both or neither")
    return x, terms, coeffs


def _count(x: Tensor, moments: Moments | None, shared: bool) -> int:
    """How many values of a channel the batch's moments are taken over."""
    count = layout.count(x)
    if moments is not None:
        checks.known(moments, x)
    if count == 1 and not shared:
        raise ValueError(
            f"x: expected more than 1 value per channel when training, got input size {tuple(x.shape)}; "
            "use a larger batch, or training=False"
        )
    return count
