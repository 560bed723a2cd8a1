"""Run by path: makes this folder importable as ``rkfast.bench`` in a checkout that is not installed."""

import importlib.util
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
if (here.parent / "rkfast").is_dir():
    sys.path.insert(0, str(here.parent))
if "rkfast.bench" not in sys.modules:
    import rkfast

    spec = importlib.util.spec_from_file_location(
        "rkfast.bench", here / "__init__.py", submodule_search_locations=[str(here)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["rkfast.bench"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    vars(rkfast)["bench"] = package
