"""PolyNet's step: a polynomial of one branch (Zhang et al., "PolyNet: A Pursuit of Structural Diversity")."""

from __future__ import annotations

from torch import Tensor, nn

from rkfast.nn.branch import slope, takes_moments
from rkfast.nn.step import weighted_sum
from rkfast.ops import Moments


class PolyStep(nn.Module):
    """poly-2, ``y' = y + F(y) + F(F(y))``: the first terms of a backward Euler step, ``(I - F)^-1 y`` (Zhang et al.,
    "PolyNet"; Luo et al., "Rethinking ResNets", Table 1).

    F(y) is evaluated once and then F again, with the same weights: a step has the parameters of one residual block and
    the work of two, and the running statistics of F's BatchNorms advance twice.

    Args:
        branch: F.
        fused: False takes stock PyTorch operations for the sum; the branch has its own ``fused``.

    Shape: Tensor [N, C, ...] -> [N, C, ...]; the branch keeps the shape.
    """

    def __init__(self, branch: nn.Module, *, fused: bool = True) -> None:
        super().__init__()
        self.branch = branch
        self.fused = fused

    def forward(self, y: Tensor) -> Tensor:
        return self.forward_with_moments(y)[0]

    def forward_with_moments(
        self, y: Tensor, moments: Moments | None = None, *, return_moments: bool = False
    ) -> tuple[Tensor, Moments | None]:
        """The step, taking y's moments if they are known, and leaving those of y' if asked for (and fused)."""
        first = slope(self.branch, y, moments if self.fused else None)
        second = self.branch(first)
        return weighted_sum(y, [first, second], [1.0, 1.0], fused=self.fused, return_moments=return_moments)

    def reads_moments(self) -> bool:
        """Whether the branch makes use of its input's moments."""
        return self.fused and takes_moments(self.branch)

    def extra_repr(self) -> str:
        return f"fused={self.fused}"
