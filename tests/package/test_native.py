from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.package.process import python

CACHE = "from rkfast import native; print(native.cache_dir())"


def test_cache_dir_is_the_one_asked_for(tmp_path: Path) -> None:
    asked = tmp_path / "a" / "b"
    assert python("-c", "import rkfast", RKFAST_CACHE_DIR=str(asked)) == ""
    assert not asked.exists(), "created before anything was written"
    assert python("-c", CACHE, RKFAST_CACHE_DIR=str(asked)).strip() == str(asked)
    assert asked.is_dir()
    assert not list(asked.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="the home is named otherwise")
def test_cache_dir_follows_the_user(tmp_path: Path) -> None:
    assert python("-c", CACHE, XDG_CACHE_HOME=str(tmp_path)).strip() == str(tmp_path / "rkfast")
    assert python("-c", CACHE, XDG_CACHE_HOME="", HOME=str(tmp_path)).strip() == str(tmp_path / ".cache" / "rkfast")


@pytest.mark.parametrize("variable", ("RKFAST_CACHE_DIR", "XDG_CACHE_HOME", "HOME"))
def test_an_unwritable_cache_falls_back_to_a_private_folder(tmp_path: Path, variable: str) -> None:
    wall = tmp_path / "file"
    wall.touch()
    where = {"XDG_CACHE_HOME": "", variable: str(wall / "cache")}
    code = f"{CACHE}; import os; assert os.stat(native.cache_dir()).st_mode & 0o77 == 0"
    folder = Path(python("-c", code, **where).strip())
    assert folder.name.startswith("rkfast-")
    assert not folder.exists(), "left behind"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a folder that not even root can write")
def test_a_folder_that_is_there_but_cannot_be_written() -> None:
    assert Path(python("-c", CACHE, RKFAST_CACHE_DIR="/proc").strip()).name.startswith("rkfast-")


def test_triton_compiles_into_the_cache(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom rkfast import native\n"
        "native.triton_missing = native._no_gpu = lambda: None\n"
        "native.triton_reason(); print(os.environ.get('TRITON_CACHE_DIR'))"
    )
    assert python("-c", code, RKFAST_CACHE_DIR=str(tmp_path)).strip() == str(tmp_path / "triton")
    assert python("-c", code, HOME=str(tmp_path)).strip() == "None"
    assert python("-c", code, RKFAST_CACHE_DIR=str(tmp_path), TRITON_CACHE_DIR="mine").strip() == "mine"
