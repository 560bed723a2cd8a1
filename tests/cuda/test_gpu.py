"""What only a GPU can show: both backends at working sizes, streams, graph capture, and bitwise repeats.

Budgets are those of test_emulated: twice eager's own error in the same dtype, the rounding of the result, and for sums
a few roundings of what they are kept in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rkfast
from rkfast import dispatch
from rkfast.nn import cudnn
from rkfast.nn.folded import FoldedConv
from rkfast.ops import bn_rk_sum, channel_moments, rk_sum
from tests.cuda.test_emulated import close, lay
from tests.models.tester import check_fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is false"),
]

DEVICE = "cuda"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((8, 64, 56, 56), (64, 36, 8, 8), (16, 512, 7, 7), (32, 100), (2, 3, 5, 7))
LAYOUTS = ("contiguous", "channels_last", "slice", "channels_last_aligned_slice")


@pytest.fixture(params=["cuda", "triton"])
def backend(request: Any) -> Any:
    if reason := dispatch.backend_reason(request.param, "cuda"):
        pytest.skip(f"{request.param}: {reason}")
    with rkfast.use(request.param):
        yield request.param


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's convolutions, and our products beside them, are float32's own and repeat to the bit."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


class Problem:
    """An op with its leaves: ``forward(leaves)`` is the fused call, ``eager(leaves)`` what a user would write."""

    def __init__(self, op: str, shape: tuple[int, ...], how: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.op = op
        *tensors, self.grad = (lay(torch.randn(shape, device=DEVICE).to(dtype), how) for _ in range(4))
        self.leaves = [*tensors, *(torch.randn(shape[1], device=DEVICE) for _ in range(3))]
        self.sure = torch.ones_like(self.grad, dtype=torch.bool)

    def fresh(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [(t.to(dtype) if dtype else t).detach().requires_grad_() for t in self.leaves]

    def fused(self, leaves: list[Tensor]) -> Tensor:
        x, y, z, a, b, h = leaves
        if self.op == "rk_sum":
            return rk_sum([x, y, z], [1.0, 0.5, -2.0], steps=[None, h, None], shift=a, relu=True)
        options = {"training": True, "momentum": 0.1, "eps": 1e-5}
        return bn_rk_sum(x, a, b, None, None, terms=[y, z], coeffs=[1.0, 0.5], step=h, relu=True, **options)

    def eager(self, leaves: list[Tensor]) -> Tensor:
        x, y, z, a, b, h = leaves
        wide = torch.promote_types(x.dtype, a.dtype)

        def per_channel(v: Tensor) -> Tensor:
            return v.view(1, -1, *[1] * (x.dim() - 2))

        if self.op == "rk_sum":
            total = x.to(wide) + 0.5 * per_channel(h) * y.to(wide) - 2.0 * z.to(wide) + per_channel(a)
        else:
            normed = torch.nn.functional.batch_norm(x.to(wide), None, None, a.to(wide), b.to(wide), True, 0.1, 1e-5)
            total = y.to(wide) + 0.5 * z.to(wide) + per_channel(h) * normed
        return torch.relu(total).to(x.dtype)

    def results(self, f: Callable[[list[Tensor]], Tensor], leaves: list[Tensor]) -> list[Tensor]:
        out = f(leaves)
        # One gradient for all, zero where an output near zero may round to either side of the ReLU.
        grad = torch.where(self.sure, self.grad, torch.zeros_like(self.grad))
        found = torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True)
        return [out.detach(), *(g for g in found if g is not None)]

    def check(self) -> None:
        truth_leaves = self.fresh(torch.float64)
        with torch.no_grad():
            self.sure = self.eager(truth_leaves) > 1e-2
        truth = self.results(self.eager, truth_leaves)
        eager = self.results(self.eager, self.fresh())
        found = self.results(self.fused, self.fresh())
        count = self.leaves[0].numel() / self.leaves[0].shape[1]
        for i, (f, e, t) in enumerate(zip(found, eager, truth, strict=True)):
            close(f, e, t, f"{self.op} result {i}", count**0.5 if f.dim() == 1 else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("op", ["rk_sum", "bn_rk_sum"])
def test_right(backend: str, op: str, shape: tuple[int, ...], how: str, dtype: torch.dtype) -> None:
    before = dispatch.served()
    Problem(op, shape, how, dtype).check()
    served = dispatch.served() - before
    assert served[op, backend] == 1
    assert served[f"{op}_backward", backend] == 1
    assert {b for _, b in served} == {backend}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments(backend: str, shape: tuple[int, ...], how: str, dtype: torch.dtype) -> None:
    x = lay((30 + torch.randn(shape, device=DEVICE)).to(dtype), how)
    total, moments = rk_sum([x, x], [0.5, 1.0], return_moments=True)
    for tensor, found in ((x, channel_moments(x)), (total, moments)):
        wide = tensor.double()
        truth = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
        eager = torch.var_mean(tensor.to(found.mean.dtype), [0, *range(2, x.dim())], correction=0)
        close(found.var, eager[0], truth[0], "var")
        close(found.mean, eager[1], truth[1], "mean")


@pytest.mark.parametrize("op", ["rk_sum", "bn_rk_sum"])
def test_repeats_bit_by_bit(backend: str, op: str) -> None:
    problem = Problem(op, (16, 64, 28, 28), "channels_last", torch.bfloat16)
    first = problem.results(problem.fused, problem.fresh())
    for _ in range(3):
        for a, b in zip(first, problem.results(problem.fused, problem.fresh()), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("op", ["rk_sum", "bn_rk_sum"])
def test_second_stream(backend: str, op: str) -> None:
    problem = Problem(op, (16, 64, 28, 28), "channels_last", torch.float32)
    expected = problem.results(problem.fused, problem.fresh())
    stream = torch.cuda.Stream()
    leaves = problem.fresh()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        # What another stream reads before this one gets here is wrong.
        with torch.no_grad():
            for leaf, right in zip(leaves, problem.leaves, strict=True):
                leaf.zero_().copy_(right)
        found = problem.results(problem.fused, leaves)
    stream.synchronize()
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_graph_capture(backend: str, momentum: float | None) -> None:
    """Forward, backward and running statistics replay on new data; capture itself raises if the host waits."""
    torch.manual_seed(0)
    c = 32
    static = torch.randn(8, c, 14, 14, device="cuda").to(memory_format=torch.channels_last).requires_grad_()
    weight, step = (torch.randn(c, device="cuda", requires_grad=True) for _ in range(2))
    grad = torch.randn_like(static)
    running = [torch.zeros(c), torch.ones(c), torch.tensor(0)]
    running = [t.cuda() for t in running]

    def run(x: Tensor) -> list[Tensor]:
        y, moments = rk_sum([x, x], [0.5, 1.0], steps=[step, None], return_moments=True)
        out = bn_rk_sum(
            y, weight, None, *running[:2], terms=[x], coeffs=[1.0], relu=True, training=True, momentum=momentum,
            eps=1e-5, num_batches_tracked=running[2], moments=moments,
        )  # fmt: skip
        return [out.detach(), *torch.autograd.grad(out, [x, weight, step], grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(static)
    for _ in range(2):
        with torch.no_grad():
            static.copy_(torch.randn_like(static))
        before = [r.clone() for r in running]
        graph.replay()
        replayed = [t.clone() for t in [*captured, *running]]
        for r, b in zip(running, before, strict=True):
            r.copy_(b)
        for a, b in zip(replayed, [*run(static), *running], strict=True):
            assert torch.equal(a, b)
    assert running[2] == 4


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("name", "options"),
    (
        ("densenet-22-bc", {"growth_rate": 12}),
        ("erknet-3x1_3x1", {"growth_rate": 16}),
        ("irknet-3x1_3x1-ab", {"growth_rate": 16}),
        ("rkcnn-i-3_3", {"growth_rate": 16}),
    ),
)
def test_models(name: str, options: dict[str, Any]) -> None:
    if reason := dispatch.backend_reason("triton", "cuda"):
        pytest.skip(f"triton: {reason}")
    before = dispatch.served()
    check_fused(name, size=16, batch=8, device=DEVICE, **options)
    served = dispatch.served() - before
    assert served["dense_block", "triton"] and served["dense_block_backward", "triton"], served


def test_no_host_wait_in_a_block() -> None:
    if reason := dispatch.backend_reason("triton", "cuda"):
        pytest.skip(f"triton: {reason}")
    model = rkfast.create_model("irknet-3x1_3x1-ab", growth_rate=16).to(DEVICE)
    x = torch.randn(4, 3, 16, 16, device=DEVICE)
    model(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_host_wait(backend: str) -> None:
    problems = [Problem(op, (8, 64, 14, 14), "channels_last", torch.float32) for op in ("rk_sum", "bn_rk_sum")]
    for problem in problems:
        problem.results(problem.fused, problem.fresh())
    torch.cuda.set_sync_debug_mode("error")
    try:
        for problem in problems:
            problem.results(problem.fused, problem.fresh())
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_other_device(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(4, 8, 5, 5, device="cuda:1")
    torch.testing.assert_close(rk_sum([x, x], [1.0, 2.0]), 3 * x)
    assert torch.cuda.current_device() == 0


def net(**options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return rkfast.create_model("irknet-3x1_3x1-ab", growth_rate=16, **options).to(DEVICE)


def batch() -> Tensor:
    return torch.randn(4, 3, 16, 16, device=DEVICE).contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("autocast", [False, True])
def test_graphed_training(autocast: bool) -> None:
    """Forward and backward replay as they run, statistics move once a step, and nothing moves at the capture."""
    eager, model = net(), net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        graph = rkfast.graphed(model, batch())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        for _ in range(2):
            x = batch()
            for each, call in ((eager, eager), (model, graph)):
                each.zero_grad()
                call(x).float().square().sum().backward()
            for a, b in zip(eager.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(eager.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("folded", [False, True])
def test_graphed_inference(folded: bool) -> None:
    model = net().eval()
    model = rkfast.fold(model) if folded else model
    graph = rkfast.graphed(model, batch())
    for _ in range(2):
        x = batch()
        with torch.no_grad():
            torch.testing.assert_close(graph(x), model(x))


@pytest.mark.usefixtures("exact")
def test_graphed_step() -> None:
    losses = []
    for captured in (False, True):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        x = batch()

        def step(x: Tensor, model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        torch.manual_seed(1)
        x = batch()
        call = rkfast.graphed(step, x, warmup=2) if captured else step
        found = [call(x).item() for _ in range(3 if captured else 6)]
        losses.append(found[-3:])
    torch.testing.assert_close(*map(torch.tensor, losses))


def test_graphed_names_what_waits() -> None:
    model = net().eval()

    def step(x: Tensor) -> Tensor:
        y = model(x)
        return y if y.sum().item() > 0 else -y

    with pytest.raises(RuntimeError, match="makes the host wait for the GPU"):
        rkfast.graphed(step, batch())
    assert torch.isfinite(model(batch())).all()  # nothing is left of the attempt


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 3])
def test_folded_convolutions(kernel: int, dtype: torch.dtype) -> None:
    """cuDNN's convolution with bias, sum and ReLU has the error of its convolution alone."""
    conv = torch.nn.Conv2d(64, 32, kernel, padding=kernel // 2, device=DEVICE, dtype=dtype).requires_grad_(False)
    folded = FoldedConv(conv, relu=True)
    x, z = (torch.randn(8, c, 14, 14, device=DEVICE).to(dtype, memory_format=torch.channels_last) for c in (64, 32))
    with torch.no_grad():
        wide = torch.nn.functional.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=kernel // 2)
        plain = conv(x)
        for found, truth, eager in (
            (folded(x), wide.relu(), plain.relu()),
            (folded.added(x, z), (wide + z.double()).relu(), (plain + z).relu()),
        ):
            close(found, eager, truth, "folded", 0)
    assert not cudnn._refused, "cuDNN has no engine for this"
