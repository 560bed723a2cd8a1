"""The measures against computations whose needs are known."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from rkfast import measure
from tests.package.process import python

MB = 1 << 20


def test_saved_bytes_counts_each_storage_once() -> None:
    x = torch.randn(MB // 4, requires_grad=True)  # 1 MB
    assert measure.saved_bytes(lambda: x.exp(), [x]) == MB  # the result
    assert measure.saved_bytes(lambda: x.exp().square(), [x]) == MB  # the result of exp, kept by both
    assert measure.saved_bytes(lambda: x * x.exp(), [x]) == MB
    assert measure.saved_bytes(lambda: x * x.exp()) == 2 * MB  # and x
    assert measure.saved_bytes(lambda: x + 1, [x]) == 0
    assert measure.saved_bytes(lambda: x.exp()[:3].exp(), [x]) == MB + 12  # a slice keeps all of it
    assert measure.saved_bytes(lambda: (x * x.exp()).exp(), [x], exclude_result=True) == MB
    linear = nn.Linear(4, 4)
    assert measure.saved_bytes(lambda: linear(x.view(-1, 4)), [x, *linear.parameters()]) == 0


PEAKS = """
import torch
from rkfast import measure

x = torch.ones(1 << 24)  # 64 MB

def needs_two():
    y = x + 1
    z = y + 1
    del y, z

def needs_one_at_a_time():
    for _ in range(4):
        x + 1

needs_two()
print(*(measure.peak_bytes(f, "cpu") for f in (needs_two, needs_one_at_a_time, needs_two)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read where Linux keeps it")
def test_peak_bytes_on_cpu() -> None:
    # In a process of its own: malloc gives out again what was freed before, one tensor here, the next one there.
    peaks = python("-c", PEAKS).split()
    assert [int(p) / (64 * MB) for p in peaks] == pytest.approx([2, 1, 2], abs=0.1)


def test_peak_bytes_elsewhere() -> None:
    assert measure.peak_bytes(lambda: None, "meta") is None
