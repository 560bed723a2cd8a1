"""rkfast.fold: that the copy computes the same, of fewer modules, and that nothing in it can be stale."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import rkfast
from rkfast import dispatch, native
from rkfast.nn import PreActBranch
from rkfast.nn import folded as folded_layers
from rkfast.nn.folded import FoldedBlock, FoldedBranch, FoldedConv
from rkfast.swap.fold import plain
from tests.libraries import network
from tests.ops.tester import assert_as_good_as
from tests.swap.lookalikes import BasicBlock, Block, DenseNet, FrozenBatchNorm2d, MonaiBlock, ResNet, Scaled

built = pytest.mark.skipif(native.cpu_reason() is not None, reason="the C++ kernels are not built")


class Stem(nn.Module):
    """Convolutions whose BatchNorms the forward calls, with a functional ReLU behind one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, 2, 1, groups=4, bias=False)
        self.norm2 = nn.BatchNorm2d(12, affine=False)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Sequential(nn.Conv2d(12, 5, 1, padding="same"), nn.ReLU())

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = self.last(self.drop(self.act(self.norm2(self.conv2(x)))))
        x = x if scale is None else x * scale
        return x.mean((2, 3))


def own(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: rkfast.create_model(name, num_classes=5, **options)


def attached(make: Callable[[], nn.Module], controller: str = "2fc") -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = make()
        rkfast.tsc.attach(model, controller)
        return model

    return made


def restacked() -> nn.Module:
    """Two of its blocks are a step."""
    with pytest.warns(UserWarning, match="left as they are"):
        return rkfast.restack(ResNet(), "midpoint")


# Of each network the BatchNorms and residual blocks that are left.
NETS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "stem": (Stem, 0, 0),
    "resnet": (ResNet, 0, 4),
    "frozen": (lambda: ResNet(norm=FrozenBatchNorm2d), 0, 4),
    "stepped": (attached(ResNet), 0, 4),
    "scaled": (lambda: ResNet(Scaled), 0, 0),
    "restacked": (restacked, 0, 2),
    "restacked ho_resnet-10": (
        lambda: rkfast.restack(own("ho_resnet-10", method="euler", width=8)(), "midpoint"),
        9,
        0,
    ),
    "densenet": (DenseNet, 14, 0),
    "monai": (lambda: DenseNet(MonaiBlock), 14, 0),
    "densenet-10": (own("densenet-10"), 9, 0),
    "densenet-10-bc, stock": (own("densenet-10-bc", fused=False), 9, 0),
    "tsc_densenet-10": (own("tsc_densenet-10"), 9, 0),
    "resnet-8": (own("resnet-8"), 0, 3),
    "resnet-8-a": (own("resnet-8", shortcut="a"), 0, 3),
    "tsc_resnet-8": (own("tsc_resnet-8"), 0, 3),
    "ho_resnet-10": (own("ho_resnet-10", width=8), 9, 0),
    "erknet": (own("erknet-1x1_1x1", growth_rate=6, stem="imagenet"), 4, 0),
    "irknet": (own("irknet-2x1_2x1-ab", growth_rate=6), 19, 0),
}


def made(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return settled(NETS[name][0]())


def settled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                for parameter in (module.weight, module.bias):
                    if parameter is not None:
                        parameter.uniform_(-0.3, 1.5)
                module.running_mean.normal_(0, 0.3)  # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return model.eval()


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, (_BatchNorm, FrozenBatchNorm2d)) for module in model.modules())


def kinds(model: nn.Module, kind: type[nn.Module]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def check(ours: nn.Module, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        eager = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))  # type: ignore[call-overload]
        assert_as_good_as(ours(x), eager, truth, "out")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_computes_the_same(name: str, layout: torch.memory_format) -> None:
    model = made(name)
    x = torch.randn(4, 3, 12, 10).contiguous(memory_format=layout)
    folded = rkfast.fold(model)
    assert (norms(folded), len(kinds(folded, FoldedBlock))) == NETS[name][1:]
    assert not kinds(folded, nn.modules.dropout._DropoutNd)
    check(folded, copy.deepcopy(model), x)
    # Weights are laid out for the first size.
    check(folded, copy.deepcopy(model), torch.randn(1, 3, 17, 9))
    check(plain(model), copy.deepcopy(model), x)
    check(rkfast.fold(rkfast.fuse(copy.deepcopy(model))), copy.deepcopy(model), x)
    check(rkfast.fold(folded), copy.deepcopy(model), x)
    check(plain(folded), copy.deepcopy(model), x)


