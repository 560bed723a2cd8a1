"""ResNets: torchvision's and timm's keys, parameters and multiplications, training as in stock PyTorch, the options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import rkfast
from rkfast import measure, native
from rkfast.models import ResNet
from rkfast.nn import BasicBlock, Bottleneck
from tests.libraries import network
from tests.models.tester import (
    check_checkpointing,
    check_fused,
    check_interface,
    on_meta,
    parameters,
    seen,
    twins,
)

# layers of each stage, whether with bottlenecks, channels of its 3x3 convolution in units of width, groups, and
# parameters (torchvision's documentation; seresnet: timm's)
IMAGENET: dict[str, tuple[tuple[int, ...], bool, float, int, int]] = {
    "resnet18": ((2, 2, 2, 2), False, 1, 1, 11_689_512),
    "resnet34": ((3, 4, 6, 3), False, 1, 1, 21_797_672),
    "resnet50": ((3, 4, 6, 3), True, 1, 1, 25_557_032),
    "resnet101": ((3, 4, 23, 3), True, 1, 1, 44_549_160),
    "resnet152": ((3, 8, 36, 3), True, 1, 1, 60_192_808),
    "wide_resnet50_2": ((3, 4, 6, 3), True, 2, 1, 68_883_240),
    "wide_resnet101_2": ((3, 4, 23, 3), True, 2, 1, 126_886_696),
    "resnext50_32x4d": ((3, 4, 6, 3), True, 2, 32, 25_028_904),
    "resnext101_32x4d": ((3, 4, 23, 3), True, 2, 32, 44_177_704),
    "resnext101_32x8d": ((3, 4, 23, 3), True, 4, 32, 88_791_336),
    "resnext101_64x4d": ((3, 4, 23, 3), True, 4, 64, 83_455_272),
    "seresnet50": ((3, 4, 6, 3), True, 1, 1, 28_088_024),
    "seresnet101": ((3, 4, 23, 3), True, 1, 1, 49_326_872),
}


def expected_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of torchvision's ResNet, in its order; with a gate of timm's."""
    layers, bottleneck, wider, groups, _ = IMAGENET[name]
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, c: int) -> None:
        shapes.update({f"{name}.{key}": (c,) for key in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    def convolution(block: str, i: int, out: int, read: int, size: int) -> None:
        shapes[f"{block}conv{i}.weight"] = (out, read, size, size)
        norm(f"{block}bn{i}", out)

    convolution("", 1, 64, 3, 7)
    channels = 64
    for t, count in enumerate(layers):
        width = 64 * 2**t
        out = 4 * width if bottleneck else width
        for i in range(count):
            block = f"layer{t + 1}.{i}."
            if bottleneck:
                inner = int(width * wider)
                convolution(block, 1, inner, channels, 1)
                convolution(block, 2, inner, inner // groups, 3)
                convolution(block, 3, out, inner, 1)
            else:
                convolution(block, 1, out, channels, 3)
                convolution(block, 2, out, out, 3)
            if name.startswith("seresnet"):
                shapes |= {f"{block}se.fc1.weight": (out // 16, out, 1, 1), f"{block}se.fc1.bias": (out // 16,)}
                shapes |= {f"{block}se.fc2.weight": (out, out // 16, 1, 1), f"{block}se.fc2.bias": (out,)}
            if i == 0 and channels != out:
                shapes[f"{block}downsample.0.weight"] = (out, channels, 1, 1)
                norm(f"{block}downsample.1", out)
            channels = out
    return shapes | {"fc.weight": (1000, channels), "fc.bias": (1000,)}


@pytest.mark.parametrize("name", IMAGENET)
def test_keys(name: str) -> None:
    ours = {key: tuple(value.shape) for key, value in on_meta(name).state_dict().items()}
    assert list(ours.items()) == list(expected_shapes(name).items())
    assert parameters(name) == IMAGENET[name][-1]


@pytest.mark.parametrize(
    ("depth", "a", "b"),
    (
        (20, 269_722, 272_474),
        (32, 464_154, 466_906),
        (56, 853_018, 855_770),
        (110, 1_727_962, 1_730_714),
        (146, 2_311_258, 2_314_010),
        (290, 4_644_442, 4_647_194),
        (362, 5_811_034, 5_813_786),
        (506, 8_144_218, 8_146_970),
    ),
)
def test_cifar(depth: int, a: int, b: int) -> None:
    assert [parameters(f"resnet-{depth}", shortcut=shortcut) for shortcut in "ab"] == [a, b]


@pytest.mark.parametrize(
    ("name", "first", "torchvision"),
    (
        ("resnet18", None, 1.8141),
        ("resnet34", None, 3.6638),
        ("resnet50", 3.8580, 4.0892),
        ("resnet101", 7.5702, 7.8014),
        ("resnext50_32x4d", 3.7681, 4.2305),
        ("resnext101_32x4d", 7.5076, 7.9700),
        ("seresnet50", 3.8605, 4.0917),
        ("seresnet101", 7.5749, 7.8061),
    ),
)
def test_multiplications(name: str, first: float | None, torchvision: float) -> None:
    """Of one image of 224x224, in billions; first: with the stride where the first ResNet has it (TSC's Table 3)."""
    for expected, options in ((torchvision, {}), (first, {"stride_in_1x1": True})):
        if expected is not None:
            with FlopCounterMode(display=False) as counter:
                on_meta(name, **options)(torch.empty(2, 3, 224, 224, device="meta"))
            assert f"{counter.get_total_flops() / 4e9:.4f}" == f"{expected:.4f}"


def small(block: type[BasicBlock] | type[Bottleneck], fused: bool = True, **options: Any) -> ResNet:
    return ResNet(block, (1, 2), width=16, block_options=options, num_classes=10, fused=fused)


@pytest.mark.parametrize("name", ("resnet18", "resnext50_32x4d"))
def test_torchvision_itself(name: str) -> None:
    """Its state_dict as it is, and its output."""
    torch.manual_seed(0)
    check_as_theirs(network(f"torchvision.{name}", num_classes=10).eval(), name, num_classes=10)


def test_timm_itself() -> None:
    torch.manual_seed(0)
    check_as_theirs(network("timm.seresnet50", num_classes=10).eval(), "seresnet50", num_classes=10)


def check_as_theirs(theirs: nn.Module, name: str, **options: Any) -> None:
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1)
                module.running_mean.normal_(0, 0.3)
    x = torch.randn(2, 3, 64, 64)
    for fused in (True, False):
        ours = rkfast.create_model(name, fused=fused, **options).eval()
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


SMALL: list[tuple[str, dict[str, Any]]] = [
    ("resnet-8", {}),
    ("resnet-14", {"shortcut": "a", "num_classes": 7}),
    ("resnet-8", {"memory": "min"}),
]


@pytest.mark.parametrize(("name", "options"), SMALL)
def test_fused_equals_stock(name: str, options: dict[str, Any]) -> None:
    check_fused(name, **options)


@pytest.mark.parametrize(("name", "options"), [*SMALL, ("resnet18", {"num_classes": 10})])
def test_interface(name: str, options: dict[str, Any]) -> None:
    check_interface(name, **options)


def test_stem_of_imagenet() -> None:
    """Its BatchNorm, its ReLU and its pool, and where the stages halve the resolution."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    for fused in (True, False):
        model = small(Bottleneck, fused)
        y = model.maxpool(torch.relu(model.bn1(model.conv1(x))))
        expected = model.layer2(model.layer1(y))
        torch.testing.assert_close(model.forward_features(x), expected)
        assert model.bn1.num_batches_tracked == 2
        assert y.shape[2:] == (16, 16) and expected.shape == (2, 128, 8, 8)


def test_checkpointing() -> None:
    check_checkpointing("resnet-20")


def test_three_steps_of_training() -> None:
    """What a network trained fused predicts, stock and fused, is what one trained stock predicts."""
    fused, stock, truth = twins("resnet-8")
    torch.manual_seed(1)
    images = torch.randn(3, 8, 3, 12, 12)
    found = []
    for model in (fused, stock, truth):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for x in images:
            seen(model, x.clone())
            optimizer.step()
        found.append(model.eval()(images[0].to(next(model.parameters()).dtype)).double())
    ours, eager, exact = found
    assert (ours - exact).norm() <= 2 * (eager - exact).norm() + 1e-5 * exact.norm()
    stock.load_state_dict(fused.state_dict())
    torch.testing.assert_close(stock(images[0]).double(), ours, rtol=1e-4, atol=1e-4)


def test_gradients_of_each_sample() -> None:
    """By torch.func, which knows no memory format."""
    torch.manual_seed(0)
    model = rkfast.create_model("resnet-8").eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    x = torch.randn(2, 3, 8, 8)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(each[name].sum(0), p.grad, rtol=1e-3, atol=1e-4)


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = rkfast.create_model("resnet18", num_classes=10)
    weight = model.layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.05)
    assert model.fc.weight.abs().max().item() == pytest.approx(512**-0.5, rel=0.05)


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    (
        ("resnet", {}, ValueError, r"name: 'resnet' is not a model; expected resnet<18\|.*or resnet-<6n \+ 2>"),
        ("resnet19", {}, ValueError, "is not a model"),
        ("resnet50_2", {}, ValueError, "is not a model"),
        ("wide_resnet50", {}, ValueError, "expected wide_resnet<50.101>_2"),
        ("resnext50_32x16d", {}, ValueError, "expected resnext"),
        ("seresnet-20", {}, ValueError, "expected seresnet"),
        ("resnet-21", {}, ValueError, r"name: depth: expected 2 \+ 6 \* blocks, such as 20 or 110, got 21"),
        ("resnet-2", {}, ValueError, "name: depth: expected 8 to 2050, got 2"),
        ("resnet-999998", {}, ValueError, "name: depth: expected 8 to 2050, got 999998"),
        ("resnet-9999999", {}, ValueError, "is not a model"),
        ("resnet-20", {"shortcut": "c"}, ValueError, "shortcut: 'c' is not supported; expected a or b"),
        ("resnet50", {"shortcut": 1}, TypeError, "shortcut: expected a str, got 1"),
        ("resnet50", {"stride_in_1x1": 1}, TypeError, "stride_in_1x1: expected a bool, got 1"),
        ("resnet18", {"stride_in_1x1": True}, ValueError, "stride_in_1x1: blocks of two 3x3 convolutions have no 1x1"),
        ("resnet-20", {"stride_in_1x1": True}, ValueError, "stride_in_1x1: blocks of two 3x3 convolutions"),
        ("resnet18", {"num_classes": 0}, ValueError, "num_classes: expected 1 to 1000000, got 0"),
        ("resnext50_32x4d", {"shortcut": "a"}, TypeError, "shortcut: not an option of resnext; supported are stride"),
        ("seresnet50", {"reduction": 4}, TypeError, "reduction: not an option of seresnet"),
        ("resnet18", {"layers": 1}, TypeError, "layers: not an option of resnet"),
    ),
)
def test_bad_arguments(name: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with torch.device("meta"), pytest.raises(error, match=message) as caught:
        rkfast.create_model(name, **options)
    assert len(str(caught.value)) < 400


@pytest.mark.skipif(native.cpu_reason() is not None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize(
    ("name", "size", "speed", "least"),
    (
        ("resnet18", 128, 0.74, 0.6),
        ("resnet50", 128, 0.87, 0.55),
        ("seresnet50", 128, 0.7, 0.45),
        ("tsc_resnet50", 128, 0.68, 0.4),
        ("tsc_resnet-20", 32, 0.65, 0.45),
    ),
)
def test_bytes_saved_for_backward(
    name: str, size: int, speed: float, least: float, layout: torch.memory_format
) -> None:
    """At batch 2, as shares of stock PyTorch's: by saved-tensor hooks, without parameters."""
    x = torch.randn(2, 3, size, size).contiguous(memory_format=layout)
    saved = {}
    for fused, memory in ((False, "speed"), (True, "speed"), (True, "min")):
        model: Any = rkfast.create_model(name, fused=fused, memory=memory, num_classes=10)
        model.to(memory_format=layout)
        saved[fused, memory] = measure.saved_bytes(lambda m=model: m(x), [*model.parameters(), *model.buffers()])
    assert saved[True, "speed"] <= speed * saved[False, "speed"]
    assert saved[True, "min"] <= least * saved[False, "speed"]
