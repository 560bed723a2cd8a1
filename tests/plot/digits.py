"""A training that takes a second."""

from __future__ import annotations

from typing import Any

import pytest

from rkfast import demo


def made_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the digits be 320 to train with and 64 to test."""
    digits = demo.digits

    def few(*args: Any) -> Any:
        (images, labels), test = digits(*args)
        return (images[:320], labels[:320]), (test[0][:64], test[1][:64])

    monkeypatch.setattr(demo, "digits", few)
