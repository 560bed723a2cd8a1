"""``rkfast plot stability``: what is drawn is what was found."""

from __future__ import annotations

import math

import pytest

from rkfast.ode import BlockStability, Stability
from rkfast.plot import stability

pytest.importorskip("matplotlib")


def test_products_and_radii() -> None:
    blocks = (
        BlockStability("a", 1.0, 1.0, 9.0, 2.0, 1.5, ""),
        BlockStability("b", 1.0, 2.0, 98.0, 0.5, None, ""),
        BlockStability("c", 1.0, 1.0, 9.0, 0.0, 0.9, ""),
    )
    above, below = stability.draw("net", Stability(blocks)).axes
    bound, growth = above.get_lines()[:2]
    assert (bound.get_label(), growth.get_label()) == ("bound", "measured growth")
    assert list(bound.get_ydata()) == pytest.approx([1, 3, 4])
    assert list(growth.get_ydata()) == pytest.approx([math.log10(2), 0, math.nan], nan_ok=True)
    assert list(below.get_lines()[0].get_ydata()) == pytest.approx([1.5, math.nan, 0.9], nan_ok=True)
    gated = Stability((BlockStability("a", 1.0, 1.0, 9.0, 20.0, 1.5, "a gate"),))
    assert stability.draw("net", gated).axes[0].get_lines()[0].get_label() == "bound, which does not hold"


def test_hundreds_of_blocks() -> None:
    """Their product is no float."""
    blocks = (BlockStability("a", 1.0, 1.0, 99.0, 1.0, None, ""),) * 252
    assert Stability(blocks).bound == math.inf
    assert stability.draw("net", Stability(blocks)).axes[0].get_lines()[0].get_ydata()[-1] == pytest.approx(504)
