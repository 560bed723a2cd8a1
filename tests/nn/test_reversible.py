"""RevPeriod beside the same steps with activations kept: gradients, random numbers, autocast, statistics, hooks."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rkfast import dispatch
from rkfast.nn import PreActBranch, RevPeriod, RevStep
from tests.nn.test_step import calls, trained
from tests.ops.tester import assert_as_good_as, assert_gradients_as_good_as


class Dropped(nn.Sequential):
    """With random numbers, and a BatchNorm behind them."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Dropout(0.4), nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels))


def period(
    reversible: bool = True, fused: bool = True, steps: int = 3, branch: Callable[..., nn.Module] | None = None
) -> RevPeriod:
    torch.manual_seed(0)
    make = branch or (lambda c: PreActBranch(c, fused=fused))
    return RevPeriod(*(RevStep(make(3), make(3), fused=fused) for _ in range(steps)), reversible=reversible)


def pair(**options: Any) -> tuple[RevPeriod, RevPeriod]:
    """(reversible, keeping activations), of the same values."""
    return period(True, **options), period(False, **options)


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 6, 7, 5, generator=torch.Generator().manual_seed(1), dtype=dtype)


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-10, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


def recomputes(module: nn.Module, x: Tensor) -> bool:
    """Whether the graph of module(x) ends in the Function that keeps no activations."""
    return type(module(x).grad_fn).__name__ == "_ReversibleBackward"


