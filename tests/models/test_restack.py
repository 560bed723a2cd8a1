"""restack and unstack: the formula in plain PyTorch, the network as it was with Euler, keys, hooks, what is refused."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rkfast
from rkfast import tableau
from rkfast.models.restack import Restacked
from rkfast.nn import Period, PreActBranch
from tests.libraries import network
from tests.models.tester import seen, settled
from tests.nn.test_step import calls
from tests.swap import lookalikes

METHODS = ("euler", "midpoint", "rk4")


class Basic(nn.Module):
    """torchvision's BasicBlock."""

    def __init__(self, channels: int, stride: int = 1, relu: nn.Module | None = None) -> None:
        super().__init__()
        width = channels // stride
        self.conv1 = nn.Conv2d(width, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = relu or nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(width, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def f(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """timm's Bottleneck with another activation, squeeze and excitation and stochastic depth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 3, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.act1 = nn.SiLU(inplace=True)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(3)
        self.drop_block = nn.Identity()
        self.act2 = nn.SiLU(inplace=True)
        self.aa = nn.Identity()
        self.conv3 = nn.Conv2d(3, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.se = nn.Conv2d(channels, channels, 1)
        self.act3 = nn.SiLU(inplace=True)
        self.downsample = None
        self.drop_path = nn.Dropout2d(0.3)

    def f(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(x)))))
        return self.drop_path(self.se(self.bn3(self.conv3(x))))

    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        out += x
        return self.act3(out)


class Net(nn.Module):
    """A ResNet with runs of 2, 4 and 5 blocks of one shape."""

    def __init__(self, blocks: tuple[int, ...] = (2, 4, 5)) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.layer1 = nn.Sequential(*(Basic(4) for _ in range(blocks[0])))
        self.layer2 = nn.Sequential(Basic(8, stride=2), *(Basic(8) for _ in range(blocks[1])))
        self.layer3 = nn.Sequential(*(Bottleneck(8) for _ in range(blocks[2])))
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer3(self.layer2(self.layer1(self.stem(x)))).mean((2, 3)))


def made(factory: Callable[[], nn.Module] = Net) -> Any:
    return settled(factory)


def restacked(model: Any, method: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return rkfast.restack(model, method, **options)


def euler(**options: Any) -> nn.Module:
    return rkfast.create_model("ho_resnet-18", method="euler", width=4, **options)


def step(blocks: list[Any], method: str, y: Tensor, h: float) -> Tensor:
    """The docstring's formula."""
    act = torch.relu if isinstance(blocks[0], Basic) else F.silu
    a, b = tableau.get(method).floats()
    slopes: list[Tensor] = []
    for i, block in enumerate(blocks):
        x = y
        if i:
            x = act(y + h * sum(w * k for w, k in zip(a[i], slopes, strict=False)))
        slopes.append(block.f(x))
    return act(y + h * sum(w * k for w, k in zip(b, slopes, strict=True)))


@pytest.mark.parametrize("h", (None, 0.5))
@pytest.mark.parametrize("block", (Basic, Bottleneck))
@pytest.mark.parametrize("method", METHODS)
def test_formula(method: str, block: type[nn.Module], h: float | None) -> None:
    """Outputs, gradients and statistics in float64."""
    ours = made(lambda: nn.Sequential(*(block(4) for _ in range(9)))).double()
    theirs = copy.deepcopy(ours)
    s = tableau.get(method).stages
    whole = 9 - 9 % s
    restacked(ours, method, step=h)
    sums = 0 if method == "euler" and h is None else s * (whole // s)
    for training in (True, False):
        x = torch.randn(4, 4, 6, 5, dtype=torch.float64, requires_grad=True)
        twin = x.detach().clone().requires_grad_()
        torch.manual_seed(1)
        before = calls("rk_sum")
        out, y = ours.train(training)(x), twin
        assert calls("rk_sum") == before + sums  # one pass for each sum and its activation
        torch.manual_seed(1)
        blocks = list(theirs.train(training))
        for i in range(0, whole, s):
            y = step(blocks[i : i + s], method, y, s if h is None else h)
        for remaining in blocks[whole:]:
            y = remaining(y)
        torch.testing.assert_close(out, y, rtol=1e-10, atol=1e-10)
        for result in (out, y):
            result.square().mean().backward()
        torch.testing.assert_close(x.grad, twin.grad, rtol=1e-9, atol=1e-12)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fused", (True, False), ids=("fused", "stock"))
@pytest.mark.parametrize("method", METHODS)
def test_euler_steps_become_those_of_a_ho_resnet(method: str, fused: bool) -> None:
    """With step=1, those of the HO-ResNet with the same weights."""
    torch.manual_seed(0)
    model = euler(fused=fused)
    theirs = rkfast.create_model("ho_resnet-18", method=method, width=4, fused=fused)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), model.state_dict().values(), strict=True)))
    rkfast.restack(model, method, step=1.0)
    x = torch.randn(4, 3, 8, 7)
    with_moments: list[list[bool]] = [[], []]
    for net, heard in zip((theirs, model), with_moments, strict=True):
        for module in net.modules():
            if isinstance(module, PreActBranch):
                module.register_forward_pre_hook(lambda _, args, heard=heard: heard.append(len(args) == 2))
    expected = seen(theirs, x)
    ours = seen(model, x)
    assert with_moments == [[False] + [fused] * 7] * 2
    for value, other in zip(ours.values(), expected.values(), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("factory", (Net, euler), ids=("post", "pre"))
@pytest.mark.parametrize("method", METHODS)
def test_unstacked_it_is_what_it_was(method: str, factory: Callable[[], nn.Module]) -> None:
    """The modules, keys and numbers; with Euler they are the same while it is restacked, too."""
    model = made(factory)
    twin = copy.deepcopy(model)
    modules = dict(model.named_modules())
    types = [type(module) for module in modules.values()]
    keys = list(model.state_dict())
    x = torch.randn(4, 3, 8, 6)

    def outcome(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return seen(copy.deepcopy(model), x)

    expected = outcome(twin)
    assert restacked(model, method) is model
    assert any(isinstance(module, Restacked) for module in model.modules())
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == modules
    found = outcome(model)
    assert all(torch.equal(value, expected[key]) for key, value in found.items()) == (method == "euler")
    assert found.keys() == expected.keys()
    # Checkpoints go both ways.
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    model.load_state_dict(twin.state_dict())

    assert rkfast.unstack(model) is model
    assert [type(module) for module in modules.values()] == types
    assert dict(model.named_modules()) == modules
    assert not any("_plan" in module.__dict__ for module in model.modules())
    found = outcome(model)
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    restacked(model, method)
    rkfast.unstack(model.eval())
    assert torch.equal(model(x), twin.eval()(x))


def test_a_sum_takes_its_relu_along() -> None:
    model = made(lambda: nn.Sequential(*(Basic(4) for _ in range(4))))
    restacked(model, "rk4")
    with torch.profiler.profile() as profile:
        model(torch.randn(2, 4, 6, 6))
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::relu_"] == 4  # within the blocks


def test_training() -> None:
    """And what has been learned stays."""
    model = restacked(made(), "midpoint")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        torch.manual_seed(2)
        x = torch.randn(8, 3, 8, 8)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(8))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None for p in model.parameters())
    state = copy.deepcopy(model.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in rkfast.unstack(model).state_dict().items())


