"""dense_block beside the block written out with torch.cat, both against float64."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from rkfast import dispatch, native, ops
from rkfast.ops import Norm, dense_block, layout
from tests.ops.tester import LAYOUTS, assert_as_good_as, assert_gradients_as_good_as, lay

SERVED = ("reference", "cpu", "triton")
Target = tuple[str, str]  # backend, device
# (growths, input channels, growth rate, bottleneck, increments of the sum)
SHAPES = {
    "plain": (4, 6, 4, None, None),
    "neck": (4, 6, 4, 8, None),
    "sum": (4, 3, 3, None, 4),
    "neck_sum": (4, 4, 2, 8, 2),
    "wide_neck": (2, 270, 20, 24, None),  # more channels than a tile of the backward takes at once, and odd ones
    "tiles": (2, 18, 17, None, None),  # channels enough for the convolution by tiles
    "odd_neck": (3, 5, 3, 7, None),
    "rows": (2, 8, 8, None, None),  # channels so few that the convolution goes by rows, where they are enough at all
    "rows_neck": (2, 4, 9, 12, None),
}
SHARED = {"shared": (3, 33, 17, 100, None)}  # a bottleneck whose columns several threads share
NORMS = ("batch", "frozen", "bare", "cumulative")
MEMORY = {"plain": ("speed",), "sum": ("speed",), "tiles": ("speed",), "rows": ("speed",)}
# memory, size, whether weights have their outputs last
EVALUATED = (
    *(("speed", (9, 7), False), ("min", (9, 7), False), ("speed", (5, 6), False), ("speed", (5, 6), True)),
    *(("speed", (3, 3), True), ("speed", (2, 9), True)),  # images too small for tiles
)


class Block:
    """Parameters of a block, and the two ways to run it."""

    def __init__(self, shape: str, norms: str = "batch", dtype: torch.dtype = torch.float64) -> None:
        growths, inputs, k, neck, self.sum_of = (SHAPES | SHARED)[shape]
        self.inputs = inputs
        self.channels = inputs if self.sum_of else inputs + growths * k
        self.conv1, self.conv2 = [], []
        self.norm1, self.norm2 = [], []
        for i in range(growths):
            c = inputs + i * k
            self.norm1.append(self._norm(c, i, norms))
            if neck is None:
                self.conv1.append(0.2 * torch.randn(k, c, 3, 3, dtype=torch.float64))
            else:
                self.conv1.append(0.2 * torch.randn(neck, c, 1, 1, dtype=torch.float64))
                self.norm2.append(self._norm(neck, i + 1, norms))
                self.conv2.append(0.2 * torch.randn(k, neck, 3, 3, dtype=torch.float64))

    @staticmethod
    def _norm(c: int, i: int, norms: str) -> Norm:
        def randn() -> Tensor:
            return torch.randn(c, dtype=torch.float64)

        eps = (1e-5, 1e-2, 0.3)[i % 3]
        affine = (None, None) if norms == "bare" and i % 2 else (1 + 0.3 * randn(), 0.3 * randn())
        running = (None, None) if norms == "bare" and i % 3 == 0 else (0.1 * randn(), 0.5 + torch.rand(c).double())
        counter = torch.tensor(3) if running[0] is not None and norms != "bare" else None
        momentum = None if norms == "cumulative" else 0.1
        return Norm(*affine, *running, counter, not (norms == "frozen" and i % 3 == 1), momentum, eps)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Block:
        def cast(t: Tensor | None) -> Tensor | None:
            return t if t is None else t.to(device, dtype, copy=True) if t.is_floating_point() else t.to(device).clone()

        other = object.__new__(Block)
        other.__dict__.update(self.__dict__)
        other.conv1, other.conv2 = [cast(w) for w in self.conv1], [cast(w) for w in self.conv2]
        for name in ("norm1", "norm2"):
            setattr(other, name, [Norm(*(cast(t) for t in n[:5]), *n[5:]) for n in getattr(self, name)])
        return other

    def evaluated(self) -> Block:
        other = object.__new__(Block)
        other.__dict__.update(self.__dict__)
        for name in ("norm1", "norm2"):
            setattr(other, name, [n._replace(training=False) for n in getattr(self, name)])
        return other

    def parameters(self) -> list[Tensor]:
        norms = [t for n in (*self.norm1, *self.norm2) for t in n[:2] if t is not None]
        return [*self.conv1, *self.conv2, *norms]

    def buffers(self) -> list[Tensor]:
        return [t for n in (*self.norm1, *self.norm2) for t in n[2:5] if t is not None]

    def ours(self, x: Tensor, **options: Any) -> Tensor:
        return dense_block(
            x, self.conv1, self.norm1, self.conv2, self.norm2, sum_of=self.sum_of, **{"drop_rate": 0.0, **options}
        )

    def plain(self, x: Tensor, drop_rate: float = 0.0) -> Tensor:
        slots = [x]
        for i, weight in enumerate(self.conv1):
            h = F.conv2d(relu_norm(torch.cat(slots, 1), self.norm1[i]), weight, padding=weight.shape[2] // 2)
            h = F.dropout(h, drop_rate)
            if self.conv2:
                h = F.dropout(F.conv2d(relu_norm(h, self.norm2[i]), self.conv2[i], padding=1), drop_rate)
            slots.append(h)
        if self.sum_of is None:
            return torch.cat(slots, 1)
        total = x
        for z in torch.cat(slots[1:], 1).split(self.inputs, 1):
            total = total + z
        return total


def relu_norm(x: Tensor, norm: Norm) -> Tensor:
    mean, var, momentum = norm.running_mean, norm.running_var, norm.momentum
    if norm.training and norm.num_batches_tracked is not None and mean is not None:
        norm.num_batches_tracked.add_(1)
        momentum = 1 / norm.num_batches_tracked.item() if momentum is None else momentum
    momentum = 0.0 if momentum is None else momentum
    return torch.relu(F.batch_norm(x, mean, var, norm.weight, norm.bias, norm.batch, momentum, norm.eps))


def outcome(block: Block, run: Callable[..., Tensor], x: Tensor, grad: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Result, gradients and statistics, by name."""
    x = x.detach().requires_grad_()
    parameters = block.parameters()
    for p in parameters:
        p.requires_grad_()
    out = run(x)
    gradients = torch.autograd.grad(out, [x, *parameters], grad.to(out.dtype))
    yield "out", out.detach()
    yield from ((f"gradient {i}", d) for i, d in enumerate(gradients))
    yield from ((f"buffer {i}", b) for i, b in enumerate(block.buffers()))


