"""rkfast.fuse: what is swapped, that it computes the same, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rkfast
from rkfast import dispatch, native
from rkfast.swap.kind import Kind
from tests.models.tester import difference, seen, settled
from tests.swap import lookalikes
from tests.swap.lookalikes import (
    BasicBlock,
    Block,
    DenseNet,
    EfficientBlock,
    EfficientLayer,
    FrozenBatchNorm2d,
    MonaiBlock,
    ResNet,
    Transition,
)

built = pytest.mark.skipif(native.cpu_reason() is not None, reason="the C++ kernels are not built")

NETS: dict[str, Callable[[], nn.Module]] = {
    "densenet": DenseNet,
    "monai": lambda: DenseNet(MonaiBlock),
    "efficient": lambda: DenseNet(EfficientBlock),
    "resnet": ResNet,
    "frozen": lambda: ResNet(norm=FrozenBatchNorm2d),
    "own": lambda: rkfast.create_model("densenet-10", fused=False, num_classes=5),
}


def made(name: str, seed: int = 0) -> nn.Module:
    return settled(NETS[name], seed)


def fused_kinds(model: nn.Module) -> Counter[str]:
    return Counter(module.title for module in model.modules() if isinstance(module, Kind))


@built
def test_contiguous_images_are_evaluated_by_stock_blocks() -> None:
    """A fused block is no faster there on a CPU, where it has nothing but its joins."""
    block = rkfast.fuse(made("resnet")).layer1[0].eval()  # type: ignore[index,union-attr]
    x = torch.randn(2, 8, 10, 10)

    def calls(x: Tensor) -> int:
        before = dispatch.served()
        block(x)
        return (dispatch.served() - before).total()

    assert calls(x)
    with torch.no_grad():
        assert not calls(x) and calls(x.contiguous(memory_format=torch.channels_last))
        with rkfast.use("cpu"):
            assert calls(x)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(
    ("memory", "layout"),
    (("speed", torch.contiguous_format), ("speed", torch.channels_last), ("min", torch.channels_last)),
)
def test_computes_the_same(name: str, memory: str, layout: torch.memory_format) -> None:
    """Outputs, gradients and statistics, in training and evaluation; what is wrong is wrong in most draws."""
    failures: Counter[str] = Counter()
    for seed in range(3):
        for training in (True, False):
            stock = made(name, seed).train(training).to(memory_format=layout)  # type: ignore[call-overload]
            fused = rkfast.fuse(copy.deepcopy(stock), memory=memory)
            for layer in stock.modules():
                if isinstance(layer, EfficientLayer):
                    layer.efficient = False  # what it computes again moves the running statistics again
            truth = copy.deepcopy(stock).double()
            x = torch.randn(4, 3, 10, 10).contiguous(memory_format=layout)
            ours, eager, expected = (seen(model, x.clone()) for model in (fused, stock, truth))
            assert ours.keys() == eager.keys()
            for kind in ("out", "x.grad", "parameters", "running_mean", "running_var"):
                if any(key.endswith(kind) for key in expected) and difference(ours, eager, expected, kind) is not None:
                    failures[f"{kind}, {training=}"] += 1
    assert not [key for key, count in failures.items() if count > 1], failures


DENSE = {"dense block": 2, "transition": 1, "sequence": 1}
SERVED_DENSE = {"dense_block": 2, "bn_relu_pool": 1, "bn_rk_sum": 2}


@built
@pytest.mark.parametrize(
    ("name", "kinds", "served"),
    (
        ("densenet", DENSE, SERVED_DENSE),
        ("monai", DENSE, SERVED_DENSE),
        ("efficient", DENSE, SERVED_DENSE),
        ("resnet", {"residual block": 4, "sequence": 1}, {"bn_rk_sum": 10}),
        ("frozen", {"residual block": 4, "sequence": 1}, {"bn_rk_sum": 10}),
    ),
)
def test_is_served(name: str, kinds: dict[str, int], served: dict[str, int]) -> None:
    model = rkfast.fuse(made(name))
    assert fused_kinds(model) == kinds
    before = dispatch.served()
    model(torch.randn(2, 3, 10, 10))
    found = dispatch.served() - before
    assert {op: n for (op, backend), n in found.items() if op in served and backend == "cpu"} == served


@pytest.mark.parametrize("name", NETS)
def test_nothing_else_changes(name: str) -> None:
    model = made(name)
    types = [type(module) for module in model.modules()]
    keys, parameters = list(model.state_dict()), list(model.parameters())
    attributes = [set(module.__dict__) for module in model.modules()]
    assert rkfast.fuse(model) is model
    assert [type(module) for module in model.modules()] != types or name == "own"
    assert all(isinstance(module, kind) for module, kind in zip(model.modules(), types, strict=True))
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert rkfast.unfuse(model) is model
    assert [type(module) for module in model.modules()] == types
    assert [set(module.__dict__) for module in model.modules()] == attributes


@pytest.mark.parametrize("name", ("densenet", "resnet"))
def test_copies(name: str) -> None:
    model = rkfast.fuse(made(name), memory="min").eval()
    x = torch.randn(2, 3, 10, 10)
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
        assert {m._rkfast.memory for m in twin.modules() if isinstance(m, Kind)} == {"min"}
        assert torch.equal(twin(x), expected)
        assert not fused_kinds(rkfast.unfuse(twin))
    assert fused_kinds(model)


@pytest.mark.parametrize("name", ("densenet", "resnet"))
def test_an_optimizer_made_before_trains(name: str) -> None:
    def trained(fuse_after: int | None) -> tuple[nn.Module, list[float]]:
        model = made(name)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        losses = []
        for step in range(6):
            if step == fuse_after:
                rkfast.fuse(model)
            torch.manual_seed(step)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(torch.randn(8, 3, 10, 10)), torch.arange(8) % 5)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return model, losses

    fused, ours = trained(2)
    stock, theirs = trained(None)
    assert fused_kinds(fused)
    assert ours == pytest.approx(theirs, rel=2e-3)
    stock.load_state_dict(fused.state_dict())
    fused.load_state_dict(stock.state_dict())
    x = torch.randn(2, 3, 10, 10)
    torch.testing.assert_close(fused.eval()(x), stock.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", (lookalikes.Reversed, lookalikes.Halved, lookalikes.Moody))
def test_a_dense_look_alike_is_left_alone(block: type[nn.Module]) -> None:
    model = DenseNet(block)
    rkfast.fuse(model)
    assert fused_kinds(model)["dense block"] == 0
    rows = {row.name: row for row in rkfast.report(model)}
    assert rows["features.denseblock1"].reason == f"{block.__name__}.forward computes something else"


@pytest.mark.parametrize(
    ("block", "reason"),
    (
        (lookalikes.Scaled, "Scaled.forward computes something else"),
        (lookalikes.Extended, "Extended.forward takes more than one input"),
    ),
)
def test_a_residual_look_alike_is_left_alone(block: type[nn.Module], reason: str) -> None:
    model = ResNet(block)
    rkfast.fuse(model)
    assert fused_kinds(model) == {"sequence": 1}
    assert reason in str(rkfast.report(model))


def test_filter_and_strict() -> None:
    model = made("densenet")
    rkfast.fuse(model, filter_fn=lambda module, name: name.endswith("block1"))
    assert fused_kinds(model) == {"dense block": 1}
    model.features.denseblock2.denselayer2.relu1 = nn.SiLU()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"strict: .*features.denseblock2: denselayer2: relu1 is SiLU, not nn.ReLU"):
        rkfast.fuse(model, strict=True)
    assert fused_kinds(model) == {"dense block": 1}
    rkfast.fuse(model, strict=True, filter_fn=lambda module, name: not name.endswith("block2"))
    assert fused_kinds(model) == {"dense block": 1, "transition": 1, "sequence": 1}


def test_for_a_while() -> None:
    model = made("densenet")
    rkfast.fuse(model, filter_fn=lambda module, name: name.endswith("block1"))
    with rkfast.fused(model, memory="min") as inside:
        assert inside is model
        assert fused_kinds(model) == {"dense block": 2, "transition": 1, "sequence": 1}
    assert fused_kinds(model) == {"dense block": 1}
    assert model.features.denseblock1._rkfast.memory == "speed"  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError), rkfast.fused(model):
        _ = 1 / 0
    assert fused_kinds(model) == {"dense block": 1}


@pytest.mark.parametrize(
    "path",
    (
        "features.denseblock1.denselayer2", "features.denseblock1.denselayer2.norm1",
        "features.denseblock1.denselayer1.relu2", "features.denseblock1.denselayer3.conv1",
        "features.denseblock1", "features.transition1.norm", "features.transition1.conv", "features.transition1.pool",
        "features.norm0", "features.relu0", "features.pool0", "features.norm5",
    ),
)  # fmt: skip
@pytest.mark.parametrize("when", ("before", "after"))
def test_hooks_are_heard(path: str, when: str) -> None:
    """The same calls with the same values as in the stock network."""
    heard: dict[str, list[Tensor]] = {}
    x = torch.randn(2, 3, 10, 10)
    for kind in ("stock", "fused"):
        model = made("densenet")
        if kind == "fused" and when == "after":
            rkfast.fuse(model)
        model.get_submodule(path).register_forward_hook(
            lambda module, args, out, kind=kind: heard.setdefault(kind, []).append(out.clone())
        )
        if kind == "fused" and when == "before":
            rkfast.fuse(model)
        model(x)
    assert len(heard["fused"]) == len(heard["stock"]) == 1
    torch.testing.assert_close(heard["fused"], heard["stock"])


def test_what_changes_afterwards_is_heard() -> None:
    model = rkfast.fuse(made("densenet")).eval()
    stock = made("densenet").eval()
    x = torch.randn(2, 3, 10, 10)
    for net in (model, stock):
        block: Any = net.features.denseblock1  # type: ignore[union-attr]
        block.denselayer1.relu1 = nn.Tanh()
        block.denselayer2.norm2 = nn.Identity()
        del block["denselayer3"]
        net.features.denseblock1 = nn.Sequential(block, nn.ZeroPad2d((0, 0, 0, 0, 0, 4)))  # type: ignore[union-attr]
    stock.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), stock(x))
    assert "denselayer1: relu1 is Tanh, not nn.ReLU" in str(rkfast.report(model))


def test_frozen_layers_and_dropout() -> None:
    torch.manual_seed(0)
    model = DenseNet(drop_rate=0.5)
    rkfast.fuse(model)
    assert fused_kinds(model)["dense block"] == 0  # in training
    assert "dropout behind the last convolution alone" in str(rkfast.report(model))
    rkfast.fuse(model.eval())
    assert fused_kinds(model)["dense block"] == 2
    x = torch.randn(2, 3, 10, 10)
    outs = []
    for net in (model, rkfast.unfuse(copy.deepcopy(model))):
        torch.manual_seed(1)
        outs.append(net.train()(x))
    torch.testing.assert_close(*outs)


@built
def test_report() -> None:
    model = made("densenet")
    rows = rkfast.report(model)
    assert not any(row.fused for row in rows)
    assert rows.summary() == "0 of 1 sequences, 0 of 6 dense layers, 0 of 1 transitions fused"
    rkfast.fuse(model)
    assert rkfast.report(model).summary() == "1 of 1 sequences, 6 of 6 dense layers, 1 of 1 transitions fused"
    handle = model.features.denseblock1.denselayer2.relu2.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
    text = str(rkfast.report(model))
    assert "3 of 6 dense layers" in text
    assert "stock: denselayer2: a hook on relu2" in text
    handle.remove()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    text = str(rkfast.report(model.double(), torch.randn(1, 3, 10, 10).double()))
    assert "dtype torch.float64: the C++ kernel serves float32 and bfloat16" in text
    assert all(torch.equal(b, buffers[name].to(b.dtype)) for name, b in model.named_buffers())
    assert str(rkfast.report(nn.Linear(2, 2))) == "nothing here looks like a module that rkfast serves"


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        ({"act": nn.ELU}, "denselayer1: layers.relu1 is ELU, not nn.ReLU"),
        ({"conv": nn.Conv3d}, "denselayer1: layers.norm1 is BatchNorm3d, not nn.BatchNorm2d"),
    ),
)
def test_reasons(change: dict[str, Any], reason: str) -> None:
    assert rkfast.report(nn.ModuleList([MonaiBlock(2, 8, 4, **change)]))[0].reason == reason


def test_reasons_of_convolutions_and_modules() -> None:
    cases: list[tuple[Callable[[Any], Any], str]] = [
        (
            lambda b: setattr(b.denselayer1, "conv2", nn.Conv2d(8, 4, 3, padding=1, groups=2, bias=False)),
            "conv2 has 2 g",
        ),
        (lambda b: setattr(b.denselayer1, "conv2", nn.Conv2d(8, 4, 3, padding=2, dilation=2, bias=False)), "dilation="),
        (lambda b: setattr(b.denselayer1, "conv2", nn.Conv2d(8, 4, 3, padding=1)), "conv2 has a bias"),
        (lambda b: setattr(b.denselayer1, "norm1", nn.InstanceNorm2d(8)), "norm1 is InstanceNorm2d"),
        (lambda b: setattr(b, "forward", lambda x: x), "its forward is replaced on the instance"),
    ]
    for change, reason in cases:
        block = Block(2, 8, 4)
        change(block)
        assert reason in str(rkfast.report(nn.ModuleList([block])))
        assert not fused_kinds(rkfast.fuse(nn.ModuleList([block])))
    scripted = nn.ModuleList([torch.jit.script(nn.Sequential(nn.BatchNorm2d(2), nn.ReLU()))])
    assert not fused_kinds(rkfast.fuse(scripted))


def test_compile_and_trace() -> None:
    model = rkfast.fuse(made("densenet")).eval()
    x = torch.randn(2, 3, 10, 10)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)


@pytest.mark.parametrize("name", ("densenet", "resnet"))
def test_torchscript_is_refused_by_name(name: str) -> None:
    model = rkfast.fuse(made(name))
    types = [type(module) for module in model.modules()]
    with pytest.raises(
        RuntimeError, match=r"is fused by rkfast.*call rkfast\.unfuse\(model\) first, or .*rkfast\.export"
    ):
        torch.jit.script(model)
    assert [type(module) for module in model.modules()] == types


class Within(BasicBlock):
    """torchvision's sum, which is in place."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def frozen_stem(inner: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inner, out, 1, bias=False), FrozenBatchNorm2d(out), nn.ReLU())


