from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import rkfast
from rkfast import dispatch, native, ops
from rkfast.ops import layout
from rkfast.ops.rk_sum import reference, shared, shared_sum
from tests.ops.tester import Inputs, OpTester, lay


def case(n: int, steps: str = "", shift: bool = False, relu: bool = False, same: bool = False) -> dict[str, Any]:
    """steps: a letter per term, '-' none, 'c' per channel, 'n' per sample and channel."""
    return {"n": n, "steps": steps or "-" * n, "shift": shift, "relu": relu, "same": same}


def channelwise(v: Tensor, x: Tensor) -> Tensor:
    """v [C] or [N, C] against x [N, C, ...]."""
    return v.reshape(*(v.shape if v.dim() == 2 else (1, *v.shape)), *[1] * (x.dim() - 2))


class TestRkSum(OpTester):
    OPS = ("rk_sum", "rk_sum_backward")
    CASES = {
        "one_term_scaled": case(1),
        "rk4": case(5, same=True),
        "rk4_relu": case(5, relu=True),
        "steps": case(3, "c-c", shift=True, relu=True),
        "gates": case(3, "n-c", relu=True),
        "shift": case(2, shift=True),
        "sixteen": case(16, "-" * 14 + "cn", relu=True),
    }

    def coeffs(self, case: dict[str, Any]) -> list[float]:
        return (
            [[0.5, 1.0, -1 / 3, 1.0, 2.0][j % 5] for j in range(case["n"])] if not case["same"] else [0.5] * case["n"]
        )

    def inputs(self, case: dict[str, Any], shape: tuple[int, ...]) -> Inputs:
        n, c = shape[:2]
        return Inputs(
            terms=[torch.randn(shape, dtype=torch.float64) for _ in range(case["n"])],
            steps=[
                None if s == "-" else torch.randn((c,) if s == "c" else (n, c), dtype=torch.float64)
                for s in case["steps"]
            ],
            shift=torch.randn(c, dtype=torch.float64) if case["shift"] else None,
        )

    def ours(self, case: dict[str, Any], x: Inputs) -> Tensor:
        steps = x.steps if any(s is not None for s in x.steps) else None
        return ops.rk_sum(x.terms, self.coeffs(case), steps=steps, shift=x.shift, relu=case["relu"])

    def eager(self, case: dict[str, Any], x: Inputs) -> Tensor:
        total = 0
        for term, c, step in zip(x.terms, self.coeffs(case), x.steps, strict=True):
            scaled = c * term if step is None else c * (channelwise(step, term).to(term.dtype) * term)
            total = total + scaled
        if x.shift is not None:
            total = total + channelwise(x.shift, x.terms[0]).to(total.dtype)
        return torch.relu(total) if case["relu"] else total


def terms(n: int, shape: tuple[int, ...] = (2, 6, 4, 5), **options: Any) -> list[Tensor]:
    return [torch.randn(shape, **options) for _ in range(n)]


