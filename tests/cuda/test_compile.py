"""nvcc accepts every kernel without a spilled register, and g++ the bindings, on a machine that may have no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda.emulation.build import CSRC, TORCH, includes

KERNELS = sorted(CSRC.glob("cuda/*.cu"))
ARCHITECTURES = ("80", "90")


def toolkit() -> Path | None:
    """A CUDA toolkit with headers; an nvcc on PATH may be a wrapper that stands elsewhere."""
    found = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        found.append(str(Path(nvcc).resolve().parents[1]))
    for home in map(Path, filter(None, [*found, "/usr/local/cuda"])):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


HOME = toolkit()
pytestmark = pytest.mark.skipif(
    HOME is None, reason="needs a CUDA toolkit: none at CUDA_HOME, CUDA_PATH, around nvcc or in /usr/local/cuda"
)


def nvcc(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """Compiles source with spills as errors."""
    flags = ["-std=c++17", "-O3", f"-I{CSRC}", "-Xptxas", "-warn-spills,-Werror", "-Werror", "all-warnings"]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command = [f"{HOME}/bin/nvcc", *flags, *codes, "-c", str(source), "-o", str(target)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.stem)
def test_kernels(source: Path, tmp_path: Path) -> None:
    result = nvcc(source, tmp_path / "kernel.o")
    assert result.returncode == 0, result.stderr


def test_spills_are_errors(tmp_path: Path) -> None:
    source = tmp_path / "spill.cu"
    source.write_text(
        "__global__ void __launch_bounds__(1024, 2) f(double* p) {\n"
        "  double v[64];\n"
        "  for (int i = 0; i < 64; ++i) v[i] = p[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "  for (int i = 0; i < 64; ++i) p[i * 1024 + threadIdx.x] = v[63 - i] / v[i];\n"
        "}\n"
    )
    result = nvcc(source, tmp_path / "spill.o")
    assert result.returncode != 0
    assert "spill" in result.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_bindings(tmp_path: Path) -> None:
    # torch's CPU build lacks this one header of its CUDA ones.
    if not (TORCH / "include/c10/cuda/impl/cuda_cmake_macros.h").exists():
        stub = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
        stub.parent.mkdir(parents=True)
        stub.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-DTORCH_EXTENSION_NAME=_cuda", f"-I{tmp_path}"]
    command = ["g++", *flags, f"-isystem{HOME}/include", *includes(), str(CSRC / "cuda/bindings.cpp")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr, result.stderr
