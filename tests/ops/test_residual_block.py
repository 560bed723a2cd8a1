"""residual_block beside the block written out with F.conv2d and F.batch_norm, both against float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn, profiler

from rkfast import dispatch, native, ops
from rkfast.nn.norm import as_norm
from rkfast.ops import Norm, checks, layout
from rkfast.ops.conv import block_reason
from tests.ops.tester import (
    DTYPES,
    LAYOUTS,
    Inputs,
    OpTester,
    assert_as_good_as,
    assert_gradients_as_good_as,
    lay,
)

SERVED = ("reference", "cpu", "triton")
Target = tuple[str, str]  # backend, device
NORM = Norm(None, None, None, None)
SHAPES = ((2, 5, 4, 3), (3, 4, 2, 1), (2, 2, 5, 5), (2, 40, 1, 17), (3, 16, 7, 9), (2, 33, 4, 4))
EMPTY = (0, 5, 4, 4)
LARGE = (3, 40, 17, 31)  # more than one unit of work in every backend; few enough ReLUs for none to be near zero


def case(
    sizes: str = "3 3",
    shortcut: bool = False,
    projection: bool = False,
    step: bool = True,
    training: str = "batch",
    affine: bool = True,
    memory: str = "speed",
) -> dict[str, Any]:
    """sizes: of the convolutions, "n/stride"; training: batch, frozen (running statistics), mixed, or bare (there are
    none)."""
    found = dict(shortcut=shortcut, projection=projection, step=step, training=training, affine=affine, memory=memory)
    pairs = [(each + "/1").split("/")[:2] for each in sizes.split()]
    return found | {"sizes": [int(n) for n, _ in pairs], "strides": [int(s) for _, s in pairs]}


def strided(size: int, case: dict[str, Any]) -> int:
    for stride in case["strides"]:
        size = (size - 1) // stride + 1 if size else 0
    return size


def skip_unserved(target: Target, dtype: torch.dtype) -> None:
    if target[0] == "cpu" and dtype != torch.float32:
        pytest.skip("the C++ kernel serves float32")


class TestResidualBlock(OpTester):
    OPS = ("residual_block", "residual_block_backward")
    ACTIVATIONS = ("x", "shortcut", "convs")
    CASES = {
        "basic": case(),
        "basic_shortcut": case(shortcut=True, step=False),
        "bottleneck": case("1 3 1"),
        "bottleneck_shortcut": case("1 3 1", shortcut=True, step=False, training="mixed"),
        "frozen": case("1 3 1", training="frozen"),
        "bare": case("3 1", training="bare", affine=False, step=False),
        "one": case("1", shortcut=True),
        "alone": case("1"),
        "pointwise": case("1 1", training="mixed"),
        "wide_kernel": case("5 3"),
        "strided": case("3/2 3", projection=True),
        "strided_bottleneck": case("1 3/2 1", projection=True, training="mixed"),
        "strided_1x1": case("1/2 3 1", projection=True, step=False),
        "strided_shortcut": case("3/2 3/3", shortcut=True, training="bare"),
        "strided_frozen": case("3 1/2", projection=True, training="frozen"),
        "projected": case("1 3 1", projection=True, affine=False),
        "minimal": case("1 3", training="mixed", memory="min"),
        "minimal_strided": case("3/2 3", projection=True, memory="min"),
        "minimal_frozen": case("1 3 1", training="frozen", memory="min"),
        "minimal_one": case("1", shortcut=True, memory="min"),
    }

    def inputs(self, case: dict[str, Any], shape: tuple[int, ...]) -> Inputs:
        c = shape[1]
        random = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
        widths = [c, *(c + 1 for _ in case["sizes"][1:]), c]
        tracked = case["training"] != "bare"
        convs = list(zip(widths, widths[1:], case["sizes"], strict=False))
        if case["projection"]:
            convs.append((c, c, 1))
            widths.append(c)
        return Inputs(
            x=random(*shape) * 2 + 1,
            shortcut=random(*shape[:2], *(strided(s, case) for s in shape[2:])) if case["shortcut"] else None,
            step=random(c).abs() if case["step"] else None,
            convs=[random(k, w, n, n) / (n * max(w, 1) ** 0.5) for w, k, n in convs],
            weight=[1 + 0.3 * random(w) for w in widths[1:]] if case["affine"] else [],
            bias=[0.3 * random(w) for w in widths[1:]] if case["affine"] else [],
            running_mean=[0.1 * random(w) for w in widths[1:]] if tracked else [],
            running_var=[random(w).square() + 0.5 for w in widths[1:]] if tracked else [],
        )

    def norms(self, case: dict[str, Any], x: Inputs) -> list[Norm]:
        kind = case["training"]
        found = []
        for i in range(len(x.convs)):
            affine = (x.weight[i], x.bias[i]) if x.weight else (None, None)
            running = (x.running_mean[i], x.running_var[i]) if x.running_mean else (None, None)
            training = kind in ("batch", "bare") or (kind == "mixed" and i % 2 == 0)
            found.append(Norm(*affine, *running, None, training, eps=(1e-5, 1e-3)[i % 2]))
        return found

    def ours(self, case: dict[str, Any], x: Inputs) -> Tensor:
        options = {"shortcut": x.shortcut, "step": x.step, "memory": case["memory"]}
        branch, norms = len(case["sizes"]), self.norms(case, x)
        if case["projection"]:
            options["projection"] = (x.convs[branch], norms[branch])
        if any(stride > 1 for stride in case["strides"]):
            options["strides"] = case["strides"]
        return ops.residual_block(x.x, x.convs[:branch], norms[:branch], **options)

    def eager(self, case: dict[str, Any], x: Inputs) -> Tensor:
        def normed(y: Tensor, conv: Tensor, norm: Norm, stride: int) -> Tensor:
            y = F.conv2d(y, conv, stride=stride, padding=conv.shape[2] // 2)
            running = (norm.running_mean, norm.running_var)
            return F.batch_norm(y, *running, norm.weight, norm.bias, norm.batch, 0.1, norm.eps)

        y, norms = x.x, self.norms(case, x)
        for i, stride in enumerate(case["strides"]):
            y = normed(torch.relu(y) if i else y, x.convs[i], norms[i], stride)
        y = y if x.step is None else y * x.step.to(y.dtype)[:, None, None]
        shortcut = x.x if x.shortcut is None else x.shortcut
        if case["projection"]:
            shortcut = normed(x.x, x.convs[-1], norms[-1], math.prod(case["strides"]))
        return torch.relu(y + shortcut)

    def check(
        self,
        case: dict[str, Any],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        how: str,
        target: Target,
        seeds: int = 1,
    ) -> None:
        """Results one by one, gradients together: they differ by luck where a ReLU's input is near zero."""
        pooled = [self.compare(case, shape, dtype, how, target, seed) for seed in range(seeds)]
        gathered = {name: [torch.stack([p[name][k].cpu() for p in pooled]) for k in range(3)] for name in pooled[0]}
        gradients = [{n: g[k] for n, g in gathered.items() if n.startswith("gradient")} for k in range(3)]
        if gradients[0] and shape != EMPTY:
            assert_gradients_as_good_as(*gradients)
        for name, found in gathered.items():
            if not name.startswith("gradient"):
                assert_as_good_as(*found, name)

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
        self.check(case, shape, torch.float32, how, target, seeds=4 if target != ("triton", "cpu") else 2)

    @pytest.mark.parametrize("shape", ((5, 257, 13, 11), (2, 290, 3, 3), (2, 290, 4, 4)))
    def test_wide(self, case: dict[str, Any], shape: tuple[int, ...], target: Target) -> None:
        """1x1 weights in panels, whose gradients are taken block by block, of several goes; and few pixels."""
        if target[0] != "cpu":
            pytest.skip("only the C++ kernels have panels")
        self.check(case, shape, torch.float32, "channels_last", target)

    @pytest.mark.parametrize("how", ("contiguous", "channels_last", "channels_last_slice"))
    def test_large(self, case: dict[str, Any], how: str, target: Target) -> None:
        if target == ("triton", "cpu"):
            pytest.skip("Triton's interpreter takes minutes at this size")
        self.check(case, LARGE, torch.float32, how, target)

    def test_nan_and_inf(self, case: dict[str, Any], target: Target) -> None:
        """With statistics of the batch what is not finite is everywhere in the result, as eager has it."""
        x = self.prepared(case, (3, 8, 6, 5), torch.float32, "channels_last", target[1])
        with torch.no_grad():
            x.x[0, 1, 2, 3] = float("nan")
            x.x[1, 3, 0, 0] = float("inf")
        with dispatch.use(target[0]):
            ours = self.ours(case, self._clone(x))
        eager = self.eager(case, self._clone(x))
        if case["training"] != "frozen":
            assert torch.equal(torch.isfinite(ours), torch.isfinite(eager))
        else:  # a 3x3 convolution by tiles spreads it over all of these
            assert not torch.isfinite(ours[~torch.isfinite(eager)]).any()

    def test_gradcheck(self, case: dict[str, Any], target: Target) -> None:
        skip_unserved(target, torch.float64)
        super().test_gradcheck(case, target)

    def test_repeats_to_the_bit(self, case: dict[str, Any], target: Target) -> None:
        if {5, *case["strides"]} & {2, 3, 5} and target[0] != "reference":
            pytest.skip("PyTorch's convolution promises nothing across thread counts")
        super().test_repeats_to_the_bit(case, target)

    def test_autocast(self, case: dict[str, Any], target: Target) -> None:
        """x, shortcut and convolutions are taken in autocast's dtype, as eager's convolutions take them."""
        skip_unserved(target, torch.bfloat16)
        x = self.prepared(case, (2, 4, 3, 5), torch.float32, "channels_last", target[1])
        with dispatch.use(target[0]):
            low = x.map(
                lambda n, t: (
                    t.detach().to(torch.bfloat16) if n.split("[")[0] in self.ACTIVATIONS else t.detach().clone()
                )
            )
            plain = self.ours(case, low)
            with torch.autocast(target[1], torch.bfloat16):
                under = self.ours(case, self._clone(x))
        assert under.dtype == torch.bfloat16
        torch.testing.assert_close(plain, under)


