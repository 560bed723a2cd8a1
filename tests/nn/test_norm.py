"""batch_norm_relu against relu(norm(x)), for everything that nn.BatchNorm2d can be set to."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rkfast import dispatch
from rkfast.nn import batch_norm_relu
from rkfast.nn.norm import fusible, reads_moments
from rkfast.ops import channel_moments
from tests.ops.tester import assert_as_good_as


def frozen(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    return norm.eval()


def without_counter(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.num_batches_tracked = None
    return norm


def untracked_later(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    norm.track_running_stats = False
    return norm


MODES: dict[str, Callable[[], nn.BatchNorm2d]] = {
    "default": lambda: nn.BatchNorm2d(5),
    "eval": lambda: frozen(nn.BatchNorm2d(5)),
    "no affine": lambda: nn.BatchNorm2d(5, affine=False),
    "no affine, eval": lambda: frozen(nn.BatchNorm2d(5, affine=False)),
    "no running statistics": lambda: nn.BatchNorm2d(5, track_running_stats=False),
    "no running statistics, eval": lambda: frozen(nn.BatchNorm2d(5, track_running_stats=False)),
    "cumulative": lambda: nn.BatchNorm2d(5, momentum=None),
    "cumulative, no counter": lambda: without_counter(nn.BatchNorm2d(5, momentum=None)),
    "no counter": lambda: without_counter(nn.BatchNorm2d(5)),
    "tracking switched off": lambda: untracked_later(nn.BatchNorm2d(5)),
    "tracking switched off, eval": lambda: frozen(untracked_later(nn.BatchNorm2d(5))),
    "eps and momentum": lambda: nn.BatchNorm2d(5, eps=0.3, momentum=0.7),
}


def filled(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_mean):
            if t is not None:
                t.normal_()
        if norm.running_var is not None:
            norm.running_var.uniform_(0.5, 2)
    return norm


def three_calls(norm: nn.Module, x: Tensor, how: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, Tensor]:
    """Everything that three calls leave behind: two forwards before their backwards, and one more."""
    x = x.clone().requires_grad_()
    outs = [how(norm, x), how(norm, 2 * x + 1)]
    (outs[0] * outs[1]).sum().backward()
    outs.append(how(norm, x - 1))
    assert x.grad is not None
    found = {f"out{i}": out.detach() for i, out in enumerate(outs)} | {"x.grad": x.grad}
    found |= {f"{name}.grad": p.grad for name, p in norm.named_parameters() if p.grad is not None}
    return found | {name: b for name, b in norm.named_buffers() if b is not None}


@pytest.mark.parametrize("known", (False, True), ids=("", "moments"))
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode: str, known: bool) -> None:
    norm = filled(MODES[mode]())
    x = torch.randn(4, 5, 6, 7) + 3
    assert fusible(norm)

    def fused(norm: nn.Module, x: Tensor) -> Tensor:
        return batch_norm_relu(norm, x, channel_moments(x) if known else None)

    def stock(norm: nn.Module, x: Tensor) -> Tensor:
        return torch.relu(norm(x))

    before = sum(count for (op, _), count in dispatch.served().items() if op == "bn_rk_sum")
    ours = three_calls(copy.deepcopy(norm), x, fused)
    assert sum(count for (op, _), count in dispatch.served().items() if op == "bn_rk_sum") == before + 3
    eager = three_calls(copy.deepcopy(norm), x, stock)
    truth = three_calls(copy.deepcopy(norm).double(), x.double(), stock)
    assert ours.keys() == truth.keys()
    for name, expected in truth.items():
        if expected.is_floating_point():
            assert_as_good_as(ours[name], eager[name], expected, name)
        else:
            assert torch.equal(ours[name], expected), name


def test_reads_moments() -> None:
    for mode in MODES:
        batch_statistics = "eval" not in mode or mode == "no running statistics, eval"
        assert reads_moments(MODES[mode]()) == batch_statistics, mode


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "norm",
    (Doubled(5), nn.Identity(), nn.InstanceNorm2d(5), nn.GroupNorm(1, 5)),
    ids=lambda norm: type(norm).__name__,
)
def test_other_modules_take_the_stock_path(norm: nn.Module) -> None:
    x = torch.randn(4, 5, 6, 7)
    kept = x.clone()
    moments = channel_moments(x)
    before = dispatch.served()
    assert not fusible(norm)
    assert torch.equal(batch_norm_relu(norm, x, moments), torch.relu(norm(x)))
    assert torch.equal(x, kept)
    assert dispatch.served() == before


def test_hooks_run() -> None:
    norm, x, seen = nn.BatchNorm2d(5), torch.randn(4, 5, 6, 7, requires_grad=True), []
    for register in (
        norm.register_forward_hook,
        norm.register_forward_pre_hook,
        norm.register_full_backward_hook,
        norm.register_full_backward_pre_hook,
    ):
        handle = register(lambda *_: seen.append(1))
        assert not fusible(norm)
        batch_norm_relu(norm, x).sum().backward()
        handle.remove()
        assert len(seen) == 1, register
        seen.clear()
    assert fusible(norm)


def test_what_batch_norm_2d_refuses_is_refused() -> None:
    """An unbatched [C, H, W] would pass for [N, C, L]."""
    norm, x = nn.BatchNorm2d(5), torch.randn(5, 5, 6)
    with pytest.raises(ValueError, match="expected 4D input"):
        batch_norm_relu(norm, x)
    assert norm.num_batches_tracked == 0
