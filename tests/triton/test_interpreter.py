from __future__ import annotations

from pathlib import Path

import pytest

from tests.triton import apart


@pytest.mark.minutes
@apart.in_parts(6)
def test_kernels_compute_what_the_references_do(part: str, tmp_path: Path) -> None:
    apart.run("interpreted", part, tmp_path, "-p", "tests.triton.interpreter", TRITON_INTERPRET="1")
