"""Dense connections: DenseNet's layer and block, and the explicit Runge-Kutta step that is made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rkfast.nn.norm import as_norm, fusible, group_of, hooked, one_group, plain_conv
from rkfast.nn.step import Period, weighted_sum
from rkfast.ops import Moments, dense_block
from rkfast.ops.dense_block import kernel_reason

NormLayer = Callable[[int], nn.Module]


def concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """``torch.cat(tensors, 1)``, without the copy that it makes of a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), 1)


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    return F.dropout(x, rate, training) if rate > 0 else x


def scaled(weights: Sequence[Tensor], steps: Tensor) -> list[Tensor]:
    """Convolutions whose results are multiplied by steps, Tensor [len(weights), C_out]."""
    return [w * h.to(w.dtype)[:, None, None, None] for w, h in zip(weights, steps.unbind(), strict=True)]


class DenseLayer(nn.Module):
    """One growth of a dense block, in stock PyTorch operations (Huang et al., "Densely Connected Convolutional
    Networks", section 3).

    ``conv1(relu1(norm1(x)))`` with a 3x3 convolution; with a bottleneck ``conv2(relu2(norm2(conv1(relu1(norm1(x))))))``
    with a 1x1 and a 3x3 convolution. Names and keys are torchvision's.

    Args:
        in_channels: C of the input.
        growth_rate: k, channels of the output.
        bottleneck: width of the 1x1 convolution; None for none.
        drop_rate: of a dropout after each convolution.
        norm_layer: makes a BatchNorm of that many channels.
        time_channel: conv1 reads one channel more, which comes after norm1 and relu1 and is filled with the time.

    Shape: Tensor [N, C, H, W] -> [N, k, H, W]; time: Tensor [].
    """

    def __init__(
        self,
        in_channels: int,
        growth_rate: int,
        *,
        bottleneck: int | None = None,
        drop_rate: float = 0.0,
        norm_layer: NormLayer = nn.BatchNorm2d,
        time_channel: bool = False,
    ) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.has_bottleneck = bottleneck is not None
        self.norm1 = norm_layer(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        read = in_channels + time_channel
        if bottleneck is None:
            self.conv1 = nn.Conv2d(read, growth_rate, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(read, bottleneck, 1, bias=False)
            self.norm2 = norm_layer(bottleneck)
            self.relu2 = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(bottleneck, growth_rate, 3, padding=1, bias=False)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        x = self.relu1(self.norm1(x))
        if time is not None:
            # Not before: BatchNorm would make a constant channel zero.
            x = torch.cat([x, time.to(x.dtype).expand(x.shape[0], 1, *x.shape[2:])], 1)
        x = dropout(self.conv1(x), self.drop_rate, self.training)
        if self.has_bottleneck:
            x = dropout(self.conv2(self.relu2(self.norm2(x))), self.drop_rate, self.training)
        return x

    def fusible(self) -> bool:
        """Whether dense_block does what calling this layer would do."""
        parts = self.parts()
        return (
            type(self) is DenseLayer
            and len(parts) == (6 if self.has_bottleneck else 3)
            and not hooked(self)
            and all(
                fusible(norm) and type(relu) is nn.ReLU and not hooked(relu) and plain_conv(conv)
                for norm, relu, conv in (parts[i : i + 3] for i in range(0, len(parts), 3))
            )
        )

    def parts(self) -> tuple[Any, ...]:
        """norm1, relu1, conv1 and, with a bottleneck, norm2, relu2, conv2; attributes would take ten times as long."""
        return tuple(self._modules.values())


class DenseBlock(nn.ModuleDict):
    """DenseNet's block: each layer reads the input and what all earlier layers made (Huang et al., equation 2).

    ``g_i = layer_i([y, g_1, ..., g_{i-1}])``; the block returns ``[y, g_1, ..., g_layers]``, concatenated. Its children
    ``denselayer1``, ... have torchvision's keys.

    Args:
        layers: how many.
        in_channels: C of the input.
        growth_rate: k, channels that each layer adds.
        bottleneck, drop_rate, norm_layer, time_channel: as in DenseLayer.
        memory: "speed" keeps the bottlenecks for the backward, "min" makes them again (fused only).
        fused: False takes stock PyTorch operations, with the same parameters and keys.

    Shape: Tensor [N, C, H, W] -> [N, C + layers * k, H, W].
    """

    def __init__(
        self,
        layers: int,
        in_channels: int,
        growth_rate: int,
        *,
        bottleneck: int | None = None,
        drop_rate: float = 0.0,
        norm_layer: NormLayer = nn.BatchNorm2d,
        time_channel: bool = False,
        memory: str = "speed",
        fused: bool = True,
    ) -> None:
        super().__init__(
            {
                f"denselayer{i + 1}": DenseLayer(
                    in_channels + i * growth_rate,
                    growth_rate,
                    bottleneck=bottleneck,
                    drop_rate=drop_rate,
                    norm_layer=norm_layer,
                    time_channel=time_channel,
                )
                for i in range(layers)
            }
        )
        self.in_channels = in_channels
        self.growth_rate = growth_rate
        self.drop_rate = drop_rate
        self.time_channel = time_channel
        self.memory = memory
        self.fused = fused

    def forward(self, y: Tensor, steps: Tensor | None = None) -> Tensor:
        """steps: a factor of each growth's channels before it joins, Tensor [layers, k]; None is 1."""
        return self._block(y, steps=steps) if self._fusible(y) else self._plain(y, steps=steps)

    def forward_with_moments(
        self, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        """The block, taking y's moments if they are known, and leaving those of its result if asked for (and fused)."""
        if not self._fusible(y):
            return self._plain(y), None
        if self._group():
            return self._block(y), None
        result = self._block(y, None, moments, return_moments)
        return result if return_moments else (result, None)

    def _fusible(self, y: Tensor) -> bool:
        if not self.fused or self.time_channel or y.dim() != 4 or kernel_reason(y, self._group()) is not None:
            return False
        layers = self._layers()
        one_mode = self.drop_rate == 0 or len({layer.training for layer in layers}) == 1
        return (
            one_mode
            and all(layer.fusible() for layer in layers)
            and one_group([norm for layer in layers for norm in layer.parts()[::3]])
        )

    def _layers(self) -> list[Any]:
        return list(self._modules.values())

    def _group(self) -> str:
        """Of processes that share the batch; moments of one of them are of no use then."""
        return group_of(cast(nn.Module, next(iter(self.values())).norm1))

    def _block(
        self,
        y: Tensor,
        sum_of: int | None = None,
        moments: Moments | None = None,
        return_moments: bool = False,
        *,
        steps: Tensor | None = None,
    ) -> Any:
        layers = self._layers()
        parts = [layer.parts() for layer in layers]
        necks = parts if layers[0].has_bottleneck else []
        weights1, weights2 = [part[2].weight for part in parts], [part[5].weight for part in necks]
        if steps is not None:
            weights1, weights2 = (weights1, scaled(weights2, steps)) if necks else (scaled(weights1, steps), [])
        return dense_block(
            y,
            weights1,
            [as_norm(part[0]) for part in parts],
            weights2,
            [as_norm(part[3]) for part in necks],
            sum_of=sum_of,
            drop_rate=self.drop_rate,
            training=layers[0].training,
            memory=self.memory,
            moments=moments,
            return_moments=return_moments,
        )

    def _plain(self, y: Tensor, time: Tensor | None = None, *, steps: Tensor | None = None) -> Tensor:
        slots = [y]
        for i, layer in enumerate(self.values()):
            growth = layer(concatenated(slots), time)
            slots.append(growth if steps is None else growth * steps[i].to(growth.dtype)[:, None, None])
        return concatenated(slots)

    def extra_repr(self) -> str:
        return f"fused={self.fused}"


class ERKStep(DenseBlock):
    """An explicit Runge-Kutta step with s stages as a dense block and a sum (Zhu et al., "Convolutional Neural Networks
    combined with Runge-Kutta Methods", section 3.3.1).

    Every m growths of k channels make one increment ``h b_i z_i = E_i(y, h b_1 z_1, ..., h b_{i-1} z_{i-1})`` of m * k
    channels, as many as y has; coefficients and step size are learned within the convolutions::

        y' = y + sum_i h b_i z_i

    Args:
        stages: s.
        growth_rate: k.
        m: growths per stage.
        bottleneck, drop_rate, norm_layer: as in DenseLayer.
        memory: as in DenseBlock.
        time_channel: the step of Appendix C, with one stage: the growths read the time T/u besides, make Q(T/u, y), and
            ``y' = y + (h/u) Q``. h/u is one scalar, which cannot be negative: the square of the parameter
            ``sqrt_step``, 1 at first.
        fused: False takes stock PyTorch operations, with the same parameters and keys.

    Shape: Tensor [N, m * k, H, W] -> [N, m * k, H, W].

    Raises:
        ValueError: stages, m or growth_rate is less than 1, or a time channel is asked for with several stages.
    """

    def __init__(
        self,
        stages: int,
        growth_rate: int,
        *,
        m: int = 1,
        bottleneck: int | None = None,
        drop_rate: float = 0.0,
        norm_layer: NormLayer = nn.BatchNorm2d,
        time_channel: bool = False,
        memory: str = "speed",
        fused: bool = True,
    ) -> None:
        for name, value in (("stages", stages), ("growth_rate", growth_rate), ("m", m)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if time_channel and stages != 1:
            raise ValueError(f"stages: a time channel goes with 1 stage (the Euler method), got {stages}")
        super().__init__(
            m * stages,
            m * growth_rate,
            growth_rate,
            bottleneck=bottleneck,
            drop_rate=drop_rate,
            norm_layer=norm_layer,
            time_channel=time_channel,
            memory=memory,
            fused=fused,
        )
        self.stages = stages
        self.m = m
        self.sqrt_step = nn.Parameter(torch.ones(())) if time_channel else None

    def forward(self, y: Tensor, time: Tensor | None = None) -> Tensor:
        return self.forward_with_moments(y, time=time)[0]

    def forward_with_moments(
        self,
        y: Tensor,
        moments: Moments | None = None,
        *,
        return_moments: bool = False,
        time: Tensor | None = None,
    ) -> tuple[Tensor, Moments | None]:
        """The step, taking y's moments if they are known, and leaving those of y' if asked for (and fused).

        time: Tensor [], T/u of a step with a time channel; 0 if not given."""
        if self._fusible(y):
            if self._group():
                return self._block(y, self.stages), None
            result = self._block(y, self.stages, moments, return_moments)
            return result if return_moments else (result, None)
        weights: list[float | Tensor] = [1.0] * self.stages
        if self.sqrt_step is None:
            slots = self._plain(y)
        else:
            slots = self._plain(y, self.sqrt_step.new_zeros(()) if time is None else time)
            weights = [self.step_size()]
        increments = slots[:, self.in_channels :].split(self.in_channels, 1)
        return weighted_sum(y, increments, weights, fused=self.fused, return_moments=return_moments)

    def step_size(self) -> Tensor:
        """h/u of a step with a time channel, Tensor []."""
        if self.sqrt_step is None:
            raise RuntimeError("step_size: this step has no time channel; its step size is part of its weights")
        return self.sqrt_step.square()

    def extra_repr(self) -> str:
        return f"stages={self.stages}, m={self.m}, {super().extra_repr()}"


class TimePeriod(Period):
    """Steps with a time channel: T_0 = 0, ``T_{n+1} = T_n + h_n`` (Zhu et al., equation 8; all divided by u)."""

    def forward_with_moments(
        self, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        """The steps. No moments are passed on."""
        time: Tensor | None = None
        for step in self:
            y = step(y, time)
            size = cast(ERKStep, step).step_size()
            time = size if time is None else time + size
        return y, None

    def step_sizes(self) -> list[float]:
        """h_n/u of each step (Zhu et al., Table 4), in float64: the square of a float32 may be less than a float32."""
        return [cast(Tensor, cast(ERKStep, step).sqrt_step).detach().double().square().item() for step in self]

    def times(self) -> list[float]:
        """T_n/u at the beginning of each step, and at the end of the last."""
        times = [0.0]
        for size in self.step_sizes():
            times.append(times[-1] + size)
        return times
