"""What all models share: the methods that users of timm expect, and the reading of names and options."""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from rkfast.nn import BasicBlock, Bottleneck, CliqueBlock, DenseBlock, RKCNNStep
from rkfast.nn.norm import recomputed
from rkfast.nn.step import with_moments
from rkfast.ops import Moments, checks

MAX_LAYERS = 2050
MAX_CHANNELS = 4096
MAX_CLASSES = 1_000_000

# BatchNorm as the authors of RKNet and CliqueNet set it.
rk_norm = functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class Family(NamedTuple):
    """Models whose names have one form: a word, and what ``pattern`` matches, whose groups become arguments of
    ``build``. Its other arguments are options, but for those in ``fixed``, which holds their values."""

    form: str
    pattern: re.Pattern[str]
    build: Callable[..., ImageModel]
    names: list[str]
    fixed: dict[str, Any]


class ImageModel(nn.Module):
    """An image classifier, ``forward(x) = forward_head(forward_features(x))``.

    Attributes:
        num_classes: of the result.
        num_features: channels that the classifier reads.
        feature_info: of each period or block a dict with ``num_chs``, ``reduction`` (of H and W) and ``module``, the
            name of the module that makes them.
        fused: whether the model takes fused operations.
        config: name and options that ``create_model`` made it of, else None.
    """

    _classifier = "fc"

    def __init__(self, *, num_classes: int, fused: bool) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = 0
        self.feature_info: list[dict[str, Any]] = []
        self.fused = fused
        self.config: dict[str, Any] | None = None
        self.grad_checkpointing = False

    def forward_features(self, x: Tensor) -> Tensor | list[Tensor]:
        """Tensor [N, in_chans, H, W] -> what the head reads: Tensor [N, C, H', W'], or several of a multiscale head."""
        raise NotImplementedError

    def forward_head(self, features: Tensor | list[Tensor], pre_logits: bool = False) -> Tensor:
        """What forward_features returned -> Tensor [N, num_classes]; [N, num_features] with ``pre_logits``."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The linear layer at the end."""
        return self.get_submodule(self._classifier)

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the linear layer at the end by a fresh one; with 0 classes by nothing.

        Raises:
            TypeError, ValueError: num_classes is no int or out of range.
        """
        whole("num_classes", num_classes, 0, MAX_CLASSES)
        home, _, name = self._classifier.rpartition(".")
        parameter = next(self.parameters())
        fresh: nn.Module = nn.Identity()
        if num_classes:
            fresh = nn.Linear(self.num_features, num_classes).to(parameter.device, parameter.dtype)
            self.init_classifier(fresh)
        setattr(self.get_submodule(home), name, fresh)
        self.num_classes = num_classes
        if self.config is not None:
            self.config = self.config | {"options": self.config["options"] | {"num_classes": num_classes}}

    def init_classifier(self, linear: nn.Linear) -> None:
        """Xavier-uniform weights, no bias."""
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what periods (blocks of a DenseNet) begin with, and compute the rest again in backward.

        Running statistics still move once per step. A fused model warns and stays as it is: its operations keep
        little more.
        """
        if enable and self.fused:
            warnings.warn(
                "set_grad_checkpointing: nothing to do; fused operations save this memory already", stacklevel=2
            )
            return
        self.grad_checkpointing = enable

    def set_memory(self, memory: str) -> ImageModel:
        """What fused blocks keep for the backward: "speed" their convolutions' results, "min" makes some of them again:
        bottlenecks of dense and clique blocks, the last convolution and the projection of residual ones.

        Raises:
            ValueError: memory is neither."""
        checks.memory(memory)
        for module in self.modules():
            if isinstance(module, (DenseBlock, CliqueBlock, RKCNNStep, BasicBlock, Bottleneck)):
                module.memory = memory
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of learned step sizes and coefficients: a smaller one is not a simpler one."""
        return {name for name, _ in self.named_parameters() if {"sqrt_step", "learned", "steps"} & set(name.split("."))}

    def _period(
        self, period: nn.Module, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        if self.grad_checkpointing:
            return recomputed(period, period, y), None
        return with_moments(period, y, moments, return_moments=return_moments)


def init_rk(model: nn.Module) -> None:
    """He-normal convolutions (fan-in), Xavier-uniform linear layers without bias, as the authors of RKNet do."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)


def whole(name: str, value: object, low: int, high: int) -> int:
    """value, an int from low to high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")
    return value


def real(name: str, value: object, low: float, high: float, brackets: str) -> float:
    """value, a number from low to high; ``brackets`` say which ends belong to it, such as "[)"."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    above = low < value or (brackets[0] == "[" and value == low)
    below = value < high or (brackets[1] == "]" and value == high)
    if not (math.isfinite(value) and above and below):
        raise ValueError(f"{name}: expected a number in {brackets[0]}{low}, {high}{brackets[1]}, got {value}")
    return float(value)


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r}")
    return value


def one_of(name: str, value: object, known: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {value!r}")
    if value not in known:
        raise ValueError(f"{name}: {value[:64]!r} is not supported; expected {' or '.join(known)}")


def per_period(name: str, value: object, periods: int, low: int, high: int) -> list[int]:
    """value as one int per period: an int for all, or a sequence."""
    if isinstance(value, int):
        return [whole(name, value, low, high)] * periods
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: expected an int, or one per period, got {value!r}")
    if len(value) != periods:
        raise ValueError(f"{name}: {len(value)} values for {periods} periods; give one for all, or one per period")
    return [whole(f"{name}[{t}]", v, low, high) for t, v in enumerate(value)]


def common(num_classes: object, in_chans: object, drop_rate: object, fused: object) -> None:
    """Check the options that every family has."""
    whole("num_classes", num_classes, 1, MAX_CLASSES)
    whole("in_chans", in_chans, 1, MAX_CHANNELS)
    real("drop_rate", drop_rate, 0, 1, "[)")
    flag("fused", fused)
