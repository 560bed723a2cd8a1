from __future__ import annotations

from pathlib import Path

from tests.triton import apart


def test_kernels_compile_without_spills_and_with_wide_accesses(tmp_path: Path) -> None:
    apart.run("compiled", tmp_path)
