"""HO-ResNet (Luo et al., "Rethinking ResNets: Improved Stacking Strategies With High Order Schemes")."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rkfast import tableau as tableaux
from rkfast.models.base import MAX_CHANNELS, MAX_LAYERS, Family, common, flag, one_of, real, whole
from rkfast.models.one_period import OnePeriodNet
from rkfast.nn import Period, PreActBranch, RKStep
from rkfast.tableau import Tableau

# What the paper calls a method, and its name.
ALIASES = {"rk8": "verner8"}
MAX_NESTED = 8


class HOResNet(OnePeriodNet):
    """A 3x3 stem, Runge-Kutta steps at full resolution, BatchNorm-ReLU, global average pool and a linear layer.

    Args:
        tableau: the method of every step.
        steps: how many.
        width: channels.
        num_classes, in_chans: of output and input.
        step: the step size.
        factor: Table 4's, a factor on the step size, ``h = step * factor``; ``set_factor`` changes it.
        nested: how many times the branches of a step are steps themselves (Table 3). The step within keeps its
            identity, ``F(x) = x + ...``.
        variant: "textbook", "authors" or "paper", of every step as in RKStep.
        learn: which coefficients of each step are learned, as in RKStep; with all of them its stages are g_i of RKNet's
            equation 4.
        per_channel: with "h" in ``learn``, whether each channel has its own h.
        tol, kappa: of adaptive steps, as in RKStep.
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
        factor: float = 1.0,
        nested: int = 0,
        variant: str = "textbook",
        learn: Sequence[str] = (),
        per_channel: bool = False,
        tol: float | None = None,
        kappa: float = 0.9,
        fused: bool = True,
    ) -> None:
        h = step * factor
        options: dict[str, Any] = {
            "step": torch.full((width,), h) if per_channel else h,
            "learn": learn,
            "variant": variant,
            "tol": tol,
            "kappa": kappa,
            "fused": fused,
        }

        def block(depth: int) -> nn.Module:
            if depth < 0:
                return PreActBranch(width, fused=fused)
            return RKStep(tableau, [block(depth - 1) for _ in range(tableau.stages)], **options)

        period = Period(*(block(nested) for _ in range(steps)))
        super().__init__(period, width=width, num_classes=num_classes, in_chans=in_chans, fused=fused)
        self.step = step

    def set_factor(self, factor: float) -> None:
        """Scale the step size of every step by ``factor`` from now on, unclamped: ``RKStep.set_step(step * factor)``.

        For a schedule call it between optimizer steps, as ``model.set_factor(2 * (1 - epoch / epochs))`` for section
        4.6's decay from 2 to 0. It is not in the state_dict.

        Raises:
            TypeError: factor is no number.
            ValueError: it is not finite, step sizes are learned, or the variant is "paper", which has none.
        """
        h = self.step * real("factor", factor, -math.inf, math.inf, "()")
        # All steps are of one kind, so that either the first refuses or none does.
        for module in self.modules():
            if isinstance(module, RKStep):
                module.set_step(h)


def build(
    layers: str,
    *,
    method: str | None = None,
    width: int = 64,
    num_classes: int = 10,
    in_chans: int = 3,
    step: float = 1.0,
    factor: float = 1.0,
    nested: int = 0,
    variant: str = "textbook",
    learn: Sequence[str] = (),
    per_channel: bool = False,
    tol: float | None = None,
    kappa: float = 0.9,
    fused: bool = True,
) -> HOResNet:
    """``layers`` counts the stem, the linear layer and two convolutions per branch."""
    total = whole("layers", int(layers), 4, MAX_LAYERS)
    branches, odd = divmod(total - 2, 2)
    if method is None:  # HO-ResNet-30 is one of midpoint steps: its 14 branches are no whole RK4 steps
        method = "midpoint" if total == 30 else "rk4"
    one_of("method", method, [*tableaux.names(), *ALIASES])
    tableau = tableaux.get(ALIASES.get(method, method))
    whole("nested", nested, 0, MAX_NESTED)
    each = tableau.stages ** (nested + 1)
    if odd or branches % each:
        times = f" nested {nested} times" if nested else ""
        raise ValueError(
            f"layers: {total} does not fit {method}{times}, which has {each} branches of 2 layers per step; "
            f"expected 2 + {2 * each} * steps, such as {2 + 2 * each} or {2 + 8 * each}"
        )
    whole("width", width, 1, MAX_CHANNELS)
    common(num_classes, in_chans, 0, fused)
    real("step", step, 0, 16, "(]")
    real("factor", factor, 0, 16, "(]")
    if flag("per_channel", per_channel) and "h" not in learn:
        raise ValueError('per_channel: it is of a learned step size; put "h" into learn')
    return HOResNet(
        tableau,
        branches // each,
        width=width,
        num_classes=num_classes,
        in_chans=in_chans,
        step=step,
        factor=factor,
        nested=nested,
        variant=variant,
        learn=learn,
        per_channel=per_channel,
        tol=tol,
        kappa=kappa,
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