@pytest.mark.parametrize("how", ("contiguous", "channels_last", "slice", "channels_last_slice"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_moments_are_those_of_the_stored_result(dtype: torch.dtype, how: str, target: tuple[str, str]) -> None:
    backend, device = target
    ts = [lay((torch.randn(3, 20, 9, 11) * 0.1 + 100).to(dtype), how, 0, device) for _ in range(2)]
    with dispatch.use(backend):
        out, moments = ops.rk_sum(ts, [1.0, 1 / 3], relu=True, return_moments=True)
    var, mean = torch.var_mean(out.double(), (0, 2, 3), correction=0)
    assert moments.count == 3 * 9 * 11
    assert moments.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(moments.mean.double(), mean, rtol=tolerance, atol=0)
    torch.testing.assert_close(
        moments.var.double(), var, rtol=max(tolerance, 1e-5 if device == "cuda" else 2e-6), atol=0
    )


@pytest.mark.parametrize("channels_last", (False, True))
def test_slot_of_a_buffer(channels_last: bool, target: tuple[str, str]) -> None:
    backend, device = target
    shape = (2, 20, 4, 5)
    buffer = torch.empty_strided(shape, layout.strides(shape, channels_last), device=device).normal_()
    before = buffer.clone()
    slots = [buffer[:, 0:6], buffer[:, 6:12]]
    with dispatch.use(backend):
        out, moments = ops.rk_sum(slots, [1.0, 0.5], relu=True, return_moments=True, out=buffer[:, 12:18])
        assert out.data_ptr() == buffer[:, 12:18].data_ptr()
        want = torch.relu(before[:, 0:6] + 0.5 * before[:, 6:12])
        torch.testing.assert_close(buffer[:, 12:18], want)
        torch.testing.assert_close(moments.mean, want.mean((0, 2, 3)))
        assert torch.equal(buffer[:, :12], before[:, :12]) and torch.equal(buffer[:, 18:], before[:, 18:])
        ops.rk_sum([slots[0], slots[1]], [1.0, 1.0], out=slots[0])  # in place: the same slice
        torch.testing.assert_close(buffer[:, 0:6], before[:, 0:6] + before[:, 6:12])


def test_out_is_refused_where_it_cannot_be_written() -> None:
    ts = terms(2)
    buffer = torch.zeros(2, 12, 4, 5)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "overlaps", dict(terms=[buffer[:, 0:6], ts[0]], out=buffer[:, 3:9])),
        (ValueError, "shape", dict(terms=ts, out=torch.empty(2, 5, 4, 5))),
        (TypeError, "dtype", dict(terms=ts, out=torch.empty(2, 6, 4, 5, dtype=torch.float64))),
        (ValueError, "strides", dict(terms=ts, out=torch.empty(2, 6, 4, 10)[..., ::2])),
        (TypeError, "Tensor", dict(terms=ts, out=[1])),
        (RuntimeError, "requires grad", dict(terms=ts, out=torch.empty(2, 6, 4, 5, requires_grad=True))),
        (
            RuntimeError,
            "requires grad",
            dict(terms=[t.requires_grad_() for t in terms(2)], out=torch.empty(2, 6, 4, 5)),
        ),
    ]
    for kind, words, arguments in cases:
        with pytest.raises(kind, match=f"(?s)out: .*{words}"):
            ops.rk_sum(coeffs=[1.0, 1.0], **arguments)
    assert not buffer.any()


def test_bad_input_is_named() -> None:
    a, b = terms(2)
    cases: list[tuple[type[Exception], str, Any, Any, dict[str, Any]]] = [
        (ValueError, "terms: ", [], [], {}),
        (ValueError, "terms: ", [a] * 17, [1.0] * 17, {}),
        (TypeError, "terms: ", a, [1.0], {}),
        (TypeError, r"terms\[0\]: ", [None], [1.0], {}),
        (TypeError, r"terms\[1\]: ", [a, 3.0], [1.0, 1.0], {}),
        (TypeError, r"terms\[0\]: .*int64", [a.long()], [1.0], {}),
        (TypeError, r"terms\[0\]: .*complex", [a.to(torch.complex64)], [1.0], {}),
        (TypeError, r"terms\[0\]: .*sparse", [a.to_sparse()], [1.0], {}),
        (TypeError, r"terms\[1\]: dtype", [a, b.double()], [1.0, 1.0], {}),
        (ValueError, r"terms\[1\]: shape", [a, b[:1]], [1.0, 1.0], {}),
        (ValueError, r"terms\[1\]: device", [a, b.to("meta")], [1.0, 1.0], {}),
        (ValueError, r"terms\[0\]: .*dimensions", [a[0, 0, 0]], [1.0], {}),
        (ValueError, r"terms\[0\]: .*dimensions", [a[None, None]], [1.0], {}),
        (ValueError, "coeffs: ", [a, b], [1.0], {}),
        (TypeError, "coeffs: ", [a, b], [1.0, "x"], {}),
        (TypeError, "coeffs: ", [a, b], None, {}),
        (TypeError, "coeffs: .*`steps`", [a, b], [1.0, torch.ones((), requires_grad=True)], {}),
        (TypeError, "coeffs: ", [a, b], "12", {}),
        (ValueError, "coeffs: ", [a, b], [1.0, 10**400], {}),
        (TypeError, "steps: ", [a, b], [1.0, 1.0], dict(steps=torch.ones(2, 6))),
        (TypeError, "steps: ", [a, b], [1.0, 1.0], dict(steps=3)),
        (TypeError, "relu: ", [a, b], [1.0, 1.0], dict(relu="no")),
        (TypeError, "return_moments: ", [a, b], [1.0, 1.0], dict(return_moments=1)),
        (ValueError, "steps: ", [a, b], [1.0, 1.0], dict(steps=[None])),
        (ValueError, r"steps\[1\]: shape", [a, b], [1.0, 1.0], dict(steps=[None, torch.ones(5)])),
        (TypeError, r"steps\[0\]: ", [a, b], [1.0, 1.0], dict(steps=[torch.ones(6).long(), None])),
        (ValueError, r"steps\[0\]: shape", [a, b], [1.0, 1.0], dict(steps=[torch.ones(6, 2), None])),
        (ValueError, "shift: shape", [a, b], [1.0, 1.0], dict(shift=torch.ones(2, 6))),
        (ValueError, "shift: device", [a, b], [1.0, 1.0], dict(shift=torch.ones(6, device="meta"))),
    ]
    for kind, words, ts, coeffs, options in cases:
        with pytest.raises(kind, match=words):
            ops.rk_sum(ts, coeffs, **options)