def test_what_remains_is_reported() -> None:
    model = made()
    with pytest.warns(UserWarning, match=r"restack: rk4 takes 4 .* left as they are: layer1\.0, layer1\.1, layer3\.4$"):
        rkfast.restack(model, "rk4")
    assert type(model.layer1) is nn.Sequential
    assert isinstance(model.layer2, Restacked) and isinstance(model.layer3, Restacked)
    assert "rk4, step=4, steps of blocks 1-2-3-4" in repr(model.layer2)
    assert "rk4, step=4, steps of blocks 0-1-2-3" in repr(model.layer3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rkfast.restack(made(), "euler")


def test_copies() -> None:
    model, x = restacked(made(), "midpoint").eval(), torch.randn(2, 3, 8, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        rkfast.unstack(twin)
        assert type(twin.layer2) is nn.Sequential
        assert isinstance(model.layer2, Restacked)


@pytest.mark.parametrize("factory", (Net, euler), ids=("post", "pre"))
def test_compile(factory: Callable[[], nn.Module]) -> None:
    torch._dynamo.reset()
    model, x = restacked(made(factory), "midpoint").eval(), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_checkpointing() -> None:
    """rkfast's own calls the period as a whole; whoever takes the blocks one by one is stopped."""
    torch.manual_seed(0)
    model = rkfast.restack(euler(fused=False), "rk4")
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(seen(twin, x), seen(model, x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="a restacked container is not the chain of its blocks"):
        list(model.period)
    assert len(list(model.period.children())) == len(model.period) == 8
    other = made()
    other.grad_checkpointing = True
    with pytest.raises(ValueError, match="it checkpoints its blocks one by one"):
        rkfast.restack(other, "midpoint")


def test_hooks() -> None:
    """A block's is an error, as it would not run; a layer's and a container's run; with Euler, blocks are called."""
    x, heard = torch.randn(2, 3, 8, 8), []
    model = made()
    handle = model.layer2[3].register_forward_hook(lambda *_: heard.append("block"))
    with pytest.raises(ValueError, match=r"layer2\.3 has a hook, which would not run"):
        restacked(model, "midpoint")
    assert not any(isinstance(module, Restacked) for module in model.modules())
    restacked(model, "euler")
    assert heard == []
    model(x)
    assert heard == ["block"]
    handle.remove()
    rkfast.unstack(model)

    heard.clear()
    model.layer2[3].conv1.register_forward_hook(lambda *_: heard.append("layer"))
    model.layer2[2].relu.register_forward_hook(lambda *_: heard.append("relu"))
    model.layer2.register_forward_hook(lambda *_: heard.append("container"))
    restacked(model, "midpoint")
    assert heard == []
    expected = model(x)
    assert heard == ["relu", "relu", "layer", "container"]
    assert torch.isfinite(expected).all()
    model.layer1[0].register_forward_pre_hook(lambda *_: heard.append("never"))
    with pytest.raises(RuntimeError, match="block 0 has a hook, which would not run"):
        model(x)
    assert "never" not in heard


class Scaled(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + 0.5 * self.f(x))


class Dropping(Basic):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + F.dropout(self.f(x), 0.1, self.training))


class Gated(Basic):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.gamma * self.f(x))


class Branching(Basic):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.extra = nn.Identity()


OTHERS = [partial(block, 4) for block in (lookalikes.Cut, lookalikes.Dropping, lookalikes.Counting)]


@pytest.mark.parametrize("block", (Scaled, Dropping, Gated, Branching, *OTHERS))
def test_what_computes_something_else_is_left_alone(block: Callable[[int], nn.Module]) -> None:
    with torch.no_grad():
        model = nn.Sequential(*(block(4) for _ in range(4)))
        for module in model:
            nn.init.zeros_(module.bn2.weight)  # as it is, no block does anything
    with pytest.raises(ValueError, match="model: Sequential has no residual blocks; midpoint takes 2 in a row"):
        rkfast.restack(model, "midpoint")
    assert type(model) is nn.Sequential


@pytest.mark.parametrize(
    "factory",
    (
        lambda fused: rkfast.create_model("resnet-20", fused=fused),
        lambda fused: rkfast.create_model("seresnet50", fused=fused, num_classes=10),
        lambda fused: rkfast.fuse(Net()) if fused else Net(),
    ),
    ids=("own", "own with a gate", "behind fuse"),
)
def test_fused_blocks_are_the_same_stages(factory: Callable[[bool], nn.Module]) -> None:
    fused, stock = (restacked(made(lambda f=f: factory(f)).double(), "midpoint").eval() for f in (True, False))
    before = [type(module) for module in stock.modules()].count(Restacked)
    assert [type(module) for module in fused.modules()].count(Restacked) == before > 1
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)
    torch.testing.assert_close(fused(x), stock(x))


