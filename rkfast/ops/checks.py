"""What every op asks of its arguments, asked once, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rkfast import dispatch
from rkfast.ops import layout

MAX_TERMS = 16
MAX_DIMS = 5
MEMORY = ("speed", "min")  # what blocks keep for the backward

# Bits of what ``survey`` answers, as in csrc/cpu/host.h.
UNIFORM, CHANNELS_LAST, NEEDS_GRAD, PLAIN = 1, 2, 4, 8


def survey(
    tensors: Sequence[object],
    vectors: Sequence[object],
    gates: Sequence[object],
    running: int = 0,
    counter: object = None,
) -> int:
    """All that the checks below ask, in one call of the C++ extension; a call costs as much as one check in Python.

    gates: vectors that may be [N, C]. running: how many of the vectors, the last ones, are running statistics.

    0 means nothing is known, and the checks are to be asked one by one: they name what is wrong.
    """
    return _asked("survey", tensors, vectors, gates, running, counter)


def survey_block(
    x: object, shortcut: object, convs: object, norms: Sequence[object], step: object, strides: Sequence[object]
) -> int:
    """The same of a residual block that no autocast concerns. norms: weight, bias, running mean and variance, and
    counter of each, all of which may be None. One more of convs and norms than strides is a projection."""
    return _asked("survey_block", x, shortcut, convs, norms, step, strides)


def survey_growths(
    x: object,
    conv1: object,
    conv2: object,
    widths: Sequence[int],
    norms: Sequence[object],
    mean: object,
    var: object,
) -> int:
    """The same of growths that read so many channels of x, whose moments are mean and var or not known."""
    return _asked("survey_growths", x, conv1, conv2, widths, norms, mean, var)


def _asked(question: str, *args: object) -> int:
    if torch.compiler.is_compiling() or dispatch.extension() is None:
        return 0
    try:
        return getattr(dispatch.extension(), question)(*args)
    except TypeError:
        return 0


def whole_call(op: str, *args: object) -> Any:
    """What an op gives for PLAIN arguments on a CPU, computed, counted and recorded by autograd in one call of C++
    (csrc/cpu/nodes.cpp): a tensor, or [out, mean, var] where moments are asked for. None for all other calls."""
    if torch.compiler.is_dynamo_compiling():  # under other tracers a mode is on, which C++ sees
        return None
    extension = dispatch.extension()
    return None if extension is None else getattr(extension, op)(*args)


def recorded(op: dispatch.Op, lead: Tensor) -> Any:
    """The C++ function that computes a call of PLAIN arguments and makes its node of autograd (csrc/cpu/nodes.cpp); the
    call is then counted. None where another backend serves it."""
    return getattr(dispatch.extension(), f"{op.name}_recorded") if lead.is_cpu and op.serves_itself(lead) else None


def plain(grad: Tensor) -> bool:
    """Whether a backward of PLAIN arguments may go past the dispatcher, too."""
    return bool(survey((grad,), (), ()) & PLAIN)


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for PLAIN arguments, without its search for wrappers of functorch's transforms among them."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def activation(x: object, name: str) -> Tensor:
    """x as a floating tensor [N, C], [N, C, L], [N, C, H, W] or [N, C, D, H, W]."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}; convert it with .float()")
    if x.layout != torch.strided or x.is_nested:
        what = "a nested tensor" if x.is_nested else f"layout {x.layout}; convert it with .to_dense()"
        raise TypeError(f"{name}: expected a dense tensor, got {what}")
    if not 2 <= x.dim() <= MAX_DIMS:
        raise ValueError(f"{name}: expected [N, C] to [N, C, D, H, W] (2 to {MAX_DIMS} dimensions), got {x.dim()}")
    return x


