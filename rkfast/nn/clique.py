"""Clique connections: CliqueNet's block, the implicit Runge-Kutta step that is made of it, and the steps of RKCNN."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rkfast.nn.dense import NormLayer, concatenated, dropout, scaled
from rkfast.nn.norm import as_norm, fusible, group_of, one_group, plain_conv
from rkfast.nn.step import weighted_sum
from rkfast.ops import Moments, Norm, Stages, clique_block, dense_block
from rkfast.ops.dense_block import kernel_reason


def _norms(modules: Iterable[nn.Module]) -> list[Norm]:
    return [as_norm(cast(nn.BatchNorm2d, norm)) for norm in modules]


class CliqueBlock(nn.Module):
    """CliqueNet's block, Stage-I and Stage-II with shared weights (Yang et al., "Convolutional Neural Networks with
    Alternately Updated Clique", section 3).

    With W_ji the weights from j to i, j = 0 being the input y::

        Stage-I    v_i = sum_{j<i} W_ji * relu(norm([y, v_1, ..., v_{i-1}]))_j
        Stage-II   z_i = sum_{0<j!=i} W_ji * relu(norm([z_1, ..., z_{i-1}, v_{i+1}, ..., v_s]))_j

    The weights are shared, every BatchNorm is of one stage alone. With a bottleneck W_ji are 1x1, and their sum goes
    through BatchNorm, ReLU and a 3x3 convolution that both stages share as well.

    Args:
        in_channels: C of y.
        growth_rate: k, channels of each v_i and z_i.
        stages: s, at least 2.
        bottleneck: channels that the 1x1 convolutions make; None for 3x3 convolutions without bottleneck.
        rounds: how often Stage-II is run, each with BatchNorms of its own; a further round starts from the z_i of the
            one before.
        drop_rate: of a dropout after each convolution.
        norm_layer: makes a BatchNorm of that many channels.
        memory: "speed" keeps the bottlenecks for the backward, "min" makes them again (fused only).
        fused: False takes stock PyTorch operations, with the same parameters and keys.

    Parameters: ``weight1[i]`` [width, C + (s - 1) * k, ...] holds W_0i, W_1i, ..., W_si without W_ii, so that Stage-I
    reads a prefix of it and Stage-II all but W_0i; ``weight2[i]`` [k, width, 3, 3] with a bottleneck.

    Shape: Tensor [N, C, H, W] -> [N, s * k, H, W], the last z_1, ..., z_s.

    Raises:
        ValueError: there are fewer than 2 stages or no rounds, or a number of channels is less than 1.
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        stages: int,
        *,
        bottleneck: int | None = None,
        rounds: int = 1,
        drop_rate: float = 0.0,
        norm_layer: NormLayer = nn.BatchNorm2d,
        memory: str = "speed",
        fused: bool = True,
    ) -> None:
        super().__init__()
        if stages < 2:
            raise ValueError(f"stages: Stage-II updates each stage from the others; expected at least 2, got {stages}")
        for name, value in (("in_channels", in_channels), ("growth_rate", growth_rate), ("rounds", rounds)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        c, k, s = in_channels, growth_rate, stages
        width, kernel = (k, 3) if bottleneck is None else (bottleneck, 1)
        self.in_channels = c
        self.growth_rate = k
        self.stages = s
        self.rounds = rounds
        self.drop_rate = drop_rate
        self.memory = memory
        self.fused = fused
        self.weight1 = nn.ParameterList(torch.empty(width, c + (s - 1) * k, kernel, kernel) for _ in range(s))
        self.init_norm1 = nn.ModuleList(norm_layer(c + i * k) for i in range(s))
        self.update_norm1 = nn.ModuleList(norm_layer((s - 1) * k) for _ in range(rounds * s))
        self.weight2: nn.ParameterList | None = None
        if bottleneck is not None:
            self.weight2 = nn.ParameterList(torch.empty(k, width, 3, 3) for _ in range(s))
            self.init_norm2 = nn.ModuleList(norm_layer(width) for _ in range(s))
            self.update_norm2 = nn.ModuleList(norm_layer(width) for _ in range(rounds * s))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He-normal, fan-in, each W_ji as a convolution of its own."""
        for weight in self.weight1:
            taps = weight.shape[2] * weight.shape[3]
            with torch.no_grad():
                weight[:, : self.in_channels].normal_(0, math.sqrt(2 / (self.in_channels * taps)))
                weight[:, self.in_channels :].normal_(0, math.sqrt(2 / (self.growth_rate * taps)))
        for weight in self.weight2 or ():
            nn.init.kaiming_normal_(weight, nonlinearity="relu")

    def forward(self, y: Tensor, steps: Tensor | None = None) -> Tensor:
        """steps: a factor of v_i and z_i, Tensor [s, k]; None is 1."""
        if self._fusible(y):
            return self._block(y, sum=False, steps=steps)
        return concatenated(self._plain(y, steps))

    def _fusible(self, y: Tensor) -> bool:
        norms = [*self.init_norm1, *self.update_norm1]
        if self.weight2 is not None:
            norms += [*self.init_norm2, *self.update_norm2]
        return (
            self.fused
            and y.dim() == 4
            and kernel_reason(y, group_of(norms[0])) is None
            and one_group(norms)
            and all(map(fusible, norms))
        )

    def _block(
        self,
        y: Tensor,
        *,
        sum: bool,
        moments: Moments | None = None,
        return_moments: bool = False,
        steps: Tensor | None = None,
    ) -> Any:
        c, k = self.in_channels, self.growth_rate
        weight1, weight2 = self._weights(steps)
        neck = self.weight2 is not None
        return clique_block(
            y,
            Stages(
                [w[:, : c + i * k] for i, w in enumerate(weight1)],
                _norms(self.init_norm1),
                weight2,
                _norms(self.init_norm2) if neck else (),
            ),
            Stages(
                [w[:, c:] for w in weight1],
                _norms(self.update_norm1),
                weight2,
                _norms(self.update_norm2) if neck else (),
            ),
            rounds=self.rounds,
            sum=sum,
            drop_rate=self.drop_rate,
            training=self.training,
            memory=self.memory,
            moments=moments,
            return_moments=return_moments,
        )

    def _weights(self, steps: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """weight1 and weight2, those that make v_i and z_i multiplied by their steps."""
        if self.weight2 is None:
            return list(self.weight1) if steps is None else scaled(list(self.weight1), steps), []
        return list(self.weight1), list(self.weight2) if steps is None else scaled(list(self.weight2), steps)

    def _plain(self, y: Tensor, steps: Tensor | None = None) -> list[Tensor]:
        """z_1, ..., z_s."""
        s = self.stages
        weight1, weight2 = self._weights(steps)
        newest: list[Tensor] = []
        for i in range(s):
            x = concatenated([y, *newest])
            weight = weight1[i][:, : x.shape[1]]
            neck = (self.init_norm2[i], weight2[i]) if weight2 else None
            newest.append(self._unit(x, self.init_norm1[i], weight, neck))
        for n in range(self.rounds * s):
            i = n % s
            x = concatenated(newest[:i] + newest[i + 1 :])
            weight = weight1[i][:, self.in_channels :]
            neck = (self.update_norm2[n], weight2[i]) if weight2 else None
            newest[i] = self._unit(x, self.update_norm1[n], weight, neck)
        return newest

    def _unit(self, x: Tensor, norm1: nn.Module, weight1: Tensor, neck: tuple[nn.Module, Tensor] | None) -> Tensor:
        x = F.conv2d(F.relu(norm1(x)), weight1, padding=weight1.shape[2] // 2)
        x = dropout(x, self.drop_rate, self.training)
        if neck is not None:
            norm2, weight2 = neck
            x = F.conv2d(F.relu(norm2(x)), weight2, padding=1)
            x = dropout(x, self.drop_rate, self.training)
        return x

    def extra_repr(self) -> str:
        return f"stages={self.stages}, rounds={self.rounds}, fused={self.fused}"


class IRKStep(CliqueBlock):
    """An implicit Runge-Kutta step with s stages as a clique block and a sum (Zhu et al., "Convolutional Neural
    Networks combined with Runge-Kutta Methods", section 3.3.2).

    Stage-I makes first values v_i of the increments h b_i z_i, Stage-II updates each from all others, which takes the
    place of Newton's method::

        y' = y + sum_i h b_i z_i

    Args:
        stages: s, at least 2.
        growth_rate: k, channels of y and of every stage.
        bottleneck, rounds, drop_rate, norm_layer, memory, fused: as in CliqueBlock.

    Shape: Tensor [N, k, H, W] -> [N, k, H, W].

    Raises:
        ValueError: as in CliqueBlock.
    """

    def __init__(
        self,
        stages: int,
        growth_rate: int,
        *,
        bottleneck: int | None = None,
        rounds: int = 1,
        drop_rate: float = 0.0,
        norm_layer: NormLayer = nn.BatchNorm2d,
        memory: str = "speed",
        fused: bool = True,
    ) -> None:
        super().__init__(
            growth_rate,
            growth_rate,
            stages,
            bottleneck=bottleneck,
            rounds=rounds,
            drop_rate=drop_rate,
            norm_layer=norm_layer,
            memory=memory,
            fused=fused,
        )

    def forward(self, y: Tensor) -> Tensor:  # type: ignore[override]  # its step is within
        return self.forward_with_moments(y)[0]

    def forward_with_moments(
        self, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        """The step, taking y's moments if they are known, and leaving those of y' if asked for (and fused)."""
        if self._fusible(y):
            if group_of(self.init_norm1[0]):
                return self._block(y, sum=True), None
            result = self._block(y, sum=True, moments=moments, return_moments=return_moments)
            return result if return_moments else (result, None)
        return weighted_sum(y, self._plain(y), [1.0] * self.stages, fused=self.fused, return_moments=return_moments)


class RKCNNStep(nn.Module):
    """A step of RKCNN-E, -I or -R (Zhu et al., "Convolutional neural networks combined with Runge-Kutta methods",
    Neural Computing and Applications, 2022: the later model, whose update has weights of its own and reads y).

    Every stage is ``f(x) = conv_3x3(relu(bn_3x3(conv_1x1(relu(bn_1x1(x))))))``, every update another of that form::

        v_i = f_i([y, v_1, ..., v_{i-1}])
        E:  z_i = v_i
        I:  z_i = g_i([y, z_1, ..., z_{i-1}, v_{i+1}, ..., v_s])
        R:  z_i = g_i([y, v_1, ..., v_{i-1}, v_{i+1}, ..., v_s])
        y' = y + sum_i z_i

    Names and keys are those of the authors' code.

    Args:
        method: "e", "i" or "r".
        stages: s.
        growth_rate: k, channels of y and of every stage.
        neck: the 1x1 convolutions make neck * k channels.
        rounds: of updates by I and R, all with the same weights and BatchNorms.
        drop_rate: of a dropout after each convolution.
        norm_layer: makes a BatchNorm of that many channels.
        memory: "speed" keeps the bottlenecks for the backward, "min" makes them again (fused only).
        fused: False takes stock PyTorch operations, with the same parameters and keys.

    Shape: Tensor [N, k, H, W] -> [N, k, H, W].

    Raises:
        ValueError: there is no such method, or a number is less than 1.
    """

    def __init__(
        self,
        method: str,
        stages: int,
        growth_rate: int,
        *,
        neck: int = 1,
        rounds: int = 1,
        drop_rate: float = 0.0,
        norm_layer: NormLayer = nn.BatchNorm2d,
        memory: str = "speed",
        fused: bool = True,
    ) -> None:
        super().__init__()
        if method not in ("e", "i", "r"):
            raise ValueError(f"method: expected 'e', 'i' or 'r', got {method!r}")
        for name, value in (("stages", stages), ("growth_rate", growth_rate), ("neck", neck), ("rounds", rounds)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        s, k, width = stages, growth_rate, neck * growth_rate
        self.method = method
        self.stages = s
        self.rounds = rounds
        self.drop_rate = drop_rate
        self.memory = memory
        self.fused = fused
        self.init_bn_1x1 = nn.ModuleList(norm_layer((i + 1) * k) for i in range(s))
        self.init_bn_3x3 = nn.ModuleList(norm_layer(width) for _ in range(s))
        self.conv_1x1 = nn.ModuleList(nn.Conv2d((i + 1) * k, width, 1, bias=False) for i in range(s))
        self.conv_3x3 = nn.ModuleList(nn.Conv2d(width, k, 3, padding=1, bias=False) for _ in range(s))
        if method != "e":
            self.update_bn_1x1 = nn.ModuleList(norm_layer(s * k) for _ in range(s))
            self.update_bn_3x3 = nn.ModuleList(norm_layer(width) for _ in range(s))
            self.conv_1x1_update = nn.ModuleList(nn.Conv2d(s * k, width, 1, bias=False) for _ in range(s))
            self.conv_3x3_update = nn.ModuleList(nn.Conv2d(width, k, 3, padding=1, bias=False) for _ in range(s))

    def forward(self, y: Tensor) -> Tensor:
        return self.forward_with_moments(y)[0]

    def forward_with_moments(
        self, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        """The step, taking y's moments if they are known, and leaving those of y' if asked for (and fused)."""
        if self._fusible(y):
            if group_of(self.init_bn_1x1[0]):
                return self._block(y, None, False), None
            result = self._block(y, moments, return_moments)
            return result if return_moments else (result, None)
        return weighted_sum(y, self._plain(y), [1.0] * self.stages, fused=self.fused, return_moments=return_moments)

    def _fusible(self, y: Tensor) -> bool:
        norms, convs = [*self.init_bn_1x1, *self.init_bn_3x3], [*self.conv_1x1, *self.conv_3x3]
        if self.method != "e":
            norms += [*self.update_bn_1x1, *self.update_bn_3x3]
            convs += [*self.conv_1x1_update, *self.conv_3x3_update]
        return (
            self.fused
            and y.dim() == 4
            and (self.method == "e" or self.stages > 1)
            and not (self.method == "r" and self.rounds > 1)
            and kernel_reason(y, group_of(norms[0])) is None
            and one_group(norms)
            and all(map(fusible, norms))
            and all(map(plain_conv, convs))
        )

    def _block(self, y: Tensor, moments: Moments | None, return_moments: bool) -> Any:
        def weights(convs: Iterable[nn.Module]) -> list[Tensor]:
            return [cast(nn.Conv2d, conv).weight for conv in convs]

        init = Stages(
            weights(self.conv_1x1), _norms(self.init_bn_1x1), weights(self.conv_3x3), _norms(self.init_bn_3x3)
        )
        if self.method == "e":
            return dense_block(
                y,
                *init,
                sum_of=self.stages,
                drop_rate=self.drop_rate,
                training=self.training,
                memory=self.memory,
                moments=moments,
                return_moments=return_moments,
            )
        return clique_block(
            y,
            init,
            Stages(
                weights(self.conv_1x1_update),
                _norms(self.update_bn_1x1),
                weights(self.conv_3x3_update),
                _norms(self.update_bn_3x3),
            ),
            read_input=True,
            newest=self.method == "i",
            rounds=self.rounds,
            drop_rate=self.drop_rate,
            training=self.training,
            memory=self.memory,
            moments=moments,
            return_moments=return_moments,
        )

    def _plain(self, y: Tensor) -> list[Tensor]:
        """z_1, ..., z_s."""
        newest: list[Tensor] = []
        for units in zip(self.init_bn_1x1, self.conv_1x1, self.init_bn_3x3, self.conv_3x3, strict=True):
            newest.append(self._unit(concatenated([y, *newest]), units))
        if self.method == "e":
            return newest
        for _ in range(self.rounds):
            # I replaces a value as soon as it is there; R reads the previous round's to its end.
            read = newest if self.method == "i" else list(newest)
            updates = zip(
                self.update_bn_1x1, self.conv_1x1_update, self.update_bn_3x3, self.conv_3x3_update, strict=True
            )
            for i, units in enumerate(updates):
                newest[i] = self._unit(concatenated([y, *read[:i], *read[i + 1 :]]), units)
        return newest

    def _unit(self, x: Tensor, units: Sequence[nn.Module]) -> Tensor:
        bn_1x1, conv_1x1, bn_3x3, conv_3x3 = units
        x = dropout(conv_1x1(F.relu(bn_1x1(x))), self.drop_rate, self.training)
        return dropout(conv_3x3(F.relu(bn_3x3(x))), self.drop_rate, self.training)

    def extra_repr(self) -> str:
        return f"{self.method}, stages={self.stages}, rounds={self.rounds}, fused={self.fused}"
