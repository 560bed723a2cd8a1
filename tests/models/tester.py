"""What the tests of the models share: counting on the meta device, and a fused model beside its stock twin."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rkfast
from rkfast import papers
from rkfast.models import OnePeriodNet, ResNet
from rkfast.nn import Transition
from rkfast.papers import on_meta as on_meta
from tests.ops.tester import assert_as_good_as


def parameters(name: str, **options: Any) -> int:
    return papers.parameters(on_meta(name, **options))


def flops(name: str, size: int, **options: Any) -> int:
    return papers.flops(on_meta(name, **options), size)


def check_row(row: papers.Row, size: int = 32) -> int:
    """The printed parameters and FLOPs are those of the model, and of the fused one too; its exact parameters."""
    exact = parameters(row.model, **row.options)
    if row.millions is not None:
        digits = len(row.millions.partition(".")[2])
        assert f"{exact / 1e6:.{digits}f}" == row.millions
    if row.billions is not None:
        assert f"{flops(row.model, size, **row.options) / 1e9:.2f}" == row.billions
        with rkfast.use("reference"):  # else plain PyTorch serves meta tensors
            served = on_meta(row.model, fused=True, **row.options)
            for module in served.modules():
                if isinstance(module, Transition):  # a fused one saves FLOPs by pooling first, but for hooks
                    module.pool.register_forward_hook(lambda *_: None)
            assert papers.flops(served, size) == flops(row.model, size, **row.options)
    return exact


def settled(make: Callable[[], nn.Module], seed: int = 0) -> Any:
    """A module whose BatchNorms and statistics are no longer as they were made."""
    torch.manual_seed(seed)
    module = make()
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.3)
                norm.running_mean.normal_(0, 0.3)
                norm.running_var.uniform_(0.5, 2)
    return module


def twins(name: str, seed: int = 0, **options: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A fused model, its stock twin, and that in float64."""
    fused = settled(lambda: rkfast.create_model(name, **options), seed)
    stock = rkfast.create_model(name, fused=False, **options)
    stock.load_state_dict(fused.state_dict())
    return fused, stock, copy.deepcopy(stock).double()


