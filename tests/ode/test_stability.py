"""stability and spectral_norm beside dense matrices, and that they leave no trace."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rkfast
from rkfast import ode, tsc
from rkfast.nn import PadShortcut
from rkfast.tsc.stepped import residual_blocks
from tests.libraries import network
from tests.models.test_restack import Basic
from tests.tsc.nets import ResNet, attached, made


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 2, size: int = 6) -> Tensor:
    return torch.randn(count, 3, size, size, generator=seeded(1))


def jacobian(f: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    """Dense, Tensor [n, m], in float64."""
    found = torch.func.jacrev(f)(y)
    return found.reshape(-1, y.numel()).detach()


def sigma(f: Callable[[Tensor], Tensor], y: Tensor) -> float:
    return torch.linalg.svdvals(jacobian(f, y))[0].item()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Conv2d(3, 5, 3, padding=1),
    "stride": lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False),
    "1x1": lambda: nn.Conv2d(3, 2, 1, stride=2),
    "no padding": lambda: nn.Conv2d(3, 4, 3),
    "groups": lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3),
    "dilation": lambda: nn.Conv2d(3, 4, 3, padding=2, dilation=2),
    "circular": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "norm": lambda: norm(3),
    "chain": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 4, 1, bias=False), norm(4)),
    "zeros": lambda: PadShortcut(2, 2),
}


def norm(channels: int) -> nn.BatchNorm2d:
    module = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for tensor in (module.weight, module.bias, module.running_mean):
            tensor.normal_()
        module.running_var.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", ((5, 5), (6, 4)))
def test_spectral_norms(name: str, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = LAYERS[name]()
    found = ode.spectral_norm(module, (3, *size), iterations=200)
    wide = copy.deepcopy(module).double().eval()
    assert found == pytest.approx(sigma(wide, torch.zeros(1, 3, *size, dtype=torch.double)), rel=1e-8)
    assert next(module.parameters(), torch.empty(0)).dtype == torch.float32 and module.training


def test_few_iterations_come_close() -> None:
    """From below: 16 of the space's 1024 directions."""
    torch.manual_seed(0)
    module = nn.Conv2d(16, 16, 3, padding=1)
    exact = sigma(copy.deepcopy(module).double(), torch.zeros(1, 16, 8, 8, dtype=torch.double))
    errors = [1 - ode.spectral_norm(module, (16, 8, 8), iterations=n) / exact for n in (1, 16, 32, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 > 1e-3 > errors[2] and -1e-9 < errors[3] < 1e-5


def plain(model: nn.Module, x: Tensor) -> list[tuple[str, Any, Tensor, Tensor]]:
    """Of each block name, block, its step sizes and what it reads, by the formula in float64."""
    found = []
    net = copy.deepcopy(model).double().eval()
    y = net.stem(x.double()) if hasattr(net, "stem") else torch.relu(net.bn1(net.conv1(x.double())))
    for residual in residual_blocks(net):
        block = residual.block
        step = torch.ones(block.conv2.out_channels).double() if residual.step is None else residual.step
        found.append((residual.name, block, step, y))
        z = branch(block, y) * step[:, None, None]
        y = torch.relu(z + (y if block.downsample is None else block.downsample(y)))
    return found


def branch(block: Any, y: Tensor) -> Tensor:
    y = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(y)))))
    return block.bn3(block.conv3(torch.relu(y))) if hasattr(block, "conv3") else y


def nets() -> dict[str, Callable[[], nn.Module]]:
    return {
        "torchvision's blocks": lambda: made("basic"),
        "with controllers": lambda: attached("basic"),
        "negative steps": lambda: attached("basic", "fixed", value=-0.5),
        "timm's bottlenecks": lambda: attached("bottleneck"),
        "frozen": lambda: tsc.freeze(attached("basic")),
        "own": lambda: rkfast.create_model("tsc_resnet-8"),
        "own, zeros": lambda: rkfast.create_model("resnet-8", shortcut="a"),
    }