@pytest.mark.parametrize(
    "block",
    (Within, BasicBlock, partial(BasicBlock, norm=FrozenBatchNorm2d), frozen_stem, partial(Block, 2), Transition),
)
def test_autocast_has_the_dtypes_of_stock(block: Callable[..., nn.Module]) -> None:
    for out in (8, 12):
        stock = nn.Sequential(block(8, out))
        model = rkfast.fuse(copy.deepcopy(stock))
        assert fused_kinds(model)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 8, 6, 6, dtype=dtype)
            with torch.autocast("cpu", torch.bfloat16):
                ours, theirs = model(x), stock(x)
            assert ours.dtype == theirs.dtype, (out, dtype)
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


def test_autocast_and_transforms() -> None:
    model, stock = rkfast.fuse(made("densenet")).eval(), made("densenet").eval()
    x = torch.randn(2, 3, 10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), stock(x), rtol=0.05, atol=0.05)
    ours, theirs = (torch.func.vmap(net)(x[:, None]) for net in (model, stock))
    torch.testing.assert_close(ours, theirs)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(BasicFused(), x[:, :, :3, :3])


class BasicFused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = rkfast.fuse(nn.Sequential(BasicBlock(3, 3))).double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


@pytest.mark.parametrize("block", (lookalikes.Cut, lookalikes.Dropping, lookalikes.Counting))
def test_gradients_dropout_and_statistics_are_compared(block: type[nn.Module]) -> None:
    assert not fused_kinds(rkfast.fuse(nn.Sequential(block(4, 4))))


