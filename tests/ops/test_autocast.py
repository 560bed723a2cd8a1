from __future__ import annotations

import pytest
import torch

from rkfast.ops import autocast


def test_is_what_casting_one_by_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, strides and gradients; some of which are not needed, and one of which is expanded."""
    torch.manual_seed(0)
    shapes = ((8, 4, 3, 3), (8, 4, 1, 1), (2, 3, 1, 1))
    weights = [torch.randn(s).contiguous(memory_format=torch.channels_last).requires_grad_() for s in shapes]
    weights[1].requires_grad_(False)
    calls: list[int] = []
    copies = autocast._copies
    monkeypatch.setattr(autocast, "_at_once", lambda *_: True)
    monkeypatch.setattr(autocast, "_copies", lambda *args: calls.append(len(args[0])) or copies(*args))
    found = autocast.cast(weights, torch.bfloat16)
    assert calls == [3]
    for made, weight in zip(found, weights, strict=True):
        right = weight.to(torch.bfloat16)
        assert made.stride() == right.stride() and made.requires_grad == any(w.requires_grad for w in weights)
        torch.testing.assert_close(made, right, rtol=0, atol=0)
    (3 * found[0].sum() + (found[2] * found[2]).sum()).backward()
    assert calls == [3, 2]
    assert weights[1].grad is None
    for weight, right in ((weights[0], torch.full_like(weights[0], 3)), (weights[2], 2 * weights[2])):
        assert weight.grad is not None and weight.grad.dtype == torch.float32
        torch.testing.assert_close(weight.grad, right.detach(), rtol=1e-2, atol=0)


def test_one_by_one_elsewhere() -> None:
    weights = [torch.randn(2, 2, requires_grad=True) for _ in range(2)]
    for made in autocast.cast(weights, torch.bfloat16):
        assert "ToCopy" in made.grad_fn.name()