def compare(
    shape: str,
    norms: str,
    target: Target,
    dtype: torch.dtype,
    how: str,
    size: tuple[int, int, int] = (3, 5, 6),
    **kw: Any,
) -> None:
    block = Block(shape, norms)
    n, height, width = size
    values = torch.randn(n, block.inputs, height, width, dtype=torch.float64)
    grad = torch.randn(n, block.channels, height, width, dtype=torch.float64)
    backend, device = target
    x, grad = lay(values.to(dtype), how, 0, device), grad.to(device)
    exact, eager, ours = (block.to(t, device) for t in (torch.float64, dtype, dtype))
    truth = dict(outcome(exact, exact.plain, x.double(), grad))
    theirs = dict(outcome(eager, eager.plain, lay(values.to(dtype), "channels_last", 0, device), grad))
    with dispatch.use(backend):
        served = dispatch.served()
        found = dict(outcome(ours, lambda x: ours.ours(x, **kw), x, grad))
        assert dispatch.served()["dense_block", backend] == served["dense_block", backend] + 1
        assert dispatch.served()["dense_block_backward", backend] == served["dense_block_backward", backend] + 1
    assert found.keys() == truth.keys()
    gradients = [name for name in found if name.startswith("gradient")]
    assert_gradients_as_good_as(*({name: d[name] for name in gradients} for d in (found, theirs, truth)))
    for name in found.keys() - set(gradients):
        if found[name].is_floating_point():
            assert_as_good_as(found[name], theirs[name], truth[name], name)
        else:
            assert torch.equal(found[name], truth[name]), name


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: str, norms: str, target: Target) -> None:
    torch.manual_seed(0)
    for memory in MEMORY.get(shape, ("speed", "min")):
        compare(shape, norms, target, torch.float32, "channels_last", memory=memory)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norms", ("batch", "frozen"))
