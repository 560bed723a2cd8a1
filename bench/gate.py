"""The gate in front of every figure: results and gradients against fp64, beside eager's own error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .workload import Case, Function, Inputs

# So many eps beside a kink, of the largest value, the ReLU of either side may flip; no gradient arrives there.
KINK = 8
ROUNDINGS = 2  # a rounding is half an eps


class Verdict(NamedTuple):
    ours: float  # largest error of any tensor, relative to its largest value
    eager: float
    failure: str | None


class Results(NamedTuple):
    outputs: list[Tensor]
    gradients: list[Tensor]
    buffers: list[Tensor]


def compute(function: Function, inputs: Inputs, seed: Tensor | None) -> Results:
    """Everything a computation gives back; its inputs keep their strides, its buffers are copies."""
    own = inputs.map(Tensor.detach, torch.clone)
    wanted = [*own.activations, *own.vectors]
    if seed is not None:
        for t in wanted:
            t.requires_grad_()
    outputs = function(*own)
    gradients = [] if seed is None else list(torch.autograd.grad(outputs[0], wanted, seed))
    return Results([t.detach() for t in outputs], gradients, own.buffers)


def error(found: Tensor, truth: Tensor, rms: bool = False) -> float:
    """Largest difference relative to the largest value, or the same of root mean squares; NaN where only one side is
    NaN or infinite."""
    if found.shape != truth.shape:
        return float("nan")
    if rms:
        size = truth.square().mean().sqrt().item()
        gap = (found.to(truth.dtype) - truth).square().mean().sqrt().item()
        return gap / size if size else gap
    scale = truth.abs().max().item() if truth.numel() else 0.0
    difference = (found.to(truth.dtype) - truth).abs().max().item() if truth.numel() else 0.0
    return difference / scale if scale else difference


def compare(ours: Results, theirs: Results, truth: Results, rms: bool = False) -> Verdict:
    """Ours pass where no tensor's error exceeds twice theirs plus ROUNDINGS of its dtype. With ``rms``, where ReLUs
    within may flip and which tensor that moves is a matter of luck, of each kind the mean and the largest error."""
    worst_ours = worst_theirs = 0.0
    failure = None
    for kind, found, expected, reference in zip(Results._fields, ours, theirs, truth, strict=True):
        if len(found) != len(reference):
            return Verdict(float("nan"), float("nan"), f"{kind}: {len(found)} tensors instead of {len(reference)}")
        errors = [
            (error(a, t, rms), error(b, t, rms), ROUNDINGS * torch.finfo(a.dtype).eps / 2)
            for a, b, t in zip(found, expected, reference, strict=True)
        ]
        named: dict[str, tuple[float, ...]] = {f"{kind}[{i}]": each for i, each in enumerate(errors)}
        if rms and errors:
            columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*errors, strict=True)]  # NaN stays
            named = {
                f"{kind}, their mean": tuple(column.mean().item() for column in columns),
                f"{kind}, the worst": tuple(column.max().item() for column in columns),
            }
        for name, (our_error, their_error, rounding) in named.items():
            worst_ours, worst_theirs = max(worst_ours, our_error), max(worst_theirs, their_error)
            allowed = 2 * their_error + rounding
            if not our_error <= allowed and failure is None:  # a NaN fails
                failure = f"{name}: error {our_error:.2e} where {allowed:.2e} is allowed"
    return Verdict(worst_ours, worst_theirs, failure)


def check(case: Case, inputs: Inputs, seed: Tensor) -> Verdict:
    """Compare the case's op and its eager expression with the expression in fp64."""
    workload = case.workload
    peers = workload.peers()
    eager = peers.get("add_alpha", peers["eager"])  # the one that rounds less
    wide = inputs.map(Tensor.double, Tensor.double)
    eps = torch.finfo(case.dtype).eps
    given: Tensor | None = None
    if workload.differentiable:
        given = seed
        if workload.relu:
            with torch.no_grad():
                before = workload.before_relu()(*wide.map(torch.clone, torch.clone))[0]
            given = torch.where(before.abs() > KINK * eps * before.abs().max(), seed, torch.zeros_like(seed))
    truth = compute(eager, wide, None if given is None else given.double())
    theirs = compute(eager, inputs, given)
    ours = compute(workload.ours, inputs, given)
    return compare(ours, theirs, truth, workload.rms)
