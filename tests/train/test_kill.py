"""SIGKILL at random instants costs nothing but the steps since the last checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import libraries
from tests.package.process import python

libraries.prepare()  # torchmetrics imports torchvision
for package in ("safetensors", "torchmetrics"):
    pytest.importorskip(package)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_killed_training_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    print(python("-m", "tests.train.killed", str(tmp_path), OMP_NUM_THREADS="1"))
