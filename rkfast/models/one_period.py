"""The layout of HO-ResNet and of what it is compared with: a stem, one period at full resolution, a head."""

from __future__ import annotations

from torch import Tensor, nn

from rkfast.models.base import ImageModel
from rkfast.nn import batch_norm_relu
from rkfast.nn.norm import reads_moments
from rkfast.nn.pool import global_average


class OnePeriodNet(ImageModel):
    """A 3x3 stem, a period at full resolution, BatchNorm-ReLU, global average pool and a linear layer.

    Args:
        period: steps of ``width`` channels.
        width: channels.
        num_classes, in_chans: of output and input.
        fused: False takes stock PyTorch operations, with the same parameters and keys.

    Shape: Tensor [N, in_chans, H, W] -> [N, num_classes].
    """

    def __init__(
        self, period: nn.Module, *, width: int = 64, num_classes: int = 10, in_chans: int = 3, fused: bool = True
    ) -> None:
        super().__init__(num_classes=num_classes, fused=fused)
        self.stem = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.period = period
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)
        self.num_features = width
        self.feature_info = [{"num_chs": width, "reduction": 1, "module": "period"}]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def init_classifier(self, linear: nn.Linear) -> None:
        linear.reset_parameters()

    def forward_features(self, x: Tensor) -> Tensor:
        wanted = self.fused and reads_moments(self.norm)
        y, moments = self._period(self.period, self.stem(x), return_moments=wanted)
        return batch_norm_relu(self.norm, y, moments, fused=self.fused)

    def forward_head(self, features: Tensor | list[Tensor], pre_logits: bool = False) -> Tensor:
        assert isinstance(features, Tensor)
        pooled = global_average(features)
        return pooled if pre_logits else self.fc(pooled)
