"""The C++ nodes of autograd behind calls of plain tensors on a CPU."""

from __future__ import annotations

import collections
import contextlib
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rkfast
from rkfast import dispatch, native
from rkfast.ops import Norm, bn_rk_sum, residual_block, rk_sum

pytestmark = pytest.mark.skipif(native.cpu_reason() is not None, reason="the C++ kernels are not built")


def _leaf(*shape: int) -> Tensor:
    t = torch.randn(*shape)
    return (t.to(memory_format=torch.channels_last) if len(shape) == 4 else t).requires_grad_()


def _rk_sum() -> tuple[Callable[[], Tensor], list[Tensor]]:
    terms, steps = [_leaf(2, 16, 4, 4) for _ in range(3)], [_leaf(16), None, _leaf(2, 16)]
    shift = _leaf(16)
    return lambda: rk_sum(terms, [0.5, 2.0, 1.0], steps=steps, shift=shift, relu=True), [
        *terms,
        *(h for h in steps if h is not None),
        shift,
    ]


def _bn_rk_sum() -> tuple[Callable[[], Tensor], list[Tensor]]:
    x, terms, weight, bias, step = (
        _leaf(2, 16, 4, 4), [_leaf(2, 16, 4, 4) for _ in range(3)], _leaf(16), _leaf(16), _leaf(16)
    )  # fmt: skip

    def run() -> Tensor:
        return bn_rk_sum(
            x, weight, bias, None, None, terms=terms, coeffs=[1.0, 0.5, 0.5], step=step, relu=True, training=True,
            momentum=0.1, eps=1e-5,
        )  # fmt: skip

    return run, [x, weight, bias, step, *terms]


def _residual_block() -> tuple[Callable[[], Tensor], list[Tensor]]:
    x, convs, step = _leaf(2, 16, 4, 4), [_leaf(16, 16, 3, 3), _leaf(16, 16, 1, 1)], _leaf(16)
    vectors = [_leaf(16) for _ in range(4)]
    norms = [Norm(vectors[2 * i], vectors[2 * i + 1], None, None) for i in range(2)]
    return lambda: residual_block(x, convs, norms, step=step), [x, *convs, *vectors, step]


OPS = {"rk_sum": _rk_sum, "bn_rk_sum": _bn_rk_sum, "residual_block": _residual_block}


Call = tuple[str, Callable[[], Tensor], list[Tensor]]


@pytest.fixture(params=OPS)
def call(request: pytest.FixtureRequest) -> Call:
    torch.manual_seed(0)
    return request.param, *OPS[request.param]()


def _is_own(out: Tensor) -> bool:
    assert out.grad_fn is not None
    return not isinstance(out.grad_fn, torch.autograd.function.BackwardCFunction)


