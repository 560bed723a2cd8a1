"""A copy of a network that is only evaluated any more."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
from torch import nn

from rkfast.models.densenet import Features
from rkfast.models.resnet import ResNet
from rkfast.models.restack import Restacked
from rkfast.models.rknet import Stem
from rkfast.nn import BasicBlock, Bottleneck, DenseBlock, DenseLayer, PreActBranch, Projection
from rkfast.nn.folded import FoldedBlock, FoldedBranch, FoldedConv, FoldedStage, folded, takes_norm
from rkfast.nn.form import Form, present
from rkfast.nn.norm import hooked, plain_conv
from rkfast.ops import layout
from rkfast.swap.dense import FusedDenseBlock
from rkfast.swap.fuse import check_model, fuse, unfuse
from rkfast.swap.kind import agrees, unserved
from rkfast.swap.residual import FusedBlock


def fold(model: nn.Module) -> nn.Module:
    """A copy of a network for inference: the fastest that is known here.

    - A BatchNorm behind a convolution goes into its weights, in float64 and rounded once; that, the ReLU behind it and
      the sum that ends a residual block are one kernel: oneDNN's on a CPU, cuDNN's on a GPU.
    - A BatchNorm before a convolution, which no weights can take, becomes scale, shift and ReLU of what the convolution
      reads: dense blocks, clique blocks and Runge-Kutta steps run their fused operations.
    - Step sizes (``rkfast.tsc``) go into the weights, or are computed this once; dropout is gone.

    Served are the networks that ``fuse`` serves, fused, restacked or neither, those of ``create_model``, and
    convolutions with a BatchNorm behind them wherever torch.fx can follow the module that holds them. What is not known
    stays as it is. The copy is in evaluation mode, its parameters need no gradient, and its keys are its own; what
    happens to the model later does not reach it: fold again. Copies, pickles and devices are as with other modules.

    Rounding: each folded weight is off by at most half a unit in its last place, so results are off by as much as those
    of the model itself, by other amounts.

    NaN: a ReLU within oneDNN's convolution makes 0 of it, where torch's passes it on; look for NaN in the model itself.

    Args:
        model: a network; it stays as it is. Of DistributedDataParallel, DataParallel and torch.compile it is the module
            inside that is copied.

    Raises:
        TypeError: model is no module.
    """
    check_model(model)
    with torch.inference_mode(False), torch.no_grad():
        net = evaluated(model)
        opaque = _opaque(net)
        new: dict[nn.Module, nn.Module] = {}
        for module, form in _blocks(net, opaque).items():
            new[module] = _block(form, module)
            opaque.update(module.modules())
        new.update((branch, FoldedBranch(branch)) for branch in _branches(net))
        net = fuse(_replaced(_with_norms(net, opaque), new))
        for module in net.modules():
            if isinstance(module, (DenseBlock, FusedDenseBlock, PreActBranch)):
                _lay(module)
            if type(module) is nn.Sequential and any(type(child) is FoldedBlock for child in module):
                module.__class__ = FoldedStage
    return net.requires_grad_(False).eval()


def plain(model: nn.Module) -> nn.Module:
    """A copy for those who trace it: what ``fold`` does as far as modules of torch.nn can say it; no op of rkfast."""
    check_model(model)
    with torch.inference_mode(False), torch.no_grad():
        net = evaluated(model)
        net = _replaced(net, {module: module.plain() for module in net.modules() if isinstance(module, FoldedConv)})
        for module in net.modules():
            if type(module).__module__.startswith("rkfast.") and isinstance(getattr(module, "fused", None), bool):
                module.fused = False  # type: ignore[assignment]
        return _with_norms(net, _opaque(net, plain=True), plain=True).requires_grad_(False).eval()


def _with_norms(net: nn.Module, opaque: set[nn.Module], *, plain: bool = False) -> nn.Module:
    """net, its BatchNorms behind convolutions folded."""
    new: dict[nn.Module, nn.Module] = {}
    seen = set(opaque)
    for module in net.modules():
        for run in _runs(module, plain) if module not in opaque else ():
            modules = [module.get_submodule(name) for name in run]
            for known, group in itertools.groupby(modules, lambda m: m in seen):
                some = list(group)
                if not known:
                    new.update((a, b) for a, b in zip(some, folded(some, plain=plain), strict=True) if a is not b)
            seen.update(modules)  # a network may call what belongs to one of its parts, which is then not called
    return _replaced(net, new)


def _replaced(net: nn.Module, new: dict[nn.Module, nn.Module]) -> nn.Module:
    for module in list(net.modules()):
        for name, child in module._modules.items():
            if child in new:
                module._modules[name] = new[child]
    return new.get(net, net)


def _lay(module: nn.Module) -> None:
    """Weights of a module that an op serves, as its C++ kernels want them."""
    for conv in module.modules():
        if plain_conv(conv) and conv.weight.dtype == torch.float32 and conv.weight.device.type == "cpu":
            conv.weight = nn.Parameter(layout.outputs_last(conv.weight), requires_grad=False)


def evaluated(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, of stock classes, without step sizes and dropout; no parameter needs a gradient."""
    net = unfuse(copy.deepcopy(bare(model)).eval().requires_grad_(False))
    _without_steps(net)
    return _replaced(net, {module: nn.Identity() for module in net.modules() if _drops(module)}).eval()


