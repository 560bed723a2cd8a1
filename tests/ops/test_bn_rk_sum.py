from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad

from rkfast import dispatch, native, ops
from rkfast.ops import layout
from tests.ops.test_rk_sum import channelwise
from tests.ops.tester import Inputs, OpTester, lay


def case(
    n: int = 0,
    step: str = "-",
    relu: bool = False,
    training: bool = True,
    affine: bool = True,
    tracked: bool = True,
    moments: bool = False,
) -> dict[str, Any]:
    return dict(n=n, step=step, relu=relu, training=training, affine=affine, tracked=tracked, moments=moments)


class TestBnRkSum(OpTester):
    OPS = ("bn_rk_sum", "bn_rk_sum_backward")
    CASES = {
        "plain": case(),
        "relu": case(relu=True),
        "residual_relu": case(1, relu=True),
        "step_residual_relu": case(1, "c", relu=True),
        "step_residual": case(2, "c"),
        "gate_residual_relu": case(1, "n", relu=True),
        "gate_relu": case(0, "n", relu=True),
        "bare": case(1, affine=False, tracked=False),
        "given_moments": case(1, relu=True, moments=True),
        "frozen": case(training=False),
        "frozen_step_residual_relu": case(1, "c", relu=True, training=False),
    }

    def coeffs(self, case: dict[str, Any]) -> list[float]:
        return [1.0, 0.5][: case["n"]]

    def inputs(self, case: dict[str, Any], shape: tuple[int, ...]) -> Inputs:
        n, c = shape[:2]
        random = lambda *s: torch.randn(*s, dtype=torch.float64)  # noqa: E731
        return Inputs(
            x=random(*shape) * 2 + 1,
            weight=random(c) if case["affine"] else None,
            bias=random(c) if case["affine"] else None,
            step=None if case["step"] == "-" else random(*((c,) if case["step"] == "c" else (n, c))),
            terms=[random(*shape) for _ in range(case["n"])],
            running_mean=random(c) if case["tracked"] else None,
            running_var=random(c).square() + 0.5 if case["tracked"] else None,
        )

    def ours(self, case: dict[str, Any], x: Inputs) -> Tensor:
        return ops.bn_rk_sum(
            x.x,
            x.weight,
            x.bias,
            x.running_mean,
            x.running_var,
            terms=x.terms,
            coeffs=self.coeffs(case),
            step=x.step,
            relu=case["relu"],
            training=case["training"],
            momentum=0.1,
            eps=1e-5,
            moments=ops.channel_moments(x.x) if case["moments"] else None,
        )

    def eager(self, case: dict[str, Any], x: Inputs) -> Tensor:
        vectors = [x.running_mean, x.running_var, x.weight, x.bias]
        total = F.batch_norm(x.x, *vectors, case["training"], 0.1, 1e-5)
        if x.step is not None:
            total = channelwise(x.step, total).to(total.dtype) * total
        for term, c in zip(x.terms, self.coeffs(case), strict=True):
            total = total + c * term
        return torch.relu(total) if case["relu"] else total


def call(x: Tensor, bn: torch.nn.BatchNorm2d, **options: Any) -> Any:
    """As a module calls it."""
    tracked = bn.running_mean is not None
    return ops.bn_rk_sum(
        x,
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        training=bn.training or not tracked,
        momentum=bn.momentum,
        eps=bn.eps,
        num_batches_tracked=bn.num_batches_tracked,
        **options,
    )


