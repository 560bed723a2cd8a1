"""Blocks of other libraries, written anew: their layers and names, what they compute, and some that compute something
else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Layer(nn.Module):
    """torchvision's dense layer."""

    def __init__(self, channels: int, k: int, neck: int = 8, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, neck, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(neck)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(neck, k, 3, padding=1, bias=False)
        self.drop_rate = drop_rate

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        x = self.conv2(self.relu2(self.norm2(x)))
        return F.dropout(x, self.drop_rate, self.training) if self.drop_rate > 0 else x


class Block(nn.ModuleDict):
    """torchvision's dense block."""

    def __init__(
        self, layers: int, channels: int, k: int, make: Callable[..., nn.Module] = Layer, **options: Any
    ) -> None:
        super().__init__()
        for i in range(layers):
            self[f"denselayer{i + 1}"] = make(channels + i * k, k, **options)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Reversed(Block):
    """The same layers; each reads the newest features first."""

    def forward(self, x: Tensor) -> Tensor:
        features = x
        for layer in self.values():
            features = torch.cat([layer([features]), features], 1)
        return features


class Halved(Block):
    """Nearly the same, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out * 0.5 if self.training else out


class Moody(Block):
    """The same for small images."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + 1 if x.shape[2] > 32 else out


class MonaiLayer(nn.Module):
    """MONAI's dense layer, in two dimensions; it concatenates itself."""

    def __init__(
        self, channels: int, k: int, neck: int = 8, act: type[nn.Module] = nn.ReLU, conv: Any = nn.Conv2d
    ) -> None:
        super().__init__()
        norm = nn.BatchNorm3d if conv is nn.Conv3d else nn.BatchNorm2d
        self.layers = nn.Sequential(
            OrderedDict(
                norm1=norm(channels),
                relu1=act(),
                conv1=conv(channels, neck, 1, bias=False),
                norm2=norm(neck),
                relu2=act(),
                conv2=conv(neck, k, 3, padding=1, bias=False),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


class MonaiBlock(nn.Sequential):
    def __init__(self, layers: int, channels: int, k: int, **options: Any) -> None:
        super().__init__()
        for i in range(layers):
            self.add_module(f"denselayer{i + 1}", MonaiLayer(channels + i * k, k, **options))


class EfficientLayer(Layer):
    """efficient_densenet's dense layer."""

    efficient = True

    def forward(self, *features: Tensor) -> Tensor:  # type: ignore[override]
        def neck(*inputs: Tensor) -> Tensor:
            return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

        if self.efficient and any(f.requires_grad for f in features):
            x = checkpoint(neck, *features, use_reentrant=False)
        else:
            x = neck(*features)
        return self.conv2(self.relu2(self.norm2(x)))


class EfficientBlock(Block):
    def __init__(self, layers: int, channels: int, k: int, **options: Any) -> None:
        super().__init__(layers, channels, k, EfficientLayer, **options)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(*features))
        return torch.cat(features, 1)


class Transition(nn.Sequential):
    """torchvision's."""

    def __init__(self, channels: int, out: int, pool: nn.Module | None = None) -> None:
        super().__init__(
            OrderedDict(
                norm=nn.BatchNorm2d(channels),
                relu=nn.ReLU(inplace=True),
                conv=nn.Conv2d(channels, out, 1, bias=False),
                pool=nn.AvgPool2d(2) if pool is None else pool,
            )
        )


class DenseNet(nn.Module):
    """torchvision's, small."""

    def __init__(self, block: Callable[..., nn.Module] = Block, layers: int = 3, **options: Any) -> None:
        super().__init__()
        channels = 8 + 4 * layers
        self.features = nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(3, 8, 3, padding=1, bias=False),
                norm0=nn.BatchNorm2d(8),
                relu0=nn.ReLU(inplace=True),
                pool0=nn.MaxPool2d(3, 2, 1),
                denseblock1=block(layers, 8, 4, **options),
                transition1=Transition(channels, 8),
                denseblock2=block(layers, 8, 4, **options),
                norm5=nn.BatchNorm2d(channels),
            )
        )
        self.classifier = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.features(x), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))


class FrozenBatchNorm2d(nn.Module):
    """torchvision's."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, b, mean, var = (t.reshape(1, -1, 1, 1) for t in self.buffers())
        scale = w * (var + self.eps).rsqrt()
        return x * scale + (b - mean * scale)


class BasicBlock(nn.Module):
    """torchvision's."""

    def __init__(
        self, inner: int, channels: int, stride: int = 1, norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        act: Callable[..., nn.Module] = nn.ReLU,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(inner, channels, 3, stride, 1, bias=False)
        self.bn1 = norm(channels)
        self.relu = act(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.downsample = None
        if stride > 1 or inner != channels:
            self.downsample = nn.Sequential(nn.Conv2d(inner, channels, 1, stride, bias=False), norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Scaled(BasicBlock):
    """The same layers, and half the branch."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(0.5 * out + (x if self.downsample is None else self.downsample(x)))


class Extended(BasicBlock):
    """Which may be called with the shortcut."""

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if shortcut is None:
            shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out + shortcut)


class Cut(BasicBlock):
    """The same values, and another gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x.detach())


class Dropping(BasicBlock):
    """With a dropout that is no layer."""

    drop_rate = 0.3

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(F.dropout(out, self.drop_rate, self.training) + x)


class Counting(BasicBlock):
    """The same values and gradients, and another count of batches."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        if self.training:
            self.bn1.num_batches_tracked.add_(1)  # type: ignore[operator, union-attr]
        return out


class ResNet(nn.Module):
    def __init__(self, block: Callable[..., nn.Module] = BasicBlock, **options: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(block(8, 8, **options), block(8, 8, **options))
        self.layer2 = nn.Sequential(block(8, 16, 2, **options), block(16, 16, **options))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))
