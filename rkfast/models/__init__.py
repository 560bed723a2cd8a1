"""Models by name: ``create_model("ho_resnet-18", method="rk4")``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from rkfast.models import ho_resnet
from rkfast.models.ho_resnet import HOResNet as HOResNet

__all__ = ["HOResNet", "create_model", "list_models"]

_FAMILIES: dict[str, Callable[..., nn.Module]] = {"ho_resnet": ho_resnet.build}
_NAMES = {"ho_resnet": ho_resnet.NAMES}
_NAME = re.compile(r"([a-z][a-z0-9_]{0,31})-([0-9]{1,6})", re.ASCII)


def list_models() -> list[str]:
    """The models of the papers. Each family also builds other depths of the same form."""
    return [name for names in _NAMES.values() for name in names]


def create_model(name: str, *, fused: bool = True, **options: Any) -> nn.Module:
    """A model by its name, such as ``"ho_resnet-18"``: the family, and the number of layers.

    Args:
        name: one of ``list_models()``, or another depth of such a family.
        fused: False builds the same model, with the same parameters and keys, of stock PyTorch operations.
        options: ho_resnet: ``method="rk4"|"midpoint"|"euler"``, ``width=64``, ``num_classes=10``, ``in_chans=3``,
            ``step=1.0``.

    Raises:
        TypeError: an option that the family does not have, or of a wrong type.
        ValueError: an unknown name, or a number that is out of range or does not fit the method.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in _FAMILIES:
        raise ValueError(
            f"name: {name[:64]!r} is not a model; expected <family>-<layers> of the families {', '.join(_FAMILIES)}, "
            f"such as {', '.join(list_models())}"
        )
    family = _FAMILIES[match[1]]
    supported = [option for option in inspect.signature(family).parameters if option not in ("layers", "fused")]
    for option in options:
        if option not in supported:
            raise TypeError(f"{option}: not an option of {match[1]}; supported are {', '.join(supported)}")
    return family(int(match[2]), fused=fused, **options)