@pytest.mark.parametrize("name", ("stem", "resnet", "densenet", "resnet-8"))
def test_float64_is_exact(name: str) -> None:
    model = made(name).double()
    x = torch.randn(2, 3, 12, 10, dtype=torch.double)
    torch.testing.assert_close(rkfast.fold(model)(x), model(x), rtol=1e-10, atol=1e-10)


@built
def test_is_served() -> None:
    def calls(x: Tensor) -> dict[str, int]:
        with torch.no_grad(), torch.profiler.profile() as profile:
            folded(x)
        found = {event.key: event.count for event in profile.key_averages()}
        return {key: n for key, n in found.items() if "conv" in key or "norm" in key or "relu" in key}

    folded = rkfast.fold(made("resnet"))
    assert calls(torch.randn(2, 3, 12, 10)) == {
        "mkldnn::_reorder_convolution_weight": 3,
        "mkldnn::_convolution_pointwise": 3,
        "rkfast::conv": 7,
    }
    small = calls(torch.randn(2, 3, 5, 6))  # behind the stride less than a tile
    assert small["mkldnn::_convolution_pointwise_"] == 2  # into what a projection or the block before made
    folded = rkfast.fold(made("densenet"))
    before = dispatch.served()
    with torch.no_grad():
        folded(torch.randn(2, 3, 12, 10))
    assert (dispatch.served() - before)["dense_block", "cpu"] == 2


@pytest.mark.parametrize("name", NETS)
def test_the_model_stays(name: str) -> None:
    model = made(name).train()
    state = copy.deepcopy(model.state_dict())
    types = [type(module) for module in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    folded = rkfast.fold(model)
    assert not folded.training and not any(p.requires_grad for p in folded.parameters())
    x = torch.randn(2, 3, 12, 10)
    expected = folded(x)
    assert [type(module) for module in model.modules()] == types
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.5) if tensor.is_floating_point() else tensor.add_(1)
    assert torch.equal(folded(x), expected)


def test_nothing_is_stale() -> None:
    """Of what a call reads nothing outlives a change, by whatever way it comes."""
    x = torch.randn(2, 3, 12, 10)
    for name in ("resnet", "densenet", "stem"):
        first, second = rkfast.fold(made(name, 0)), rkfast.fold(made(name, 1))
        expected = second(x)
        assert not torch.equal(first(x), expected)
        first.load_state_dict(second.state_dict())
        assert torch.equal(first(x), expected)
        for _, tensor in (*first.named_parameters(), *first.named_buffers()):
            tensor.data.mul_(0.5) if tensor.is_floating_point() else None  # which no version counter tells
        changed = first(x)
        assert not torch.equal(changed, expected)
        assert torch.equal(copy.deepcopy(first)(x), changed)
    conv = kinds(first, FoldedConv)[0]
    before = conv.weight
    conv.weight.mul_(2)  # a copy
    assert torch.equal(conv.weight, before)
    broken = second.state_dict()
    del broken["conv2.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*conv2\.weight"):
        first.load_state_dict(broken)
    with pytest.raises(RuntimeError, match=r"size mismatch for conv2\.weight"):
        first.load_state_dict(broken | {"conv2.weight": torch.ones(2, 2)})


