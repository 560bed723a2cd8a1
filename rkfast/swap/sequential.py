"""BatchNorm and ReLU in an nn.Sequential, and stems of networks that are none."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rkfast.nn.chain import chain, fused_length
from rkfast.nn.norm import activated, fusible, hooked, takes_relu
from rkfast.swap.kind import Kind, stock_class


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
    """The stem of torchvision's and timm's ResNet, whose classes are known: a BatchNorm and ReLU as one op, and a pool
    that keeps where its maxima were, and nothing else."""

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
        x = net.layer4(net.layer3(net.layer2(net.layer1(chain(found, x)))))
        return net.fc(torch.flatten(net.avgpool(x), 1))

    def forward_features(self, x: Tensor) -> Tensor:
        """timm's."""
        found: Any = self.found(x)
        if found is None or self.grad_checkpointing:
            return super().forward_features(x)  # type: ignore[misc]
        net: Any = self
        return net.layer4(net.layer3(net.layer2(net.layer1(chain(found, x)))))