class Block(nn.Module):
    """A bottleneck of C channels, written out or as one op."""

    def __init__(self, channels: int = 16, middle: int = 16) -> None:
        super().__init__()
        widths = (channels, middle, middle, channels)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, n, padding=n // 2, bias=False)
            for a, b, n in zip(widths, widths[1:], (1, 3, 1), strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths[1:])
        self.step = nn.Parameter(torch.rand(channels))
        self.fused = True

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return ops.residual_block(x, [c.weight for c in self.convs], list(map(as_norm, self.norms)), step=self.step)
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(torch.relu(y) if i else y))
        return torch.relu(x + y * self.step[:, None, None])


def test_running_statistics_and_counters(target: Target) -> None:
    """Of three steps, one norm with a cumulative average, one frozen, one without a counter."""
    backend, device = target
    torch.manual_seed(0)
    block = Block().to(device)
    block.norms[0].momentum = None
    block.norms[1].eval()
    plain = copy.deepcopy(block)
    plain.fused = False
    for _ in range(3):
        x = lay(torch.randn(3, 16, 5, 6), "channels_last", 0, device)
        with dispatch.use(backend):
            block(x)
        plain(x)
    for (name, ours), theirs in zip(block.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    assert [norm.num_batches_tracked.item() for norm in block.norms] == [3, 0, 3]
    block.eval(), plain.eval()
    with dispatch.use(backend), torch.no_grad():
        torch.testing.assert_close(block(x), plain(x))
    assert block.norms[0].num_batches_tracked == 3


def one_kind(needed: str, target: Target, sizes: tuple[int, ...], shortcut: str, dtype: torch.dtype) -> None:
    """Whatever else is frozen. sizes: of the convolutions; shortcut: given, projected or own."""
    backend, device = target
    torch.manual_seed(0)
    widths = (16, *(16 for _ in sizes[1:]), 16 if shortcut == "own" else 24)

    def conv(c: int, k: int, n: int) -> Tensor:
        return (torch.randn(k, c, n, n, device=device) / (n * c**0.5)).to(dtype)

    convs = [conv(c, k, n) for c, k, n in zip(widths[:-1], widths[1:], sizes, strict=True)]
    convs += [conv(16, 24, 1)] if shortcut == "projected" else []
    made: dict[str, Any] = dict(
        x=lay(torch.randn(2, 16, 6, 5).to(dtype), "channels_last", 0, device),
        shortcut=lay(torch.randn(2, 24, 6, 5).to(dtype), "channels_last", 1, device),
        convs=convs,
        weight=[torch.rand(w.shape[0], device=device) for w in convs],
        step=torch.rand(widths[-1], device=device),
    )

    def run(given: dict[str, Any]) -> Tensor:
        norms = [Norm(w, None, None, None) for w in given["weight"]]
        options = {"shortcut": given["shortcut"]} if shortcut == "given" else {}
        convs = given["convs"][: len(sizes)]
        if shortcut == "projected":
            options["projection"] = (given["convs"][-1], norms[-1])
        return ops.residual_block(given["x"], convs, norms[: len(sizes)], step=given["step"], **options)

    def leaves(wanted: set[str]) -> tuple[dict[str, Any], list[Tensor]]:
        found: list[Tensor] = []

        def each(name: str, t: Tensor) -> Tensor:
            t = t.detach().clone().requires_grad_(name in wanted)
            found.extend([t] if name == needed else [])
            return t

        given = {n: [each(n, t) for t in v] if isinstance(v, list) else each(n, v) for n, v in made.items()}
        return given, found

    with dispatch.use(backend):
        given, every = leaves(set(made))
        expected = torch.autograd.grad(run(given).square().sum(), every)
        given, alone = leaves({needed})
        torch.testing.assert_close(torch.autograd.grad(run(given).square().sum(), alone), expected)


@pytest.mark.parametrize("needed", ("x", "shortcut", "convs", "weight", "step"))
def test_gradients_of_one_kind(needed: str, target: Target) -> None:
    one_kind(needed, target, (3, 1), "given", torch.float32)


def contiguous(t: Tensor) -> Tensor:
    return t.contiguous() if t.dim() == 4 else t


def hooked(target: Target, dtype: torch.dtype) -> None:
    """As torch.autograd.graph.save_on_cpu(pin_memory=True), which gives everything back in another layout."""
    backend, device = target
    torch.manual_seed(0)
    x = lay(torch.randn(2, 16, 6, 5).to(dtype), "channels_last", 0, device).requires_grad_()
    convs = [(torch.randn(16, 16, n, n, device=device) / (4 * n)).to(dtype).requires_grad_() for n in (1, 3, 1)]
    norms = [Norm(torch.rand(16, device=device, requires_grad=True), None, None, None) for _ in convs]
    leaves = [x, *convs, *(norm.weight for norm in norms)]

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ops.residual_block(x, convs, norms).square().sum(), leaves)

    with dispatch.use(backend):
        expected = gradients()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, contiguous):
            found = gradients()
    torch.testing.assert_close(found, expected)


