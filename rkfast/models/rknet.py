"""RKNet, ERKNet and IRKNet (Zhu et al., "Convolutional Neural Networks combined with Runge-Kutta Methods", arXiv
1802.08831v6)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from rkfast.models.base import (
    MAX_CHANNELS,
    MAX_LAYERS,
    Family,
    ImageModel,
    common,
    flag,
    init_rk,
    one_of,
    per_period,
    rk_norm,
    whole,
)
from rkfast.nn import ERKStep, IRKStep, MultiscaleHead, Period, TimePeriod, Transition, batch_norm_relu
from rkfast.nn.dense import NormLayer
from rkfast.nn.step import asks_for_moments
from rkfast.ops import Moments

METHODS = ("erk", "irk")
STEMS = ("cifar", "imagenet")
MAX_PERIODS = 8
MAX_STAGES = 256
MAX_STEPS = 256
MAX_NECK = 16
MAX_ROUNDS = 64


@dataclass(frozen=True)
class PeriodSpec:
    """What a period is made of: ``method`` "erk" or "irk", s ``stages``, r ``steps``, ``growth_rate`` k, and m growths
    per stage (1 with "irk"). Its state has m * k channels."""

    method: str
    stages: int
    steps: int
    growth_rate: int
    m: int = 1

    @property
    def channels(self) -> int:
        return self.m * self.growth_rate


class Stem(nn.Module):
    """From the image to y: a 3x3 convolution alone (``kind="cifar"``), or 7x7 with stride 2, BatchNorm, ReLU and max
    pooling ("imagenet")."""

    def __init__(
        self,
        kind: str,
        in_chans: int,
        channels: int,
        *,
        norm_layer: NormLayer = rk_norm,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.fused = fused
        self.reduction = 4 if kind == "imagenet" else 1
        if kind == "imagenet":
            self.conv = nn.Conv2d(in_chans, channels, 7, stride=2, padding=3, bias=False)
            self.norm = norm_layer(channels)
            self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x if self.reduction == 1 else self.pool(batch_norm_relu(self.norm, x, fused=self.fused))


class RKNet(ImageModel):
    """Stem, periods of Runge-Kutta steps with transitions between them, and a linear layer over what they end with.

    Args:
        periods: what each is made of.
        stem: "cifar" or "imagenet", as in Stem.
        bottleneck: the "B" of the names.
        neck: width of the bottleneck in multiples of k; None is the paper's 4 in ERK and 1 in IRK periods.
        attention: attentional transitions, the "A" of the names.
        multiscale: the head reads the final state of every period; False of the last alone.
        rounds: of updates in IRK periods, as in CliqueBlock.
        time_channel: the network of Appendix C, of ERK periods with one stage.
        num_classes, in_chans: of output and input.
        drop_rate: of a dropout after each convolution of the periods and transitions.
        norm_layer: makes a BatchNorm of that many channels.
        fused: False takes stock PyTorch operations, with the same parameters and keys.

    Shape: Tensor [N, in_chans, H, W] -> [N, num_classes].

    forward_features returns the final states of the periods that the head reads, before its BatchNorm: a list with
    ``multiscale``, a Tensor without.
    """

    _classifier = "head.fc"

    def __init__(
        self,
        periods: Sequence[PeriodSpec],
        *,
        stem: str = "cifar",
        bottleneck: bool = False,
        neck: int | None = None,
        attention: bool = False,
        multiscale: bool = True,
        rounds: int = 1,
        time_channel: bool = False,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        norm_layer: NormLayer = rk_norm,
        fused: bool = True,
    ) -> None:
        super().__init__(num_classes=num_classes, fused=fused)
        self.multiscale = multiscale
        widths = [spec.channels for spec in periods]
        self.stem = Stem(stem, in_chans, widths[0], norm_layer=norm_layer, fused=fused)
        self.periods = nn.ModuleList()
        for spec in periods:
            width = (neck or (4 if spec.method == "erk" else 1)) * spec.growth_rate if bottleneck else None
            steps: list[nn.Module] = []
            for _ in range(spec.steps):
                if spec.method == "erk":
                    step: nn.Module = ERKStep(
                        spec.stages,
                        spec.growth_rate,
                        m=spec.m,
                        bottleneck=width,
                        drop_rate=drop_rate,
                        norm_layer=norm_layer,
                        time_channel=time_channel,
                        fused=fused,
                    )
                else:
                    step = IRKStep(
                        spec.stages,
                        spec.growth_rate,
                        bottleneck=width,
                        rounds=rounds,
                        drop_rate=drop_rate,
                        norm_layer=norm_layer,
                        fused=fused,
                    )
                steps.append(step)
            self.periods.append((TimePeriod if time_channel else Period)(*steps))
        self.transitions = nn.ModuleList(
            Transition(a, b, attention=attention, drop_rate=drop_rate, norm_layer=norm_layer, fused=fused)
            for a, b in itertools.pairwise(widths)
        )
        read = widths if multiscale else widths[-1:]
        self.head = MultiscaleHead(read, num_classes, norm_layer=norm_layer, fused=fused)
        self.num_features = sum(read)
        self.feature_info = [
            {"num_chs": c, "reduction": self.stem.reduction * 2**t, "module": f"periods.{t}"}
            for t, c in enumerate(widths)
        ]
        init_rk(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(*self._states(x))

    def forward_features(self, x: Tensor) -> Tensor | list[Tensor]:
        states = self._states(x)[0]
        return states if self.multiscale else states[0]

    def forward_head(self, features: Tensor | list[Tensor], pre_logits: bool = False) -> Tensor:
        states = [features] if isinstance(features, Tensor) else features
        return self.head(states, pre_logits=pre_logits)

    def step_sizes(self) -> list[list[float]]:
        """h_n/u of every step of every period of a network with a time channel (Table 4)."""
        return [period.step_sizes() for period in self._time_periods()]

    def times(self) -> list[list[float]]:
        """T_n/u at the beginning of every step of every period, and at its end."""
        return [period.times() for period in self._time_periods()]

    def _time_periods(self) -> list[TimePeriod]:
        periods = [period for period in self.periods if isinstance(period, TimePeriod)]
        if len(periods) < len(self.periods):
            raise RuntimeError("the model has no time channel, so its step sizes are part of its weights")
        return periods

    def _states(self, x: Tensor) -> tuple[list[Tensor], list[Moments | None]]:
        """The final states of the periods that the head reads, and their moments where the head makes use of them."""
        states: list[Tensor] = []
        known: list[Moments | None] = []
        y, last = self.stem(x), len(self.periods) - 1
        for t, period in enumerate(self.periods):
            readers = [self.transitions[t]] if t < last else []
            if self.multiscale or t == last:
                readers.append(self.head.pools[len(states)])
            y, moments = self._period(period, y, return_moments=any(map(asks_for_moments, readers)))
            if self.multiscale or t == last:
                states.append(y)
                known.append(moments)
            if t < last:
                y = self.transitions[t](y) if moments is None else self.transitions[t](y, moments)
        return states, known


def build(
    periods: str,
    suffix: str | None,
    *,
    methods: str | Sequence[str] = "erk",
    growth_rate: int | Sequence[int] = 36,
    m: int | Sequence[int] = 1,
    stem: str = "cifar",
    multiscale: bool | None = None,
    neck: int | None = None,
    rounds: int = 1,
    time_channel: bool = False,
    num_classes: int = 10,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    fused: bool = True,
) -> RKNet:
    """``methods``, ``growth_rate`` and ``m`` are one for all periods, or one per period (section 3.2); ``multiscale``
    is on with the CIFAR stem and off with ImageNet's unless given."""
    terms = [tuple(map(int, term.split("x"))) for term in periods.split("_")]
    count = len(terms)
    whole("name: the number of periods", count, 1, MAX_PERIODS)
    for t, (stages, steps) in enumerate(terms):
        whole(f"name: stages of period {t + 1}", stages, 1, MAX_STAGES)
        whole(f"name: steps of period {t + 1}", steps, 1, MAX_STEPS)
    common(num_classes, in_chans, drop_rate, fused)
    one_of("stem", stem, STEMS)
    rates = per_period("growth_rate", growth_rate, count, 1, MAX_CHANNELS)
    growths = per_period("m", m, count, 1, MAX_LAYERS)
    if isinstance(methods, str):
        methods = [methods] * count
    elif not isinstance(methods, Sequence):
        raise TypeError(f"methods: expected a str, or one per period, got {methods!r}")
    if len(methods) != count:
        raise ValueError(f"methods: {len(methods)} values for {count} periods; give one for all, or one per period")
    bottleneck = "b" in (suffix or "")
    if neck is not None:
        whole("neck", neck, 1, MAX_NECK)
        if not bottleneck:
            raise ValueError("neck: the width of a bottleneck, which goes with a name that ends in -b or -ab")
    whole("rounds", rounds, 1, MAX_ROUNDS)
    flag("time_channel", time_channel)
    layers = 0
    for t, (method, (stages, steps)) in enumerate(zip(methods, terms, strict=True)):
        one_of("methods", method, METHODS)
        if method == "irk" and stages < 2:
            raise ValueError(f"name: an irk period has at least 2 stages, but period {t + 1} has {stages}")
        if method == "irk" and growths[t] != 1:
            raise ValueError(f"m: expected 1 in an irk period, got {growths[t]} for period {t + 1}")
        if time_channel and (method != "erk" or stages != 1):
            raise ValueError(
                f"time_channel: goes with erk periods of 1 stage, but period {t + 1} is {method} with {stages}"
            )
        layers += stages * steps * (growths[t] if method == "erk" else 1 + rounds)
    if layers > MAX_LAYERS:
        raise ValueError(f"name: stages, steps and m come to {layers} layers; expected at most {MAX_LAYERS}")
    return RKNet(
        [
            PeriodSpec(method, stages, steps, k, growth)
            for method, (stages, steps), k, growth in zip(methods, terms, rates, growths, strict=True)
        ],
        stem=stem,
        bottleneck=bottleneck,
        neck=neck,
        attention="a" in (suffix or ""),
        multiscale=stem == "cifar" if multiscale is None else flag("multiscale", multiscale),
        rounds=rounds,
        time_channel=time_channel,
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
        fused=fused,
    )