@pytest.mark.parametrize("momentum", (0.1, None, 1.0, 0.0))
@pytest.mark.parametrize("affine", (True, False))
@pytest.mark.parametrize("tracked", (True, False))
def test_behaves_as_batchnorm2d(momentum: float | None, affine: bool, tracked: bool, target: tuple[str, str]) -> None:
    """Outputs, statistics and counter over training steps, and the output of eval after them."""
    backend, device = target
    ours = torch.nn.BatchNorm2d(7, momentum=momentum, affine=affine, track_running_stats=tracked).to(device)
    stock = copy.deepcopy(ours)
    with dispatch.use(backend):
        for _ in range(3):
            x = torch.randn(4, 7, 5, 3, device=device) * 3 + 2
            torch.testing.assert_close(call(x, ours), stock(x))
            if tracked:
                assert ours.num_batches_tracked == stock.num_batches_tracked
                torch.testing.assert_close(ours.running_mean, stock.running_mean)
                torch.testing.assert_close(ours.running_var, stock.running_var)
        ours.eval(), stock.eval()
        x = torch.randn(4, 7, 5, 3, device=device)
        torch.testing.assert_close(call(x, ours), stock(x))
        if tracked:
            assert ours.num_batches_tracked == 3
            ours.weight = stock.weight = None  # no stale cache of folded vectors
            with torch.no_grad():
                for bn in (ours, stock):
                    bn.running_mean.add_(1.0)  # type: ignore[union-attr]
            torch.testing.assert_close(call(x, ours), stock(x))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_mean_far_larger_than_deviation(dtype: torch.dtype, target: tuple[str, str]) -> None:
    backend, device = target
    x = (torch.randn(8, 6, 16, 16, device=device) + 1000).to(dtype)
    truth = F.batch_norm(x.double(), None, None, None, None, True, 0.1, 1e-5)
    eager = F.batch_norm(x, None, None, None, None, True, 0.1, 1e-5)
    with dispatch.use(backend):
        ours = ops.bn_rk_sum(x, None, None, None, None, training=True, momentum=0.1, eps=1e-5)
    assert (ours.double() - truth).abs().max() <= 2 * (eager.double() - truth).abs().max() + 1e-2 * (
        dtype != torch.float32
    )


def test_moments_of_the_result_and_of_the_input(target: tuple[str, str]) -> None:
    backend, device = target
    x = torch.randn(4, 7, 5, 3, device=device).bfloat16()
    bn = torch.nn.BatchNorm2d(7).to(device)
    with dispatch.use(backend):
        out, moments = call(x, bn, relu=True, return_moments=True)
        again = ops.channel_moments(out)
        assert moments.count == again.count == 4 * 5 * 3
        torch.testing.assert_close(moments.mean, again.mean)
        torch.testing.assert_close(moments.var, again.var)
        given = call(x, bn, relu=True, moments=ops.channel_moments(x))
        assert torch.equal(given, out)
        # What is given is used as it is.
        shifted = ops.channel_moments(x)._replace(mean=ops.channel_moments(x).mean + 1)
        assert not torch.equal(call(x, bn, relu=True, moments=shifted), out)


def test_slot_of_a_buffer(target: tuple[str, str]) -> None:
    backend, device = target
    buffer = torch.randn(2, 5, 4, 12, device=device).permute(0, 3, 1, 2)  # channels_last
    before = buffer.clone()
    bn, stock = torch.nn.BatchNorm2d(6).to(device), torch.nn.BatchNorm2d(6).to(device)
    with torch.no_grad(), dispatch.use(backend):
        out, moments = call(buffer[:, :6], bn, relu=True, terms=[buffer[:, :6]], coeffs=[0.5], return_moments=True,
                            out=buffer[:, 6:])  # fmt: skip
        want = torch.relu(stock(before[:, :6]) + 0.5 * before[:, :6])
    assert out.data_ptr() == buffer[:, 6:].data_ptr()
    torch.testing.assert_close(buffer[:, 6:], want)
    torch.testing.assert_close(moments.mean, want.mean((0, 2, 3)))
    assert torch.equal(buffer[:, :6], before[:, :6])
    torch.testing.assert_close(bn.running_mean, stock.running_mean)


