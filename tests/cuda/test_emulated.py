"""The CUDA C++ kernels and their bindings without a GPU: compiled for the host and held against the references.

Truth is the reference in float64 on the same stored values. A kernel may be at most twice as far from it as the
reference in the kernel's own dtype, plus the rounding of the result and a few of what sums are kept in.
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rkfast.ops import layout
from rkfast.ops.bn_rk_sum import reference as bn_rk_sum
from rkfast.ops.channel_moments import reference as channel_moments
from rkfast.ops.rk_sum import reference as rk_sum
from tests.cuda.emulation import build

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = (
    "contiguous",
    "channels_last",
    "slice",
    "aligned_slice",
    "channels_last_slice",
    "channels_last_aligned_slice",
)
SHAPES = (
    (2, 3, 5, 7),
    (4, 24, 6, 6),
    (3, 16, 9),
    (2, 8, 2, 3, 4),
    (5, 7),
    (40, 16),
    (3, 5, 1, 1),
    (2, 1, 5, 5),
    (1, 9, 2, 2),
    (300, 4, 2, 2),
    (1, 2, 70, 61),
    (2, 2100, 1, 2),
)
# Every dtype in the first two shapes, two of them by turns in the others.
CASES = [
    (shape, how, dtype)
    for (i, shape), (j, how), (k, dtype) in itertools.product(*map(enumerate, (SHAPES, LAYOUTS, DTYPES)))
    if i < 2 or (i + j + k) % 2 == 0
]
LARGE = (9, 40, 41, 40)  # every thread takes several steps
EPS = 1e-3


@pytest.fixture(scope="module")
def cuda() -> Any:
    if reason := build.reason():
        pytest.skip(reason)
    return build.load(build.build())


@pytest.fixture(autouse=True)
def _poisoned() -> Any:
    """Memory comes filled with NaN (masks and workspaces with ones), so that a forgotten store shows."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def lay(values: Tensor, how: str) -> Tensor:
    """values laid out as named; what lies beside a slice is NaN."""
    n, c, *spatial = values.shape
    start, extra = {"slice": (3, 5), "aligned_slice": (8, 16)}.get(how.removeprefix("channels_last_"), (0, 0))
    shape = (n, c + extra, *spatial)
    strides = layout.strides(shape, how.startswith("channels_last"))
    wide = torch.empty_strided(shape, strides, dtype=values.dtype, device=values.device).fill_(float("nan"))
    return wide[:, start : start + c].copy_(values)


class Maker:
    """Random tensors, the same for the same seed."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, how: str = "contiguous", seed: int = 0) -> None:
        self.shape, self.dtype, self.how = tuple(shape), dtype, how
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, shape: Sequence[int] | None = None) -> Tensor:
        values = torch.randn(shape or self.shape, generator=self.generator, dtype=torch.float64)
        return values.to(self.dtype) if shape else lay(values.to(self.dtype), self.how)

    def channels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self((self.shape[1],)).to(dtype)

    def samples(self) -> Tensor:
        return self(self.shape[:2]).float()


def wide(x: Any) -> Any:
    """Every floating tensor in x, in float64."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    return type(x)(wide(each) for each in x) if isinstance(x, (list, tuple)) else x


def close(found: Tensor, eager: Tensor, truth: Tensor, what: str, scale: float = 0) -> None:
    """``scale``: the size of the result on the way to it, because a sum near zero is no more exact than others."""
    assert found.shape == truth.shape, what
    assert found.dtype == eager.dtype, what
    torch.testing.assert_close(found.isnan(), truth.isnan(), msg=what)
    finite = truth.isfinite()
    torch.testing.assert_close(found.double()[~finite], truth[~finite], equal_nan=True, msg=what)
    error = (found.double() - truth)[finite].abs()
    if not error.numel():
        return
    budget = 2 * (eager.double() - truth)[finite].abs().nan_to_num(0).max() + torch.finfo(found.dtype).smallest_normal
    if found.dtype == torch.float64:
        # Truth is no better than what it is compared with: all that float64 can say is that nothing narrower was used.
        budget = 256 * torch.finfo(torch.float64).eps * (1 + truth[finite].abs().max())
    else:
        budget += 4 * torch.finfo(torch.float32).eps * max(truth[finite].abs().max().item(), scale)
    over = (error - budget - torch.finfo(found.dtype).eps * truth[finite].abs()).max().item()
    assert over <= 0, f"{what}: {over:.3g} over a budget of {budget.item():.3g}"


