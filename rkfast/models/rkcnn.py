"""RKCNN-E, -I and -R (Zhu et al., "Convolutional neural networks combined with Runge-Kutta methods", Neural Computing
and Applications, 2022; arXiv 1802.08831v7)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from torch import Tensor, nn

from rkfast.models.base import (
    MAX_CHANNELS,
    MAX_LAYERS,
    Family,
    ImageModel,
    common,
    flag,
    init_rk,
    per_period,
    rk_norm,
    whole,
)
from rkfast.nn import NormPool, RKCNNStep, Transition
from rkfast.nn.dense import NormLayer, concatenated
from rkfast.nn.step import asks_for_moments
from rkfast.ops import Moments

MAX_PERIODS = 8
MAX_STAGES = 256
MAX_STEPS = 256
MAX_NECK = 16
MAX_ROUNDS = 64


class RKCNN(ImageModel):
    """A 3x3 stem, periods of steps with transitions between them, and a linear layer over what they end with.

    Names and keys are those of the authors' code: ``fir_trans``, ``list_block`` with the steps of all periods,
    ``list_trans``, ``list_gb``, ``fc``. (Their training script saves a DataParallel, whose keys begin with ``module.``;
    torch.nn.modules.utils.consume_prefix_in_state_dict_if_present takes that away.)

    Args:
        method: "e", "i" or "r", as in RKCNNStep.
        stages: s of each period.
        growth_rate: k of each period, the channels of its state.
        steps: r of each period.
        rounds: of updates in each period.
        neck: the 1x1 convolutions of a period make neck * k channels.
        attention: attentional transitions.
        multiscale: the linear layer reads the final state of every period; False of the last alone.
        num_classes, in_chans: of output and input.
        drop_rate: of a dropout after each convolution of the steps and transitions.
        norm_layer: makes a BatchNorm of that many channels.
        fused: False takes stock PyTorch operations, with the same parameters and keys.

    Shape: Tensor [N, in_chans, H, W] -> [N, num_classes].

    forward_features returns the final states of the periods that the head reads, before its BatchNorm: a list with
    ``multiscale``, a Tensor without.
    """

    def __init__(
        self,
        method: str,
        stages: Sequence[int],
        growth_rate: Sequence[int],
        steps: Sequence[int],
        *,
        rounds: Sequence[int] | None = None,
        neck: int = 1,
        attention: bool = False,
        multiscale: bool = True,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        norm_layer: NormLayer = rk_norm,
        fused: bool = True,
    ) -> None:
        super().__init__(num_classes=num_classes, fused=fused)
        self.multiscale = multiscale
        self.steps = list(steps)
        self.fir_trans = nn.Conv2d(in_chans, growth_rate[0], 3, padding=1, bias=False)
        self.list_block = nn.ModuleList(
            RKCNNStep(method, s, k, neck=neck, rounds=update, drop_rate=drop_rate, norm_layer=norm_layer, fused=fused)
            for s, k, r, update in zip(stages, growth_rate, steps, rounds or [1] * len(stages), strict=True)
            for _ in range(r)
        )
        self.list_trans = nn.ModuleList(
            Transition(
                a, b, attention=attention, drop_rate=drop_rate, norm_layer=norm_layer, norm_name="bn", fused=fused
            )
            for a, b in itertools.pairwise(growth_rate)
        )
        read = growth_rate if multiscale else growth_rate[-1:]
        self.list_gb = nn.ModuleList(NormPool(k, norm_layer=norm_layer, norm_name="bn", fused=fused) for k in read)
        self.num_features = sum(read)
        self.fc = nn.Linear(self.num_features, num_classes)
        ends = [sum(self.steps[: t + 1]) - 1 for t in range(len(self.steps))]
        self.feature_info = [
            {"num_chs": k, "reduction": 2**t, "module": f"list_block.{end}"}
            for t, (k, end) in enumerate(zip(growth_rate, ends, strict=True))
        ]
        init_rk(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self._pooled(*self._states(x)))

    def forward_features(self, x: Tensor) -> Tensor | list[Tensor]:
        states = self._states(x)[0]
        return states if self.multiscale else states[0]

    def forward_head(self, features: Tensor | list[Tensor], pre_logits: bool = False) -> Tensor:
        states = [features] if isinstance(features, Tensor) else features
        pooled = self._pooled(states, [None] * len(states))
        return pooled if pre_logits else self.fc(pooled)

    def _pooled(self, states: Sequence[Tensor], known: Sequence[Moments | None]) -> Tensor:
        return concatenated([pool(y, m) for pool, y, m in zip(self.list_gb, states, known, strict=True)])

    def _states(self, x: Tensor) -> tuple[list[Tensor], list[Moments | None]]:
        """The final states of the periods that the head reads, and their moments where the head makes use of them."""
        states: list[Tensor] = []
        known: list[Moments | None] = []
        blocks = iter(self.list_block)
        y, last = self.fir_trans(x), len(self.steps) - 1
        moments: Moments | None = None
        for t, steps in enumerate(self.steps):
            readers = [self.list_trans[t]] if t < last else []
            if self.multiscale or t == last:
                readers.append(self.list_gb[len(states)])
            wanted = any(map(asks_for_moments, readers))
            for n in range(steps):
                y, moments = self._period(next(blocks), y, return_moments=wanted and n + 1 == steps)
            if self.multiscale or t == last:
                states.append(y)
                known.append(moments)
            if t < last:
                y = self.list_trans[t](y) if moments is None else self.list_trans[t](y, moments)
        return states, known


def build(
    method: str,
    stages: str,
    *,
    growth_rate: int | Sequence[int] = 36,
    steps: int | Sequence[int] = 1,
    rounds: int | Sequence[int] = 1,
    neck: int = 1,
    attention: bool = False,
    multiscale: bool = True,
    num_classes: int = 10,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    fused: bool = True,
) -> RKCNN:
    """``growth_rate``, ``steps`` and ``rounds`` are one for all periods, or one per period."""
    per = list(map(int, stages.split("_")))
    count = len(per)
    whole("name: the number of periods", count, 1, MAX_PERIODS)
    for t, s in enumerate(per):
        # An update reads the other stages, so there must be some.
        whole(f"name: stages of period {t + 1}", s, 1 if method == "e" else 2, MAX_STAGES)
    common(num_classes, in_chans, drop_rate, fused)
    rates = per_period("growth_rate", growth_rate, count, 1, MAX_CHANNELS)
    repeats = per_period("steps", steps, count, 1, MAX_STEPS)
    updates = per_period("rounds", rounds, count, 1, MAX_ROUNDS)
    if method == "e" and updates != [1] * count:
        raise ValueError("rounds: RKCNN-E has no updates; leave it out")
    layers = sum(s * r * (1 if method == "e" else 1 + u) for s, r, u in zip(per, repeats, updates, strict=True))
    if layers > MAX_LAYERS:
        raise ValueError(f"name: stages, steps and rounds come to {layers} layers; expected at most {MAX_LAYERS}")
    return RKCNN(
        method,
        per,
        rates,
        repeats,
        rounds=updates,
        neck=whole("neck", neck, 1, MAX_NECK),
        attention=flag("attention", attention),
        multiscale=flag("multiscale", multiscale),
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
        fused=fused,
    )


FAMILIES = {
    "rkcnn": Family(
        "rkcnn-<e|i|r>-<stages>_<stages>...",
        re.compile(r"-(?P<method>[eir])-(?P<stages>[0-9]{1,4}(?:_[0-9]{1,4}){0,31})"),
        build,
        [f"rkcnn-{method}-5_5_5" for method in "eir"],
        {},
    )
}
