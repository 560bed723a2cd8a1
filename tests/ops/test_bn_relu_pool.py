"""bn_relu_pool beside F.avg_pool2d(relu(F.batch_norm(x)), 2), both against float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkfast import dispatch, ops
from rkfast.nn import pool
from rkfast.ops import Norm
from rkfast.ops.bn_relu_pool import kernel_reason
from tests.ops.tester import Inputs, OpTester, lay

SERVED = ("reference", "cpu", "triton")
Target = tuple[str, str]  # backend, device
SHAPES = (
    (2, 5, 4, 3),
    (2, 1, 5, 5),
    (1, 9, 2, 2),
    (2, 40, 2, 67),
    (3, 16, 7, 9),
    (1, 33, 4, 5),
    (2, 140, 6, 3),
    (0, 5, 4, 4),
)


BARE = Norm(None, None, None, None)


def case(training: bool = True, affine: bool = True, tracked: bool = True, moments: bool = False) -> dict[str, Any]:
    return dict(training=training, affine=affine, tracked=tracked, moments=moments)


class TestBnReluPool(OpTester):
    OPS = ("bn_relu_pool", "bn_relu_pool_backward")
    CASES = {
        "batch": case(),
        "bare": case(affine=False, tracked=False),
        "given_moments": case(moments=True),
        "frozen": case(training=False),
        "frozen_bare": case(training=False, affine=False),
    }

    def inputs(self, case: dict[str, Any], shape: tuple[int, ...]) -> Inputs:
        c = shape[1]
        random = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
        return Inputs(
            x=random(*shape) * 2 + 1,
            weight=random(c) if case["affine"] else None,
            bias=random(c) if case["affine"] else None,
            running_mean=random(c) if case["tracked"] else None,
            running_var=random(c).square() + 0.5 if case["tracked"] else None,
        )

    def ours(self, case: dict[str, Any], x: Inputs) -> Tensor:
        norm = Norm(x.weight, x.bias, x.running_mean, x.running_var, None, case["training"])
        return ops.bn_relu_pool(x.x, norm, moments=ops.channel_moments(x.x) if case["moments"] else None)

    def eager(self, case: dict[str, Any], x: Inputs) -> Tensor:
        normed = F.batch_norm(x.x, x.running_mean, x.running_var, x.weight, x.bias, case["training"], 0.1, 1e-5)
        return F.avg_pool2d(torch.relu(normed), 2)

    @pytest.mark.parametrize("how", ("contiguous", "channels_last", "channels_last_slice"))
    @pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
    def test_shapes(self, case: dict[str, Any], shape: tuple[int, ...], how: str, target: Target) -> None:
        self.check(case, shape, torch.float32, how, target, seeds=4 if target != ("triton", "cpu") else 2)

    @pytest.mark.parametrize("how", ("channels_last", "channels_last_slice"))
    def test_past_the_caches(self, case: dict[str, Any], how: str, target: Target) -> None:
        if target[0] != "cpu":
            pytest.skip("only the C++ kernels write past the caches, where more than these hold is touched")
        self.check(case, (9, 64, 121, 63), torch.float32, how, target)


def module(channels: int, **options: Any) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, **options)
    if norm.affine:
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias)
    return norm


def call(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """As a module calls it."""
    tracked = norm.running_mean is not None
    statistics = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    given = Norm(norm.weight, norm.bias, *statistics, norm.training or not tracked, norm.momentum, norm.eps)
    return ops.bn_relu_pool(x, given)


@pytest.mark.parametrize("momentum", (0.1, None, 1.0))
@pytest.mark.parametrize("tracked", (True, False))
@pytest.mark.parametrize("needs_grad", (True, False))
def test_statistics_move_as_in_batchnorm2d(
    momentum: float | None, tracked: bool, needs_grad: bool, target: Target
) -> None:
    backend, device = target
    ours = module(20, momentum=momentum, track_running_stats=tracked).to(device)
    stock = copy.deepcopy(ours)
    with dispatch.use(backend), torch.set_grad_enabled(needs_grad):
        for _ in range(3):
            x = torch.randn(4, 20, 5, 4, device=device) * 3 + 2
            torch.testing.assert_close(call(x, ours), F.avg_pool2d(F.relu(stock(x)), 2), rtol=1e-5, atol=1e-5)
            if tracked:
                assert ours.num_batches_tracked == stock.num_batches_tracked
                torch.testing.assert_close(ours.running_mean, stock.running_mean)
                torch.testing.assert_close(ours.running_var, stock.running_var)
        ours.eval(), stock.eval()
        torch.testing.assert_close(call(x, ours), F.avg_pool2d(F.relu(stock(x)), 2), rtol=1e-5, atol=1e-5)
        assert not tracked or ours.num_batches_tracked == 3


def test_given_moments_are_the_ones_that_are_used(target: Target) -> None:
    backend, device = target
    x = torch.randn(2, 6, 4, 6, device=device).contiguous(memory_format=torch.channels_last)
    other = ops.Moments(torch.zeros(6, device=device), torch.ones(6, device=device), x[:, 0].numel())
    with dispatch.use(backend):
        found = ops.bn_relu_pool(x, Norm(None, None, None, None), moments=other)
    torch.testing.assert_close(found, F.avg_pool2d(torch.relu(x / (1 + 1e-5) ** 0.5), 2))


def test_what_is_kept(target: Target) -> None:
    """x, though it is a slice, and vectors."""
    backend, device = target
    x = lay(torch.randn(3, 18, 8, 8), "channels_last_slice", 0, device).requires_grad_()
    kept: list[Tensor] = []
    with dispatch.use(backend), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.bn_relu_pool(x, Norm(*torch.rand(2, 18, device=device), None, None))
    assert sorted(t.dim() for t in kept) == [1, 1, 1, 1, 4]
    assert {t.data_ptr() for t in kept if t.dim() == 4} == {x.data_ptr()}
    out = ops.bn_relu_pool(x, BARE)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("training", (True, False))
def test_on_meta(training: bool) -> None:
    x = torch.empty(3, 6, 5, 4, device="meta").to(memory_format=torch.channels_last).requires_grad_()
    out = ops.bn_relu_pool(x, Norm(*torch.empty(4, 6, device="meta"), None, training))
    assert out.is_meta and out.shape == (3, 6, 2, 2) and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.autograd.grad(out.sum(), x)[0].stride() == x.stride()


def test_opcheck_compile_and_export(target: Target) -> None:
    backend, device = target
    torch.manual_seed(11)
    calls: list[tuple[Any, Any]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "bn_relu_pool" in str(func):
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = module(16)

        def forward(self, x: Tensor) -> Tensor:
            return call(x, self.norm)

    for how in ("channels_last", "contiguous"):
        net = Module().to(device)
        x = lay(torch.randn(2, 16, 5, 4), how, 0, device).requires_grad_()
        leaves = [x, *net.parameters()]
        with dispatch.use(backend):
            with Recorder():
                torch.autograd.grad(net(x).sum(), leaves)
            assert len(calls) == 2
            for func, args in calls:
                torch.library.opcheck(func, [t.detach() if isinstance(t, Tensor) else t for t in args])
            calls.clear()
            expected = torch.autograd.grad(net(x).square().sum(), leaves)
            torch._dynamo.reset()
            before = net.norm.num_batches_tracked.clone()
            compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), leaves), expected)
            assert net.norm.num_batches_tracked == before + 1
            net.eval()
            exported = torch.export.export(net, (x.detach(),)).module()
            torch.testing.assert_close(exported(x.detach()), net(x.detach()))


def test_transforms_take_plain_operations(target: Target) -> None:
    backend, device = target
    x = torch.randn(3, 4, 5, 6, device=device).contiguous(memory_format=torch.channels_last)
    norm = Norm(
        *torch.rand(2, 4, device=device), torch.zeros(4, device=device), torch.ones(4, device=device), None, False
    )
    with dispatch.use(backend):
        alone = torch.stack([ops.bn_relu_pool(each[None], norm)[0] for each in x])
        torch.testing.assert_close(torch.vmap(lambda each: ops.bn_relu_pool(each[None], norm)[0])(x), alone)
        # Moments that are given do not carry their dependence on x.
        known = ops.channel_moments(x)
        found = torch.func.grad(lambda v: ops.bn_relu_pool(v, BARE, moments=known).square().sum())(x)
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(ops.bn_relu_pool(leaf, BARE).square().sum(), leaf)
        torch.testing.assert_close(found, expected)


def test_why_not() -> None:
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    assert "channels_last" in str(kernel_reason(x.contiguous()))
    assert "2x2" in str(kernel_reason(x[:, :, :1]))
    assert "kernel for meta" in str(kernel_reason(x.to("meta")))
    with dispatch.use("reference"):
        assert kernel_reason(x.contiguous()) is None
        assert "2x2" in str(kernel_reason(x[:, :, :1]))
    with dispatch.use("cuda"):
        assert "'cuda'" in str(kernel_reason(x))
    norm = module(4)
    with dispatch.use("cuda"), pytest.raises(RuntimeError, match="cuda"):
        call(x, norm)
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("shape", "dtype", "norm", "kind", "message"),
    (
        ((2, 4, 6), torch.float32, BARE, ValueError, "x: expected .N, C, H, W., got 3 dimensions"),
        ((2, 4, 6, 1), torch.float32, BARE, ValueError, "x: expected at least 2x2 pixels"),
        ((2, 4, 6, 6), torch.int32, BARE, TypeError, "x: "),
        ((2, 4, 6, 6), torch.float32, None, TypeError, "norm: expected a Norm, got NoneType"),
        ((2, 4, 6, 6), torch.float32, Norm(torch.ones(3), None, None, None), ValueError, "norm.weight: shape"),
        ((2, 4, 6, 6), torch.float32, BARE._replace(eps=0.0), ValueError, "norm.eps: "),
    ),
    ids=range(6),
)
def test_bad_input(shape: tuple[int, ...], dtype: torch.dtype, norm: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ops.bn_relu_pool(torch.ones(shape, dtype=dtype), norm)


@pytest.mark.parametrize("window", (nn.AvgPool2d(2), nn.AvgPool2d(3, 2), nn.AvgPool2d(2, ceil_mode=True)))
def test_of_modules(window: nn.AvgPool2d) -> None:
    """One pass where the window is 2x2, the two operations elsewhere; the same either way."""
    ours = module(8)
    stock = copy.deepcopy(ours)
    x = torch.randn(2, 8, 7, 6).contiguous(memory_format=torch.channels_last)
    served = dispatch.served()["bn_relu_pool", "cpu"]
    found = pool.average_of_norm(window, ours, x)
    fits = window.kernel_size == 2 and not window.ceil_mode
    assert dispatch.served()["bn_relu_pool", "cpu"] == served + fits
    torch.testing.assert_close(found, window(F.relu(stock(x))))
    torch.testing.assert_close(ours.running_var, stock.running_var)