class _Watched(TorchDispatchMode):
    """Calls go through the dispatcher, and have Python's node."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_gradients_are_those_of_python_s_node(call: Call) -> None:
    op, run, inputs = call
    out = run()
    assert _is_own(out) and out.grad_fn.name() == "".join(map(str.title, op.split("_"))) + "Backward"  # type: ignore[union-attr]
    weight = torch.randn_like(out)
    for wanted in [inputs, *([t] for t in inputs)]:
        before = dispatch.served()[f"{op}_backward", "cpu"]
        found = torch.autograd.grad(run(), wanted, weight)
        assert dispatch.served()[f"{op}_backward", "cpu"] == before + 1
        assert f"{op}_backward: cpu (2x16x4x4 float32 on cpu)" in rkfast.explain()
        with _Watched():
            other = run()
        assert not _is_own(other)
        expected = torch.autograd.grad(other, wanted, weight)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


def test_parameters_of_another_dtype_get_gradients_of_theirs() -> None:
    torch.manual_seed(0)
    x, weight, bias, step = (
        _leaf(2, 16, 4, 4),
        *(torch.rand(16, dtype=torch.bfloat16).requires_grad_() for _ in range(3)),
    )
    out = bn_rk_sum(
        x, weight, bias, None, None, step=step, terms=[x.detach()], coeffs=[1.0], training=True, momentum=0.1, eps=1e-5
    )
    assert _is_own(out)
    assert {d.dtype for d in torch.autograd.grad(out.sum(), [weight, bias, step])} == {torch.bfloat16}
    out = rk_sum([x], [1.0], steps=[step])
    assert _is_own(out) and torch.autograd.grad(out.sum(), step)[0].dtype == torch.bfloat16


def test_a_backend_asked_for_in_the_backward_serves_it(call: Call) -> None:
    op, run, inputs = call
    out = run()
    before = dispatch.served()
    with rkfast.use("reference"):
        torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    assert dispatch.served()[f"{op}_backward", "reference"] == before[f"{op}_backward", "reference"] + 1
    torch.autograd.grad(out.sum(), inputs)
    assert dispatch.served()[f"{op}_backward", "cpu"] == before[f"{op}_backward", "cpu"] + 1


def test_explain_tells_of_the_last_call_whoever_served_it() -> None:
    op, run = "rk_sum", _rk_sum()[0]
    by_name = "rk_sum: cpu (2x16x4x4 float32 on cpu)"
    rejected = [f"  not {backend}: serves CUDA tensors, not cpu ones" for backend in ("cuda", "triton")]
    for backend, told in [
        (None, [by_name, *rejected]),
        ("reference", ["rk_sum: reference (2x16x4x4 float32 on cpu)"]),
        ("cpu", [by_name]),
        ("reference", ["rk_sum: reference (2x16x4x4 float32 on cpu)"]),
    ]:
        before = dispatch.served()
        with contextlib.nullcontext() if backend is None else rkfast.use(backend):
            run()
        with torch.device("meta"):
            assert rkfast.explain(op).splitlines() == told
        assert dispatch.served() - before == {(op, backend or "cpu"): 1}
    with _Watched():  # through the dispatcher
        run()
    assert rkfast.explain(op).splitlines()[0] == by_name


def test_numbers_that_are_no_floats_count_as_what_they_are() -> None:
    x = _leaf(2, 16, 4, 4)
    expected = rk_sum([x, x], [1.0, 2.0])
    for coeffs in ([1, 2], [True, 2.0], np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), (1.0, np.float32(2))):
        assert torch.equal(rk_sum([x, x], coeffs), expected)  # type: ignore[arg-type]
    assert _is_own(rk_sum([x, x], [1, np.float64(2)]))
    with pytest.raises(TypeError, match=r"coeffs: .*`steps`"):
        rk_sum([x, x], [1.0, torch.ones((), requires_grad=True)])  # type: ignore[list-item]


def test_what_only_resembles_an_argument_is_refused() -> None:
    x = _leaf(2, 16, 4, 4)
    with pytest.raises(TypeError, match=r"^relu: "):
        rk_sum([x], [1.0], relu=np.True_)  # type: ignore[arg-type]
    norm: dict[str, Any] = {"training": True, "momentum": 0.1, "eps": 1e-5}
    zeros = torch.zeros(16)
    for name, value in {
        "training": np.True_, "eps": True, "momentum": True, "moments": collections.deque((zeros, zeros, 32)),
    }.items():  # fmt: skip
        with pytest.raises(TypeError, match=f"^{name}: "):
            bn_rk_sum(x, None, None, None, None, **{**norm, name: value})


def test_statistics_move_once_where_a_hook_raises_a_type_error() -> None:
    bn, x = nn.BatchNorm2d(16), _leaf(2, 16, 4, 4)

    def pack(_: object) -> None:
        raise TypeError("not this one")

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), pytest.raises(TypeError, match="not this one"):
        bn_rk_sum(
            x, bn.weight, bn.bias, bn.running_mean, bn.running_var, num_batches_tracked=bn.num_batches_tracked,
            training=True, momentum=0.1, eps=1e-5,
        )  # fmt: skip
    assert bn.num_batches_tracked == 1


def test_a_mode_sees_the_backward(call: Call) -> None:
    op, run, inputs = call
    out = run()
    with _Watched() as mode:
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert f"rkfast::{op}_backward" in mode.seen


def test_the_graph_is_gone_behind_its_backward(call: Call) -> None:
    _, run, inputs = call
    out = run().sum()
    torch.autograd.grad(out, inputs, retain_graph=True)
    torch.autograd.grad(out, inputs)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, inputs)


def test_what_is_kept_must_not_change(call: Call) -> None:
    op, run, inputs = call
    out = run()
    with torch.no_grad():
        inputs[3 if op == "rk_sum" else 0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), inputs)


def test_an_error_in_a_hook_comes_out(call: Call) -> None:
    _, run, inputs = call

    def unpack(_: object) -> Tensor:
        raise KeyError("gone")

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        out = run()
    with pytest.raises(KeyError, match="gone"):
        torch.autograd.grad(out.sum(), inputs)


def test_an_error_of_python_s_gradients_comes_out(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    op, run, inputs = call
    out = run()

    def refuse(*_: object) -> None:
        raise LookupError("no gradient")

    monkeypatch.setattr(dispatch.OPS[f"{op}_backward"], "_choice", refuse)
    with dispatch.use("reference"), pytest.raises(LookupError, match="no gradient"):
        torch.autograd.grad(out.sum(), inputs)


def test_a_deep_graph_goes_without_recursion() -> None:
    def work(differentiate: bool) -> None:
        x = y = _leaf(1, 8)
        for _ in range(50_000):
            y = rk_sum([y], [1.0])
        if differentiate:
            found.append(torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.ones_like(x)))

    found: list[bool] = []
    before = threading.stack_size(1 << 18)
    try:
        for differentiate in (True, False):
            thread = threading.Thread(target=work, args=(differentiate,))
            thread.start()
            thread.join()
    finally:
        threading.stack_size(before)
    assert found == [True]


def test_blocks_train_alike_under_anomaly_detection() -> None:
    torch.manual_seed(0)
    block = rkfast.nn.BasicBlock(16, 16).to(memory_format=torch.channels_last)
    x = _leaf(2, 16, 8, 8)
    expected = torch.autograd.grad(block(x).sum(), [x, *block.parameters()])
    with torch.autograd.detect_anomaly(check_nan=True):
        found = torch.autograd.grad(block(x).sum(), [x, *block.parameters()])
    assert all(map(torch.equal, found, expected))
    assert isinstance(block.bn1, nn.BatchNorm2d) and block.bn1.num_batches_tracked == 2


def test_nothing_outlives_a_call_whose_tensors_could_not_be_kept(call: Call) -> None:
    """Checkpointing stops what it computes again by an error in the last hook that keeps a tensor."""
    op, run, inputs = call
    kind = sys.modules[f"rkfast.ops.{op}"]._Call

    def calls() -> int:
        gc.collect()
        return sum(type(o) is kind for o in gc.get_objects())

    def refuse(_: Tensor) -> None:
        raise KeyError("no room")

    before = calls()
    for _ in range(3):
        torch.autograd.grad(checkpoint(run, use_reentrant=False).sum(), inputs)
        with torch.autograd.graph.saved_tensors_hooks(refuse, refuse), pytest.raises(KeyError, match="no room"):
            run()
    assert calls() == before


@pytest.mark.parametrize("op", ["bn_rk_sum", "residual_block"])
def test_statistics_move_once_more_where_a_checkpoint_calls_again(op: str) -> None:
    """As in a BatchNorm: before the last tensor is kept, where what calls again stops."""
    torch.manual_seed(0)
    x, conv = _leaf(2, 16, 4, 4), _leaf(16, 16, 3, 3)

    def run() -> Tensor:
        if op == "residual_block":
            return residual_block(x, [conv, conv], [Norm(None, None, *statistics)] * 2)
        mean, var, counter = statistics
        return bn_rk_sum(
            x, None, None, mean, var, terms=[x], coeffs=[1.0], relu=True, training=True, momentum=0.1, eps=1e-5,
            num_batches_tracked=counter,
        )  # fmt: skip

    calls = 2 if op == "residual_block" else 1
    given = [(torch.zeros(16), torch.ones(16), torch.tensor(0)) for _ in range(2)]
    before = dispatch.served()
    statistics = given[0]
    torch.autograd.grad(checkpoint(run, use_reentrant=False).sum(), x)
    statistics = given[1]
    for _ in range(2):
        assert _is_own(run())
    assert all(map(torch.equal, *given)) and given[0][2] == 2 * calls
    counted = dispatch.served() - before
    assert counted[op, "cpu"] == 4 and counted["update_running_stats", "cpu"] == 4 * calls


def test_a_running_statistic_does_not_keep_the_graph() -> None:
    x, mean, var = _leaf(2, 16, 4, 4), torch.zeros(16), torch.ones(16)
    out = bn_rk_sum(x, None, None, mean, var, terms=[x], coeffs=[1.0], training=True, momentum=0.1, eps=1e-5)
    mean.out, gone = out, weakref.ref(mean)  # type: ignore[attr-defined]
    out.sum().backward()
    del out, mean
    gc.collect()
    assert gone() is None


def test_lazily_negated_tensors_from_a_hook_are_read_as_they_are(call: Call) -> None:
    _, run, inputs = call
    expected = torch.autograd.grad(run().sum(), inputs)

    def negated(t: Tensor) -> Tensor:
        return torch._neg_view(-t) if t.is_floating_point() else t

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, negated):
        out = run()
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), inputs), expected))


def _compiled(out: Tensor, inputs: list[Tensor], weight: Tensor) -> list[Tensor | None]:
    """The gradients, by compiled autograd."""
    for t in inputs:
        t.grad = None
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: out.backward(weight), backend="aot_eager")()
    return [t.grad for t in inputs]


def test_compiled_autograd_traces_them(call: Call) -> None:
    _, run, inputs = call
    torch._dynamo.reset()
    before = counters["compiled_autograd"]["captures"]
    for _ in range(2):
        out = run()
        assert _is_own(out)
        weight = torch.randn_like(out)
        found = _compiled(out, inputs, weight)
        assert all(map(torch.equal, found, torch.autograd.grad(run(), inputs, weight)))
    assert counters["compiled_autograd"]["captures"] == before + 1


def test_compiled_autograd_tells_coefficients_apart() -> None:
    torch._dynamo.reset()
    x = _leaf(2, 16, 4, 4)
    weight = torch.randn(2, 16, 4, 4)
    for c in (0.5, 2.0):
        (found,) = _compiled(rk_sum([x, x.detach()], [c, 1.0]), [x], weight)
        assert found is not None and torch.equal(found, c * weight)