def test_bad_input_is_named_and_modifies_nothing() -> None:
    x, t = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 4, 5)
    bn = torch.nn.BatchNorm2d(6)
    before = {k: v.clone() for k, v in bn.state_dict().items()}
    v6, v5 = torch.ones(6), torch.ones(5)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "^x: ", dict(x=None)),
        (TypeError, "^x: .*int64", dict(x=x.long())),
        (ValueError, "^x: .*dimensions", dict(x=x[0, 0, 0])),
        (ValueError, "^x: .*more than 1 value per channel when training", dict(x=x[:1, :, :1, :1])),
        (ValueError, "^weight: shape", dict(weight=v5)),
        (ValueError, "^bias: shape", dict(bias=torch.ones(2, 6))),
        (TypeError, "^weight: ", dict(weight=1.0)),
        (ValueError, "^weight: device", dict(weight=v6.to("meta"))),
        (ValueError, "^running_var: one of", dict(running_var=None)),
        (ValueError, "^running_mean: shape", dict(running_mean=v5)),
        (ValueError, "^running_mean: expected", dict(running_mean=None, running_var=None, training=False)),
        (ValueError, "^num_batches_tracked: ", dict(momentum=None, num_batches_tracked=None)),
        (ValueError, "^step: shape", dict(step=v5)),
        (ValueError, "^step: shape", dict(step=torch.ones(6, 2))),
        (TypeError, r"^terms\[0\]: dtype", dict(terms=[t.double()], coeffs=[1.0])),
        (ValueError, r"^terms\[0\]: shape", dict(terms=[t[:1]], coeffs=[1.0])),
        (TypeError, "^terms: ", dict(terms=t, coeffs=[1.0])),
        (ValueError, "^terms: ", dict(terms=[t] * 17, coeffs=[1.0] * 17)),
        (ValueError, "^coeffs: ", dict(terms=[t], coeffs=[])),
        (ValueError, "^moments.mean: shape", dict(moments=ops.Moments(v5, v6, 40))),
        (TypeError, "^moments: ", dict(moments=(v6, v6))),
        (TypeError, "^moments: ", dict(moments=v6)),
        (TypeError, "^moments.var: ", dict(moments=(v6, None, 40))),
        (TypeError, "^moments.mean: ", dict(moments=(None, v6, 40))),
        (TypeError, "^moments.mean: .*int64", dict(moments=(v6.long(), v6, 40))),
        (ValueError, "^moments.var: device", dict(moments=(v6, v6.to("meta"), 40))),
        (TypeError, "^moments.count: ", dict(moments=(v6, v6, 40.0))),
        (ValueError, "^moments.count: ", dict(moments=(v6, v6, 39))),
        (ValueError, "^moments.count: ", dict(moments=(v6, v6, 10**30))),
        (ValueError, "^num_batches_tracked: ", dict(num_batches_tracked=torch.zeros(2, dtype=torch.long))),
        (TypeError, "^num_batches_tracked: ", dict(num_batches_tracked=torch.zeros(()))),
        (TypeError, "^num_batches_tracked: ", dict(num_batches_tracked=3)),
        (ValueError, "^num_batches_tracked: device", dict(num_batches_tracked=torch.tensor(0, device="meta"))),
        (ValueError, "^running_mean: expanded", dict(running_mean=torch.zeros(1).expand(6))),
        (ValueError, r"^running_mean: shape \[\] does not fit", dict(running_mean=torch.zeros(()))),
        (TypeError, r"^running_mean: .* layout torch\.sparse_coo", dict(running_mean=torch.zeros(6).to_sparse())),
        (ValueError, "^running_var: expanded", dict(running_var=torch.ones(1).expand(6))),
        (ValueError, "^running_mean: .*lazily", dict(running_mean=torch._neg_view(v6))),
        (RuntimeError, "^running_var: .*require grad", dict(running_var=v6.clone().requires_grad_())),
        (TypeError, "^group: ", dict(group=None)),
        (RuntimeError, "^group: there are no process groups", dict(group="workers")),
        (ValueError, "^moments: .*one process", dict(group="workers", moments=ops.Moments(v6, v6, 40))),
        (TypeError, "^momentum: ", dict(momentum="0.1")),
        (TypeError, "^momentum: ", dict(momentum=torch.tensor(0.1))),
        (TypeError, "^eps: ", dict(eps=None)),
        (ValueError, "^eps: ", dict(eps=0.0)),
        (ValueError, "^eps: ", dict(eps=-1.0, training=False)),
        (TypeError, "^training: ", dict(training=1)),
        (TypeError, "^relu: ", dict(relu="no")),
        (RuntimeError, "^out: ", dict(x=x.clone().requires_grad_(), out=torch.empty(2, 6, 4, 5))),
        (ValueError, "^out: .*shape", dict(out=torch.empty(2, 5, 4, 5), weight=None, bias=None)),
    ]
    for kind, words, changes in cases:
        arguments: dict[str, Any] = dict(
            x=x, weight=bn.weight, bias=bn.bias, running_mean=bn.running_mean, running_var=bn.running_var,
            training=True, momentum=0.1, eps=1e-5, num_batches_tracked=bn.num_batches_tracked,
        )  # fmt: skip
        with pytest.raises(kind, match=words):
            ops.bn_rk_sum(**{**arguments, **changes})
        assert all(torch.equal(v, before[k]) for k, v in bn.state_dict().items()), words


