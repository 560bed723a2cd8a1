"""Layers of a network that is only evaluated any more: convolutions with a BatchNorm in their weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, without the import of the compiler

from rkfast.nn import cudnn
from rkfast.nn.branch import PreActBranch
from rkfast.nn.norm import as_norm, batch_norm_relu, frozen, hooked, plain_conv, takes_relu
from rkfast.nn.residual import gate_of, join
from rkfast.ops import checks, rk_sum
from rkfast.ops.conv import forward as conv_forward
from rkfast.ops.conv import transformed, transformed_reason

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def takes_norm(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether ``norm(conv(x))`` in evaluation is one convolution, and nobody listens between the two."""
    known = type(norm) in NORMS or frozen(norm) or _inside(norm) is not None
    if type(conv) not in CONVS or not known or hooked(conv) or hooked(norm):
        return False
    mean: Any = norm.running_mean
    weight: Any = conv.weight
    return mean is not None and len(mean) == weight.shape[0] and mean.dtype == weight.dtype


def take_norm(conv: Any, norm: Any) -> nn.Module:
    """Multiply norm into conv, in place, in float64 and rounded once: ``w' = a * w`` and ``b' = a * (b - mean) + beta``
    with ``a = gamma / sqrt(var + eps)``.

    Returns:
        What is left of norm: nothing, or the activation inside it.
    """
    given = as_norm(norm)
    weight = conv.weight.detach().to(torch.float64, copy=True)
    assert given.running_mean is not None and given.running_var is not None  # takes_norm
    scale = torch.rsqrt(given.running_var.double() + given.eps)
    if given.weight is not None:
        scale = scale * given.weight.detach().double()
    bias = -given.running_mean.double() if conv.bias is None else conv.bias.detach().double() - given.running_mean
    bias = scale * bias
    if given.bias is not None:
        bias = bias + given.bias.detach()
    weight *= scale.view(-1, *[1] * (weight.dim() - 1))
    conv.weight, conv.bias = (nn.Parameter(t.to(conv.weight.dtype), requires_grad=False) for t in (weight, bias))
    inside = _inside(norm)
    return nn.Identity() if inside is None else inside


def _inside(norm: nn.Module) -> nn.Module | None:
    """The activation of timm's BatchNorm with one inside."""
    inside = norm._modules
    if type(norm).__name__ != "BatchNormAct2d" or not isinstance(norm, nn.BatchNorm2d):
        return None
    return inside["act"] if inside.keys() == {"drop", "act"} and nothing(inside["drop"]) else None


def nothing(module: nn.Module | None) -> bool:
    """Whether calling module does nothing."""
    return isinstance(module, nn.Identity) and type(module) is nn.Identity and not hooked(module)


_SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class FoldedConv(nn.Module):
    """``act(conv(x))`` for inference, one kernel, which works channels_last: on a CPU that of ``rkfast.ops.conv`` by
    tiles where it is the faster one, else oneDNN's, which makes 0 of NaN in its ReLU; with a ReLU on a GPU cuDNN's.

    The weight is kept as these kernels want it, and nobody else has it, so that it cannot be another than the one in
    use: ``weight`` is a copy, and so are those of the state_dict. Copies, pickles and files hold it as a plain tensor.

    Args:
        conv: what it is made of; an nn.Conv2d.
        relu: whether act is a ReLU, else nothing.

    Shape: Tensor [N, C, H, W] -> [N, K, H', W'].
    """

    bias: Tensor | None
    stride: Any
    padding: Any
    dilation: Any
    groups: int
    padding_mode: str
    _shapes: tuple[torch.Size | None, torch.Size | None] = (None, None)  # of x: weight packed for, last seen

    def __init__(self, conv: nn.Conv2d, relu: bool = False) -> None:
        super().__init__()
        for name in _SIZES:
            setattr(self, name, getattr(conv, name))
        self.relu = relu
        self._zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())
        self._weight = conv.weight.detach()
        self._is_packed = False  # for compilers, to which a packed tensor looks like any other
        self._tiles: Tensor | None = None
        self._keeps_size = plain_conv(conv, bias=True)
        self._cast: Any = None  # of cudnn.py
        self._padding = conv._reversed_padding_repeated_twice

    @property
    def weight(self) -> Tensor:
        """A copy, Tensor [K, C / groups, n, m]."""
        return self._weight.to_dense() if self._weight.is_mkldnn else self._weight.clone()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not self._served(x):
            y = self._by_cudnn(x) if self.relu else None
            if y is not None:
                return y
            y = self._stock(x)
            return torch.relu_(y) if self.relu else y
        x = x.contiguous(memory_format=torch.channels_last)
        if self._goes_by_tiles(x):
            return self._by_tiles(x, None, self.relu)
        return _ops().unary(x, self._packed(x), self.bias, *self._window(), "relu" if self.relu else "none", [], "")

    def added(self, x: Tensor, other: Tensor, *, into: bool = False) -> Tensor:
        """``relu(conv(x) + other)``. into: other may be overwritten."""
        if torch.compiler.is_compiling() or not (self._served(x) and self._served(other)):
            y = self._by_cudnn(x, other)
            return torch.relu_(self._stock(x) + other) if y is None else y
        x = x.contiguous(memory_format=torch.channels_last)
        if self._goes_by_tiles(x):
            return self._by_tiles(x, other, True)
        rest: Any = (self._packed(x), self.bias, *self._window(), "add", 1.0, "relu", [], None)
        if into and other.is_contiguous(memory_format=torch.channels_last):
            return _ops().binary_(other, x, *rest)
        return _ops().binary(x, other.contiguous(memory_format=torch.channels_last), *rest)

    def _goes_by_tiles(self, x: Tensor) -> bool:
        return self._keeps_size and transformed_reason(x, self._weight.shape) is None

    def _by_tiles(self, x: Tensor, other: Tensor | None, relu: bool) -> Tensor:
        if self._tiles is None:
            with torch.inference_mode(False):
                self._tiles = transformed(self.weight)
        return conv_forward(x, self._tiles, self.bias, other, True, relu, False)[0]

    def _window(self) -> tuple[Any, Any, Any, int]:
        return self.padding, self.stride, self.dilation, self.groups

    def _packed(self, x: Tensor) -> Tensor:
        """The weight as oneDNN wants it for x. For another shape it would turn it anew at each call, which can take as
        long as the convolution; so a shape that comes twice in a row gets a weight of its own."""
        weight, shape = self._weight, x.shape
        packed_for, last = self._shapes
        if not weight.is_mkldnn or (shape == last and shape != packed_for):
            with torch.inference_mode(False):
                weight = _ops().reorder(_dense(self) if weight.is_mkldnn else weight, *self._window(), list(shape))
            self._weight, self._is_packed = weight, True
            packed_for = shape
        self._shapes = packed_for, shape
        return weight

    def _served(self, x: Tensor) -> bool:
        """Whether oneDNN takes x, and nothing more is asked for than the result."""
        dtype = self._weight.dtype
        return bool(
            type(x) is Tensor
            and x.device.type == self._weight.device.type == "cpu"
            and x.layout == torch.strided
            and x.dim() == 4
            and x.numel() > 0
            and x.dtype == dtype
            and (dtype == torch.float32 or (dtype == torch.bfloat16 and checks.multiplies_bfloat16()))
            and self._zeros
            and _ops() is not None
            and torch.backends.mkldnn.enabled
            and not (torch.is_grad_enabled() and x.requires_grad)
            and not checks.autocasts(x)
            and not checks.transformed((x,))
        )

    def _by_cudnn(self, x: Tensor, other: Tensor | None = None) -> Tensor | None:
        return None if torch.compiler.is_compiling() else cudnn.relu_of_conv(self, x, other)

    def _stock(self, x: Tensor) -> Tensor:
        weight = _dense(self) if self._is_packed or self._weight.is_mkldnn else self._weight
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = nn.functional.pad(x, self._padding, mode=self.padding_mode), 0
        return nn.functional.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)

    def plain(self) -> nn.Module:
        """The same in modules of torch.nn, for those who trace."""
        given: Any = {name: getattr(self, name) for name in _SIZES}
        conv = nn.Conv2d(**given, bias=self.bias is not None, device="meta", dtype=self._weight.dtype)
        conv.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias, requires_grad=False)
        return nn.Sequential(conv, nn.ReLU()).eval() if self.relu else conv.eval()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_weight": self.weight, "_is_packed": False, "_tiles": None, "_cast": None}

    def _hold(self, weight: Tensor) -> None:
        """weight, and nothing made of another."""
        self._weight, self._is_packed, self._tiles, self._cast = weight, False, None, None

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedConv:
        self._hold(fn(self.weight))
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        metadata, strict, missing, unexpected, errors = args
        self._cast = None
        key = prefix + "weight"
        rest = {k: v for k, v in state_dict.items() if k != key}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        new = state_dict.get(key)
        if new is None:
            missing.append(key)
        elif new.shape != self._weight.shape:
            errors.append(f"size mismatch for {key}: {list(new.shape)} where {list(self._weight.shape)} is expected")
        else:
            self._hold(self.weight.copy_(new))

    def extra_repr(self) -> str:
        relu = ", relu" if self.relu else ""
        return ", ".join(f"{name}={getattr(self, name)}" for name in _SIZES[:-1]) + relu