@pytest.mark.parametrize("positions", ((1, 1, 2), (2, 5, 4), (4, 8, 8)))
def test_bits_of_rows_that_do_not_fill_their_bytes(positions: tuple[int, int, int], target: tuple[str, str]) -> None:
    backend, device = target
    n, h, w = positions
    channels = (*range(1, 41), 47, 130, 255) if target != ("triton", "cpu") else (3, 5, 36)
    for c in channels:
        torch.manual_seed(c)
        x, grad = (torch.randn(n, c, h, w, device=device).to(memory_format=torch.channels_last) for _ in range(2))
        channels_last = layout.is_channels_last(x)
        with dispatch.use(backend):
            _, mask = torch.ops.rkfast.rk_sum([x], [1.0], [None], None, channels_last, True, False, True)
            args = [2.0], [None], [], [], [], True, channels_last
            dx, shift = torch.ops.rkfast.rk_sum_backward(grad, mask, *args)
        assert torch.equal(mask, reference.pack(x > 0, channels_last))
        kept = grad * (x > 0)
        assert torch.equal(dx, 2 * kept)
        torch.testing.assert_close(shift, kept.sum((0, 2, 3)))


def test_opcheck(target: tuple[str, str]) -> None:
    backend, device = target
    if backend == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter cannot be traced")
    n, c = 2, 6
    options = {"device": device}
    for channels_last in (False, True):
        ts = [lay(t, "channels_last" if channels_last else "slice", 0, device) for t in terms(3)]
        steps = [torch.randn(c, **options), None, torch.randn(n, c, **options)]
        shift = torch.randn(c, **options)
        common = (ts, [1.0, 0.5, 2.0], steps, shift, channels_last, True, True)
        mask = torch.randint(0, 256, layout.mask_shape(ts[0], channels_last), dtype=torch.uint8, device=device)
        with dispatch.use(backend):
            torch.library.opcheck(torch.ops.rkfast.rk_sum.default, (*common, True))
            torch.library.opcheck(torch.ops.rkfast.rk_sum_out.default, (*common, torch.empty_like(ts[0])))
            torch.library.opcheck(
                torch.ops.rkfast.rk_sum_backward.default,
                (ts[0], mask, [1.0, 0.5], steps[:2], ts[1:], [0.5, 2.0], [True, False], True, channels_last),
            )


def test_compiled_by_inductor_and_exported() -> None:
    class Sum(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return ops.rk_sum([a, b.sin()], [1.0, 0.5], relu=True).cos()

    a, b = terms(2)
    want = Sum()(a, b)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(Sum(), fullgraph=True)(a, b), want)
    exported = torch.export.export(Sum(), (a, b), dynamic_shapes=({0: torch.export.Dim("batch")},) * 2)
    assert "rkfast.rk_sum" in str(exported.graph)
    torch.testing.assert_close(exported.module()(a, b), want)
    c, d = terms(2, (5, 6, 4, 5))
    torch.testing.assert_close(exported.module()(c, d), Sum()(c, d))


def test_function_transforms_take_the_reference() -> None:
    a, b = terms(2)
    grad = torch.func.grad(lambda a: ops.rk_sum([a, b], [2.0, 1.0], relu=True).sum())(a)
    torch.testing.assert_close(grad, 2.0 * ((2 * a + b) > 0))
    torch.testing.assert_close(
        torch.vmap(lambda a, b: ops.rk_sum([a, b], [2.0, 1.0]))(torch.stack([a, b]), torch.stack([b, a])),
        torch.stack([2 * a + b, 2 * b + a]),
    )


