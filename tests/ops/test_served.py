from pathlib import Path

import pytest
import torch

from rkfast import native
from tests.cuda.emulation import build
from tests.ops import served


def test_committed_table_is_what_is_served() -> None:
    for reason in (native.cpu_reason(), native.triton_missing(), build.reason()):
        if reason is not None:
            pytest.skip(reason)
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no AVX512-BF16, and the table was written by one that has")
    committed = (Path(__file__).parents[2] / "SUPPORT.md").read_text()
    assert committed == served.table(), "write it anew: python -m tests.ops.served > SUPPORT.md"