@pytest.mark.parametrize("name", nets())
def test_proposition_1(name: str) -> None:
    """Factors by dense matrices; the measured growth of five perturbations, small and large, is below."""
    torch.manual_seed(0)
    model, x = nets()[name](), images(1, 4)
    found = ode.stability(model, x, iterations=120)
    assert found.holds and not any(block.caveat for block in found.blocks)
    truth = plain(model, x)
    assert [block.name for block in found.blocks] == [name for name, *_ in truth]
    for report, (_, block, step, y) in zip(found.blocks, truth, strict=True):
        assert report.step == pytest.approx(step.mean().item(), abs=1e-6)
        pairs = [
            (getattr(block, f"conv{i}"), getattr(block, f"bn{i}")) for i in (1, 2, 3) if hasattr(block, f"conv{i}")
        ]
        expected, z = 1.0, y
        for i, (conv, bn) in enumerate(pairs):
            last = i == len(pairs) - 1
            factor = step[:, None, None] if last else 1.0
            expected *= sigma(lambda v, conv=conv, bn=bn, factor=factor: factor * bn(conv(v)), z)
            z = torch.relu(bn(conv(z)))
        assert report.branch == pytest.approx(expected, rel=1e-5)
        shortcut = 1.0 if block.downsample is None else sigma(block.downsample, y)
        assert report.shortcut == pytest.approx(shortcut, rel=1e-5)
        assert report.factor == report.shortcut + report.branch
    assert found.bound == pytest.approx(math.prod(block.factor for block in found.blocks))
    for seed, epsilon in enumerate((1e-6, 1e-3, 0.1, 1.0, 100.0)):
        again = ode.stability(model, x, epsilon=epsilon, iterations=120, generator=seeded(seed))
        assert all(0 < block.growth <= block.factor for block in again.blocks)
        assert 0 < again.growth <= again.bound


@pytest.mark.parametrize("name", nets())
def test_growth(name: str) -> None:
    """That of the network itself: of y_0 moved by epsilon, to y_D."""
    torch.manual_seed(0)
    model, x = nets()[name](), images()
    found = ode.stability(model, x, epsilon=0.25, generator=seeded(5))
    truth = plain(model, x)
    y0 = truth[0][3]
    noise = torch.randn(y0.shape, generator=seeded(5)).double()
    y, moved = y0, y0 + 0.25 * y0.norm() / noise.norm() * noise
    for report, (_, block, step, _) in zip(found.blocks, truth, strict=True):
        before = (moved - y).norm()
        shortcut = block.downsample or nn.Identity()
        y, moved = (torch.relu(step[:, None, None] * branch(block, z) + shortcut(z)) for z in (y, moved))
        assert report.growth == pytest.approx(((moved - y).norm() / before).item(), rel=1e-3)
    assert found.growth == pytest.approx((moved - y).norm().item() / (0.25 * y0.norm()).item(), rel=1e-3)


@pytest.mark.parametrize("name", nets())
def test_equation_4(name: str) -> None:
    torch.manual_seed(0)
    model, x = nets()[name](), images(2, 4)
    found = ode.stability(model, x, iterations=300)
    radii = []
    for report, (_, block, step, y) in zip(found.blocks, plain(model, x), strict=True):
        if block.downsample is not None:
            assert report.radius is None
            continue
        dense = jacobian(lambda v, block=block, step=step: step[:, None, None] * branch(block, v), y[:1])
        radii.append((1 + torch.linalg.eigvals(dense)).abs().max().item())
        assert report.radius == pytest.approx(radii[-1], rel=1e-5)
    assert found.radius == pytest.approx(max(radii), rel=1e-5)


