"""rkfast's models in timm's registry: ``import rkfast.timm``, then ``timm.create_model("erknet_7x1_7x1_7x1")``.

A name is that of ``rkfast.list_models()`` with "_" for "-"; models of families that timm has too (DenseNet, ResNet,
Wide ResNet, ResNeXt, SE-ResNet) have "rk_" before it, such as "rk_densenet121" and "rk_resnet_20". Nothing of timm's
own is replaced; ``rkfast.fuse`` makes its networks faster.

Options are those of ``rkfast.create_model``, and timm's: ``num_classes=0`` leaves the linear layer out, and
``features_only=True`` returns what periods (blocks, stages) end with, of which ``out_indices`` chooses. There are no
pretrained weights. Importing this raises MissingExtra where timm is not installed. timm needs torchvision: install the
one that goes with your torch first, or pip may bring another torch with it.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from rkfast.extras import require
from rkfast.models import ImageModel, create_model, list_models

models = require("timm.models", "timm")

SHARED = re.compile(r"(densenet|resnet|wide_resnet|resnext|seresnet)[-0-9]")
IMAGENET = re.compile(r"(tsc_)?(densenet|resnet|wide_resnet|resnext|seresnet)[0-9]")
CIFAR_CFG = {
    "input_size": (3, 32, 32), "num_classes": 10, "crop_pct": 1.0,
    "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616),
}  # fmt: skip


def timm_name(name: str) -> str:
    """What timm calls a model of ``rkfast.list_models()``."""
    return ("rk_" if SHARED.match(name) else "") + name.replace("-", "_")


def _registered(name: str) -> Any:
    known = timm_name(name)

    def make(
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: Any = None,
        features_only: bool = False,
        out_indices: Any = None,
        num_classes: int | None = None,
        **options: Any,
    ) -> nn.Module:
        if pretrained:
            raise ValueError(
                f"pretrained: there are no weights of {known}; checkpoint_path= loads yours, and "
                "rkfast.from_pretrained what rkfast.save_pretrained has written"
            )
        if not options.get("drop_rate"):  # timm's scripts give 0 to every model
            options.pop("drop_rate", None)
        if num_classes:
            options["num_classes"] = num_classes
        model = create_model(name, **options)
        assert isinstance(model, ImageModel)
        if num_classes == 0:
            model.reset_classifier(0)
        first = next(path for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
        return models.build_model_with_cfg(
            lambda **_: model,
            known,
            pretrained=False,
            pretrained_cfg=pretrained_cfg,
            pretrained_cfg_overlay={
                "first_conv": first, "classifier": model._classifier, **(pretrained_cfg_overlay or {})
            },
            features_only=features_only,
            # By hooks on whole periods, which leave the network and what is fused inside as they are.
            feature_cfg={
                "feature_cls": "hook",
                "out_indices": tuple(range(len(model.feature_info))) if out_indices is None else out_indices,
            },
        )  # fmt: skip

    make.__name__ = make.__qualname__ = known
    make.__doc__ = f"``rkfast.create_model({name!r})`` for timm."
    return models.register_model(make)


# By their names and here, for timm.
default_cfgs = models.generate_default_cfgs(
    {timm_name(name): {} if IMAGENET.match(name) else CIFAR_CFG for name in list_models()}
)
__all__ = ["timm_name"]  # to which timm adds every model
globals().update({timm_name(name): _registered(name) for name in list_models()})
