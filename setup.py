"""Builds rkfast: Python always, rkfast._C where a C++ compiler works, rkfast._cuda where a toolkit fits torch's CUDA.

What was left out, and why, is kept in rkfast/_build.json. RKFAST_CPU and RKFAST_CUDA are auto (the default), 0 (leave
it out) or 1 (fail rather than leave it out). CXXFLAGS come behind the flags of C++ that stand here.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel as _bdist_wheel
from setuptools.command.build import build as _build

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent
WINDOWS = sys.platform == "win32"
SWITCHES = {"_C": "RKFAST_CPU", "_cuda": "RKFAST_CUDA"}

# at::vec chooses its registers by these macros; -march=native sets none of them, and would not run elsewhere.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2]
CAPABILITIES: dict[str, list[str]] = {"DEFAULT": []}
if platform.machine() in ("x86_64", "AMD64") and sys.maxsize > 2**32 and not WINDOWS:
    CAPABILITIES |= {"AVX2": AVX2, "AVX512": AVX512}

CXX_FLAGS = ["/O2"] if WINDOWS else ["-O3", "-fvisibility=hidden", "-g0"]
if sys.platform == "linux":
    CXX_FLAGS.append("-fopenmp")  # at::parallel_for is serial without it
CXX_FLAGS += shlex.split(os.environ.get("CXXFLAGS", ""))
CUDA_ARCHS = ("8.0", "9.0", "10.0")

record: dict[str, Any] = {
    "torch": str(torch.__version__) if torch else None,
    "cuda": None,
    "compiler": None,
    "isa": [],
    "commit": None,
    "_C": {"built": False},
    "_cuda": {"built": False},
}


def switch(name: str) -> str:
    variable = SWITCHES[name]
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{variable}={value}: expected auto, 0 or 1")
    return value


def leave_out(name: str, reason: str) -> None:
    record[name] = {"built": False, "reason": reason}
    print(f"rkfast: leaving out rkfast.{name}: {reason}", file=sys.stderr)


def planned() -> list[Extension]:
    extensions = []
    for name, plan in (("_C", cpu_extension()), ("_cuda", cuda_extension())):
        if isinstance(plan, str):
            leave_out(name, plan)
        else:
            extensions.append(plan)
    return extensions


def output_of(*command: str | Path) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def sources(*patterns: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


def cpu_extension() -> Extension | str:
    """The extension, or the reason why it cannot be built."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    if switch("_C") == "0":
        return "RKFAST_CPU=0 at build"
    if torch is None:
        return "there was no torch at build"
    if not header.exists():
        return f"{header} is missing; install Python's headers (Debian: python3-dev)"
    extension = cpp_extension.CppExtension(
        "rkfast._C",
        [source for source in sources("csrc/cpu/*.cpp") if not source.endswith("_kernel.cpp")],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=CXX_FLAGS,
        depends=sources("csrc/common/*.h", "csrc/cpu/*.h"),
    )
    extension.kernels = sources("csrc/cpu/*_kernel.cpp")
    return extension


def cuda_extension() -> Extension | str:
    """The extension, or the reason why it cannot be built."""
    if switch("_cuda") == "0":
        return "RKFAST_CUDA=0 at build"
    if torch is None:
        return "there was no torch at build"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    toolkit, release = cuda_toolkit(torch.version.cuda)
    if toolkit is None:
        return f"no CUDA {torch.version.cuda} toolkit was found{release}; name it by CUDA_HOME"
    files = sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu")
    # torch guesses the toolkit when it is imported, from whichever nvcc comes first.
    cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = str(toolkit)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", arch_list(toolkit))
    record["cuda"] = release
    return cpp_extension.CUDAExtension(
        "rkfast._cuda",
        files,
        include_dirs=[str(ROOT / "csrc"), str(toolkit / "include")],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-lineinfo"]},
        depends=sources("csrc/common/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cuh"),
    )


def cuda_toolkit(wanted: str) -> tuple[Path | None, str]:
    """The toolkit of torch's major version and its release, or None and what was found instead."""
    nvcc = shutil.which("nvcc")
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), cpp_extension.CUDA_HOME]
    folders = [Path(name) for name in named if name]
    # A folder of nvcc's that is a wrapper script or a link says little, so its usual homes are tried as well.
    folders += [Path(nvcc).resolve().parents[1]] if nvcc else []
    folders += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    seen = []
    for folder in dict.fromkeys(folders):
        if not (folder / "include" / "cuda_runtime_api.h").exists():
            continue
        version = re.search(r"release (\d+)\.(\d+)", output_of(folder / "bin" / "nvcc", "--version") or "")
        if version is None:
            continue
        if version[1] == wanted.split(".")[0]:
            return folder, f"{version[1]}.{version[2]}"
        seen.append(f"{version[1]}.{version[2]} in {folder}")
    return None, f" (only {', '.join(seen)})" if seen else ""


