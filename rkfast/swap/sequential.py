"""BatchNorm and ReLU in an nn.Sequential, and stems of networks that are none."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rkfast import native
from rkfast.nn.chain import chain, fused_length
from rkfast.nn.norm import activated, fusible, hooked, takes_relu
from rkfast.ops import checks, layout
from rkfast.swap.kind import Kind, stock_class

LEAST_PIXELS, LEAST_SIDE = 1 << 14, 33


class FusedSequential(Kind):
    """An nn.Sequential with a BatchNorm, a ReLU behind it and perhaps a convolution behind that."""

    title = "sequence"

    @classmethod
    def reads(cls, module: Any) -> list[nn.Module] | str | None:
        if not isinstance(module, nn.Sequential) or stock_class(module).forward is not nn.Sequential.forward:
            return None
        children = list(module)
        if any(fused_length(children[i:]) for i in range(len(children))):
            return children
        named = list(module._modules.items())
        for i, (name, child) in enumerate(named):
            if not isinstance(child, _BatchNorm) or not (hasattr(child, "act") or i + 1 < len(named)):
                continue
            after, act = (name, child._modules["act"]) if hasattr(child, "act") else named[i + 1]
            if not isinstance(act, nn.Module) or type(act).__module__ != "torch.nn.modules.activation":
                continue
            if hooked(child) or hooked(act):
                return f"a hook on {name if hooked(child) else after}"
            if not takes_relu(act):
                return f"{after} is {type(act).__name__}, not nn.ReLU"
            if not (fusible(child) or activated(child)):
                return f"{name} is {type(child).__name__}, not nn.BatchNorm2d"
        return None

    def fused(self, found: list[nn.Module], x: Tensor) -> Tensor:
        return chain(found, x)


class FusedResNet(Kind):
    """torchvision's and timm's ResNet, whose classes are known: BatchNorm and ReLU of the stem as one op, a pool that
    keeps where its maxima were, and nothing else; and on a CPU images in channels_last, for the blocks behind."""

    title = "stem"
    NAMES = (
        ("torchvision.models.resnet", "_forward_impl", ("conv1", "bn1", "relu", "maxpool")),
        ("timm.models.resnet", "forward_features", ("conv1", "bn1", "act1", "maxpool")),
    )

    @classmethod
    def reads(cls, module: Any) -> list[nn.Module] | str | None:
        stock = stock_class(module)
        for home, method, names in cls.NAMES:
            known = getattr(sys.modules.get(home), "ResNet", None)
            if known is None or not issubclass(stock, known) or getattr(stock, method) is not getattr(known, method):
                continue
            layers = [getattr(module, name) for name in names]
            if hooked(layers[1]) or hooked(layers[2]):
                return f"a hook on {names[1] if hooked(layers[1]) else names[2]}"
            if not takes_relu(layers[2]):
                return f"{names[2]} is {type(layers[2]).__name__}, not nn.ReLU"
            if not fusible(layers[1]):
                return f"{names[1]} is {type(layers[1]).__name__}, not nn.BatchNorm2d"
            return layers
        return None

    def forward(self, x: Tensor) -> Any:
        return super(Kind, self).forward(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        """torchvision's."""
        found: Any = self.found(x)
        if found is None:
            return super()._forward_impl(x)  # type: ignore[misc]
        net: Any = self
        x = self._features(found, x, stays=type(net.avgpool) is nn.AdaptiveAvgPool2d and not hooked(net.avgpool))
        return net.fc(torch.flatten(net.avgpool(x), 1))

    def forward_features(self, x: Tensor) -> Tensor:
        """timm's."""
        found: Any = self.found(x)
        if found is None or self.grad_checkpointing:
            return super().forward_features(x)  # type: ignore[misc]
        return self._features(found, x)

    def _features(self, found: list[nn.Module], x: Tensor, *, stays: bool = False) -> Tensor:
        """stays: the result may lie channels_last where x does not."""
        net: Any = self
        stages = [net.layer1, net.layer2, net.layer3, net.layer4]
        turned = _is_turned(x) and _take_any_layout([*found, *stages])
        y = chain(found, layout.conform(x, True) if turned else x)
        for stage in stages:
            y = stage(y)
        return y.contiguous() if turned and not stays else y


def _is_turned(x: Tensor) -> bool:
    """Whether the blocks are faster on images in channels_last than on these as they are. They are not on a few pixels,
    beside which the weights count, nor where one is left at the end, which lies in no layout."""
    if (
        x.dim() != 4
        or x.dtype not in (torch.float32, torch.bfloat16)
        or not x.is_cpu
        or native.cpu_reason() is not None
    ):
        return False
    images, _, height, width = x.shape
    few = images * height * width < LEAST_PIXELS or min(height, width) < LEAST_SIDE
    return not few and not layout.is_channels_last(x) and not checks.transformed((x,))


def _take_any_layout(modules: Iterable[nn.Module | None]) -> bool:
    """Whether nobody of these and of what is inside could have a say in how tensors lie: a ``view``, say, or a hook."""
    for module in modules:
        if module is None:
            continue
        if not _is_known(stock_class(module)) or hooked(module) or not _take_any_layout(module._modules.values()):
            return False
    return True


@functools.cache
def _is_known(cls: type[nn.Module]) -> bool:
    return cls.__module__.startswith(("torch.nn.modules.", "torchvision.", "timm.", "rkfast."))
