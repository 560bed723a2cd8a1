"""Is a residual network stable, as a discretized equation (Yang et al., "Dynamical System Inspired Adaptive Time
Stepping Controller for Residual Network Families", equations 4 and 7)?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rkfast.nn.controller import Controller
from rkfast.nn.form import present
from rkfast.ode.untouched import as_it_was
from rkfast.tsc.stepped import Residual, residual_blocks

ITERATIONS = 64
TOLERANCE = 1e-6  # of an eigenvalue's residual, as a part of it
IMAGES = 4
# Where the first convolution has a stride, and where it has none.
SIZES = {True: 224, False: 32}
# No two values are further apart behind them than before.
CONTRACTIONS = (nn.ReLU, nn.ReLU6, nn.Identity, nn.Tanh, nn.Sigmoid)


@dataclass(frozen=True)
class BlockStability:
    """One block ``y' = act(S y + dt F(y))`` of a network.

    Attributes:
        name: of the module.
        step: mean of dt over the channels; 1 without a controller.
        shortcut: ||S||_2, 1 where the shortcut is y itself.
        branch: ||dt W||_2, the product of the spectral norms of the linear maps of which F is made.
        growth: of the measured perturbation, ||y'_eps - y'|| / ||y_eps - y||.
        radius: max |1 + dt lambda| over the eigenvalues of F's Jacobian at the first image (equation 4); None where the
            shortcut is not y itself.
        caveat: what in the block is not what Proposition 1 supposes, so that growth may exceed the factor; "" where
            nothing is.
    """

    name: str
    step: float
    shortcut: float
    branch: float
    growth: float
    radius: float | None
    caveat: str

    @property
    def factor(self) -> float:
        """shortcut + branch, of which Proposition 1 makes the product."""
        return self.shortcut + self.branch


@dataclass(frozen=True)
class Stability:
    """The blocks of a network in the order in which they ran; the str is a table."""

    blocks: tuple[BlockStability, ...]

    @property
    def bound(self) -> float:
        """The product of the blocks' factors (Proposition 1)."""
        return math.prod(block.factor for block in self.blocks)

    @property
    def growth(self) -> float:
        """The product of the blocks' measured growths: what a perturbation of y_0 has become at y_D, where nothing
        stands between the blocks."""
        return math.prod(block.growth for block in self.blocks)

    @property
    def radius(self) -> float | None:
        """The largest of the blocks' (equation 4); None where none has one."""
        return max((block.radius for block in self.blocks if block.radius is not None), default=None)

    @property
    def holds(self) -> bool:
        """Whether all blocks are what Proposition 1 supposes."""
        return not any(block.caveat for block in self.blocks)

    def __str__(self) -> str:
        head = ("block", "dt", "||S||", "||dt W||", "factor", "growth", "max |1 + dt lambda|")
        rows = [head] + [
            (
                block.name,
                f"{block.step:.3f}",
                *(f"{v:.4g}" for v in (block.shortcut, block.branch, block.factor, block.growth)),
                "" if block.radius is None else f"{block.radius:.4g}",
            )
            for block in self.blocks
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(f"bound {self.bound:.4g}, measured growth {self.growth:.4g}")
        return "\n".join(lines + [block.caveat for block in self.blocks if block.caveat])


def stability(
    model: nn.Module,
    x: Tensor | None = None,
    *,
    epsilon: float = 1e-3,
    iterations: int = ITERATIONS,
    generator: torch.Generator | None = None,
) -> Stability:
    """Proposition 1's bound of what a network's residual blocks make of a perturbation, what they make of one, and
    equation 4's condition.

    ``||y_D^eps - y_D|| <= eps * prod_j (1 + ||W_j||_2 dt_j)`` (equation 7) supposes that F is a linear operator W and
    ReLUs. Here W is all of the branch that is linear in eval mode, so that the bound is one of the network as it
    is: the convolutions as maps of the feature maps that they get from x (stride, padding and groups as they are), each
    with the scale ``weight / sqrt(running_var + eps)`` of its BatchNorm, and dt, a factor per channel, with the last of
    them. Between ReLUs norms multiply. A projection shortcut S counts with its own norm in place of 1. So a network has
    the same bound before and behind ``rkfast.tsc.fold``. Blocks without a controller have dt = 1.

    The eigenvalues are those of the Jacobian of dt F at the first image, where ReLUs are on or off; the act behind the
    sum is none of F, in the paper neither.

    Norms and eigenvalues are Ritz values of Arnoldi's method, which is power iteration that keeps all of its vectors
    (plain power iteration does not settle on a complex pair), of products of the map and its adjoint, and of the
    Jacobian's transpose and vectors. Where ``iterations`` of them do not suffice, norms come out too small, by little,
    and radii are estimates.

    The work is done on a copy of the model in eval mode, in float64 (float32 where a device has none); the model and
    the global random numbers are left as they are.

    Args:
        model: a network of residual blocks that ``rkfast.tsc.attach`` knows, with controllers or without, frozen or
            folded; not compiled.
        x: images, a floating-point Tensor [N, C, H, W]; None takes four of normal noise, 224 x 224 where the model's
            first convolution has a stride, else 32 x 32.
        epsilon: size of the measured perturbation of what the first block reads, as a part of its norm; its direction
            is random.
        iterations: at least 1.
        generator: of the noise and what the iterations begin with, on any device; None is one with seed 0.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range; the model has no residual blocks, or DenseNet's or CliqueNet's, which
            do not add; or a layer that should be linear is not, such as a GroupNorm.
        RuntimeError: blocks of the model did not run.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Module, got {type(model).__name__}")
    source = _generator(generator)
    _check_numbers(epsilon, iterations)
    with _apart(model):
        net = copy.deepcopy(model).eval()
        like = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
        dtype = _wide(like.device)
        net.to(dtype=dtype)
        for module in net.modules():
            if isinstance(module, Controller):
                module.held = None  # of a float32 forward
        blocks = {residual.name: residual for residual in residual_blocks(net)}
        images = _images(net, source) if x is None else _checked(x)
        with torch.no_grad():
            starts, ends = _run(net, images.to(like.device, dtype), blocks, None)
            if missing := blocks.keys() - starts.keys():
                raise RuntimeError(f"model: {', '.join(sorted(missing))} did not run")
            first = next(iter(starts.values()))
            noise = _noise(first.shape, source, first)
            shift = noise * (epsilon * (_norm(first) or 1.0) / _norm(noise))
            shifted, moved = _run(net, images.to(like.device, dtype), blocks, shift)
        return Stability(
            tuple(
                _block(
                    blocks[name],
                    starts[name][:1],
                    _ratio(_norm(moved[name] - ends[name]), _norm(shifted[name] - starts[name])),
                    iterations,
                    source,
                )
                for name in starts
            )
        )


def spectral_norm(
    module: nn.Module,
    shape: Sequence[int],
    *,
    iterations: int = ITERATIONS,
    generator: torch.Generator | None = None,
) -> float:
    """The largest singular value of an affine module in eval mode, such as a convolution, with its bias left out, as a
    map of Tensors [1, *shape]; computed as in ``stability``, which leaves the module as it is.

    Args:
        module: convolution, BatchNorm, average pooling, an nn.Sequential of them.
        shape: (C, H, W) of what it reads.
        iterations, generator: as in ``stability``.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: iterations is less than 1, or the module is not affine.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a Module, got {type(module).__name__}")
    source = _generator(generator)
    _check_numbers(1.0, iterations)
    with _apart(module):
        device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        wide = copy.deepcopy(module).eval().to(dtype=_wide(device))
        like = torch.empty((1, *shape), dtype=_wide(device), device=device)
        return _norm_of([("module", wide)], like, None, iterations, source)


def _block(residual: Residual, y: Tensor, growth: float, iterations: int, source: torch.Generator) -> BlockStability:
    """y: what the block reads, Tensor [1, C, H, W]."""
    name, block, form, step = residual
    caveats: list[str] = []
    segments: list[list[tuple[str, nn.Module]]] = [[]]
    inputs = [y]
    branch = [*form.inner, form.norm, *form.behind]
    with torch.no_grad():
        z = y
        for layer_name in branch:
            for layer in present(block, [layer_name]):
                at = f"{name}.{layer_name}"
                if layer_name.startswith(("relu", "act")):
                    caveats += _contracts(at, layer)
                    z = layer(z.clone())
                    segments.append([])
                    inputs.append(z)
                    continue
                z = layer(z)
                if layer_name == "se":
                    caveats.append(f"{at} is {type(layer).__name__}, which is counted as if it were not there")
                else:
                    segments[-1].append((at, layer))
    caveats += _contracts(f"{name}.{form.activation}", getattr(block, form.activation))
    caveats = list(dict.fromkeys(caveats))
    last = len(segments) - 1
    norms = [
        _norm_of(segment, read, step if i == last else None, iterations, source)
        for i, (segment, read) in enumerate(zip(segments, inputs, strict=True))
    ]
    downsample = getattr(block, "downsample", None)
    shortcut = 1.0
    radius = None
    if downsample is not None:
        shortcut = _norm_of([(f"{name}.downsample", downsample)], y, None, iterations, source)
    else:
        radius = _radius(lambda v: _times(_through(present(block, branch), v), step), y, iterations, source)
    return BlockStability(
        name,
        1.0 if step is None else step.double().mean().item(),
        shortcut,
        math.prod(norms),
        growth,
        radius,
        "; ".join(caveats),
    )


def _norm_of(
    layers: Sequence[tuple[str, nn.Module]],
    like: Tensor,
    step: Tensor | None,
    iterations: int,
    source: torch.Generator,
) -> float:
    """The spectral norm of linear layers, one behind the other, and of step, on Tensors such as ``like``."""
    linear = []
    v = _noise(like.shape, source, like)
    start = v
    with torch.no_grad():
        for name, layer in layers:
            # Constants do not matter to differences, but their rounding would.
            homogeneous: Any = copy.deepcopy(layer)
            for module in homogeneous.modules():
                for constant in ("bias", "running_mean"):
                    if isinstance(getattr(module, constant, None), Tensor):
                        getattr(module, constant).zero_()
            out = homogeneous(v)
            for factor in (2, -1):
                if _norm(homogeneous(factor * v) - factor * out) > 1e-3 * _norm(out):
                    raise ValueError(
                        f"{'model: ' if '.' in name else ''}{name} is {type(layer).__name__}, which is not linear in "
                        "eval mode, so that it has no spectral norm; expected convolutions, BatchNorm with running "
                        "statistics and average pooling"
                    )
            v = out
            linear.append(homogeneous)
    zero = torch.zeros_like(like).requires_grad_()
    image = _times(_through(linear, zero), step)
    if not image.requires_grad:  # no layers, or such as do not depend on what they read
        return 1.0 if step is None else step.abs().max().item()

    def gram(u: Tensor) -> Tensor:
        with torch.no_grad():
            forward = _times(_through(linear, u), step)
        return torch.autograd.grad(image, zero, forward, retain_graph=True)[0]

    return max(_leading(gram, start, iterations, symmetric=True), 0.0) ** 0.5


def _radius(increment: Callable[[Tensor], Tensor], y: Tensor, iterations: int, source: torch.Generator) -> float:
    """max |1 + lambda| over the eigenvalues of the increment's Jacobian at y, by those of its transpose."""
    at = y.detach().clone().requires_grad_()
    out = increment(at)

    def transposed(v: Tensor) -> Tensor:
        return v + torch.autograd.grad(out, at, v, retain_graph=True)[0]

    return _leading(transposed, _noise(y.shape, source, y), iterations, symmetric=False)


def _leading(apply: Callable[[Tensor], Tensor], start: Tensor, iterations: int, *, symmetric: bool) -> float:
    """The largest eigenvalue of a symmetric linear map, or the largest modulus of one of any: Arnoldi's method, with
    each vector made orthogonal twice."""
    basis = start.new_empty(min(iterations, start.numel()) + 1, start.numel())
    basis[0] = start.flatten() / _norm(start)
    h = torch.zeros(len(basis), len(basis) - 1, dtype=torch.float64)
    found = 0.0
    for j in range(len(basis) - 1):
        w = apply(basis[j].view_as(start)).flatten()
        size = _norm(w)
        for _ in range(2):
            part = basis[: j + 1] @ w
            w = w - part @ basis[: j + 1]
            h[: j + 1, j] += part.double().cpu()
        rest = _norm(w)
        square = h[: j + 1, : j + 1]
        if symmetric:
            values, vectors = torch.linalg.eigh((square + square.T) / 2)
            found, last = values[-1].item(), abs(vectors[-1, -1].item())
        else:
            values, vectors = torch.linalg.eig(square)
            i = int(values.abs().argmax())
            found, last = abs(values[i].item()), abs(vectors[-1, i].item())
        # Nothing is left of w but rounding, or the eigenvalue's residual is small.
        if rest <= 1e-2 * TOLERANCE * size or rest * last <= TOLERANCE * found:
            break
        h[j + 1, j] = rest
        basis[j + 1] = w / rest
    return found


def _run(
    net: nn.Module, x: Tensor, blocks: dict[str, Residual], shift: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the blocks read and return in the order in which they run, with ``shift`` added to what the first reads."""
    starts: dict[str, Tensor] = {}
    ends: dict[str, Tensor] = {}

    def opens(name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            y = args[0] if shift is None or starts else args[0] + shift
            starts.setdefault(name, y.clone())
            return (y, *args[1:])

        return hook

    def closes(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Tensor) -> None:
            ends.setdefault(name, out.clone())

        return hook

    handles = []
    for name, residual in blocks.items():
        handles.append(residual.block.register_forward_pre_hook(opens(name)))
        handles.append(residual.block.register_forward_hook(closes(name)))
    try:
        net(x)
    finally:
        for handle in handles:
            handle.remove()
    return starts, ends


@contextmanager
def _apart(model: nn.Module) -> Iterator[None]:
    """With gradients, whatever the caller has: inference_mode(False) enables them too. (Autocast leaves float64 as it
    is.)"""
    with torch.inference_mode(False), as_it_was(model):
        yield


def _contracts(name: str, layer: nn.Module) -> list[str]:
    if isinstance(layer, CONTRACTIONS):
        return []
    return [f"{name} is {type(layer).__name__}, whose slope is supposed to be at most 1"]


def _through(layers: Sequence[nn.Module], v: Tensor) -> Tensor:
    for layer in layers:
        v = layer(v)
    return v


def _times(v: Tensor, step: Tensor | None) -> Tensor:
    return v if step is None else v * step.to(v.dtype)[:, None, None]


def _images(net: nn.Module, source: torch.Generator) -> Tensor:
    conv = next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)
    if conv is None:
        raise ValueError("x: the model has no convolution that says what it reads; give images")
    size = SIZES[max(conv.stride) > 1]
    return _noise((IMAGES, conv.in_channels, size, size), source, torch.empty(0))


def _checked(x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected floating-point images, got {x.dtype}; convert and normalise them")
    if x.dim() != 4 or not x.numel():
        raise ValueError(f"x: expected images [N, C, H, W], at least one, got {list(x.shape)}")
    return x.detach().clone()  # an inference tensor has no gradients


def _check_numbers(epsilon: object, iterations: object) -> None:
    if isinstance(epsilon, bool) or not isinstance(epsilon, (int, float)):
        raise TypeError(f"epsilon: expected a number, got {type(epsilon).__name__}")
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon: expected a finite number above 0, got {epsilon}")
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"iterations: expected an int, got {type(iterations).__name__}")
    if iterations < 1:
        raise ValueError(f"iterations: expected at least 1, got {iterations}")


def _generator(generator: object) -> torch.Generator:
    if generator is None:
        return torch.Generator().manual_seed(0)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    return generator


def _noise(shape: Sequence[int], source: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(tuple(shape), generator=source, device=source.device).to(like.device, like.dtype)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _norm(v: Tensor) -> float:
    return torch.linalg.vector_norm(v.detach()).item()


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0
