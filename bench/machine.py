"""Where and with what a figure was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import rkfast
from rkfast import native

COMMIT = "RKFAST_COMMIT"  # where git does not come along: `git describe --always --abbrev=40 --exclude '*' --dirty`


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _output(*command: str, cwd: Path | None = None) -> str | None:
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> dict[str, Any]:
    """The commit of the rkfast that is imported, and whether its files differ from it; of an installed one what its
    build recorded."""
    home = Path(rkfast.__file__).resolve().parent.parent
    if (home / ".git").exists():
        head = _output("git", "rev-parse", "HEAD", cwd=home)
        if head is not None:
            changed = _output("git", "status", "--porcelain", "--", "csrc", "rkfast", "bench", "setup.py", cwd=home)
            return {"commit": head, "dirty": changed != ""}
    if COMMIT in os.environ:
        said = os.environ[COMMIT]
        return {"commit": said.removesuffix("-dirty"), "dirty": said.endswith("-dirty")}
    return {"commit": native.build().get("commit"), "dirty": None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(device: str) -> dict[str, Any]:
    """Machine, versions, commit and date, as every results file carries them."""
    machine: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": cores(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "architecture": platform.machine(),
        "gpu": None,
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        machine["gpu"] = {
            "name": gpu.name,
            "capability": f"sm_{gpu.major}{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return {
        "machine": machine,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "rkfast": rkfast.__version__,
            **{package: _version(package) for package in ("triton", "openvino", "onnxruntime")},
        },
        **commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def load() -> float | None:
    """Processes that wanted a core in the last minute; figures from a busy machine mean little."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def kind(description: dict[str, Any]) -> str:
    """A short name for the machine, for file names."""
    machine = description["machine"]
    name = machine["gpu"]["name"] if machine["gpu"] else f"{machine['cpu']} {machine['cores']} {machine['capability']}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
