"""bn_relu_conv beside F.conv2d(relu(F.batch_norm(x))), both against float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkfast import dispatch, native, ops
from rkfast.ops import Norm, layout
from rkfast.ops.bn_relu_conv import kernel_reason
from tests.ops.tester import DTYPES, LARGE, LAYOUTS, Inputs, OpTester, lay

SERVED = ("reference", "cpu", "triton")
Target = tuple[str, str]  # backend, device
# The last ones are the convolution by tiles: from 16 channels and 4x4 pixels on.
SHAPES = ((2, 5, 4, 3), (3, 4, 1, 1), (2, 1, 5, 5), (1, 9, 2, 2), (2, 40, 1, 67), (3, 16, 7, 9), (1, 33, 4, 4))
EMPTY = (0, 5, 4, 4)


def case(
    n: int = 3, training: bool = True, affine: bool = True, tracked: bool = True, moments: bool = False
) -> dict[str, Any]:
    return dict(n=n, training=training, affine=affine, tracked=tracked, moments=moments)


def skip_unserved(target: Target, dtype: torch.dtype) -> None:
    if target[0] == "cpu" and dtype != torch.float32:
        pytest.skip("the C++ kernel serves float32")


class TestBnReluConv(OpTester):
    OPS = ("bn_relu_conv", "bn_relu_conv_backward")
    ACTIVATIONS = ("x", "conv")
    CASES = {
        "3x3": case(),
        "1x1": case(1),
        "5x5": case(5),
        "bare": case(affine=False, tracked=False),
        "given_moments": case(moments=True),
        "frozen": case(training=False),
        "frozen_1x1": case(1, training=False),
    }

    def inputs(self, case: dict[str, Any], shape: tuple[int, ...]) -> Inputs:
        c, n = shape[1], case["n"]
        random = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
        return Inputs(
            x=random(*shape) * 2 + 1,
            conv=random(c, c, n, n) / (n * max(c, 1) ** 0.5),
            weight=random(c) if case["affine"] else None,
            bias=random(c) if case["affine"] else None,
            running_mean=random(c) if case["tracked"] else None,
            running_var=random(c).square() + 0.5 if case["tracked"] else None,
        )

    def ours(self, case: dict[str, Any], x: Inputs) -> Tensor:
        norm = Norm(x.weight, x.bias, x.running_mean, x.running_var, None, case["training"])
        return ops.bn_relu_conv(x.x, x.conv, norm, moments=ops.channel_moments(x.x) if case["moments"] else None)

    def eager(self, case: dict[str, Any], x: Inputs) -> Tensor:
        normed = F.batch_norm(x.x, x.running_mean, x.running_var, x.weight, x.bias, case["training"], 0.1, 1e-5)
        return F.conv2d(torch.relu(normed), x.conv, padding=case["n"] // 2)

    @pytest.mark.parametrize("how", LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes_and_layouts(self, case: dict[str, Any], dtype: torch.dtype, how: str, target: Target) -> None:
        skip_unserved(target, dtype)
        self.check(case, (3, 20, 7, 9), dtype, how, target)

    @pytest.mark.parametrize("how", ("contiguous", "channels_last", "channels_last_slice"))
    @pytest.mark.parametrize("shape", (*SHAPES, EMPTY), ids=lambda s: "x".join(map(str, s)))
    def test_shapes(self, case: dict[str, Any], shape: tuple[int, ...], how: str, target: Target) -> None:
        if shape == EMPTY and target[0] != "reference":
            pytest.skip("an empty tensor has no rows")
        few = shape[1] == 1 and target != ("triton", "cpu")  # a gradient of one number
        self.check(case, shape, torch.float32, how, target, seeds=32 if few else 4)

    def test_bands_of_several_images(self, case: dict[str, Any], target: Target) -> None:
        """Whose tiles are multiplied together, the last ones fewer than the others."""
        if target[0] != "cpu":
            pytest.skip("only the C++ kernels have bands")
        self.check(case, (9, 16, 8, 7), torch.float32, "channels_last", target)

    @pytest.mark.parametrize("shape", ((5, 8, 9, 7), (2, 16, 41, 33), (9, 12, 4, 4)))
    def test_few_channels(self, case: dict[str, Any], shape: tuple[int, ...], target: Target) -> None:
        """Whose tiles are rows of pixels, some in several bands an image."""
        if target[0] != "cpu":
            pytest.skip("only the C++ kernels have tiles of rows")
        self.check(case, shape, torch.float32, "channels_last", target)

    def test_few_pixels_of_many_channels(self, case: dict[str, Any], target: Target) -> None:
        """Where the gradient of the weight is taken over all tiles at once, those of several images."""
        if target[0] != "cpu":
            pytest.skip("only the C++ kernels have tiles")
        for n, h, w in ((3, 5, 6), (9, 6, 7)):
            self.check(case, (n, 80, h, w), torch.float32, "channels_last", target)

    @pytest.mark.parametrize(
        "shape", ((1, 290, 3, 3), (2, 300, 5, 7), (2, 257, 8, 8), (3, 260, 8, 8), (5, 257, 29, 31))
    )
    def test_wide(self, case: dict[str, Any], shape: tuple[int, ...], target: Target) -> None:
        """Weights as they lie for few rows, else in panels; gradients block by block, of many rows in several goes."""
        if target[0] != "cpu" or case["n"] != 1:
            pytest.skip("only the C++ kernels of 1x1 convolutions have panels")
        self.check(case, shape, torch.float32, "channels_last", target)

    @pytest.mark.parametrize("how", ("contiguous", "channels_last", "channels_last_slice"))
    def test_large(self, case: dict[str, Any], how: str, target: Target) -> None:
        if target == ("triton", "cpu"):
            pytest.skip("Triton's interpreter takes minutes at this size")
        self.check(case, LARGE, torch.float32, how, target)

    def test_nan_and_inf(self, case: dict[str, Any], target: Target) -> None:
        """What is not finite lands where eager has it; without tiles nowhere else."""
        x = self.prepared(case, (3, 7, 6, 5), torch.float32, "channels_last", target[1])
        with torch.no_grad():
            x.x[0, 1, 2, 3] = float("nan")
            x.x[1, 3, 0, 0] = float("inf")
            x.x[2, 5, 0, 1] = float("-inf")
        grad = torch.ones(3, 7, 6, 5)
        with dispatch.use(target[0]):
            ours = self.evaluate(lambda i: self.ours(case, i), self._clone(x), grad)
        eager = self.evaluate(lambda i: self.eager(case, i), self._clone(x), grad)
        for name in eager:
            assert torch.equal(torch.isfinite(ours[name]), torch.isfinite(eager[name])), name

    def test_gradcheck(self, case: dict[str, Any], target: Target) -> None:
        skip_unserved(target, torch.float64)
        super().test_gradcheck(case, target)

    def test_repeats_to_the_bit(self, case: dict[str, Any], target: Target) -> None:
        if case["n"] == 5 and target[0] != "reference":
            pytest.skip("PyTorch's convolution promises nothing across thread counts")
        super().test_repeats_to_the_bit(case, target)

    def test_autocast(self, case: dict[str, Any], target: Target) -> None:
        """x and the convolution are taken in autocast's dtype, as eager's convolution takes them."""
        skip_unserved(target, torch.bfloat16)
        if case["moments"]:
            pytest.skip("given are those of x before it is cast")
        x = self.prepared(case, (2, 4, 3, 5), torch.float32, "channels_last", target[1])
        with dispatch.use(target[0]):
            low = x.map(lambda n, t: t.detach().to(torch.bfloat16) if n in self.ACTIVATIONS else t.detach().clone())
            plain = self.ours(case, low)
            with torch.autocast(target[1], torch.bfloat16):
                under = self.ours(case, self._clone(x))
        assert under.dtype == torch.bfloat16
        torch.testing.assert_close(plain, under)


def call(x: Tensor, norm: nn.BatchNorm2d, conv: nn.Conv2d, **options: Any) -> Any:
    """As a module calls it."""
    tracked = norm.running_mean is not None
    statistics = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    given = Norm(norm.weight, norm.bias, *statistics, norm.training or not tracked, norm.momentum, norm.eps)
    return ops.bn_relu_conv(x, conv.weight, given, **options)


@pytest.mark.parametrize("momentum", (0.1, None, 1.0, 0.0))
@pytest.mark.parametrize("affine", (True, False))
@pytest.mark.parametrize("tracked", (True, False))
@pytest.mark.parametrize("needs_grad", (True, False))
def test_statistics_move_as_in_batchnorm2d(
    momentum: float | None, affine: bool, tracked: bool, needs_grad: bool, target: Target
) -> None:
    """Outputs, statistics and counter over training steps, and the output of eval after them."""
    backend, device = target
    ours = nn.BatchNorm2d(20, momentum=momentum, affine=affine, track_running_stats=tracked).to(device)
    conv = nn.Conv2d(20, 17, 3, padding=1, bias=False).to(device)
    stock = copy.deepcopy(ours)
    with dispatch.use(backend), torch.set_grad_enabled(needs_grad):
        for _ in range(3):
            x = torch.randn(4, 20, 5, 4, device=device) * 3 + 2
            torch.testing.assert_close(call(x, ours, conv), conv(F.relu(stock(x))), rtol=1e-5, atol=1e-5)
            if tracked:
                assert ours.num_batches_tracked == stock.num_batches_tracked
                torch.testing.assert_close(ours.running_mean, stock.running_mean)
                torch.testing.assert_close(ours.running_var, stock.running_var)
        ours.eval(), stock.eval()
        x = torch.randn(4, 20, 5, 4, device=device)
        torch.testing.assert_close(call(x, ours, conv), conv(F.relu(stock(x))), rtol=1e-5, atol=1e-5)
        if tracked:
            assert ours.num_batches_tracked == 3


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("shape", ((3, 18, 9, 7), (2, 5, 4, 3), (3, 4, 1, 1), (2, 70, 40, 40)))
@pytest.mark.parametrize("n", (1, 3, 5))
def test_moments_come_and_go(n: int, shape: tuple[int, ...], how: str, target: Target) -> None:
    """Those of the result are of what is stored; those given are the ones that are used."""
    if target == ("triton", "cpu") and shape[-1] > 9:
        pytest.skip("Triton's interpreter takes minutes at this size")
    backend, device = target
    x = lay(torch.randn(shape), how, 0, device)
    conv = torch.randn(shape[1] + 3, shape[1], n, n, device=device)
    with dispatch.use(backend):
        out, moments = ops.bn_relu_conv(x, conv, Norm(None, None, None, None), return_moments=True)
        alone = ops.bn_relu_conv(x, conv, Norm(None, None, None, None))
        other = ops.Moments(torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device), x[:, 0].numel())
        shifted = ops.bn_relu_conv(x, conv, Norm(None, None, None, None), moments=other)
    assert torch.equal(out, alone)
    assert moments.count == out[:, 0].numel()
    torch.testing.assert_close(moments.mean, out.mean((0, 2, 3)), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.var, out.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)
    expected = F.conv2d(torch.relu(x / (1 + 1e-5) ** 0.5), conv, padding=n // 2)
    torch.testing.assert_close(shifted, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conv_format", ("contiguous", "channels_last", "outputs_last"))
@pytest.mark.parametrize(("outputs", "n"), ((24, 3), (3, 3), (24, 1), (40, 5)))
def test_other_outputs_and_layouts_of_weights(outputs: int, n: int, conv_format: str, target: Target) -> None:
    backend, device = target
    torch.manual_seed(0)
    x = lay(torch.randn(3, 17, 6, 7), "channels_last", 0, device).requires_grad_()
    conv = torch.randn(outputs, 17, n, n, device=device)
    if conv_format == "outputs_last":
        conv = layout.outputs_last(conv)
    elif conv_format == "channels_last":
        conv = conv.to(memory_format=torch.channels_last)
    conv.requires_grad_()
    with dispatch.use(backend):
        out = ops.bn_relu_conv(x, conv, Norm(None, None, None, None))
        grad = torch.randn_like(out)
        found = torch.autograd.grad(out, (x, conv), grad)
    eager = F.conv2d(torch.relu(F.batch_norm(x, None, None, training=True)), conv, padding=n // 2)
    torch.testing.assert_close(out, eager, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, torch.autograd.grad(eager, (x, conv), grad), rtol=1e-4, atol=1e-3)
    assert found[1].stride() == conv.stride()


def test_what_is_kept(target: Target) -> None:
    """x, the convolution and vectors."""
    backend, device = target
    x = torch.randn(3, 18, 8, 8, device=device).to(memory_format=torch.channels_last).requires_grad_()
    conv = torch.randn(17, 18, 3, 3, device=device, requires_grad=True)
    kept: list[Tensor] = []
    with dispatch.use(backend), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ops.bn_relu_conv(x, conv, Norm(*torch.rand(2, 18, device=device), None, None))
    assert sorted(t.dim() for t in kept) == [1, 1, 1, 1, 4, 4]
    assert {t.data_ptr() for t in kept if t.dim() == 4} == {x.data_ptr(), conv.data_ptr()}
    out = ops.bn_relu_conv(x, conv, Norm(None, None, None, None))
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("n", (1, 3, 5))
def test_mean_far_from_zero(n: int, target: Target) -> None:
    """Channels whose mean is far larger than their deviation are as exact as eager's."""
    backend, device = target
    torch.manual_seed(5)
    x = torch.randn(4, 16, 8, 8, dtype=torch.float64) + 1e3
    conv = torch.randn(16, 16, n, n, dtype=torch.float64) / 16

    def plain(x: Tensor, conv: Tensor) -> Tensor:
        return F.conv2d(torch.relu(F.batch_norm(x, None, None, training=True)), conv, padding=n // 2)

    low = [t.float().to(device) for t in (x, conv)]
    truth = plain(*(t.double() for t in low))
    with dispatch.use(backend):
        ours = ops.bn_relu_conv(*low, Norm(None, None, None, None))
    assert (ours - truth).abs().max() <= 2 * (plain(*low) - truth).abs().max() + 1e-5


@pytest.mark.parametrize("training", (True, False))
def test_on_meta(training: bool) -> None:
    x = torch.empty(3, 6, 5, 4, device="meta").to(memory_format=torch.channels_last).requires_grad_()
    conv = torch.empty(7, 6, 3, 3, device="meta", requires_grad=True)
    vectors = torch.empty(4, 6, device="meta")
    out, moments = ops.bn_relu_conv(x, conv, Norm(*vectors, None, training), return_moments=True)
    assert out.is_meta and out.shape == (3, 7, 5, 4) and moments.mean.shape == (7,)
    assert out.is_contiguous(memory_format=torch.channels_last)
    dx, dconv = torch.autograd.grad(out.sum(), (x, conv))
    assert dx.stride() == x.stride() and dconv.shape == conv.shape


@pytest.mark.parametrize("n", (1, 3))
def test_opcheck_compile_and_export(n: int, target: Target) -> None:
    backend, device = target
    torch.manual_seed(11)
    calls: list[tuple[Any, Any]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "bn_relu_conv" in str(func):
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(16), nn.Conv2d(16, 16, n, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out, moments = call(x, self.norm, self.conv, return_moments=True)
            return out * moments.mean[:, None, None]

    for how in ("channels_last", "contiguous"):
        module = Module().to(device)
        x = lay(torch.randn(2, 16, 5, 4), how, 0, device).requires_grad_()
        leaves = [x, *module.parameters()]
        with dispatch.use(backend):
            with Recorder():
                torch.autograd.grad(module(x).sum(), leaves)
            assert len(calls) == 2
            for func, args in calls:
                detached = [t.detach() if isinstance(t, Tensor) else t for t in args]
                torch.library.opcheck(func, detached)
            calls.clear()
            expected = torch.autograd.grad(module(x).sum(), leaves)
            torch._dynamo.reset()
            before = module.norm.num_batches_tracked.clone()
            found = torch.autograd.grad(torch.compile(module, fullgraph=True, backend="aot_eager")(x).sum(), leaves)
            torch.testing.assert_close(found, expected)
            assert module.norm.num_batches_tracked == before + 1
            module.eval()
            exported = torch.export.export(module, (x.detach(),)).module()
            torch.testing.assert_close(exported(x.detach()), module(x.detach()))


@pytest.mark.parametrize("reentrant", (True, False))
def test_statistics_under_checkpointing_move_as_stock_ones(reentrant: bool, target: Target) -> None:
    backend, device = target
    conv = nn.Conv2d(16, 16, 3, padding=1, bias=False).to(device)
    ours, stock = nn.BatchNorm2d(16).to(device), nn.BatchNorm2d(16).to(device)
    x = torch.randn(2, 16, 6, 6, device=device, requires_grad=True)

    def run(f: Callable[[Tensor], Tensor]) -> Tensor:
        out = torch.utils.checkpoint.checkpoint(f, x, use_reentrant=reentrant)
        return torch.autograd.grad(out.square().sum(), conv.weight) if not reentrant else out.square().sum().backward()

    with dispatch.use(backend):
        run(lambda t: call(t, ours, conv))
    run(lambda t: conv(F.relu(stock(t))))
    assert ours.num_batches_tracked == stock.num_batches_tracked
    torch.testing.assert_close(ours.running_mean, stock.running_mean)


def test_transforms_take_plain_pytorch() -> None:
    x, conv = torch.randn(3, 2, 4, 5, 5), torch.randn(6, 4, 3, 3)
    norm = Norm(None, None, torch.zeros(4), torch.ones(4), None, training=False)
    found = torch.func.vmap(lambda t: ops.bn_relu_conv(t, conv, norm))(x)
    torch.testing.assert_close(found, torch.stack([ops.bn_relu_conv(t, conv, norm) for t in x]), rtol=1e-5, atol=1e-5)


def test_gradient_of_torch_func_knows_where_moments_come_from() -> None:
    x, conv = torch.randn(2, 4, 5, 5, dtype=torch.float64), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    moments, norm = ops.channel_moments(x), Norm(None, None, None, None)

    def f(x: Tensor) -> Tensor:
        return ops.bn_relu_conv(x, conv, norm, moments=moments).square().sum()

    torch.testing.assert_close(torch.func.grad(f)(x), torch.autograd.grad(f(x.requires_grad_()), x)[0])


def test_why_not() -> None:
    def image_of(channels: int) -> Tensor:
        return torch.randn(2, channels, 4, 4).to(memory_format=torch.channels_last)

    x = torch.randn(2, 16, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    conv = torch.randn(16, 16, 3, 3)
    ops.bn_relu_conv(x, conv.double(), Norm(None, None, None, None))
    if native.cpu_reason() is None:
        rejected = dict(dispatch.OPS["bn_relu_conv"].last.rejected)
        assert rejected["cpu"] == "dtype torch.float64: the C++ kernel serves float32"
        assert kernel_reason(x, conv) == rejected["cpu"]
        assert kernel_reason(x.float(), conv) is None
        assert kernel_reason(x.float(), conv[:2, :, :1, :1]) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert kernel_reason(x.float(), conv) == "dtype torch.bfloat16: the C++ kernel serves float32"
        assert kernel_reason(x[:0].float(), conv) == "an empty tensor has no rows"
        assert "contiguous" in str(kernel_reason(x.float().contiguous(), conv))
        for image, weight in ((x[:, :, :3], conv), (x, conv[:7]), (x, torch.randn(16, 16, 5, 5))):
            assert "gains nothing" in str(kernel_reason(image.float(), weight))
        few, wide = image_of(64), torch.randn(214, 64, 3, 3)  # 32 pixels
        assert kernel_reason(few, wide[:213]) is None
        assert "too few pixels" in str(kernel_reason(few, wide))
        with torch.no_grad():
            assert "no slower" in str(kernel_reason(x.float(), conv[:2, :, :1, :1]))
        with dispatch.use("cpu"):
            assert kernel_reason(x.float().contiguous(), conv) is None
    with dispatch.use("reference"):
        assert kernel_reason(x, conv) is None
    with dispatch.use("cuda"):
        assert kernel_reason(x, conv) == "there is no kernel of cuda"


def test_nothing_to_normalise(target: Target) -> None:
    """One value per channel raises before anything is written; no value leaves statistics alone and counts."""
    norm = nn.BatchNorm2d(4).to(target[1])
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False).to(target[1])
    before = copy.deepcopy(norm.state_dict())
    with dispatch.use(target[0]), pytest.raises(ValueError, match="norm: expected more than 1 value per channel"):
        call(torch.randn(1, 4, 1, 1, device=target[1]), norm, conv)
    assert all(torch.equal(t, before[k]) for k, t in norm.state_dict().items())
    call(torch.randn(0, 4, 3, 3, device=target[1]), norm, conv).sum().backward()
    assert norm.num_batches_tracked == 1 and torch.equal(norm.running_mean, before["running_mean"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (dict(x=torch.randn(2, 4, 5)), ValueError, r"x: expected \[N, C, H, W\], got 3"),
        (dict(x=torch.ones(2, 4, 5, 5).int()), TypeError, "x: expected a floating-point tensor"),
        (dict(x="x"), TypeError, "x: expected a Tensor, got str"),
        (dict(conv=None), TypeError, "conv: expected a Tensor, got NoneType"),
        (dict(conv=torch.randn(4, 4, 3, 3).double()), TypeError, "conv: dtype torch.float64 differs from x's"),
        (dict(conv=torch.randn(4, 4, 3, 3, device="meta")), ValueError, "conv: device meta differs"),
        (dict(conv=torch.randn(4, 4, 2, 2)), ValueError, r"conv: expected \[k, C, n, n\] with n odd, got"),
        (
            dict(conv=torch.randn(4, 2, 3, 3)),
            ValueError,
            r"conv: expected \[K, 4, n, n\] .*; for groups, .* take F.conv2d",
        ),
        (dict(norm=(None,) * 4), TypeError, "norm: expected a Norm, got tuple"),
        (dict(norm=Norm(torch.ones(3), None, None, None)), ValueError, r"norm.weight: shape \[3\] does not fit"),
        (
            dict(norm=Norm(None, None, torch.ones(4), None)),
            ValueError,
            "norm: running_mean and running_var come together",
        ),
        (dict(norm=Norm(None, None, *torch.ones(2, 4), None, True, None)), ValueError, "norm.momentum: None"),
        (
            dict(norm=Norm(None, None, torch.ones(4, requires_grad=True), torch.ones(4))),
            RuntimeError,
            "norm.running_mean: running statistics are not differentiable",
        ),
        (dict(norm=Norm(None, None, None, None, group="all")), RuntimeError, "group: there are no process groups"),
        (dict(moments=torch.ones(4)), TypeError, "moments: expected Moments"),
        (dict(moments=(torch.ones(4), torch.ones(4), 7)), ValueError, "moments.count: x has 50 values"),
        (dict(moments=(torch.ones(3), torch.ones(3), 50)), ValueError, r"moments.mean: shape \[3\] does not fit"),
        (dict(return_moments=1), TypeError, "return_moments: expected True or False, got 1"),
    ),
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    norm = Norm(None, None, torch.zeros(4), torch.ones(4), torch.tensor(0))
    given = dict(x=torch.randn(2, 4, 5, 5), conv=torch.randn(4, 4, 3, 3), norm=norm)
    with pytest.raises(error, match=message):
        ops.bn_relu_conv(**{**given, **change})
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any()