def test_empty_batch_counts_and_changes_nothing_else(target: tuple[str, str]) -> None:
    backend, device = target
    bn = torch.nn.BatchNorm2d(6).to(device)
    x = torch.empty(0, 6, 4, 5, device=device, requires_grad=True)
    with dispatch.use(backend):
        out = call(x, bn, relu=True)
        out.sum().backward()
    assert out.shape == x.shape and bn.num_batches_tracked == 1
    assert torch.equal(bn.running_mean, torch.zeros(6, device=device))
    assert bn.weight.grad is not None and not bn.weight.grad.any()


def test_opcheck(target: tuple[str, str]) -> None:
    backend, device = target
    if backend == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter cannot be traced")
    v = [torch.rand(6, device=device) + 0.5 for _ in range(5)]
    gate = torch.randn(2, 6, device=device)
    for channels_last, size in itertools.product((False, True), ((4, 5), (1, 1))):
        x, t, g = (
            lay(torch.randn(2, 6, *size), "channels_last" if channels_last else "slice", 0, device) for _ in range(3)
        )
        mask = torch.randint(0, 256, layout.mask_shape(x, channels_last), dtype=torch.uint8, device=device)
        rest = ([t], [0.5], gate, channels_last, True, 1e-5, True)
        with dispatch.use(backend):
            for mean, var in ((None, None), (v[2], v[3])):
                torch.library.opcheck(torch.ops.rkfast.bn_rk_sum.default, (x, v[0], v[1], mean, var, *rest, True))
                torch.library.opcheck(
                    torch.ops.rkfast.bn_rk_sum_out.default, (x, v[0], None, mean, var, *rest, torch.empty_like(x))
                )
            torch.library.opcheck(
                torch.ops.rkfast.bn_rk_sum_backward.default,
                (g, x, v[0], v[1], v[2], v[3], gate, mask, [0.5], channels_last, True, True, 1e-5, True, True, True),
            )
            torch.library.opcheck(torch.ops.rkfast.channel_moments.default, (x, channels_last))
            counter = torch.tensor(3, device=device)
            torch.library.opcheck(
                torch.ops.rkfast.update_running_stats.default, (v[0], v[1], 40, [v[2]], [v[3]], [counter], None)
            )


