"""attach, freeze, fold, detach and steps: the paper's formula, from the first to the last day of a network."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import rkfast
from rkfast import tsc
from rkfast.nn.controller import CONTROLLERS, Controller
from rkfast.tsc.stepped import SteppedBlock, SteppedSequential
from tests.libraries import network
from tests.models.test_restack import Basic
from tests.models.tester import difference, seen
from tests.swap import lookalikes
from tests.tsc.nets import NETS, ResNet, SqueezeExcite, attached, made, plain


def images(count: int = 4, size: int = 12) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, steps: int = 2) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model.train()
    for i in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images(4)), torch.arange(4) + i).backward()
        optimizer.step()
    return model.eval()


def two_steps(model: nn.Module, x: Tensor, rate: float) -> Tensor:
    """What model makes of two images afterwards."""
    optimizer = torch.optim.SGD(model.train().parameters(), rate)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        optimizer.step()
    return model.eval()(x)  # type: ignore[no-any-return]


def relative(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", (True, False))
def test_formula(name: str, training: bool) -> None:
    """Outputs, statistics and all gradients, those of the weights through the controller among them. A ReLU near zero
    may be on in one model and off in the other, so three of five draws decide."""
    failures: Counter[str] = Counter()
    for seed in range(5):
        model = attached(name, seed=seed).train(training)
        eager, truth = plain(model), plain(model).double()
        ours, stock, exact = (seen(m, images()) for m in (model, eager, truth))
        assert ours.keys() == exact.keys() and any("tsc" in key for key in ours)
        if training and not hasattr(model, "layer1"):
            # Every reader's BatchNorm divides the step sizes out again, but for its eps: of their gradient rounding
            # leaves little. It is compared in float64, below.
            exact = {key: value for key, value in exact.items() if not key.startswith("tsc.")}
        for kind in ("out", "x.grad", "parameters", "running_mean", "running_var"):
            failures[kind] += difference(ours, stock, exact, kind) is not None
    assert max(failures.values()) < 3, failures


@pytest.mark.parametrize("name", NETS)
def test_formula_in_float64(name: str) -> None:
    model = attached(name).double()
    ours, exact = (seen(m, images()) for m in (model, plain(model)))
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NETS)
def test_from_the_first_day_to_the_last(name: str) -> None:
    """attach, train, freeze, fold, and into the stock network."""
    stock, model = made(name).eval(), made(name).eval()
    keys, kinds = list(stock.state_dict()), [type(module) for module in stock.modules()]
    tsc.attach(model, preserve=True)
    assert list(model.state_dict())[: len(keys)] == keys
    assert all(key.startswith("tsc.") for key in list(model.state_dict())[len(keys) :])
    assert relative(model(images()), stock(images())) < 1e-5
    trained(model)
    out = model(images())
    assert tsc.freeze(model) is model
    assert torch.equal(model(images()), out)
    counts = [(c.blocks, c.channels) for c in model.tsc]
    assert not list(model.tsc.parameters()) and [tuple(b.shape) for b in model.tsc.buffers()] == counts
    assert [blocks for blocks, _ in counts] == NETS[name][1]
    assert tsc.fold(model) is model
    assert relative(model(images()), out) < 1e-5
    assert list(model.state_dict()) == keys and [type(module) for module in model.modules()] == kinds
    stock.load_state_dict(model.state_dict())
    assert relative(stock(images()), out) < 1e-5


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("controller", CONTROLLERS)
def test_detach_leaves_no_trace(name: str, controller: str) -> None:
    def everything(model: nn.Module) -> Any:
        return [(type(m), sorted(vars(m)), list(m._modules), repr(m)) for m in model.modules()]

    stock = made(name)
    for preserve in (False, True):
        model = copy.deepcopy(stock)
        parameters = list(model.parameters())
        tsc.attach(model, controller, preserve=preserve)
        assert tsc.detach(model) is model
        assert everything(model) == everything(stock)
        assert all(map(torch.equal, model.state_dict().values(), stock.state_dict().values()))
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_controllers(controller: str) -> None:
    model = made("basic")
    before = set(model.parameters())
    new = tsc.attach(model, controller, **({"value": 0.01} if controller == "fixed" else {}))
    assert set(new) == set(model.parameters()) - before
    assert bool(new) == (controller != "fixed")
    sizes = tsc.steps(model)
    assert [b.name for b in sizes.blocks] == ["layer1.0", "layer1.1", "layer1.2", "layer2.0", "layer2.1"]
    first = {"fixed": 0.01, "indp": 1.0}.get(controller)
    for block in sizes.blocks:
        assert block.sizes.shape == (8 if "layer1" in block.name else 16,)
        assert block.min <= block.mean <= block.max
        assert block.mean == pytest.approx(block.sizes.double().mean().item())
        assert block.mean == pytest.approx(first, rel=1e-6) if first else 0 < block.min < block.max < 1
    assert sizes.evolution_time == pytest.approx(sum(b.mean for b in sizes.blocks))
    assert re.search(r"layer2\.1 +\d\.\d{3} .*\nevolution time T = \d+\.\d{3}$", str(sizes))
    seen(model, images())
    assert all(p.grad is not None and p.grad.ne(0).any() for p in new)


def test_parameters_in_training_and_inference() -> None:
    """Spec of Yang et al., Appendix C: k = 12, d = 40 and k = 36, T = 12; the reduction is 4."""
    for name, options, base, train, infer in (
        ("densenet-40", {"num_classes": 10}, 1_019_722, 1_021_099, 1_020_154),
        ("cliquenet-12", {"growth_rate": 36}, 935_994, 947_901, 936_426),
    ):
        model = rkfast.create_model(name, **options)
        assert sum(p.numel() for p in model.parameters()) == base
        tsc.attach(model)
        assert sum(p.numel() for p in model.parameters()) == train
        tsc.freeze(model)
        assert sum(p.numel() for p in model.parameters()) + sum(b.numel() for b in model.tsc.buffers()) == infer
    model = made("basic")
    tsc.attach(model, reduction=2)
    assert model.tsc[0].input.weight.shape == (4, 18 * 8)
    tsc.detach(model)
    tsc.attach(model, "2fc", reduction=100)
    assert model.tsc[0].weight_in.shape == (3, 18 * 8, 1)


def test_once_in_every_forward_and_never_stale() -> None:
    """However the weights change between two forwards."""
    model = attached("basic").eval()
    calls: list[Controller] = []
    for controller in model.tsc:
        controller.register_forward_hook(lambda module, *_: calls.append(module))
    x = images()
    changes: list[Callable[[Any], Any]] = [
        lambda m: m.tsc[0].output.bias.data.add_(1),
        lambda m: m.load_state_dict({k: v * 0.9 if v.is_floating_point() else v for k, v in m.state_dict().items()}),
        lambda m: setattr(m.layer1[0].conv1, "weight", nn.Parameter(m.layer1[0].conv1.weight.detach() + 1)),
        lambda m: m.layer2[1].conv2.weight.untyped_storage().copy_(torch.ones(16 * 16 * 9).untyped_storage()),
    ]
    with torch.no_grad():
        for change in changes:
            before = model(x)
            change(model)
            calls.clear()
            assert not torch.equal(model(x), before)
            assert calls == list(model.tsc)
            torch.testing.assert_close(model(x), plain(model)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("frozen", (False, True))
def test_copies(name: str, frozen: bool) -> None:
    model = attached(name).eval()
    if frozen:
        tsc.freeze(model)
    out = model(images())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images()), out)
        with torch.no_grad():
            assert torch.equal(twin(images()), out)
            for tensor in (*twin.tsc.parameters(), *twin.tsc.buffers()):
                tensor.add_(1)
        assert not torch.equal(twin(images()), out) and torch.equal(model(images()), out)
        tsc.fold(twin)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    fresh = attached(name, *(["fixed"] if frozen else []), seed=1).eval()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(images()), out)


@pytest.mark.parametrize("name", ("basic", "squeeze_excite", "densenet", "cliquenet"))
def test_compiled_in_one_graph(name: str) -> None:
    model = attached(name)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    expected, ours = seen(model, images()), seen(compiled, images())
    for key, value in expected.items():
        torch.testing.assert_close(ours[key if key in ours else f"_orig_mod.{key}"], value, rtol=1e-3, atol=1e-4)


def test_autocast() -> None:
    """Step sizes stay float32, and so does what is added to them; activations are what they are in a stock network."""
    for name in ("basic", "squeeze_excite", "densenet"):
        model, twin = attached(name), plain(attached(name))
        heard: list[torch.dtype] = []
        for controller in model.tsc:
            controller.register_forward_hook(lambda *args, heard=heard: heard.append(args[2].dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, expected = model(images()), twin(images())
        assert set(heard) == {torch.float32}
        out.float().sum().backward()
        assert relative(out.float(), expected.float()) < 0.1
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.tsc.parameters())


def test_hooks_and_other_layers() -> None:
    """Hooks run, also on blocks; what is no plain BatchNorm or ReLU is called as it is."""
    model = attached("basic")
    expected = model.eval()(images())
    heard: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: heard.add(name))
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
    assert heard >= {name for name, _ in model.named_modules() if name.startswith("layer")}

    torch.manual_seed(0)
    blocks = [Basic(8, relu=nn.SiLU()) for _ in range(2)]
    for block in blocks:
        block.bn2 = nn.GroupNorm(2, 8)  # type: ignore[assignment]
    net = nn.Sequential(*blocks)
    twin = copy.deepcopy(net)
    tsc.attach(net, "fixed", value=0.25)
    x = torch.randn(2, 8, 6, 6)
    expected = F.silu(x + 0.25 * twin[0].f(x))
    expected = F.silu(expected + 0.25 * twin[1].f(expected))
    torch.testing.assert_close(net(x), expected)
    with pytest.raises(ValueError, match=r"model: \.?0\.bn2 is GroupNorm, into which no step size goes"):
        tsc.fold(net)
    torch.testing.assert_close(net(x), expected)


def test_what_is_no_such_block_is_left_alone() -> None:
    class Other(Basic):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.5

    class Broken(Basic):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError

    alike = (lookalikes.Cut, lookalikes.Dropping, lookalikes.Counting)
    others = [Other(8), Broken(8), *(block(8, 8) for block in alike)]
    model = ResNet([Basic(8), *others], [Basic(16, stride=2)])
    tsc.attach(model)
    assert [b.name for b in tsc.steps(model).blocks] == ["layer1.0", "layer2.0"]
    assert [type(m) for m in model.layer1] == [SteppedBlock, *map(type, others)]  # type: ignore[union-attr, arg-type]
    block = Basic(8)
    shared = nn.Sequential(block, Basic(8), block)
    tsc.attach(shared)
    assert [b.name for b in tsc.steps(shared).blocks] == ["1"] and type(block) is Basic


def test_blocks_that_take_a_step_keep_their_class() -> None:
    class Own(Basic):
        def forward(self, x: Tensor, step: Tensor | None = None) -> Tensor:
            assert step is not None
            return torch.relu(x + step[:, None, None] * self.f(x))

    torch.manual_seed(0)
    net = nn.Sequential(Own(8), Own(8))
    twin = nn.Sequential(Basic(8), Basic(8))
    twin.load_state_dict(net.state_dict())
    torch.manual_seed(1)
    tsc.attach(net)
    torch.manual_seed(1)
    tsc.attach(twin)
    assert type(net[0]) is Own and type(net) is SteppedSequential
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(net(x), twin(x))
    tsc.fold(net)
    assert type(net) is nn.Sequential


def test_errors_change_nothing() -> None:
    model = made("basic")
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    ddp = type("Fake", (nn.parallel.DistributedDataParallel,), {"__init__": nn.Module.__init__})()
    taken = made("basic")
    taken.tsc = nn.Identity()
    attach = tsc.attach
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: attach(3), TypeError, r"model: expected an nn\.Module, got int"),  # type: ignore[arg-type]
        (lambda: attach(model, 3), TypeError, "controller: expected a str, got int"),  # type: ignore[arg-type]
        (
            lambda: attach(model, "gru"),
            ValueError,
            "controller: 'gru' is not one; expected one of lstm, 2fc, indp, fixed",
        ),
        (lambda: attach(model, reduction=0), ValueError, "reduction: expected at least 1, got 0"),
        (lambda: attach(model, reduction=2.0), TypeError, "reduction: expected an int"),  # type: ignore[arg-type]
        (lambda: attach(model, "indp", 2), ValueError, "reduction: indp has none"),
        (lambda: attach(model, preserve=1), TypeError, "preserve: expected a bool"),  # type: ignore[arg-type]
        (lambda: attach(model, value=0.1), ValueError, "value: lstm finds its step sizes itself"),
        (lambda: attach(model, "fixed", value="1"), TypeError, "value: expected a number"),  # type: ignore[arg-type]
        (lambda: attach(model, "fixed", value=float("nan")), ValueError, "value: expected a finite number .* got nan"),
        (lambda: attach(model, "fixed", value=1e39), ValueError, "value: expected a finite number .* got 1e[+]39"),
        (lambda: attach(model, "fixed", value=10**400), ValueError, "value: expected a finite number .* got 1000"),
        (lambda: attach(model, "fixed", preserve=True, value=0), ValueError, "nothing can be preserved"),
        (lambda: attach(nn.Linear(2, 2)), ValueError, "model: Linear has no residual blocks; expected BasicBlock or"),
        (lambda: attach(ddp), ValueError, "model: attach to the module, then wrap it again; got Fake"),
        (lambda: attach(rkfast.nn.DenseBlock(2, 4, 4)), ValueError, "model: a DenseBlock has no place for controllers"),
        (lambda: attach(taken), ValueError, "model: it has an attribute tsc already"),
        *((lambda f=f: f(model), ValueError, "model: no step sizes are attached to it") for f in ACTIONS),
        *((lambda f=f: f(3), TypeError, r"model: expected an nn\.Module") for f in ACTIONS),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    assert [type(m) for m in model.modules()] == kinds
    assert all(map(torch.equal, model.state_dict().values(), before.values()))

    tsc.attach(model)
    with pytest.raises(ValueError, match="model: step sizes are attached already"):
        tsc.attach(model)
    for action in ACTIONS:
        with pytest.raises(ValueError, match="model: it is a part of the network whose controllers it uses"):
            action(model.layer1)
    with pytest.raises(RuntimeError, match="this block has a step size, which its container gives it"):
        model.layer1[0](torch.randn(1, 8, 4, 4))
    tsc.detach(model)
    gated = made("squeeze_excite")
    tsc.attach(gated, "indp")
    gated.tsc[0].steps.data[0, 3] = 0
    before = copy.deepcopy(gated.state_dict())
    with pytest.raises(
        ValueError, match=r"model: layer1\.0\.se: its first layer is divided by the step sizes, of which"
    ):
        tsc.fold(gated)
    assert all(map(torch.equal, gated.state_dict().values(), before.values()))
    gated = made("squeeze_excite")
    gated.layer2[0].se.fc1.register_forward_pre_hook(lambda _, args: args[0] ** 2)
    before = copy.deepcopy(gated.state_dict())
    for action in (lambda m: tsc.attach(m, preserve=True), lambda m: (tsc.attach(m), tsc.fold(m))):
        with pytest.raises(ValueError, match=r"model: layer2\.0\.se is SqueezeExcite, into which no step size goes"):
            action(gated)
        stock = {key: value for key, value in gated.state_dict().items() if not key.startswith("tsc.")}
        assert all(map(torch.equal, stock.values(), before.values()))


ACTIONS = (tsc.detach, tsc.freeze, tsc.fold, tsc.steps, lambda model: tsc.accumulate(model).__enter__())


def test_part_of_a_larger_network() -> None:
    """Attached to a backbone, seen from outside."""
    net = nn.Sequential(made("basic"), nn.Linear(10, 2))
    tsc.attach(net[0])
    assert tsc.steps(net).blocks[0].name == "0.layer1.0"
    tsc.freeze(net)
    tsc.fold(net)
    assert not hasattr(net[0], "tsc")


@pytest.mark.parametrize(
    ("name", "added"),
    (
        ("torchvision.resnet18", 1_830_000),
        ("torchvision.resnet50", 2_269_280),
        ("torchvision.wide_resnet50_2", 2_443_360),
        # conv1 has C / 2 channels: 27.47 million parameters in place of the 27.30 that Table 3 prints.
        ("torchvision.resnext50_32x4d", 2_443_360),
        ("timm.resnet18", 1_830_000),
        ("timm.resnet50d", 2_269_280),
        ("timm.seresnet50", 2_269_280),
        ("timm.resnext50_32x4d", 2_443_360),
        ("timm.wide_resnet50_2", 2_443_360),
    ),
)
def test_torchvision_and_timm(name: str, added: int) -> None:
    torch.manual_seed(0)
    model = network(name, **({"zero_init_last": False} if name.startswith("timm") else {})).eval()
    stock = copy.deepcopy(model)
    x = torch.randn(2, 3, 64, 64)
    assert sum(p.numel() for p in tsc.attach(model, preserve=True)) == added
    assert relative(model(x), stock(x)) < 1e-5
    out = two_steps(model, x, 0.01)
    tsc.fold(tsc.freeze(model))
    stock.load_state_dict(model.state_dict())
    assert relative(stock(x), out) < 1e-5


@pytest.mark.parametrize(
    ("name", "stock", "own"),
    (
        ("tsc_resnet18", "torchvision.resnet18", {}),
        ("tsc_resnet34", "torchvision.resnet34", {}),
        ("tsc_resnet50", "torchvision.resnet50", {}),
        ("tsc_resnext50_32x4d", "torchvision.resnext50_32x4d", {}),
        ("tsc_seresnet50", "timm.seresnet50", {}),
        ("tsc_resnet-20", "", {}),
        ("tsc_resnet-20", "", {"shortcut": "a"}),
        ("tsc_densenet-40", "", {}),
        ("tsc_cliquenet", "", {"growth_rate": 36}),
    ),
)
def test_our_models_into_stock_ones(name: str, stock: str, own: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = rkfast.create_model(name, **own, **({"stride_in_1x1": False} if "50" in name else {}))
    x = torch.randn(2, 3, 32, 32)
    out = two_steps(model, x, 1e-4)  # with 1e-3, stock or fused, two seeds of ten make a step size of the gated one 0
    tsc.fold(tsc.freeze(model))
    bare = {"tsc_cliquenet": "cliquenet-12"}.get(name, name.removeprefix("tsc_"))
    plain = network(stock) if stock else rkfast.create_model(bare, fused=False, **own)
    plain.eval().load_state_dict(model.state_dict())
    assert relative(plain(x), out) < 1e-5


def test_strides_of_the_paper() -> None:
    with torch.device("meta"):
        for name in ("tsc_resnet50", "tsc_resnext50_32x4d", "tsc_seresnet50"):
            for wanted, options in ((2, {}), (1, {"stride_in_1x1": False})):
                block: Any = dict(rkfast.create_model(name, **options).named_modules())["layer2.0"]
                assert (block.conv1.stride, block.conv2.stride) == ((wanted,) * 2, (3 - wanted,) * 2)


def test_a_part_of_a_stage() -> None:
    model = made("basic")
    tsc.attach(model)
    blocks = list(model.layer1.children())  # type: ignore[union-attr]
    part = model.layer1[:1]  # type: ignore[index]
    assert type(part) is nn.Sequential and list(part) == blocks[:1]
    assert model.layer1[-1] is blocks[-1]  # type: ignore[index]


def test_frozen_within_inference_mode() -> None:
    model = made("basic")
    tsc.attach(model)
    with torch.inference_mode():
        tsc.freeze(model)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert not any(t.is_inference() for t in model.buffers())


def test_rounding_of_a_wide_gate_is_no_other_gate() -> None:
    """Its sums cancel, so that the inverse of a step size, rounded, may change a gate by more than its own rounding."""
    for seed in range(5):
        torch.manual_seed(seed)
        gate, factor = SqueezeExcite(1024), torch.rand(1024) + 0.01
        weight, inverse = tsc.stepped._squeezed(gate, factor, "se")
        assert weight is gate.fc1.weight
        torch.testing.assert_close(inverse.flatten(), 1 / factor)


def test_weights_into_which_no_step_size_goes() -> None:
    shared = made("basic")
    shared.layer1[1].bn2.weight = shared.layer1[0].bn2.weight  # type: ignore[index,union-attr]
    pruned = made("basic")
    prune.l1_unstructured(pruned.layer1[1].bn2, "weight", 0.5)  # type: ignore[index,union-attr]
    for model, message in ((shared, "share weights"), (pruned, r"layer1\.1\.bn2 is made from other parameters")):
        state = {key: t.clone() for key, t in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            tsc.attach(model, preserve=True)
        assert not hasattr(model, "tsc")
        tsc.attach(model, "fixed", value=0.5)
        with pytest.raises(ValueError, match=message):
            tsc.fold(model)
        tsc.detach(model)
        assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
