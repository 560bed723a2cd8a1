from __future__ import annotations

import numpy as np
import pytest
import torch

from rkfast import dispatch, ops
from tests.ops.tester import DTYPES, LARGE, LAYOUTS, SHAPES, lay


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean_over_deviation", (0.0, 1e3))
def test_against_float64(dtype: torch.dtype, how: str, mean_over_deviation: float, target: tuple[str, str]) -> None:
    backend, device = target
    for shape in (*SHAPES, LARGE) if target != ("triton", "cpu") else SHAPES:
        x = lay((torch.randn(shape, dtype=torch.float64) + mean_over_deviation).to(dtype), how, 0, device)
        served = dispatch.served()
        with dispatch.use(backend):
            mean, var, count = ops.channel_moments(x)
        assert dispatch.served()["channel_moments", backend] == served["channel_moments", backend] + 1
        assert count == x.numel() // shape[1]
        if x.numel() == 0:
            assert not mean.any() and not var.any()
            continue
        exact = x.double().cpu().movedim(1, 0).flatten(1).numpy().astype(np.longdouble)  # [C, N * P]
        exact_mean = exact.mean(1, keepdims=True)
        want_mean = torch.from_numpy(exact_mean[:, 0].astype(np.float64)).to(device)
        want_var = torch.from_numpy(np.square(exact - exact_mean).mean(1).astype(np.float64)).to(device)
        eps = torch.finfo(mean.dtype).eps
        scale = x.double().abs().max()
        if backend == "reference" and dtype == torch.float64:  # torch.var_mean itself, in a dtype with nothing wider
            torch.testing.assert_close(mean, want_mean)
            torch.testing.assert_close(var, want_var)
            continue
        merges = 16 if dtype == torch.float64 else 2  # roundings of the mean: nothing wider holds it in float64
        assert (mean.double() - want_mean).abs().max() <= merges * eps * scale
        # The mean's rounding shifts the variance by its square; the deviations themselves are exact to a few roundings.
        slack = 8 * eps * want_var.max() + (2 * eps * scale) ** 2
        if dtype == torch.float64:
            # Nothing wider holds the sums and the mean: Welford's bound, count roundings times the condition number,
            # for roundings that go either way.
            slack += count**0.5 * eps * scale * want_var.max().sqrt()
        assert (var.double() - want_var).abs().max() <= slack


def test_never_negative_and_zero_for_a_constant(target: tuple[str, str]) -> None:
    backend, device = target
    for value in (0.1, 1e-20, 1e4, 3e18):
        x = torch.full((4, 6, 9, 7), value, device=device)
        with dispatch.use(backend):
            mean, var, _ = ops.channel_moments(x)
        torch.testing.assert_close(mean, x[0, :, 0, 0], rtol=1e-6, atol=0)
        assert (var >= 0).all() and (var <= (1e-6 * value) ** 2).all()


def test_drifting_mean(target: tuple[str, str]) -> None:
    """Each sample around a mean of its own, far apart: where a provisional center would cancel."""
    backend, device = target
    x = torch.randn(6, 5, 16, 16) + 1000 * torch.arange(6.0).view(-1, 1, 1, 1)
    for how in ("contiguous", "channels_last"):
        laid = lay(x, how, 0, device)
        with dispatch.use(backend):
            mean, var, _ = ops.channel_moments(laid)
        want_var, want_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(mean.double().cpu(), want_mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(var.double().cpu(), want_var, rtol=2e-6, atol=0)


def test_bad_input_is_named() -> None:
    for x, kind in ((None, TypeError), (torch.ones(2, 3, dtype=torch.int32), TypeError), (torch.ones(3), ValueError)):
        with pytest.raises(kind, match="x: "):
            ops.channel_moments(x)  # type: ignore[arg-type]