class Moving(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = torch.nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return call(x, self.bn, step=x.mean((2, 3)), relu=True)


def test_one_graph_for_any_batch() -> None:
    """Also where its size is that of the channels, 6."""
    counter = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(Moving(), backend=counter, fullgraph=True, dynamic=True)
    for count in (4, 5, 7, 9, 6):
        compiled(torch.randn(count, 6, 4, 5))
    assert counter.frame_count <= 2
    sizes = ({0: torch.export.Dim("batch", min=2)},)
    ours = Moving()
    exported = torch.export.export(copy.deepcopy(ours), (torch.randn(4, 6, 4, 5),), dynamic_shapes=sizes).module()
    x = torch.randn(7, 6, 4, 5)
    torch.testing.assert_close(exported(x), ours(x))
    for key, t in ours.state_dict().items():
        torch.testing.assert_close(exported.state_dict()[key], t)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no process groups")
def test_a_slot_that_does_not_fit_moves_no_statistics_of_a_group(tmp_path: Path) -> None:
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        bn, x = torch.nn.BatchNorm2d(6), torch.randn(2, 6, 4, 5)
        before = copy.deepcopy(bn.state_dict())
        with torch.no_grad(), pytest.raises(ValueError, match=r"^out: shape"):
            call(x, bn, group=dist.group.WORLD.group_name, out=torch.empty(2, 5, 4, 5))
        assert all(torch.equal(t, before[key]) for key, t in bn.state_dict().items())
    finally:
        dist.destroy_process_group()


def test_statistics_move_once_under_compile_and_export() -> None:
    bn, stock = torch.nn.BatchNorm2d(6), torch.nn.BatchNorm2d(6)

    class Join(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = bn

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return call(x.sin(), self.bn, terms=[t], coeffs=[1.0], relu=True).cos()

    x, t = torch.randn(2, 6, 4, 5, requires_grad=True), torch.randn(2, 6, 4, 5)
    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        out = torch.compile(Join(), fullgraph=True, backend=backend)(x, t)
        want = torch.relu(stock(x.sin()) + t).cos()
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(
            torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(want.sum(), x)[0], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(bn.running_mean, stock.running_mean)
        assert bn.num_batches_tracked == stock.num_batches_tracked
    exported = torch.export.export(Join().eval(), (x, t))
    torch.testing.assert_close(exported.module()(x, t), torch.relu(stock.eval()(x.sin()) + t).cos())


@pytest.mark.parametrize(
    "call",
    (
        "ops.bn_rk_sum(y, bn.weight, bn.bias, bn.running_mean, bn.running_var, terms=[t], coeffs=[1.0], relu=True, "
        "training=True, momentum=0.1, eps=1e-5)",
        "ops.rk_sum([y, t], [1.0, 0.5], steps=[bn.weight, None], relu=True)",
    ),
    ids=("bn_rk_sum", "rk_sum"),
)
def test_kept_bytes_by_hooks_and_by_resident_memory_agree(call: str) -> None:
    """A chain of sums keeps each input once and a bit per element; both ways of counting say so."""
    script = f"""
import os, torch
from rkfast import ops

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

shape = (8, 64, 128, 128)
bn = torch.nn.BatchNorm2d(64)
y = torch.randn(shape, requires_grad=True)
t = torch.randn(shape)

def run(y):
    for _ in range(6):
        y = {call}
    return y

kept = {{}}
def pack(s):
    kept[s.untyped_storage().data_ptr()] = s.untyped_storage().nbytes()
    return s
with torch.autograd.graph.saved_tensors_hooks(pack, lambda s: s):
    out = run(y)
for own in (y, t, bn.weight, bn.bias):
    kept.pop(own.untyped_storage().data_ptr(), None)
del out
run(y).sum().backward()   # warm up
before = resident()
out = run(y)
grew = resident() - before - out.untyped_storage().nbytes()  # the result is the caller's
print(sum(kept.values()), grew)
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    if native.cpu_reason() is not None:
        pytest.skip(native.cpu_reason())
    # Freed memory goes back at once, so that what is resident is what is in use.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_TOP_PAD_": "0",
    }
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    hooked, grew = map(int, result.stdout.split())
    element = 8 * 64 * 128 * 128
    assert abs(hooked - (5 * 4 * element + 6 * element // 8)) < 0.01 * hooked  # five inner tensors, six masks
    assert abs(grew - hooked) < 0.05 * hooked, (grew, hooked)


def plain_join(x: Tensor, weight: Tensor, step: Tensor, t: Tensor) -> Tensor:
    normed = F.batch_norm(x, None, None, weight, None, True, 0.1, 1e-5)
    return torch.relu(t + channelwise(step, x) * normed)


def join(x: Tensor, weight: Tensor, step: Tensor, t: Tensor, **options: Any) -> Tensor:
    return ops.bn_rk_sum(
        x, weight, None, None, None, terms=[t], coeffs=[1.0], step=step, relu=True, training=True, momentum=0.1,
        eps=1e-5, **options,
    )  # fmt: skip


def test_lazy_tensors_are_read_by_value() -> None:
    x, t, weight, step = torch.randn(2, 6, 4, 5), torch.randn(2, 6, 4, 5), torch.randn(6), torch.randn(2, 6)
    lazy = [torch._neg_view(v) for v in (x, weight, step, t)]
    torch.testing.assert_close(join(*lazy), plain_join(-x, -weight, -step, -t))
    frozen = dict(training=False, momentum=0.1, eps=1e-5)
    torch.testing.assert_close(
        ops.bn_rk_sum(x, None, None, torch._neg_view(weight), step[0].square(), **frozen),
        F.batch_norm(x, -weight, step[0].square()),
    )
    zero = torch._efficientzerotensor(x.shape)
    assert not ops.bn_rk_sum(zero, None, None, None, None, training=True, momentum=0.1, eps=1e-5).any()


def test_forward_mode_and_jit_trace_take_the_reference() -> None:
    values = (torch.randn(2, 6, 4, 5), torch.randn(6), torch.randn(6), torch.randn(2, 6, 4, 5))
    tangents = tuple(map(torch.randn_like, values))
    known = ops.channel_moments(values[0])
    for options in ({}, {"moments": known}):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(v, t) for v, t in zip(values, tangents, strict=True)]
            found = forward_ad.unpack_dual(join(*duals, **options))
            want = forward_ad.unpack_dual(plain_join(*duals))
            torch.testing.assert_close(tuple(found), tuple(want))
            bn, stock = torch.nn.BatchNorm2d(6), torch.nn.BatchNorm2d(6)
            call(duals[0], bn)
            stock(values[0])
            assert forward_ad.unpack_dual(bn.running_mean).tangent is None
            torch.testing.assert_close(bn.state_dict(), stock.state_dict())
            with pytest.raises(RuntimeError, match=r"^out: .*forward-mode"), torch.no_grad():
                join(*duals, out=torch.empty(2, 6, 4, 5))
    traced = torch.jit.trace(join, values)
    others = tuple(reversed(values))[:1] + values[1:3] + values[:1]
    torch.testing.assert_close(traced(*others), plain_join(*others))


def test_running_statistics_under_vmap_are_mapped_over_too() -> None:
    def train(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return ops.bn_rk_sum(
            x, None, None, mean, var, training=True, momentum=0.1, eps=1e-5, num_batches_tracked=counter
        )

    counter = torch.tensor(0)
    x, mean, var = torch.randn(3, 2, 6, 4, 5), torch.zeros(3, 6), torch.ones(3, 6)
    with pytest.raises(RuntimeError, match=r"^running_mean, .* not batched"):
        torch.vmap(train, (0, None, None))(x, mean[0], var[0])
    assert counter == 0 and not mean.any() and (var == 1).all()
    found = torch.vmap(train)(x, mean, var)
    assert counter == 1
    for i in range(3):
        stock = torch.nn.BatchNorm2d(6, affine=False)
        torch.testing.assert_close(found[i], stock(x[i]))
        torch.testing.assert_close((mean[i], var[i]), (stock.running_mean, stock.running_var))


def test_out_is_known_to_autograd_as_modified() -> None:
    x, t, out = (torch.randn(2, 6, 4, 5) for _ in range(3))
    leaf = torch.ones_like(x).requires_grad_()
    product = leaf * out  # saves out
    with torch.no_grad():
        join(x, torch.ones(6), torch.ones(6), t, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_one_tensor_twice_under_compile() -> None:
    v = torch.randn(6, requires_grad=True)
    x = torch.randn(2, 6, 4, 5, requires_grad=True)
    want = torch.autograd.grad(join(x, v, v, x).sum(), (x, v))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, v: join(x, v, v, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x, v).sum(), (x, v)), want)


def test_raw_ops_name_what_does_not_fit() -> None:
    """And modify nothing."""
    if native.cpu_reason() is not None:
        pytest.skip(native.cpu_reason())
    x, v, v5 = torch.randn(3, 6, 4, 5), torch.ones(6), torch.ones(5)
    raw = torch.ops.rkfast
    tail = (False, False, 1e-5)
    forward = lambda mean, var, step=None: raw.bn_rk_sum(  # noqa: E731
        x, None, None, mean, var, [], [], step, *tail, False, False
    )
    backward = lambda step, need: raw.bn_rk_sum_backward(  # noqa: E731
        x, x, None, None, v, v, step, None, [], False, False, True, 1e-5, True, True, need
    )
    mean, var, n = torch.zeros(6), torch.ones(6), torch.tensor(0)
    move = raw.update_running_stats
    for words, f in (
        ("^var: ", lambda: forward(v, None)),
        ("^mean: ", lambda: forward(None, v)),
        ("^mean: ", lambda: forward(v.view(1, 6), v.view(1, 6))),
        ("^step: ", lambda: forward(None, None, torch.ones(1, 6))),
        ("^step: ", lambda: backward(None, True)),
        ("^step: ", lambda: backward(torch.ones(1, 6), True)),
        ("^running_var: ", lambda: move(v, v, 60, [mean], [], [n], 0.1)),
        ("^running_var: ", lambda: move(v, v, 60, [mean], [torch.ones(5)], [n], 0.1)),
        ("^running_mean: ", lambda: move(v5, v5, 60, [mean], [var], [n], 0.1)),
        ("^var: ", lambda: move(v, v5, 60, [mean], [var], [n], 0.1)),
        ("^mean: ", lambda: move(torch.tensor(1.0), torch.tensor(1.0), 60, [mean], [var], [n], 0.1)),
        ("^count: ", lambda: move(v, v, -5, [mean], [var], [n], 0.1)),
        ("^num_batches_tracked: ", lambda: move(v, v, 60, [mean], [var], [], None)),
        ("^num_batches_tracked: ", lambda: move(v, v, 60, [mean], [var], [torch.tensor([0, 0])], None)),
        ("meta", lambda: move(v.to("meta"), v, 60, [mean], [var], [n], 0.1)),
    ):
        with dispatch.use("cpu"), pytest.raises(ValueError, match=words):
            f()
        assert not mean.any() and var.eq(1).all() and n == 0, words
