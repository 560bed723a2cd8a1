"""The documentation: its code runs, its links lead somewhere, and the API reference is current."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from rkfast import native
from tests import api, page
from tests.libraries import library
from tests.package.process import ROOT, run

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Packages that rkfast does without, and what of a page needs them.
NEEDS = {
    "torchvision": r"\btorchvision\b",
    "timm": r"\btimm\b",
    "safetensors": r"save_pretrained|rkfast train",
    "torchmetrics": r"rkfast train",
    "matplotlib": r"\brkfast plot\b",
    "sklearn": r"\bdigits\b",
}
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.skipif(native.cpu_reason() is not None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("file", [file for file in PAGES if page.blocks(file)], ids=name_of)
def test_code(file: Path, tmp_path: Path) -> None:
    code = "".join(block.code for block in page.blocks(file) if block.reason is None)
    for package, pattern in NEEDS.items():
        if re.search(pattern, code) and package in ("torchvision", "timm"):
            library(package)
        elif re.search(pattern, code) and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    own = {"RKFAST_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    print(run(sys.executable, "-m", "tests.page", file, cwd=tmp_path, **own))


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("```python\nx = 1\n```\n```python\nassert x == 2\n```", r"page.md:5: expected no error, got\n(?s:.*)line 5"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```", "page.md:2: expected\n2\n\ngot\n1"),
        ("```python\n1 / 1\n```\n```text\nZeroDivisionError: division by zero\n```", "expected ZeroDivisionError"),
        ("```python\n1 / 0\n```\n```text\nZeroDivisionError: of another kind\n```", "got\nZeroDivisionError: div"),
        ("```sh\nfalse\n```", "page.md:2: expected no error"),
        ("```sh\necho one\n```\n```text\ntwo\n```", "got\none"),
        ("```\nwhat\n```", "page.md:1: a block of '', expected python, sh, text"),
    ),
)
def test_a_page_that_is_wrong_fails(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("page.md").write_text(text)
    with pytest.raises((AssertionError, ValueError), match=message):
        page.run(Path("page.md"))


def test_a_page_that_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("page.md").write_text(
        "```python own.py\nprint('from a file')\n```\n\n```sh\npython own.py\n```\n```text\nfrom ...\n```\n"
        "<!-- not run: it takes days -->\n```sh\nfalse\n```\n"
        "```python\n1 / 0\n```\n```text\nZeroDivisionError: division by zero\n```\n\n```text\nshown only\n```\n"
    )
    page.run(Path("page.md"))
    assert capsys.readouterr().out == "page.md:13: not run: it takes days\n"


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_links(file: Path) -> None:
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target, heading in LINK.findall(text):
        to = (file.parent / target).resolve() if target else file
        assert to.is_relative_to(ROOT) and to.exists(), target
        titles = re.findall(r"^#+ (.*)$", to.read_text(), flags=re.MULTILINE) if heading else []
        slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not heading or heading in slugs, f"{target}#{heading}"


def test_every_page_is_in_the_index() -> None:
    linked = {target for target, _ in LINK.findall((ROOT / "docs" / "README.md").read_text())}
    assert {file.name for file in PAGES[1:]} - {"README.md"} <= linked


def test_api_reference_is_current() -> None:
    committed = (ROOT / "docs" / "api.md").read_text()
    assert committed == api.page(), "write it anew: python -m tests.api > docs/api.md"
