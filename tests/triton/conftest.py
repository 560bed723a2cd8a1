from __future__ import annotations

import os

import pytest

from tests.triton import apart


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if (part := os.environ.get(apart.PART)) is not None:
        first, count = map(int, part.split("/"))
        items[:] = items[first::count]
