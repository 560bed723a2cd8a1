from __future__ import annotations

import argparse

import pytest

from rkfast.plot import trajectory


def test_steps_are_counted() -> None:
    pytest.importorskip("matplotlib")
    parser = argparse.ArgumentParser()
    trajectory.add_arguments(parser)
    (found,) = trajectory.data(parser.parse_args([]))
    (axes,) = trajectory.draw(found).axes
    exact, small, large, adaptive = axes.get_lines()
    assert exact.get_ydata()[-1] == pytest.approx(2.7182818**-13.2, rel=1e-5)
    assert small.get_label() == "euler, h = 0.05: 66 steps, 66 evaluations"
    assert large.get_label() == "euler, h = 0.55: 6 steps, 6 evaluations"
    assert large.get_ydata().tolist() == pytest.approx([(-1.2) ** i for i in range(7)])
    solution = found["fehlberg45, tol = 0.001"]
    assert (
        adaptive.get_label()
        == f"fehlberg45, tol = 0.001: {solution.accepted} steps, {solution.evaluations} evaluations"
    )
    assert solution.accepted < 12
    assert adaptive.get_xdata().tolist() == solution.times.tolist()
