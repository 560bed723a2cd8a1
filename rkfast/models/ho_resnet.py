"""HO-ResNet (Luo et al., "Rethinking ResNets: Improved Stacking Strategies With High Order Schemes")."""

from __future__ import annotations

import math

from torch import Tensor, nn

from rkfast import tableau as tableaux
from rkfast.nn import Period, PreActBranch, RKStep, batch_norm_relu
from rkfast.nn.norm import reads_moments
from rkfast.nn.step import with_moments
from rkfast.tableau import Tableau

NAMES = [f"ho_resnet-{layers}" for layers in (10, 18, 26, 30, 34, 58)]
MAX_LAYERS = 2050
MAX_WIDTH = 4096


class HOResNet(nn.Module):
    """A 3x3 stem, Runge-Kutta steps at full resolution, BatchNorm-ReLU, global average pool and a linear layer.

    Args:
        tableau: the method of every step.
        steps: how many.
        width: channels.
        num_classes, in_chans: of output and input.
        step: the step size h.
        fused: False takes stock PyTorch operations, with the same parameters and keys.

    Shape: Tensor [N, in_chans, H, W] -> [N, num_classes].
    """

    def __init__(
        self,
        tableau: Tableau,
        steps: int,
        *,
        width: int = 64,
        num_classes: int = 10,
        in_chans: int = 3,
        step: float = 1.0,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.fused = fused
        self.stem = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.period = Period(
            *(
                RKStep(
                    tableau,
                    [PreActBranch(width, fused=fused) for _ in range(tableau.stages)],
                    step=step,
                    fused=fused,
                )
                for _ in range(steps)
            )
        )
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        wanted = self.fused and reads_moments(self.norm)
        y, moments = with_moments(self.period, self.stem(x), return_moments=wanted)
        y = batch_norm_relu(self.norm, y, moments, fused=self.fused)
        return self.fc(y.mean((2, 3)))


def build(
    layers: int,
    *,
    method: str = "rk4",
    width: int = 64,
    num_classes: int = 10,
    in_chans: int = 3,
    step: float = 1.0,
    fused: bool = True,
) -> HOResNet:
    """``layers`` counts the stem, the linear layer and two convolutions per branch."""
    tableau = tableaux.get(method)
    _whole("layers", layers, 4, MAX_LAYERS)
    branches, odd = divmod(layers - 2, 2)
    if odd or branches % tableau.stages:
        raise ValueError(
            f"layers: {layers} does not fit {method}, which has {tableau.stages} branches of 2 layers per step; "
            f"expected 2 + {2 * tableau.stages} * steps, such as {2 + 2 * tableau.stages} or {2 + 8 * tableau.stages}"
        )
    _whole("width", width, 1, MAX_WIDTH)
    _whole("num_classes", num_classes, 1, 1_000_000)
    _whole("in_chans", in_chans, 1, MAX_WIDTH)
    if isinstance(step, bool) or not isinstance(step, (int, float)):
        raise TypeError(f"step: expected a number, got {step!r}")
    if not (math.isfinite(step) and 0 < step <= 16):
        raise ValueError(f"step: expected a number in (0, 16], got {step}")
    return HOResNet(
        tableau,
        branches // tableau.stages,
        width=width,
        num_classes=num_classes,
        in_chans=in_chans,
        step=step,
        fused=fused,
    )


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")