def seen(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.to(next(model.parameters()).dtype).requires_grad_()
    model.zero_grad()
    out = model(x)
    F.cross_entropy(out, torch.arange(len(x), device=x.device) % out.shape[1]).backward()
    assert x.grad is not None
    found = {"out": out.detach(), "x.grad": x.grad}
    found |= {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: b.clone() for name, b in model.named_buffers()}


def check_fused(name: str, size: int = 9, batch: int = 4, device: str = "cpu", **options: Any) -> None:
    """Outputs, gradients and statistics of the fused model, in training and eval, in both memory formats.

    A ReLU whose input is near zero is now and then on in one model and off in the other, and its gradients are then of
    another order of magnitude; so three of five draws decide. What is wrong is wrong in all of them."""
    failures: Counter[str] = Counter()
    last: dict[str, AssertionError] = {}
    for seed, training, layout in itertools.product(
        range(5), (True, False), (torch.contiguous_format, torch.channels_last)
    ):
        models = [model.train(training).to(device) for model in twins(name, seed, **options)]
        fused, stock, truth = models[0].to(memory_format=layout), models[1].to(memory_format=layout), models[2]  # type: ignore[call-overload]
        x = torch.randn(batch, 3, size, size).to(device).contiguous(memory_format=layout)
        ours, eager, expected = (seen(model, x.clone()) for model in (fused, stock, truth))
        assert ours.keys() == eager.keys() == expected.keys()
        assert {key.removesuffix(".grad") for key in ours} >= {key for key, _ in fused.named_parameters()}
        assert all(torch.equal(ours[key], t) for key, t in expected.items() if not t.is_floating_point())
        for kind in ("out", "x.grad", "parameters", "running_mean", "running_var"):
            error = difference(ours, eager, expected, kind)
            if error is not None:
                key = f"{kind}, {training=}, {layout}"
                failures[key] += 1
                last[key] = error
    for key, count in failures.items():
        assert count < 3, f"{key}: {last[key]}"


def difference(
    ours: dict[str, Tensor], eager: dict[str, Tensor], truth: dict[str, Tensor], kind: str
) -> AssertionError | None:
    """All tensors of a kind as one, each in units of its largest element: among a few channels one rounding is ten
    times another by luck."""
    if kind == "parameters":
        keys = [key for key in truth if key.endswith(".grad") and key != "x.grad"]
    else:
        keys = [key for key in truth if key.endswith(kind)]
    sizes = [truth[key].abs().max().item() or 1.0 for key in keys]
    # The gradient of LM-ResNet's k is a difference of two sums, whose roundings its own size does not tell.
    scalars = [size for key, size in zip(keys, sizes, strict=True) if key.endswith(".learned.k.grad")]
    sizes = [max(scalars) if key.endswith(".learned.k.grad") else size for key, size in zip(keys, sizes, strict=True)]
    # That of an LSTM's recurrent weights is of the later blocks' steps alone, a small part of what its bias sums.
    by_key = dict(zip(keys, sizes, strict=True))
    sizes = [max(size, by_key.get(key.replace("weight_hh", "bias_ih"), 0.0)) for key, size in by_key.items()]
    whole = [
        torch.cat([found[key].flatten() / size for key, size in zip(keys, sizes, strict=True)])
        for found in (ours, eager, truth)
    ]
    try:
        assert_as_good_as(*whole, kind)
    except AssertionError as error:
        return error
    return None


def check_interface(name: str, **options: Any) -> None:
    """What users of timm and of nn.Module expect of a model."""
    torch.manual_seed(0)
    model = rkfast.create_model(name, **options).eval()
    x = torch.randn(2, 3, 32, 32)
    out = model(x)
    assert out.shape == (2, model.num_classes)

    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), out)
    logits = model.get_classifier()(model.forward_head(features, pre_logits=True))
    torch.testing.assert_close(logits, out)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)

    shapes: dict[str, torch.Size] = {}
    handles = [
        module.register_forward_hook(lambda _, __, y, n=n: shapes.update({n: y.shape}))
        for n, module in model.named_modules()
        if n in {info["module"] for info in model.feature_info}
    ]
    torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()
    for info in model.feature_info:
        assert shapes[info["module"]] == (2, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])

    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), out)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = rkfast.create_model(name, **options).eval()
    assert not torch.equal(twin(x), out)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(x), out)

    heard: set[str] = set()
    twin = copy.deepcopy(model)
    for n, module in twin.named_modules():
        module.register_forward_hook(lambda *_, n=n: heard.add(n))
    torch.testing.assert_close(twin(x), out, rtol=1e-4, atol=1e-5)
    silent = (nn.ModuleList, nn.ParameterDict, nn.ParameterList)
    assert heard == {n for n, m in model.named_modules() if not isinstance(m, silent)}

    with pytest.warns(UserWarning, match="set_grad_checkpointing: nothing to do"):
        model.set_grad_checkpointing()
    assert not model.grad_checkpointing
    assert "fused=True" in repr(model)

    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.num_classes == 7
    assert model.get_classifier().bias.eq(0).all() or isinstance(model, (OnePeriodNet, ResNet))
    model.reset_classifier(0)
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    with pytest.raises(ValueError, match="num_classes: expected 0 to 1000000, got -1"):
        model.reset_classifier(-1)


def check_checkpointing(name: str, **options: Any) -> None:
    """The same gradients and statistics, of fewer bytes kept."""
    fused, plain, _ = twins(name, **options)
    del fused
    x = torch.randn(4, 3, 16, 16)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    kept = []
    for model in (plain, checkpointed):
        sizes: list[int] = []

        def pack(t: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(x)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]
    expected, ours = seen(plain, x.clone()), seen(checkpointed, x.clone())
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    checkpointed.set_grad_checkpointing(False)
    assert not checkpointed.grad_checkpointing


def check_dropout(name: str, dropouts: int, **options: Any) -> None:
    """So many dropouts, of this rate, in training only."""
    for fused in (False, True):
        torch.manual_seed(0)
        model = rkfast.create_model(name, fused=fused, drop_rate=0.25, **options)
        twin = rkfast.create_model(name, fused=fused, **options)
        twin.load_state_dict(model.state_dict())
        x = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(model.eval()(x), twin.eval()(x), rtol=1e-4, atol=1e-5)
        with torch.profiler.profile() as profile:
            model.train()(x)
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts.get("aten::bernoulli_", 0) == dropouts
        torch.manual_seed(1)
        first = model(x)
        torch.manual_seed(1)
        assert torch.equal(model(x), first)
        torch.manual_seed(2)
        assert not torch.equal(model(x), first)