def compare(kernel: Callable[..., Any], reference: Callable[..., Any], args: Sequence[Any]) -> list[Tensor]:
    """Results of the kernel, each held against the reference in float64; arguments stay as they were."""
    before = [a.clone() for a in _tensors(args)]
    found, eager, truth = list(kernel(*args)), list(reference(*args)), list(reference(*wide(args)))
    for a, b in zip(before, _tensors(args), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg="an argument was written")
    assert len(found) == len(truth)
    for i, (f, e, t) in enumerate(zip(found, eager, truth, strict=True)):
        if f.dtype == torch.uint8:
            assert f.shape == e.shape
            continue
        first = _tensors(args)[0]
        is_sum = f.shape != first.shape
        close(f, e, t, f"result {i}", (first.numel() / first.shape[1]) ** 0.5 if is_sum and first.numel() else 0)
    return found


def _tensors(args: Any) -> list[Tensor]:
    if isinstance(args, Tensor):
        return [args]
    return [t for each in args for t in _tensors(each)] if isinstance(args, (list, tuple)) else []


def check_sum(cuda: Any, args: tuple[Any, ...], moments: bool, mask: bool) -> list[Tensor]:
    """rk_sum's results; mask and moments are those of the output as it is stored."""
    channels_last = args[4]
    out, *rest = result = cuda.rk_sum(*args, moments, mask)
    compare(lambda *_: [out], lambda *a: rk_sum.forward(*a, False, False), args)
    expected = layout.strides(out.shape, channels_last)
    assert all(s == e for s, e, size in zip(out.stride(), expected, out.shape, strict=True) if size > 1)
    if mask:
        assert torch.equal(rest[0], rk_sum.pack(~(out <= 0), channels_last))
    if moments:
        check_moments(rest[-2:], out)
    return result


def check_moments(found: Sequence[Tensor], x: Tensor) -> None:
    eager, truth = channel_moments.forward(x, False), channel_moments.forward(x.double(), False)
    for f, e, t, what in zip(found, eager, truth, ("mean", "var"), strict=True):
        close(f, e, t, what)


