from pathlib import Path

import pytest

from rkfast import native
from tests.cuda.emulation import build
from tests.ops import served


def test_committed_table_is_what_is_served() -> None:
    for reason in (native.cpu_reason(), native.triton_missing(), build.reason()):
        if reason is not None:
            pytest.skip(reason)
    committed = (Path(__file__).parents[2] / "SUPPORT.md").read_text()
    assert committed == served.table(), "write it anew: python -m tests.ops.served > SUPPORT.md"
