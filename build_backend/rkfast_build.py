"""setuptools' PEP 517 backend, in which the build sees the torch of the environment that is installed into.

pip's isolated build hides that torch; an extension has to be compiled against it all the same. A torch is asked for
only where there is none.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 -- the hooks that stay setuptools' own

TORCH = "torch==2.13.0"


def _see_installed_torch() -> bool:
    if importlib.util.find_spec("torch") is None:
        # These two are all that isolates the build: without them the same interpreter sees what is around it.
        outer = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
        code = "import importlib.util as u; spec = u.find_spec('torch'); print(spec.origin if spec else '')"
        found = subprocess.run([sys.executable, "-c", code], env=outer, capture_output=True, text=True).stdout.strip()
        if not found:
            return False
        sys.path.append(str(Path(found).parents[1]))
    return True


HAS_TORCH = _see_installed_torch()


def _requires(requires: list[str]) -> list[str]:
    return requires if HAS_TORCH else [*requires, TORCH]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _requires(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _requires(build_meta.get_requires_for_build_editable(config_settings))


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    # setuptools would pack what an earlier build left here, modules that are gone by now included.
    for stale in (*Path("build").glob("lib*"), *Path("build").glob("bdist.*")):
        shutil.rmtree(stale)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