def bare(model: nn.Module) -> nn.Module:
    """What a wrapper wraps."""
    while isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module  # type: ignore[assignment]
    return model


def _without_steps(net: nn.Module) -> None:
    from rkfast import tsc
    from rkfast.tsc.stepped import stepped

    if next(stepped(net), None) is None:
        return
    try:
        tsc.fold(net)
    except ValueError:  # a block whose weights take none
        tsc.freeze(net)


def _drops(module: nn.Module) -> bool:
    """Whether module is a dropout of whatever kind, which does nothing in evaluation."""
    name = type(module).__name__.lower()
    if not name.startswith(("drop", "alphadrop", "featurealphadrop", "stochasticdepth")) or hooked(module):
        return False
    if module._modules or module._parameters or module._buffers:
        return False
    probe = torch.ones(1, 1, 2, 2)
    try:
        return module(probe) is probe
    except Exception:
        return False


def _opaque(net: nn.Module, *, plain: bool = False) -> set[nn.Module]:
    """Modules that stay as they are: those of which an op serves more (not where plain), that nobody can look into,
    whose step sizes could not be folded, and those that are in more than one place."""
    from rkfast.tsc.stepped import Stepped

    uses = Counter(child for module in net.modules() for child in module._modules.values())
    found = {child for child, count in uses.items() if count > 1 and child is not None}
    for module in net.modules():
        whole = isinstance(module, Stepped) or unserved(module) is not None
        if not whole and not plain:
            served = isinstance(FusedDenseBlock.reads(module), list) and agrees(module, FusedDenseBlock)
            whole = isinstance(module, (DenseBlock, PreActBranch)) or served
        if whole:
            found.update(module.modules())
    return found


def _blocks(net: nn.Module, opaque: set[nn.Module]) -> dict[nn.Module, Form]:
    """Residual blocks on which nobody listens, and that are called as a whole."""
    staged = {block for module in net.modules() if isinstance(module, Restacked) for block in module.staged()}
    found: dict[nn.Module, Form] = {}
    for module in net.modules():
        form = None if module in opaque or module in staged or hooked(module) else FusedBlock.reads(module)
        if isinstance(form, Form) and (type(module) in (BasicBlock, Bottleneck) or agrees(module, FusedBlock)):
            found[module] = form
    return found


def _branches(net: nn.Module) -> Iterator[PreActBranch]:
    """Those that are not on a CPU, and on which nobody listens."""
    for module in net.modules():
        if type(module) is PreActBranch and not any(map(hooked, module.modules())):
            conv = module.conv1
            if conv.weight.device.type != "cpu" and takes_norm(conv, module.norm2):
                yield module


def _block(form: Form, block: nn.Module) -> FoldedBlock:
    inner = folded([*present(block, form.inner), block.get_submodule(form.norm)])
    downsample = block._modules.get("downsample")
    shortcut = [] if downsample is None else [downsample]
    if isinstance(downsample, nn.Sequential) and type(downsample) in (nn.Sequential, Projection):
        shortcut = shortcut if hooked(downsample) else folded(list(downsample.children()))
    return FoldedBlock(inner, shortcut, present(block, form.behind), block.get_submodule(form.activation))


# Of rkfast's modules: what torch.fx would find, if it could follow them.
_OWN: dict[type[nn.Module], str] = {ResNet: "conv1 bn1 relu", Stem: "conv norm"}
_OWN_PLAIN: dict[type[nn.Module], str] = {
    **_OWN,
    BasicBlock: "conv1 bn1 relu conv2 bn2",
    Bottleneck: "conv1 bn1 relu conv2 bn2 relu conv3 bn3",
    DenseLayer: "conv1 norm2",
    PreActBranch: "conv1 norm2",
}


def _runs(module: nn.Module, plain: bool) -> Iterator[list[str]]:
    """Names of modules within this one, each of which alone reads what the one before it makes."""
    own = (_OWN_PLAIN if plain else _OWN).get(type(module))
    if own is not None:
        yield [name for name in own.split() if module._modules.get(name) is not None]
    elif type(module).forward is nn.Sequential.forward or type(module) in (Features, Projection):
        yield [name for name, child in module._modules.items() if child is not None]
    elif module._modules and not type(module).__module__.startswith("rkfast."):
        yield from _traced_runs(module)


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _traced_runs(module: nn.Module) -> Iterator[list[str]]:
    try:
        graph = _Tracer().trace(module, _defaults(module))
    except Exception:  # a forward that depends on its input's values
        return
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def follows(node: torch.fx.Node) -> torch.fx.Node | None:
        users = list(node.users)
        if len(users) != 1 or not single(users[0]) or users[0].args != (node,) or users[0].kwargs:
            return None
        return users[0]

    def single(node: torch.fx.Node) -> bool:
        return node.op == "call_module" and calls[node.target] == 1 and str(node.target) not in read

    begun: set[torch.fx.Node] = set()
    for node in graph.nodes:
        run: list[str] = []
        following: torch.fx.Node | None = node if single(node) and node not in begun else None
        while following is not None:
            begun.add(following)
            run.append(str(following.target))
            following = follows(following)
        if len(run) > 1 or "." in "".join(run):
            yield run


def _defaults(module: nn.Module) -> dict[str, Any] | None:
    """Arguments of forward that its own call leaves out."""
    found = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in found if p.default is not p.empty} or None