@pytest.mark.parametrize("name", ("resnet", "densenet", "tsc_resnet-8"))
def test_copies(name: str) -> None:
    folded, x = rkfast.fold(made(name)), torch.randn(2, 3, 12, 10)
    for _ in range(2):  # before and after weights are packed
        file = io.BytesIO()
        torch.save(folded, file)
        file.seek(0)
        twins = (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), torch.load(file, weights_only=False))
        expected = folded(x)
        for twin in twins:
            assert torch.equal(twin(x), expected)
    wide = folded.double()
    assert wide(x.double()).dtype == torch.double
    torch.testing.assert_close(wide.float()(x), expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_branches_of_a_gpu(dtype: torch.dtype) -> None:
    """Their second BatchNorm is folded; those with a hook inside, and those of a CPU, stay as they are."""
    branch = settled(PreActBranch(6)).to(dtype)
    ours, x = FoldedBranch(copy.deepcopy(branch)), torch.randn(4, 6, 9, 7, dtype=dtype)
    assert type(ours.conv1) is FoldedConv and ours.conv1.relu and norms(ours) == 1
    check(ours, branch, x)
    check(plain(ours), branch, x)
    model = rkfast.create_model("ho_resnet-10", method="midpoint", width=8)
    assert len(kinds(rkfast.fold(model), PreActBranch)) == 4
    model.period[0].branches[0].conv2.register_forward_hook(lambda *_: None)  # type: ignore[index, union-attr]
    folded = rkfast.fold(model.to("meta"))
    assert (len(kinds(folded, PreActBranch)), len(kinds(folded, FoldedBranch))) == (1, 3)
    assert folded(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 10)


def test_of_convolutions() -> None:
    """What oneDNN is not asked for: gradients, autocast, torch.func, other dtypes, an empty tensor, compilers."""
    torch.manual_seed(0)
    conv = FoldedConv(nn.Conv2d(6, 8, 3, 2, 1, groups=2), relu=True)
    stock = conv.plain()
    x, other = torch.randn(2, 6, 9, 8), torch.randn(2, 8, 5, 4)
    for _ in range(2):
        assert isinstance(conv._weight, Tensor)
        torch.testing.assert_close(conv(x), stock(x))
        torch.testing.assert_close(conv.added(x, other), F.relu(stock[0](x) + other))  # type: ignore[index]
        given = other.clone(memory_format=torch.channels_last)
        with torch.no_grad():
            out = conv.added(x, given, into=True)
        assert out.data_ptr() == given.data_ptr()
        mine, theirs = (torch.autograd.grad(net(x.requires_grad_()).sum(), x)[0] for net in (conv, stock))
        torch.testing.assert_close(mine, theirs)
        x = x.detach()
        assert conv(x[:0]).shape == (0, 8, 5, 4)
        with torch.autocast("cpu", torch.bfloat16):
            assert conv(x).dtype == torch.bfloat16
        torch.testing.assert_close(torch.func.vmap(conv)(x[:, None]), stock(x)[:, None])
        with torch.inference_mode():
            torch.testing.assert_close(conv(x), stock(x))
        assert torch.compile(conv, backend="eager")(x).shape == (2, 8, 5, 4)
    torch.testing.assert_close(copy.deepcopy(conv).bfloat16()(x.bfloat16()).float(), stock(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_weight_is_packed_for_the_shape_at_hand(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN wants it otherwise for other images. A shape that comes once, as an epoch's last batch, moves nothing."""
    conv = FoldedConv(nn.Conv2d(40, 96, 1).to(dtype), relu=True)
    large, small = (torch.randn(n, 40, size, size, dtype=dtype) for n, size in ((4, 14), (1, 7)))
    if not conv._served(large):
        pytest.skip(f"oneDNN does not serve {dtype} here")
    given, stock = conv.weight, conv.plain()
    packed: list[int] = []
    ops = folded_layers._ops()
    reorder = ops.reorder
    monkeypatch.setattr(ops, "reorder", lambda *args: packed.append(args[-1][0]) or reorder(*args))
    for x, n in (
        (large, 1),
        (large, 1),
        (small, 1),
        (large, 1),
        (small, 1),
        (small, 2),
        (small, 2),
        (large, 2),
        (large, 3),
    ):
        torch.testing.assert_close(conv(x), stock(x))
        assert len(packed) == n
        assert torch.equal(conv.weight, given)
    assert packed == [4, 1, 4]
    assert torch.equal(pickle.loads(pickle.dumps(conv))(small), conv(small))


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    x, model = torch.randn(2, 3, 12, 10), made("resnet")
    folded = rkfast.fold(model)
    folded(x)
    monkeypatch.setattr(folded_layers, "_ops", lambda: None)
    torch.testing.assert_close(folded(x), model(x))


class Odd(nn.Module):
    """Nothing here may be folded: a convolution used twice, one whose result is read twice, statistics of the batch, a
    hook, a weight that is read beside, and a forward that depends on numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(6))
        self.norm = nn.ModuleList(nn.BatchNorm2d(3, track_running_stats=i != 2) for i in range(5))
        self.norm[3].register_forward_hook(lambda _, __, out: out + 1)
        self.moody = Moody()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm[0](self.conv[0](x)) + self.conv[0](x)
        y = self.conv[1](x)
        x = self.norm[1](y) + y
        x = self.norm[3](self.conv[3](self.norm[2](self.conv[2](x))))
        x = self.norm[4](self.conv[4](x)) + self.conv[4].weight.mean()
        return self.moody(x)


class Moody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) if x.sum() > 0 else y


def test_unknown_is_left_alone() -> None:
    torch.manual_seed(0)
    model = settled_odd()
    folded, x = rkfast.fold(model), torch.randn(2, 3, 6, 6)
    assert norms(folded) == 6 and not kinds(folded, FoldedConv)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(folded(-x), model(-x), rtol=0, atol=0)


def settled_odd() -> nn.Module:
    model = Odd()
    for norm in model.norm:
        norm.track_running_stats or setattr(norm, "running_mean", None)  # type: ignore[func-returns-value]
    return model.eval()


def test_shared_modules() -> None:
    """A block in two places, and a convolution with two BatchNorms."""
    torch.manual_seed(0)
    block, conv = BasicBlock(4, 4), nn.Conv2d(4, 4, 1)
    model = settled(nn.Sequential(block, block, conv, nn.BatchNorm2d(4), conv, nn.BatchNorm2d(4)))
    folded, x = rkfast.fold(model), torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(folded(x), model(x))
    assert folded[0] is folded[1]  # type: ignore[index]


def test_hooks_are_heard() -> None:
    model = made("resnet")
    heard: list[str] = []
    model.layer1[0].conv1.register_forward_hook(lambda *_: heard.append("conv1"))  # type: ignore[index, union-attr]
    model.layer1[1].register_forward_hook(lambda *_: heard.append("block"))  # type: ignore[index, union-attr]
    folded, x = rkfast.fold(model), torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(folded(x), model(x))
    assert heard == ["conv1", "block"] * 2
    assert norms(folded) == 1


def test_listeners_keep_what_they_heard() -> None:
    """A block writes over its input only where nobody can have it."""
    folded, x = rkfast.fold(made("resnet")), torch.randn(2, 3, 6, 6)
    before, expected = x.clone(), folded(x)
    assert torch.equal(x, before)
    stage = folded.layer1  # type: ignore[union-attr]
    given = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    copied = given.clone()
    stage(given)
    stage[1](given)  # type: ignore[index, operator]
    assert torch.equal(given, copied)
    heard: list[tuple[Tensor, Tensor]] = []

    def hear(_: Any, args: Any, out: Tensor) -> None:
        heard.extend((t, t.clone()) for t in (*args, out))

    for listened in (stage[0], stage[1].inner[0], stage[1]):  # type: ignore[index, union-attr]
        handle = listened.register_forward_hook(hear)  # type: ignore[union-attr]
        assert torch.equal(folded(x), expected)
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(hear)
    assert torch.equal(folded(x), expected)
    handle.remove()
    assert heard and all(torch.equal(kept, then) for kept, then in heard)


def test_wrapped_and_root() -> None:
    model, x = made("resnet"), torch.randn(2, 3, 6, 6)
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        folded = rkfast.fold(wrapped)  # type: ignore[arg-type]
        assert type(folded) is ResNet
        torch.testing.assert_close(folded(x), model(x))
    torch.manual_seed(0)
    for root in (BasicBlock(3, 3), nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), Block(2, 3, 4)):
        settled(root)
        with torch.no_grad():
            torch.testing.assert_close(rkfast.fold(root)(x), root(x))
    with torch.inference_mode():
        folded = rkfast.fold(model)
    torch.testing.assert_close(folded(x), model(x))
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got str"):
        rkfast.fold("resnet")  # type: ignore[arg-type]


def test_step_sizes_that_no_weight_takes() -> None:
    """They are computed this once."""
    torch.manual_seed(0)
    model = ResNet()
    rkfast.tsc.attach(model, "2fc")
    for block in (*model.layer1, *model.layer2):
        block.bn2 = nn.Identity()
    folded, x = rkfast.fold(settled(model)), torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(folded(x), model(x))
    assert not list(folded.tsc.parameters())  # type: ignore[union-attr, operator]


LIBRARIES = {
    "torchvision.resnet18": (0, 8),
    "torchvision.googlenet": (0, 0),
    "torchvision.mobilenet_v2": (0, 0),
    "torchvision.densenet121": (120, 0),
    "timm.resnet26": (0, 8),
    "timm.seresnet50": (0, 16),
    "timm.mobilenetv3_small_050": (0, 0),
}


@pytest.mark.parametrize("address", LIBRARIES)
def test_networks_of_libraries(address: str) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False} if "googlenet" in address else {}
    model = settled(network(address, **options))
    folded = rkfast.fold(model)
    assert (norms(folded), len(kinds(folded, FoldedBlock))) == LIBRARIES[address]
    check(folded, model, torch.randn(2, 3, 64, 64))
