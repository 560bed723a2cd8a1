"""A network, or a whole training step, as CUDA graphs: the host launches once what it would launch a thousand times."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

WARMUP = 3  # calls before a capture, in which kernels are compiled, chosen and loaded
COMPILED = "torch.compile, whose own graphs are those of mode='reduce-overhead'"


class Graphed:
    """What ``graphed`` returns. Called like what was captured, with tensors of the shapes of the sample; the results
    are the same tensors at every call, which the next call writes over."""

    def __init__(
        self, run: Callable[..., Any], sample: Sequence[Tensor], model: nn.Module | None, kept: Sequence[Any] = ()
    ) -> None:
        self.model = model
        self._run = run
        self._kinds = [_kind(t) for t in sample]
        self._training = model is not None and model.training
        self._kept = kept  # graphs and what they read and write

    def __call__(self, *inputs: Tensor) -> Any:
        """
        Raises:
            TypeError, ValueError: inputs are not as the sample was.
            RuntimeError: the model was put into another mode meanwhile.
        """
        if len(inputs) != len(self._kinds):
            raise TypeError(f"inputs: {len(self._kinds)} were captured, got {len(inputs)}")
        for i, (given, kind) in enumerate(zip(inputs, self._kinds, strict=True)):
            if not isinstance(given, Tensor):
                raise TypeError(f"inputs[{i}]: expected a Tensor, got {type(given).__name__}")
            if _kind(given) != kind:
                raise ValueError(
                    f"inputs[{i}]: captured was {_in_words(kind)}, got {_in_words(_kind(given))}; a graph has one "
                    "shape: call graphed again for another"
                )
        if self.model is not None and self.model.training != self._training:
            modes = ("evaluation", "training")
            raise RuntimeError(
                f"model: captured in {modes[self._training]} mode, and it is in {modes[self.model.training]} mode now; "
                "call graphed again"
            )
        return self._run(*inputs)


def graphed(model_or_step: Callable[..., Any], sample: Tensor | Sequence[Tensor], *, warmup: int = WARMUP) -> Graphed:
    """Capture a network or a whole training step in CUDA graphs, by torch's own tools for them.

    What is captured:

    - a module in training mode, where gradients are on: its forward and its backward, a graph each, behind autograd
      (``torch.cuda.make_graphed_callables``). Loss and optimizer stay outside, and see the same parameters;
    - any other module: its inference, without gradients;
    - a function of tensors: all that it does, which may be forward, loss, ``backward()`` and ``optimizer.step()``
      (with ``capturable=True`` where the optimizer has that). It is called ``warmup + 1`` times on the sample, and
      those are steps like any other; the capture itself computes nothing.

    The autocast around the call is captured with the rest. Buffers of a module (running statistics) and its gradients
    are as before when this returns, and so are the generators of random numbers; dropout draws anew at every replay.

    A replay reads the parameters where they lay at the capture: change them in place (as optimizers and
    ``load_state_dict`` do), and capture again after ``model.to(...)``. Decisions that Python takes in the forward are
    those of the capture.

    Args:
        model_or_step: an nn.Module, or a function.
        sample: what it is called with, Tensors on one GPU; each later call takes as many of the same shapes, dtypes
            and ``requires_grad``.
        warmup: calls before the capture.

    Returns:
        Graphed: call it in place of ``model_or_step``.

    Raises:
        TypeError: model_or_step cannot be called, or the sample is not of Tensors.
        ValueError: a wrong number; tensors that are not on one GPU; a module whose calls do more than its forward
            (DistributedDataParallel, DataParallel, torch.compile, hooks).
        RuntimeError: there is no GPU, a capture is under way already, or something cannot be captured: what makes the
            host wait for the GPU (``.item()``, ``print``, an ``if`` on a tensor) or work on the CPU. Parameters,
            buffers and gradients of a module are as before.
    """
    given = _checked(model_or_step, sample, warmup)
    model = model_or_step if isinstance(model_or_step, nn.Module) else None
    device = given[0].device
    states = [] if model is None else [(b, b.detach().clone()) for b in model.buffers()]
    differentiable = model is not None and model.training and torch.is_grad_enabled()
    static = [t.detach().clone().requires_grad_(t.requires_grad) for t in given]
    try:
        with torch.random.fork_rng([device.index]), torch.cuda.device(device), _without_cache():
            if model is not None and differentiable:
                return Graphed(_trained(model, static, warmup), given, model)
            with torch.set_grad_enabled(model is None and torch.is_grad_enabled()):
                run, kept = _replayed(model_or_step, static, warmup)
            return Graphed(run, given, model, kept)
    except RuntimeError as error:
        raise RuntimeError(f"model_or_step: it cannot be captured: {_explained(error)}") from error
    finally:
        with torch.no_grad():
            for buffer, before in states:
                buffer.copy_(before)


def _checked(model_or_step: object, sample: object, warmup: object) -> list[Tensor]:
    """The tensors of the sample; raises where there is nothing to capture, before anything runs."""
    if not callable(model_or_step):
        raise TypeError(f"model_or_step: expected an nn.Module or a function, got {type(model_or_step).__name__}")
    given = [sample] if isinstance(sample, Tensor) else sample
    if not isinstance(given, (list, tuple)) or not given or not all(isinstance(t, Tensor) for t in given):
        raise TypeError(f"sample: expected a Tensor or a tuple of Tensors, got {_named(sample)}")
    if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 1:
        raise ValueError(f"warmup: expected 1 or more, got {warmup!r}")
    tensors = [(f"sample[{i}]", t) for i, t in enumerate(given)]
    if isinstance(model_or_step, nn.Module):
        _check_model(model_or_step)
        tensors += [*model_or_step.named_parameters(), *model_or_step.named_buffers()]
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA graphs need a GPU, and torch sees none; rkfast info says what there is")
    device = given[0].device
    for name, t in tensors:
        if t.device.type != "cuda":
            raise ValueError(f"{name}: a CUDA graph takes tensors on a GPU, got one on {t.device}; move it there")
        if t.device != device:
            raise ValueError(f"{name}: device {t.device} differs from the sample's {device}; a graph has one device")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("this stream captures already; call graphed outside of torch.cuda.graph")
    return list(given)


def _check_model(model: nn.Module) -> None:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(
            f"model_or_step: {type(model).__name__} shares gradients by hooks, which the graph of a backward cannot "
            "hold; give a function of the whole step that calls it"
        )
    if "_orig_mod" in model._modules:
        raise ValueError(f"model_or_step: the module is within {COMPILED}; give the module itself")
    for name, module in model.named_modules():
        if _hooked(module):
            raise ValueError(
                f"model_or_step: {name or type(module).__name__} has hooks, which a replay does not call; remove them, "
                "or give a function"
            )


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _trained(model: nn.Module, static: list[Tensor], warmup: int) -> Callable[..., Any]:
    """Forward and backward, a graph each. The module that torch writes into is one around the model."""
    whole = _Whole(model)
    wanted = [t for t in (*static, *model.parameters()) if t.requires_grad]

    def step() -> None:
        found = [t for t in pytree.tree_leaves(whole(*static)) if isinstance(t, Tensor)]
        outs = [t for t in found if t.requires_grad]
        if outs and wanted:
            torch.autograd.grad(outs, wanted, [torch.ones_like(t) for t in outs], allow_unused=True)

    _warm(step, static[0].device, 1)
    return torch.cuda.make_graphed_callables(whole, tuple(static), num_warmup_iters=warmup, allow_unused_input=True)


class _Whole(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Any:
        return self.net(*inputs)


def _replayed(
    call: Callable[..., Any], static: list[Tensor], warmup: int
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """One graph that reads ``static``."""
    _warm(lambda: call(*static), static[0].device, warmup)
    graph, result = _captured(lambda: call(*static))

    def run(*inputs: Tensor) -> Any:
        with torch.no_grad():
            for own, given in zip(static, inputs, strict=True):
                if own.data_ptr() != given.data_ptr():
                    own.copy_(given, non_blocking=True)
        graph.replay()
        return result

    return run, (graph, static, result)


def _captured(call: Callable[[], Any]) -> tuple[Any, Any]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, pytree.tree_map_only(Tensor, torch.detach, result)


def _warm(call: Callable[[], Any], device: torch.device, times: int) -> None:
    """Call it on another stream, as captures ask for; the last time so that waiting for the GPU raises, which names
    the line that waits and leaves no broken capture behind."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(times):
            call()
        with _without_waiting():
            call()
    torch.cuda.current_stream(device).wait_stream(side)


