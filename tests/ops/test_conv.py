"""conv beside F.conv2d, both against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rkfast import dispatch, native, ops
from rkfast.ops import layout
from rkfast.ops.conv import forward, kernel_reason, transformed, transformed_reason
from tests.ops.tester import DTYPES, LARGE, LAYOUTS, Inputs, OpTester, assert_as_good_as, lay

SERVED = ("reference", "cpu", "triton")
Target = tuple[str, str]  # backend, device
# The last ones are the convolution by tiles: from 16 channels and 4x4 pixels on.
SHAPES = ((2, 5, 4, 3), (3, 4, 1, 1), (2, 1, 5, 5), (1, 9, 2, 2), (2, 40, 1, 67), (3, 16, 7, 9), (1, 33, 4, 4))
EMPTY = (0, 5, 4, 4)


def skip_unserved(target: Target, dtype: torch.dtype) -> None:
    if target[0] == "cpu" and dtype != torch.float32:
        pytest.skip("the C++ kernel serves float32")


class TestConv(OpTester):
    OPS = ("conv", "conv_backward")
    ACTIVATIONS = ("x", "weight")
    CASES = {
        "3x3": dict(n=3, shared=False),
        "1x1": dict(n=1, shared=False),
        "5x5": dict(n=5, shared=False),
        "shared_3x3": dict(n=3, shared=True),
        "shared_1x1": dict(n=1, shared=True),
        "shared_5x5": dict(n=5, shared=True),
    }

    def inputs(self, case: dict[str, Any], shape: tuple[int, ...]) -> Inputs:
        c, n = shape[1], case["n"]
        random = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
        return Inputs(x=random(*shape) * 2 + 1, weight=random(c, c, n, n) / (n * max(c, 1) ** 0.5))

    def ours(self, case: dict[str, Any], x: Inputs) -> Tensor:
        if not case["shared"]:
            return ops.conv(x.x, x.weight)
        out, again = ops.conv(x.x, x.weight, return_input=True)
        return out + again * 0.5

    def eager(self, case: dict[str, Any], x: Inputs) -> Tensor:
        out = F.conv2d(x.x, x.weight, padding=case["n"] // 2)
        return out + x.x * 0.5 if case["shared"] else out

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
        self.check(case, shape, torch.float32, how, target, seeds=32 if shape[1] == 1 else 4)

    @pytest.mark.parametrize("shape", ((9, 16, 8, 7), (9, 80, 6, 7), (3, 80, 5, 6), (1, 130, 4, 4)))
    def test_bands_and_tiles_of_several_images(
        self, case: dict[str, Any], shape: tuple[int, ...], target: Target
    ) -> None:
        if target[0] != "cpu":
            pytest.skip("only the C++ kernels have bands")
        self.check(case, shape, torch.float32, "channels_last", target)

    @pytest.mark.parametrize("shape", ((5, 8, 9, 7), (2, 16, 41, 33), (9, 12, 4, 4), (3, 15, 5, 40)))
    def test_few_channels(self, case: dict[str, Any], shape: tuple[int, ...], target: Target) -> None:
        """Whose tiles are rows of pixels, some in several bands an image."""
        if target[0] != "cpu":
            pytest.skip("only the C++ kernels have tiles of rows")
        self.check(case, shape, torch.float32, "channels_last", target)

    @pytest.mark.parametrize(
        "shape", ((1, 290, 3, 3), (2, 300, 5, 7), (2, 257, 8, 8), (3, 260, 8, 8), (5, 257, 29, 31), (3, 184, 29, 31))
    )
    def test_wide(self, case: dict[str, Any], shape: tuple[int, ...], target: Target) -> None:
        """1x1 weights as they lie for few rows, else in panels; gradients block by block, of many rows in several goes.
        3x3 weights whose products threads share, of many tiles in several goes."""
        if target[0] != "cpu" or case["n"] == 5:
            pytest.skip("only the C++ kernels of 1x1 and 3x3 convolutions know wide weights")
        self.check(case, shape, torch.float32, "channels_last", target)

    @pytest.mark.parametrize("how", ("contiguous", "channels_last", "channels_last_slice"))
    def test_large(self, case: dict[str, Any], how: str, target: Target) -> None:
        if target == ("triton", "cpu"):
            pytest.skip("Triton's interpreter takes minutes at this size")
        self.check(case, LARGE, torch.float32, how, target)

    @pytest.mark.parametrize("channels", (7, 16, 20))
    def test_nan_and_inf(self, case: dict[str, Any], channels: int, target: Target) -> None:
        """What is not finite lands where eager has it; without tiles, which take more channels, nowhere else."""
        x = self.prepared(case, (3, channels, 6, 5), torch.float32, "channels_last", target[1])
        with torch.no_grad():
            x.x[0, 1, 2, 3] = float("nan")
            x.x[1, 3, 0, 0] = float("inf")
            x.x[2, 5, 0, 1] = float("-inf")
        grad = torch.ones(3, channels, 6, 5)
        with dispatch.use(target[0]):
            ours = self.evaluate(lambda i: self.ours(case, i), self._clone(x), grad)
        eager = self.evaluate(lambda i: self.eager(case, i), self._clone(x), grad)
        for name in eager:
            found, wanted = ours[name].isfinite(), eager[name].isfinite()
            assert torch.equal(found, wanted) if channels == 7 else torch.equal(found & wanted, found), name

    def test_gradcheck(self, case: dict[str, Any], target: Target) -> None:
        skip_unserved(target, torch.float64)
        super().test_gradcheck(case, target)

    def test_repeats_to_the_bit(self, case: dict[str, Any], target: Target) -> None:
        if case["n"] == 5 and target[0] != "reference":
            pytest.skip("PyTorch's convolution promises nothing across thread counts")
        super().test_repeats_to_the_bit(case, target)

    def test_autocast(self, case: dict[str, Any], target: Target) -> None:
        """x and the weight are taken in autocast's dtype, as eager's convolution takes them."""
        skip_unserved(target, torch.bfloat16)
        x = self.prepared(case, (2, 4, 3, 5), torch.float32, "channels_last", target[1])
        with dispatch.use(target[0]), torch.autocast(target[1], torch.bfloat16):
            ours = self.ours(case, self._clone(x))
            eager = self.eager(case, self._clone(x))
        assert ours.dtype == eager.dtype
        torch.testing.assert_close(ours, eager, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("needs_grad", (True, False))
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("shape", ((3, 18, 9, 7), (2, 5, 4, 3), (3, 4, 1, 1), (2, 70, 12, 10)))
@pytest.mark.parametrize("n", (1, 3))
@pytest.mark.parametrize("behind", ("bias", "other", "relu", "bias other relu"))
def test_what_follows(behind: str, n: int, shape: tuple[int, ...], how: str, needs_grad: bool, target: Target) -> None:
    """Bias, sum and ReLU, their gradients, and the moments of all that."""
    backend, device = target
    if target == ("triton", "cpu") and (needs_grad or how not in ("contiguous", "channels_last_slice")):
        pytest.skip("the convolution is PyTorch's, moments have a tester of their own")
    torch.manual_seed(0)
    outputs = shape[1] + 3
    x = lay(torch.randn(shape), how, 0, device)
    weight = torch.randn(outputs, shape[1], n, n, device=device) / n
    rest: dict[str, Any] = {}
    if "bias" in behind:
        rest["bias"] = torch.randn(outputs, device=device)
    if "other" in behind:
        rest["other"] = lay(torch.randn(shape[0], outputs, *shape[2:]), how, 1, device)

    def eager(x: Tensor, weight: Tensor, bias: Tensor | None = None, other: Tensor | None = None) -> Tensor:
        out = F.conv2d(x, weight, bias, padding=n // 2)
        out = out if other is None else out + other
        return torch.relu(out) if "relu" in behind else out

    given = dict(x=x, weight=weight, **rest)
    leaves = [t.requires_grad_(needs_grad) for t in given.values()]
    truth = eager(**{name: t.double() for name, t in given.items()})
    with dispatch.use(backend):
        out, moments = ops.conv(**given, relu="relu" in behind, return_moments=True)
    theirs = eager(**given)
    assert out.stride() == layout.strides(out.shape, layout.is_channels_last(x))
    assert_as_good_as(out, theirs, truth, "result")
    torch.testing.assert_close(moments.mean, out.mean((0, 2, 3)), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moments.var, out.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)
    assert moments.count == out[:, 0].numel() and not moments.mean.requires_grad
    if needs_grad:
        grad = torch.randn_like(out)
        found = torch.autograd.grad(out, leaves, grad)
        torch.testing.assert_close(found, torch.autograd.grad(theirs, leaves, grad), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("weight_format", ("contiguous", "channels_last", "outputs_last"))
@pytest.mark.parametrize(("outputs", "n"), ((24, 3), (3, 3), (24, 1), (40, 5)))
def test_other_outputs_and_layouts_of_weights(outputs: int, n: int, weight_format: str, target: Target) -> None:
    backend, device = target
    torch.manual_seed(0)
    x = lay(torch.randn(3, 17, 6, 7), "channels_last", 0, device).requires_grad_()
    weight = torch.randn(outputs, 17, n, n, device=device)
    if weight_format == "outputs_last":
        weight = layout.outputs_last(weight)
    elif weight_format == "channels_last":
        weight = weight.to(memory_format=torch.channels_last)
    weight.requires_grad_()
    with dispatch.use(backend):
        out, again = ops.conv(x, weight, return_input=True)
        grad, more = torch.randn_like(out), torch.randn_like(x)
        found = torch.autograd.grad((out, again), (x, weight), (grad, more))
    eager = F.conv2d(x, weight, padding=n // 2)
    dx, dweight = torch.autograd.grad(eager, (x, weight), grad)
    torch.testing.assert_close(out, eager, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found, (dx + more, dweight), rtol=1e-4, atol=1e-3)
    assert found[1].stride() == weight.stride()


def test_input_comes_out_again(target: Target) -> None:
    """Gradients reach x by whichever of the two results is used; without gradients it is x itself."""
    backend, device = target
    torch.manual_seed(0)
    x = lay(torch.randn(2, 16, 5, 6), "channels_last", 0, device)
    weight = torch.randn(16, 16, 3, 3, device=device, requires_grad=True)
    with dispatch.use(backend):
        assert ops.conv(x, weight.detach(), return_input=True)[1] is x
        out, again = ops.conv(x, weight, return_input=True)  # x needs no gradient
        torch.testing.assert_close(
            torch.autograd.grad((out + again).sum(), weight)[0],
            torch.autograd.grad(F.conv2d(x, weight, padding=1).sum(), weight)[0],
        )
        x.requires_grad_()
        out, moments, again = ops.conv(x, weight, return_moments=True, return_input=True)
        assert torch.equal(again, x) and moments.count == 2 * 5 * 6
        (dx,) = torch.autograd.grad(again, x, torch.ones_like(x), retain_graph=True)
        assert torch.equal(dx, torch.ones_like(x))
        (dx,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(dx, torch.autograd.grad(F.conv2d(x, weight, padding=1).sum(), x)[0])


def test_what_is_kept(target: Target) -> None:
    backend, device = target
    x = torch.randn(3, 18, 8, 8, device=device).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(17, 18, 3, 3, device=device, requires_grad=True)
    kept: list[Tensor] = []
    with dispatch.use(backend), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ops.conv(x, weight, return_moments=True, return_input=True)[0]
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), weight.data_ptr()]
    out = ops.conv(x, weight)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("how", ("contiguous", "channels_last", "channels_last_slice"))
@pytest.mark.parametrize("shape", ((3, 16, 7, 9), (1, 33, 4, 4), (2, 40, 12, 11)))
def test_weight_by_tiles(shape: tuple[int, ...], how: str, target: Target) -> None:
    """One that is transformed beforehand gives the same, and the way back finds it."""
    backend, device = target
    torch.manual_seed(0)
    x = lay(torch.randn(shape), how, 0, device)
    weight, bias = torch.randn(24, shape[1], 3, 3, device=device), torch.randn(24, device=device)
    other = torch.randn(shape[0], 24, *shape[2:], device=device)
    for rest in ((None, None, True, False), (bias, other, True, True)):
        *given, channels_last, relu = rest
        truth = F.conv2d(x.double(), weight.double(), padding=1)
        eager = F.conv2d(x, weight, padding=1)
        if relu:
            truth = torch.relu(truth + bias[:, None, None].double() + other.double())
            eager = torch.relu(eager + bias[:, None, None] + other)
        with dispatch.use(backend):
            out = forward(x, transformed(weight), *given, channels_last, relu, False)[0]
        assert_as_good_as(out, eager, truth, "result")


@pytest.mark.parametrize("n", (1, 3))
def test_opcheck_compile_and_export(n: int, target: Target) -> None:
    backend, device = target
    torch.manual_seed(11)
    calls: list[tuple[Any, Any]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "rkfast.conv" in str(func):
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 16, n, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out, moments, x = ops.conv(x, self.conv.weight, return_moments=True, return_input=True)
            return out * moments.mean[:, None, None] + x

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
            found = torch.autograd.grad(torch.compile(module, fullgraph=True, backend="aot_eager")(x).sum(), leaves)
            torch.testing.assert_close(found, expected)
            exported = torch.export.export(module, (x.detach(),)).module()
            torch.testing.assert_close(exported(x.detach()), module(x.detach()))


def test_on_meta() -> None:
    x = torch.empty(3, 6, 5, 4, device="meta").to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.empty(7, 6, 3, 3, device="meta", requires_grad=True)
    out, moments, again = ops.conv(x, weight, return_moments=True, return_input=True)
    assert out.is_meta and out.shape == (3, 7, 5, 4) and moments.mean.shape == (7,)
    assert out.is_contiguous(memory_format=torch.channels_last)
    dx, dweight = torch.autograd.grad((out, again), (x, weight), (torch.empty_like(out), torch.empty_like(x)))
    assert dx.stride() == x.stride() and dweight.shape == weight.shape
    tiles = torch.empty(16, 6, 7, device="meta")
    assert forward(x, tiles, None, None, True, False, False)[0].shape == out.shape


@pytest.mark.parametrize("format", (torch.contiguous_format, torch.channels_last))
def test_transforms_take_plain_pytorch(format: torch.memory_format) -> None:
    x = torch.randn(3, 4, 5, 5).contiguous(memory_format=format)[:, None]
    weight = torch.randn(6, 4, 3, 3)
    found = torch.func.vmap(lambda t: ops.conv(t, weight, relu=True))(x)
    torch.testing.assert_close(found, torch.stack([ops.conv(t, weight, relu=True) for t in x]), rtol=1e-5, atol=1e-5)
    grad = torch.func.grad(lambda t: ops.conv(t, weight).square().sum())(x[0])
    t = x[0].requires_grad_()
    torch.testing.assert_close(
        grad, torch.autograd.grad(ops.conv(t, weight).square().sum(), t)[0], rtol=1e-4, atol=1e-4
    )


def test_why_not() -> None:
    def image_of(channels: int, n: int = 2) -> Tensor:
        return torch.randn(n, channels, 4, 4).to(memory_format=torch.channels_last)

    x, shape = image_of(16), (16, 16, 3, 3)
    if native.cpu_reason() is None:
        assert kernel_reason(x.double(), shape) == "dtype torch.float64: the C++ kernel serves float32"
        assert kernel_reason(x, shape) is None
        assert kernel_reason(x, (2, 16, 1, 1)) is None
        assert kernel_reason(x[:0], shape) == "an empty tensor has no rows"
        assert "contiguous" in str(kernel_reason(x.contiguous(), shape))
        assert kernel_reason(x, (8, 16, 3, 3)) is None
        others = ((7, 16, 3, 3), (17, 15, 3, 3), (16, 16, 5, 5))
        for image, other in ((x[:, :, :3], shape), *((x, other) for other in others)):
            assert "gains nothing" in str(kernel_reason(image, other))
            assert "gains nothing" in str(transformed_reason(image, other))
            with dispatch.use("cpu"):
                assert kernel_reason(image, other) is None
                assert "gains nothing" in str(transformed_reason(image, other))
        few = image_of(64)  # 32 pixels
        assert kernel_reason(few, (213, 64, 3, 3)) is None
        assert "too few pixels" in str(kernel_reason(few, (214, 64, 3, 3)))
        assert transformed_reason(few, (160, 64, 3, 3)) is None
        assert "too few pixels" in str(transformed_reason(few, (161, 64, 3, 3)))
        assert "1x1" in str(transformed_reason(x, (16, 16, 1, 1)))
        with torch.no_grad():  # forward alone
            assert kernel_reason(x, (21, 16, 3, 3)) is None
            assert "too few pixels" in str(kernel_reason(x, (22, 16, 3, 3)))
            assert "no slower" in str(kernel_reason(x, (2, 16, 1, 1)))
            with dispatch.use("cpu"):
                assert kernel_reason(x, (2, 16, 1, 1)) is None
    with dispatch.use("reference"):
        assert kernel_reason(x, shape) is None
    with dispatch.use("cuda"):
        assert kernel_reason(x, shape) == "there is no kernel of cuda"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (dict(x=torch.randn(2, 4, 5)), ValueError, r"x: expected \[N, C, H, W\], got 3"),
        (dict(x=torch.ones(2, 4, 5, 5).int()), TypeError, "x: expected a floating-point tensor"),
        (dict(x="x"), TypeError, "x: expected a Tensor, got str"),
        (dict(weight=None), TypeError, "weight: expected a Tensor, got NoneType"),
        (dict(weight=torch.randn(4, 4, 3, 3).double()), TypeError, "weight: dtype torch.float64 differs from x's"),
        (dict(weight=torch.randn(4, 4, 3, 3, device="meta")), ValueError, "weight: device meta differs"),
        (dict(weight=torch.randn(4, 4, 2, 2)), ValueError, r"weight: expected \[k, C, n, n\] with n odd, got"),
        (dict(weight=torch.randn(16, 4, 4)), ValueError, r"weight: expected \[k, C, n, n\] with n odd, got"),
        (dict(weight=torch.randn(4, 2, 3, 3)), ValueError, r"weight: expected \[K, 4, n, n\] .*; for groups"),
        (dict(bias=torch.ones(3)), ValueError, r"bias: shape \[3\] does not fit"),
        (dict(bias=torch.ones(4).double()), TypeError, "bias: dtype torch.float64 differs from x's"),
        (dict(other=torch.ones(2, 3, 5, 5)), ValueError, r"other: shape \[2, 3, 5, 5\] differs from the result's"),
        (dict(other=torch.ones(2, 4, 5, 5).half()), TypeError, "other: dtype torch.float16 differs"),
        (dict(other=torch.ones(2, 4, 5, 5, device="meta")), ValueError, "other: device meta differs"),
        (dict(other=1.0), TypeError, "other: expected a Tensor, got float"),
        (dict(relu=1), TypeError, "relu: expected True or False, got 1"),
        (dict(return_moments=1), TypeError, "return_moments: expected True or False, got 1"),
        (dict(return_input=None), TypeError, "return_input: expected True or False, got None"),
    ),
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = dict(x=torch.randn(2, 4, 5, 5), weight=torch.randn(4, 4, 3, 3))
    with pytest.raises(error, match=message):
        ops.conv(**{**given, **change})


@pytest.mark.skipif(native.cpu_reason() is not None, reason="there are no C++ kernels")
def test_bad_arguments_of_the_kernel() -> None:
    x = torch.randn(2, 16, 5, 5).to(memory_format=torch.channels_last)
    rest = (None, None, True, False, False)
    with dispatch.use("cpu"):
        for weight in (torch.randn(15, 16, 16), torch.randn(16, 8, 16), torch.randn(16, 16), torch.randn(16, 16, 7)):
            with pytest.raises(ValueError, match=r"weight: "):
                forward(x, weight, *rest)
        with pytest.raises(ValueError, match="other: "):
            forward(x, torch.randn(16, 16, 3, 3), None, x[:1], True, False, False)
        with pytest.raises(ValueError, match="bias: "):
            forward(x, torch.randn(16, 16, 3, 3), torch.ones(3), None, True, False, False)
