"""Real archives, built and installed by pip from a copy of the sources, and what `rkfast info` says in each."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import pytest
import torch
from filelock import FileLock  # torch needs it
from setuptools import build_meta

from rkfast import native
from tests.package.process import ROOT, python, run

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
BUILD = ("--no-deps", "--no-build-isolation")
NOT_SOURCE = shutil.ignore_patterns(
    *(".git", ".*cache", ".venv*", ".hypothesis", "build", "dist", "results", "__pycache__", "*.egg-info", "*.so"),
    *("*.pyd", "_build.json", "demo.json", "demo.png"),
)
Install = Callable[[Path], Path]


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("tree") / "rkfast", ignore=NOT_SOURCE))


@pytest.fixture(scope="session")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    python("-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(tree))
    (file,) = folder.iterdir()
    return file


def wheel(source: Path, folder: Path, **variables: str) -> Path:
    run(*PIP, "wheel", *BUILD, "-w", folder, source, MAX_JOBS="2", **variables)
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="session")
def platform_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # whichever worker comes first compiles for all
    folder = shared / "platform"
    with FileLock(shared / "platform.lock"):
        if not folder.exists():
            folder.mkdir()
            return wheel(sdist, folder, RKFAST_CPU="1", CXXFLAGS="-O0")  # in half the time
    (file,) = folder.iterdir()
    return file


@pytest.fixture(scope="session")
def pure_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel(sdist, tmp_path_factory.mktemp("pure"), RKFAST_CPU="0", RKFAST_CUDA="0")


@pytest.fixture(scope="session")
def no_compiler_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    empty = tmp_path_factory.mktemp("path")
    return wheel(sdist, tmp_path_factory.mktemp("no_compiler"), PATH=str(empty), CXX="g++", RKFAST_CUDA="0")


@pytest.fixture(scope="session")
def install(tmp_path_factory: pytest.TempPathFactory) -> Install:
    done: dict[Path, Path] = {}

    def installed(file: Path) -> Path:
        if file not in done:
            done[file] = tmp_path_factory.mktemp("installed")
            run(*PIP, "install", "--no-deps", "--target", done[file], file)
        return done[file]

    return installed


def names(file: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(file).namelist() if ".dist-info/" not in name}


def info(path: Path, prelude: str = "", **variables: str) -> tuple[str, dict[str, dict[str, str]]]:
    """What `rkfast info` prints, and its table: op -> backend -> yes or the reason."""
    code = f"{prelude}\nfrom rkfast.cli import main\nmain(['info'])"
    out = python("-c", code, path=path, **variables)
    assert f"in {path / 'rkfast'}\n" in out, "another rkfast was found"
    head, *rows = out.split("Op x backend\n")[1].splitlines()
    reasons = dict(re.findall(r"^\((\d+)\) (.*)$", out, re.MULTILINE))
    table = {}
    for row in rows[: rows.index("")]:
        op, *cells = re.findall(r"no \(\d+\)|\S+", row)
        table[op] = dict(
            zip(head.split(), (cell if cell == "yes" else reasons[cell[4:-1]] for cell in cells), strict=True)
        )
    assert set(table) >= {"rk_sum", "rk_sum_backward", "bn_rk_sum", "bn_rk_sum_backward", "channel_moments"}
    return out, table


def column(table: dict[str, dict[str, str]], backend: str) -> set[str]:
    return {row[backend] for row in table.values()}


NO_TRITON = "import sys; sys.modules['triton'] = None"
MISSING = "there is no such implementation"  # of dense_block in CUDA C++


def test_info_full(platform_wheel: Path, install: Install) -> None:
    out, table = info(install(platform_wheel))
    assert column(table, "cpu") == column(table, "reference") == {"yes"}
    assert re.search(rf"Build\ntorch +{re.escape(torch.__version__)}\n", out)
    assert re.search(r"rkfast\._C +built\n", out)
    if torch.version.cuda is None:
        assert column(table, "cuda") == {"this torch is a CPU build", MISSING}
        assert re.search(r"rkfast\._cuda +not built: torch \S+ is a CPU build\n", out)
    if native.triton_missing() is None:
        _, interpreted = info(install(platform_wheel), TRITON_INTERPRET="1")
        assert column(interpreted, "triton") == {"yes"}


def test_info_no_triton(platform_wheel: Path, install: Install) -> None:
    _, table = info(install(platform_wheel), NO_TRITON)
    (reason,) = column(table, "triton")
    assert reason.startswith("Triton ")
    assert sys.platform != "linux" or "pip install 'rkfast[triton]'" in reason
    assert column(table, "cpu") == {"yes"}


def test_info_no_compiler(no_compiler_wheel: Path, install: Install) -> None:
    assert no_compiler_wheel.name.endswith("-py3-none-any.whl")
    out, table = info(install(no_compiler_wheel))
    (reason,) = column(table, "cpu")
    assert reason == "rkfast._C was not built: no C++ compiler was found (g++); install one, or name it by CXX"
    assert column(table, "reference") == {"yes"}
    assert re.search(r"compiler +none\n", out)


def test_info_pure(pure_wheel: Path, install: Install) -> None:
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    out, table = info(install(pure_wheel))
    assert column(table, "cpu") == {"rkfast._C was not built: RKFAST_CPU=0 at build"}
    assert column(table, "reference") == {"yes"}
    assert re.search(r"rkfast\._cuda +not built: RKFAST_CUDA=0 at build\n", out)


def test_pure_python_computes(pure_wheel: Path, install: Install) -> None:
    code = (
        "import torch, rkfast\nx = torch.ones(1, 2, 3, 3, requires_grad=True)\n"
        "y = rkfast.ops.rk_sum([x, x], [1.0, 2.0]); y.sum().backward()\n"
        "assert (y == 3).all() and (x.grad == 3).all()\nprint(rkfast.explain('rk_sum'))"
    )
    assert python("-c", code, path=install(pure_wheel)).startswith("rk_sum: reference")


def test_torch_changed_after_the_build(platform_wheel: Path, install: Install, tmp_path: Path) -> None:
    path = tmp_path / "installed"
    shutil.copytree(install(platform_wheel), path)
    record = path / "rkfast" / "_build.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "torch": "2.10.0+elsewhere"}))
    out, table = info(path)
    (reason,) = column(table, "cpu")
    assert reason.startswith(f"rkfast._C was built for torch 2.10.0+elsewhere and this is torch {torch.__version__}")
    assert "rebuild with `pip install" in reason
    assert re.search(r"Build\ntorch +2\.10\.0\+elsewhere, but this is torch .*; rebuild with `pip install", out)
    code = (
        "import torch, rkfast\nx = torch.ones(1, 2, 3, 3)\nrkfast.ops.rk_sum([x], [2.0])\n"
        "print(rkfast.explain('rk_sum'))\n"
        "with rkfast.use('cpu'): rkfast.ops.rk_sum([x], [2.0])"
    )
    out = python("-c", code, path=path, status=1)
    assert "rk_sum: reference" in out
    assert "backend 'cpu' was asked for and cannot serve this call: rkfast._C was built for" in out


def test_a_broken_extension_has_a_reason(platform_wheel: Path, install: Install, tmp_path: Path) -> None:
    path = tmp_path / "installed"
    shutil.copytree(install(platform_wheel), path)
    for extension in path.glob("rkfast/_C.*.*"):
        extension.write_bytes(b"no library")
    _, table = info(path)
    (reason,) = column(table, "cpu")
    assert reason.startswith("rkfast._C does not load (")


def test_read_only_home(platform_wheel: Path, install: Install, tmp_path: Path) -> None:
    wall = tmp_path / "file"
    wall.touch()
    code = "import torch, rkfast\nwith rkfast.use('cpu'): rkfast.ops.rk_sum([torch.ones(1, 2)], [2.0])"
    python("-c", code, path=install(platform_wheel), HOME=str(wall / "home"))


def python_files(folder: Path, prefix: str) -> set[str]:
    return {
        f"{prefix}/{file.relative_to(folder).as_posix()}"
        for file in folder.rglob("*.py*")
        if file.suffix in (".py", ".pyi")
    }


def test_wheel_contents(tree: Path, platform_wheel: Path, pure_wheel: Path) -> None:
    expected = python_files(tree / "rkfast", "rkfast") | python_files(tree / "bench", "rkfast/bench")
    expected |= {"rkfast/py.typed", "rkfast/_build.json"}
    assert names(pure_wheel) == expected
    compiled = names(platform_wheel) - expected
    assert expected <= names(platform_wheel)
    assert {name.split(".")[0] for name in compiled} - {"rkfast/_cuda"} == {"rkfast/_C"}


def test_sdist_contents(tree: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    generated = {"PKG-INFO", "setup.cfg", *(name for name in packed if ".egg-info/" in name)}
    sources = {file.relative_to(tree).as_posix() for file in tree.rglob("*") if file.is_file()}
    by_build = {name for name in sources if ".egg-info/" in name or "__pycache__/" in name}
    assert packed - generated == sources - by_build - {".gitignore"}


def test_requirements(platform_wheel: Path, pure_wheel: Path) -> None:
    for file in (platform_wheel, pure_wheel):
        archive = zipfile.ZipFile(file)
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        required = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist")
        assert [r for r in required if "extra ==" not in r] == ["torch>=2.10"]
        assert not [r for r in required if re.match(r"torch\b", r) and re.search(r"[<~]|==(?=\s*\d)", r.split(";")[0])]


def test_an_installed_torch_is_not_replaced(platform_wheel: Path) -> None:
    out = run(*PIP, "install", "--dry-run", "--no-index", "--ignore-installed", "--no-deps", platform_wheel)
    assert "Would install rkfast-" in out
    out = run(*PIP, "install", "--dry-run", "--no-index", "--force-reinstall", "--no-deps", platform_wheel)
    assert "torch" not in out.split("Would install")[1]


def test_stub_types_the_functions_of_the_extension(platform_wheel: Path, install: Install) -> None:
    path = install(platform_wheel)
    code = (
        "import torch; from rkfast import _C\n"
        "print(*(f'def {vars(_C)[n].__doc__.splitlines()[0]}: ...' for n in dir(_C) if n[:2] != '__'), sep='\\n')"
    )

    def signatures(source: str) -> dict[str, list[str]]:
        functions = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
        return {f.name: [a.arg for a in f.args.args] for f in functions}

    assert signatures((path / "rkfast" / "_C.pyi").read_text()) == signatures(python("-c", code, path=path))


def test_every_instruction_set_is_served(platform_wheel: Path, install: Install) -> None:
    code = (
        "import torch, rkfast\nx = torch.arange(40.).reshape(1, 2, 4, 5)\n"
        "with rkfast.use('cpu'): y = rkfast.ops.rk_sum([x, x], [1.0, 2.0])\n"
        "assert torch.equal(y, 3 * x)\nprint(torch.backends.cpu.get_cpu_capability())"
    )
    known = ("DEFAULT", "AVX2", "AVX512")
    own = torch.backends.cpu.get_cpu_capability()
    if own not in known:
        pytest.skip(f"{own} has one set of kernels")
    for asked in known[: known.index(own) + 1]:
        assert python("-c", code, path=install(platform_wheel), ATEN_CPU_CAPABILITY=asked.lower()).strip() == asked


def test_script(platform_wheel: Path, install: Install) -> None:
    path = install(platform_wheel)
    assert run(path / "bin" / "rkfast", "--version", path=path).startswith("rkfast ")


def test_editable(tree: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tree, tmp_path / "source", ignore=NOT_SOURCE))
    run(*PIP, "install", *BUILD, "--prefix", tmp_path / "prefix", "-e", source, RKFAST_CPU="0", RKFAST_CUDA="0")
    (packages,) = {file.parent.parent for file in tmp_path.glob("prefix/**/*.dist-info/RECORD")}
    code = (
        f"import site, sys; site.addsitedir({str(packages)!r}); sys.path.append({sysconfig.get_path('purelib')!r})\n"
        "import rkfast, rkfast.bench.ops, rkfast.native\n"
        "print(rkfast.__file__, rkfast.bench.ops.__file__)\nprint(rkfast.native.cpu_reason())"
    )
    # Without site, because rkfast may be installed here in the same way.
    files, reason = python("-S", "-c", code, path=None).splitlines()
    assert files.split() == [str(source / "rkfast" / "__init__.py"), str(source / "bench" / "ops" / "__init__.py")]
    assert reason == "rkfast._C was not built: RKFAST_CPU=0 at build"


@pytest.mark.parametrize("variable", ("RKFAST_CPU", "RKFAST_CUDA"))
def test_what_is_asked_for_is_built_or_fails(tree: Path, tmp_path: Path, variable: str) -> None:
    if variable == "RKFAST_CUDA" and torch.version.cuda is not None:
        pytest.skip("this torch has CUDA, and so this build may succeed")
    source = Path(shutil.copytree(tree, tmp_path / "source", ignore=NOT_SOURCE))
    switches = {"RKFAST_CPU": "0", "RKFAST_CUDA": "0", variable: "1"}
    command = (*PIP, "wheel", "-v", *BUILD, "-w", tmp_path, source)
    assert f"{variable}=1, and rkfast." in run(*command, status=1, PATH=str(tmp_path), CXX="g++", **switches)
    assert f"{variable}=yes: expected auto, 0 or 1" in run(*command, status=1, **{**switches, variable: "yes"})


def test_backend_asks_for_torch_only_where_there_is_none(tree: Path, tmp_path: Path) -> None:
    """-S hides what is installed and the overlay gives setuptools back, which is how pip isolates a build."""
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    for part in Path(build_meta.__file__).parents[1].iterdir():
        if part.name.startswith(("setuptools", "pkg_resources", "_distutils_hack")):
            (overlay / part.name).symlink_to(part)
    bare = tmp_path / "bare"
    run(sys.executable, "-m", "venv", "--without-pip", bare)
    code = (
        "import os, sys; sys.path.append('build_backend'); import rkfast_build as backend\n"
        "print(backend.get_requires_for_build_wheel()[-1:], backend.get_requires_for_build_editable()[-1:])"
    )
    pin = "['torch==2.13.0']"
    for interpreter, expected in ((sys.executable, "[] []"), (bare / "bin" / "python", f"{pin} {pin}")):
        out = run(interpreter, "-S", "-c", code, path=overlay, cwd=tree)
        assert out.splitlines()[-1] == expected, out