def test_evaluation(norms: str, shape: str, target: Target) -> None:
    """Without gradients nothing is kept, and a kernel may go another way; with norms that have statistics of their own:
    all, or some."""
    torch.manual_seed(6)
    backend, device = target
    block = Block(shape, norms)
    block = block.evaluated() if norms == "batch" else block
    for memory, size, last in EVALUATED:
        x = torch.randn(3, block.inputs, *size).to(device)
        exact, eager, ours = (block.to(t, device) for t in (torch.float64, torch.float32, torch.float32))
        if last:
            ours.conv1, ours.conv2 = ([layout.outputs_last(w) for w in ws] for ws in (ours.conv1, ours.conv2))
        with torch.no_grad():
            with dispatch.use(backend):
                found = ours.ours(x, memory=memory)
            assert_as_good_as(found, eager.plain(x), exact.plain(x.double()), f"{memory}, {size}, {last=}")


@pytest.mark.parametrize("size", ((1, 7, 7), (1, 14, 9), (3, 3, 3), (2, 24, 5), (1, 31, 7)))
@pytest.mark.parametrize("threads", (1, 2, 3, 7))
def test_evaluation_shared_by_threads(threads: int, size: tuple[int, int, int], target: Target) -> None:
    torch.manual_seed(9)
    backend, device = target
    block = Block("shared").evaluated()
    n, height, width = size
    x = torch.randn(n, block.inputs, height, width).to(device, memory_format=torch.channels_last)
    exact, eager, ours = (block.to(t, device) for t in (torch.float64, torch.float32, torch.float32))
    torch.set_num_threads(threads)
    with torch.no_grad(), dispatch.use(backend):
        found = ours.ours(x)
        torch.manual_seed(10)
        dropped = ours.ours(x, drop_rate=0.3)
        torch.manual_seed(10)
        expected = eager.plain(x, 0.3)
        assert_as_good_as(found, eager.plain(x), exact.plain(x.double()), "out")
    torch.testing.assert_close(dropped, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("threads", (2, 3, 7))
def test_columns_that_threads_share_in_bfloat16(threads: int) -> None:
    if refused(torch.bfloat16, ("cpu", "cpu")):
        return
    torch.manual_seed(10)
    block = Block("shared").evaluated().to(torch.bfloat16)
    x = torch.randn(1, block.inputs, 7, 7, dtype=torch.bfloat16)
    with torch.no_grad(), dispatch.use("cpu"):
        torch.set_num_threads(1)
        alone = block.ours(x)
        torch.set_num_threads(threads)
        assert torch.equal(block.ours(x), alone)


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts(how: str, target: Target) -> None:
    torch.manual_seed(1)
    compare("neck", "batch", target, torch.float32, how)


@pytest.mark.parametrize("size", ((40, 1, 1), (3, 1, 7), (5, 9, 1), (4, 2, 2), (2, 17, 19), (1, 5, 130), (3, 4, 4)))
def test_sizes(size: tuple[int, int, int], target: Target) -> None:
    torch.manual_seed(2)
    for shape in ("plain", "neck_sum", "tiles", "wide_neck"):
        compare(shape, "batch", target, torch.float32, "channels_last", size)


def test_double_precision() -> None:
    torch.manual_seed(3)
    for shape in SHAPES:
        compare(shape, "frozen", ("reference", "cpu"), torch.float64, "channels_last")


@pytest.mark.parametrize("shape", ("plain", "neck", "neck_sum"))
def test_gradcheck(shape: str) -> None:
    torch.manual_seed(4)
    block = Block(shape, "frozen")
    x = torch.randn(2, block.inputs, 3, 2, dtype=torch.float64, requires_grad=True)
    parameters = [p.requires_grad_() for p in block.parameters()]

    def run(x: Tensor, *_: Tensor) -> Tensor:
        return block.ours(x)

    with dispatch.use("reference"):
        assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


def refused(dtype: torch.dtype, target: Target) -> bool:
    """Whether the C++ kernel says that it does not serve dtype here."""
    served = dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    if target[0] != "cpu" or served:
        return False
    expected = "AVX512-BF16" if dtype == torch.bfloat16 else "serves float32 and bfloat16"
    with dispatch.use("cpu"), pytest.raises(RuntimeError, match=expected):
        Block("neck").to(dtype).ours(torch.randn(2, 6, 4, 4, dtype=dtype))
    return True


@pytest.mark.parametrize("shape", ("plain", "neck_sum", "wide_neck", "odd_neck"))
@pytest.mark.parametrize("norms", ("batch", "frozen"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_reduced_precision(dtype: torch.dtype, norms: str, shape: str, target: Target) -> None:
    """Where ReLUs flip, the mean error over many elements still tells."""
    backend, device = target
    if refused(dtype, target):
        return
    torch.manual_seed(5)
    gaps: dict[str, list[float]] = {"ours": [], "plain": []}
    for _ in range(5):
        block = Block(shape, norms)
        x = torch.randn(16, block.inputs, 9, 7).to(device, dtype)
        grad = torch.randn(16, block.channels, 9, 7).to(device, dtype)
        exact = block.to(torch.float64, device)
        truth = dict(outcome(exact, exact.plain, x.double(), grad))
        with torch.no_grad():
            truth["evaluated"] = exact.evaluated().plain(x.double())
        for run, gap in gaps.items():
            own = block.to(dtype, device)
            with dispatch.use(backend):
                found = list(outcome(own, getattr(own, run), x, grad))
                with torch.no_grad():
                    found.append(("evaluated", getattr(own.evaluated(), run)(x)))
            for name, value in found:
                if value.is_floating_point():
                    error = (value.double() - truth[name]).square().mean().sqrt()
                    gap.append((error / truth[name].square().mean().sqrt()).item())
    assert sum(gaps["ours"]) <= 2 * sum(gaps["plain"])


def test_dropout_is_eagers(target: Target) -> None:
    backend, device = target
    for shape in ("plain", "neck"):
        torch.manual_seed(6)
        block = Block(shape).to(torch.float32, device)
        x = torch.randn(2, block.inputs, 5, 4, device=device).contiguous(memory_format=torch.channels_last)
        grad = torch.randn(2, block.channels, 5, 4, device=device)
        other = block.to(torch.float32, device)
        torch.manual_seed(7)
        expected = dict(outcome(other, lambda x, b=other: b.plain(x, 0.3), x, grad))
        torch.manual_seed(7)
        with dispatch.use(backend):
            found = dict(outcome(block, lambda x, b=block: b.ours(x, drop_rate=0.3), x, grad))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        # Not in evaluation.
        assert torch.equal(block.ours(x, drop_rate=0.3, training=False), block.ours(x))


def test_moments_come_and_go(target: Target) -> None:
    torch.manual_seed(8)
    backend, device = target
    for shape in ("neck", "neck_sum"):
        block = Block(shape).to(torch.float32, device)
        x = torch.randn(3, block.inputs, 6, 5, device=device, requires_grad=True)
        with dispatch.use(backend):
            out, moments = block.ours(x, return_moments=True)
            again = block.ours(x, moments=ops.channel_moments(x))
            torch.testing.assert_close(again, out)
            expected = ops.channel_moments(out)
        torch.testing.assert_close(moments, expected)
        assert not moments.mean.requires_grad


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous() if t.dim() == 4 else t


def hooked(target: Target, dtype: torch.dtype) -> None:
    """As torch.autograd.graph.save_on_cpu(pin_memory=True), which gives everything back in another layout."""
    backend, device = target
    for shape in ("plain", "neck"):
        torch.manual_seed(9)
        block = Block(shape).to(dtype, device)
        leaves = [torch.randn(2, block.inputs, 4, 5, device=device).to(dtype), *block.parameters()]
        x = leaves[0]
        for leaf in leaves:
            leaf.requires_grad_()
        with dispatch.use(backend):
            expected = torch.autograd.grad(block.ours(x).square().sum(), leaves)
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, contiguous):
                found = torch.autograd.grad(block.ours(x).square().sum(), leaves)
        torch.testing.assert_close(found, expected, **({"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {}))


def test_hooks_that_give_back_another_layout(target: Target) -> None:
    hooked(target, torch.float32)


@pytest.mark.parametrize("shape", ("plain", "neck_sum"))
def test_autograd_is_used_as_usual(shape: str, target: Target) -> None:
    torch.manual_seed(9)
    backend, device = target
    block = Block(shape).to(torch.float32, device)
    parameters = [p.requires_grad_() for p in block.parameters()]
    xs = [torch.randn(2, block.inputs, 4, 4, device=device, requires_grad=True) for _ in range(2)]
    copies = [x.detach().clone() for x in xs]
    with dispatch.use(backend):
        outs = [block.ours(x) for x in xs]  # two forwards before their backwards
        grad = torch.randn_like(outs[0])
        kept = grad.clone()
        for x, out in zip(xs, outs, strict=True):
            first = torch.autograd.grad(out, [x, *parameters], grad, retain_graph=True)
            second = torch.autograd.grad(out, [x, *parameters], grad)
            torch.testing.assert_close(first, second, rtol=0, atol=0)
            alone = torch.autograd.grad(block.ours(x), [x, *parameters], grad)
            torch.testing.assert_close(first, alone, rtol=0, atol=0)
        assert torch.equal(grad, kept)
        assert all(torch.equal(x, c) for x, c in zip(xs, copies, strict=True))
        assert torch.autograd.grad(block.ours(xs[0]).sum(), parameters[0])[0].isfinite().all()  # gradient of stride 0
        with pytest.raises(RuntimeError, match="gradient of its gradient"):
            torch.autograd.grad(block.ours(xs[0]).sum(), xs[0], create_graph=True)
        frozen = block.ours(copies[0])
        torch.autograd.grad(frozen.sum(), parameters)
        if block.sum_of is None:
            changed = block.ours(xs[0])
            changed.relu_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                changed.sum().backward()
        else:
            block.ours(xs[0]).relu_().sum().backward()


@pytest.mark.parametrize("shape", SHAPES)
def test_on_meta(shape: str) -> None:
    block = Block(shape).to(torch.float32, "meta")
    x = torch.empty(3, block.inputs, 5, 6, device="meta", requires_grad=True)
    out, moments = block.ours(x, return_moments=True)
    assert out.is_meta and out.shape == (3, block.channels, 5, 6) and moments.mean.shape == (block.channels,)
    assert out.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(out.sum(), [x])
    assert grad.is_meta and grad.shape == x.shape


def test_opcheck_and_compile(target: Target) -> None:
    torch.manual_seed(11)
    backend, device = target
    for shape in ("plain", "neck_sum"):
        block = Block(shape, "frozen").to(torch.float32, device)
        x = torch.randn(2, block.inputs, 4, 3, device=device)
        calls: list[tuple[Any, Any]] = []

        class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func.namespace == "rkfast" and "dense_block" in str(func):
                    calls.append((func, args))  # noqa: B023
                return func(*args, **(kwargs or {}))

        parameters = [p.requires_grad_() for p in block.parameters()]
        with dispatch.use(backend):
            with Recorder():
                torch.autograd.grad(block.ours(x).sum(), parameters)
            assert {str(f) for f, _ in calls} == {"rkfast.dense_block.default", "rkfast.dense_block_backward.default"}
            for func, args in calls:
                detached = torch.utils._pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, args)
                torch.library.opcheck(func, detached)

            def step(x: Tensor, block: Block = block) -> Tensor:
                return block.ours(x).square()

            x.requires_grad_()
            expected = torch.autograd.grad(step(x).sum(), [x, *parameters])
            torch._dynamo.reset()
            compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
            found = torch.autograd.grad(compiled(x).sum(), [x, *parameters])
            torch.testing.assert_close(found, expected)


def test_nothing_to_normalise(target: Target) -> None:
    """One value per channel raises before anything is written; no value leaves statistics alone and counts."""
    backend, device = target
    block = Block("neck").to(torch.float32, device)
    before = [b.clone() for b in block.buffers()]
    with dispatch.use(backend), pytest.raises(ValueError, match=r"norm1\[0\]: expected more than 1 value per channel"):
        block.ours(torch.randn(1, 6, 1, 1, device=device))
    assert all(torch.equal(a, b) for a, b in zip(block.buffers(), before, strict=True))
    x = torch.randn(0, 6, 4, 4, device=device, requires_grad=True)
    out = block.ours(x)
    assert out.shape == (0, block.channels, 4, 4)
    out.sum().backward()
    assert x.grad is not None
    for norm, old in zip((*block.norm1, *block.norm2), Block("neck").norm1, strict=False):
        assert norm.num_batches_tracked == old.num_batches_tracked + 1
    assert all(torch.equal(a, b) for a, b in zip(block.buffers(), before, strict=True) if a.is_floating_point())


def test_nan_spreads_as_in_eager(target: Target) -> None:
    torch.manual_seed(12)
    backend, device = target
    block = Block("neck", "frozen").to(torch.float32, device)
    frozen = block.to(torch.float32, device)
    for b in (block, frozen):
        b.norm1 = [n._replace(training=False) if n.running_mean is not None else n for n in b.norm1]
        b.norm2 = [n._replace(training=False) for n in b.norm2]
    x = torch.randn(2, 6, 5, 5, device=device)
    x[0, 1, 2, 3] = float("nan")
    with dispatch.use(backend):
        assert torch.equal(block.ours(x).isnan(), frozen.plain(x).isnan())


@pytest.mark.skipif(native.cpu_reason() is not None, reason="one call of C++ checks usual arguments")
@pytest.mark.parametrize("shape", ("plain", "neck_sum"))
def test_usual_arguments_are_checked_in_one_call(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(sys.modules["rkfast.ops.dense_block"], "_fit", lambda *args: asked.append(args[1]))
    block = Block(shape).to(torch.float32)
    x = torch.randn(2, block.inputs, 6, 5)
    for given in (block, block.evaluated()):
        given.ours(x, moments=ops.channel_moments(x)).sum()
        assert not asked
    block.norm1[1] = block.norm1[1]._replace(momentum=None)
    block.ours(x)
    assert asked == list(range(len(block.conv1)))


def test_why_not() -> None:
    block = Block("neck")
    block.ours(torch.randn(2, 6, 4, 4, dtype=torch.float64))
    assert "dense_block" in dispatch.explain()
    if native.cpu_reason() is None:
        rejected = dict(dispatch.OPS["dense_block"].last.rejected)
        assert rejected["cpu"] == "dtype torch.float64: the C++ kernel serves float32 and bfloat16"
    with pytest.raises(RuntimeError, match=r"torch\.func, .* are not supported"):
        torch.func.vmap(block.ours)(torch.randn(3, 2, 6, 4, 4, dtype=torch.float64))
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"forward-mode AD .* not supported"):
        block.ours(forward_ad.make_dual(x, x))


def test_one_parameter_of_two_norms_under_compile() -> None:
    weight, scale, x = torch.randn(4, 8, 3, 3), torch.rand(8), torch.randn(2, 8, 4, 4)
    leaves = [t.requires_grad_() for t in (weight, scale, x)]

    def f(x: Tensor) -> Tensor:
        return dense_block(x, [weight], [Norm(scale, scale, None, None)]).square()

    want = torch.autograd.grad(f(x).sum(), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), leaves), want)


def with_norm(**changes: Any) -> Callable[[Block, Tensor], Tensor]:
    """The block with a second norm that is changed."""

    def run(b: Block, x: Tensor) -> Tensor:
        norms = [b.norm1[0], b.norm1[1]._replace(**changes), *b.norm1[2:]]
        return dense_block(x, b.conv1, norms, b.conv2, b.norm2)

    return run


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (lambda b, x: b.ours(x[0]), ValueError, r"x: expected \[N, C, H, W\], got 3"),
        (lambda b, x: b.ours(x.int()), TypeError, "x: expected a floating-point tensor"),
        (lambda b, x: b.ours("x"), TypeError, "x: expected a Tensor, got str"),
        (lambda b, x: b.ours(x.double()), TypeError, r"conv1\[0\]: dtype torch.float32 differs from x's"),
        (lambda b, x: b.ours(x[:, :5]), ValueError, r"conv1\[0\]: expected \[B, 5, 1, 1\], got \[8, 6, 1, 1\]"),
        (lambda b, x: b.ours(x, memory="most"), ValueError, "memory: expected one of speed, min, got 'most'"),
        (lambda b, x: dense_block(x, [], []), ValueError, "conv1: expected a weight for each growth, got none"),
        (lambda b, x: dense_block(x, b.conv1, b.norm1[1:]), ValueError, "norm1: expected 4 for 4 growths, got 3"),
        (
            lambda b, x: dense_block(x, b.conv1, b.norm1, b.conv2[1:], b.norm2),
            ValueError,
            "conv2: expected 4 for 4 growths, got 3",
        ),
        (lambda b, x: dense_block(x, b.conv1, b.norm1, b.conv2), ValueError, "norm2: expected 4 for 4 growths, got 0"),
        (
            lambda b, x: dense_block(x, b.conv1, b.norm2, b.conv2, b.norm2),
            ValueError,
            r"norm1\[0\].weight: shape \[8\] does not fit; expected one value per channel, \[6\]",
        ),
        (
            lambda b, x: dense_block(x, b.conv1, [(1,)] * 4, b.conv2, b.norm2),
            TypeError,
            r"norm1\[0\]: expected a Norm, got tuple",
        ),
        (
            lambda b, x: dense_block(x, b.conv1, b.norm1, b.conv1, b.norm2),
            ValueError,
            r"conv2\[0\]: expected \[k, 8, n, n\]",
        ),
        (
            lambda b, x: dense_block(x, [w[..., 0] for w in b.conv1], b.norm1, b.conv2, b.norm2),
            ValueError,
            r"conv1\[0\]: expected \[k, C, n, n\] with n odd",
        ),
        (
            lambda b, x: dense_block(x, b.conv1, b.norm1, b.conv2, b.norm2, sum_of=2),
            ValueError,
            "sum_of: 2 increments of 6 channels are 12, and the growths have 16",
        ),
        (
            lambda b, x: b.ours(x, moments=ops.channel_moments(x[:, :5])),
            ValueError,
            r"moments.mean: shape \[5\] does not fit",
        ),
        (
            lambda b, x: dense_block(x, b.conv1, [n._replace(running_var=None) for n in b.norm1], b.conv2, b.norm2),
            ValueError,
            r"norm1\[0\]: running_mean and running_var come together",
        ),
        (
            with_norm(num_batches_tracked=torch.zeros(2).long()),
            ValueError,
            r"norm1\[1\].num_batches_tracked: expected one",
        ),
        (with_norm(running_mean=torch.zeros(1).expand(10)), ValueError, r"norm1\[1\].running_mean: expanded"),
        (with_norm(running_mean=torch.zeros(10).to_sparse()), TypeError, r"norm1\[1\].running_mean: .* layout"),
        (with_norm(group="workers"), ValueError, "norms: expected one group"),
        (with_norm(momentum=None, num_batches_tracked=None), ValueError, r"norm1\[1\].momentum: None"),
        (with_norm(running_var=torch.ones(10, requires_grad=True)), RuntimeError, r"norm1\[1\].running_var: .*grad"),
        (with_norm(weight=torch._neg_view(torch.ones(10))), ValueError, r"norm1\[1\].weight: a lazily"),
        (lambda b, x: b.ours(x, moments=(torch.ones(6), None, 32)), TypeError, "moments.var: expected a Tensor"),
        (lambda b, x: b.ours(x, moments=torch.ones(6)), TypeError, "moments: expected Moments"),
        (lambda b, x: b.ours(x, drop_rate=1.5), ValueError, r"drop_rate: expected a number in \[0, 1\], got 1.5"),
    ),
)
def test_bad_input(change: Callable[..., Any], error: type[Exception], message: str) -> None:
    block = Block("neck").to(torch.float32)
    before = [b.clone() for b in block.buffers()]
    with pytest.raises(error, match=message):
        change(block, torch.randn(2, 6, 4, 4))
    assert all(torch.equal(a, b) for a, b in zip(block.buffers(), before, strict=True))
