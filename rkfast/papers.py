"""What the papers print of their networks, and how they count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rkfast.models import create_model
from rkfast.nn import Attention, ERKStep, IRKStep, NormPool, RKCNNStep
from rkfast.tableau import Tableau


class Dataset(NamedTuple):
    """A column of the tables: ``size`` of an image, and the classes of the networks whose parameters are printed."""

    title: str
    size: int
    num_classes: int


DATASETS = {
    "imagenet": Dataset("ImageNet, single crop, top-1", 224, 1000),
    "cifar10": Dataset("CIFAR-10", 32, 10),
    "cifar10+": Dataset("CIFAR-10, augmented", 32, 10),
    # The tables print the parameters of 10 classes here too.
    "cifar100": Dataset("CIFAR-100", 32, 10),
    "cifar100+": Dataset("CIFAR-100, augmented", 32, 10),
    "svhn": Dataset("SVHN", 32, 10),
}


class Row(NamedTuple):
    """A row of a table, with numbers as they are printed.

    model, options: what ``create_model`` makes it of. millions: parameters. billions: FLOPs. errors: in per cent, by
    the keys of DATASETS. None: not printed.
    """

    model: str
    options: dict[str, Any]
    millions: str | None
    billions: str | None
    errors: dict[str, float]


# RKNet: Zhu et al., "Convolutional Neural Networks combined with Runge-Kutta Methods", arXiv 1802.08831v6.

RKNET_TABLE_1 = [
    Row("erknet-6x1_6x1_6x1", {}, "0.74", "0.66", {"cifar10": 7.08}),
    Row("erknet-7x1_6x1_6x1", {}, "0.83", "0.83", {"cifar10": 7.02}),
    Row("erknet-7x1_7x1_6x1", {}, "0.91", "0.87", {"cifar10": 6.67}),
    Row("erknet-7x1_7x1_7x1", {}, "0.99", "0.88", {"cifar10": 6.61}),
    Row("irknet-3x1_3x1_3x1", {}, "0.32", "0.38", {"cifar10": 7.18}),
    Row("irknet-4x1_3x1_3x1", {}, "0.40", "0.62", {"cifar10": 6.89}),
    Row("irknet-4x1_4x1_3x1", {}, "0.49", "0.68", {"cifar10": 6.63}),
    Row("irknet-4x1_4x1_4x1", {}, "0.57", "0.69", {"cifar10": 6.50}),
]

_AB, _5A, _6A = "irknet-5x1_5x1_5x1-ab", "irknet-5x1_5x1_5x1-a", "irknet-6x1_6x1_6x1-a"
RKNET_TABLE_2 = [
    Row(
        _AB,
        {"growth_rate": 80},
        "1.40",
        "2.17",
        # The text submitted to ICLR 2019 has 21.77 in place of 20.85.
        {"cifar10": 5.27, "cifar10+": 4.23, "cifar100": 24.35, "cifar100+": 20.85, "svhn": 1.74},
    ),
    Row(_5A, {"growth_rate": 80}, "4.37", "5.44", {"svhn": 1.63}),
    Row(
        _AB,
        {"growth_rate": 150},
        "4.87",
        "7.62",
        {"cifar10": 4.60, "cifar10+": 3.60, "cifar100": 21.39, "cifar100+": 19.42, "svhn": 1.64},
    ),
    Row(_6A, {"growth_rate": 80}, "6.28", "7.92", {"svhn": 1.52}),
    Row(_AB, {"growth_rate": 180}, "6.99", "10.98", {"cifar10": 4.56, "cifar100": 20.88, "cifar100+": 18.61}),
    Row(_AB, {"growth_rate": 200}, "8.63", "13.55", {"cifar10+": 3.54, "cifar100": 20.67, "cifar100+": 18.11}),
    Row(_AB, {"growth_rate": 240}, "12.41", "19.51", {"cifar10+": 3.40, "cifar100": 20.58}),
]

_IMAGENET = {"growth_rate": 32, "stem": "imagenet", "num_classes": 1000}
RKNET_TABLE_3 = [
    Row("erknet-3x1_3x1_3x1_1x1-b", _IMAGENET | {"m": (2, 4, 8, 16)}, "6.95", "5.20", {"imagenet": 25.47}),
    Row("erknet-3x1_3x1_4x1_2x1-b", _IMAGENET | {"m": (2, 4, 8, 20)}, "14.49", "6.35", {"imagenet": 24.12}),
    Row("erknet-3x1_3x1_6x1_2x1-b", _IMAGENET | {"m": (2, 4, 8, 28)}, "25.51", "8.50", {"imagenet": 23.14}),
]

# The network of appendix C, of which the paper prints the step sizes alone.
RKNET_TABLE_4 = [
    Row("rknet-1x8_1x2_1x2-b", {"growth_rate": 12, "m": (2, 9, 12), "time_channel": True}, None, None, {}),
]

# DenseNet: Huang et al., "Densely Connected Convolutional Networks", Table 2; FLOPs and SVHN from RKNet's Table 2.
DENSENET_TABLE_2 = [
    Row("densenet-40", {}, "1.0", None, {"cifar10": 7.00, "cifar10+": 5.24, "cifar100": 27.55, "cifar100+": 24.42}),
    Row("densenet-100", {}, "7.0", None, {"cifar10": 5.77, "cifar10+": 4.10, "cifar100": 23.79, "cifar100+": 20.20}),
    Row(
        "densenet-100",
        {"growth_rate": 24},
        "27.2",
        "14.53",  # of a stem with 48 channels, which would have 28.1 million parameters
        {"cifar10": 5.83, "cifar10+": 3.74, "cifar100": 23.42, "cifar100+": 19.25, "svhn": 1.59},
    ),
    Row("densenet-100-bc", {}, "0.8", None, {"cifar10": 5.92, "cifar10+": 4.51, "cifar100": 24.15, "cifar100+": 22.27}),
    Row(
        "densenet-250-bc",
        {"growth_rate": 24},
        "15.3",
        "10.83",
        {"cifar10": 5.19, "cifar10+": 3.62, "cifar100": 19.64, "cifar100+": 17.60, "svhn": 1.74},
    ),
    Row("densenet-190-bc", {"growth_rate": 40}, "25.6", "18.59", {"cifar10+": 3.46, "cifar100+": 17.18}),
]

# The errors of one crop that the authors' repository (liuzhuang13/DenseNet) gives for its networks.
DENSENET_IMAGENET = [
    Row("densenet121", {}, None, None, {"imagenet": 25.0}),
    Row("densenet169", {}, None, None, {"imagenet": 23.6}),
    Row("densenet201", {}, None, None, {"imagenet": 22.5}),
    Row("densenet161", {}, None, None, {"imagenet": 22.2}),
]

# CliqueNet: Yang et al., "Convolutional Neural Networks with Alternately Updated Clique"; the last row is from RKNet's
# Table 2. With bottlenecks T counts two convolutions per layer. Those for ImageNet have four blocks, and are not here.
CLIQUENET = [
    Row("cliquenet-12", {"growth_rate": 36}, "0.94", "0.91", {"cifar10": 5.93, "cifar100": 27.32, "svhn": 1.77}),
    Row("cliquenet-15", {"growth_rate": 64}, "4.49", "4.21", {"cifar10": 5.12, "cifar100": 23.98, "svhn": 1.62}),
    Row("cliquenet-15", {"growth_rate": 80}, "6.94", "6.45", {"cifar10": 5.10, "cifar100": 23.32, "svhn": 1.56}),
    Row("cliquenet-18", {"growth_rate": 80}, "10.14", "9.45", {"cifar10": 5.06, "cifar100": 23.14, "svhn": 1.51}),
    Row("cliquenet-30-abc", {"growth_rate": 150}, "10.48", "10.56", {"cifar10": 5.06, "cifar100": 21.83, "svhn": 1.64}),
]

# What RKNet's Table 2 prints of other networks, as far as they are here.
RKNET_TABLE_2_QUOTED = [*(row for row in DENSENET_TABLE_2 if row.billions), *CLIQUENET[-2:]]


class Quoted(NamedTuple):
    """A row of another paper's network, of which the quoting one says neither what it is made of nor how it was
    trained."""

    title: str
    millions: str
    errors: dict[str, float]


# By table, as recipes have it. With these go the curves of CliqueNets in RKNet's Figure 4, and HO-ResNet's Figure 13,
# which does not say of which networks it is.
QUOTED = {
    "rknet/t2": [
        Quoted("pre-act ResNet", "10.2", {"cifar10": 10.56, "cifar10+": 4.62, "cifar100": 33.47, "cifar100+": 22.71}),
        Quoted("WRN", "11.0", {"cifar10+": 4.27, "cifar100+": 20.43, "svhn": 1.54}),
        Quoted("WRN", "36.5", {"cifar10+": 4.00, "cifar100+": 19.25}),
        Quoted("Hamiltonian", "1.68", {"cifar10+": 5.98, "cifar100+": 26.11}),
        Quoted("LM-architecture", "1.7", {"cifar10+": 5.27, "cifar100+": 22.9}),
        Quoted("LM-architecture", "68.8", {"cifar100+": 16.79}),
    ],
    "tsc/t2": [Quoted("ResNet (reported)", "25.56", {"imagenet": 24.70})],
}

# HO-ResNet: Luo et al., "Rethinking ResNets: Improved Stacking Strategies With High Order Schemes". Printed are
# accuracies, and parameters of convolutions and linear layer only, so that these rows stand apart from ROWS. The
# "HO-ResNet-34" of Table 4 has 30 layers: its 93.39 and 94.17 are those of RK8 X1 in Table 2.


def _ho_resnet(layers: int, method: str, millions: str | None, accuracy: float, **options: Any) -> Row:
    errors = {"cifar10": round(100 - accuracy, 2)}
    return Row(f"ho_resnet-{layers}", {"method": method, **options}, millions, None, errors)


HO_RESNET_TABLE_2 = [
    _ho_resnet(10, "euler", "0.3", 91.72),
    _ho_resnet(10, "midpoint", "0.3", 91.97),
    _ho_resnet(10, "rk4", "0.3", 91.51),
    _ho_resnet(18, "euler", "0.59", 92.68),
    _ho_resnet(18, "midpoint", "0.59", 92.95),
    _ho_resnet(18, "rk4", "0.59", 92.98),
    _ho_resnet(30, "euler", "1.03", 93.02),
    _ho_resnet(30, "rk8", "1.03", 93.39),
    _ho_resnet(26, "rk4", "0.89", 93.41),
    _ho_resnet(30, "rk8", "1.03", 94.17, factor=2.0),
    _ho_resnet(58, "euler", "2.07", 92.71),
    _ho_resnet(58, "midpoint", "2.07", 94.08),
    _ho_resnet(58, "rk4", "2.07", 94.79),
    _ho_resnet(58, "rk8", "2.07", 94.91),
]
HO_RESNET_TABLE_3 = [
    _ho_resnet(18, "midpoint", "0.59", 92.95),
    _ho_resnet(18, "midpoint", "0.59", 93.12, nested=1),
    _ho_resnet(34, "midpoint", "1.18", 93.86),
    _ho_resnet(34, "midpoint", "1.18", 93.72, nested=1),
    _ho_resnet(34, "midpoint", "1.18", 93.81, nested=2),
]
HO_RESNET_TABLE_4 = [
    _ho_resnet(30, "rk8", None, accuracy, factor=factor)
    for factor, accuracy in ((1.0, 93.39), (1.2, 93.56), (2.0, 94.17), (2.5, 94.09), (3.0, 93.67))
]
HO_RESNET = [*HO_RESNET_TABLE_2, *HO_RESNET_TABLE_3, *HO_RESNET_TABLE_4]

# TSC: Yang et al., "Dynamical System Inspired Adaptive Time Stepping Controller for Residual Network Families". Its
# parameters differ between training and inference, and its FLOPs are multiplications: neither stands here.

TSC_TABLE_2 = [
    Row("resnet50", {"stride_in_1x1": True}, None, None, {"imagenet": 24.42}),
    *(
        Row("tsc_resnet50", {"controller": controller}, None, None, {"imagenet": error})
        for controller, error in (("indp", 24.12), ("2fc", 23.90), ("lstm", 23.63))
    ),
]
TSC_TABLE_3 = [
    row
    for model, stock, stepped in (
        ("resnet18", 29.41, 28.80),
        ("resnet34", 26.03, 25.39),
        ("resnet50", 24.42, 23.63),
        ("resnet101", 22.94, 22.24),
        ("resnext50_32x4d", 22.84, 22.23),
        ("resnext101_32x4d", 21.88, 21.17),
        ("seresnet50", 23.27, 22.75),
        ("seresnet101", 22.37, 21.82),
    )
    for row in (
        # The first ResNet's stride, as in the networks of tsc_...; the two smallest have no such convolution.
        Row(
            model, {} if model in ("resnet18", "resnet34") else {"stride_in_1x1": True}, None, None, {"imagenet": stock}
        ),
        Row(f"tsc_{model}", {}, None, None, {"imagenet": stepped}),
    )
]
TSC_TABLE_5 = [
    Row("densenet-40", {}, None, None, {"cifar10+": 5.24, "cifar100+": 24.42}),
    Row("tsc_densenet-40", {}, None, None, {"cifar10+": 5.10, "cifar100+": 23.35}),
    Row("cliquenet-12", {"growth_rate": 36}, None, None, {"cifar10+": 5.03, "cifar100+": 22.80}),
    Row("tsc_cliquenet-12", {"growth_rate": 36}, None, None, {"cifar10+": 4.79, "cifar100+": 22.04}),
]

RKNET = [*RKNET_TABLE_1, *RKNET_TABLE_2, *RKNET_TABLE_3]
ROWS = [*RKNET, *DENSENET_TABLE_2, *DENSENET_IMAGENET, *CLIQUENET]


class Cost(NamedTuple):
    """What a step adds to its branches (section 3.8 of HO-ResNet).

    shortcuts: feature maps that are kept while branches run; Euler's step keeps its input, 1.
    operations: multiplications and additions per element of a feature map and per layer, of two layers per branch,
    beyond those of Euler steps of the same depth.
    """

    shortcuts: int
    operations: Fraction


def step_cost(tableau: Tableau) -> Cost:
    """Counted as the paper does: a coefficient of 1 costs no multiplication; slopes of which only the sum y' is still
    to be made are kept as one running sum, and all of them are kept as soon as a stage reads one that is not the last.
    """
    s, rows = tableau.stages, [*tableau.a, tableau.b]
    read = [(i, j) for i in range(s + 1) for j in range(s) if rows[i][j] != 0]
    early = any(j < i - 1 for i, j in read if i < s)
    summed = any(j < s - 1 for i, j in read if i == s)
    products = sum(rows[i][j] != 1 for i, j in read)
    return Cost(1 + (s if early else int(summed)), Fraction(products + len(read) - s, 2 * s))


def on_meta(name: str, *, fused: bool = False, **options: Any) -> nn.Module:
    """``create_model`` without memory for its parameters."""
    with torch.device("meta"):
        return create_model(name, fused=fused, **options)


def parameters(model: nn.Module) -> int:
    """How many numbers a model learns or could learn."""
    return sum(p.numel() for p in model.parameters())


def flops(model: nn.Module, size: int) -> int:
    """Of one image of size x size through a model on the meta device, as the tables count.

    By the convention that fits the printed digits of RKNet's tables: the multiplications and additions of convolutions
    and linear layers (2 n - 1 per output), the explicit sums, the means over H and W and the product of an attention;
    nothing else.
    """
    extra: list[int] = []
    handles = []
    for module in model.modules():
        if isinstance(module, (ERKStep, IRKStep, RKCNNStep)):
            handles.append(module.register_forward_hook(lambda m, args, _: extra.append(m.stages * args[0].numel())))
        elif isinstance(module, (NormPool, Attention)):
            times = 2 if isinstance(module, Attention) else 1
            hook = _adding(extra, times)
            handles.append(module.register_forward_hook(hook))
        elif module is getattr(model, "features", None):
            handles.append(module.register_forward_hook(lambda _, __, out: extra.append(out.numel())))
    counted = {
        torch.ops.aten.convolution: _convolution,
        torch.ops.aten.addmm: _linear,
        torch.ops.rkfast.dense_block: _dense_block,
    }
    training = model.training
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=counted) as counter:
            model.eval()(torch.empty(1, 3, size, size, device="meta"))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return counter.get_total_flops() + sum(extra)


def _adding(extra: list[int], times: int) -> Any:
    return lambda _, args, __: extra.append(times * args[0].numel())


def _convolution(x: Sequence[int], w: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return math.prod(out_shape) * (2 * math.prod(w[1:]) - 1)


def _linear(bias: Sequence[int], x: Sequence[int], w: Sequence[int], *, out_shape: Sequence[int], **__: Any) -> int:
    return math.prod(out_shape) * (2 * x[1] - 1)


def _dense_block(
    x: Sequence[int], conv1: Sequence[Sequence[int]], conv2: Sequence[Sequence[int]], *_: Any, **__: Any
) -> int:
    return sum(_convolution(x, w, out_shape=(x[0], w[0], *x[2:])) for w in (*conv1, *conv2))
