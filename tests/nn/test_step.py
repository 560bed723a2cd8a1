"""RKStep, Period and PreActBranch: the order of the method, the papers' equations, and stock PyTorch's numbers."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from rkfast import dispatch, tableau
from rkfast.nn import Period, PreActBranch, RKStep
from tests.ops.tester import assert_as_good_as, assert_gradients_as_good_as

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


def linears(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double() for _ in range(count)]


def points() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def euler_as_printed(f: list[nn.Module], y: Tensor) -> Tensor:
    return f[0](y) + y


def midpoint_as_printed(f: list[nn.Module], y: Tensor) -> Tensor:
    middle = f[0](y) + y
    return f[1](middle / 2) + y


def rk4_as_printed(f: list[nn.Module], y: Tensor) -> Tensor:
    k1 = f[0](y) + y
    k2 = f[1](k1 / 2) + y
    k3 = f[2](k2 / 2) + y
    k4 = f[3](k3) + y
    return y + (k1 + 2 * k2 + 2 * k3 + k4) / 6


def midpoint_of_the_authors(f: list[nn.Module], y: Tensor) -> Tensor:
    return torch.relu(y + f[1](y + f[0](y) / 2))


def rk4_of_the_authors(f: list[nn.Module], y: Tensor) -> Tensor:
    k1 = f[0](y)
    k2 = f[1](y + k1 / 2)
    k3 = f[2](y + k2 / 2)
    k4 = f[3](y + k3)
    return torch.relu(y + (k1 + 2 * k2 + 2 * k3 + k4) / 6)


def same(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    """The values, and the gradients."""
    torch.testing.assert_close(ours, theirs)
    weights = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    found, expected = (torch.autograd.grad(t, inputs, weights) for t in (ours, theirs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
@pytest.mark.parametrize(
    ("variant", "method", "equations"),
    (
        ("paper", "euler", euler_as_printed),
        ("paper", "midpoint", midpoint_as_printed),
        ("paper", "rk4", rk4_as_printed),
        ("authors", "midpoint", midpoint_of_the_authors),
        ("authors", "rk4", rk4_of_the_authors),
    ),
)
def test_variants_are_their_equations(
    variant: str, method: str, equations: Callable[[list[nn.Module], Tensor], Tensor], fused: bool
) -> None:
    f, y = linears(tableau.get(method).stages), points()
    step = RKStep(method, f, variant=variant, fused=fused)
    same(step(y), equations(f, y), [y, *step.parameters()])


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
@pytest.mark.parametrize("method", ("verner8", "verner89"))
def test_published_verner_block(method: str, fused: bool) -> None:
    """What the authors' code multiplies with, in its own words, where it is not what Verner has."""
    s6 = math.sqrt(6)
    exact = RKStep(method, nn.Identity())
    a, b, _ = RKStep(method, nn.Identity(), variant="authors").coefficients()
    assert a[5][0] == (9 - 1) / 150 == pytest.approx(0.05333, abs=1e-5)
    assert a[11][6] == (154922 - 40458) / 135 == pytest.approx(847.88, abs=1e-2)
    assert a[11][9] == pytest.approx((26304 - 15176) * s6 / 45, rel=1e-15)
    assert a[11][9] == pytest.approx(605.73, abs=1e-2)
    assert b[7] == 27 / 140
    assert sum(b) == pytest.approx(1.386, abs=1e-3)
    true_a, true_b, _ = exact.coefficients()
    assert true_a[5][0] == pytest.approx(0.04367, abs=1e-5)
    assert true_a[11][6] == pytest.approx(413.49, abs=1e-2)
    assert true_a[11][9] == pytest.approx(-241.54, abs=1e-2)
    s = exact.tableau.stages
    wrong = {(i, j) for i in range(s) for j in range(s) if a[i][j] != true_a[i][j]}
    assert wrong == {(5, 0), (11, 6), (11, 9)}
    assert [i for i in range(s) if b[i] != true_b[i]] == [7]

    f, y = linears(s), points()
    step = RKStep(method, f, step=0.3, variant="authors", fused=fused)
    slopes: list[Tensor] = []
    for i in range(s):
        slopes.append(f[i](y + 0.3 * sum(a[i][j] * slopes[j] for j in range(i))))
    same(step(y), torch.relu(y + 0.3 * sum(b[i] * slopes[i] for i in range(s))), [y])


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
def test_verner8_is_of_order_8(fused: bool) -> None:
    y0 = torch.tensor([[0.2, 0.7]], dtype=torch.float64)
    errors = []
    for steps in (2, 4):
        y = y0
        for _ in range(steps):
            y = RKStep("verner8", Logistic(), step=4 / steps, fused=fused)(y)
        errors.append((y - 1 / (1 + (1 / y0 - 1) * math.exp(-4))).abs().max().item())
    assert 7 < math.log2(errors[0] / errors[1]) < 10


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
@pytest.mark.parametrize("learn", ((), ("h",), ("a", "b", "h")), ids=("fixed", "h", "abh"))
def test_a_step_size_per_channel(learn: tuple[str, ...], fused: bool) -> None:
    torch.manual_seed(0)
    f = [nn.Conv1d(4, 4, 1).double() for _ in range(2)]
    y = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    h = torch.tensor([0.5, 1.0, 1.5, -2.0], dtype=torch.float64)
    step = RKStep("midpoint", f, step=h, learn=learn, fused=fused)
    if learn:
        assert step.learned["h"].shape == (4,)
        h = step.learned["h"]
    by_channel = h.view(4, 1)
    same(step(y), y + by_channel * f[1](y + by_channel / 2 * f[0](y)), [y, *([h] if learn else [])])
    assert step.coefficients()[2] == h.tolist()
    with pytest.raises(ValueError, match=r"y: shape \[3, 5, 5\] does not fit the step sizes of 4 channels"):
        step(torch.zeros(3, 5, 5, dtype=torch.float64))


