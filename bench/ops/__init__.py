"""The ops: cases, one file per op, and who takes part in them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rkfast import dispatch

from .. import contest, gate
from ..contest import COMPILE, Contender, Contest, Suite, forced
from ..workload import Case, Function, Inputs, arranged, dense
from . import bn_relu_conv, bn_relu_pool, bn_rk_sum, channel_moments, conv, dense_block, residual_block, rk_sum

OPS: dict[str, Callable[[str, str], Iterator[Case]]] = {
    "rk_sum": rk_sum.cases,
    "bn_rk_sum": bn_rk_sum.cases,
    "channel_moments": channel_moments.cases,
    "dense_block": dense_block.cases,
    "bn_relu_conv": bn_relu_conv.cases,
    "bn_relu_pool": bn_relu_pool.cases,
    "conv": conv.cases,
    "residual_block": residual_block.cases,
}
PEERS = (
    *("eager", "eager_channels_last", "add_alpha", "in_place", "compile"),
    *("compile_max_autotune", "compile_cuda_graphs"),
)


class Call(Contender):
    """A function and the tensors it is called with."""

    def __init__(self, function: Function, inputs: Inputs, seed: Tensor | None, backend: str = "auto") -> None:
        self.function, self.backend = function, backend
        self.plain = inputs
        self.seed = seed
        self.inputs = Inputs(_leaves(inputs.activations), _leaves(inputs.vectors), inputs.buffers)
        self.parameters = self.inputs.vectors
        self.wanted = [*self.inputs.activations, *self.inputs.vectors]

    def forward(self) -> Any:
        with torch.no_grad():
            return self.function(*self.plain)

    def forward_grad(self) -> Any:
        return self.function(*self.inputs)

    def backward(self, outputs: Any) -> Any:
        return torch.autograd.grad(outputs[0], self.wanted, self.seed)


def _leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


class Calls:
    """An op of ours beside the functions of its workload."""

    def __init__(self, case: Case, contest: Contest) -> None:
        self.case, self.contest = case, contest
        self.drawn, self.seed = case.draw(contest.device), case.seed(contest.device)
        self.given = arranged(self.drawn, case.channels_last)

    def ours(self) -> Iterator[tuple[str, gate.Verdict, Contender]]:
        case, given, seed = self.case, self.given, dense(self.seed, self.case.channels_last)
        for backend in contest.serving(self.contest.backends, case.op):
            try:
                with forced(backend):
                    verdict = gate.check(case, given, seed)
            except Exception as error:
                verdict = contest.raised(error)
            served = dispatch.OPS[case.op].last
            name = served.backend if served is not None and backend == "auto" else backend
            yield name, verdict, Call(case.workload.ours, given, seed, backend)

    def peers(self) -> Iterator[tuple[str, Callable[[], Contender]]]:
        functions = self.case.workload.peers()
        for name in self.contest.peers:
            if name in COMPILE:
                yield name, functools.partial(self._compiled, functions["eager"], name)
            elif name == "eager_channels_last":
                yield name, functools.partial(self._call, functions["eager"], True)
            elif name in functions:
                channels_last = self.case.channels_last and name != "eager"
                yield name, functools.partial(self._call, functions[name], channels_last)

    def _call(self, function: Function, channels_last: bool) -> Call:
        # Each has its own tensors, but for layout those of ours.
        return Call(function, arranged(self.drawn, channels_last), dense(self.seed, channels_last).clone())

    def _compiled(self, eager: Function, name: str) -> Call:
        own = self.given.map(torch.clone, torch.clone)
        call = Call(eager, own, dense(self.seed, self.case.channels_last).clone())
        call.function = torch.compile(eager, mode=COMPILE[name], dynamic=False)
        call.compiled = True
        if name == "compile_cuda_graphs":  # a graph otherwise copies its inputs at every call
            for t in (*own.activations, *own.vectors, *own.buffers, *call.wanted):
                torch._dynamo.mark_static_address(t)
        return call


SUITE = Suite(
    kind="op",
    cases=OPS,
    field=Calls,
    backends=contest.backends,
    peers={"cpu": PEERS[:-2], "cuda": (*PEERS[:-2], "compile_cuda_graphs")},
    known_peers=PEERS,
)
