"""Controllers against the paper's equations written out, their parameters, and what they are put through."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from rkfast.nn.controller import CONTROLLERS, Controller, FCController, LSTMController, OneBiasLSTM, averaged, features
from tests.ops.tester import assert_as_good_as

L, C, R = 4, 16, 4


def blocks(dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Of L basic blocks with C channels, the first of which halves the resolution."""
    torch.manual_seed(0)
    inputs = [C // 2] + [C] * (L - 1)
    shapes = [((C, c, 3, 3), (C, C, 3, 3)) for c in inputs]
    return [[torch.randn(shape, dtype=dtype).requires_grad_() for shape in convs] for convs in shapes]


def made(name: str) -> Any:
    torch.manual_seed(1)
    needed: tuple[int, ...] = (features(blocks()[0]), R) if name in ("lstm", "2fc") else ()
    controller = CONTROLLERS[name](L, C, *needed)
    with torch.no_grad():
        for p in controller.parameters():
            p.normal_(0, 0.5)
    return controller


def lstm_of_the_paper(controller: LSTMController, weights: list[list[Tensor]]) -> Tensor:
    w_ih, w_hh, bias = controller.lstm.weight_ih_l0, controller.lstm.weight_hh_l0, controller.lstm.bias_ih_l0
    h = c = bias.new_zeros(C // R)
    steps = []
    for convs in weights:
        w = torch.cat([conv.mean(1).flatten() for conv in convs])
        x = torch.relu(controller.input.weight @ w + controller.input.bias)
        i, f, g, o = (w_ih @ x + w_hh @ h + bias).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        steps.append(torch.sigmoid(controller.output.weight @ h + controller.output.bias))
    return torch.stack(steps)


def fc_of_the_paper(controller: FCController, weights: list[list[Tensor]]) -> Tensor:
    steps = []
    for d, convs in enumerate(weights):
        w = torch.cat([conv.mean(1).flatten() for conv in convs])
        x = torch.relu(w @ controller.weight_in[d] + controller.bias_in[d, 0])
        steps.append(torch.sigmoid(x @ controller.weight_out[d] + controller.bias_out[d, 0]))
    return torch.stack(steps)


@pytest.mark.parametrize(("name", "paper"), (("lstm", lstm_of_the_paper), ("2fc", fc_of_the_paper)))
def test_equations(name: str, paper: Any) -> None:
    """Values and gradients, down to the convolutions' weights."""
    controller = made(name)
    truth = copy.deepcopy(controller).double()
    found = []
    for run, c, dtype in (
        (controller.__call__, controller, torch.float32),
        (lambda w: paper(controller, w), controller, torch.float32),
        (lambda w: paper(truth, w), truth, torch.float64),
    ):
        weights = [[w.detach().to(dtype).requires_grad_() for w in convs] for convs in blocks()]
        c.zero_grad()
        steps = run(weights)
        (steps * torch.arange(steps.numel()).view_as(steps)).sum().backward()
        found.append([steps.detach(), *(w.grad for convs in weights for w in convs), *(p.grad for p in c.parameters())])
        found[-1] = [t.clone() for t in found[-1]]
    for ours, eager, exact in zip(*found, strict=True):
        assert_as_good_as(ours, eager, exact, name)


def test_parameters() -> None:
    """Yang et al., Table 3: what the controllers add to ResNet-18/34 and to ResNet-50/101."""

    def added(channels: int, read: float, reduction: int) -> int:
        controller = LSTMController(2, channels, int(read * channels), reduction)
        return sum(p.numel() for p in controller.parameters())

    assert sum(added(c, 18, 4) for c in (64, 128, 256, 512)) == 1_830_000
    assert sum(added(c, 1.25, 8) for c in (256, 512, 1024, 2048)) == 2_269_280
    assert sum(added(c, 18, 4) for c in (16, 32, 64)) == 28_476
    two = sum(
        p.numel()
        for blocks, c in ((3, 256), (4, 512), (6, 1024), (3, 2048))
        for p in FCController(blocks, c, c + c // 4, 8).parameters()
    )
    # The rule that the paper states; its table has 0.35 million more.
    assert two == 5_675_616


@pytest.mark.parametrize("name", CONTROLLERS)
def test_what_it_is_put_through(name: str) -> None:
    """Copies, pickles, autocast, other dtypes, compilation in one graph."""
    controller: Controller = made(name)
    steps = controller(blocks())
    assert steps.shape == (L, C)
    for twin in (copy.deepcopy(controller), pickle.loads(pickle.dumps(controller))):
        assert torch.equal(twin(blocks()), steps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(controller(blocks()), steps)
    compiled = torch.compile(controller, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(blocks()), steps)
    assert copy.deepcopy(controller).bfloat16()(blocks(torch.bfloat16)).dtype == torch.bfloat16
    start = controller.start_at()
    assert torch.equal(controller(blocks()), torch.full((L, C), start))


def test_second_bias_stays_zero() -> None:
    lstm = OneBiasLSTM(3)
    lstm.reset_parameters()
    assert "bias_hh_l0" not in lstm.state_dict() and "bias_hh_l0" not in dict(lstm.named_parameters())
    assert lstm.double().bias_hh_l0.eq(0).all() and lstm.bias_hh_l0.dtype == torch.float64


def test_few_launches() -> None:
    """However many blocks: two for each run of convolutions of one shape."""
    weights = blocks()
    with torch.profiler.profile() as profile:
        averaged(weights, torch.float32)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::sum"] == 3


def test_large_and_small_weights_are_averaged_alike() -> None:
    """Over their input channels, one by one or together."""
    for channels in (8, 1024):
        blocks = [[torch.randn(6, channels, 3, 3), torch.randn(80, channels, 1, 1)] for _ in range(3)]
        expected = torch.stack([torch.cat([weight.mean(1).flatten() for weight in block]) for block in blocks])
        torch.testing.assert_close(averaged(blocks, torch.float32), expected)