def test_hooks_that_give_back_another_layout(target: Target) -> None:
    hooked(target, torch.float32)


def test_what_is_kept(target: Target) -> None:
    """x, the results of the convolutions, a bit for each element of the result, parameters and vectors."""
    backend, device = target
    block = Block().to(device)
    x = lay(torch.randn(3, 16, 8, 8), "channels_last", 0, device).requires_grad_()
    kept: list[Tensor] = []
    with dispatch.use(backend), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(x)
    parameters = {p.data_ptr() for p in block.parameters()}
    large = [t for t in kept if t.dim() == 4 and t.data_ptr() not in parameters]
    assert len(large) == 4 and large[0].data_ptr() == x.data_ptr()
    assert sum(t.numel() for t in kept if t.dtype == torch.uint8) == x.numel() // 8
    out = block(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_shortcut_and_step_that_depend_on_the_rest(target: Target) -> None:
    """Gradients of the gradient count each way to x and to the weights once."""
    backend, device = target
    if backend == "cpu":
        pytest.skip("the C++ kernel serves float32")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 3, dtype=torch.float64, device=device, requires_grad=True)
    conv = torch.randn(3, 3, 3, 3, dtype=torch.float64, device=device, requires_grad=True)

    def f(x: Tensor, conv: Tensor) -> Tensor:
        step = conv.mean((1, 2, 3))
        return ops.residual_block(x, [conv], [Norm(None, None, None, None)], shortcut=x * 0.5, step=step)

    with dispatch.use(backend):
        assert torch.autograd.gradcheck(f, (x, conv))
        assert torch.autograd.gradgradcheck(f, (x, conv))
        once = torch.autograd.grad(f(x, conv).square().sum(), (x, conv))
        again = torch.autograd.grad(f(x, conv).square().sum(), (x, conv), create_graph=True)
    torch.testing.assert_close(once, again)