def arch_list(toolkit: Path) -> str:
    listed = (output_of(toolkit / "bin" / "nvcc", "--list-gpu-arch") or "").split()
    known = [arch for arch in CUDA_ARCHS if f"compute_{arch.replace('.', '')}" in listed]
    return ";".join(known or CUDA_ARCHS[:2]) + "+PTX"


class build(_build):
    sub_commands = [*_build.sub_commands, ("build_record", None)]


class build_record(Command):
    """Keeps what was built, after everything else, and holds the build to what was asked for."""

    user_options: list[tuple[str, str | None, str]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self) -> None:
        for name, variable in SWITCHES.items():
            if switch(name) == "1" and not record[name]["built"]:
                raise SystemExit(f"{variable}=1, and rkfast.{name} was not built: {record[name]['reason']}")
        if (ROOT / ".git").exists():
            record["commit"] = output_of("git", "rev-parse", "HEAD")
        inplace = self.editable_mode or self.get_finalized_command("build_ext").inplace
        file = (ROOT if inplace else Path(self.build_lib or "")) / "rkfast" / "_build.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib or "", "rkfast", "_build.json"))]

    def get_output_mapping(self) -> dict[str, str]:
        return {self.get_outputs()[0]: "rkfast/_build.json"} if self.editable_mode else {}

    def get_source_files(self) -> list[str]:
        return []


class bdist_wheel(_bdist_wheel):
    def run(self) -> None:
        # Only after the build is it known whether this wheel fits every platform.
        self.run_command("build")
        self.skip_build = True
        if not any(record[name]["built"] for name in SWITCHES):
            self.distribution.ext_modules = []
            self.root_is_pure = True
        super().run()


commands: dict[str, type[Command]] = {"bdist_wheel": bdist_wheel, "build": build, "build_record": build_record}

if torch is not None:

    class build_ext(cpp_extension.BuildExtension):
        extensions: list[Extension]

        def finalize_options(self) -> None:
            super().finalize_options()
            # Objects are kept where editable and ordinary builds find them again, apart for each torch.
            tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch-{torch.__version__}"
            self.build_temp = str(ROOT / "build" / f"temp.{tag}")

        def run(self) -> None:
            os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
            super().run()
            self.run_command("build_record")  # `setup.py build_ext --inplace` runs nothing else

        def build_extensions(self) -> None:
            """Each for itself: a CUDA toolkit that does not fit costs rkfast._cuda alone."""
            extensions = self.extensions
            for extension in extensions:
                name = extension.name.rpartition(".")[2]
                extension.optional = True
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
                if missing := self.missing_compiler():
                    leave_out(name, missing)
                    continue
                try:
                    self.extensions = [extension]
                    super().build_extensions()
                except Exception as error:
                    leave_out(name, f"the build failed ({error}); `pip install -v .` shows the compiler's own words")
                else:
                    record[name] = {"built": True}
            self.extensions = extensions

        def missing_compiler(self) -> str | None:
            command = getattr(self.compiler, "compiler_cxx", None)
            if not command:  # MSVC, which finds itself
                return None
            if shutil.which(command[0]) is None:
                return f"no C++ compiler was found ({command[0]}); install one, or name it by CXX"
            record["compiler"] = (output_of(command[0], "--version") or command[0]).split("\n")[0]
            return None

        def build_extension(self, extension: Extension) -> None:
            if kernels := getattr(extension, "kernels", []):
                objects = []
                for capability, flags in CAPABILITIES.items():
                    objects += self.compiler.compile(
                        kernels,
                        output_dir=str(Path(self.build_temp, capability)),
                        include_dirs=extension.include_dirs,
                        extra_postargs=[
                            *extension.extra_compile_args,
                            f"-DCPU_CAPABILITY={capability}",
                            f"-DCPU_CAPABILITY_{capability}",
                            *flags,
                        ],
                        depends=extension.depends,
                    )
                # The linker keeps the first copy of an inline function: DEFAULT's, which runs on every processor.
                extension.extra_objects = objects
                record["isa"] = list(CAPABILITIES)
            super().build_extension(extension)

    commands["build_ext"] = build_ext

setup(
    packages=[*find_packages(include=["rkfast", "rkfast.*"]), "rkfast.bench", "rkfast.bench.ops"],
    package_dir={"rkfast.bench": "bench", "rkfast.bench.ops": "bench/ops"},
    ext_modules=planned(),
    cmdclass=commands,
)
