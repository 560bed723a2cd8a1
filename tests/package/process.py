"""Fresh processes, in which nothing of this one's surroundings counts but its packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(path: Path | None, **extra: str) -> dict[str, str]:
    """This process's variables without those that steer rkfast or Triton; ``path`` comes first among the packages."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RKFAST_", "TRITON_", "PYTHON", "PYTEST_"))}
    return {**kept, **({"PYTHONPATH": str(path)} if path else {}), **extra}


def run(*command: str | Path, path: Path | None = ROOT, status: int = 0, cwd: Path | str = "/", **extra: str) -> str:
    """Standard output and error of a command that ends with ``status``."""
    done = subprocess.run(
        command, env=environment(path, **extra), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == status, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def python(*args: str, path: Path | None = ROOT, status: int = 0, **extra: str) -> str:
    return run(sys.executable, *args, path=path, status=status, **extra)