@pytest.mark.parametrize(("shape", "how", "dtype"), CASES)
def test_sum(cuda: Any, shape: tuple[int, ...], how: str, dtype: torch.dtype) -> None:
    make = Maker(shape, dtype, how)
    terms = [make() for _ in range(3)]
    channels_last = layout.is_channels_last(terms[0])
    coeffs = [0.5, -1.25, 1.0]
    nothing = [None] * 3
    for steps, shift, relu, moments, mask in (
        (nothing, None, False, False, False),
        (nothing, None, True, False, True),
        ([None, make.channels(), None], None, True, True, True),
        ([make.samples(), None, make.channels()], make.channels(), False, True, False),
        ([make.samples(), None, None], None, True, False, True),
    ):
        check_sum(cuda, (terms, coeffs, steps, shift, channels_last, relu), moments, mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
@pytest.mark.parametrize("count", [1, 4, 16])
def test_sum_of_many(cuda: Any, count: int, how: str, dtype: torch.dtype) -> None:
    make = Maker((3, 24, 6, 5), dtype, how)
    terms = [make() for _ in range(count)]
    coeffs = [0.25 + 0.1 * i for i in range(count)]
    steps = [make.channels() if i % 3 == 1 else None for i in range(count)]
    for each in ([None] * count, steps):
        check_sum(cuda, (terms, coeffs, each, None, how == "channels_last", True), True, True)


@pytest.mark.parametrize(
    ("how", "dtype"),
    [("contiguous", torch.float32), ("channels_last", torch.bfloat16), ("channels_last_slice", torch.float32)],
)
def test_large(cuda: Any, how: str, dtype: torch.dtype) -> None:
    make = Maker(LARGE, dtype, how)
    x, y = make(), make()
    cl = how.startswith("channels_last")
    check_sum(cuda, ([x, y], [0.5, 2.0], [make.channels(), None], None, cl, True), True, True)
    check_sum(cuda, ([x, y], [0.5, 2.0], [None, make.samples()], None, cl, False), True, False)
    check_moments(cuda.channel_moments(x, cl), x)
    compare(
        cuda.rk_sum_backward,
        rk_sum.backward,
        (x, None, [2.0], [None], [y, y], [0.5, 1.5], [False, True], True, cl),
    )
    check_norm(cuda, make, [0.5], make.channels(), relu=True, batch_stats=True)


def test_mixed_layouts(cuda: Any) -> None:
    hows = ("contiguous", "channels_last", "slice")
    a, b, c = (Maker((3, 10, 5, 4), torch.float32, how, i)() for i, how in enumerate(hows))
    d = Maker((3, 10, 4, 5), torch.float32, seed=4)().transpose(2, 3)
    e = Maker((1, 10, 1, 1), torch.float32, seed=5)().expand(3, 10, 5, 4)
    for cl in (False, True):
        check_sum(cuda, ([a, b, c, d, e], [1.0, 2.0, 3.0, 4.0, 5.0], [None] * 5, None, cl, False), True, False)


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 24, 5, 7), (3, 8, 4, 4), (6, 7), (3, 4, 1, 1)])
def test_out(cuda: Any, shape: tuple[int, ...], how: str) -> None:
    make = Maker(shape, torch.bfloat16)
    terms = [lay(make(), how) for _ in range(2)]
    for slot in (lay(make(), how), terms[0]):  # another slot, and in place
        slot_is_cl = layout.is_channels_last(slot)
        expected = rk_sum.forward(terms, [1.5, -0.5], [None, None], None, slot_is_cl, False, True, False)
        around = slot.as_strided((slot.untyped_storage().nbytes() // 2,), (1,), 0)
        inside = torch.zeros_like(around)
        inside.as_strided(slot.shape, slot.stride(), slot.storage_offset()).fill_(1)
        before = around.clone()
        result = cuda.rk_sum(terms, [1.5, -0.5], [None, None], None, slot_is_cl, False, True, False, slot)
        assert result[0].data_ptr() == slot.data_ptr()
        torch.testing.assert_close(slot, expected[0], rtol=2**-7, atol=0)
        check_moments(result[1:], slot)
        outside = inside == 0
        around, before = (t[outside].view(torch.int16) for t in (around, before))
        assert torch.equal(around, before), "wrote beside the slot"


@pytest.mark.parametrize(("shape", "how", "dtype"), CASES)
def test_sum_backward(cuda: Any, shape: tuple[int, ...], how: str, dtype: torch.dtype) -> None:
    make = Maker(shape, dtype, how)
    grad, a, b, c = (make() for _ in range(4))
    cl = layout.is_channels_last(grad)
    mask = rk_sum.pack(~(b <= 0), cl)
    for args in (
        (grad, mask, [0.5, -2.0], [None, None], [], [], [], False, cl),
        (grad, None, [0.5], [None], [], [], [], False, cl),
        (grad, mask, [0.5, 2.0], [make.channels(), None], [a], [0.5], [False], False, cl),
        (grad, mask, [0.5], [make.samples()], [a, b], [0.5, 3.0], [True, False], True, cl),
        (grad, None, [], [], [a, b, c], [0.5, 3.0, 1.0], [False, True, True], True, cl),
        (grad, mask, [], [], [], [], [], True, cl),
    ):
        compare(cuda.rk_sum_backward, rk_sum.backward, args)


def test_expanded_gradient(cuda: Any) -> None:
    for cl in (False, True):
        grad = torch.ones(()).expand(2, 6, 3, 5)
        compare(cuda.rk_sum_backward, rk_sum.backward, (grad, None, [0.5], [None], [grad], [1.0], [False], True, cl))


def check_norm(
    cuda: Any,
    make: Maker,
    coeffs: list[float],
    step: Tensor | None,
    relu: bool,
    batch_stats: bool,
    affine: bool = True,
    needs: Sequence[tuple[bool, bool, bool]] = ((True, True, True),),
) -> None:
    """bn_rk_sum forward (with its own moments, or given ones) and backward."""
    x, grad, *terms = (make() for _ in range(2 + len(coeffs)))
    cl = layout.is_channels_last(x)
    weight, bias = (make.channels(), make.channels()) if affine else (None, None)
    given = (None, None) if batch_stats else (make.channels(), make.channels().abs() + 0.1)
    mask = relu and len(terms) > 0
    args = (x, weight, bias, *given, terms, coeffs, step, cl, relu, EPS)
    out, *rest = cuda.bn_rk_sum(*args, True, mask)
    compare(lambda *_: [out], lambda *a: bn_rk_sum.forward(*a, False, False)[:1], args)
    if mask:
        assert torch.equal(rest.pop(0), rk_sum.pack(~(out <= 0), cl))
    mean, var = given
    if batch_stats:
        mean, var, *rest = rest
        check_moments((mean, var), x)
    check_moments(rest, out)
    # The forward kernel's own zeros: one that rounds to zero in one pass and not in the other would be a fault.
    kept = rk_sum.pack(~(out <= 0), cl) if relu else None
    for need_x, need_affine, need_step in needs:
        tail = (coeffs, cl, relu, batch_stats, EPS, need_x, need_affine, need_step and step is not None)
        head = (grad, x, weight, bias, mean, var, step)
        compare(
            lambda *a: cuda.bn_rk_sum_backward(*a[:7], None if relu and not terms else kept, *a[8:]),
            bn_rk_sum.backward,
            (*head, kept, *tail),
        )


@pytest.mark.parametrize(("shape", "how", "dtype"), CASES)
def test_norm(cuda: Any, shape: tuple[int, ...], how: str, dtype: torch.dtype) -> None:
    make = Maker(shape, dtype, how)
    check_norm(cuda, make, [], None, relu=True, batch_stats=True)
    check_norm(cuda, make, [1.0], None, relu=True, batch_stats=True, affine=False)
    check_norm(cuda, make, [0.5, -1.0], make.channels(), relu=False, batch_stats=False)
    check_norm(cuda, make, [0.5], make.samples(), relu=True, batch_stats=True)
    check_norm(cuda, make, [], make.samples(), relu=True, batch_stats=False)


@pytest.mark.parametrize("batch_stats", [True, False])
@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_norm_needs(cuda: Any, how: str, batch_stats: bool) -> None:
    make = Maker((3, 8, 4, 5), torch.float32, how)
    needs = list(itertools.product((False, True), repeat=3))
    for step in (None, make.channels(), make.samples()):
        check_norm(cuda, make, [0.5], step, True, batch_stats, needs=needs)
        check_norm(cuda, make, [], step, False, batch_stats, needs=needs)
    check_norm(cuda, make, [0.1 * i for i in range(16)], None, True, batch_stats)


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_recomputed_mask_is_of_what_was_stored(cuda: Any, how: str) -> None:
    """Outputs too small for float16 are stored as zeros, and cut off like any other zero."""
    make = Maker((3, 8, 4, 5), torch.float16, how)
    x, grad, weight = make(), make(), torch.full((8,), 1e-9)
    out, mean, var = cuda.bn_rk_sum(
        x, weight, None, None, None, [], [], None, how == "channels_last", True, EPS, False, False
    )
    assert not out.any()
    args = (
        grad,
        x,
        weight,
        None,
        mean,
        var,
        None,
        None,
        [],
        how == "channels_last",
        True,
        True,
        EPS,
        True,
        True,
        False,
    )
    assert not any(found.any() for found in cuda.bn_rk_sum_backward(*args))


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
def test_vectors_of_any_dtype(cuda: Any, how: str) -> None:
    make = Maker((3, 8, 4, 5), torch.bfloat16, how)
    x = make()
    weight, bias, mean = make.channels(torch.bfloat16), make.channels(torch.float64), make((16,)).float()[::2]
    var = make.channels(torch.float16).abs() + 1
    args = (x, weight, bias, mean, var, [x], [1.0], make.channels(torch.float16), how == "channels_last", True, EPS)
    compare(cuda.bn_rk_sum, bn_rk_sum.forward, (*args, False, False))
    # A vector that starts in the middle of 16 bytes.
    shifted = torch.randn(9)[1:]
    check_sum(cuda, ([x], [1.0], [shifted], None, how == "channels_last", False), False, False)


@pytest.mark.parametrize(("shape", "how", "dtype"), CASES)
def test_moments(cuda: Any, shape: tuple[int, ...], how: str, dtype: torch.dtype) -> None:
    x = Maker(shape, dtype, how)()
    check_moments(cuda.channel_moments(x, layout.is_channels_last(x)), x)


@pytest.mark.parametrize("how", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [LARGE, (64, 7, 5, 5)])
def test_mean_far_above_deviation(cuda: Any, shape: tuple[int, ...], how: str) -> None:
    x = lay(3000 + 0.1 * Maker(shape, torch.float32)(), how)
    mean, var = cuda.channel_moments(x, how == "channels_last")
    true_var, true_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), true_mean, rtol=2**-22, atol=0)
    torch.testing.assert_close(var.double(), true_var, rtol=1e-3, atol=0)  # of sums: off by 1e2
    args = (x, None, None, None, None, [], [], None, how == "channels_last", False, 1e-5, False, False)
    normed = cuda.bn_rk_sum(*args)[0]
    expected = (x.double() - true_mean.view(1, -1, 1, 1)) * torch.rsqrt(true_var + 1e-5).view(1, -1, 1, 1)
    torch.testing.assert_close(normed.double(), expected, rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["contiguous", "channels_last", "slice"])
