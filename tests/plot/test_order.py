from __future__ import annotations

import argparse

import pytest

from rkfast.plot import order


def test_errors_and_slopes() -> None:
    pytest.importorskip("matplotlib")
    (runs,) = order.data(argparse.Namespace(methods=["midpoint", "verner8"], problem="limit cycle"))
    (axes,) = order.draw(runs).axes
    errors, ideal = axes.get_lines()[::2], axes.get_lines()[1::2]
    for name, slope, points, line in zip(runs, (2, 8), errors, ideal, strict=True):
        assert points.get_label() == f"{name}: {runs[name].orders[-1]:.2f}"
        assert points.get_xydata().tolist() == [list(v) for v in zip(runs[name].sizes, runs[name].errors, strict=True)]
        assert line.get_xdata()[-1] == runs[name].sizes[-1] and line.get_ydata()[-1] == runs[name].errors[-1]
        assert line.get_ydata()[-2] / line.get_ydata()[-1] == pytest.approx(2**slope)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
