"""Dense blocks and transitions of torchvision, timm and others, by the layers that they have."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from rkfast.nn.norm import (
    activated,
    as_norm,
    fusible,
    group_of,
    hooked,
    one_group,
    plain_conv,
    reads_moments,
    takes_relu,
)
from rkfast.nn.pool import average_of_norm
from rkfast.ops import Moments, checks, dense_block
from rkfast.ops.dense_block import kernel_reason
from rkfast.swap.kind import Kind, leaves, mixes


class Layer(NamedTuple):
    """BatchNorms and convolutions of a layer with (two) or without (one) bottleneck."""

    norms: list[Any]
    convs: list[Any]


def layer_of(module: nn.Module) -> Layer | str | None:
    """A dense block's layer, why it is none that can be served, or None where it looks like something else."""
    parts = leaves(module)
    dropped = [name for name, part in parts.items() if isinstance(part, nn.modules.dropout._DropoutNd)]
    rates: list[Any] = [getattr(module, "drop_rate", 0.0), *(parts.pop(name).p for name in dropped)]
    convs = {name: part for name, part in parts.items() if isinstance(part, nn.modules.conv._ConvNd)}
    if len(convs) not in (1, 2) or len(parts) != len(convs) * (2 if len(parts) == 2 * len(convs) else 3):
        return None
    if hooked(module):
        return "a hook on a layer"
    names, layer = list(parts), Layer([], [])
    width = len(parts) // len(convs)
    for i in range(0, len(names), width):
        norm, *acts, conv = names[i : i + width]
        if conv not in convs:
            return None
        reason = _norm_reason(parts, norm, acts) or _conv_reason(parts, conv)
        if reason is not None:
            return reason
        layer.norms.append(parts[norm])
        layer.convs.append(parts[conv])
    if len(layer.convs) == 2 and layer.convs[0].kernel_size != (1, 1):
        return None
    if module.training and any(rate > 0 for rate in rates):
        return "dropout behind the last convolution alone"
    return layer


def _norm_reason(parts: dict[str, Any], name: str, acts: list[str]) -> str | None:
    """Why BatchNorm and ReLU are not one op."""
    norm = parts[name]
    if acts and fusible(norm) and all(takes_relu(parts[act]) for act in acts):
        return None
    if hooked(norm):
        return f"a hook on {name}"
    for act in acts:
        if hooked(parts[act]):
            return f"a hook on {act}"
        if not takes_relu(parts[act]):
            return f"{act} is {type(parts[act]).__name__}, not nn.ReLU"
    if not acts and not activated(norm):
        inside = norm._modules.get("act")
        return f"{name} is {type(norm).__name__} with {type(inside).__name__} inside, not nn.ReLU"
    if acts and not fusible(norm):
        return f"{name} is {type(norm).__name__}, not nn.BatchNorm2d"
    return None


def _conv_reason(parts: dict[str, Any], name: str) -> str | None:
    conv = parts[name]
    if plain_conv(conv):
        return None
    if hooked(conv):
        return f"a hook on {name}"
    if type(conv) is not nn.Conv2d:
        return f"{name} is {type(conv).__name__}, not nn.Conv2d"
    if conv.bias is not None:
        return f"{name} has a bias"
    if conv.groups != 1:
        return f"{name} has {conv.groups} groups"
    return f"{name}: {conv.extra_repr()}; served are 1x1 and 3x3 that keep the resolution"


