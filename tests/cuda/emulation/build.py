"""Compiles csrc/cuda with g++ against the headers of this folder: the same kernels and bindings, without a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

HOME = Path(__file__).parent
CSRC = HOME.parents[2] / "csrc"
TORCH = Path(torch.__file__).parent
NAME = "rkfast_cuda_emulated"
# A 16-byte access that a GPU would refuse ends the process here too.
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",
    "-fsanitize=alignment",
    "-fsanitize-undefined-trap-on-error",
]


def includes() -> list[str]:
    """-I flags of this project, torch and Python."""
    system = [TORCH / "include", TORCH / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]]
    return [f"-I{CSRC}", *(f"-isystem{path}" for path in system)]


def build(extra: tuple[str, ...] = ()) -> Path:
    """The extension, built anew only where a source, torch or a flag has changed."""
    sources = sorted([*CSRC.glob("cuda/*.cpp"), *CSRC.glob("cuda/*.cu")])
    key = hashlib.sha256(repr((torch.__version__, sysconfig.get_config_var("EXT_SUFFIX"), FLAGS, extra)).encode())
    for path in sorted([*CSRC.glob("c*/*.h"), *CSRC.glob("cuda/*.cuh"), *sources, *HOME.rglob("*.h")]):
        key.update(path.read_bytes())
    kept = Path(tempfile.gettempdir()) / f"{NAME}-{os.getuid()}-{key.hexdigest()[:16]}" / f"{NAME}.so"
    if kept.exists():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
        flags = [*FLAGS, *extra, f"-DTORCH_EXTENSION_NAME={NAME}", f"-I{HOME / 'include'}", *includes()]
        objects = [f"{folder}/{source.name}.o" for source in sources]
        for source, target in zip(sources, objects, strict=True):
            subprocess.run(["g++", *flags, "-x", "c++", "-c", source, "-o", target], check=True)
        libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}"]
        libraries += ["-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10"]
        subprocess.run(["g++", "-shared", *extra, *objects, *libraries, "-o", f"{folder}/built.so"], check=True)
        os.replace(f"{folder}/built.so", kept)
    return kept


def load(path: Path) -> Any:
    """The extension, with ``launches()``: how many kernels it has launched."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    count = ctypes.CDLL(str(path)).emulated_launches
    count.restype = ctypes.c_int64
    module.launches = count
    return module


def reason() -> str | None:
    """Why there is no emulation here; None where there is."""
    return None if shutil.which("g++") else "needs g++"
