"""RKStep, Period and PreActBranch: the order of the method, and stock PyTorch's numbers."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from rkfast import dispatch, tableau
from rkfast.nn import Period, PreActBranch, RKStep
from tests.ops.tester import assert_as_good_as

METHODS = ("euler", "midpoint", "rk4")


class Decay(nn.Module):
    """y' = -y."""

    def forward(self, y: Tensor) -> Tensor:
        return -y


class Logistic(nn.Module):
    """y' = y (1 - y), which unlike y' = -y sees every order condition."""

    def forward(self, y: Tensor) -> Tensor:
        return y * (1 - y)


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("field", (Decay, Logistic), ids=("decay", "logistic"))
def test_observed_order(field: type[nn.Module], method: str, fused: bool) -> None:
    y0 = torch.tensor([[0.2, 0.7]], dtype=torch.float64)
    exact = y0 * math.exp(-1) if field is Decay else 1 / (1 + (1 / y0 - 1) * math.exp(-1))
    errors = []
    for steps in (16, 32, 64):
        step = RKStep(method, field(), step=1 / steps, fused=fused)
        y = y0
        for _ in range(steps):
            y = step(y)
        errors.append((y - exact).abs().max().item())
    observed = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert observed == pytest.approx([tableau.get(method).order] * 2, abs=0.15)


def pre_act(method: str, fused: bool, steps: int = 2, channels: int = 6, step: float = 0.7) -> Period:
    torch.manual_seed(0)
    stages = tableau.get(method).stages
    return Period(
        *(
            RKStep(method, [PreActBranch(channels, fused=fused) for _ in range(stages)], step=step, fused=fused)
            for _ in range(steps)
        )
    )


def trained(period: nn.Module, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = period(x)
    (out.float() if autocast else out).square().mean().backward()
    assert x.grad is not None
    found = {"out": out.detach(), "x.grad": x.grad}
    found |= {f"{name}.grad": p.grad for name, p in period.named_parameters() if p.grad is not None}
    return found | dict(period.named_buffers())


@pytest.mark.parametrize("autocast", (False, True), ids=("fp32", "autocast"))
@pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("method", METHODS)
def test_fused_equals_stock(method: str, channels_last: bool, autocast: bool) -> None:
    fused, stock = pre_act(method, True), pre_act(method, False)
    assert fused.state_dict().keys() == stock.state_dict().keys()
    truth = copy.deepcopy(stock).double()
    x = torch.randn(5, 6, 9, 8)
    if channels_last:
        x, fused, stock = (t.to(memory_format=torch.channels_last) for t in (x, fused, stock))
    ours, eager, expected = trained(fused, x, autocast), trained(stock, x, autocast), trained(truth, x.double())
    assert ours["out"].dtype == eager["out"].dtype
    assert ours["out"].is_contiguous(memory_format=torch.channels_last) == channels_last
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert_as_good_as(ours[name], eager[name], value, name)
        else:
            assert torch.equal(ours[name], value), name
    x = torch.randn(5, 6, 9, 8)
    with torch.no_grad():
        assert_as_good_as(fused.eval()(x), stock.eval()(x), truth.eval()(x.double()), "eval")


def calls(op: str) -> int:
    return sum(count for (name, _), count in dispatch.served().items() if name == op)


def test_moments_come_from_the_sums() -> None:
    """Only the first BatchNorm of all, and those behind a convolution, take a tensor's moments themselves."""
    period, x = pre_act("rk4", True), torch.randn(5, 6, 9, 8)
    seen: list[bool] = []
    for step in period:
        for branch in step.branches:
            branch.register_forward_pre_hook(lambda _, args: seen.append(len(args) == 2))
    y, moments = period.forward_with_moments(x, return_moments=True)
    assert seen == [False, True, True, True, True, True, True, True]
    assert moments is not None
    torch.testing.assert_close(moments.mean, y.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.var, y.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6)
    seen.clear()
    before = calls("rk_sum")
    period.eval()(x)
    assert not any(seen)
    assert calls("rk_sum") == before + 8
    before = calls("rk_sum")
    pre_act("rk4", False)(x)
    assert calls("rk_sum") == before


def test_hooks_on_a_step_run() -> None:
    period, x = pre_act("midpoint", True), torch.randn(5, 6, 9, 8)
    twin = copy.deepcopy(period)
    seen: list[Tensor] = []
    period[0].register_forward_hook(lambda *args: seen.append(args[2]))
    period[1].register_forward_pre_hook(lambda _, args: (args[0] + 0,))
    torch.testing.assert_close(period(x), twin(x))
    assert len(seen) == 1
    assert isinstance(seen[0], Tensor)


@pytest.mark.parametrize("training", (True, False))
def test_sync_batch_norm_of_one_process_is_a_batch_norm(training: bool) -> None:
    period = pre_act("midpoint", True).train(training)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(period))
    x = torch.randn(5, 6, 9, 8)
    before = calls("bn_rk_sum")
    out = synchronised(x)
    assert calls("bn_rk_sum") > before
    torch.testing.assert_close(out, period(x))
    torch.testing.assert_close(dict(synchronised.named_buffers()), dict(period.named_buffers()))