@pytest.mark.parametrize("channels_last", (False, True), ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("autocast", (False, True), ids=("fp32", "autocast"))
def test_as_good_as_stock(autocast: bool, channels_last: bool) -> None:
    fused, stock = period(), period(False, False)
    truth = copy.deepcopy(stock).double()
    x = images(torch.float32)
    if channels_last:
        x, fused, stock = (t.to(memory_format=torch.channels_last) for t in (x, fused, stock))  # type: ignore[call-overload]
    ours, eager, expected = trained(fused, x, autocast), trained(stock, x, autocast), trained(truth, x.double())
    assert ours["out"].dtype == eager["out"].dtype
    assert ours["out"].is_contiguous(memory_format=torch.channels_last) == channels_last
    for key, value in expected.items():
        if not value.is_floating_point():
            assert torch.equal(ours[key], value) and value == 1, key
        elif not key.endswith(".grad"):
            assert_as_good_as(ours[key], eager[key], value, key)
    keys = [key for key in expected if key.endswith(".grad")]
    assert_gradients_as_good_as(*({key: found[key] for key in keys} for found in (ours, eager, expected)))


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
def test_gradients(fused: bool) -> None:
    ours, theirs = pair(fused=fused)
    x = images(torch.float32)
    assert recomputes(ours, x) and not recomputes(theirs, x)
    ours, theirs = pair(fused=fused)
    assert_equal(trained(ours.double(), images()), trained(theirs.double(), images()))


def test_inverse() -> None:
    module = period().double()
    x = images()
    y = module(x)
    state = copy.deepcopy(module.state_dict())
    for step in reversed(list(module)):
        y = step.inverse(y)
    torch.testing.assert_close(y, x, rtol=1e-10, atol=1e-10)
    assert not y.requires_grad
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_moments_come_from_the_sums() -> None:
    """Of F and G each BatchNorm that comes first takes its moments from the sum that wrote what it reads."""
    module, x = period(), images(torch.float32)
    module(x).sum().backward()
    before = calls("channel_moments")
    y, moments = module.forward_with_moments(x, return_moments=True)
    assert moments is not None
    torch.testing.assert_close(moments.mean, y.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.var, y.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6)
    assert calls("channel_moments") == before
    heard: list[bool] = []
    for step in module:
        for branch in (step.f, step.g):
            branch.register_forward_pre_hook(lambda _, args: heard.append(len(args) == 2))
    y, _ = module.forward_with_moments(x, moments=moments)
    assert heard == [True] * 6
    heard.clear()
    y.sum().backward()
    assert heard == [False] + [True] * 5


def test_random_numbers_are_drawn_again() -> None:
    """And whoever draws after the backward draws what he would have drawn."""
    results = []
    for module in pair(branch=Dropped):
        torch.manual_seed(3)
        found = trained(module.double(), images())
        results.append(found | {"next": torch.rand(3)})
    assert_equal(*results)
    torch.manual_seed(4)
    assert not torch.allclose(period(branch=Dropped).double()(images()), results[0]["out"])


def test_statistics_move_once() -> None:
    module = period()
    x = images(torch.float32).requires_grad_()
    out = module(x)
    state = copy.deepcopy(module.state_dict())
    buffers = dict(module.named_buffers())
    out.square().sum().backward()
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert all(buffer is buffers[key] for key, buffer in module.named_buffers())
    counts = [value for key, value in state.items() if key.endswith("num_batches_tracked")]
    assert len(counts) == 12 and all(count == 1 for count in counts)


def test_autocast_is_as_it_was() -> None:
    """Whatever it is during the backward; and a weight that the forward has cast still gets its gradient elsewhere."""
    expected = trained(period(False), images(torch.float32), autocast=True)
    for during in (False, True):
        module = period()
        x = images(torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = module(x)
        with torch.autocast("cpu", torch.float16, enabled=during):
            out.float().square().mean().backward()
        ours = {"x.grad": x.grad, **{f"{n}.grad": p.grad for n, p in module.named_parameters()}}
        for key, value in ours.items():
            torch.testing.assert_close(value, expected[key], rtol=0.1, atol=0.02)
    module = period()
    with torch.autocast("cpu", torch.bfloat16):
        module(images(torch.float32))
        module[0].f.conv1(images(torch.float32)[:, :3]).float().sum().backward()
    assert module[0].f.conv1.weight.grad is not None


def test_hooks() -> None:
    """A parameter's hears of one gradient, an inner module's runs twice, a step's takes the ordinary way."""
    module, x = period(), images(torch.float32)
    expected = trained(copy.deepcopy(module), x)
    seen: list[str] = []
    for name, p in module.named_parameters():
        p.register_hook(lambda g, name=name: (seen.append(name), 2 * g)[1])
    doubled = trained(module, x)
    assert sorted(seen) == sorted(name for name, _ in module.named_parameters())
    for name, _ in module.named_parameters():
        torch.testing.assert_close(doubled[f"{name}.grad"], 2 * expected[f"{name}.grad"])

    module = period()
    module[0].f.conv1.register_forward_hook(lambda *_: seen.append("conv1"))
    seen.clear()
    trained(module, x)
    assert seen == ["conv1"] * 2

    module = period()
    module[1].register_forward_hook(lambda *_: seen.append("step"))
    seen.clear()
    assert not recomputes(module, x)
    assert seen == ["step"]
    torch.testing.assert_close(trained(period(), x), expected)


def test_frozen_parameters_and_inputs() -> None:
    for freeze_input, every in itertools.product((False, True), (1, 2, 3)):
        results = []
        for module in pair():
            for p in list(module.double().parameters())[::every]:
                p.requires_grad_(False)
            module[0].f.norm1.eval()
            x = images().requires_grad_(not freeze_input)
            out = module(x)
            if out.requires_grad:
                out.square().mean().backward()
            found = {name: p.grad for name, p in module.named_parameters()} | {"x": x.grad}
            assert all((found[name] is None) != p.requires_grad for name, p in module.named_parameters())
            results.append({key: value for key, value in found.items() if value is not None})
        assert_equal(*results)


def test_one_branch_for_all() -> None:
    """Gradients of shared weights are summed."""
    results = []
    for reversible in (True, False):
        torch.manual_seed(0)
        branch = PreActBranch(3)
        module = RevPeriod(RevStep(branch, branch), RevStep(branch, PreActBranch(3)), reversible=reversible)
        results.append(trained(module.double(), images()))
    assert_equal(*results)


def test_any_branch_and_any_rank() -> None:
    results = []
    for reversible in (True, False):
        torch.manual_seed(0)
        module = RevPeriod(RevStep(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Tanh())), reversible=reversible)
        results.append(trained(module.double(), torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)))
    assert_equal(*results)
    x = torch.randn(3, 4)
    step = module.float()[0]
    y1 = x[:, :2] + step.f(x[:, 2:])
    torch.testing.assert_close(step(x), torch.cat([y1, x[:, 2:] + step.g(y1)], 1))


