"""Step sizes from weights: the time stepping controllers of one stage (Yang et al., "Dynamical System Inspired Adaptive
Time Stepping Controller for Residual Network Families")."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Controller(nn.Module):
    """Step sizes of the L blocks of a stage, one per channel; they depend on weights, not on data.

    Args:
        blocks: L.
        channels: C, which a block adds to the state.

    ``forward(weights)``: of each block the weights of the convolutions that the controller reads, Tensors
    [C_out, C_in, ...]; returns Tensor [L, C] in the dtype of the controller's parameters, under autocast too.

    ``held`` are step sizes that several forwards share (``rkfast.tsc.accumulate``); None otherwise.
    """

    held: Tensor | None = None

    def __init__(self, blocks: int, channels: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.channels = channels

    def forward(self, weights: Sequence[Sequence[Tensor]]) -> Tensor:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Without ``held``, which nobody would take back from a copy."""
        return {name: value for name, value in self.__dict__.items() if name != "held"}

    def start_at(self) -> float:
        """Let all step sizes be equal at first, and return what they are."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, channels={self.channels}"


class OneBiasLSTM(nn.RNNBase):
    """torch's LSTM, one layer, over a sequence without batch, with the one bias vector of Yang et al., equation 11:
    torch's second is zero, and no parameter.

    Shape: Tensor [L, size] -> [L, size].
    """

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    # Not an nn.LSTM, which torch.compile does not take.
    def __init__(self, size: int) -> None:
        super().__init__("LSTM", size, size)
        del self.bias_hh_l0
        self.register_buffer("bias_hh_l0", torch.zeros(4 * size), persistent=False)
        self._init_flat_weights()

    def forward(self, x: Tensor) -> Tensor:
        weights = [self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0]
        zeros = x.new_zeros(1, 1, self.hidden_size)
        args = (
            True,
            1,
            0.0,
            self.training,
            False,
            False,
        )  # biases, layers, dropout, training, bidirectional, batch first
        return torch.lstm(x[:, None], (zeros, zeros), weights, *args)[0][:, 0]


class LSTMController(Controller):
    """TSC_LSTM, equations 10 to 12: the blocks are one sequence, so that a step size knows those before it.

    ``dt = sigmoid(W_out LSTM(relu(W_in w + b_in)) + b_out)`` with ``w`` the convolutions' weights averaged over their
    input channels, [L, features]: two linear layers and an LSTM of C / r.

    Args:
        blocks, channels: as in Controller.
        features: averaged weights of a block.
        reduction: r; C // r is at least 1.
    """

    def __init__(self, blocks: int, channels: int, features: int, reduction: int) -> None:
        super().__init__(blocks, channels)
        size = max(channels // reduction, 1)
        self.input = nn.Linear(features, size)
        self.lstm = OneBiasLSTM(size)
        self.output = nn.Linear(size, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He-normal linear layers without bias, as the paper initialises; torch's LSTM."""
        for linear in (self.input, self.output):
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
        self.lstm.reset_parameters()

    def forward(self, weights: Sequence[Sequence[Tensor]]) -> Tensor:
        x = averaged(weights, self.input.weight.dtype)
        with _without_autocast(x.device.type):
            return torch.sigmoid(self.output(self.lstm(F.relu(self.input(x)))))

    def start_at(self) -> float:
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        return 0.5


class FCController(Controller):
    """TSC_2fc: two linear layers for each block, ``dt = sigmoid(W_out relu(W_in w + b_in) + b_out)``; those of all
    blocks are one batched product.

    Args:
        blocks, channels, features, reduction: as in LSTMController.
    """

    def __init__(self, blocks: int, channels: int, features: int, reduction: int) -> None:
        super().__init__(blocks, channels)
        size = max(channels // reduction, 1)
        self.weight_in = nn.Parameter(torch.empty(blocks, features, size))
        self.bias_in = nn.Parameter(torch.empty(blocks, 1, size))
        self.weight_out = nn.Parameter(torch.empty(blocks, size, channels))
        self.bias_out = nn.Parameter(torch.empty(blocks, 1, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He-normal weights, no biases."""
        for weight in (self.weight_in, self.weight_out):
            nn.init.normal_(weight, std=(2 / weight.shape[1]) ** 0.5)
        nn.init.zeros_(self.bias_in)
        nn.init.zeros_(self.bias_out)

    def forward(self, weights: Sequence[Sequence[Tensor]]) -> Tensor:
        x = averaged(weights, self.weight_in.dtype)
        with _without_autocast(x.device.type):
            x = F.relu(torch.baddbmm(self.bias_in, x[:, None], self.weight_in))
            return torch.sigmoid(torch.baddbmm(self.bias_out, x, self.weight_out))[:, 0]

    def start_at(self) -> float:
        nn.init.zeros_(self.weight_out)
        nn.init.zeros_(self.bias_out)
        return 0.5


class IndependentSteps(Controller):
    """TSC_indp: the step sizes are parameters ``steps`` [L, C], 1 at first."""

    def __init__(self, blocks: int, channels: int) -> None:
        super().__init__(blocks, channels)
        self.steps = nn.Parameter(torch.ones(blocks, channels))

    def forward(self, weights: Sequence[Sequence[Tensor]]) -> Tensor:
        return self.steps

    def start_at(self) -> float:
        nn.init.ones_(self.steps)
        return 1.0


class FixedSteps(Controller):
    """Step sizes that do not change, a buffer ``steps`` [L, C]: what is left of a controller behind the training, or
    the paper's baselines with one value for all.

    Args:
        blocks, channels: as in Controller.
        value: of each, a number.
    """

    steps: Tensor

    def __init__(self, blocks: int, channels: int, value: float = 1.0) -> None:
        super().__init__(blocks, channels)
        self.register_buffer("steps", torch.full((blocks, channels), float(value)))

    def forward(self, weights: Sequence[Sequence[Tensor]]) -> Tensor:
        return self.steps

    def start_at(self) -> float:
        return self.steps.flatten()[0].item()


# By the names that Table 2 of the paper gives them; "fixed" is its baseline.
CONTROLLERS: dict[str, Callable[..., Controller]] = {
    "lstm": LSTMController,
    "2fc": FCController,
    "indp": IndependentSteps,
    "fixed": FixedSteps,
}


def averaged(weights: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> Tensor:
    """Of each of L blocks the weights [C_out, C_in, ...] of some convolutions, averaged over their input channels and
    one behind the other, Tensor [L, features]. Neighbours of one shape take two launches, unless to copy them together
    costs more than as many launches as there are."""
    columns = []
    for conv in zip(*weights, strict=True):
        runs = [list(run) for _, run in itertools.groupby(conv, key=_shape)]
        # The gradient of a sum is a view; mean would write one as large as the weights.
        columns.append(torch.cat([_summed(run).flatten(1) / run[0].shape[1] for run in runs]))
    return torch.cat(columns, 1).to(dtype)


def _summed(run: Sequence[Tensor]) -> Tensor:
    apart = run[0].device.type == "cpu" and run[0].numel() > _LARGE
    return torch.stack([weight.sum(1) for weight in run]) if apart else torch.stack(list(run)).sum(2)


_LARGE = 1 << 16  # elements of a weight: on a CPU, two cores


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    # Meta tensors, of which parameters are counted, know no autocast.
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else contextlib.nullcontext()


def features(weights: Sequence[Tensor]) -> int:
    """How many averaged weights a block has."""
    return sum(w.shape[0] * w[0, 0].numel() for w in weights)


def _shape(weight: Tensor) -> Any:
    return weight.shape
