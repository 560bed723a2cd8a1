"""DenseNet to ERKNet and CliqueNet to IRKNet: what is carried over, and the rules of the paper, each broken once."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rkfast
from rkfast.models import CliqueNet, DenseNet, RKNet, erknet_from_densenet, irknet_from_cliquenet
from rkfast.nn import DenseLayer
from tests.models.tester import on_meta, parameters


def densenet(
    layers: tuple[int, ...] = (4, 3), growth_rate: int = 4, channels: int = 8, stem: str = "cifar"
) -> DenseNet:
    torch.manual_seed(0)
    return DenseNet(growth_rate, layers, channels, stem=stem, num_classes=7, drop_rate=0.1)


def cliquenet(growth_rate: int = 4, suffix: str = "a") -> CliqueNet:
    torch.manual_seed(0)
    return rkfast.create_model(
        f"cliquenet-{6 * (1 + ('b' in suffix))}-{suffix}",
        growth_rate=growth_rate,
        init_channels=growth_rate,
        transition_channels=growth_rate,
        num_classes=7,
    )


def check_carried(source: nn.Module, model: RKNet, carried: list[str], initialised: list[str]) -> None:
    """Every module with state is in one of the lists, and what was not carried over is as it was made."""
    stateful = {
        name
        for name, module in model.named_modules()
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    }
    assert len(carried) + len(initialised) == len(stateful)
    assert {*carried, *initialised} == stateful
    theirs = {id(t): t for t in (*source.parameters(), *source.buffers())}
    assert not theirs.keys() & {id(t) for t in (*model.parameters(), *model.buffers())}


def test_densenet121() -> None:
    """The paper's ERKNet-3x1_3x1_3x1_1x1-B with m = 2, 4, 8, 16."""
    source = on_meta("densenet121")
    with torch.device("meta"):
        model, carried, initialised = erknet_from_densenet(source)
    assert sum(p.numel() for p in model.parameters()) == 6_947_048
    with torch.device("meta"):
        twin = rkfast.create_model(
            "erknet-3x1_3x1_3x1_1x1-b", growth_rate=32, m=(2, 4, 8, 16), stem="imagenet", num_classes=1000
        )
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in twin.state_dict().items()}
    fresh = [f"transitions.{t}.{part}" for t in range(3) for part in ("norm", "conv")]
    assert initialised == [*fresh, "head.pools.0.norm", "head.fc"]
    assert len(carried) == 2 + 4 * 58


@pytest.mark.parametrize("stem", ("cifar", "imagenet"))
def test_erknet_from_densenet(stem: str) -> None:
    source = densenet(stem=stem).eval()
    for norm in (m for m in source.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.eps = 0.25
    kept = copy.deepcopy(source.state_dict())
    model, carried, initialised = erknet_from_densenet(source)
    check_carried(source, model, carried, initialised)
    torch.testing.assert_close(source.state_dict(), kept, rtol=0, atol=0)
    assert not model.training and not model.multiscale and model.num_classes == 7
    assert [(period[0].stages, period[0].m) for period in model.periods] == [(2, 2), (1, 3)]
    # A step is the dense block's layers, and the sum of its groups.
    y = torch.randn(2, 8, 6, 6)
    slots = source.features.denseblock1(y)
    step = model.periods[0][0]
    torch.testing.assert_close(step(y), y + slots[:, 8:16] + slots[:, 16:24])
    assert {layer.drop_rate for layer in step.values()} == {0.1}
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 7)
    assert ("stem.norm" in carried) == (stem == "imagenet")
    assert "stem.conv" in carried and "head.fc" in initialised


@pytest.mark.parametrize("suffix", ("a", "ab", "abc"))
def test_irknet_from_cliquenet(suffix: str) -> None:
    source = cliquenet(suffix=suffix).eval()
    kept = copy.deepcopy(source.state_dict())
    model, carried, initialised = irknet_from_cliquenet(source)
    check_carried(source, model, carried, initialised)
    torch.testing.assert_close(source.state_dict(), kept, rtol=0, atol=0)
    ours = "irknet-2x1_2x1_2x1-" + suffix.removesuffix("c")
    assert sum(p.numel() for p in model.parameters()) == parameters(ours, growth_rate=4, num_classes=7)
    y = torch.randn(2, 4, 6, 6)
    z = source.blocks[1](y)
    torch.testing.assert_close(model.periods[1][0](y), y + z[:, :4] + z[:, 4:])
    assert {"stem.conv", "transitions.0.attention.fc1", "periods.2.0.weight1"} <= set(carried)
    assert {"transitions.0.conv", "head.fc", "head.pools.0.norm"} <= set(initialised)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)


def test_rules_of_densenets() -> None:
    with pytest.raises(ValueError, match=r"Rule 1: y has m \* k channels; denseblock1 reads 10, .* growth rate 4"):
        erknet_from_densenet(densenet(channels=10))
    with pytest.raises(ValueError, match=r"Rule 3: there are m \* s growths; denseblock1 has 3, .* of m = 2"):
        erknet_from_densenet(densenet(layers=(3, 4)))
    wider = densenet()
    wider.features.denseblock1["denselayer2"] = DenseLayer(12, 5, bottleneck=16)
    with pytest.raises(
        ValueError, match=r"Rule 2: .* denseblock1.denselayer2 makes 5 of 12 channels, expected 4 of 12"
    ):
        erknet_from_densenet(wider)
    forgetful = densenet()
    forgetful.features.denseblock1["denselayer2"] = DenseLayer(8, 4, bottleneck=16)
    with pytest.raises(ValueError, match=r"Rule 2: .* denseblock1.denselayer2 makes 4 of 8 channels, expected 4 of 12"):
        erknet_from_densenet(forgetful)
    uneven = densenet()
    uneven.features.denseblock1["denselayer2"] = DenseLayer(12, 4, bottleneck=8)
    with pytest.raises(ValueError, match=r"model: the bottlenecks of denseblock1 differ"):
        erknet_from_densenet(uneven)


def test_rules_of_cliquenets() -> None:
    with pytest.raises(ValueError, match=r"Rule 1: .* blocks.0 reads 64, and its growth rate is 4"):
        irknet_from_cliquenet(rkfast.create_model("cliquenet-6", growth_rate=4))
    with pytest.raises(ValueError, match=r"Rule 1: .* blocks.1 reads 8, and its growth rate is 4"):
        irknet_from_cliquenet(rkfast.create_model("cliquenet-6", growth_rate=4, init_channels=4))
    forgetful = cliquenet()
    forgetful.blocks[1].init_norm1[1] = nn.BatchNorm2d(4)
    with pytest.raises(ValueError, match=r"Rule 2: .* growth 2 of blocks.1 makes 4 of 4 channels, expected 4 of 8"):
        irknet_from_cliquenet(forgetful)
    single = cliquenet()
    block = single.blocks[2]
    block.weight1 = nn.ParameterList([block.weight1[0]])
    block.stages = 1
    with pytest.raises(ValueError, match=r"Rule 3: there are s growths, s > 1; blocks.2 has 1 growths"):
        irknet_from_cliquenet(single)


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model: Linear is no DenseNet; expected features.conv0"):
        erknet_from_densenet(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"model: expected a CliqueNet, got DenseNet"):
        irknet_from_cliquenet(densenet())
