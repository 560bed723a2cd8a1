"""HO-ResNet (Luo et al., "Rethinking ResNets: Improved Stacking Strategies With High Order Schemes")."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rkfast import tableau as tableaux
from rkfast.models.base import MAX_CHANNELS, MAX_LAYERS, Family, common, real, whole
from rkfast.models.one_period import OnePeriodNet
from rkfast.nn import Period, PreActBranch, RKStep
from rkfast.tableau import Tableau


class HOResNet(OnePeriodNet):
    """A 3x3 stem, Runge-Kutta steps at full resolution, BatchNorm-ReLU, global average pool and a linear layer.

    Args:
        tableau: the method of every step.
        steps: how many.
        width: channels.
        num_classes, in_chans: of output and input.
        step: the step size h.
        learn: which coefficients of each step are learned, as in RKStep; with all of them its stages are g_i of RKNet's
            equation 4.
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
        learn: Sequence[str] = (),
        fused: bool = True,
    ) -> None:
        period = Period(
            *(
                RKStep(
                    tableau,
                    [PreActBranch(width, fused=fused) for _ in range(tableau.stages)],
                    step=step,
                    learn=learn,
                    fused=fused,
                )
                for _ in range(steps)
            )
        )
        super().__init__(period, width=width, num_classes=num_classes, in_chans=in_chans, fused=fused)


def build(
    layers: str,
    *,
    method: str | None = None,
    width: int = 64,
    num_classes: int = 10,
    in_chans: int = 3,
    step: float = 1.0,
    learn: Sequence[str] = (),
    fused: bool = True,
) -> HOResNet:
    """``layers`` counts the stem, the linear layer and two convolutions per branch."""
    total = whole("layers", int(layers), 4, MAX_LAYERS)
    branches, odd = divmod(total - 2, 2)
    if method is None:  # HO-ResNet-30 is one of midpoint steps: its 14 branches are no whole RK4 steps
        method = "midpoint" if total == 30 else "rk4"
    tableau = tableaux.get(method)
    if odd or branches % tableau.stages:
        raise ValueError(
            f"layers: {total} does not fit {method}, which has {tableau.stages} branches of 2 layers per step; "
            f"expected 2 + {2 * tableau.stages} * steps, such as {2 + 2 * tableau.stages} or {2 + 8 * tableau.stages}"
        )
    whole("width", width, 1, MAX_CHANNELS)
    common(num_classes, in_chans, 0, fused)
    real("step", step, 0, 16, "(]")
    return HOResNet(
        tableau,
        branches // tableau.stages,
        width=width,
        num_classes=num_classes,
        in_chans=in_chans,
        step=step,
        learn=learn,
        fused=fused,
    )


FAMILIES = {
    "ho_resnet": Family(
        "ho_resnet-<layers>",
        re.compile(r"-(?P<layers>[0-9]{1,6})"),
        build,
        [f"ho_resnet-{layers}" for layers in (10, 18, 26, 30, 34, 58)],
        {},
    )
}
