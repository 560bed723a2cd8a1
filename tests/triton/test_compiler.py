from __future__ import annotations

from pathlib import Path

import pytest

from tests.triton import apart


@pytest.mark.minutes
@apart.in_parts(2)
def test_kernels_compile_without_spills_and_with_wide_accesses(part: str, tmp_path: Path) -> None:
    apart.run("compiled", part, tmp_path)
