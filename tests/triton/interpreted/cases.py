"""Each launcher of the Triton backend against the reference of its op, in Triton's interpreter.

Run by tests/triton/test_interpreter.py, in a process of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rkfast
from rkfast import dispatch, ops
from rkfast.ops import kernels, launches, layout
from rkfast.ops import products as fused_products
from rkfast.ops.bn_rk_sum import reference as bn_reference
from rkfast.ops.bn_rk_sum import triton as bn_triton
from rkfast.ops.channel_moments import reference as moments_reference
from rkfast.ops.channel_moments import triton as moments_triton
from rkfast.ops.dense_block import triton as dense_block
from rkfast.ops.rk_sum import reference, triton
from tests import test_distributed
from tests.ops import test_bn_relu_conv, test_bn_relu_pool, test_clique_block, test_dense_block, test_residual_block
from tests.ops.tester import DTYPES, assert_as_good_as, lay

LAYOUTS = ("contiguous", "channels_last", "slice", "channels_last_slice")


def pairs(names: Iterable[str]) -> list[tuple[str, torch.dtype, str]]:
    """Each name with each dtype and each layout, and each of these with each other, if not all three."""
    return [(n, d, LAYOUTS[(i + k) % 4]) for i, n in enumerate(names) for k, d in enumerate(DTYPES)]


def in_turn(names: Iterable[str]) -> list[tuple[str, torch.dtype, str]]:
    """Each name once, by kernels that other tests ask in every dtype and layout."""
    return [(n, DTYPES[i % 4], LAYOUTS[1 + 2 * (i // 4 % 2)]) for i, n in enumerate(names)]


SHAPES = (
    (2, 5, 3, 7),
    (3, 20, 4, 4),  # whole samples are rows, and their masks whole bytes
    (2, 2, 270),  # one row takes several tiles
    (11, 3, 2, 2),
    (2, 70, 1, 3),
    (5, 7),
    (2, 1, 3, 3, 2),
    (1, 9, 1, 1),
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=("one program", "many programs"))
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tensors in many tiles: all of them in one program's loop, or each in a program of its own."""
    monkeypatch.setattr(kernels, "WARPS", 1)
    monkeypatch.setattr(kernels, "PROGRAMS", 1 if request.param == "one program" else 1 << 20)
    monkeypatch.setattr(kernels, "PARTIAL_ROWS", (2, 2))  # and so for their partial results
    monkeypatch.setattr(kernels, "MOST_PARTIAL", 4)
    kernels._tiling.cache_clear()
    yield
    kernels._tiling.cache_clear()


def double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [double(v) for v in value] if isinstance(value, list) else value


