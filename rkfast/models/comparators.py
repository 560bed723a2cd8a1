"""The networks beside ResNet in Table 1 of HO-ResNet's paper (Luo et al., "Rethinking ResNets: Improved Stacking
Strategies With High Order Schemes"), in HO-ResNet's layout: RevNet, PolyNet, LM-ResNet and the second-order CNN."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from rkfast.models.base import MAX_CHANNELS, MAX_LAYERS, Family, common, flag, real, whole
from rkfast.models.one_period import OnePeriodNet
from rkfast.nn import (
    LeapfrogStep,
    LMStep,
    MultistepPeriod,
    Period,
    PolyStep,
    PreActBranch,
    RevPeriod,
    RevStep,
    SymmetricBranch,
    poly_branches,
)


def revnet(
    layers: str,
    *,
    width: int = 64,
    num_classes: int = 10,
    in_chans: int = 3,
    reversible: bool = True,
    fused: bool = True,
) -> OnePeriodNet:
    """F and G on half of the width: a quarter of the weights of HO-ResNet's branches; with width=128 as many."""
    steps = _steps(layers, width, num_classes, in_chans, fused, branches=2)
    flag("reversible", reversible)
    if width % 2:
        raise ValueError(f"width: expected an even number, of which F and G each have half, got {width}")

    def branch() -> nn.Module:
        return PreActBranch(width // 2, fused=fused)

    period = RevPeriod(
        *(RevStep(branch(), branch(), fused=fused) for _ in range(steps)),
        # Stock PyTorch keeps activations.
        reversible=reversible and fused,
    )
    return OnePeriodNet(period, width=width, num_classes=num_classes, in_chans=in_chans, fused=fused)


def polynet(
    layers: str, *, width: int = 64, num_classes: int = 10, in_chans: int = 3, fused: bool = True
) -> OnePeriodNet:
    """poly-2 steps; a layer that runs twice counts once, as its weights do. Its BatchNorms are two."""
    steps = _steps(layers, width, num_classes, in_chans, fused)
    period = Period(*(PolyStep(poly_branches(width, fused=fused), fused=fused) for _ in range(steps)))
    return OnePeriodNet(period, width=width, num_classes=num_classes, in_chans=in_chans, fused=fused)


def lm_resnet(
    layers: str, *, width: int = 64, num_classes: int = 10, in_chans: int = 3, fused: bool = True
) -> OnePeriodNet:
    """Linear two-step steps, all but the first with a k of their own."""
    steps = _steps(layers, width, num_classes, in_chans, fused)
    period = MultistepPeriod(
        *(LMStep(PreActBranch(width, fused=fused), first=i == 0, fused=fused) for i in range(steps))
    )
    return OnePeriodNet(period, width=width, num_classes=num_classes, in_chans=in_chans, fused=fused)


def hyperbolic(
    layers: str,
    *,
    width: int = 64,
    num_classes: int = 10,
    in_chans: int = 3,
    step: float = 1.0,
    symmetric: bool = False,
    fused: bool = True,
) -> OnePeriodNet:
    """Leapfrog steps. The table has a general F; ``symmetric`` takes Ruthotto and Haber's, half of whose layers are the
    transposes of the others and have no weights of their own."""
    steps = _steps(layers, width, num_classes, in_chans, fused)
    real("step", step, 0, 16, "(]")
    flag("symmetric", symmetric)
    branch: Callable[..., nn.Module] = SymmetricBranch if symmetric else PreActBranch
    period = MultistepPeriod(*(LeapfrogStep(branch(width, fused=fused), step=step, fused=fused) for _ in range(steps)))
    return OnePeriodNet(period, width=width, num_classes=num_classes, in_chans=in_chans, fused=fused)


def _steps(
    layers: str, width: object, num_classes: object, in_chans: object, fused: object, *, branches: int = 1
) -> int:
    """How many steps have ``layers`` layers: the stem, the linear layer and two convolutions per branch."""
    total = whole("layers", int(layers), 2 + 2 * branches, MAX_LAYERS)
    steps, odd = divmod(total - 2, 2 * branches)
    if odd:
        raise ValueError(
            f"layers: {total} does not fit, with {branches} of 2 layers per step; expected 2 + {2 * branches} * steps, "
            f"such as {2 + 8 * branches}"
        )
    whole("width", width, 1, MAX_CHANNELS)
    common(num_classes, in_chans, 0, fused)
    return steps


def _family(word: str, build: Callable[..., Any]) -> Family:
    names = [f"{word}-{layers}" for layers in (10, 18, 26, 30, 34, 58)]
    return Family(f"{word}-<layers>", re.compile(r"-(?P<layers>[0-9]{1,6})"), build, names, {})


FAMILIES = {build.__name__: _family(build.__name__, build) for build in (revnet, polynet, lm_resnet, hyperbolic)}
