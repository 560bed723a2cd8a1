"""Networks with blocks like torchvision's and timm's, and the formula of their steps in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rkfast
from tests.models.test_restack import Basic
from tests.models.tester import settled


class SqueezeExcite(nn.Module):
    """timm's SEModule."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(2, channels, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))))


class Bottleneck(nn.Module):
    """timm's Bottleneck."""

    def __init__(self, inner: int, channels: int, stride: int = 1, gate: bool = True) -> None:
        super().__init__()
        width = channels // 4
        self.conv1 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.drop_block = nn.Identity()
        self.act2 = nn.ReLU(inplace=True)
        self.aa = nn.Identity()
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.se = SqueezeExcite(channels) if gate else None
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inner != channels:
            self.downsample = nn.Sequential(nn.Conv2d(inner, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
        self.drop_path = None

    def f(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(x)))))
        return x if self.se is None else self.se(x)

    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        out += x if self.downsample is None else self.downsample(x)
        return self.act3(out)


class ResNet(nn.Module):
    def __init__(self, *stages: list[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        for i, blocks in enumerate(stages):
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
        self.stages = len(stages)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(self.stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))


def basic() -> nn.Module:
    return ResNet([Basic(8), Basic(8), Basic(8)], [Basic(16, stride=2), Basic(16)])


def bottleneck(gate: bool = False) -> nn.Module:
    return ResNet(
        [Bottleneck(8, 16, gate=gate), Bottleneck(16, 16, gate=gate)],
        [Bottleneck(16, 16, stride=2, gate=gate)],
    )


def squeeze_excite() -> nn.Module:
    return bottleneck(True)


def one_container() -> nn.Module:
    """All stages in one nn.Sequential."""
    return ResNet([Basic(8), Basic(8), Basic(16, stride=2), Basic(16)])


def densenet() -> nn.Module:
    return rkfast.create_model("densenet-13", growth_rate=6)


def densenet_bc() -> nn.Module:
    return rkfast.create_model("densenet-16-bc", growth_rate=6)


def cliquenet() -> nn.Module:
    return rkfast.create_model("cliquenet-9", growth_rate=6, init_channels=8)


def cliquenet_abc() -> nn.Module:
    return rkfast.create_model("cliquenet-18-abc", growth_rate=6, init_channels=8)


# factory, blocks of each stage
NETS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "basic": (basic, [3, 2]),
    "bottleneck": (bottleneck, [2, 1]),
    "squeeze_excite": (squeeze_excite, [2, 1]),
    "one_container": (one_container, [2, 2]),
    "densenet": (densenet, [3, 3, 3]),
    "densenet_bc": (densenet_bc, [2, 2, 2]),
    "cliquenet": (cliquenet, [3, 3, 3]),
    "cliquenet_abc": (cliquenet_abc, [3, 3, 3]),
}


def made(name: str, seed: int = 0) -> Any:
    return settled(NETS[name][0], seed)


def attached(name: str, *args: Any, seed: int = 0, **options: Any) -> Any:
    """With step sizes that are not all about 1/2."""
    model = made(name, seed)
    for p in rkfast.tsc.attach(model, *args, **options):
        if args[:1] != ("indp",):
            nn.init.normal_(p, 0, 0.5)
        else:
            nn.init.uniform_(p, 0.2, 1)
    return model


def plain(model: Any) -> Any:
    """A copy that computes the paper's equation 13, or what Appendix C says of other networks, in plain PyTorch."""
    model = copy.deepcopy(model)
    for _, module in rkfast.tsc.stepped.stepped(model):
        if isinstance(module, rkfast.tsc.stepped.SteppedSequential):
            module.__class__ = PlainSequential
        else:
            module.fused = False
            module.__class__ = PlainDense if isinstance(module, rkfast.nn.DenseBlock) else PlainClique
    for module in model.modules():
        if hasattr(module, "fused"):
            module.fused = False
    return model


class PlainSequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        sizes: dict[str, Tensor] = {}
        for run in self._tsc_runs:
            blocks = [self._modules[name] for name in run.stage.names]
            reads = ("conv1", "conv3") if hasattr(blocks[0], "conv3") else ("conv1", "conv2")
            steps = run.controller([[getattr(block, conv).weight for conv in reads] for block in blocks])
            sizes.update(zip(run.stage.names, steps, strict=True))
        for name, block in self._modules.items():
            shortcut = x if block.downsample is None else block.downsample(x)
            x = torch.relu(shortcut + sizes[name][:, None, None] * block._tsc_class.f(block, x))
        return x


class PlainDense(rkfast.nn.DenseBlock):
    def forward(self, y: Tensor) -> Tensor:  # type: ignore[override]
        layers = list(self.children())
        last = [layer.conv2 if layer.has_bottleneck else layer.conv1 for layer in layers]
        steps = self._tsc_runs[0].controller([[conv.weight] for conv in last])
        for layer, step in zip(layers, steps, strict=True):
            y = torch.cat([y, layer(y) * step[:, None, None]], 1)
        return y


class PlainClique(rkfast.nn.CliqueBlock):
    def forward(self, y: Tensor) -> Tensor:  # type: ignore[override]
        last = self.weight1 if self.weight2 is None else self.weight2
        steps = self._tsc_runs[0].controller([[w] for w in last])[:, :, None, None]
        z: list[Tensor] = []
        s = self.stages

        def layer(x: Tensor, i: int, weight: Tensor, norm1: nn.Module, norm2: nn.Module | None) -> Tensor:
            x = F.conv2d(F.relu(norm1(x)), weight, padding=weight.shape[2] // 2)
            if norm2 is not None:
                x = F.conv2d(F.relu(norm2(x)), self.weight2[i], padding=1)
            return x * steps[i]

        norms2 = (lambda part, i: None) if self.weight2 is None else (lambda part, i: getattr(self, f"{part}_norm2")[i])
        for i in range(s):
            x = torch.cat([y, *z], 1)
            z.append(layer(x, i, self.weight1[i][:, : x.shape[1]], self.init_norm1[i], norms2("init", i)))
        for i in range(s):
            x = torch.cat(z[:i] + z[i + 1 :], 1)
            weight = self.weight1[i][:, self.in_channels :]
            z[i] = layer(x, i, weight, self.update_norm1[i], norms2("update", i))
        return torch.cat(z, 1)
