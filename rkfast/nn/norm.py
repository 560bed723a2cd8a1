"""A BatchNorm that its owner follows with a ReLU, in one op.

The module stays a plain nn.BatchNorm2d and the ReLU stays with its owner, so that whoever replaces the BatchNorm
(quantisation, a hook) gets what he asked for: the stock path.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from rkfast.ops import Moments, Norm, bn_relu_conv, bn_rk_sum, checks, residual_block
from rkfast.ops import conv as conv_op
from rkfast.ops.bn_relu_conv import kernel_reason
from rkfast.ops.conv import block_reason
from rkfast.ops.conv import kernel_reason as conv_reason


def hooked(module: nn.Module) -> bool:
    """Whether something besides its class's forward runs when the module is called. Hooks of all modules do not count:
    counters of FLOPs have some, and want to see what is fused."""
    own = module.__dict__  # attributes would take twice as long, and a network asks hundreds of times
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def takes_relu(relu: nn.Module) -> bool:
    """Whether calling ``relu`` is a ReLU and nothing besides."""
    return type(relu) is nn.ReLU and not hooked(relu)


def fusible(norm: nn.Module) -> bool:
    """Whether bn_rk_sum does what calling ``norm`` would do."""
    if type(norm) is nn.SyncBatchNorm:
        return not hooked(norm) and not torch.compiler.is_compiling()
    return (type(norm) is nn.BatchNorm2d or frozen(norm)) and not hooked(norm)


def frozen(norm: nn.Module) -> bool:
    """Whether norm is the BatchNorm of detection networks (torchvision's and copies of it), which has buffers alone."""
    return type(norm).__name__ == "FrozenBatchNorm2d" and norm._buffers.keys() == FROZEN and hasattr(norm, "eps")


FROZEN = {"weight", "bias", "running_mean", "running_var"}


def serves(norm: nn.Module, x: Tensor) -> bool:
    """``fusible``, and norm leaves x its dtype, which a frozen one in a wider dtype (under autocast, say) does not."""
    return fusible(norm) and (isinstance(norm, _BatchNorm) or norm.weight.dtype == x.dtype)


def activated(norm: nn.Module) -> bool:
    """Whether norm is timm's BatchNorm with a ReLU inside, and calling it does nothing besides."""
    inside = norm._modules
    return (
        type(norm).__name__ == "BatchNormAct2d"
        and isinstance(norm, nn.BatchNorm2d)
        and inside.keys() == {"drop", "act"}
        and type(inside["drop"]) is nn.Identity
        and takes_relu(inside["act"])  # type: ignore[arg-type]
        and not hooked(inside["drop"])
        and not hooked(norm)
    )


def reads_moments(norm: nn.Module) -> bool:
    """Whether ``batch_norm_relu(norm, x, moments)`` would read the moments of x."""
    if frozen(norm) or not (fusible(norm) or activated(norm)):
        return False
    return (norm.training or norm.running_mean is None) and not group_of(norm)


def group_of(norm: nn.Module) -> str:
    """The name of the process group over which an nn.SyncBatchNorm would take its statistics now; "" for none."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training or not dist.is_available() or not dist.is_initialized():
        return ""
    group = norm.process_group or dist.group.WORLD
    return "" if group is None or dist.get_world_size(group) == 1 else group.group_name


def one_group(norms: Sequence[nn.Module]) -> bool:
    """Whether no norm takes its statistics over other processes than the rest."""
    if all(type(norm) is not nn.SyncBatchNorm for norm in norms):
        return True
    return len({(type(norm), getattr(norm, "process_group", None)) for norm in norms}) == 1


def plain_conv(conv: nn.Module, *, bias: bool = False, strided: bool = False) -> bool:
    """Whether conv is a convolution that keeps the resolution (or has a stride, if that is allowed), without a bias
    unless that is, and does nothing besides."""
    return (
        type(conv) is nn.Conv2d
        and (bias or _own_parameter(conv, "bias") is None)
        and (conv.stride == (1, 1) or (strided and conv.stride[0] == conv.stride[1]))
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and conv.kernel_size in ((1, 1), (3, 3))
        and conv.padding == (conv.kernel_size[0] // 2,) * 2
        and not hooked(conv)
    )


def _own_parameter(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)``, which looks for parameters last."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def as_norm(norm: Any) -> Norm:
    """What calling ``norm``, an nn.BatchNorm2d, nn.SyncBatchNorm or a frozen one, would do, for an op."""
    if not isinstance(norm, _BatchNorm):
        return Norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, None, False, 0.0, norm.eps)
    parameters, buffers = norm._parameters, norm._buffers
    try:  # an attribute of a module is looked for in many places
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var, counter = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:
        weight, bias, counter = norm.weight, norm.bias, norm.num_batches_tracked
        mean, var = norm.running_mean, norm.running_var
    training, momentum = norm.training, norm.momentum
    if training and not norm.track_running_stats:
        mean = var = None
    if momentum is None and counter is None:
        momentum = 0.0  # without a counter nn.BatchNorm2d leaves a cumulative average where it is
    batch = training or mean is None
    return Norm(weight, bias, mean, var, counter, batch, momentum, norm.eps, group_of(norm))


@contextlib.contextmanager
def statistics_stay(module: nn.Module) -> Iterator[None]:
    """What is run meanwhile moves copies of the running statistics: it is computed again, and they have moved before.
    (Without any, batch_norm would keep another number of tensors than the first time, which checkpoint refuses.)"""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: b.clone() for name, b in norm._buffers.items() if b is not None})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


class _Again:
    """Within it a part of module's forward is computed again, as often as backward asks for."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.state = self._state()

    def _state(self) -> list[Any]:
        """What every time has to find as the first did."""
        modules = list(self.module.modules())
        parameters = [p for m in modules for p in m._parameters.values() if p is not None]
        return [[m.training for m in modules], [(id(p), p._version) for p in parameters]]

    def __enter__(self) -> None:
        if self.state != self._state():
            raise RuntimeError(
                f"{type(self.module).__name__}: train() or eval() has been called, or its parameters have been "
                "changed, since the forward, which backward computes again; call backward first, or keep what it "
                'reads (memory="speed", no gradient checkpointing)'
            )
        self.within = statistics_stay(self.module)
        self.within.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.within.__exit__(*error)


def recomputed(module: nn.Module, run: Callable[..., Tensor], *args: Tensor | None) -> Tensor:
    """``run(*args)``, a part of module's forward, which backward computes again in place of keeping what it reads.

    Raises (in backward):
        RuntimeError: the module's mode or parameters are no longer what they were.
    """
    if not torch.is_grad_enabled() or checks.transformed([t for t in args if t is not None]):
        return run(*args)
    contexts = functools.partial(_contexts, module)
    return checkpoint(run, *args, use_reentrant=False, context_fn=contexts)


def _contexts(module: nn.Module) -> tuple[Any, Any]:
    return contextlib.nullcontext(), _Again(module)


def batch_norm_relu_conv(
    norm: nn.Module,
    conv: nn.Module,
    x: Tensor,
    moments: Moments | None = None,
    *,
    fused: bool = True,
    return_moments: bool = False,
) -> tuple[Tensor, Moments | None]:
    """``conv(relu(norm(x)))``, and the moments of that if asked for (and fused).

    One op, which keeps nothing normalised, where norm is as in ``batch_norm_relu``, conv an nn.Conv2d of stride 1
    without bias and hooks, and a kernel is the better choice; else ``conv(batch_norm_relu(...))``.
    """
    whole = fused and (serves(norm, x) or activated(norm)) and plain_conv(conv) and x.dim() == 4
    if not whole or kernel_reason(x, conv.weight) is not None:  # type: ignore[arg-type]  # plain_conv knows what it is
        return conv(batch_norm_relu(norm, x, moments, fused=fused)), None
    assert isinstance(conv, nn.Conv2d)
    given = as_norm(norm)
    moments = None if given.group else moments
    found = bn_relu_conv(x, conv.weight, given, moments=moments, return_moments=return_moments)
    return found if return_moments else (found, None)


def shared_conv(
    conv: nn.Module, x: Tensor, *, fused: bool = True, return_moments: bool = False
) -> tuple[Tensor, Moments | None, Tensor]:
    """``conv(x)``, the moments of that if asked for (and one op), and x for who reads it besides: in one op its
    gradient is added where that of the convolution is written."""
    if not (fused and isinstance(conv, nn.Conv2d) and plain_conv(conv) and x.dim() == 4):
        return conv(x), None, x
    if conv_reason(x, conv.weight.shape) is not None:
        return conv(x), None, x
    y, *moments, x = conv_op(x, conv.weight, return_moments=return_moments, return_input=True)
    return y, moments[0] if moments else None, x


def whole_residual(
    convs: Sequence[nn.Module],
    norms: Sequence[nn.Module],
    relus: Sequence[nn.Module],
    x: Tensor,
    downsample: Callable[[Tensor], Tensor] | None,
    projection: Sequence[nn.Module],
    step: Tensor | None,
    memory: str,
) -> Tensor | None:
    """A residual block in one op, convolutions, norms and ReLUs in turn, the last ReLU behind the sum with
    ``downsample(x)`` (None: x), of which ``projection`` are the layers where they are known; None where one of them is
    not as that op has it, or more ops are the better choice: with memory "min" the shortcut is made again, which that
    op does not."""
    if memory == "min" and downsample is not None:
        return None
    if x.dim() != 4 or (step is not None and step.dim() != 1):
        return None
    if block_reason(x, any(getattr(conv, "kernel_size", None) == (1, 1) for conv in convs)) is not None:
        return None
    weights: list[Any] = []
    given: list[Norm] = []
    strides: list[Any] = []
    for conv, norm in zip(convs, norms, strict=True):
        if not plain_conv(conv, strided=True) or (found := _own_norm(norm, x)) is None:
            return None
        weights.append(conv.weight)
        strides.append(conv.stride[0])  # type: ignore[index]  # plain_conv knows what it is
        given.append(found)
    if not all(map(takes_relu, relus)):
        return None
    projected = _projection(projection, math.prod(strides), x)
    shortcut = None if downsample is None or projected is not None else downsample(x)
    return residual_block(
        x, weights, given, shortcut=shortcut, projection=projected, strides=strides, step=step, memory=memory
    )


def _own_norm(norm: nn.Module, x: Tensor) -> Norm | None:
    """``as_norm`` where norm takes no statistics over other processes."""
    if not serves(norm, x):
        return None
    found = as_norm(norm)
    return None if found.group else found


def _projection(layers: Sequence[nn.Module], stride: int, x: Tensor) -> tuple[Tensor, Norm] | None:
    """``norm(conv(x))`` as a residual block of this stride takes it, where layers are a 1x1 convolution and a norm."""
    if len(layers) != 2 or not plain_conv(layers[0], strided=True):
        return None
    conv, norm = layers
    if conv.kernel_size != (1, 1) or conv.stride[0] != stride:  # type: ignore[index]  # plain_conv knows what it is
        return None
    found = _own_norm(norm, x)
    return None if found is None else (conv.weight, found)  # type: ignore[return-value]


def batch_norm_relu(norm: nn.Module, x: Tensor, moments: Moments | None = None, *, fused: bool = True) -> Tensor:
    """``relu(norm(x))``, fused where norm is an nn.BatchNorm2d or nn.SyncBatchNorm without hooks, and the stock modules
    elsewhere.

    Args:
        norm: usually nn.BatchNorm2d or nn.SyncBatchNorm, in any of its modes (training, frozen by .eval(), without
            statistics, ...), or torchvision's frozen one; timm's with a ReLU inside as well.
        x: Tensor [N, C, H, W].
        moments: x's moments, where they are known already.
        fused: False takes the stock path.

    Returns:
        Tensor [N, C, H, W]. Running statistics and counter advance as in ``norm(x)``.
    """
    return batch_norm_sum(norm, x, relu=True, moments=moments, fused=fused)


def batch_norm_sum(
    norm: nn.Module,
    x: Tensor,
    *,
    terms: Sequence[Tensor] = (),
    step: Tensor | None = None,
    relu: bool = False,
    moments: Moments | None = None,
    fused: bool = True,
) -> Tensor:
    """``act(sum_j terms[j] + step * norm(x))``, fused on the same conditions as batch_norm_relu.

    Args:
        norm, x, moments, fused: as in batch_norm_relu.
        terms: tensors like x.
        step: None for 1, else a factor per channel [C] or per sample and channel [N, C].
        relu: whether act is a ReLU, else nothing.

    Returns:
        Tensor [N, C, H, W]. Running statistics and counter advance as in ``norm(x)``.
    """
    alone = relu and not terms and step is None
    if not (fused and (serves(norm, x) or (alone and activated(norm)))):
        y = norm(x)
        # In place only on what is certainly norm's own: it may be an Identity, or a hook may keep what it returned.
        own = isinstance(norm, _BatchNorm) and not hooked(norm)
        if step is not None:
            y, own = y * step.to(y.dtype)[..., None, None], True
        for term in terms:
            y = y.add_(term) if own and term.dtype == y.dtype else y + term
        return F.relu(y, inplace=own or bool(terms)) if relu else y
    if isinstance(norm, _BatchNorm):
        norm._check_input_dim(x)
    given = as_norm(norm)
    return bn_rk_sum(
        x,
        given.weight,
        given.bias,
        given.running_mean,
        given.running_var,
        terms=terms,
        coeffs=[1.0] * len(terms),
        step=step,
        relu=relu,
        training=given.training,
        momentum=given.momentum,
        eps=given.eps,
        num_batches_tracked=given.num_batches_tracked,
        moments=None if given.group else moments,
        group=given.group,
    )
