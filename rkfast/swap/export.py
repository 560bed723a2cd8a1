"""A network as a file that runs without rkfast, and that has been run."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rkfast.extras import require
from rkfast.files import replacing
from rkfast.swap.fold import bare, plain
from rkfast.swap.fuse import check_model

Run = Callable[[Sequence[Tensor]], list[Tensor]]

FORMATS = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2"}


def export(model: nn.Module, path: str | os.PathLike[str], *inputs: Tensor, format: str | None = None) -> float:
    """Write a network, for inference, in operators of PyTorch or ONNX alone; run the file and say how far off it is.

    A copy is what is exported: of stock PyTorch, in evaluation mode, step sizes and each BatchNorm behind a convolution
    in the weights. The first dimension of all inputs, if they agree in it, is free where the network allows it; all
    others are those of ``inputs``.

    - ``onnx``: an ONNX model, which onnxruntime runs. Needs the extra: ``pip install 'rkfast[export]'``.
    - ``pt2``: a program of ``torch.export``, which ``torch.export.load`` reads.
    - ``aoti``: that program compiled by AOTInductor, which needs a C++ compiler; ``torch._inductor.aoti_load_package``
      loads it.

    Args:
        model: a network, fused or folded or not; it stays as it is.
        path: of the file, which is written at the end, whole, or not at all.
        inputs: what the network is called with, Tensors.
        format: "onnx", "pt2" or "aoti"; None takes the one that the suffix of path says.

    Returns:
        The largest error of the file's results on inputs, and on one sample more where the batch is free, relative to
        the largest of the model's. It is printed too.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: no such format, a suffix that is not its own, or no inputs.
        MissingExtra: a package is not installed.
        RuntimeError: there is no C++ compiler, the network cannot be traced, or it calls operators of rkfast itself.
    """
    check_model(model)
    path, format = _target(path, format)
    if not inputs:
        raise ValueError("inputs: expected what the network is called with; a tensor of zeros of its shape will do")
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor):
            raise TypeError(f"inputs[{i}]: expected a Tensor, got {type(x).__name__}")
    _check_tools(format)
    with torch.inference_mode(False), torch.no_grad():
        program, free = _program(plain(model), inputs)
        _check_operators(program)
        with replacing(path) as file:
            run = _WRITERS[format](program, file)
            stock = copy.deepcopy(bare(model)).eval()
            trials = [inputs, tuple(torch.cat([x, x[:1]]) for x in inputs)] if free else [inputs]
            error = max(_error(run(trial), _tensors(stock(*trial))) for trial in trials)
            if not error < LARGEST:
                raise RuntimeError(f"{format}: the file's results are off by {error:.1e}, relative to the largest one")
    batch = "any batch" if free else "this batch alone"
    print(f"{path}: {format}, {batch}, largest error {error:.1e} of the largest result")
    return error


LARGEST = 0.1  # beyond what half precision can explain: not the same network


def _target(path: str | os.PathLike[str], format: str | None) -> tuple[Path, str]:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a path, got {type(path).__name__}")
    path = Path(path)
    if format is None:
        known = [name for name, suffix in FORMATS.items() if suffix == path.suffix]
        if not known:
            raise ValueError(f"path: {path.name!r} ends in no format; expected .onnx or .pt2, or give format")
        format = known[0]
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if path.suffix != FORMATS[format]:
        raise ValueError(f"path: expected {FORMATS[format]} at its end for {format}, got {path.name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"path: there is no folder {str(path.parent)!r}; make it first")
    return path, format


def _check_tools(format: str) -> None:
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require(package, "export")
    elif format == "aoti":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except (exc.InvalidCxxCompiler, RuntimeError) as error:
            raise RuntimeError(
                "format: aoti needs a C++ compiler, and none was found; install g++ or clang++, or name one in CXX"
            ) from error


def _program(net: nn.Module, inputs: Sequence[Tensor]) -> tuple[torch.export.ExportedProgram, bool]:
    """The traced network, and whether the batch is free."""
    if all(x.dim() for x in inputs) and len({len(x) for x in inputs}) == 1 and len(inputs[0]):
        # Of a batch of one the tracer would make a constant.
        examples = tuple(x if len(x) > 1 else torch.cat([x, x]) for x in inputs)
        batch = torch.export.Dim("batch")
        try:
            return torch.export.export(net, examples, dynamic_shapes=_shapes(net, [{0: batch}] * len(inputs))), True
        except Exception:  # whatever it is, it may be the batch
            pass
    return torch.export.export(net, tuple(inputs)), False


def _shapes(net: nn.Module, each: list[Any]) -> Any:
    """Of arguments that forward takes as ``*args`` they are one argument."""
    kinds = [p.kind for p in inspect.signature(net.forward).parameters.values()]
    return (tuple(each),) if inspect.Parameter.VAR_POSITIONAL in kinds[:1] else tuple(each)


def _check_operators(program: torch.export.ExportedProgram) -> None:
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    ours = sorted(target for target in targets if target.startswith("rkfast"))
    if ours:
        raise RuntimeError(
            f"model: it calls {', '.join(ours)} itself, which no file can hold; write these in PyTorch for the export"
        )


def _onnx(program: torch.export.ExportedProgram, file: Path) -> Run:
    onnxruntime = require("onnxruntime", "export")
    made = torch.onnx.export(program, dynamo=True, verbose=False)
    assert made is not None
    made.save(file, external_data=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: x.detach().cpu().numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, feed)]

    return run


def _pt2(program: torch.export.ExportedProgram, file: Path) -> Run:
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()
    return lambda inputs: _tensors(loaded(*inputs))


def _aoti(program: torch.export.ExportedProgram, file: Path) -> Run:
    from torch import _inductor

    _inductor.aoti_compile_and_package(program, package_path=str(file))
    loaded = _inductor.aoti_load_package(str(file))
    return lambda inputs: _tensors(loaded(*inputs))


_WRITERS: dict[str, Callable[[torch.export.ExportedProgram, Path], Run]] = {"onnx": _onnx, "pt2": _pt2, "aoti": _aoti}


def _tensors(found: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    worst = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if theirs.numel():
            wide = theirs.detach().double().cpu()
            gap = (ours.detach().double().cpu() - wide).abs().max() / wide.abs().max().clamp_min(
                torch.finfo(theirs.dtype).tiny
            )
            worst = max(worst, gap.item()) if gap == gap else float("nan")
    return worst
