"""Residual blocks of torchvision, timm and others, by the names of their layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rkfast import dispatch
from rkfast.nn.form import Form, children, form_of, present, residual, sample
from rkfast.nn.norm import fusible, hooked
from rkfast.ops import layout
from rkfast.swap.kind import Kind, mixes


class FusedBlock(Kind):
    """A residual block: BatchNorm, ReLU and convolution as one op inside, and the join as one."""

    title = "residual block"

    @classmethod
    def reads(cls, module: Any) -> Form | str | None:
        form = form_of(module)
        if form is None:
            missing = {"conv1", "bn1", "conv2", "bn2"} - children(module)
            return None if missing else "its layers are not those of a BasicBlock or Bottleneck"
        norm = getattr(module, form.norm)
        if hooked(norm):
            return f"a hook on {form.norm}"
        if not fusible(norm) and not isinstance(norm, nn.BatchNorm2d):
            return f"{form.norm} is {type(norm).__name__}, not nn.BatchNorm2d"
        return form

    @classmethod
    def sample(cls, module: Any) -> tuple[int, ...]:
        return sample(module)

    def refuses(self, found: Form, x: Tensor) -> str | None:
        alone = not torch.is_grad_enabled() and x.is_cpu and not present(self, found.behind)
        if alone and not dispatch.forced() and not layout.is_channels_last(x):
            return "evaluation of contiguous images, whose convolutions are PyTorch's, gains nothing on a CPU"
        return mixes(x)

    def fused(self, found: Form, x: Tensor) -> Tensor:
        return residual(found, self, x, memory=self._rkfast.memory)