def test_blocks_of_other_shapes_or_activations_are_no_run() -> None:
    for blocks in (
        (Basic(4), Bottleneck(4)),
        (Basic(4), Basic(4, relu=nn.SELU())),
        (Basic(4), nn.Identity(), Basic(4)),
    ):
        with pytest.raises(ValueError, match="runs of 1, 1 residual blocks of one shape; midpoint takes 2 in a row"):
            rkfast.restack(nn.Sequential(*blocks), "midpoint")
    others = [euler(), euler(learn=("h",)), euler(variant="authors")]
    others[0].set_factor(0.5)  # type: ignore[operator]
    for model in (*others, rkfast.create_model("ho_resnet-10", width=4), rkfast.create_model("polynet-10", width=4)):
        with pytest.raises(ValueError, match="no residual blocks"):
            rkfast.restack(model, "midpoint")
        assert type(model.period) is Period


def test_checking_changes_nothing() -> None:
    """Neither statistics nor random numbers, and no hook runs; without values (meta) it works, too."""
    model = made()
    heard: list[Any] = []
    model.layer3[0].conv1.register_forward_hook(lambda *args: heard.append(args))
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    restacked(model, "midpoint")
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert heard == []
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert model.training and model.layer2[1].bn1.training
    with torch.device("meta"):
        assert isinstance(restacked(Net(), "midpoint").layer2, Restacked)