def absolute(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.abs()
    if isinstance(value, list):
        return [absolute(v) for v in value]
    return abs(value) if type(value) is float else value


def assert_moments(mean: Tensor, var: Tensor, x: Tensor) -> None:
    """They are those of x as stored, to a few roundings."""
    assert mean.dtype == var.dtype == moments_reference.moments_dtype(x.dtype)
    x = x.double().movedim(1, 0).flatten(1)
    center = x.mean(1, keepdim=True)
    far = (x - x[:, :1]).abs().mean(1)  # what is added up are distances from the first values
    x = x - center  # so that the truth holds for doubles too
    true_var, offset = torch.var_mean(x, 1, correction=0)
    true_mean = center[:, 0] + offset
    eps = torch.finfo(mean.dtype).eps
    size = true_mean.abs() + true_var.sqrt() + far
    assert ((mean - true_mean).abs() <= 4 * eps * size).all(), ((mean - true_mean) / size / eps).abs().max()
    # A variance is as sensitive as this to a rounding of the mean's size.
    slack = 32 * eps * true_var + 4 * eps * size * true_var.sqrt() + (4 * eps * size) ** 2
    assert ((var - true_var).abs() <= slack).all(), ((var - true_var) / slack).abs().max()


def assert_sum(found: Tensor, truth: Tensor, magnitude: Tensor) -> None:
    """A sum of terms whose absolute values sum up to magnitude, each of a few operations."""
    assert found.shape == truth.shape
    bound = 4 * torch.finfo(found.dtype).eps * magnitude
    assert ((found - truth).abs() <= bound).all(), ((found - truth) / bound).abs().max()


def assert_mask(mask: Tensor, out: Tensor, channels_last: bool) -> None:
    assert torch.equal(mask, reference.pack(~(out <= 0), channels_last))


def buffer_around(x: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    """A buffer of NaN with two channels more, and the slot in it for something like x."""
    n, c, *spatial = x.shape
    shape = (n, c + 2, *spatial)
    buffer = torch.empty_strided(shape, layout.strides(shape, channels_last), dtype=x.dtype).fill_(float("nan"))
    return buffer, buffer[:, 1 : c + 1]


RK_SUMS: dict[str, dict[str, Any]] = {
    "one term": dict(coeffs=[0.3]),
    "terms": dict(coeffs=[1.0, 1 / 3, -0.7]),
    "relu": dict(coeffs=[1.0, -0.5], relu=True),
    "steps": dict(coeffs=[1.0, 1 / 3], steps="-c", relu=True, moments=True),
    "shift": dict(coeffs=[1.0, 0.5], shift=True, relu=True, moments=True),
    "gates": dict(coeffs=[0.1, -2.0, 0.7], steps="nc-", relu=True, moments=True),
    "moments": dict(coeffs=[1.0, 1.0], moments=True),
    "sixteen": dict(coeffs=[i / 7 - 1 for i in range(16)], steps="c" * 15 + "-", shift=True, moments=True),
}


def vectors_for(kinds: str, shape: tuple[int, ...]) -> list[Tensor | None]:
    sizes = {"-": None, "c": shape[1:2], "n": shape[:2]}
    return [None if size is None else torch.randn(size) for size in map(sizes.__getitem__, kinds)]


def rk_sum(name: str, dtype: torch.dtype, shape: tuple[int, ...], how: str) -> None:
    case = {"steps": "-" * 16, "shift": False, "relu": False, "moments": False, **RK_SUMS[name]}
    coeffs, relu, moments = case["coeffs"], case["relu"], case["moments"]
    channels_last = how.startswith("channels_last")
    terms = [lay(torch.randn(shape).to(dtype), how, i, "cpu") for i in range(len(coeffs))]
    steps = vectors_for(case["steps"][: len(coeffs)], shape)
    shift = torch.randn(shape[1]) if case["shift"] else None
    arguments = (terms, coeffs, steps, shift, channels_last, relu, moments, relu)
    out, *rest = triton.forward(*arguments)
    truth = reference.forward(*double(list(arguments)))
    eager = reference.forward(*arguments)
    assert out.stride() == eager[0].stride() and out.dtype == dtype
    assert_as_good_as(out, eager[0], truth[0], "out")
    if relu:
        assert_mask(rest.pop(0), out, channels_last)
    if moments:
        assert_moments(*rest, out)
    buffer, slot = buffer_around(out, channels_last)
    again = triton.forward(*arguments[:-1], False, slot)
    assert again[0] is slot and torch.equal(slot, out)
    assert torch.isnan(buffer[:, 0]).all() and torch.isnan(buffer[:, -1]).all()

    grad = lay(torch.randn(shape).to(dtype), how, 0, "cpu")
    stepped = [i for i, step in enumerate(steps) if step is not None]
    backward = (
        grad,
        reference.pack(torch.rand(shape) > 0.4, channels_last) if relu else None,
        coeffs,
        steps,
        [terms[i] for i in stepped],
        [coeffs[i] for i in stepped],
        [steps[i].dim() == 2 for i in stepped],  # type: ignore[union-attr]
        shift is not None,
        channels_last,
    )
    ours, same = triton.backward(*backward), reference.backward(*backward)
    true = reference.backward(*double(list(backward)))
    magnitudes = reference.backward(*absolute(double(list(backward))))
    assert [t.dtype for t in ours] == [t.dtype for t in same]
    for i in range(len(ours)):
        if i < len(coeffs):
            assert ours[i].stride() == same[i].stride()
            assert_as_good_as(ours[i], same[i], true[i], f"gradient of terms[{i}]")
        else:
            assert_sum(ours[i], true[i], magnitudes[i])


@pytest.mark.parametrize(("name", "dtype", "how"), pairs(RK_SUMS), ids=str)
def test_rk_sum(name: str, dtype: torch.dtype, how: str) -> None:
    rk_sum(name, dtype, (3, 20, 5, 7), how)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("how", ("contiguous", "channels_last_slice"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rk_sum_shapes(shape: tuple[int, ...], how: str) -> None:
    for name in ("relu", "gates"):
        rk_sum(name, torch.float32, shape, how)


BN_RK_SUMS: dict[str, dict[str, Any]] = {
    "plain": dict(),
    "relu": dict(relu=True, affine=True, moments=True),
    "join": dict(relu=True, affine=True, coeffs=[1.0], moments=True),
    "step": dict(affine=True, step="c", coeffs=[1.0, 1 / 3]),
    "gate": dict(affine=True, step="n", relu=True, coeffs=[0.5], moments=True),
    "gate and relu": dict(affine=True, step="n", relu=True),
    "frozen": dict(affine=True, step="c", relu=True, coeffs=[0.5], batch_stats=False),
    "frozen gate": dict(affine=True, step="n", relu=True, batch_stats=False),
}


def bn_rk_sum(name: str, dtype: torch.dtype, shape: tuple[int, ...], how: str) -> None:
    case = {"step": "-", "coeffs": [], "relu": False, "affine": False, "moments": False, "batch_stats": True}
    case.update(BN_RK_SUMS[name])
    coeffs, relu, batch_stats = case["coeffs"], case["relu"], case["batch_stats"]
    channels_last = how.startswith("channels_last")
    x, *terms = (lay((torch.randn(shape) * 2 + 1).to(dtype), how, i, "cpu") for i in range(1 + len(coeffs)))
    weight, bias = vectors_for("cc" if case["affine"] else "--", shape)
    (step,) = vectors_for(case["step"], shape)
    given = (None, None) if batch_stats else (torch.randn(shape[1]), torch.rand(shape[1]) + 0.5)
    masked = relu and bool(coeffs)
    arguments = (x, weight, bias, *given, terms, coeffs, step, channels_last, relu, 1e-5, case["moments"], masked)
    out, *rest = bn_triton.forward(*arguments)
    truth = bn_reference.forward(*double(list(arguments)))
    eager = bn_reference.forward(*arguments)
    assert out.stride() == eager[0].stride() and out.dtype == dtype
    assert_as_good_as(out, eager[0], truth[0], "out")
    if masked:
        assert_mask(rest.pop(0), out, channels_last)
    mean, var = given
    if batch_stats:
        mean, var = rest.pop(0), rest.pop(0)
        assert_moments(mean, var, x)
    if case["moments"]:
        assert_moments(*rest, out)
    buffer, slot = buffer_around(out, channels_last)
    again = bn_triton.forward(*arguments[:-1], False, slot)
    assert again[0] is slot and torch.equal(slot, out)
    assert torch.isnan(buffer[:, 0]).all() and torch.isnan(buffer[:, -1]).all()

    assert mean is not None and var is not None
    grad = lay(torch.randn(shape).to(dtype), how, 0, "cpu")
    mask = reference.pack(~(out <= 0), channels_last) if relu else None
    needs = [(True, True, True)]
    if name in ("join", "gate", "frozen") and dtype == torch.float32:
        needs += [(True, False, False), (False, True, False), (False, False, True), (False, False, False)]
    for need_x, need_affine, need_step in needs:
        need = (need_x, need_affine, need_step and step is not None)
        common = (grad, x, weight, bias, mean, var, step)
        options = (coeffs, channels_last, relu, batch_stats, 1e-5, *need)
        # The references are given the mask that forward's result implies, ours may have to find it.
        ours = bn_triton.backward(*common, mask if masked else None, *options)
        same = bn_reference.backward(*common, mask, *options)
        true = bn_reference.backward(*double(list(common)), mask, *options)
        # |g| against |x_hat|, with |weight|, |bias| and |step|: what the sums are made of.
        apart = (x.double() - moments_reference.per_channel(mean.double(), x)).abs()
        zero = torch.zeros_like(mean, dtype=torch.float64)
        size = [absolute(double(v)) for v in (grad, apart, weight, bias, zero, var, step)]
        magnitudes = bn_reference.backward(*size, mask, *options)
        assert [t.dtype for t in ours] == [t.dtype for t in same]
        if relu and not masked and step is None:
            again = torch.empty_like(out)
            bn_triton.backward(*common, None, *options, again)
            assert torch.equal(again, out)
        for i in range(len(ours)):
            if i < need_x or i >= len(ours) - len(coeffs):
                assert ours[i].stride() == same[i].stride()
                assert_as_good_as(ours[i], same[i], true[i], f"gradient {i} of {need}")
            else:
                assert_sum(ours[i], true[i], magnitudes[i])


@pytest.mark.parametrize(("name", "dtype", "how"), pairs(BN_RK_SUMS), ids=str)
def test_bn_rk_sum(name: str, dtype: torch.dtype, how: str) -> None:
    bn_rk_sum(name, dtype, (3, 20, 5, 7), how)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("how", ("contiguous", "channels_last_slice"))
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (1, 9, 1, 1)], ids=str)
def test_bn_rk_sum_shapes(shape: tuple[int, ...], how: str) -> None:
    for name in ("join", "gate"):
        bn_rk_sum(name, torch.float32, shape, how)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channel_moments(dtype: torch.dtype, how: str) -> None:
    channels_last = how.startswith("channels_last")
    for shape in SHAPES[:5]:
        x = lay((torch.randn(shape) - 3).to(dtype), how, 0, "cpu")
        assert_moments(*moments_triton.forward(x, channels_last), x)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_moments_do_not_cancel(dtype: torch.dtype, how: str) -> None:
    """A mean far larger than the deviation; a level that jumps inside a program; a constant channel."""
    x = torch.randn(6, 4, 20, 20, dtype=torch.float64)
    x[:, 1] = x[:, 1] * 1e-2 + 1e3
    x[0, 2] += 1e4
    x[:, 3] = 1 / 3
    x = lay(x.to(dtype), how, 0, "cpu")
    mean, var = moments_triton.forward(x, how.startswith("channels_last"))
    assert_moments(mean[:3], var[:3], x[:, :3])
    assert var[3] <= (torch.finfo(dtype).eps * mean[3]) ** 2
    out, *found = triton.forward([x], [1.0], [None], None, how.startswith("channels_last"), False, True, False)
    assert_moments(found[0][:3], found[1][:3], out[:, :3])


@pytest.mark.parametrize("how", LAYOUTS)
def test_not_finite(how: str) -> None:
    """NaN passes ReLU and spoils no moments but its channel's; a gradient that is masked off is 0 whatever it was."""
    channels_last = how.startswith("channels_last")
    x = torch.randn(2, 5, 3, 7)
    x[0, 1, 2, 3], x[1, 2, 0, 0], x[1, 3, 0, 0] = float("nan"), float("inf"), float("-inf")
    x = lay(x, how, 0, "cpu")
    out, mask, mean, var = triton.forward([x], [2.0], [None], None, channels_last, True, True, True)
    torch.testing.assert_close(out, torch.relu(2 * x), equal_nan=True, rtol=0, atol=0)
    assert out.isnan().sum() == 1 and out.isinf().sum() == 1
    assert_mask(mask, out, channels_last)
    assert var.isnan().tolist() == [False, True, True, False, False]
    assert mean.isfinite().tolist() == [True, False, False, True, True]

    keep = torch.rand(2, 5, 3, 7) > 0.5
    grad = lay(torch.randn(2, 5, 3, 7).masked_fill(~keep, float("nan")), how, 0, "cpu")
    packed = reference.pack(keep, channels_last)
    dt, total = triton.backward(grad, packed, [2.0], [None], [], [], [], True, channels_last)
    assert torch.equal(dt, (2 * grad).masked_fill(~keep, 0)) and total.isfinite().all()
    clean = lay(torch.randn(2, 5, 3, 7), how, 0, "cpu")
    v = torch.rand(5) + 0.5
    for found in bn_triton.backward(
        grad, clean, v, v, v, v, v, packed, [2.0], channels_last, True, True, 1e-5, True, True, True
    ):
        assert found.isfinite().all()


def test_relu_decides_after_rounding() -> None:
    """A sum too small for its dtype is stored as 0, so that no gradient passes: with a kept mask and without."""
    x = torch.full((2, 3, 4, 4), 2.0**-20, dtype=torch.float16)
    out, mask = triton.forward([x], [2.0**-10], [None], None, False, True, False, True)
    assert not out.any() and not mask.any()
    mean, var, w = torch.zeros(3), torch.ones(3), torch.full((3,), 2.0**-10)
    dx, *_ = bn_triton.backward(
        torch.ones_like(x), x, w, None, mean, var, None, None, [], False, True, False, 0.0, True, True, False
    )
    assert not dx.any()


def test_offsets_have_64_bits() -> None:
    """Samples, and positions of channels_last, that are 2^31 elements apart."""
    pitch = 2**31 + 16
    memory = torch.empty(pitch + 4096, dtype=torch.float16)  # of which little is touched
    for strides, channels_last in (((pitch, 9, 3, 1), False), ((pitch * 2, 1, pitch, pitch), True)):
        shape = (2, 4, 3, 3) if not channels_last else (1, 4, 2, 1)
        x = memory.as_strided(shape, strides).copy_(torch.randn(shape))
        assert layout.is_rows(x, channels_last)
        out, _, mean, var = triton.forward([x], [1.0], [torch.ones(4)], None, channels_last, True, True, True)
        assert torch.equal(out, x.relu())
        assert_moments(mean, var, out)
        triton.forward([x], [-1.0], [None], None, channels_last, False, False, False, x)
        assert torch.equal(x.relu() > 0, out == 0)


def begun_at(start: int, x: Tensor) -> Tensor:
    """x in channels_last, so many elements behind an address that 64 divides."""
    memory = torch.empty(start + x.numel(), dtype=x.dtype)
    assert memory.data_ptr() % 64 == 0
    return memory.as_strided(x.shape, layout.strides(x.shape, True), start).copy_(x)


@pytest.mark.parametrize("start", (1, 2, 4, 12))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_tensors_begin_anywhere(dtype: torch.dtype, start: int) -> None:
    """The interpreter's plugin holds the kernels to the alignment that they promise."""

    def call(*starts: int) -> list[list[Tensor]]:
        torch.manual_seed(0)
        x, y, grad = (begun_at(start, torch.randn(2, 16, 3, 3).to(dtype)) for start in starts)
        v = torch.rand(16) + 0.5
        out, mask, *_ = triton.forward([x, y], [1.0, 0.5], [None, v], None, True, True, False, True)
        norms, eps = [v, v, None, None] * 2, [1e-5, 1e-5]
        weights = [torch.ones(8, 16, 1, 1, dtype=dtype)], [torch.randn(16, 8, 3, 3).to(dtype)]
        dense = (*weights, norms, [], 1.0, [0, 16, 0, 0], [16], eps)
        buffer, mean, var, *moments, mid = dense_block.forward(x, *dense, 32, [], None, None, True, False, "")
        buffer, mid, wide = begun_at(starts[0], buffer), begun_at(starts[1], mid), torch.cat([grad, x], 1)
        return [
            [out],
            triton.backward(grad, mask, [1.0, 0.5], [None, v], [y], [0.5], [False], False, True),
            bn_triton.forward(x, v, v, v, v, [y], [0.5], None, True, True, 1e-5, False, False),
            bn_triton.backward(grad, x, v, v, v, v, None, None, [0.5], True, True, True, 1e-5, True, True, False),
            list(moments_triton.forward(x, True)),
            dense_block.backward(wide, buffer, mean, var, moments, [mid], *dense, 16, [], ""),
        ]

    for starts in ((start, 0, 0), (0, start, 0), (0, 0, start)):
        for found, expected in zip(call(*starts), call(0, 0, 0), strict=True):
            # Sums are taken in another order where tiles are smaller.
            torch.testing.assert_close(found, expected)


def test_gradients_lie_as_weights_do() -> None:
    x, v = torch.randn(2, 16, 3, 3), torch.rand(16) + 0.5
    turned = torch.randn(16, 8).t()[..., None, None]

    def gradient(conv1: Tensor) -> Tensor:
        rest = [torch.ones(4, 8, 3, 3)], [v, v, None, None, v[:8], v[:8], None, None], [], 1.0, [0, 16, 0, 0], [16]
        dense = ([conv1], *rest, [1e-5, 1e-5])
        buffer, mean, var, *moments, mid = dense_block.forward(x, *dense, 20, [], None, None, True, False, "")
        return dense_block.backward(buffer, buffer, mean, var, moments, [mid], *dense, 16, [], "")[1]

    found = gradient(turned)
    assert found.stride() == turned.stride() == (1, 8, 1, 1)
    assert torch.equal(found, gradient(turned.contiguous()))


@pytest.mark.parametrize("momentum", (0.1, None, 1.0))
@pytest.mark.parametrize("count", (0, 1, 50))
def test_running_statistics(momentum: float | None, count: int) -> None:
    """More pairs than one launch takes, prefixes of the channels, every dtype, strided memory."""
    mean, var = torch.randn(9), torch.rand(9)
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def statistics() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        torch.manual_seed(1)
        sizes = [1 + i % 9 for i in range(moments_triton.STATS_AT_ONCE[-1] + 3)]
        means = [torch.randn(2 * size).to(dtypes[i % 4])[:: 1 + i % 2][:size] for i, size in enumerate(sizes)]
        variances = [torch.rand(size).to(dtypes[i % 4]) for i, size in enumerate(sizes)]
        return means, variances, [torch.tensor(i % 5) for i in range(len(sizes))]

    ours, eager, true = statistics(), statistics(), statistics()
    true = (*([t.double() for t in each] for each in true[:2]), true[2])
    moments_triton.update_running_stats(mean, var, count, *ours, momentum)
    moments_reference.update_running_stats(mean, var, count, *eager, momentum)
    moments_reference.update_running_stats(mean.double(), var.double(), count, *true, momentum)
    assert ours[2] == eager[2] == [1 + i % 5 for i in range(len(ours[2]))]
    for a, b, c in zip((*ours[0], *ours[1]), (*eager[0], *eager[1]), (*true[0], *true[1]), strict=True):
        assert_as_good_as(a, b, c, f"{a.dtype}")


@pytest.fixture
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of several tiles: all rows in one program's loop, or each tile in a program of its own."""
    small = launches.Cut(16, 16, 16, 4, 2)
    monkeypatch.setattr(launches, "UNTUNED", dict.fromkeys(launches.UNTUNED, small))
    monkeypatch.setattr(fused_products, "_PROGRAMS", 1 if request.param == "few programs" else 1 << 20)
    monkeypatch.setattr(kernels, "PARTIAL_ROWS", (2, 2))
    monkeypatch.setattr(kernels, "MOST_PARTIAL", 4)


TRITON = ("triton", "cpu")


@pytest.mark.parametrize(("name", "dtype", "how"), in_turn(test_bn_relu_conv.TestBnReluConv.CASES), ids=str)
def test_bn_relu_convs(name: str, dtype: torch.dtype, how: str) -> None:
    tester = test_bn_relu_conv.TestBnReluConv()
    tester.check(tester.CASES[name], (3, 20, 5, 7), dtype, how, TRITON)


@pytest.mark.parametrize("n", (1, 3))
def test_bn_relu_conv_with_moments(n: int) -> None:
    test_bn_relu_conv.test_moments_come_and_go(n, (3, 18, 9, 7), "channels_last", TRITON)


def test_bn_relu_conv_keeps_x_alone() -> None:
    test_bn_relu_conv.test_what_is_kept(TRITON)


@pytest.mark.parametrize(("name", "dtype", "how"), in_turn(test_bn_relu_pool.TestBnReluPool.CASES), ids=str)
def test_bn_relu_pools(name: str, dtype: torch.dtype, how: str) -> None:
    tester = test_bn_relu_pool.TestBnReluPool()
    tester.check(tester.CASES[name], (3, 20, 5, 7), dtype, how, TRITON)


@pytest.mark.parametrize("shape", test_bn_relu_pool.SHAPES, ids=str)
@pytest.mark.parametrize("name", ("batch", "frozen"))
def test_bn_relu_pool_shapes(name: str, shape: tuple[int, ...]) -> None:
    tester = test_bn_relu_pool.TestBnReluPool()
    tester.check(tester.CASES[name], shape, torch.float32, "channels_last_slice", TRITON, seeds=2)


def test_bn_relu_pool_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a program takes one behind the other."""
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    tester = test_bn_relu_pool.TestBnReluPool()
    for name in ("batch", "frozen"):
        tester.check(tester.CASES[name], (3, 70, 9, 11), torch.float32, "channels_last", TRITON)


def test_bn_relu_pool_keeps_x_alone() -> None:
    test_bn_relu_pool.test_what_is_kept(TRITON)


@pytest.mark.parametrize(("name", "dtype", "how"), in_turn(test_residual_block.TestResidualBlock.CASES), ids=str)
def test_residual_blocks(name: str, dtype: torch.dtype, how: str) -> None:
    tester = test_residual_block.TestResidualBlock()
    tester.check(tester.CASES[name], (3, 20, 5, 7), dtype, how, TRITON)


POINTWISE = [
    name
    for name, case in test_residual_block.TestResidualBlock.CASES.items()
    if 1 in case["sizes"] or case["projection"]
]


@pytest.mark.parametrize(
    ("products", "name", "dtype", "how"),
    [
        (
            ("small blocks", "few programs")[i % 2],
            name,
            (torch.bfloat16, torch.float16)[i // 2 % 2],
            ("channels_last", "channels_last_slice")[i // 4 % 2],
        )
        for i, name in enumerate(POINTWISE)
    ],
    indirect=["products"],
    ids=str,
)
@pytest.mark.usefixtures("products")
def test_products_of_residual_blocks(name: str, dtype: torch.dtype, how: str) -> None:
    tester = test_residual_block.TestResidualBlock()
    tester.check(tester.CASES[name], (3, 20, 5, 7), dtype, how, TRITON)


@pytest.mark.parametrize("needed", ("x", "shortcut", "convs", "weight", "step"))
@pytest.mark.parametrize(
    ("sizes", "shortcut"), (((1, 3, 1), "given"), ((1, 1), "projected"), ((1,), "own"), ((1, 3), "own")), ids=str
)
def test_products_of_residual_blocks_with_one_gradient(needed: str, sizes: tuple[int, ...], shortcut: str) -> None:
    if needed != "shortcut" or shortcut == "given":
        test_residual_block.one_kind(needed, TRITON, sizes, shortcut, torch.bfloat16)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_blocks_with_hooks_that_give_back_another_layout(dtype: torch.dtype) -> None:
    test_residual_block.hooked(TRITON, dtype)
    test_dense_block.hooked(TRITON, dtype)


@pytest.mark.parametrize("name", ("frozen", "pointwise", "bottleneck_shortcut", "strided_frozen"))
def test_residual_blocks_that_keep_nothing(name: str) -> None:
    """Where statistics are given, a product normalises what it writes."""
    torch.manual_seed(0)
    tester = test_residual_block.TestResidualBlock()
    case = tester.CASES[name]
    exact = tester.inputs(case, (3, 24, 5, 7))

    def given_as(name: str, t: Tensor) -> Tensor:
        return t.bfloat16().contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.float()

    given = exact.map(given_as)
    with torch.no_grad():
        with dispatch.use("triton"):
            ours = tester.ours(case, given)
        eager, truth = tester.eager(case, given), tester.eager(case, given.map(lambda _, t: t.double()))
    assert_as_good_as(ours, eager, truth, name)


def test_residual_block_with_statistics() -> None:
    test_residual_block.test_running_statistics_and_counters(TRITON)


FORMS = ("plain", "neck", "sum", "neck_sum", "odd_neck")  # the rest differ in how the C++ kernels go
DENSE = [
    *(("small blocks", s, n) for s in FORMS for n in test_dense_block.NORMS),
    ("small blocks", "wide_neck", "batch"),
    *(("few programs", s, "batch") for s in FORMS),
]
CLIQUES = [
    *(("small blocks", name) for name in test_clique_block.CASES),
    *(("few programs", name) for name in list(test_clique_block.CASES)[::3]),
]


@pytest.mark.parametrize(("products", "shape", "norms"), DENSE, indirect=["products"])
@pytest.mark.usefixtures("products")
def test_dense_blocks(shape: str, norms: str) -> None:
    test_dense_block.test_against_float64(shape, norms, TRITON)


@pytest.mark.parametrize(("products", "name"), CLIQUES, indirect=["products"])
@pytest.mark.usefixtures("products")
def test_clique_blocks(name: str) -> None:
    test_clique_block.test_against_float64(name, TRITON)


@pytest.mark.parametrize("how", test_dense_block.LAYOUTS)
def test_dense_block_layouts(how: str) -> None:
    test_dense_block.test_layouts(how, TRITON)


@pytest.mark.parametrize("size", ((40, 1, 1), (3, 1, 7), (1, 3, 45), (2, 9, 15)), ids=str)
def test_dense_block_sizes(size: tuple[int, int, int]) -> None:
    test_dense_block.test_sizes(size, TRITON)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_dense_block_reduced_precision(dtype: torch.dtype) -> None:
    test_dense_block.test_reduced_precision(dtype, "batch", "plain", TRITON)


def test_dense_block_with_dropout() -> None:
    test_dense_block.test_dropout_is_eagers(TRITON)


def test_dense_block_with_moments() -> None:
    test_dense_block.test_moments_come_and_go(TRITON)


def test_dense_block_with_nan() -> None:
    test_dense_block.test_nan_spreads_as_in_eager(TRITON)


def test_dense_blocks_of_two_processes(tmp_path: Path) -> None:
    test_distributed.check_blocks(tmp_path, "triton", torch.float32, 1e-3)


@pytest.mark.parametrize("shape", ("plain", "neck_sum"))
def test_dense_block_in_autograd(shape: str) -> None:
    test_dense_block.test_autograd_is_used_as_usual(shape, TRITON)


@pytest.mark.parametrize("how", LAYOUTS)
def test_public_functions_are_served(how: str) -> None:
    x, y = (lay(torch.randn(2, 6, 3, 5), how, i, "cpu").requires_grad_() for i in range(2))
    bn, gate = torch.nn.BatchNorm2d(6), torch.rand(2, 6, requires_grad=True)
    before = dispatch.served()
    with rkfast.use("triton"):
        total, moments = ops.rk_sum([x, y], [1.0, 0.5], steps=[gate, None], relu=True, return_moments=True)
        out = ops.bn_rk_sum(
            total, bn.weight, bn.bias, bn.running_mean, bn.running_var, terms=[x], coeffs=[1.0], relu=True,
            training=True, momentum=None, eps=bn.eps, num_batches_tracked=bn.num_batches_tracked, moments=moments,
        )  # fmt: skip
        grads = torch.autograd.grad(out.square().sum(), (x, y, gate, bn.weight, bn.bias))
        found = ops.channel_moments(out)
        conv = torch.randn(4, 6, 3, 3, requires_grad=True)
        torch.autograd.grad(ops.dense_block(x, [conv], [ops.Norm(None, None, None, None)]).sum(), conv)
        torch.autograd.grad(ops.bn_relu_conv(x, conv, ops.Norm(None, None, None, None)).sum(), conv)
        torch.autograd.grad(
            ops.bn_relu_pool(x, ops.Norm(None, None, torch.zeros(6), torch.ones(6), None, False)).sum(), x
        )
        torch.autograd.grad(ops.conv(x, conv).sum(), conv)
        square = torch.randn(6, 6, 3, 3, requires_grad=True)
        torch.autograd.grad(ops.residual_block(x, [square], [ops.Norm(None, None, None, None)]).sum(), square)
    served = dispatch.served() - before
    expected = [op.name for op in dispatch.OPS.values() if any(i.backend == "triton" for i in op.implementations)]
    assert "bn_rk_sum_backward" in expected
    assert served == {(op, "triton"): 1 for op in expected}
    stock = torch.nn.BatchNorm2d(6, momentum=None)
    total = torch.relu(gate[..., None, None] * x + 0.5 * y)
    want = torch.relu(x + stock(total))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close((bn.running_mean, bn.running_var), (stock.running_mean, stock.running_var))
    assert bn.num_batches_tracked == 1
    assert_moments(found.mean, found.var, out.detach())
    stock_grads = torch.autograd.grad(want.square().sum(), (x, y, gate, stock.weight, stock.bias))
    for a, b in zip(grads, stock_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", ((0, 5, 4, 4), (2, 5, 0, 3), (2, 0, 3, 3), (0, 3)), ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    x, v = torch.empty(shape), torch.ones(shape[1])
    for channels_last in (False, True):
        arguments = ([x, x], [1.0, 2.0], [None, v], v, channels_last, True, True, True)
        for a, b in zip(triton.forward(*arguments), reference.forward(*arguments), strict=True):
            assert torch.equal(a, b)
        bn = (x, x, v, v, v, v, v, None, [1.0], channels_last, True, True, 1e-5, True, True, True)
        for a, b in zip(bn_triton.backward(*bn), bn_reference.backward(*bn), strict=True):
            assert torch.equal(a, b)
        assert all(not t.any() for t in moments_triton.forward(x, channels_last))


@pytest.mark.parametrize("channels_last", (False, True))
def test_each_tile_has_one_owner(channels_last: bool) -> None:
    """At sizes that the interpreter cannot reach; and no program begins with a tile smaller than its others."""
    sizes = ((256, 64, 12544), (64, 36, 1024), (7, 150, 3136), (3, 5, 100_003), (33, 2048, 49), (1, 1, 1 << 22))
    for n, c, p in sizes:
        for itemsize, per_sample, reduces in ((4, False, True), (2, True, True), (8, False, False), (2, True, False)):
            pitch = c if channels_last else c * p
            tiling = kernels.View(n, c, p, channels_last, (pitch,)).tiling(
                itemsize, operands=2, per_sample=per_sample, reduces=reduces
            )
            rows, cols = tiling.constants["ROWS"], tiling.constants["COLS"]
            assert tiling.blocks * (cols if channels_last else rows) >= c
            covered = 0
            for split in range(tiling.splits):
                first = split // tiling.pieces * tiling.span + split % tiling.pieces * tiling.share
                last = min(first + tiling.share, (split // tiling.pieces + 1) * tiling.span, tiling.tiles)
                assert covered == first < last
                covered = last
                if not channels_last and last - first > 1:
                    assert first % tiling.chunks < tiling.chunks - 1 or tiling.chunks == 1
            assert covered == tiling.tiles
            positions = n * p // tiling.groups
            reached = tiling.tiles * rows if channels_last else tiling.tiles // tiling.chunks * p
            assert reached >= positions and tiling.chunks * cols >= (0 if channels_last else p)
