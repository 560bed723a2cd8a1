"""Runs a file of tests in processes of their own: Triton decides at its import whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PART = "RKFAST_TEST_PART"


def in_parts(count: int) -> pytest.MarkDecorator:
    """Tests take parts "i/count", each for a process of its own."""
    return pytest.mark.parametrize("part", [f"{i}/{count}" for i in range(count)])


def run(cases: str, part: str, folder: Path, *options: str, **environment: str) -> None:
    """Fails with the output of the process unless the tests in tests/triton/<cases>/cases.py, every count-th from the
    i-th on for a part "i/count", pass there."""
    pytest.importorskip("triton", reason="Triton is not installed")
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", f"tests/triton/{cases}/cases.py", "-o", "python_files=cases.py",
               "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}", *options]  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "RKFAST_BACKEND")}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    process = subprocess.run(
        command, cwd=ROOT, env={**kept, PART: part, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if process.returncode != 0:
        pytest.fail(process.stdout[-20000:], pytrace=False)
    counts = {name: int(value) for name, value in ElementTree.parse(report).find("testsuite").attrib.items()  # type: ignore[union-attr]
              if name in ("tests", "failures", "errors", "skipped")}  # fmt: skip
    assert counts["tests"] > 0 and counts["failures"] == counts["errors"] == counts["skipped"] == 0, counts
    print(process.stdout[-2000:])