class Linear(Basic):
    """Without anything that is not linear, whose branch is ``matrix`` over the channels at each position."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix), relu=nn.Identity())
        self.conv1 = nn.Conv2d(len(matrix), len(matrix), 1, bias=False)
        self.conv2 = nn.Conv2d(len(matrix), len(matrix), 1, bias=False)
        with torch.no_grad():
            for bn in (self.bn1, self.bn2):
                bn.running_var.fill_(1 - bn.eps)
            self.conv1.weight.copy_(torch.eye(len(matrix))[:, :, None, None])
            self.conv2.weight.copy_(matrix[:, :, None, None])


@pytest.mark.parametrize("angle", (0.3, 2.0, math.pi / 2))
def test_a_complex_pair_leads(angle: float) -> None:
    """A rotation by angle, three times as long as it was, beside real eigenvalues that are smaller: power iteration
    would wander."""
    matrix = torch.diag(torch.tensor([0.0, 0.0, 0.5, -0.7, 0.1]))
    matrix[:2, :2] = 3 * torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    torch.manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(5, 5))
    model = nn.Sequential(Linear(q @ matrix @ q.T))
    (block,) = ode.stability(model, torch.randn(1, 5, 3, 3, generator=seeded())).blocks
    expected = (1 + torch.linalg.eigvals(matrix.double())).abs().max().item()
    assert expected == pytest.approx(abs(1 + 3 * complex(math.cos(angle), math.sin(angle))), rel=1e-5)
    assert block.radius == pytest.approx(expected, rel=1e-5)
    assert block.branch == pytest.approx(3.0, rel=1e-5)


def test_a_pair_of_a_network() -> None:
    """The leading eigenvalue of this one's block is complex, and found within few of 128 directions."""
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(Basic(8))
        x = torch.randn(1, 8, 4, 4)
        block = copy.deepcopy(model[0]).double().eval()
        values = 1 + torch.linalg.eigvals(jacobian(lambda v, block=block: branch(block, v), x.double()))
        leading = values[values.abs().argmax()]
        if abs(leading.imag) > 0.1:
            break
    else:
        pytest.fail("none is complex")
    found = ode.stability(model, x)
    assert found.radius == pytest.approx(leading.abs().item(), rel=1e-3)


@pytest.mark.parametrize("undo", (tsc.fold, tsc.freeze))
def test_folded_and_frozen_networks_have_the_same_bound(undo: Callable[[nn.Module], nn.Module]) -> None:
    model = attached("bottleneck")
    before, after = ode.stability(model, images()), ode.stability(undo(copy.deepcopy(model)), images())
    assert undo is tsc.freeze or all(block.step == 1 for block in after.blocks)
    for ours, other in zip(before.blocks, after.blocks, strict=True):
        assert other.branch == pytest.approx(ours.branch, rel=1e-4)
        assert other.radius == (None if ours.radius is None else pytest.approx(ours.radius, rel=1e-3))
        assert other.growth == pytest.approx(ours.growth, rel=1e-3)


def test_smaller_steps_smaller_bound() -> None:
    bounds = [ode.stability(attached("basic", "fixed", value=v), images(), iterations=8).bound for v in (0.01, 0.5, 1)]
    assert bounds == sorted(bounds)


def test_gates_and_activations_are_told() -> None:
    model = attached("squeeze_excite")
    found = ode.stability(model, images())
    assert not found.holds
    assert found.blocks[0].caveat == "layer1.0.se is SqueezeExcite, which is counted as if it were not there"
    assert found.blocks[0].caveat in str(found)
    (block,) = ode.stability(nn.Sequential(Basic(4, relu=nn.SiLU())), torch.randn(1, 4, 4, 4)).blocks
    assert block.caveat == "0.relu is SiLU, whose slope is supposed to be at most 1"


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", ("basic", "bottleneck"))
def test_the_model_is_as_it_was(name: str, training: bool) -> None:
    model = attached(name).train(training)
    model.layer1[1].eval()
    modes = [module.training for module in model.modules()]
    before, buffers = copy.deepcopy(model.state_dict()), dict(model.named_buffers())
    random, source = torch.get_rng_state(), images()
    x = source.clone()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        first = ode.stability(model, x)
    assert torch.equal(x, source)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    with tsc.accumulate(model), torch.no_grad():
        inside = ode.stability(model, x)
    assert (
        first == inside == ode.stability(model, x, generator=seeded(0)) != ode.stability(model, x, generator=seeded(1))
    )


def test_low_precision() -> None:
    """The same bound as of the same weights in float64."""
    model = attached("basic", "fixed", value=0.5).bfloat16()
    low, wide = ode.stability(model, images()), ode.stability(copy.deepcopy(model).double(), images())
    assert low == wide
    assert next(model.parameters()).dtype == torch.bfloat16