def test_not_finite(cuda: Any, how: str, dtype: torch.dtype) -> None:
    make = Maker((2, 6, 5, 5), dtype, how)
    x, y = make(), make()
    x[0, 0, 0, 0], x[1, 1, 1, 1], x[0, 2, 3, 3] = float("nan"), float("inf"), float("-inf")
    cl = layout.is_channels_last(x)
    result = check_sum(cuda, ([x, y], [1.0, 0.5], [None, None], None, cl, True), False, True)
    assert result[0][0, 0, 0, 0].isnan(), "relu must pass NaN"
    grad = make()
    # A cut-off gradient is zero, whatever it was.
    grad[0, 2, 3, 3] = float("nan")
    found = compare(cuda.rk_sum_backward, rk_sum.backward, (grad, result[1], [2.0], [None], [], [], [], True, cl))
    assert found[0][0, 2, 3, 3] == 0
    mean, var = make.channels(), make.channels().abs() + 1
    args = (x, None, None, mean, var, [y], [1.0], None, cl, True, EPS, False, False)
    compare(cuda.bn_rk_sum, bn_rk_sum.forward, args)
    found = cuda.channel_moments(x, cl)
    assert [bool(v.isfinite()) for v in found[1]] == [False, False, False, True, True, True]
    check_moments([v[3:] for v in found], x[:, 3:])


