"""Entry points of torch.hub: ``torch.hub.load(path, "densenet121", source="local")``, by the names of
``rkfast.list_models()``. A clone has no compiled kernels, and then runs plain PyTorch."""

from collections.abc import Callable as _Callable
from typing import Any as _Any

import rkfast as _rkfast

dependencies = ["torch"]


def _entry(name: str) -> _Callable[..., _Any]:
    def make(pretrained: bool = False, **options: _Any) -> _Any:
        if pretrained:
            raise ValueError("pretrained: there are no weights here; rkfast.from_pretrained(folder) reads yours")
        return _rkfast.create_model(name, **options)

    make.__doc__ = f"rkfast.create_model({name!r}, **options). {_rkfast.create_model.__doc__}"
    return make


globals().update({name: _entry(name) for name in _rkfast.list_models()})
