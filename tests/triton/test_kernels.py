from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from tests.triton.apart import ROOT


@pytest.mark.minutes
def test_committed_page_is_what_is_launched_and_compiled() -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    committed = (ROOT / "KERNELS.md").read_text()
    written = re.search(r"with Triton (\S+),", committed)
    assert written is not None
    if triton.__version__ != written[1]:
        pytest.skip(f"this is Triton {triton.__version__}, and the page was written with {written[1]}")
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "RKFAST_BACKEND")}
    process = subprocess.run(
        [sys.executable, "-m", "tests.triton.kernels", "KERNELS.md"],
        cwd=ROOT, env=kept, capture_output=True, text=True,
    )  # fmt: skip
    told = process.stderr[-5000:]
    assert process.returncode == 0, f"{told}\nwrite it anew: python -m tests.triton.kernels > KERNELS.md"


def test_products_are_as_exact_as_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from rkfast.ops import products

    assert products._precision() == "tf32"
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert products._precision() == "ieee"