class FusedDenseBlock(Kind):
    """A dense block as ``rkfast.ops.dense_block``."""

    title = "dense block"

    @classmethod
    def reads(cls, module: Any) -> list[Layer] | str | None:
        children = list(module._modules.items())
        if not children:
            return None
        found: list[Layer] = []
        for name, child in children:
            layer = None if child is None else layer_of(child)
            if layer is None:
                return None
            if isinstance(layer, str):
                called_dense = "dense" in type(module).__name__.lower() or "denselayer" in name
                return f"{name}: {layer}" if called_dense else None
            found.append(layer)
        first, k = found[0], found[0].convs[-1].out_channels
        for i, layer in enumerate(found):
            grown = layer.convs[0].in_channels == first.convs[0].in_channels + i * k
            if not grown or layer.convs[-1].out_channels != k or len(layer.convs) != len(first.convs):
                return None
        if not one_group([norm for layer in found for norm in layer.norms]):
            return "its BatchNorms belong to different process groups"
        return found

    @classmethod
    def sample(cls, module: Any) -> tuple[int, ...]:
        found: Any = cls.reads(module)
        return (2, found[0].convs[0].in_channels, 4, 4)

    def refuses(self, found: list[Layer], x: Tensor) -> str | None:
        if x.dim() != 4:
            return f"an input of {x.dim()} dimensions"
        if checks.transformed((x, found[0].convs[0].weight)):
            return "torch.func and forward-mode AD"
        return mixes(x) or kernel_reason(x, group_of(found[0].norms[0]))

    def fused(self, found: list[Layer], x: Tensor) -> Tensor:
        return self._block(found, x)

    def _block(
        self, found: list[Layer], y: Tensor, moments: Moments | None = None, return_moments: bool = False
    ) -> Any:
        necks = found if len(found[0].convs) == 2 else []
        return dense_block(
            y,
            [layer.convs[0].weight for layer in found],
            [as_norm(layer.norms[0]) for layer in found],
            [layer.convs[1].weight for layer in necks],
            [as_norm(layer.norms[1]) for layer in necks],
            training=False,
            memory=self._rkfast.memory,
            moments=moments,
            return_moments=return_moments,
        )

    def forward_with_moments(
        self, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        """The block, taking y's moments if they are known, and leaving those of its result if asked for (and fused)."""
        found = self.found(y)
        if found is None:
            return super().forward(y), None
        if group_of(found[0].norms[0]):
            return self._block(found, y), None
        result = self._block(found, y, moments, return_moments)
        return result if return_moments else (result, None)


class FusedTransition(Kind):
    """``conv(pool(relu(norm(y))))``: the average before the 1x1 convolution, with which it commutes."""

    title = "transition"

    @classmethod
    def reads(cls, module: Any) -> tuple[Any, Any, Any] | str | None:
        """The BatchNorm (ReLU behind or inside it), the convolution and the pool."""
        parts = dict(module._modules)
        names = list(parts)
        if not isinstance(module, nn.Sequential) or len(names) not in (3, 4) or None in parts.values():
            return None
        norm, *acts, conv, pool = names
        if not isinstance(parts[conv], nn.Conv2d) or parts[conv].kernel_size != (1, 1):
            return None
        if not isinstance(parts[pool], nn.Module) or "pool" not in type(parts[pool]).__name__.lower():
            return None
        if type(parts[pool]) is not nn.AvgPool2d:
            return f"{pool} is {type(parts[pool]).__name__}, not nn.AvgPool2d"
        if hooked(parts[pool]):
            return f"a hook on {pool}"
        reason = _norm_reason(parts, norm, acts) or _conv_reason(parts, conv)
        return reason or (parts[norm], parts[conv], parts[pool])

    @classmethod
    def sample(cls, module: Any) -> tuple[int, ...]:
        found: Any = cls.reads(module)
        return (2, found[1].in_channels, 7, 8)

    def forward(self, x: Tensor, moments: Moments | None = None) -> Tensor:
        found = self.found(x)
        return super(Kind, self).forward(x) if found is None else self.fused(found, x, moments)

    def fused(self, found: tuple[Any, Any, Any], x: Tensor, moments: Moments | None = None) -> Tensor:
        norm, conv, pool = found
        return conv(average_of_norm(pool, norm, x, moments))

    def reads_moments(self) -> bool:
        """Whether forward makes use of its input's moments."""
        return reads_moments(self._modules[next(iter(self._modules))])  # type: ignore[arg-type]
