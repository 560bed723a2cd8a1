"""The compiled extensions and Triton: loaded at first need, each with the reason why not.

Nothing here is touched by ``import rkfast``. The build leaves ``_build.json`` beside this file: what was built, against
which torch, and why a part was left out.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

REBUILD = "rebuild with `pip install --force-reinstall --no-deps --no-cache-dir .` in its source tree"


@functools.cache
def build() -> dict[str, Any]:
    """What the build recorded; empty where rkfast runs from a source tree that was never built."""
    try:
        return json.loads((Path(__file__).parent / "_build.json").read_text())
    except (OSError, ValueError):
        return {}


@functools.cache
def _load(name: str) -> tuple[Any, str | None]:
    """The extension ``rkfast.<name>``, or the reason why it is not there."""
    recorded = build().get(name, {})
    if not recorded.get("built"):
        reason = recorded.get("reason", "build it with `pip install .` in the source tree")
        return None, f"rkfast.{name} was not built: {reason}"
    built_for = build().get("torch")
    if built_for != torch.__version__:
        return None, f"rkfast.{name} was built for torch {built_for} and this is torch {torch.__version__}; {REBUILD}"
    try:
        return importlib.import_module(f"rkfast.{name}"), None
    except ImportError as error:
        return None, f"rkfast.{name} does not load ({error}); {REBUILD}"


def cpu() -> Any:
    """The C++ extension; call only where ``cpu_reason()`` is None."""
    return _load("_C")[0]


def cuda() -> Any:
    """The CUDA extension; call only where ``cuda_reason()`` is None."""
    return _load("_cuda")[0]


def cpu_reason() -> str | None:
    """Why the C++ kernels cannot run; None where they can."""
    return _load("_C")[1]


@functools.cache
def cuda_reason() -> str | None:
    """Why the CUDA C++ kernels cannot run; None where they can."""
    return _no_gpu() or _load("_cuda")[1]


@functools.cache
def triton_reason() -> str | None:
    """Why the Triton kernels cannot run; None where they can."""
    reason = triton_missing() or (None if triton_interprets() else _no_gpu())
    if reason is None:
        _place_triton_cache()
    return reason


def triton_missing() -> str | None:
    """Why Triton cannot be imported; None where it can."""
    if importlib.util.find_spec("triton") is not None:
        return None
    if sys.platform != "linux":
        return f"Triton has no build for {sys.platform}"
    return "Triton is not installed; install it with: pip install 'rkfast[triton]'"


@functools.cache
def triton_interprets() -> bool:
    """Whether Triton's interpreter is on (TRITON_INTERPRET=1), which serves CPU tensors, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1" and triton_missing() is None


def _no_gpu() -> str | None:
    if torch.version.cuda is None:
        return "this torch is a CPU build"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def _place_triton_cache() -> None:
    """Triton keeps what it compiles in the home, unless told otherwise; but a home may be read-only."""
    if "TRITON_CACHE_DIR" in os.environ or "TRITON_HOME" in os.environ:
        return
    if "RKFAST_CACHE_DIR" in os.environ or not os.access(os.path.expanduser("~"), os.W_OK):
        os.environ["TRITON_CACHE_DIR"] = str(cache_dir() / "triton")


@functools.cache
def cache_dir() -> Path:
    """The folder for what outlives a process; ask for it only to write, because this creates it.

    RKFAST_CACHE_DIR, else ``rkfast`` in the user's cache folder. Where that cannot be written, a private folder that
    goes when the process ends.
    """
    try:
        asked = os.environ.get("RKFAST_CACHE_DIR")
        base = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
        folder = Path(asked) if asked else (Path(base) if base else Path.home() / ".cache") / "rkfast"
        folder.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell of a read-only mount, nor of root.
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        private = tempfile.mkdtemp(prefix="rkfast-")
        atexit.register(shutil.rmtree, private, ignore_errors=True)
        return Path(private)
