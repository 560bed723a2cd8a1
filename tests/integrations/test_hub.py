"""hubconf.py, from a clone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import rkfast
from tests.package.process import ROOT, python


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """As git makes it: nothing is built."""
    shutil.copytree(ROOT / "rkfast", tmp_path / "rkfast", ignore=shutil.ignore_patterns("*.so", "*.pyd", "_build.json"))
    shutil.copy(ROOT / "hubconf.py", tmp_path)
    return tmp_path


def test_a_clone(clone: Path) -> None:
    code = f"""
import torch
path = {str(clone)!r}
import hubconf
print(sorted(name for name in dir(hubconf) if callable(getattr(hubconf, name)) and not name.startswith("_")))
model = torch.hub.load(path, "erknet-6x1_6x1_6x1", source="local", growth_rate=4, num_classes=3)
import rkfast
assert rkfast.__file__.startswith(path)
assert rkfast.native.cpu_reason() is not None
print(model(torch.randn(2, 3, 32, 32)).shape)
print(torch.hub.load(path, "densenet121", source="local").__class__.__name__)
print("num_classes" in hubconf.densenet121.__doc__)
try: torch.hub.load(path, "densenet121", source="local", pretrained=True)
except ValueError as error: print(error)
"""
    names, *rest = python("-c", code, path=clone).splitlines()
    assert names == str(sorted(rkfast.list_models()))
    assert rest[:3] == ["torch.Size([2, 3])", "DenseNet", "True"]
    assert rest[3].startswith("pretrained: there are no weights here")