def test_autocast_promotes_mixed_dtypes() -> None:
    a, b = terms(2)
    with pytest.raises(TypeError, match="dtype"):
        ops.rk_sum([a, b.bfloat16()], [1.0, 1.0])
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.rk_sum([a.bfloat16(), b], [1.0, 1.0])
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, a.bfloat16().float() + b)


def test_shared_gradients() -> None:
    """Terms with the same coefficient share a gradient, a unit coefficient passes it on; leaves still own theirs."""
    ts = [t.requires_grad_() for t in terms(4)]
    ops.rk_sum(ts, [1.0, 1.0, 0.5, 0.5]).sum().backward()
    with torch.no_grad():
        for t in ts:
            t.grad.add_(1.0)  # type: ignore[union-attr]
    for t, want in zip(ts, (2.0, 2.0, 1.5, 1.5), strict=True):
        assert t.grad is not None and torch.equal(t.grad, torch.full_like(t, want))
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.rk_sum([x, x, x], [1.0, 0.5, 0.5]).sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, 2.0))


def test_shared_terms() -> None:
    """Sums of shared terms have the gradients of sums, however many there are, and also where one of them is not used
    or differentiated again; each term adds up its own in one pass for each 16 sums."""
    n = 20
    coeffs = [(1.0, 0.5 - 0.1 * i) for i in range(n)]
    leaves = [torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    factors = torch.randn(n, dtype=torch.float64)

    def readers(y: Tensor, k: Tensor, share: bool) -> Tensor:
        ks = shared(k, [c for _, c in coeffs]) if share else (k,) * n
        ys = shared(y, [1.0] * n) if share else (y,) * n
        found = []
        for i, (terms_, c) in enumerate(zip(zip(ys, ks, strict=True), coeffs, strict=True)):
            relu = i % 2 == 0
            found.append(
                shared_sum(terms_, c, relu=relu, return_moments=False) if share else ops.rk_sum(terms_, c, relu=relu)
            )
        return sum(f * t.square() for f, t in zip(factors[1:], found[1:], strict=True))  # type: ignore[return-value]

    expected = torch.autograd.grad(readers(*leaves, share=False).sum(), leaves)
    total = readers(*leaves, share=True).sum()
    before = dispatch.served()
    found = torch.autograd.grad(total, leaves)
    assert sum(n for (op, _), n in (dispatch.served() - before).items() if op == "rk_sum") == 2 * 2
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda *ts: readers(*ts, share=True), leaves)
    assert torch.autograd.gradgradcheck(lambda *ts: readers(*ts, share=True), leaves)