def test_other_dtypes() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model = restacked(made().to(dtype), "midpoint")
        assert model(torch.randn(2, 3, 8, 8, dtype=dtype)).dtype == dtype
        assert next(model.parameters()).dtype == dtype


def test_what_is_refused() -> None:
    model = restacked(made(), "midpoint")
    with pytest.raises(ValueError, match=r"model: it is restacked already; call rkfast\.unstack"):
        rkfast.restack(model, "euler")
    for change in (lambda m: m.layer2.append(Basic(8)), lambda m: m.layer2.pop(0)):
        twin = copy.deepcopy(model)
        change(twin)
        with pytest.raises(RuntimeError, match="blocks have been added or removed since restack"):
            twin(torch.randn(2, 3, 8, 8))
    rkfast.unstack(model)
    with pytest.raises(ValueError, match="model: nothing in it is restacked"):
        rkfast.unstack(model)
    cases: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        (model, "rk9", {}, ValueError, "method: 'rk9' is not"),
        (model, 4, {}, TypeError, "method: expected a Tableau or the name of one, got int"),
        ([model], "rk4", {}, TypeError, "model: expected an nn.Module, got list"),
        (model, "rk4", {"step": 0}, ValueError, r"step: expected a number in \(0, 64\], got 0"),
        (model, "rk4", {"step": "1"}, TypeError, "step: expected a number, got '1'"),
        (nn.Linear(2, 2), "euler", {}, ValueError, "model: Linear has no residual blocks; euler takes 1 in a row"),
        (made(lambda: Net((2, 3, 1))), "rk4", {}, ValueError, "model: Net has runs of 2, 3, 1 residual blocks of one"),
    ]
    for given, method, options, error, message in cases:
        with pytest.raises(error, match=message):
            rkfast.restack(given, method, **options)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got None"):
        rkfast.unstack(None)  # type: ignore[arg-type]
    assert not any(isinstance(module, Restacked) for module in model.modules())


LIBRARIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("torchvision.resnet18", {}),
    ("torchvision.resnet50", {}),
    ("timm.resnet18", {"zero_init_last": False}),
    ("timm.seresnet50", {"zero_init_last": False, "drop_path_rate": 0.2}),
)


@pytest.mark.parametrize(("address", "options"), LIBRARIES)
def test_torchvision_and_timm(address: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = network(address, **options)
    twin = copy.deepcopy(model)
    keys = list(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    found = []
    for net in (restacked(model, "euler"), twin):
        torch.manual_seed(1)
        net(x).square().mean().backward()
        found.append([net.eval()(x), *(p.grad for p in net.parameters()), *net.state_dict().values()])
    assert all(map(torch.equal, *found))
    restacked(rkfast.unstack(model), "midpoint")
    assert list(model.state_dict()) == keys
    y = model.eval().layer1[0](torch.relu(torch.randn(2, model.layer1[0].conv1.in_channels, 8, 8)))
    unit = model.layer1._plan.units[-1]
    assert unit.form is not None
    blocks = [model.layer1[int(i)] for i in unit.names]
    k1 = f_of(blocks[0], y)
    k2 = f_of(blocks[1], torch.relu(y + k1))
    ours = model.layer1._step(unit, blocks, y, None, False)[0]
    torch.testing.assert_close(ours, torch.relu(y + 2 * k2), rtol=1e-4, atol=1e-5)
    assert torch.equal(rkfast.unstack(model)(x), twin(x))


def f_of(block: Any, x: Tensor) -> Tensor:
    """A block's F, by its own forward without the last activation and the sum."""
    heard: list[Tensor] = []
    last = [m for m in (block.bn3 if hasattr(block, "bn3") else block.bn2, getattr(block, "se", None)) if m][-1]
    handle = last.register_forward_hook(lambda *args: heard.append(args[2].clone()))
    block(x)
    handle.remove()
    return heard[0]
