"""clique_block beside its formula written out with torch.cat, both against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rkfast import dispatch, ops
from rkfast.ops import Norm, Stages, clique_block
from tests.ops.test_dense_block import SERVED as SERVED
from tests.ops.test_dense_block import Target, relu_norm
from tests.ops.tester import assert_as_good_as, assert_gradients_as_good_as

C = K = 5
S = 4
CASES: dict[str, dict[str, Any]] = {
    "irk": {},
    "irk_neck": {"neck": 7},
    "irk_rounds": {"neck": 7, "rounds": 3},
    "cliquenet": {"sum": False, "inputs": 6},
    "rkcnn_i": {"neck": 10, "read_input": True},
    "rkcnn_i_rounds": {"neck": 10, "read_input": True, "rounds": 2},
    "rkcnn_r": {"neck": 10, "read_input": True, "newest": False},
    "r_without_input": {"newest": False},
    "min": {"neck": 7, "memory": "min"},
    "two_stages": {"neck": 7, "stages": 2},
    "frozen": {"neck": 7, "frozen": True},
}


class Block:
    """Separate weights for the update; sharing is tested with the modules."""

    def __init__(
        self, neck: int | None = None, stages: int = S, inputs: int = C, frozen: bool = False, **options: Any
    ) -> None:
        self.options = options
        self.inputs, self.stages, self.frozen = inputs, stages, frozen
        others = (stages - 1) * K + (inputs if options.get("read_input") else 0)
        self.init = self._stages([inputs + i * K for i in range(stages)], neck)
        self.update = self._stages([others] * stages, neck)

    def _stages(self, widths: list[int], neck: int | None) -> Stages:
        def weight(*shape: int) -> Tensor:
            return 0.2 * torch.randn(*shape, dtype=torch.float64)

        if neck is None:
            return Stages([weight(K, c, 3, 3) for c in widths], [self._norm(c, i) for i, c in enumerate(widths)])
        return Stages(
            [weight(neck, c, 1, 1) for c in widths],
            [self._norm(c, i) for i, c in enumerate(widths)],
            [weight(K, neck, 3, 3) for _ in widths],
            [self._norm(neck, i + 1) for i, _ in enumerate(widths)],
        )

    def _norm(self, c: int, i: int) -> Norm:
        draws = [torch.randn(c, dtype=torch.float64) for _ in range(3)]
        running = (0.1 * draws[2], 0.5 + torch.rand(c).double(), torch.tensor(0))
        return Norm(1 + 0.3 * draws[0], 0.3 * draws[1], *running, not (self.frozen and i % 2), 0.1, (1e-5, 0.1)[i % 2])

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Block:
        def cast(v: Any) -> Any:
            if isinstance(v, Tensor):
                return v.to(device, dtype, copy=True) if v.is_floating_point() else v.to(device, copy=True)
            if isinstance(v, Norm):
                return Norm(*(cast(t) for t in v[:5]), *v[5:])
            return [cast(t) for t in v] if isinstance(v, (list, tuple)) else v

        other = object.__new__(Block)
        other.__dict__.update(self.__dict__)
        other.init, other.update = Stages(*cast(list(self.init))), Stages(*cast(list(self.update)))
        return other

    def parameters(self) -> list[Tensor]:
        return [
            t
            for stages in (self.init, self.update)
            for t in (*stages.conv1, *stages.conv2, *(v for n in (*stages.norm1, *stages.norm2) for v in n[:2]))
        ]

    def buffers(self) -> list[Tensor]:
        return [v for stages in (self.init, self.update) for n in (*stages.norm1, *stages.norm2) for v in n[2:5]]

    def ours(self, y: Tensor) -> Tensor:
        return clique_block(y, self.init, self.update, **self.options)

    def plain(self, y: Tensor) -> Tensor:
        def unit(x: Tensor, stages: Stages, i: int) -> Tensor:
            h = F.conv2d(relu_norm(x, stages.norm1[i]), stages.conv1[i], padding=stages.conv1[i].shape[2] // 2)
            return F.conv2d(relu_norm(h, stages.norm2[i]), stages.conv2[i], padding=1) if stages.conv2 else h

        newest: list[Tensor] = []
        for i in range(self.stages):
            newest.append(unit(torch.cat([y, *newest], 1), self.init, i))
        for _ in range(self.options.get("rounds", 1)):
            before = list(newest)
            for i in range(self.stages):
                read = newest if self.options.get("newest", True) else before
                others = [*read[:i], *read[i + 1 :]]
                x = torch.cat([y, *others] if self.options.get("read_input") else others, 1)
                newest[i] = unit(x, self.update, i)
        return y + sum(newest) if self.options.get("sum", True) else torch.cat(newest, 1)


def outcome(block: Block, run: str, y: Tensor, grad: Tensor) -> dict[str, Tensor]:
    y = y.detach().requires_grad_()
    parameters = [p.requires_grad_() for p in block.parameters()]
    out = getattr(block, run)(y)
    gradients = torch.autograd.grad(out, [y, *parameters], grad.to(out.dtype))
    found = {"out": out.detach()}
    found.update({f"gradient {i}": d for i, d in enumerate(gradients)})
    found.update({f"buffer {i}": b for i, b in enumerate(block.buffers())})
    return found


@pytest.mark.parametrize("name", CASES)
def test_against_float64(name: str, target: Target) -> None:
    torch.manual_seed(0)
    block = Block(**CASES[name])
    y = torch.randn(3, block.inputs, 6, 5, dtype=torch.float64)
    channels = C if block.options.get("sum", True) else block.stages * K
    grad = torch.randn(3, channels, 6, 5, dtype=torch.float64)
    backend, device = target
    rows, grad = y.to(device, torch.float32).contiguous(memory_format=torch.channels_last), grad.to(device)
    truth = outcome(block.to(torch.float64, device), "plain", rows.double(), grad)
    eager = outcome(block.to(torch.float32, device), "plain", rows, grad)
    with dispatch.use(backend):
        served = dispatch.served()
        found = outcome(block.to(torch.float32, device), "ours", rows, grad)
        # The same kernels as those of a dense block.
        assert dispatch.served()["dense_block", backend] == served["dense_block", backend] + 1
        assert dispatch.served()["dense_block_backward", backend] == served["dense_block_backward", backend] + 1
    gradients = [key for key in found if key.startswith("gradient")]
    assert_gradients_as_good_as(*({key: d[key] for key in gradients} for d in (found, eager, truth)))
    for key in found.keys() - set(gradients):
        if found[key].is_floating_point():
            assert_as_good_as(found[key], eager[key], truth[key], key)
        else:
            assert torch.equal(found[key], truth[key]), key


@pytest.mark.parametrize("case", ("irk", "rkcnn_i", "cliquenet"))
def test_gradcheck(case: str) -> None:
    torch.manual_seed(1)
    block = Block(**{**CASES[case], "stages": 3})
    y = torch.randn(2, block.inputs, 3, 2, dtype=torch.float64, requires_grad=True)
    parameters = [p.requires_grad_() for p in block.parameters()]
    assert torch.autograd.gradcheck(lambda y, *_: block.ours(y), (y, *parameters), fast_mode=True)


def test_no_concatenation_is_kept() -> None:
    """For the backward the buffer is kept once, and nothing normalised."""
    block = Block(neck=7).to(torch.float32)
    y = torch.randn(2, C, 16, 16, requires_grad=True)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        block.ours(y)
    positions = 2 * 16 * 16
    small = 8 * sum(p.numel() for p in (*block.parameters(), *block.buffers()))
    assert sum(sizes) <= positions * (C + 2 * S * K + 2 * S * 7) + small


def test_moments() -> None:
    torch.manual_seed(2)
    for case in ("irk", "cliquenet"):
        block = Block(**CASES[case]).to(torch.float32)
        y = torch.randn(2, block.inputs, 6, 5)
        out, moments = clique_block(y, block.init, block.update, return_moments=True, **block.options)
        torch.testing.assert_close(moments, ops.channel_moments(out))


@pytest.mark.parametrize(
    ("options", "change", "message"),
    (
        ({"stages": 1}, {}, "init: expected at least 2 stages, which update each other, got 1"),
        ({}, {"rounds": 0}, "rounds: expected at least 1, got 0"),
        ({}, {"rounds": 2, "newest": False}, "rounds: newest=False reads three ranges"),
        ({"inputs": 6}, {}, "sum: adds stages of 5 channels to y, which has 6; expected as many"),
        ({}, {"read_input": True}, r"conv1\[4\]: expected \[k, 20, n, n\], got \[5, 15, 3, 3\]"),
        ({}, {"memory": "all"}, "memory: expected one of speed, min"),
    ),
)
def test_bad_input(options: dict[str, Any], change: dict[str, Any], message: str) -> None:
    block = Block(**options).to(torch.float32)
    before = [b.clone() for b in block.buffers()]
    with pytest.raises(ValueError, match=message):
        clique_block(torch.randn(2, block.inputs, 4, 4), block.init, block.update, **change)
    assert all(torch.equal(a, b) for a, b in zip(block.buffers(), before, strict=True))
    if not options and not change.get("rounds"):
        with pytest.raises(ValueError, match=r"update.conv1: expected 4, as many as stages in init, got 3"):
            clique_block(torch.randn(2, C, 4, 4), block.init, block.update._replace(conv1=block.update.conv1[1:]))
