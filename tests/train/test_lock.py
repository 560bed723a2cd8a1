"""One training at a time in a folder, and none that a killed one keeps out."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rkfast import cli
from rkfast.train import lock
from tests import libraries
from tests.package.process import ROOT, environment

HOLDER = """
import os, sys, time
from pathlib import Path
from rkfast.train.lock import locked

with locked(Path(sys.argv[1])):
    child = os.fork() if hasattr(os, "fork") else None  # such as a worker that loads images
    if child != 0:
        print(child, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of ``tmp_path / "run"``."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    with subprocess.Popen(command, env=environment(ROOT), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = process.stdout.readline().strip()
        try:
            yield process
        finally:
            process.kill()
            if child.isdigit():
                os.kill(int(child), signal.SIGTERM)


def test_a_second_training_is_refused_until_the_first_is_gone(
    holder: subprocess.Popen[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    libraries.prepare()  # torchmetrics imports torchvision
    for package in ("safetensors", "torchmetrics", "sklearn"):
        pytest.importorskip(package)
    out = tmp_path / "run"
    command = ["train", "--model", "resnet-8", "--options", "{}", "--epochs", "1", "--device", "cpu", "--out", str(out)]
    assert cli.main(command) == 2
    assert f"another training writes to {out}; wait for it, or take another folder" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [lock.FILE]
    holder.kill()
    holder.wait()
    assert cli.main(command) == 0  # though the child of the killed process is there still


def test_where_files_cannot_be_locked_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlockable(_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock, "_lock", unlockable)
    with lock.locked(tmp_path / "run"):
        assert (tmp_path / "run" / lock.FILE).exists()