def like(x: object, reference: Tensor, name: str, reference_name: str, shape: tuple[int, ...] | None = None) -> None:
    """x has the shape (or the one given), dtype and device of the tensor it is combined with."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    shape = tuple(reference.shape) if shape is None else shape
    if tuple(x.shape) != shape:
        raise ValueError(
            f"{name}: shape {list(x.shape)} differs from {reference_name}'s {list(shape)}; "
            "expand it first, the op does not broadcast"
        )
    if x.dtype != reference.dtype:
        raise TypeError(
            f"{name}: dtype {x.dtype} differs from {reference_name}'s {reference.dtype}; convert one of them"
        )
    if x.device != reference.device:
        raise ValueError(
            f"{name}: device {x.device} differs from {reference_name}'s {reference.device}; move one of them"
        )


def vector(v: object, x: Tensor, name: str, per_sample: bool = False, channels: int | None = None) -> None:
    """v is None or a floating vector [C] (or [N, C] where a factor per sample is supported) on x's device; C are x's
    channels or those given."""
    if v is None:
        return
    if not isinstance(v, Tensor):
        raise TypeError(f"{name}: expected a Tensor or None, got {type(v).__name__}")
    if not v.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got {v.dtype}")
    if v.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {v.layout}; convert it with .to_dense()")
    channels = x.shape[1] if channels is None else channels
    # One by one: a tracer would compare a batch of any size with the channels.
    fits = v.dim() == 1 and v.shape[0] == channels
    if per_sample and v.dim() == 2:
        fits = v.shape[0] == x.shape[0] and v.shape[1] == channels
    if not fits:
        wanted = f"[{channels}]" + (f" or {[x.shape[0], channels]}" if per_sample else "")
        raise ValueError(f"{name}: shape {list(v.shape)} does not fit; expected one value per channel, {wanted}")
    if v.device != x.device:
        raise ValueError(f"{name}: device {v.device} differs from the input's {x.device}; move one of them")


def convolution(weight: object, name: str, x: Tensor) -> None:
    """weight is that of a convolution that keeps the resolution, in x's dtype and on its device."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(weight).__name__}")
    if weight.dtype != x.dtype:
        raise TypeError(f"{name}: dtype {weight.dtype} differs from x's {x.dtype}; convert one of them")
    if weight.device != x.device:
        raise ValueError(f"{name}: device {weight.device} differs from x's {x.device}; move one of them")
    shape = list(weight.shape)
    if len(shape) != 4 or shape[2] != shape[3] or shape[2] % 2 == 0:
        raise ValueError(f"{name}: expected [k, C, n, n] with n odd, got {shape}")


def coefficients(coeffs: Sequence[float], terms: Sequence[object]) -> list[float]:
    """coeffs as floats, one per term."""
    try:
        values = [c if type(c) is float else _coefficient(c) for c in coeffs]
    except (TypeError, ValueError, RuntimeError) as error:  # a meta tensor has no number
        raise TypeError(f"coeffs: expected a sequence of floats, got {coeffs!r} ({error})") from None
    except OverflowError as error:
        raise ValueError(f"coeffs: a number is too large ({error})") from None
    if len(values) != len(terms):
        raise ValueError(f"coeffs: {len(values)} coefficients for {len(terms)} terms; give one per term")
    return values


def _coefficient(c: Any) -> float:
    if isinstance(c, Tensor) and c.requires_grad:
        raise TypeError("a tensor that requires grad would get none here; give what is learned as one of `steps`")
    if isinstance(c, (str, bytes)):
        raise TypeError(f"{c!r} is no number")
    return float(c)


def listed(values: Any, name: str) -> list[Any]:
    """values as a list, so that they can be read more than once."""
    if type(values) is not tuple and (isinstance(values, str) or not isinstance(values, (Sequence, Iterator))):
        raise TypeError(f"{name}: expected a list, got {type(values).__name__}")
    return list(values)


def flags(**values: object) -> None:
    for name, value in values.items():
        if type(value) is not bool:
            raise TypeError(f"{name}: expected True or False, got {value!r}")


def memory(value: object) -> None:
    if value not in MEMORY:
        raise ValueError(f"memory: expected one of {', '.join(MEMORY)}, got {value!r}")


