"""PolyNet's step: a polynomial of one branch (Zhang et al., "PolyNet: A Pursuit of Structural Diversity")."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rkfast.nn.branch import PreActBranch, slope, takes_moments
from rkfast.nn.step import weighted_sum
from rkfast.ops import Moments


class PolyStep(nn.Module):
    """poly-2, ``y' = y + F(y) + F(F(y))``: the first terms of a backward Euler step, ``(I - F)^-1 y`` (Zhang et al.,
    "PolyNet"; Luo et al., "Rethinking ResNets", Table 1). With two branches mpoly-2, ``y + F(y) + G(F(y))``.

    F(y) is evaluated once and then F again, with the same weights: the parameters of one residual block and the work of
    two. What F reads the second time is distributed otherwise, so that BatchNorms need statistics for each time: see
    ``poly_branches``.

    Args:
        branches: F, or F and G.
        fused: False takes stock PyTorch operations for the sum; the branches have their own ``fused``.

    Shape: Tensor [N, C, ...] -> [N, C, ...]; branches keep the shape.

    Raises:
        ValueError: the number of branches is not 1 or 2.
    """

    def __init__(self, branches: nn.Module | Sequence[nn.Module], *, fused: bool = True) -> None:
        super().__init__()
        one = isinstance(branches, nn.Module) and not isinstance(branches, nn.ModuleList)
        self.branches = nn.ModuleList([branches] if one else branches)  # type: ignore[list-item, arg-type]
        if len(self.branches) not in (1, 2):
            raise ValueError(f"branches: expected F, or F and G, got {len(self.branches)} modules")
        self.fused = fused

    def forward(self, y: Tensor) -> Tensor:
        return self.forward_with_moments(y)[0]

    def forward_with_moments(
        self, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        """The step, taking y's moments if they are known, and leaving those of y' if asked for (and fused)."""
        first = slope(self.branches[0], y, moments if self.fused else None)
        second = self.branches[-1](first)
        return weighted_sum(y, [first, second], [1.0, 1.0], fused=self.fused, return_moments=return_moments)

    def reads_moments(self) -> bool:
        """Whether F makes use of its input's moments."""
        return self.fused and takes_moments(self.branches[0])

    def extra_repr(self) -> str:
        return f"fused={self.fused}"


def poly_branches(channels: int, *, fused: bool = True) -> list[nn.Module]:
    """F for the first and the second time: two PreActBranches with the same convolutions and BatchNorms of their own,
    as in the public PolyNets. (With BatchNorms in common, a polynet-18 of 16 channels ended at 42 % of the handwritten
    digits in place of 99 %, for running statistics are then those of neither time.)"""
    first, second = PreActBranch(channels, fused=fused), PreActBranch(channels, fused=fused)
    second.conv1, second.conv2 = first.conv1, first.conv2
    return [first, second]