@pytest.mark.parametrize("name", ("conv1", "bn1", "relu", "conv2", "bn2"))
def test_a_forward_replaced_on_an_instance_is_heard(name: str) -> None:
    x = torch.randn(2, 4, 6, 6)
    for when in ("before", "after"):
        model = nn.Sequential(BasicBlock(4, 4)).eval()
        if when == "after":
            rkfast.fuse(model)
        layer = getattr(model[0], name)
        layer.forward = lambda y, layer=layer: 2 * type(layer).forward(layer, y)
        stock = rkfast.unfuse(copy.deepcopy(model))(x)
        torch.testing.assert_close(rkfast.fuse(model)(x), stock)
    layer = Block(2, 8, 4)
    layer.denselayer1.conv1.forward = lambda y: y
    rkfast.fuse(layer)
    assert fused_kinds(rkfast.fuse(Block(2, 8, 4))) == {"dense block": 1}


def test_another_layer_with_the_same_children_is_heard() -> None:
    class Thrice(lookalikes.Layer):
        def forward(self, features: list[Tensor]) -> Tensor:
            return 3 * super().forward(features)

    model = rkfast.fuse(made("densenet")).eval()
    block: Any = model.features.denseblock1  # type: ignore[union-attr]
    block["denselayer2"] = Thrice(12, 4)
    x = torch.randn(2, 3, 10, 10)
    assert "its layers have been replaced" in str(rkfast.report(model))
    torch.testing.assert_close(model(x), rkfast.unfuse(copy.deepcopy(model))(x))