def real(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def norm_numbers(eps: Any, momentum: Any, training: bool, prefix: str = "") -> None:
    real(eps, f"{prefix}eps")
    if momentum is not None:
        real(momentum, f"{prefix}momentum")
    if not (eps > 0 if training else eps >= 0):
        raise ValueError(f"{prefix}eps: expected a {'positive' if training else 'non-negative'} number, got {eps}")


def triple(moments: object) -> None:
    """moments are three values; as those of x ``known`` checks them."""
    if not isinstance(moments, (tuple, list)) or len(moments) != 3:
        given = f"{len(moments)} values" if isinstance(moments, (tuple, list)) else type(moments).__name__
        raise TypeError(f"moments: expected Moments(mean, var, count), got {given}")


def known(moments: Any, x: Tensor) -> None:
    """Both moments are there, taken over as many values as x has per channel."""
    mean, var, count = moments
    for value, name in ((mean, "mean"), (var, "var")):
        if value is None:
            raise TypeError(f"moments.{name}: expected a Tensor, got None")
    if tracing():  # sizes are tensors
        return
    if isinstance(count, bool) or not isinstance(count, (int, torch.SymInt)):
        raise TypeError(f"moments.count: expected an int, got {count!r}")
    if count != layout.count(x):
        raise ValueError(f"moments.count: x has {layout.count(x)} values per channel, got {count}")


def running(v: Tensor | None, name: str, written: bool) -> None:
    """v, a vector per channel, can be a running statistic: nobody differentiates it, and it can be written in place."""
    if v is None:
        return
    if v.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: running statistics are not differentiable; expected one that does not require grad"
        )
    if written and v.numel() > 1 and v.stride(0) == 0:
        raise ValueError(f"{name}: expanded, all channels share one value in memory; give .clone() of it")
    if written:
        resolved(v, name)


def counter(n: object, x: Tensor, name: str = "num_batches_tracked") -> None:
    """n is None or a counter of batches."""
    if n is None:
        return
    if not isinstance(n, Tensor):
        raise TypeError(f"{name}: expected a Tensor or None, got {type(n).__name__}")
    if n.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"{name}: expected an integer tensor, got {n.dtype}")
    if n.numel() != 1:
        raise ValueError(f"{name}: expected one element, got shape {list(n.shape)}")
    if n.is_meta != x.is_meta:
        raise ValueError(f"{name}: device {n.device} differs from the input's {x.device}; move one of them")
    resolved(n, name)


def resolved(t: Tensor, name: str) -> None:
    if _is_lazy(t):
        raise ValueError(f"{name}: a lazily negated view or a zero tensor, whose memory holds other values; clone it")


def _is_lazy(t: Tensor) -> bool:
    return not torch.compiler.is_compiling() and (t.is_neg() or t._is_zerotensor())


def held(t: Any) -> Any:
    """t such that its memory holds its values, which that of a lazily negated view or of a zero tensor does not."""
    if not isinstance(t, Tensor) or not _is_lazy(t):
        return t
    return t.resolve_neg() if t.is_neg() else torch.zeros(t.shape, dtype=t.dtype, device=t.device) + t


def apart(t: Any) -> Any:
    """t as an input to differentiate by: of two inputs one may have been made of the other."""
    return t if t is None or not t.requires_grad else t.view_as(t)


def keepable(tensors: Mapping[str, Tensor | None]) -> None:
    """They can be kept for a backward. Autograd would say so too, but after statistics have moved."""
    if torch.compiler.is_compiling():
        return
    for name, t in tensors.items():
        if t is not None and t.is_inference():
            raise RuntimeError(
                f"{name}: an inference tensor cannot be kept for the backward; clone it outside of "
                "torch.inference_mode(), or call this under torch.no_grad()"
            )