# An opaque tensor is nothing that a compiler can look into.
@_disable_dynamo
def _dense(conv: FoldedConv) -> Tensor:
    return conv.weight


class _Ops:
    """oneDNN's convolutions with what follows them, which Inductor calls too; they are not documented."""

    def __init__(self) -> None:
        ops = torch.ops.mkldnn
        self.reorder = ops._reorder_convolution_weight.default
        self.unary = ops._convolution_pointwise.default
        self.binary = ops._convolution_pointwise.binary
        self.binary_ = ops._convolution_pointwise_.binary


@functools.cache
def _ops() -> Any:
    """None where this PyTorch has them not."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return _Ops()
    except AttributeError:
        return None


def folded(modules: Sequence[nn.Module], *, plain: bool = False) -> list[nn.Module]:
    """What does the work of each of these modules, one behind the other, in evaluation: a convolution that of the
    BatchNorm and ReLU behind it, which become nn.Identity. What is not served stays as it is; weights of convolutions
    change.

    plain: all are modules of torch.nn, and a ReLU stays what it is."""
    found = list(modules)
    rest = [i for i, module in enumerate(found) if not nothing(module)]
    while rest:
        first, *rest = rest
        conv = found[first]
        taken = bool(rest) and takes_norm(conv, found[rest[0]])
        if taken:
            found[rest[0]] = left = take_norm(conv, found[rest[0]])
            rest = rest[nothing(left) :]
        relu = bool(rest) and takes_relu(found[rest[0]])
        if not plain and type(conv) is nn.Conv2d and not hooked(conv) and (taken or relu):
            found[first] = FoldedConv(conv, relu)
            if relu:
                found[rest[0]] = nn.Identity()
                rest = rest[1:]
    return found


class FoldedBlock(nn.Module):
    """A residual block for inference, ``act(shortcut(x) + gate(inner(x)))``, whose sum and ReLU the last convolution of
    inner does where nothing is between.

    Args:
        inner, shortcut: modules one behind the other; no shortcut is x itself.
        behind: what comes between inner and the sum.
        activation: act.
        fused: False takes stock PyTorch operations.

    Shape: that of the block.
    """

    def __init__(
        self,
        inner: Sequence[nn.Module],
        shortcut: Sequence[nn.Module],
        behind: Sequence[nn.Module],
        activation: nn.Module,
        *,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.inner = nn.Sequential(*(module for module in inner if not nothing(module)))
        self.shortcut = nn.Sequential(*(module for module in shortcut if not nothing(module)))
        self.behind = nn.ModuleList(behind)
        self.activation = activation
        self.fused = fused

    def forward(self, x: Tensor, *, into: bool = False) -> Tensor:
        """into: x may be overwritten."""
        shortcut = self.shortcut(x)
        *inner, last = self.inner
        y = x
        for module in inner:
            y = module(y)
        behind, relu = list(self.behind), takes_relu(self.activation)
        if not behind and relu and type(last) is FoldedConv and not hooked(last):
            return last.added(y, shortcut, into=self._projects() if len(self.shortcut) else into)
        y = last(y)
        gate = gate_of(behind) if relu and self.fused else None
        if gate is None:
            return join(nn.Identity(), behind, self.activation, y, shortcut, fused=self.fused)
        return rk_sum([shortcut, y], [1.0, 1.0], steps=[None, gate(y.mean((2, 3)))], relu=True)

    def _projects(self) -> bool:
        """Whether the shortcut's result is new, and nobody else has it."""
        last = self.shortcut[-1]
        return type(last) is FoldedConv and not (hooked(last) or hooked(self.shortcut) or _global_hooks())


class FoldedStage(nn.Sequential):
    """Folded blocks one behind the other. Each writes over what the one before it made, where nobody listens: oneDNN
    adds to what is there faster than it reads another tensor."""

    def forward(self, x: Tensor) -> Tensor:
        own = False
        for block in self:
            silent = type(block) is FoldedBlock and not _global_hooks() and not any(map(hooked, block.modules()))
            x = block(x, into=True) if own and silent else block(x)
            own = silent
        return x


class FoldedBranch(nn.Module):
    """A PreActBranch for inference on a GPU, its second BatchNorm in the weights of the first convolution. (On a CPU
    both BatchNorms are part of the convolutions behind them, at no cost.)

    Shape: that of the branch.
    """

    def __init__(self, branch: PreActBranch) -> None:
        super().__init__()
        self.channels = branch.channels
        self.fused = branch.fused
        self.norm1 = branch.norm1
        self.conv1, *_ = folded([branch.conv1, branch.norm2, nn.ReLU()])
        self.conv2 = branch.conv2

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(batch_norm_relu(self.norm1, x, fused=self.fused)))


def _global_hooks() -> bool:
    module = nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)