@pytest.mark.parametrize("name", ("resnet", "densenet"))
def test_backward_twice_with_least_memory(name: str) -> None:
    model, stock = rkfast.fuse(made(name), memory="min"), made(name)
    x = torch.randn(4, 3, 10, 10)
    for net in (model, stock):
        loss = net(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
    assert all(
        (p.grad - q.grad).norm() <= 0.02 * q.grad.norm() + 1e-6
        for p, q in zip(model.parameters(), stock.parameters(), strict=True)
    )
    for a, b in zip(model.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_what_is_computed_again_finds_what_it_found() -> None:
    x = torch.randn(4, 3, 10, 10)
    changes: list[Callable[[nn.Module], Any]] = [
        lambda m: m.eval(),
        lambda m: m.layer1[0].bn2.weight.detach().mul_(2),  # type: ignore[index,union-attr]
        lambda m: setattr(m.layer1[0], "conv2", nn.Conv2d(8, 8, 3, padding=1, bias=False)),  # type: ignore[index,union-attr]
    ]
    for change in changes:
        model = rkfast.fuse(made("resnet"), memory="min")
        loss = model(x).square().mean()
        change(model)
        with pytest.raises(RuntimeError, match="since the forward"):
            loss.backward()


def test_a_slice_of_a_sequence() -> None:
    model = rkfast.fuse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))).eval()
    x = torch.randn(2, 3, 5, 5)
    part = model[:3]  # type: ignore[index]
    torch.testing.assert_close(part(x), rkfast.unfuse(part)(x))
    assert type(part) is nn.Sequential


def test_a_part_that_leaves_meanwhile() -> None:
    model = made("resnet")
    with rkfast.fused(model):
        part = model.layer1
        model.layer1 = nn.Identity()
    assert not fused_kinds(part)  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    model = made("densenet")
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (None, {}, TypeError, r"model: expected an nn\.Module, got NoneType"),
        (model, {"memory": "max"}, ValueError, "memory: expected one of speed, min, got 'max'"),
        (model, {"filter_fn": "block"}, TypeError, "filter_fn: expected a function of a module and its name, got str"),
    ]
    for given, options, error, message in cases:
        with pytest.raises(error, match=message):
            rkfast.fuse(given, **options)
    for function in (rkfast.unfuse, rkfast.report):
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module"):
            function(3)  # type: ignore[arg-type]
    assert not fused_kinds(model)
