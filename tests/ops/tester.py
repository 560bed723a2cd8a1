"""The questions that every op must answer. A subclass says how to call the op and what a user would write instead.

Truth is the user's expression in float64 on the same stored values. An op may be at most twice as far from it as the
same expression in the op's own dtype, plus the rounding of the result.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rkfast import dispatch, native
from rkfast.ops import layout

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "slice", "channels_last_slice", "mixed", "permuted")
SHAPES = (
    (2, 5, 4, 3),
    (3, 16, 7, 9),
    (4, 6, 11),
    (2, 3, 3, 4, 5),
    (5, 7),
    (2, 1, 5, 5),
    (3, 4, 1, 1),
    (1, 9, 2, 2),
    (2, 40, 1, 67),
    (0, 5, 4, 4),
    (2, 5, 0, 3),
)
LARGE = (4, 40, 33, 31)  # more than one unit of work in every backend


def _targets() -> list[tuple[str, str]]:
    """(backend, device) pairs that this machine can ask."""
    pairs = [("reference", "cpu")]
    if native.cpu_reason() is None:
        pairs.append(("cpu", "cpu"))
    if torch.cuda.is_available():
        pairs.append(("reference", "cuda"))
        pairs += [(b, "cuda") for b in ("cuda", "triton") if dispatch.backend_reason(b, "cuda") is None]
    elif native.triton_interprets():
        pairs.append(("triton", "cpu"))
    wanted = os.environ.get("RKFAST_TEST_BACKENDS")
    return [p for p in pairs if wanted is None or p[0] in wanted.split(",")]


TARGETS = _targets()
CPU_BACKENDS = [backend for backend, device in TARGETS if device == "cpu" and backend != "triton"]


def lay(values: Tensor, how: str, index: int, device: str) -> Tensor:
    """values [N, C, ...] laid out as a test asks; ``index`` tells the inputs of one call apart."""
    if how == "mixed":
        how = ("channels_last", "contiguous", "slice")[index % 3]
    n, c, *spatial = values.shape
    if how == "permuted":
        # Spatial positions innermost but in another order, and no dense row anywhere.
        wide = torch.zeros(c, *[s + 1 for s in reversed(spatial)], n + 1, dtype=values.dtype, device=device)
        view = wide.permute(wide.dim() - 1, 0, *range(wide.dim() - 2, 0, -1))
        view = view[(slice(0, n), slice(0, c), *(slice(0, s) for s in spatial))]
    else:
        channels_last = how.startswith("channels_last")
        extra = 5 if how.endswith("slice") else 0
        shape = (n, c + extra, *spatial)
        view = torch.empty_strided(shape, layout.strides(shape, channels_last), dtype=values.dtype, device=device)
        view = view.fill_(float("nan"))[:, extra // 2 : extra // 2 + c]
    assert view.shape == values.shape
    return view.copy_(values)


class Inputs:
    """Tensors of one call by name; lists stay lists."""

    def __init__(self, **tensors: Any) -> None:
        for name, value in tensors.items():  # an update of __dict__ is not traced by every torch.compile
            setattr(self, name, value)

    def map(self, f: Callable[[str, Tensor], Tensor]) -> Inputs:
        def each(name: str, v: Any) -> Any:
            if isinstance(v, Tensor):
                return f(name, v)
            return [each(f"{name}[{i}]", t) for i, t in enumerate(v)] if isinstance(v, list) else v

        return Inputs(**{name: each(name, v) for name, v in self.__dict__.items()})

    def named(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        self.map(lambda name, t: found.setdefault(name, t))
        return found

    def leaves(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.named().items() if t.requires_grad}


def error(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """(root mean square, maximum) distance from the truth."""
    if truth.numel() == 0:
        return 0.0, 0.0
    gap = (found.detach().double().cpu() - truth.detach().double().cpu()).abs()
    return gap.square().mean().sqrt().item(), gap.max().item()


def assert_as_good_as(ours: Tensor, eager: Tensor, truth: Tensor, what: str) -> None:
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    size = truth.abs().max().item() if truth.numel() else 0.0
    # In float64 the truth has errors of its own.
    rounding = torch.finfo(ours.dtype).eps * size * (32 if ours.dtype == torch.float64 else 1)
    (ours_rms, ours_max), (eager_rms, eager_max) = error(ours, truth), error(eager, truth)
    assert ours_rms <= 2 * eager_rms + rounding, (
        f"{what}: rms error {ours_rms:.3e}, eager's {eager_rms:.3e}, one rounding {rounding:.3e}"
    )
    # The worst element of a few is a matter of luck: that of one more sum, product, mean and result is allowed.
    assert ours_max <= 2 * eager_max + 4 * rounding, (
        f"{what}: maximal error {ours_max:.3e}, eager's {eager_max:.3e}, one rounding {rounding:.3e}"
    )


def assert_gradients_as_good_as(
    ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor], roundings: int = 4
) -> None:
    """Of a deep op, whose many gradients differ by luck: all of them together at most twice as far off as eager's, and
    none far off. Tensors by the same names."""

    def gaps(found: dict[str, Tensor]) -> dict[str, float]:
        sizes = {name: t.double().square().mean().sqrt().item() for name, t in truth.items()}
        return {name: error(found[name], t)[0] / (sizes[name] or 1.0) for name, t in truth.items()}

    own, theirs = gaps(ours), gaps(eager)
    eps = max(torch.finfo(t.dtype).eps for t in ours.values())
    assert all(t.shape == truth[name].shape and torch.isfinite(t).all() for name, t in ours.items())
    # In float64 the truth has errors of its own.
    rounding = eps * (32 if eps < 1e-12 else 1)
    mean, allowed = sum(own.values()) / len(own), 2 * sum(theirs.values()) / len(theirs) + rounding
    assert mean <= allowed, f"mean error of the gradients {mean:.3e}, allowed {allowed:.3e}"
    for name, gap in own.items():
        limit = 8 * max(theirs[name], allowed) + roundings * eps
        assert gap <= limit, f"{name}: error {gap:.3e}, eager's {theirs[name]:.3e}"


class OpTester:
    """Subclass it and name: OPS, the forward and backward op; CASES; and the three methods below."""

    OPS: tuple[str, str]
    CASES: dict[str, dict[str, Any]]

    def inputs(self, case: dict[str, Any], shape: tuple[int, ...]) -> Inputs:
        """Float64 values on the CPU; activations and vectors alike."""
        raise NotImplementedError

    def ours(self, case: dict[str, Any], x: Inputs) -> Tensor:
        raise NotImplementedError

    def eager(self, case: dict[str, Any], x: Inputs) -> Tensor:
        raise NotImplementedError

    # Names of activations; the rest are vectors per channel.
    ACTIVATIONS: tuple[str, ...] = ("x", "terms")

    def prepared(
        self,
        case: dict[str, Any],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        how: str = "contiguous",
        device: str = "cpu",
        seed: int = 0,
    ) -> Inputs:
        torch.manual_seed(seed)
        index = iter(range(100))

        def each(name: str, values: Tensor) -> Tensor:
            if not values.is_floating_point():
                return values.to(device)
            if name.split("[")[0] in self.ACTIVATIONS:
                return lay(values.to(dtype), how, next(index), device).requires_grad_()
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            # Buffers carry no gradient.
            return values.to(device, wide).requires_grad_(not name.startswith("running"))

        return self.inputs(case, shape).map(each)

    def evaluate(self, f: Callable[[Inputs], Tensor], x: Inputs, grad: Tensor) -> dict[str, Tensor]:
        """Result, gradients and buffers after one forward and backward; a smaller result takes a part of grad."""
        buffers = {n: t for n, t in x.named().items() if not t.requires_grad}
        out = f(x)
        grad = grad[tuple(map(slice, out.shape))]
        leaves = x.leaves()
        grads = torch.autograd.grad(out, list(leaves.values()), grad.to(out.device, out.dtype), allow_unused=True)
        result = {"result": out.detach()}
        result.update({f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True) if g is not None})
        result.update({n: t.clone() for n, t in buffers.items() if t.is_floating_point()})
        return result

    def check(
        self,
        case: dict[str, Any],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        how: str,
        target: tuple[str, str],
        seeds: int = 1,
    ) -> None:
        """Errors are pooled over the seeds: of a handful of numbers eager may be right to the last bit by luck."""
        pooled = [self.compare(case, shape, dtype, how, target, seed) for seed in range(seeds)]
        for name in pooled[0]:
            ours, eager, truth = (torch.stack([p[name][k].cpu() for p in pooled]) for k in range(3))
            assert_as_good_as(ours, eager, truth, name)

    def compare(
        self,
        case: dict[str, Any],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        how: str,
        target: tuple[str, str],
        seed: int,
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """(ours, eager's, truth) of the result, every gradient and every buffer."""
        backend, device = target
        x = self.prepared(case, shape, dtype, how, device, seed)
        grad = torch.randn(shape, dtype=torch.float64).to(dtype)

        def copy(to: torch.dtype | None) -> Inputs:
            return x.map(
                lambda _, t: (
                    t.detach().clone().to(to or t.dtype).requires_grad_(t.requires_grad)
                    if t.is_floating_point()
                    else t.clone()
                )
            )

        truth = self.evaluate(lambda i: self.eager(case, i), copy(torch.float64), grad)
        eager = self.evaluate(lambda i: self.eager(case, i), copy(None), grad)
        before = {n: (t._version, t.detach().clone()) for n, t in x.leaves().items()}
        kept_grad = grad.clone()
        served = dispatch.served()
        with dispatch.use(backend):
            ours = self.evaluate(lambda i: self.ours(case, i), x, grad)
        calls = dispatch.served() - served
        assert all(b == backend for _, b in calls), f"served by {dict(calls)}, asked for {backend}"
        for op in self.OPS:
            assert calls[op, backend] >= 1, f"{op} was not served by {backend}: {dict(calls)}"
        assert ours.keys() == truth.keys()
        assert ours["result"].dtype == dtype
        for name, (version, values) in before.items():
            t = x.leaves()[name]
            assert t._version == version and torch.equal(t, values), f"{name} was modified"
        assert torch.equal(grad, kept_grad), "the incoming gradient was modified"
        return {name: (ours[name], eager[name], truth[name]) for name in truth}

    # -- values ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("how", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes_and_layouts(
        self, case: dict[str, Any], dtype: torch.dtype, how: str, target: tuple[str, str]
    ) -> None:
        self.check(case, (3, 20, 7, 9), dtype, how, target)

    @pytest.mark.parametrize("how", ("contiguous", "channels_last", "channels_last_slice"))
    @pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
    def test_shapes(self, case: dict[str, Any], shape: tuple[int, ...], how: str, target: tuple[str, str]) -> None:
        self.check(case, shape, torch.float32, how, target, seeds=4 if target != ("triton", "cpu") else 2)

    @pytest.mark.parametrize("how", ("contiguous", "channels_last", "slice", "channels_last_slice"))
    def test_large(self, case: dict[str, Any], how: str, target: tuple[str, str]) -> None:
        if target[0] == "triton" and target[1] == "cpu":
            pytest.skip("Triton's interpreter takes minutes at this size")
        for dtype in (torch.float32, torch.bfloat16):
            self.check(case, LARGE, dtype, how, target)

    def test_memory_format_is_kept(self, case: dict[str, Any], target: tuple[str, str]) -> None:
        for how, format in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
            x = self.prepared(case, (2, 6, 5, 4), torch.float32, how, target[1])
            with dispatch.use(target[0]):
                out = self.ours(case, x)
                grads = torch.autograd.grad(out.sum(), [t for t in x.leaves().values() if t.dim() == 4])
            assert out.is_contiguous(memory_format=format)
            for g in grads:
                assert g.is_contiguous(memory_format=format) or g.stride() == (0, 0, 0, 0)

    def test_nan_and_inf(self, case: dict[str, Any], target: tuple[str, str]) -> None:
        """What is not finite lands where eager has it, and nowhere else."""
        for dtype in (torch.float32, torch.bfloat16):
            x = self.prepared(case, (3, 8, 6, 5), dtype, "channels_last", target[1])
            for t in x.named().values():
                if t.dim() == 4:
                    with torch.no_grad():
                        t[0, 1, 2, 3] = float("nan")
                        t[1, 3, 0, 0] = float("inf")
                        t[2, 3, 0, 1] = float("-inf")
                        t[2, 5, 0, 1] = float("-inf")
            grad = torch.ones(3, 8, 6, 5)
            with dispatch.use(target[0]):
                ours = self.evaluate(lambda i: self.ours(case, i), self._clone(x), grad)
            eager = self.evaluate(lambda i: self.eager(case, i), self._clone(x), grad)
            for name in eager:
                assert torch.equal(torch.isfinite(ours[name]), torch.isfinite(eager[name])), name
            assert torch.equal(torch.isnan(ours["result"]), torch.isnan(eager["result"]))

    @staticmethod
    def _clone(x: Inputs) -> Inputs:
        return x.map(lambda _, t: t.detach().clone().requires_grad_(t.requires_grad))

    # -- derivatives -------------------------------------------------------------------------------------------------

    def test_gradcheck(self, case: dict[str, Any], target: tuple[str, str]) -> None:
        for how in ("contiguous", "channels_last_slice"):
            x = self.prepared(case, (2, 3, 3, 2), torch.float64, how, target[1])
            names = list(x.leaves())

            def f(*values: Tensor, x: Inputs = x, names: list[str] = names) -> Tensor:
                given = dict(zip(names, values, strict=True))
                return self.ours(case, x.map(lambda n, t: given.get(n, t.clone())))

            with dispatch.use(target[0]):
                assert torch.autograd.gradcheck(f, tuple(x.leaves().values()))
                if how == "contiguous":  # it is computed by plain PyTorch
                    assert torch.autograd.gradgradcheck(f, tuple(x.leaves().values()), fast_mode=True)

    def test_gradients_only_where_needed(self, case: dict[str, Any], target: tuple[str, str]) -> None:
        x = self.prepared(case, (2, 4, 3, 5), torch.float32, "channels_last", target[1])
        with dispatch.use(target[0]):
            every = self.evaluate(lambda i: self.ours(case, i), self._clone(x), torch.ones(2, 4, 3, 5))
            for name in x.leaves():
                alone = x.map(lambda n, t, name=name: t.detach().clone().requires_grad_(n == name))
                g = torch.autograd.grad(self.ours(case, alone).sum(), alone.leaves()[name])[0]
                torch.testing.assert_close(g, every[f"gradient of {name}"], msg=name)

    def test_two_forwards_before_their_backwards(self, case: dict[str, Any], target: tuple[str, str]) -> None:
        with dispatch.use(target[0]):
            xs = [self.prepared(case, (2, 4, 3, 5), torch.float32, "channels_last", target[1], seed) for seed in (1, 2)]
            alone = [self.evaluate(lambda i: self.ours(case, i), self._clone(x), torch.ones(2, 4, 3, 5)) for x in xs]
            outs = [self.ours(case, x) for x in xs]
            for x, out, want in reversed(list(zip(xs, outs, alone, strict=True))):
                grads = torch.autograd.grad(out, list(x.leaves().values()), torch.ones_like(out))
                for name, g in zip(x.leaves(), grads, strict=True):
                    assert torch.equal(g, want[f"gradient of {name}"]), name

    def test_backward_twice(self, case: dict[str, Any], target: tuple[str, str]) -> None:
        x = self.prepared(case, (2, 4, 3, 5), torch.float32, "channels_last", target[1])
        with dispatch.use(target[0]):
            out = self.ours(case, x)
            leaves = list(x.leaves().values())
            first = [g.clone() for g in torch.autograd.grad(out.sum(), leaves, retain_graph=True)]
            second = torch.autograd.grad(out.sum(), leaves)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)

    def test_in_place_relu_on_the_result(self, case: dict[str, Any], target: tuple[str, str]) -> None:
        x = self.prepared(case, (2, 4, 3, 5), torch.float32, "contiguous", target[1])
        with dispatch.use(target[0]):
            ours = self.evaluate(lambda i: self.ours(case, i).relu_(), self._clone(x), torch.ones(2, 4, 3, 5))
            apart = self.evaluate(lambda i: self.ours(case, i).relu(), self._clone(x), torch.ones(2, 4, 3, 5))
        for name in apart:
            assert torch.equal(ours[name], apart[name]), name

    # -- the world around --------------------------------------------------------------------------------------------

    def test_repeats_to_the_bit(self, case: dict[str, Any], target: tuple[str, str]) -> None:
        """Run to run, whatever the number of threads, and with uninitialised memory filled with NaN."""
        how = "channels_last"
        shape = LARGE if target != ("triton", "cpu") else (3, 20, 7, 9)
        x = self.prepared(case, shape, torch.float32, how, target[1])
        grad = torch.randn(shape)
        threads = torch.get_num_threads()
        results = []
        try:
            for n, deterministic in ((1, False), (2, False), (2, True)):
                torch.set_num_threads(n)
                torch.use_deterministic_algorithms(deterministic)
                with dispatch.use(target[0]):
                    results.append(self.evaluate(lambda i: self.ours(case, i), self._clone(x), grad))
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_num_threads(threads)
        if target[0] == "reference":  # plain PyTorch promises nothing across thread counts
            results = results[1:]
        for other in results[1:]:
            for name, value in results[0].items():
                assert torch.equal(value, other[name]), name

    def test_from_several_threads(self, case: dict[str, Any], target: tuple[str, str]) -> None:
        shape = (2, 8, 6, 5)
        xs = [self.prepared(case, shape, torch.float32, "channels_last", target[1], seed) for seed in range(4)]
        with dispatch.use(target[0]):
            want = [self.evaluate(lambda i: self.ours(case, i), self._clone(x), torch.ones(shape)) for x in xs]
            found: list[Any] = [None] * len(xs)

            def work(i: int) -> None:
                for _ in range(5):
                    found[i] = self.evaluate(lambda v: self.ours(case, v), self._clone(xs[i]), torch.ones(shape))

            threads = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
        for a, b in zip(want, found, strict=True):
            for name in a:
                assert torch.equal(a[name], b[name]), name

    def test_compile_fullgraph(self, case: dict[str, Any], target: tuple[str, str]) -> None:
        if target == ("triton", "cpu"):
            pytest.skip("Inductor and Triton's interpreter exclude each other")
        with dispatch.use(target[0]):
            torch._dynamo.reset()
            compiled = torch.compile(lambda i: self.ours(case, Inputs(**i)), fullgraph=True, backend="aot_eager")
            for shape in ((2, 4, 3, 5), (3, 4, 6, 5), (4, 4, 7, 5)):  # the second and third recompile with symbols
                x = self.prepared(case, shape, torch.float32, "channels_last", target[1])
                served = dispatch.served()
                ours = self.evaluate(lambda i: compiled(vars(i)), self._clone(x), torch.ones(shape))
                calls = dispatch.served() - served
                for op in self.OPS:
                    assert calls[op, target[0]] >= 1, f"{op} was traced away: {dict(calls)}"
                want = self.evaluate(lambda i: self.ours(case, i), self._clone(x), torch.ones(shape))
                for name in want:
                    torch.testing.assert_close(ours[name], want[name], msg=name)

    def test_autocast(self, case: dict[str, Any], target: tuple[str, str]) -> None:
        """Under autocast an op computes in the dtype it is given: eager's sums and norms do the same."""
        x = self.prepared(case, (2, 4, 3, 5), torch.bfloat16, "channels_last", target[1])
        with dispatch.use(target[0]):
            plain = self.ours(case, self._clone(x))
            with torch.autocast(target[1], torch.bfloat16):
                under = self.ours(case, self._clone(x))
        assert under.dtype == torch.bfloat16
        assert torch.equal(plain, under)

    def test_grad_of_an_expanded_gradient(self, case: dict[str, Any], target: tuple[str, str]) -> None:
        x = self.prepared(case, (2, 4, 3, 5), torch.float32, "channels_last", target[1])
        with dispatch.use(target[0]):
            dense = self.evaluate(lambda i: self.ours(case, i), self._clone(x), torch.ones(2, 4, 3, 5))
            leaves = self._clone(x)
            grads = torch.autograd.grad(self.ours(case, leaves).sum(), list(leaves.leaves().values()))  # stride 0
        for name, g in zip(leaves.leaves(), grads, strict=True):
            torch.testing.assert_close(g, dense[f"gradient of {name}"], msg=name)
