"""Models by name: ``create_model("ho_resnet-18", method="rk4")``, ``create_model("irknet-5x1_5x1_5x1-ab")``."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn

from rkfast.models import cliquenet, comparators, densenet, ho_resnet, resnet, rkcnn, rknet, tsc
from rkfast.models.base import Family
from rkfast.models.base import ImageModel as ImageModel
from rkfast.models.cliquenet import CliqueNet as CliqueNet
from rkfast.models.convert import erknet_from_densenet as erknet_from_densenet
from rkfast.models.convert import irknet_from_cliquenet as irknet_from_cliquenet
from rkfast.models.densenet import DenseNet as DenseNet
from rkfast.models.ho_resnet import HOResNet as HOResNet
from rkfast.models.one_period import OnePeriodNet as OnePeriodNet
from rkfast.models.pretrained import from_pretrained as from_pretrained
from rkfast.models.pretrained import save_pretrained as save_pretrained
from rkfast.models.resnet import ResNet as ResNet
from rkfast.models.restack import restack as restack
from rkfast.models.restack import unstack as unstack
from rkfast.models.rkcnn import RKCNN as RKCNN
from rkfast.models.rknet import RKNet as RKNet

__all__ = [
    "RKCNN",
    "CliqueNet",
    "DenseNet",
    "HOResNet",
    "ImageModel",
    "OnePeriodNet",
    "RKNet",
    "ResNet",
    "create_model",
    "erknet_from_densenet",
    "from_pretrained",
    "irknet_from_cliquenet",
    "list_models",
    "restack",
    "save_pretrained",
    "unstack",
]

_FAMILIES: dict[str, Family] = {
    **ho_resnet.FAMILIES,
    **comparators.FAMILIES,
    **rknet.FAMILIES,
    **rkcnn.FAMILIES,
    **densenet.FAMILIES,
    **cliquenet.FAMILIES,
    **resnet.FAMILIES,
    **tsc.FAMILIES,
}
_WORD = re.compile(r"[a-z]{1,16}(?:_[a-z]{1,16})?")
_MAX_NAME = 256


def list_models() -> list[str]:
    """The models of the papers. Each family also builds others of the same form."""
    return [name for family in _FAMILIES.values() for name in family.names]


def create_model(name: str, *, fused: bool = True, memory: str = "speed", **options: Any) -> nn.Module:
    """A model by the name that its paper gives it, in upper or lower case.

    Args:
        name: one of ``list_models()``, or another of such a form: ``ho_resnet-<layers>``,
            and in its layout ``revnet-<layers>``, ``polynet-``, ``lm_resnet-`` and ``hyperbolic-`` (second-order CNN);
            ``erknet-<s>x<r>_<s>x<r>_...``, and ``irknet-``, ``rknet-`` alike, with s stages and r steps per period and
            at the end -a for attention in the transitions, -b for bottlenecks, -ab for both;
            ``rkcnn-e-<s>_<s>_...``, ``rkcnn-i-``, ``rkcnn-r-``; ``densenet121``, 161, 169 and 201;
            ``densenet-<depth>`` and ``densenet-<depth>-bc`` for CIFAR; ``cliquenet-<T>`` with T convolutions in three
            blocks and any of a, b and c (compression) at the end; ``resnet18``, 34, 50, 101 and 152,
            ``wide_resnet50_2``, ``resnext50_32x4d``, ``seresnet50`` and the like; ``resnet-<6n + 2>`` for CIFAR;
            ``tsc_resnet50``, ``tsc_resnext50_32x4d``, ``tsc_seresnet50``, ``tsc_resnet-110``, ``tsc_densenet-40`` and
            ``tsc_cliquenet-12``, with time stepping controllers and the stride where the first ResNet has it.
        fused: False builds the same model, with the same parameters and keys, of stock PyTorch operations.
        memory: what fused blocks keep for backward: dense and clique ones "speed" their bottlenecks, "min" only slots;
            residual ones "speed" what their convolutions make, "min" not what the last and the shortcut's make;
            a model's ``set_memory`` changes it.
        options: ``num_classes``, ``in_chans=3`` for all;

            ho_resnet: ``method``, one of ``rkfast.tableau.names()`` or "rk8" for "verner8" ("midpoint" for 30 layers,
            else "rk4"), ``width=64``, ``step=1.0`` and ``factor=1.0``, whose product is h, ``nested=0``,
            ``variant="textbook"|"authors"|"paper"``, ``learn=()`` or some of "a", "b", "h", ``per_channel=False``,
            ``tol=None`` and ``kappa=0.9`` of adaptive steps;
            revnet, polynet, lm_resnet, hyperbolic: ``width=64``;
            revnet: ``reversible=True``, no activations kept for the backward, which makes them again (fused only);
            hyperbolic: ``step=1.0``, ``symmetric=False`` or True for Ruthotto and Haber's F, -K^T relu(norm(K y));
            resnet: where the shape changes ``shortcut="b"``, a 1x1 convolution, or "a", zeros;
            resnet, wide_resnet, resnext, seresnet: ``stride_in_1x1=False`` or True (the first ResNet's, and so that of
            tsc_resnet, tsc_resnext and tsc_seresnet unless False is asked for);
            tsc_...: ``controller="lstm"|"2fc"|"indp"|"fixed"``, ``reduction`` (the paper's), ``value=1.0`` (fixed), as
            in ``rkfast.tsc.attach``; tsc_cliquenet: ``growth_rate=36``;
            all others: ``drop_rate=0.0``, a dropout after each convolution of the blocks and transitions;
            erknet, rknet: ``growth_rate=36`` and ``m=1``, each an int or one per period,
            ``stem="cifar"|"imagenet"``, ``multiscale``, ``neck`` (4), ``time_channel=False``;
            irknet, rknet: ``growth_rate``, ``stem``, ``multiscale``, ``neck`` (1), ``rounds=1``;
            rknet: ``methods="erk"|"irk"``, or one per period;
            rkcnn: ``growth_rate=36``, ``steps=1``, ``rounds=1``, each an int or one per period, ``neck=1``,
            ``attention=False``, ``multiscale=True``;
            densenet: ``growth_rate``, ``init_channels``;
            cliquenet: ``growth_rate=64``, ``init_channels=64``, ``transition_channels`` (as many as are read).

    Raises:
        TypeError: an option that the family does not have, or of a wrong type.
        ValueError: an unknown name, or a number that is out of range or does not fit.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")
    # Not lower() of anything: there are other letters and digits that it maps to these.
    known = name.lower() if name.isascii() and len(name) <= _MAX_NAME else ""
    word = _WORD.match(known)
    family = _FAMILIES.get(word[0]) if word else None
    if word is None or family is None:
        raise ValueError(
            f"name: {name[:64]!r} is not a model; expected one of the families {', '.join(_FAMILIES)}, such as "
            f"{next(iter(_FAMILIES.values())).names[0]}; rkfast.list_models() has more"
        )
    match = family.pattern.fullmatch(known, word.end())
    if match is None:
        raise ValueError(
            f"name: {name[:64]!r} is not a model; expected {family.form}, such as {', '.join(family.names[:3])}"
        )
    parts = match.groupdict()
    hidden = {*parts, *family.fixed, "fused"}
    supported = [option for option in inspect.signature(family.build).parameters if option not in hidden]
    for option in options:
        if option not in supported:
            raise TypeError(f"{option}: not an option of {word[0]}; supported are {', '.join(supported)}")
    model = family.build(**parts, **family.fixed, fused=fused, **options).set_memory(memory)
    model.config = {"name": known, "options": options}
    return model