_PATTERN = re.compile(r"-(?P<periods>[0-9]{1,4}x[0-9]{1,4}(?:_[0-9]{1,4}x[0-9]{1,4}){0,31})(?:-(?P<suffix>ab?|b))?")
_FORM = "-<stages>x<steps>_...[-a|-b|-ab]"
FAMILIES = {
    "erknet": Family(
        f"erknet{_FORM}",
        _PATTERN,
        build,
        [
            *(f"erknet-{p}" for p in ("6x1_6x1_6x1", "7x1_6x1_6x1", "7x1_7x1_6x1", "7x1_7x1_7x1")),
            *(f"erknet-{p}-b" for p in ("3x1_3x1_3x1_1x1", "3x1_3x1_4x1_2x1", "3x1_3x1_6x1_2x1")),
        ],
        {"methods": "erk", "rounds": 1},
    ),
    "irknet": Family(
        f"irknet{_FORM}",
        _PATTERN,
        build,
        [
            *(f"irknet-{p}" for p in ("3x1_3x1_3x1", "4x1_3x1_3x1", "4x1_4x1_3x1", "4x1_4x1_4x1")),
            *(f"irknet-{p}" for p in ("5x1_5x1_5x1-ab", "5x1_5x1_5x1-a", "6x1_6x1_6x1-a")),
        ],
        {"methods": "irk", "m": 1, "time_channel": False},
    ),
    "rknet": Family(f"rknet{_FORM}", _PATTERN, build, ["rknet-3x2_4x1_2x5_1x1", "rknet-1x8_1x2_1x2-b"], {}),
}
