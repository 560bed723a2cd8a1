import importlib.util
import runpy

from tests.package.process import ROOT

if importlib.util.find_spec("rkfast.bench") is None:
    runpy.run_path(str(ROOT / "bench" / "checkout.py"))
