"""rkfast.profile: what is counted, by hand on small networks, and that times are those of a step."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

import rkfast
from rkfast import native
from rkfast.swap.profile import BETWEEN, COPY, KINDS, OTHER, OURS, _kind, _kind_within, _Moved, _times
from tests.swap.test_fuse import fused_kinds, made

built = pytest.mark.skipif(native.cpu_reason() is not None, reason="the C++ kernels are not built")
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def moved(compute: Any) -> tuple[dict[str, int], dict[str, int]]:
    with _Moved() as mode:
        compute()
    return dict(mode.bytes), dict(mode.calls)


def test_bytes_of_operators() -> None:
    x, y = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    size = x.numel() * 4
    for compute, kind, expected in (
        (lambda: x + y, "sum, product", 3 * size),
        (lambda: x + x, "sum, product", 2 * size),  # read once
        (lambda: x * x.new_ones(()).expand_as(x), "sum, product", 2 * size + 4),
        (lambda: x[:, :2] + x[:, 2:4], "sum, product", 3 * size // 4),  # two slices of one storage
        (lambda: y.clone().add_(x), "sum, product", 3 * size),
        (lambda: y.clone().copy_(x), COPY, 4 * size),
        (lambda: torch.empty_like(x).zero_(), COPY, size),
        (lambda: torch.add(x, y, out=torch.empty_like(x)), "sum, product", 3 * size),
        (lambda: torch.cat([x, y], 1), "concatenation", 4 * size),
        (lambda: torch.relu(x), "ReLU", 2 * size),
        (lambda: x.mean((2, 3)), "pooling", size + 2 * 8 * 4),
        (lambda: torch.softmax(x, 1), OTHER, 2 * size),
    ):
        assert moved(compute)[0][kind] == expected
    free = moved(lambda: (x.view(2, -1).detach().contiguous().reshape(-1)[3:], torch.empty(9), x.expand_as(x).t_))
    assert free == ({}, {})


def test_bytes_of_layers() -> None:
    conv, linear = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.Linear(6, 7)
    x, z = torch.randn(2, 3, 4, 4), torch.randn(2, 6, requires_grad=True)
    inputs, outs, weights = 2 * 3 * 16 * 4, 2 * 5 * 16 * 4, 3 * 5 * 9 * 4
    out = torch.randn(0)

    def forward() -> None:
        nonlocal out
        out = conv(x)

    assert moved(forward) == ({"convolution": inputs + outs + weights}, {"convolution": 1})
    grad = torch.randn_like(out)
    # of the weights alone: reads the gradient, input and weights, writes those of the weights
    assert moved(lambda: out.backward(grad))[0] == {"convolution": inputs + outs + 2 * weights}
    assert moved(lambda: linear(z))[0] == {"linear": 4 * (2 * 6 + 2 * 7 + 6 * 7 + 7)}


@built
@pytest.mark.parametrize("memory", ("speed", "min"))
def test_bytes_of_a_dense_block(memory: str) -> None:
    """Layer by layer."""
    n, h, c, k, b, layers = 2, 8, 8, 4, 16, 3
    block = rkfast.nn.DenseBlock(layers, c, k, bottleneck=b, fused=True, memory=memory).eval()
    x = torch.randn(n, c, h, h)
    widths = [c + i * k for i in range(layers)]
    channel = n * h * h * 4
    weights = 4 * sum(b * width + 9 * b * k for width in widths)
    forward = channel * (2 * c + sum(width + b + b + k for width in widths)) + weights
    out = torch.randn(0)

    def step() -> None:
        nonlocal out
        out = block(x)

    found, _ = moved(step)
    assert found[OURS] == forward
    again = sum(width + b for width in widths) if memory == "min" else 0
    backward = channel * (2 * (c + layers * k) + sum(3 * width + b + 2 * b + k for width in widths) + again)
    grad = torch.randn_like(out)
    assert moved(lambda: out.backward(grad))[0][OURS] == backward + 2 * weights


@pytest.mark.parametrize(
    ("name", "kind"),
    (
        ("aten::mkldnn_convolution", "convolution"), ("aten::convolution_backward", "convolution"),
        ("aten::_slow_conv2d_forward", "convolution"), ("aten::native_batch_norm_backward", "BatchNorm"),
        ("aten::relu_", "ReLU"), ("aten::threshold_backward", "ReLU"), ("aten::gelu", OTHER), ("aten::prelu", OTHER),
        ("aten::_cat", "concatenation"), ("aten::add_", "sum, product"), ("aten::_foreach_add_", "sum, product"),
        ("aten::max_pool2d_with_indices_backward", "pooling"), ("aten::mean", "pooling"), ("aten::addmm", "linear"),
        ("aten::_to_copy", COPY), ("aten::clone", COPY), ("aten::slice_backward", COPY), ("aten::_softmax", OTHER),
        ("rkfast::rk_sum", OURS), ("mine::add", "sum, product"),
    ),
)  # fmt: skip
def test_kinds(name: str, kind: str) -> None:
    space, _, operator = name.partition("::")
    assert _kind(space, operator) == kind


def event(name: str, begin: float, end: float, *children: Any, thread: int = 1, kernels: float = 0.0) -> Any:
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CPU,
        cpu_parent=None,
        cpu_children=list(children),
        thread=thread,
        time_range=SimpleNamespace(start=begin, end=end),
        self_cpu_time_total=end - begin - sum(c.time_range.end - c.time_range.start for c in children),
        self_device_time_total=kernels,
    )


def test_times_go_to_the_outermost_operator() -> None:
    cast = event("aten::to", 1, 3, event("aten::_to_copy", 1, 2))
    step = event(
        "mark", 0, 100,
        event("aten::conv2d", 0, 20, cast, event("aten::copy_", 5, 9)),
        event("autograd::engine::evaluate_function: CatBackward0", 20, 40, event("aten::narrow", 21, 24)),
        event("rkfast::dense_block", 50, 80, event("aten::convolution", 55, 60), event("aten::to", 60, 61)),
    )  # fmt: skip
    (found,) = _times([step, *step.cpu_children, *step.cpu_children[0].cpu_children], "mark", False)
    assert found == {"convolution": 18, COPY: 2, OURS: 30, OTHER: 3, BETWEEN: 100 - 18 - 2 - 30 - 3}
    assert _kind_within("aten::add", BETWEEN) == "sum, product"


def test_times_of_a_device_are_its_kernels() -> None:
    step = event("mark", 0, 100, event("aten::relu", 0, 20, kernels=7.0))
    backward = event("autograd::x", 30, 90, event("aten::convolution_backward", 40, 50, kernels=11.0), thread=2)
    later = event("aten::relu", 100, 110, kernels=13.0, thread=2)
    backward.cpu_children[0].cpu_parent = backward
    step.cpu_children[0].cpu_parent = step
    events = [step, *step.cpu_children, backward, *backward.cpu_children, later]
    (found,) = _times(events, "mark", True)
    assert {kind: time for kind, time in found.items() if time} == {"ReLU": 7.0, "convolution": 11.0}


@built
@pytest.mark.parametrize("training", (True, False))
def test_profile(training: bool, tmp_path: Path) -> None:
    model = rkfast.fuse(made("densenet").train(training))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    file = tmp_path / "trace.json"
    start = time.perf_counter()
    found = rkfast.profile(model, X, trace=file)
    elapsed = 1e3 * (time.perf_counter() - start)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert fused_kinds(model)
    rows = {row.kind: row for row in found}
    assert rows.keys() <= {*KINDS, OURS, OTHER, BETWEEN}
    assert rows[OURS].stock == (0, 0, 0)
    assert rows[OURS].fused.milliseconds > 0
    assert rows[OURS].fused.calls >= 5
    assert rows["concatenation"].stock.calls > 0 == (rows["concatenation"].fused.calls)
    assert rows["BatchNorm"].stock.bytes > 0
    total = found.total
    assert total.fused.bytes < total.stock.bytes
    assert 0 < total.stock.milliseconds < elapsed
    assert 0 < total.fused.milliseconds < elapsed
    marks = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("name") == "rkfast.profile: fused"]
    assert len(marks) == 4
    lines = str(found).splitlines()
    assert lines[0] == ("training step" if training else "inference") + ", 4x3x16x16 float32, cpu"
    assert len(lines) == 4 + len(found)


def test_autocast_and_what_is_not_fused() -> None:
    model = made("resnet")
    with torch.autocast("cpu", torch.bfloat16):
        found = rkfast.profile(model, X, steps=1)
    rows = {row.kind: row for row in found}
    assert found.title.endswith("float32, cpu, autocast to bfloat16")
    assert not fused_kinds(model)
    assert rows[COPY].stock.milliseconds > 0
    assert rows[OURS].fused.calls > 0
    with torch.no_grad():
        assert rkfast.profile(model, X, steps=1).title.startswith("inference")


def test_gradients_of_one_step_are_not_added_to_those_of_another() -> None:
    rows = {row.kind: row for row in rkfast.profile(nn.Conv2d(3, 4, 3, bias=False), X, steps=1)}
    assert rows["convolution"].stock.calls == 2
    assert "sum, product" not in rows


def test_bad_arguments(tmp_path: Path) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
        rkfast.profile(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps: expected 1 or more, got 0"):
        rkfast.profile(Constant(), X, steps=0)
    with pytest.raises(TypeError, match="nothing in its result has a gradient"):
        rkfast.profile(Constant(), X)
    with pytest.raises(OSError):
        rkfast.profile(Constant(), X, trace=tmp_path / "none" / "trace.json")
