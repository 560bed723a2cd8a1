from __future__ import annotations

import pytest

import rkfast
from rkfast import extras
from tests.package.process import python


def test_help_imports_no_command() -> None:
    code = (
        "import sys\nfrom rkfast.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as end: assert end.code == 0\n"
        "assert not {'rkfast.info', 'rkfast.demo', 'rkfast.plot', 'rkfast.bench', 'rkfast.train'} & set(sys.modules)"
    )
    out = python("-c", code)
    assert all(command in out for command in ("info", "demo", "plot", "bench"))


def test_version_and_unknown_command() -> None:
    assert python("-m", "rkfast", "--version").strip() == f"rkfast {rkfast.__version__}"
    assert "invalid choice" in python("-m", "rkfast", "fit", status=2)
    assert "COMMAND" in python("-m", "rkfast", status=2)


@pytest.mark.parametrize("module", ("rkfast.info", "rkfast"))
def test_info_as_a_module(module: str) -> None:
    out = python("-m", module, *(["info"] if module == "rkfast" else []))
    assert out.startswith(f"rkfast    {rkfast.__version__}")
    assert "Op x backend" in out


def test_require() -> None:
    assert extras.require("json", "demo").__name__ == "json"
    with pytest.raises(extras.MissingExtra, match=r"nosuchpackage is not installed; .* pip install 'rkfast\[demo\]'"):
        extras.require("nosuchpackage.part", "demo")


def test_require_passes_on_what_fails_inside_a_package(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "broken.py").write_text("import nosuchpackage")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="nosuchpackage") as caught:
        extras.require("broken", "demo")
    assert not isinstance(caught.value, extras.MissingExtra)


@pytest.mark.parametrize("missing", ("sklearn", "tqdm", "matplotlib"))
def test_demo_without_an_extra_prints_the_pip_line(missing: str) -> None:
    code = (
        f"import sys\nsys.modules[{missing!r}] = None\n"
        "from rkfast.cli import main\nsys.exit(main(['demo', '--epochs', '1']))"
    )
    out = python("-c", code, status=1)
    assert "pip install 'rkfast[demo]'" in out
    assert "Traceback" not in out


def test_info_tells_of_a_forced_backend_and_survives_head() -> None:
    code = "import os, sys\nos.environ['RKFAST_BACKEND'] = {!r}\nfrom rkfast.cli import main\nsys.exit(main(['info']))"
    assert "RKFAST_BACKEND=reference\n" in python("-c", code.format("reference"))
    assert "RKFAST_BACKEND=foo: no backend" in python("-c", code.format("foo"))
    code = (
        "import os, sys\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"
        "from rkfast.cli import main\nsys.exit(main(['info']))"
    )
    assert "BrokenPipe" not in python("-c", code, status=1)


def test_demo_tells_of_an_unwritable_folder_before_it_trains(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").touch()
    out = python("-m", "rkfast", "demo", "--out", str(tmp_path / "file"), status=2)
    assert "--out" in out and "Traceback" not in out and "step/s" not in out