def distinct(tensors: Sequence[Any]) -> Sequence[Any]:
    """tensors, none of them twice where torch.compile traces: it would lose gradients of an autograd.Function."""
    if not torch.compiler.is_compiling():
        return tensors
    result: list[Any] = []
    for i, t in enumerate(tensors):
        again = t is not None and any(t is other for other in tensors[:i])
        result.append(t.view_as(t) if again else t)
    return result


def tracing() -> bool:
    """Whether torch.jit.trace records."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def transformed(tensors: Sequence[Tensor | None]) -> bool:
    """Whether only plain PyTorch gives what is asked for: under a transform of torch.func, in forward-mode AD, where
    gradients come in batches (is_grads_batched), and in torch.jit.trace, which records no op of ours."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.compiler.is_compiling():
        return False
    given = [t for t in tensors if t is not None]
    if tracing() or any(map(torch._C._functorch.is_legacy_batchedtensor, given)):
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given)


def differentiated(grad: Tensor) -> bool:
    """Whether a backward has to be differentiable in turn (create_graph), or plain PyTorch (``transformed``)."""
    return torch.is_grad_enabled() or transformed((grad,))


def transforms() -> bool:
    """Whether some tensors may be ``transformed``."""
    return torch._C._are_functorch_transforms_active() or tracing() or forward_ad._current_level >= 0


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x; of a device that has none, such as meta, torch would not even be asked."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def dtype_of_call(x: Tensor) -> torch.dtype:
    """The dtype in which an op takes x that autocast's convolutions are part of."""
    autocast = autocasts(x) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def missing(backend: str, device: str, explicit: bool = False) -> str | None:
    return dispatch.backend_reason(backend, device, explicit)


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products in bfloat16."""
    return torch.cpu._is_avx512_bf16_supported()


def multiplies_16_bits(device: torch.device) -> bool:
    """Whether Triton's products of two bytes an element go by matrix instructions there."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


# What torch.compiler.assume_constant_result does; to call it would import the compiler.
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
multiplies_bfloat16._dynamo_marked_constant = True  # type: ignore[attr-defined]
multiplies_16_bits._dynamo_marked_constant = True  # type: ignore[attr-defined]


def promoted(tensors: list[Tensor]) -> list[Tensor]:
    """Under autocast, tensors of different floating dtypes in the widest of them, as eager's sum would have it."""
    if all(isinstance(t, Tensor) for t in tensors) and autocasts(tensors[0]):
        widest = tensors[0].dtype
        for t in tensors:
            if t.is_floating_point():
                widest = torch.promote_types(widest, t.dtype)
        return [t.to(widest) if t.is_floating_point() else t for t in tensors]
    return tensors


def slot(out: object, x: Tensor, inputs: Sequence[Tensor], vectors: Sequence[Tensor | None], needs_grad: bool) -> bool:
    """Whether out is laid out channels_last; raises where it cannot be written."""
    like(out, x, "out", "the result")
    assert isinstance(out, Tensor)
    resolved(out, "out")
    if torch.is_grad_enabled() and out.requires_grad:
        raise RuntimeError("out: requires grad, and writing into it is not differentiable; give out.detach()")
    if transformed((*inputs, *vectors, out)):
        raise RuntimeError("out: not supported by torch.func, forward-mode AD and torch.jit.trace; call it without out")
    if needs_grad:
        raise RuntimeError(
            "out: writing into a given tensor is not differentiable, and an argument requires grad; "
            "call it under torch.no_grad(), or without out"
        )
    # With one channel either layout may be meant.
    channels_last = layout.is_channels_last(out) or (out.shape[1] == 1 and not layout.is_rows(out, False))
    if not layout.is_rows(out, channels_last):
        raise ValueError(
            f"out: strides {out.stride()} are neither dense nor a channel slice of a dense tensor; "
            "give buffer[:, start:stop] of a contiguous or channels_last buffer"
        )
    for t in inputs:
        if layout.overlaps(out, t, channels_last):
            raise ValueError("out: overlaps an input in memory without being the same slice of it; give another slot")
    return channels_last