def test_saves_nothing_where_nothing_is_needed() -> None:
    ts = [t.requires_grad_() for t in terms(4)]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.rk_sum(ts, [1.0, 0.5, 0.25, 1.0])
        assert not saved
        ops.rk_sum(ts, [1.0, 0.5, 0.25, 1.0], relu=True)
        assert [t.dtype for t in saved] == [torch.uint8]
        assert saved[0].shape == (2 * 6, (4 * 5 + 7) // 8)


def test_a_thread_ends_its_own_choice_and_no_other() -> None:
    first, second = dispatch.use("cpu"), dispatch.use("reference")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert dispatch.forced() == "reference"
    second.__exit__(None, None, None)
    assert dispatch.forced() is None


def test_explicit_choice_raises_its_reason() -> None:
    a, b = terms(2)
    with dispatch.use("cuda"), pytest.raises(RuntimeError, match=r"rk_sum: backend 'cuda' was asked for .* cpu"):
        ops.rk_sum([a, b], [1.0, 1.0])
    with pytest.raises(ValueError, match="'gpu' is not a backend"), dispatch.use("gpu"):
        pass
    ops.rk_sum([a, b], [1.0, 1.0])
    told = rkfast.explain("rk_sum")
    assert told.startswith("rk_sum: ") and "not cuda: serves CUDA tensors, not cpu ones" in told


def test_lazy_tensors_are_read_by_value_and_never_written() -> None:
    """A negated view and a zero tensor hold other values in memory, or none."""
    a, b = terms(2)
    neg, zero, vector = torch._neg_view(b), torch._efficientzerotensor(a.shape), torch._neg_view(torch.randn(6))
    torch.testing.assert_close(
        ops.rk_sum([a, neg, zero], [1.0, 2.0, 1.0], steps=[vector, None, None], shift=vector),
        a * vector.view(1, 6, 1, 1) - 2 * b + vector.view(1, 6, 1, 1),
    )
    assert not ops.rk_sum([zero], [1.0]).any()
    leaf = a.clone().requires_grad_()
    ops.rk_sum([leaf], [2.0], relu=True).backward(neg)
    torch.testing.assert_close(leaf.grad, -2 * b * (a > 0))
    torch.testing.assert_close(ops.channel_moments(neg).mean, -b.mean((0, 2, 3)))
    for out in (neg, zero):
        with pytest.raises(ValueError, match=r"^out: .*lazily"):
            ops.rk_sum([a], [1.0], out=out)


def test_forward_mode_takes_the_reference() -> None:
    a, b, h, tangent, slope = *terms(2), torch.randn(6), *terms(1), torch.randn(6)
    with forward_ad.dual_level():
        plain = ops.rk_sum([a, b], [2.0, 1.0], shift=h)
        dual = forward_ad.make_dual(a, tangent)
        out = ops.rk_sum([dual, b], [2.0, 1.0], shift=forward_ad.make_dual(h, slope))
        primal, moved = forward_ad.unpack_dual(out)
        torch.testing.assert_close(primal, plain)
        torch.testing.assert_close(moved, 2 * tangent + slope.view(1, 6, 1, 1))
        mean = forward_ad.unpack_dual(ops.channel_moments(dual).mean).tangent
        torch.testing.assert_close(mean, tangent.mean((0, 2, 3)))
        with pytest.raises(RuntimeError, match=r"^out: .*forward-mode"):
            ops.rk_sum([dual, b], [2.0, 1.0], out=torch.empty_like(a))


def test_jit_trace_records_what_is_computed() -> None:
    a, b = terms(2)
    traced = torch.jit.trace(lambda a, b: ops.rk_sum([a, b.sin()], [1.0, 0.5], relu=True), (a, b))
    torch.testing.assert_close(traced(b, a), torch.relu(b + 0.5 * a.sin()))
    moments = torch.jit.trace(lambda a: ops.channel_moments(a)[:2], (a,))
    torch.testing.assert_close(moments(b), tuple(ops.channel_moments(b)[:2]))


def test_out_is_known_to_autograd_as_modified(target: tuple[str, str]) -> None:
    backend, device = target
    a, b = (t.to(device) for t in terms(2))
    leaf = torch.ones_like(a).requires_grad_()
    product = leaf * b  # saves b
    with dispatch.use(backend):
        ops.rk_sum([a], [1.0], out=b[:, :])
        with torch.inference_mode():
            ops.rk_sum([a], [1.0], out=torch.empty_like(a))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("how", ("contiguous", "channels_last"))
def test_a_slot_of_one_channel(how: str, target: tuple[str, str]) -> None:
    backend, device = target
    x, buffer = (lay(torch.randn(2, 8, 4, 5), how, 0, device) for _ in range(2))
    expected = buffer.clone()
    expected[:, 3:4] = 2 * x[:, :1]
    with dispatch.use(backend):
        ops.rk_sum([x[:, :1]], [2.0], out=buffer[:, 3:4])
    torch.testing.assert_close(buffer, expected)


def test_a_slot_under_compile() -> None:
    def write(x: Tensor, buffer: Tensor) -> Tensor:
        ops.rk_sum([x], [2.0], out=buffer[:, 2:8])
        return buffer + 1

    x, buffer = torch.randn(2, 6, 4, 5), torch.zeros(2, 10, 4, 5)
    found = torch.compile(write, fullgraph=True, backend="aot_eager")(x, buffer)
    torch.testing.assert_close(buffer[:, 2:8], 2 * x)
    torch.testing.assert_close(found, buffer + 1)


def test_what_is_no_plain_list_of_tensors() -> None:
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(ops.rk_sum((t for t in (x, x)), iter((1.0, 2.0))), 3 * x)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^coeffs: expected a sequence of floats"):
        ops.rk_sum([x], [torch.ones((), device="meta")])  # type: ignore[list-item]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a prototype
        nested = torch.nested.nested_tensor([x[0], x[1]])
    with pytest.raises(TypeError, match=r"^terms\[0\]: .* got a nested tensor"):
        ops.rk_sum([nested], [1.0])


def test_slots_side_by_side_in_one_sample_and_across_samples() -> None:
    for shape in ((1, 12, 3, 3), (1, 12, 1, 1), (1, 12), (2, 12, 1, 1), (2, 12)):
        buffer = torch.randn(shape)
        want = 2 * buffer[:, 4:8]
        ops.rk_sum([buffer[:, 4:8]], [2.0], out=buffer[:, 0:4])
        assert torch.equal(buffer[:, 0:4], want)
    buffer = torch.randn(4, 6, 3, 3)
    ops.rk_sum([buffer[2:4]], [2.0], out=buffer[0:2])
    assert torch.equal(buffer[0:2], 2 * buffer[2:4])
    with pytest.raises(ValueError, match=r"^out: overlaps"):
        ops.rk_sum([buffer[1:3]], [2.0], out=buffer[0:2])


def test_one_position_a_channel_is_rows_of_channels() -> None:
    """In either layout, so that no row is one element long, nor a byte of the mask one bit."""
    for shape in ((5, 12, 1, 1), (5, 12)):
        x = torch.randn(shape)
        for channels_last in (False, True):
            assert layout.rows(x, channels_last) == (5, 1, 12)
            assert layout.mask_shape(x, channels_last) == (5, 2)
            found = torch.ops.rkfast.rk_sum([x], [1.0], [None], None, channels_last, True, False, True)
            assert found[1].shape == (5, 2)
    wide = torch.randn(5, 30, 1, 1)[:, 3:15]
    assert layout.pitches(wide, False) == layout.pitches(wide, True) == (30, 30)
    assert ops.rk_sum([x.view(5, 12, 1, 1)], [2.0]).stride() == (12, 1, 1, 1)
    for shape in ((33, 1), (40, 1, 1, 1), (64, 2, 1, 1), (7, 3)):  # few channels: rows that are joined
        x, h = torch.randn(shape, requires_grad=True), torch.randn(shape[1], requires_grad=True)
        found = ops.rk_sum([x], [0.5], steps=[h], relu=True)
        want = torch.relu(0.5 * h.view(1, -1, *[1] * (len(shape) - 2)) * x)
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(torch.autograd.grad(found.sum(), (x, h)), torch.autograd.grad(want.sum(), (x, h)))


def test_one_tensor_twice_under_compile() -> None:
    h = torch.randn(6, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return ops.rk_sum([x, x, x.sin()], [1.0, 0.5, 2.0], steps=[h, h, None], relu=True)

    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    want = torch.autograd.grad(f(x).sum(), (x, h))
    torch._dynamo.reset()
    found = torch.autograd.grad(torch.compile(f, fullgraph=True, backend="aot_eager")(x).sum(), (x, h))
    torch.testing.assert_close(found, want)


def test_raw_ops_name_what_does_not_fit() -> None:
    """torch.ops.rkfast, which nobody need call, reads and writes no memory beyond its tensors'."""
    if native.cpu_reason() is not None:
        pytest.skip(native.cpu_reason())
    x = torch.randn(3, 6, 4, 5)
    forward, backward = torch.ops.rkfast.rk_sum, torch.ops.rkfast.rk_sum_backward
    tail = (False, False, False, False)
    for kind, words, args in (
        (ValueError, "^steps: ", ([x], [1.0], [torch.ones(1, 6)], None, *tail)),
        (ValueError, "^steps: ", ([x], [1.0], [torch.ones(1, 6, 1)], None, *tail)),
        (ValueError, "^shift: ", ([x], [1.0], [None], torch.ones(3, 6), *tail)),
        (TypeError, "^shift: ", ([x], [1.0], [None], torch.ones(6).long(), *tail)),
        (ValueError, "meta", ([x], [1.0], [None], torch.ones(6, device="meta"), *tail)),
        (TypeError, "floating-point tensors", ([x.long()], [1.0], [None], None, *tail)),
    ):
        with dispatch.use("cpu"), pytest.raises(kind, match=words):
            forward(*args)
    with dispatch.use("cpu"), pytest.raises(ValueError, match=r"^steps: "):
        backward(x, None, [1.0], [torch.ones(1, 6)], [], [], [], False, False)
    with pytest.raises(ValueError, match=r"^terms: "):
        native.cpu().rk_sum([], [], [], None, *tail)