def test_images_of_its_own() -> None:
    small = ode.stability(rkfast.create_model("tsc_resnet-8", in_chans=1), iterations=2)
    assert len(small.blocks) == 3
    x = torch.randn(4, 3, 32, 32, generator=(source := seeded(2)))
    model = rkfast.create_model("resnet-8")
    assert ode.stability(model, x, iterations=2, generator=source) == ode.stability(
        model, iterations=2, generator=seeded(2)
    )


def test_table() -> None:
    lines = str(ode.stability(attached("basic"), images(), iterations=4)).splitlines()
    assert lines[0].split() == [
        "block",
        "dt",
        "||S||",
        "||dt",
        "W||",
        "factor",
        "growth",
        "max",
        "|1",
        "+",
        "dt",
        "lambda|",
    ]
    assert [line.split()[0] for line in lines[1:-1]] == ["layer1.0", "layer1.1", "layer1.2", "layer2.0", "layer2.1"]
    assert re.fullmatch(r"bound \S+, measured growth \S+", lines[-1])


@pytest.mark.parametrize("name", ("resnet18", "resnext50_32x4d"))
def test_torchvision(name: str) -> None:
    torch.manual_seed(0)
    model = network(f"torchvision.{name}")
    found = ode.stability(model, images(1, 32), iterations=4)
    assert found.holds and len(found.blocks) == {"resnet18": 8}.get(name, 16)


@pytest.mark.parametrize("name", ("resnet10t", "seresnet50", "resnet50d"))
def test_timm(name: str) -> None:
    torch.manual_seed(0)
    found = ode.stability(network(f"timm.{name}"), images(1, 32), iterations=4)
    assert found.holds == (name != "seresnet50") and len(found.blocks) == {"resnet10t": 4}.get(name, 16)


def test_bad_arguments() -> None:
    model, x = made("basic"), images()
    for call, kind, message in (
        (lambda: ode.stability([], x), TypeError, "model: expected a Module, got list"),
        (lambda: ode.stability(model, [1]), TypeError, "x: expected a Tensor, got list"),
        (lambda: ode.stability(model, x.long()), TypeError, "x: expected floating-point images, got torch.int64"),
        (
            lambda: ode.stability(model, x[0]),
            ValueError,
            "x: expected images [N, C, H, W], at least one, got [3,",
        ),
        (lambda: ode.stability(model, x, epsilon=0), ValueError, "epsilon: expected a finite number above 0, got 0"),
        (lambda: ode.stability(model, x, iterations=0), ValueError, "iterations: expected at least 1, got 0"),
        (lambda: ode.stability(model, x, iterations=2.0), TypeError, "iterations: expected an int, got float"),
        (lambda: ode.stability(model, x, generator=1), TypeError, "generator: expected a torch.Generator, got int"),
        (lambda: ode.stability(nn.Linear(2, 2), x), ValueError, "model: Linear has no residual blocks"),
        (lambda: ode.stability(attached("densenet"), x), ValueError, "is a DenseBlock, whose layers do not add"),
        (lambda: ode.stability(made("cliquenet"), x), ValueError, "is a CliqueBlock, whose layers do not add"),
        (lambda: ode.spectral_norm(nn.ReLU(), (3, 4, 4)), ValueError, "module is ReLU, which is not linear"),
        (lambda: ode.spectral_norm(nn.GroupNorm(1, 3), (3, 4, 4)), ValueError, "module is GroupNorm, which is not"),
    ):
        with pytest.raises(kind, match=re.escape(message)):
            call()
    block: Any = Basic(8)
    block.bn1 = nn.GroupNorm(2, 8)
    with pytest.raises(ValueError, match=r"model: layer1\.1\.bn1 is GroupNorm, which is not linear in eval mode"):
        ode.stability(ResNet([Basic(8), block], [Basic(16, stride=2)]), x)
    unused = ResNet([Basic(8), Basic(16, stride=2)], [Basic(16)])
    unused.stages = 1
    with pytest.raises(RuntimeError, match=r"model: layer2\.0 did not run"):
        ode.stability(unused, x)
