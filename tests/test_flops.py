"""torch's FLOP counter counts a fused model as it counts the stock one, whoever imports what first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import rkfast
from rkfast.nn import CliqueBlock, DenseBlock, PreActBranch, RKCNNStep, Transition
from tests.ops.tester import CPU_BACKENDS
from tests.package.process import python

MODELS: list[tuple[str, dict[str, Any], int]] = [
    ("densenet121", {}, 64),
    ("densenet-13", {"growth_rate": 4}, 16),
    ("erknet-3x1_2x2", {"growth_rate": 8}, 16),
    ("erknet-3x1_1x1-ab", {"growth_rate": 4, "m": (1, 2)}, 16),
    ("irknet-3x1_3x1-ab", {"growth_rate": 8, "rounds": 2}, 16),
    ("rkcnn-e-3_2", {"growth_rate": 8}, 16),
    ("rkcnn-i-3_3", {"growth_rate": 8}, 16),
    ("rkcnn-r-3_3", {"growth_rate": 8}, 17),
    ("cliquenet-9", {"growth_rate": 8}, 16),
    ("cliquenet-12-abc", {"growth_rate": 8}, 17),
]


def in_order(model: nn.Module) -> nn.Module:
    """The model with its transitions as they are written: convolution, then pool."""
    for module in model.modules():
        if isinstance(module, Transition):
            module.pool.register_forward_hook(lambda *_: None)
    return model


def counted(model: nn.Module, size: int, backward: bool, batch: int = 2) -> tuple[int, set[str]]:
    """FLOPs, and the operators of ours that took part."""
    x = torch.randn(batch, 3, size, size)
    with FlopCounterMode(display=False) as counter:
        out = model(x)
        if backward:
            F.cross_entropy(out, torch.arange(batch)).backward()
    ours = {str(op) for op in counter.flop_counts["Global"] if "rkfast" in str(op)}
    return counter.get_total_flops(), ours


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("name", "options", "size"), MODELS)
def test_fused_counts_as_stock(name: str, options: dict[str, Any], size: int, backend: str) -> None:
    for backward in (False, True):
        with rkfast.use(backend):
            found, ours = counted(in_order(rkfast.create_model(name, **options)), size, backward)
        expected, none = counted(rkfast.create_model(name, fused=False, **options), size, backward)
        assert ours == {"rkfast.dense_block", *(["rkfast.dense_block_backward"] if backward else [])}
        assert not none
        assert found == expected


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("wanted", ("all", "parameters", "input"))
def test_a_pre_activation_branch_counts_as_stock(wanted: str, backend: str) -> None:
    def counted(fused: bool) -> tuple[int, set[str]]:
        branch, x = PreActBranch(16, fused=fused), torch.randn(2, 16, 6, 6, requires_grad=wanted != "parameters")
        branch.requires_grad_(wanted != "input")
        with FlopCounterMode(display=False) as counter:
            branch(x).sum().backward()
        return counter.get_total_flops(), {str(op) for op in counter.flop_counts["Global"] if "rkfast" in str(op)}

    with rkfast.use(backend):
        found, ours = counted(True)
    assert ours == {"rkfast.bn_relu_conv", "rkfast.bn_relu_conv_backward"}
    assert found == counted(False)[0]


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("name", "options", "size"), MODELS[1:])
def test_what_is_made_again_counts_again(name: str, options: dict[str, Any], size: int, backend: str) -> None:
    """memory="min": in the backward the 1x1 convolutions of every bottleneck once more."""
    again = 0

    def convolutions(module: nn.Module) -> list[torch.Tensor]:
        if isinstance(module, DenseBlock):
            return [layer.conv1.weight for layer in module.values() if layer.has_bottleneck]
        if isinstance(module, CliqueBlock) and module.weight2 is not None:
            c, k = module.in_channels, module.growth_rate
            init = [w[:, : c + i * k] for i, w in enumerate(module.weight1)]
            return [*init, *module.rounds * [w[:, c:] for w in module.weight1]]
        if isinstance(module, RKCNNStep):
            return [conv.weight for conv in (*module.conv_1x1, *getattr(module, "conv_1x1_update", ()))]
        return []

    def add(module: nn.Module, args: Any, out: Any) -> None:
        nonlocal again
        y = args[0]
        again += sum(2 * w.numel() for w in convolutions(module)) * y.numel() // y.shape[1]

    model = rkfast.create_model(name, **options)
    with rkfast.use(backend):
        speed, _ = counted(model, size, True)
        handles = [m.register_forward_hook(add) for m in model.modules() if convolutions(m)]
        model(torch.randn(2, 3, size, size))
        for handle in handles:
            handle.remove()
        found, _ = counted(model.set_memory("min"), size, True)
    assert found == speed + again
    assert (again > 0) == ("-13" not in name and name not in ("erknet-3x1_2x2", "cliquenet-9"))


def test_a_transition_that_pools_first_saves_what_it_saves() -> None:
    """A quarter of the products, and the attention's own pass."""
    model = rkfast.create_model("irknet-2x1_2x1-a", growth_rate=8)
    fused, _ = counted(model, 16, False)
    written, _ = counted(in_order(model), 16, False)
    assert written - fused == 2 * (2 * 8 * 8) * (16 * 16 - 8 * 8) - 2 * (2 * 8 * 8)


ORDERS = {
    "rkfast first": "import rkfast\n{unloaded}\nfrom torch.utils.flop_counter import FlopCounterMode",
    "the counter first": "from torch.utils.flop_counter import FlopCounterMode\nimport rkfast",
    "a call first": (
        "import rkfast\nrkfast.nn.DenseBlock(2, 4, 4)(torch.ones(2, 4, 4, 4))\n{unloaded}\n"
        "from torch.utils.flop_counter import FlopCounterMode"
    ),
    "found by hand": (
        "import importlib.util, rkfast\nassert importlib.util.find_spec('torch.utils.flop_counter').loader\n"
        "from torch.utils.flop_counter import FlopCounterMode"
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_imports(order: str) -> None:
    unloaded = "assert 'torch.utils.flop_counter' not in sys.modules"
    code = (
        f"import sys, torch\n{ORDERS[order].format(unloaded=unloaded)}\n"
        "made_before = FlopCounterMode(display=False)\n"
        "block, x = rkfast.nn.DenseBlock(2, 4, 4), torch.randn(2, 4, 4, 4)\n"
        "with rkfast.use('reference'), made_before as counter: block(x).sum().backward()\n"
        "print(counter.get_total_flops())\n"
        "assert not [f for f in sys.meta_path if type(f).__module__.startswith('rkfast')]"
    )
    weights = 9 * 4 * (4 + 8)
    assert int(python("-c", code)) == 3 * 2 * (2 * 4 * 4) * weights


def test_the_module_stays_what_it_was() -> None:
    """Its loader still gives tools its source, and it can be loaded again."""
    code = (
        "import importlib, inspect, rkfast, torch, torch.utils.flop_counter as counter\n"
        "assert 'class FlopCounterMode' in inspect.getsource(counter)\n"
        "assert torch.ops.rkfast.dense_block in counter.flop_registry\n"
        "importlib.reload(counter)\n"
        "assert torch.ops.aten.mm in counter.flop_registry\n"
    )
    python("-c", code)