@contextlib.contextmanager
def _without_waiting() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _without_cache() -> contextlib.AbstractContextManager[Any]:
    """The autocast around, without its cache: a weight that was cast before the capture would stay what it was."""
    return torch.autocast(
        "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
    )


def _explained(error: RuntimeError) -> str:
    text = str(error).partition("\n")[0].rstrip(".")
    if "synchronizing CUDA operation" in text:
        return (
            f"{text}. Something in it makes the host wait for the GPU (.item(), an `if` on a tensor, a copy to the "
            "CPU); the traceback shows the line. Take it out, or capture the parts around it"
        )
    if "captur" in text:
        return (
            f"{text}. Something in it is not allowed while a stream captures (waiting for the GPU, memory of the CPU "
            "that is not pinned, random numbers of a generator of its own); the traceback shows the line"
        )
    return text


def _kind(t: Tensor) -> tuple[torch.Size, torch.dtype, torch.device, bool]:
    return t.shape, t.dtype, t.device, t.requires_grad


def _in_words(kind: tuple[torch.Size, torch.dtype, torch.device, bool]) -> str:
    shape, dtype, device, grad = kind
    return f"{list(shape)} {dtype} on {device}{' with a gradient' if grad else ''}"


def _named(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of " + (", ".join(type(v).__name__ for v in value) or "nothing")
    return type(value).__name__