def adaptive(f: list[nn.Module], y: Tensor, h: Any, tol: float, kappa: float) -> tuple[Tensor, Tensor]:
    """Of dopri5, as the docstring has it: (result, h')."""
    t = tableau.get("dopri5")
    a, b = t.floats()
    slopes: list[Tensor] = []
    for i in range(7):
        slopes.append(f[i](y + h * sum(a[i][j] * slopes[j] for j in range(i))))
    e = h * sum((b[i] - float(t.b_embedded[i])) * slopes[i] for i in range(7))
    err = e.square().mean().sqrt()
    adapted = torch.clip(kappa * h * (tol / err) ** (1 / 5), 1 / 8, 4)
    return y + adapted * sum(b[i] * slopes[i] for i in range(7)), adapted


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
@pytest.mark.parametrize(("tol", "expected"), ((1e-3, None), (1e-20, 1 / 8), (1e9, 4)))
@pytest.mark.parametrize("learn", ((), ("h",)), ids=("fixed", "learned"))
def test_adaptive(learn: tuple[str, ...], tol: float, expected: float | None, fused: bool) -> None:
    f, y = linears(7), points()
    step = RKStep("dopri5", f, step=0.5, learn=learn, tol=tol, kappa=0.8, fused=fused).double()
    h: Any = step.learned["h"] if learn else 0.5
    out, found = adaptive(f, y, h, tol, 0.8)
    assert 1 / 8 < found < 4 if expected is None else found == expected
    same(step(y), out, [y, *step.parameters()])
    assert torch.equal(step(y), step(y))


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
def test_adaptive_without_an_error(fused: bool) -> None:
    """Of a constant field the embedded weights find no error: the step is the longest, and its gradients are finite."""
    k = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)

    class Constant(nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return 0 * y + k

    step = RKStep("verner89", Constant(), learn=("h",), tol=1e-3, fused=fused).double()
    with torch.no_grad():
        k.zero_()
    out = step(torch.zeros(2, 4, dtype=torch.float64))
    out.sum().backward()
    torch.testing.assert_close(k.grad, torch.full_like(k, 4.0))
    assert step.learned["h"].grad == 0


def test_adaptive_reads_nothing_back() -> None:
    """A tensor on the meta device has no value to read."""
    with torch.device("meta"):
        step = RKStep("dopri5", [PreActBranch(4) for _ in range(7)], learn=("h",), tol=0.1)
        step(torch.randn(2, 4, 5, 5)).sum().backward()


def test_set_step() -> None:
    f, y = linears(2), points()
    for step in (RKStep("midpoint", f), RKStep("midpoint", f, fused=False)):
        keys = list(step.state_dict())
        for h in (2.0, 0.3, 0, -1.5):
            step.set_step(h)
            same(step(y), y + h * f[1](y + h / 2 * f[0](y)), [y, *f[0].parameters()])
            assert step.coefficients()[2] == step.step == h
        assert list(step.state_dict()) == keys
        for twin in (copy.deepcopy(step), pickle.loads(pickle.dumps(step))):
            assert torch.equal(twin(y), step(y))
            twin.set_step(1)
            assert step.step == -1.5
    counter = CompileCounter()
    torch._dynamo.reset()
    step.set_step(1)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for h in (2.0, 1.5, 1.0, 0.5):
        step.set_step(h)
        torch.testing.assert_close(compiled(y), step(y))
    assert counter.frame_count == 1


def test_a_step_that_cannot_be_set() -> None:
    learned, printed = RKStep("rk4", Decay(), learn=("h",)), RKStep("rk4", Decay(), variant="paper")
    with pytest.raises(ValueError, match="set_step: h is learned"):
        learned.set_step(2)
    with pytest.raises(ValueError, match='set_step: variant "paper" has no step size'):
        printed.set_step(2)
    with pytest.raises(ValueError, match="step: expected a finite number, got nan"):
        printed.set_step(float("nan"))
    with pytest.raises(TypeError, match="step: expected a number, got '2'"):
        printed.set_step("2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="step: expected a number, got tensor"):
        printed.set_step(torch.ones(3))  # type: ignore[arg-type]
    assert learned.step == printed.step == 1


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
def test_nested(fused: bool) -> None:
    f, y = linears(8), points()

    def midpoint(f1: Callable[[Tensor], Tensor], f2: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        return y + f2(y + f1(y) / 2)

    def nested(f: list[nn.Module], y: Tensor) -> Tensor:
        if len(f) == 2:
            return midpoint(*f, y)
        half = len(f) // 2
        return midpoint(lambda x: nested(f[:half], x), lambda x: nested(f[half:], x), y)

    def step(f: list[nn.Module]) -> RKStep:
        half = len(f) // 2
        return RKStep("midpoint", f if half == 1 else [step(f[:half]), step(f[half:])], fused=fused)

    module = step(f)
    same(module(y), nested(f, y), [y, *module.parameters()])


def test_nested_steps_hand_moments_on() -> None:
    """Of four branches only the first, whose input comes from outside, is without them."""
    torch.manual_seed(0)
    step = RKStep("midpoint", [RKStep("midpoint", [PreActBranch(6) for _ in range(2)]) for _ in range(2)])
    seen: list[bool] = []
    for module in step.modules():
        if isinstance(module, PreActBranch):
            module.register_forward_pre_hook(lambda _, args: seen.append(len(args) == 2))
    step(torch.randn(5, 6, 9, 8))
    assert seen == [False, True, True, True]


@pytest.mark.parametrize("method", ("midpoint", "rk4"))
def test_transformer_encoder_layers(method: str) -> None:
    """Section 3.5: [Norm, attention, Norm, MLP] with its own shortcuts as the function that is stacked."""
    torch.manual_seed(0)
    layers = [
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True, norm_first=True)
        for _ in range(tableau.get(method).stages)
    ]
    x = torch.randn(3, 5, 8)
    fused, stock = RKStep(method, layers), RKStep(method, copy.deepcopy(layers), fused=False)
    truth = copy.deepcopy(stock).double()
    ours, eager, expected = trained(fused, x), trained(stock, x), trained(truth, x.double())
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert_as_good_as(ours[name], eager[name], value, name)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(fused, fullgraph=True, backend="aot_eager")(x), fused(x))


def branches(count: int, fused: bool) -> list[nn.Module]:
    return [PreActBranch(6, fused=fused) for _ in range(count)]


SIZES = (0.5, 0.7, 0.9, 1.1, 1.3, 0.2)
STEPS: dict[str, Callable[[bool], RKStep]] = {
    "authors": lambda fused: RKStep("rk4", branches(4, fused), step=0.7, variant="authors", fused=fused),
    "authors_verner8": lambda fused: RKStep("verner8", branches(14, fused), step=0.1, variant="authors", fused=fused),
    "paper_midpoint": lambda fused: RKStep("midpoint", branches(2, fused), variant="paper", fused=fused),
    "paper_rk4": lambda fused: RKStep("rk4", branches(4, fused), variant="paper", fused=fused),
    "verner8": lambda fused: RKStep("verner8", branches(14, fused), step=0.1, fused=fused),
    "learned": lambda fused: RKStep("rk4", branches(4, fused), learn=("h",), fused=fused),
    "per_channel": lambda fused: RKStep(
        "rk4", branches(4, fused), step=torch.tensor(SIZES), learn=("b", "h"), variant="authors", fused=fused
    ),
    "fixed_per_channel": lambda fused: RKStep("rk4", branches(4, fused), step=torch.tensor(SIZES), fused=fused),
    "adaptive": lambda fused: RKStep(
        "dopri5", branches(7, fused), step=0.5, learn=("h",), tol=0.1, variant="authors", fused=fused
    ),
    "nested": lambda fused: RKStep(
        "midpoint", [RKStep("midpoint", branches(2, fused), fused=fused) for _ in range(2)], fused=fused
    ),
}


def twins(name: str) -> tuple[Period, Period, Period]:
    """Two steps fused, stock, and stock in float64."""
    torch.manual_seed(0)
    fused, stock = (Period(*(STEPS[name](fused) for _ in range(2))) for fused in (True, False))
    stock.load_state_dict(fused.state_dict())
    return fused, stock, copy.deepcopy(stock).double()


@pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("name", STEPS)
def test_every_step_fused_equals_stock(name: str, channels_last: bool) -> None:
    """In training and, after a step of an optimizer, in training and eval again."""
    fused, stock, truth = twins(name)
    assert fused.state_dict().keys() == stock.state_dict().keys()
    generator = torch.Generator().manual_seed(1)
    if channels_last:
        fused, stock = (m.to(memory_format=torch.channels_last) for m in (fused, stock))  # type: ignore[call-overload]
    for training in (True, True, False):
        x = torch.randn(5, 6, 9, 8, generator=generator)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        found = []
        for module in (fused, stock, truth):
            module.zero_grad()
            found.append(trained(module.train(training), x.to(next(module.parameters()).dtype)))
        ours, eager, expected = found
        assert ours.keys() == expected.keys()
        assert {key.removesuffix(".grad") for key in ours} >= {key for key, _ in fused.named_parameters()}
        assert_gradients_as_good_as(
            *({k: v for k, v in f.items() if v.is_floating_point()} for f in (ours, eager, expected))
        )
        for key, value in expected.items():
            if not value.is_floating_point():
                assert torch.equal(ours[key], value), key
        for module in (fused, stock, truth):
            torch.optim.SGD(module.parameters(), lr=1e-3).step()


@pytest.mark.parametrize("name", [name for name in STEPS if name != "authors_verner8"])
def test_every_step_as_any_module(name: str) -> None:
    """Compiled, under autocast, checkpointed, copied and pickled."""
    torch._dynamo.reset()
    fused, stock, truth = twins(name)
    x = torch.randn(5, 6, 9, 8)
    module, eager, expected = (Period(m[0]) for m in (fused, stock, truth))
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    once = trained(copy.deepcopy(module), x)
    ours = {key.removeprefix("_orig_mod."): value for key, value in trained(compiled, x).items()}
    torch.testing.assert_close(ours, once, rtol=1e-3, atol=1e-5)

    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(trained(twin, x), once, rtol=0, atol=0)

    again = copy.deepcopy(module)
    inner = again.forward
    again.forward = lambda x: checkpoint(inner, x, use_reentrant=False)  # type: ignore[method-assign]
    for key, value in trained(again, x).items():
        if key == "out" or key.endswith("grad"):
            assert torch.equal(value, once[key]), key

    half = [trained(copy.deepcopy(m), x, autocast=True) for m in (module, eager)]
    assert half[0]["out"].dtype == half[1]["out"].dtype
    truths = trained(expected, x.double())
    assert_gradients_as_good_as(
        *({k: v.float() for k, v in f.items() if v.is_floating_point()} for f in half),
        {k: v for k, v in truths.items() if v.is_floating_point()},
    )


@pytest.mark.parametrize(("name", "sums"), (("authors", 4), ("paper_rk4", 4), ("verner8", 14), ("adaptive", 8)))
def test_every_sum_is_one_pass(name: str, sums: int) -> None:
    """ReLU, identity and moments are of the sum's pass; an adaptive step has one sum more, its error."""
    step, x = twins(name)[0][0], torch.randn(5, 6, 9, 8)
    before = calls("rk_sum")
    y, moments = step.forward_with_moments(x, return_moments=True)
    assert calls("rk_sum") == before + sums
    assert moments is not None
    torch.testing.assert_close(moments.mean, y.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    if "authors" in name:
        assert y.min() == 0


def test_gradients_of_stages_are_added_up_in_one_pass_each() -> None:
    """Of y and of each stage, however many sums read it, and of the ReLU one pass more."""
    for name, passes in (("verner8", 15), ("authors", 6)):
        step, x = twins(name)[0][0], torch.randn(5, 6, 9, 8, requires_grad=True)
        y = step(x)
        before, scaled = calls("rk_sum"), calls("rk_sum_backward")
        y.square().sum().backward()
        assert (calls("rk_sum") - before) + (calls("rk_sum_backward") - scaled) == passes
        assert calls("rk_sum_backward") - scaled == (name == "authors")


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
def test_a_branch_of_another_shape_is_refused(fused: bool) -> None:
    step = RKStep("midpoint", [nn.Linear(4, 4), nn.Linear(4, 1)], fused=fused)
    with pytest.raises(ValueError, match=r"branches\[1\]: made \[3, 1\] of \[3, 4\]; expected a branch that keeps"):
        step(torch.randn(3, 4))
    blocks = [PreActBranch(c) for c in (4, 4, 8, 4)]
    with pytest.raises(ValueError, match=r"branches: \[0\] has 4 channels, and \[2\] has 8; expected blocks of one"):
        RKStep("rk4", blocks)
    with pytest.raises(ValueError, match="has 4 channels"):
        RKStep("midpoint", [RKStep("euler", PreActBranch(4)), PreActBranch(8)])


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    (
        ("rk4", {"variant": "book"}, ValueError, "variant: 'book' is not supported; expected one of textbook, authors"),
        ("rk4", {"variant": None}, TypeError, "variant: expected a str, got None"),
        ("verner8", {"variant": "paper"}, ValueError, 'variant: "paper" has equations for euler, midpoint, rk4, and'),
        ("rk4", {"variant": "paper", "step": 2}, ValueError, 'variant: the equations of "paper" have no step size'),
        ("rk4", {"variant": "paper", "learn": ("a",)}, ValueError, "have no step size and nothing to learn"),
        ("rk4", {"tol": 1e-3}, ValueError, "tol: rk4 has no embedded weights"),
        ("dopri5", {"tol": 0}, ValueError, "tol: expected a number above 0, got 0"),
        ("dopri5", {"tol": "1"}, TypeError, "tol: expected a number, got '1'"),
        ("dopri5", {"tol": 1, "kappa": float("inf")}, ValueError, "kappa: expected a number above 0, got inf"),
        ("dopri5", {"tol": 1, "learn": ("b",)}, ValueError, "tol: an adaptive step has the weights of its pair"),
        ("dopri5", {"tol": 1, "step": torch.ones(3)}, ValueError, "tol: .* one h for all channels"),
        ("rk4", {"step": "1"}, TypeError, "step: expected a number, got '1'"),
        ("rk4", {"step": True}, TypeError, "step: expected a number, got True"),
        ("rk4", {"step": torch.ones(2, 2)}, ValueError, r"step: .* a floating tensor \[C\], got shape \[2, 2\]"),
        ("rk4", {"step": torch.ones(2).long()}, ValueError, "step: .* of torch.int64"),
        ("rk4", {"step": torch.full((2,), math.inf)}, ValueError, "step: expected a finite number, got tensor"),
    ),
)
def test_bad_options_are_refused(method: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RKStep(method, Decay(), **options)


def test_an_implicit_method_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row 1 of a uses stage 1 .*: the method is not explicit"):
        RKStep(tableau.Tableau("implicit midpoint", [["1/2"]], [1], ["1/2"], 2), Decay())  # type: ignore[list-item]


def test_a_method_is_more_than_its_name() -> None:
    impostor = tableau.Tableau("rk4", [[]], [1], [0], 1)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="and none for rk4"):
        RKStep(impostor, Decay(), variant="paper")
    verner = tableau.Tableau("verner8", [[]], [1], [0], 1)  # type: ignore[list-item]
    assert RKStep(verner, Decay(), variant="authors").coefficients() == (((0.0,),), (1.0,), 1.0)
