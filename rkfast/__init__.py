"""Runge-Kutta stage combination for convolutional networks, fused."""

from typing import TYPE_CHECKING, Any

from rkfast import nn as nn
from rkfast import ops as ops
from rkfast import tableau as tableau
from rkfast.dispatch import explain as explain
from rkfast.dispatch import use as use
from rkfast.models import create_model as create_model
from rkfast.models import from_pretrained as from_pretrained
from rkfast.models import list_models as list_models
from rkfast.models import restack as restack
from rkfast.models import save_pretrained as save_pretrained
from rkfast.models import unstack as unstack
from rkfast.swap import estimate as estimate
from rkfast.swap import export as export
from rkfast.swap import fold as fold
from rkfast.swap import fuse as fuse
from rkfast.swap import fused as fused
from rkfast.swap import graphed as graphed
from rkfast.swap import max_batch as max_batch
from rkfast.swap import profile as profile
from rkfast.swap import report as report
from rkfast.swap import tune as tune
from rkfast.swap import unfuse as unfuse
from rkfast.swap import verify as verify

if TYPE_CHECKING:
    from rkfast import ode as ode
    from rkfast import tsc as tsc

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("ode", "tsc"):  # which most networks do without
        import importlib

        return importlib.import_module(f"rkfast.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
