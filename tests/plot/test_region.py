from __future__ import annotations

import argparse

import pytest
import torch

from rkfast import tableau
from rkfast.nn import RKStep
from rkfast.plot import region


class Turn(torch.nn.Module):
    """y' = z y of a complex z, with y in two real channels."""

    def __init__(self, z: complex) -> None:
        super().__init__()
        self.matrix = torch.tensor([[z.real, z.imag], [-z.imag, z.real]], dtype=torch.float64)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return y @ self.matrix


@pytest.mark.parametrize("method", tableau.names())
def test_growth_is_that_of_a_step(method: str) -> None:
    growth = region.growth(tableau.get(method))
    x, y = (torch.linspace(*ends, region.POINTS, dtype=torch.float64) for ends in (region.REAL, region.IMAGINARY))
    for row, column in ((250, 300), (100, 330), (420, 370)):
        z = complex(x[column].item(), y[row].item())
        one = RKStep(method, Turn(z), fused=False)(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
        assert growth[row, column].item() == pytest.approx(one.norm().item(), rel=1e-9)


def test_what_is_known_of_the_regions() -> None:
    """Where they end on the real axis, as the books have it."""
    x = torch.linspace(*region.REAL, region.POINTS)
    for method, end in (("euler", -2), ("midpoint", -2), ("rk3", -2.5127), ("rk4", -2.7853)):
        growth = region.growth(tableau.get(method))
        middle = growth[region.POINTS // 2 - 1 : region.POINTS // 2 + 1].mean(0)
        assert x[(middle <= 1).nonzero()[0]].item() == pytest.approx(end, abs=0.05)


def test_the_whole_region_is_drawn() -> None:
    pytest.importorskip("matplotlib")
    methods = ["euler", "verner8"]
    (found,) = region.data(argparse.Namespace(methods=methods))
    figure = region.draw(found)
    (axes,) = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == methods
    assert axes.get_xlim()[0] < -4.1 and axes.get_xlim()[1] > 0.3
    for collection, values in zip(axes.collections, found.values(), strict=True):
        assert collection.get_paths()[0].vertices[:, 0].min() < -1.98
        assert not (values <= 1)[:, (0, -1)].any() and not (values <= 1)[(0, -1), :].any()