def test_graphs_are_kept_and_overlap() -> None:
    module = period().double()
    xs = [images().requires_grad_(), images().flip(0).mul(2).requires_grad_()]
    inputs = [[x, *module.parameters()] for x in xs]
    alone = [torch.autograd.grad(module(x).square().sum(), i) for x, i in zip(xs, inputs, strict=True)]
    outs = [module(x).square().sum() for x in xs]
    for out, given, expected in zip(outs, inputs, alone, strict=True):
        for keep in (True, False):
            assert all(map(torch.equal, torch.autograd.grad(out, given, retain_graph=keep), expected))


class Doubled(RevStep):
    def forward_with_moments(self, y: Tensor, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().forward_with_moments(y)[0], None


def test_slices_and_subclasses() -> None:
    module, x = period(), images(torch.float32)
    assert recomputes(module[1:], x) and len(module[1:]) == 2
    step = Doubled(PreActBranch(3), PreActBranch(3)).eval()
    ordinary = RevPeriod(step)
    assert not recomputes(ordinary, x)
    torch.testing.assert_close(ordinary(x), 2 * RevStep(step.f, step.g)(x))


def test_transforms_take_the_ordinary_way() -> None:
    module = period().double().eval()
    x = images()

    def loss(x: Tensor) -> Tensor:
        return module(x).square().sum()

    twin = x.clone().requires_grad_()
    loss(twin).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), twin.grad)
    with torch.no_grad():
        assert not module(x).requires_grad


def test_parameters_of_functional_call() -> None:
    """The backward takes those of its forward, wherever they came from."""
    module = period().double().eval()
    given = {name: (1.5 * p.detach()).requires_grad_() for name, p in module.named_parameters()}
    out = torch.func.functional_call(module, given, (images(),))
    assert type(out.grad_fn).__name__ == "_ReversibleBackward"
    out.square().sum().backward()
    twin = period(False).double().eval()
    twin.load_state_dict(given, strict=False)
    twin(images()).square().sum().backward()
    assert_equal({n: t.grad for n, t in given.items()}, {n: p.grad for n, p in twin.named_parameters()})
    assert all(p.grad is None for p in module.parameters())


def test_what_the_backward_refuses() -> None:
    module, x = period(), images(torch.float32).requires_grad_()
    with pytest.raises(RuntimeError, match=r"RevPeriod: .*create_graph=True.*reversible=False"):
        torch.autograd.grad(module(x).sum(), x, create_graph=True)
    plain = period(False)
    (g,) = torch.autograd.grad(plain(x).square().sum(), x, create_graph=True)
    g.square().sum().backward()
    out = module(x)
    module.eval()
    with pytest.raises(RuntimeError, match=r"RevPeriod: train\(\) or eval\(\) has been called since the forward"):
        out.sum().backward()
    out = module(x)
    with torch.no_grad():
        module[0].f.conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"steps\[1\]: expected a RevStep, got Identity"):
        RevPeriod(RevStep(nn.Identity(), nn.Identity()), nn.Identity())  # type: ignore[arg-type]
    module = period()
    state = copy.deepcopy(module.state_dict())
    for call in (module, module[0], module[0].inverse):
        with pytest.raises(ValueError, match=r"y: expected an even number of channels, .* got 5"):
            call(torch.randn(2, 5, 4, 4))
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    x = images()
    assert RevPeriod()(x) is x


def test_deepcopy_and_pickle() -> None:
    module, x = period(), images(torch.float32)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.reversible
        torch.testing.assert_close(trained(twin, x), trained(copy.deepcopy(module), x), rtol=0, atol=0)
    assert "reversible=True" in repr(module) and "fused=True" in repr(module)


def test_stock_steps_run_no_op_of_ours() -> None:
    before = dispatch.served()
    trained(period(True, False), images(torch.float32))
    assert dispatch.served() == before