@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 0, 4, 4), (2, 5, 0, 4), (0, 3)])
def test_empty(cuda: Any, shape: tuple[int, ...]) -> None:
    x, c = torch.empty(shape), torch.ones(shape[1])
    gate = torch.ones(shape[:2])
    before = cuda.launches()
    for cl in (False, True):
        compare(cuda.rk_sum, rk_sum.forward, ([x], [1.0], [c], None, cl, True, True, True))
        args = (x, None, [1.0], [None], [x, x], [1.0, 1.0], [False, True], True, cl)
        compare(cuda.rk_sum_backward, rk_sum.backward, args)
        compare(cuda.bn_rk_sum, bn_rk_sum.forward, (x, c, c, None, None, [x], [1.0], gate, cl, True, EPS, True, True))
        args = (x, x, c, c, c, c, gate, None, [1.0], cl, False, True, EPS, True, True, True)
        compare(cuda.bn_rk_sum_backward, bn_rk_sum.backward, args)
        compare(cuda.channel_moments, channel_moments.forward, (x, cl))
    assert cuda.launches() == before


def test_launches(cuda: Any) -> None:
    def launched(f: Callable[..., Any], *args: Any) -> int:
        before = cuda.launches()
        f(*args)
        return cuda.launches() - before

    x, c = torch.randn(2, 4, 3, 3), torch.ones(4)
    assert launched(cuda.rk_sum, [x, x], [1.0, 1.0], [None, c], c, False, True, False, True) == 1
    assert launched(cuda.rk_sum, [x, x], [1.0, 1.0], [None, c], c, False, True, True, True) == 2
    assert launched(cuda.rk_sum_backward, x, None, [1.0], [c], [x], [1.0], [False], True, False) == 2
    assert launched(cuda.bn_rk_sum, x, c, c, c, c, [x], [1.0], None, False, True, EPS, False, False) == 1
    assert launched(cuda.bn_rk_sum, x, c, c, None, None, [x], [1.0], None, False, True, EPS, False, False) == 3
    norm = (x, x, c, c, c, c, None, None, [1.0], False, False)
    assert launched(cuda.bn_rk_sum_backward, *norm, True, EPS, True, True, False) == 3
    assert launched(cuda.bn_rk_sum_backward, *norm, False, EPS, True, True, False) == 2
    assert launched(cuda.bn_rk_sum_backward, *norm, False, EPS, True, False, False) == 1
    stats = [[torch.zeros(4) for _ in range(9)] for _ in range(2)]
    assert launched(cuda.update_running_stats, c, c, 8, *stats, [], 0.1) == 1


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_running_stats(cuda: Any, dtype: torch.dtype, momentum: float | None) -> None:
    make = Maker((1, 300), torch.float32)
    mean, var = make.channels(), make.channels().abs()
    sizes = [300, 7, 0] + [11] * 40  # more than one launch holds
    running = [[torch.randn(s).to(dtype) for s in sizes] for _ in range(2)]
    running[0][1] = torch.randn(14).to(dtype)[::2]
    counters = [torch.tensor(i) for i in range(len(sizes))]
    for count in (5, 1, 0):
        expected = [[t.clone() for t in each] for each in (*running, counters)]
        truth = [[wide(t.clone()) for t in each] for each in (*running, counters)]
        channel_moments.update_running_stats(mean, var, count, *expected, momentum)
        channel_moments.update_running_stats(mean.double(), var.double(), count, *truth, momentum)
        cuda.update_running_stats(mean, var, count, *running, counters, momentum)
        assert torch.equal(torch.stack(counters), torch.stack(expected[2]))
        for found, eager, true in zip(running, expected[:2], truth[:2], strict=True):
            for f, e, t in zip(found, eager, true, strict=True):
                close(f, e, t, f"count {count}")
    only = [torch.tensor(3)]
    cuda.update_running_stats(mean, var, 5, [], [], only, momentum)
    assert only[0] == 4
    if momentum is not None:
        cuda.update_running_stats(mean, var, 5, running[0], running[1], [], momentum)


