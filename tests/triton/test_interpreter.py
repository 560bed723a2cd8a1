from __future__ import annotations

from pathlib import Path

from tests.triton import apart


def test_kernels_compute_what_the_references_do(tmp_path: Path) -> None:
    apart.run("interpreted", tmp_path, "-p", "tests.triton.interpreter", TRITON_INTERPRET="1")