def test_opcheck_compile_and_export(target: Target) -> None:
    backend, device = target
    torch.manual_seed(11)
    calls: list[tuple[Any, Any]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "rkfast.residual_block" in str(func):
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    for how in ("channels_last", "contiguous"):
        module = Block().to(device)
        x = lay(torch.randn(2, 16, 5, 4), how, 0, device).requires_grad_()
        leaves = [x, *module.parameters()]
        with dispatch.use(backend):
            with Recorder():
                torch.autograd.grad(module(x).sum(), leaves)
            assert len(calls) == 2
            for func, args in calls:
                detached = [
                    [t if t is None or not isinstance(t, Tensor) else t.detach() for t in arg]
                    if isinstance(arg, (list, tuple))
                    else arg.detach()
                    if isinstance(arg, Tensor)
                    else arg
                    for arg in args
                ]
                torch.library.opcheck(func, detached)
            calls.clear()
            expected = torch.autograd.grad(module(x).sum(), leaves)
            torch._dynamo.reset()
            found = torch.autograd.grad(torch.compile(module, fullgraph=True, backend="aot_eager")(x).sum(), leaves)
            torch.testing.assert_close(found, expected)
            module.eval()
            exported = torch.export.export(module, (x.detach(),)).module()
            torch.testing.assert_close(exported(x.detach()), module(x.detach()))


def test_on_meta() -> None:
    block = Block(6, 7).to("meta")
    x = torch.empty(3, 6, 5, 4, device="meta").to(memory_format=torch.channels_last).requires_grad_()
    out = block(x)
    assert out.is_meta and out.shape == x.shape and out.stride() == x.stride()
    found = torch.autograd.grad(out, [x, *block.parameters()], torch.empty_like(out))
    assert [g.shape for g in found] == [t.shape for t in (x, *block.parameters())]


@pytest.mark.parametrize("format", (torch.contiguous_format, torch.channels_last))
def test_transforms_take_plain_pytorch(format: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 5).contiguous(memory_format=format)[:, None]
    conv, norm = torch.randn(4, 4, 3, 3), Norm(torch.rand(4), None, torch.zeros(4), torch.ones(4), None, False)
    found = torch.func.vmap(lambda t: ops.residual_block(t, [conv], [norm]))(x)
    torch.testing.assert_close(found, torch.stack([ops.residual_block(t, [conv], [norm]) for t in x]))
    grad = torch.func.grad(lambda t: ops.residual_block(t, [conv], [norm]).square().sum())(x[0])
    t = x[0].requires_grad_()
    out = ops.residual_block(t, [conv], [norm])
    torch.testing.assert_close(grad, torch.autograd.grad(out.square().sum(), t)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(native.cpu_reason() is not None, reason="there are no C++ kernels")
def test_why_not() -> None:
    x = torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last)
    assert block_reason(x, True) is None
    assert "contiguous" in str(block_reason(x.contiguous(), True))
    assert "float32" in str(block_reason(x.double(), True))
    with dispatch.use("cpu"):
        assert block_reason(x.contiguous(), True) is None
    with dispatch.use("reference"):
        assert block_reason(x.double(), True) is None
    with dispatch.use("cuda"):
        assert block_reason(x, True) == "there is no kernel of cuda"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    (
        (dict(x=torch.randn(2, 4, 5)), ValueError, r"x: expected \[N, C, H, W\], got 3"),
        (dict(x=torch.ones(2, 4, 5, 5).int()), TypeError, "x: expected a floating-point tensor"),
        (dict(convs=[]), ValueError, "convs: expected at least one weight"),
        (dict(strides=[2]), ValueError, "strides: expected one for each of 2 convolutions, got 1"),
        (dict(strides=[1, 0]), ValueError, "strides: expected numbers from 1 to 4096, got 0"),
        (dict(strides=[1, 2.0]), ValueError, "strides: expected numbers from 1 to 4096, got 2.0"),
        (dict(strides=[1, True]), ValueError, "strides: expected numbers from 1 to 4096, got True"),
        (dict(strides=[1, 1 << 62]), ValueError, "strides: expected numbers from 1 to 4096, got 4611"),
        (
            dict(norms=[NORM, NORM._replace(momentum="a")]),
            TypeError,
            r"norms\[1\]\.momentum: expected a number, got 'a'",
        ),
        (dict(norms=[NORM, NORM._replace(eps=None)]), TypeError, r"norms\[1\]\.eps: expected a number, got None"),
        (dict(norms=[NORM, NORM._replace(eps=0.0)]), ValueError, r"norms\[1\]\.eps: expected a positive number"),
        (dict(strides=2), TypeError, "strides: expected a list, got int"),
        (dict(strides=[2, 1]), ValueError, r"the result \[2, 4, 3, 3\]; give what is added, or a projection"),
        (dict(strides=[1, 2], shortcut=torch.ones(2, 4, 3, 3), memory="min"), ValueError, 'memory: "min" makes'),
        (dict(projection=torch.ones(4, 4, 1, 1)), TypeError, "projection: expected a weight and a Norm, got Tensor"),
        (dict(projection=7), TypeError, "projection: expected a weight and a Norm, got int"),
        (dict(projection=(torch.ones(4, 4, 3, 3), NORM)), ValueError, r"projection\[0\]: expected \[4, 4, 1, 1\]"),
        (dict(projection=(torch.ones(4, 4, 1, 1), None)), TypeError, r"projection\[1\]: expected a Norm, got NoneType"),
        (
            dict(projection=(torch.ones(4, 4, 1, 1), NORM), shortcut=torch.ones(2, 4, 5, 5)),
            ValueError,
            "projection: it takes the place of shortcut",
        ),
        (dict(memory="most"), ValueError, "memory: expected one of speed, min, got 'most'"),
        (dict(convs=torch.ones(4, 4, 3, 3)), TypeError, "convs: expected a list, got Tensor"),
        (dict(convs=[None, torch.ones(4, 4, 1, 1)]), TypeError, r"convs\[0\]: expected a Tensor, got NoneType"),
        (dict(convs=[torch.ones(4, 4, 3, 3), torch.ones(4, 2, 3, 3)]), ValueError, r"convs\[1\]: expected \[K, 4, n"),
        (dict(convs=[torch.ones(4, 4, 3, 3), torch.ones(3, 4, 1, 1)]), ValueError, r"norms\[1\]\.weight: shape \[4\]"),
        (dict(convs=[torch.ones(4, 4, 3, 3).double()] * 2), TypeError, r"convs\[0\]: dtype torch.float64 differs"),
        (dict(norms=[]), ValueError, "norms: expected one for each of 2 convolutions, got 0"),
        (dict(norms=[Norm(None, None, None, None), "bn"]), TypeError, r"norms\[1\]: expected a Norm, got str"),
        (dict(norms=[Norm(None, None, None, None, group="0")] * 2), ValueError, r"norms\[0\]\.group"),
        (dict(convs=[torch.ones(4, 4, 2, 2)] * 2), ValueError, r"convs\[0\]: expected \[k, C, n, n\] with n odd"),
        (dict(norms=[Norm(None, torch.ones(3), None, None)] * 2), ValueError, r"norms\[0\]\.bias: shape \[3\]"),
        (dict(norms=[Norm(None, None, torch.ones(4), None)] * 2), ValueError, "come together, or not at all"),
        (
            dict(norms=[Norm(None, None, torch.ones(1).expand(4), torch.ones(4))] * 2),
            ValueError,
            "running_mean: expand",
        ),
        (
            dict(norms=[Norm(None, None, torch.ones(4), torch.ones(4, requires_grad=True))] * 2),
            RuntimeError,
            r"norms\[0\]\.running_var: running statistics are not differentiable",
        ),
        (
            dict(norms=[Norm(None, None, torch.ones(4), torch.ones(4), torch.tensor(0.0))] * 2),
            TypeError,
            r"norms\[0\]\.num_batches_tracked: expected an integer tensor",
        ),
        (dict(x=torch.ones(1, 4, 1, 1)), ValueError, "expected more than 1 value per channel when training"),
        (dict(shortcut=torch.ones(2, 3, 5, 5)), ValueError, r"shortcut: shape \[2, 3, 5, 5\] differs"),
        (dict(shortcut=torch.ones(2, 4, 5, 5).half()), TypeError, "shortcut: dtype torch.float16 differs"),
        (dict(step=torch.ones(3)), ValueError, r"step: shape \[3\] does not fit"),
        (dict(step=torch.ones(2, 4)), ValueError, r"step: shape \[2, 4\] does not fit"),
        (dict(step=torch.ones(4, device="meta")), ValueError, "step: device meta differs"),
    ),
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    running = torch.zeros(4), torch.ones(4)
    norm = Norm(torch.ones(4), None, *running, torch.tensor(0))
    given: dict[str, Any] = dict(
        x=torch.randn(2, 4, 5, 5), convs=[torch.randn(4, 4, 3, 3), torch.randn(4, 4, 1, 1)], norms=[norm, norm]
    )
    with pytest.raises(error, match=message):
        ops.residual_block(**{**given, **change})
    assert torch.equal(running[0], torch.zeros(4)) and norm.num_batches_tracked == 0


@pytest.mark.skipif(native.cpu_reason() is not None, reason="there are no C++ kernels")
def test_what_is_usual_is_checked_at_once() -> None:
    x, convs = torch.randn(2, 4, 5, 5), [torch.randn(4, 4, 3, 3, requires_grad=True)]
    norm = Norm(torch.ones(4), torch.ones(4), torch.zeros(4), torch.ones(4), torch.tensor(0))
    vectors = [*norm[:5]]
    usual = checks.UNIFORM | checks.PLAIN
    assert checks.survey_block(x, None, convs, vectors, None, [1]) == usual | checks.NEEDS_GRAD
    laid = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert checks.survey_block(laid, x, convs, vectors, torch.ones(4), [1]) == usual | checks.CHANNELS_LAST
    with torch.autocast("cpu", torch.bfloat16):
        assert checks.survey_block(x, None, convs, vectors, None, [1]) == 0
    assert checks.survey_block(torch._neg_view(x), None, convs, vectors, None, [1]) == 0
    assert checks.survey_block(x, None, [torch._neg_view(convs[0].detach())], vectors, None, [1]) == 0
    assert checks.survey_block(x, None, convs, vectors[:4], None, [1]) == 0
    with profiler.profile():
        assert checks.survey_block(x, None, convs, vectors, None, [1]) == checks.UNIFORM | checks.NEEDS_GRAD
    half, projected = torch.randn(2, 4, 3, 3), [*convs, torch.randn(4, 4, 1, 1)]
    assert checks.survey_block(x, half, convs, vectors, None, [2]) == usual | checks.NEEDS_GRAD
    assert checks.survey_block(x, None, projected, vectors * 2, None, [2]) == usual | checks.NEEDS_GRAD
    assert checks.survey_block(x, None, projected, vectors * 2, None, [1, 1]) == usual | checks.NEEDS_GRAD
    assert checks.survey_block(x, half, projected, vectors * 2, None, [2]) == 0
    assert checks.survey_block(x, None, convs, vectors, None, [2]) == 0
    assert checks.survey_block(x, half, convs, vectors, None, [0]) == 0
    assert checks.survey_block(x, half, convs, vectors, None, [1 << 62]) == 0
    assert checks.survey_block(x, None, [*convs, torch.randn(4, 4, 3, 3)], vectors * 2, None, [2]) == 0
    assert checks.survey_block(x, None, [*convs, torch.randn(5, 4, 1, 1)], vectors * 2, None, [2]) == 0
    assert checks.survey_block(x[:1], None, projected, vectors * 2, None, [5]) == 0


def test_projection_of_another_width_needs_a_shortcut() -> None:
    with pytest.raises(
        ValueError, match=r"shortcut: x is \[2, 4, 5, 5\] and the result \[2, 6, 5, 5\]; give what is added, or"
    ):
        ops.residual_block(torch.randn(2, 4, 5, 5), [torch.randn(6, 4, 1, 1)], [Norm(None, None, None, None)])


@pytest.mark.skipif(native.cpu_reason() is not None, reason="there are no C++ kernels")
def test_bad_arguments_of_the_kernel() -> None:
    x = torch.randn(2, 16, 5, 5).to(memory_format=torch.channels_last)
    conv, vectors = torch.randn(16, 16, 3, 3), [None] * 4
    forward = torch.ops.rkfast.residual_block
    with dispatch.use("cpu"):
        with pytest.raises(ValueError, match="convs, norms, strides, eps"):
            forward(x, None, [conv], vectors[:3], None, [1], [1e-5], True, True)
        with pytest.raises(ValueError, match="weight: "):
            forward(x, None, [conv[:, :8]], vectors, None, [1], [1e-5], True, True)
        with pytest.raises(ValueError, match="expected CPU tensors of one shape"):
            forward(x, x[:, :8], [conv], vectors, None, [1], [1e-5], True, True)
        lone = [None, None, torch.zeros(16), None]
        with pytest.raises(ValueError, match="norms: give mean and var, or neither"):
            forward(x, None, [conv], lone, None, [1], [1e-5], True, True)
        both = [conv, torch.randn(16, 16, 1, 1)], vectors * 2, None, [1], [1e-5] * 2, True, True
        with pytest.raises(ValueError, match="a projection takes its place"):
            forward(x, x, *both)
        with pytest.raises(ValueError, match="expected a projection of 1x1"):
            forward(x, None, [conv, conv], *both[1:])
        with pytest.raises(ValueError, match="expected one value per channel, got"):
            forward(x, None, *both[:2], torch.ones(2, 16), *both[3:])
        with pytest.raises(ValueError, match=r"x: expected \[N, C, H, W\], got 5"):
            forward(x[None], None, [conv], vectors, None, [1], [1e-5], True, True)
        out, mask, *rest = forward(x, None, [conv], vectors, None, [1], [1e-5], True, True)
        assert layout.is_channels_last(out) and len(rest) == 3
        with pytest.raises(ValueError, match="outs, batch"):
            torch.ops.rkfast.residual_block_backward(
                out, x, [], mask, [conv], [None, None, *rest[1:]], None, [1], [1e-5], [True], True, True, True, False,
                True, False,
            )  # fmt: skip


@pytest.mark.parametrize("fixed", ("projection", "branch"))
def test_twice_differentiable_where_one_side_is_fixed(fixed: str, target: Target) -> None:
    backend, device = target
    torch.manual_seed(0)
    dtype = torch.float32 if backend == "cpu" else torch.float64
    x = torch.randn(2, 4, 6, 6, dtype=dtype, device=device)
    conv, projection = (torch.randn(8, 4, n, n, dtype=dtype, device=device) for n in (3, 1))
    leaf = (conv if fixed == "projection" else projection).requires_grad_()

    def out() -> Tensor:
        return ops.residual_block(x, [conv], [NORM], projection=(projection, NORM), strides=[2]).square().sum()

    with dispatch.use(backend):
        (once,) = torch.autograd.grad(out(), leaf)
        (again,) = torch.autograd.grad(out(), leaf, create_graph=True)
        (twice,) = torch.autograd.grad(again.square().sum(), leaf)
    torch.testing.assert_close(once, again)
    assert twice.isfinite().all() and twice.any()