def test_one_branch_for_all_stages() -> None:
    torch.manual_seed(0)
    shared = RKStep("rk4", PreActBranch(6))
    assert len(shared.branches) == 1
    twin = RKStep("rk4", PreActBranch(6, fused=False), fused=False)
    twin.load_state_dict(shared.state_dict())
    x = torch.randn(5, 6, 9, 8)
    torch.testing.assert_close(shared(x), twin(x))
    assert shared.branches[0].norm1.num_batches_tracked == 4
    torch.testing.assert_close(dict(shared.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
def test_any_branch_and_any_rank(fused: bool) -> None:
    torch.manual_seed(0)
    f1, f2 = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    step, y = RKStep("midpoint", nn.ModuleList([f1, f2]), step=0.5, fused=fused), torch.randn(3, 4)
    torch.testing.assert_close(step(y), y + 0.5 * f2(y + 0.25 * f1(y)))


def test_deepcopy_and_pickle() -> None:
    period, x = pre_act("rk4", True).eval(), torch.randn(5, 6, 9, 8)
    for twin in (copy.deepcopy(period), pickle.loads(pickle.dumps(period))):
        assert torch.equal(twin(x), period(x))
        assert twin[0].tableau == tableau.get("rk4")


@pytest.mark.parametrize(("backend", "mode"), (("aot_eager", "train"), ("aot_eager", "eval"), ("inductor", "train")))
def test_compile(backend: str, mode: str) -> None:
    torch._dynamo.reset()
    period, x = pre_act("midpoint", True, steps=1), torch.randn(5, 6, 9, 8)
    period.train(mode == "train")
    compiled = torch.compile(copy.deepcopy(period), fullgraph=True, backend=backend)
    ours = {name.removeprefix("_orig_mod."): value for name, value in trained(compiled, x).items()}
    torch.testing.assert_close(ours, trained(period, x), rtol=1e-4, atol=1e-6)


def test_repr() -> None:
    text = repr(pre_act("midpoint", True))
    assert "midpoint, step=0.7, fused=True" in text
    assert "norm1" in text


@pytest.mark.parametrize("count", (1, 3))
def test_a_wrong_number_of_branches_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"branches: got {count} modules for the 2 stages of midpoint"):
        RKStep("midpoint", [Decay() for _ in range(count)])


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="method: 'rk9' is not"):
        RKStep("rk9", Decay())
    with pytest.raises(ValueError, match="step: expected a finite number, got nan"):
        RKStep("euler", Decay(), step=float("nan"))


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
@pytest.mark.parametrize("learn", (("h",), ("b",), ("a",), ("a", "b", "h")), ids="".join)
@pytest.mark.parametrize("method", METHODS)
def test_learned_coefficients(method: str, learn: tuple[str, ...], fused: bool) -> None:
    """The first values are the tableau's; the gradients those of the formula (RKNet, equation 4)."""
    torch.manual_seed(0)
    branches = [nn.Linear(4, 4).double() for _ in range(tableau.get(method).stages)]
    y = torch.randn(3, 4, dtype=torch.float64)
    fixed = RKStep(method, branches, step=0.5, fused=fused)
    step = RKStep(method, branches, step=0.5, learn=learn, fused=fused).double()
    learned = step.learned or {}
    assert fixed.learned is None
    assert set(learned) == set(learn) - ({"a"} if method == "euler" else set())
    torch.testing.assert_close(step(y), fixed(y), rtol=1e-6, atol=1e-6)

    for p in learned.values():
        nn.init.uniform_(p, 0.5, 1.5)
    s = step.tableau.stages
    values = {name: p.detach().clone().requires_grad_() for name, p in learned.items()}
    a, b = step.tableau.floats()
    h = values.get("h", 0.5)
    weights = iter(values["a"]) if "a" in values else None
    slopes: list[Tensor] = []
    for i in range(s):
        row = [next(weights) if weights else a[i][j] for j in range(i)]
        slopes.append(branches[i](y + h * sum(w * k for w, k in zip(row, slopes, strict=True))))
    expected = y + h * sum(values.get("b", b)[i] * slopes[i] for i in range(s))
    out = step(y)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for name, value in values.items():
        torch.testing.assert_close(learned[name].grad, value.grad)

    read_a, read_b, read_h = step.coefficients()
    assert read_h == (values["h"].item() if "h" in values else 0.5)
    assert read_b == tuple(values["b"].tolist() if "b" in values else b)
    below = [read_a[i][j] for i in range(s) for j in range(i)]
    assert below == (values["a"].tolist() if "a" in values else [a[i][j] for i in range(s) for j in range(i)])
    assert all(read_a[i][j] == 0 for i in range(s) for j in range(i, s))


def test_learned_coefficients_under_half_precision() -> None:
    """A scalar in float32 leaves the dtype of the sum alone."""
    for fused in (True, False):
        step = RKStep("midpoint", nn.Identity(), learn=("a", "b", "h"), fused=fused)
        out, moments = step.forward_with_moments(torch.randn(2, 4, 3, 3).bfloat16(), return_moments=True)
        assert out.dtype == torch.bfloat16
        assert (moments is not None) == fused
        assert "learn=('a', 'b', 'h')" in repr(step)


@pytest.mark.parametrize(
    ("learn", "error", "message"),
    (
        ("abh", TypeError, "learn: expected a sequence of str"),
        (("a", 1), TypeError, "learn: expected a sequence of str"),
        (("c",), ValueError, "learn: 'c' is not a coefficient; expected some of a, b, h"),
    ),
)
def test_learning_something_else_is_refused(learn: tuple[str, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RKStep("rk4", Decay(), learn=learn)


@pytest.mark.parametrize("given", (None, {}, 4))
def test_a_tableau_that_is_none_is_named(given: object) -> None:
    with pytest.raises(TypeError, match=r"^tableau: expected a Tableau"):
        RKStep(given, nn.Identity())  # type: ignore[arg-type]