def test_offsets_beyond_32_bits(cuda: Any) -> None:
    pitch = 2**32 + 16
    flags = (
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    )  # only what is touched exists
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (pitch + 64), flags=flags), dtype=torch.bfloat16)
    x = memory.as_strided((2, 3, 16), (pitch, 16, 1)).copy_(torch.randn(2, 3, 16))
    found = cuda.rk_sum([x, x], [1.0, 0.5], [torch.ones(3), None], None, False, False, True, False)
    torch.testing.assert_close(found[0], (1.5 * x.float()).bfloat16(), rtol=2**-7, atol=0)
    check_moments(found[1:], found[0])
    x = memory.as_strided((1, 16, 2), (2 * pitch, 1, pitch)).copy_(torch.randn(1, 16, 2))
    check_moments(cuda.channel_moments(x, True), x)


def test_bad_arguments(cuda: Any) -> None:
    x = torch.randn(2, 3, 4, 4)
    good = ([x, x], [1.0, 1.0], [None, None])
    tail = (None, False, False, False, False)
    for terms, coeffs, steps, error in (
        ([x, x[:1]], *good[1:], ValueError),
        ([x, x.double()], *good[1:], TypeError),
        (good[0], [1.0], good[2], ValueError),
        ([], [], [], ValueError),
        ([x] * 17, [1.0] * 17, [None] * 17, ValueError),
        (*good[:2], [torch.ones(4), None], ValueError),
        ([x.long()], [1.0], [None], TypeError),
    ):
        with pytest.raises(error):
            cuda.rk_sum(terms, coeffs, steps, *tail)
    for out in (torch.empty(2, 3, 4, 8)[..., ::2], torch.empty(2, 4, 4, 4), torch.empty_like(x, dtype=torch.float64)):
        with pytest.raises((ValueError, TypeError), match="out"):
            cuda.rk_sum(*good, *tail, out)
