"""Which backend serves what, found out by calling it: ``python -m tests.ops.served > SUPPORT.md``.

Each op is called once per backend, dtype, layout and direction with the backend forced. Triton's kernels are called
in its interpreter, CUDA's in the emulation of tests/cuda, so that no GPU is needed to write the table.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import torch

from rkfast import dispatch, native, ops
from tests.ops.tester import DTYPES, LAYOUTS, lay

HEAD = """\
# What is served

Written by `python -m tests.ops.served` and checked by `tests/ops/test_served.py`: every cell is a call that was made,
with the backend forced and its served calls counted. {} dtypes ({}) times {} layouts
({}); a dtype alone stands for all of its layouts.
Convolutions in bfloat16 on a CPU need one with AVX512-BF16, as the one that wrote this has.

"""
HOW = {
    "cpu": "run",
    "reference": "run",
    "triton": "run in Triton's interpreter",
    "cuda": "run in an emulation on the CPU",
}


def calls(backend: str) -> dict[str, list[str]]:
    """op -> the "dtype layout" pairs that ``backend`` served."""
    found: dict[str, list[str]] = {}
    for dtype in DTYPES:
        for how in LAYOUTS:
            before = dispatch.served()
            x, t = (lay(torch.randn(2, 6, 4, 5).to(dtype), how, i, "cpu").requires_grad_() for i in range(2))
            v = torch.rand(6, requires_grad=True)
            with dispatch.use(backend):
                total, moments = ops.rk_sum([x, t], [1.0, 0.5], steps=[v, None], relu=True, return_moments=True)
                joined = ops.bn_rk_sum(
                    total, v, v, v.detach().clone(), v.detach().clone(), terms=[t], coeffs=[1.0], step=v, relu=True,
                    training=True, momentum=0.1, eps=1e-5, moments=moments,
                )  # fmt: skip
                ops.channel_moments(x)
                joined.sum().backward()
                weight = torch.rand(2, 6, 1, 1, dtype=dtype, requires_grad=True)
                with contextlib.suppress(RuntimeError):  # this backend has no kernel for it
                    ops.bn_relu_conv(x, weight, ops.Norm(v, v, None, None)).sum().backward()
                with contextlib.suppress(RuntimeError):
                    ops.bn_relu_pool(x, ops.Norm(v, v, None, None)).sum().backward()
                with contextlib.suppress(RuntimeError):
                    ops.conv(x, weight).sum().backward()
                with contextlib.suppress(RuntimeError):
                    square = torch.rand(6, 6, 1, 1, dtype=dtype, requires_grad=True)
                    ops.residual_block(x, [square], [ops.Norm(v, v, None, None)]).sum().backward()
                with contextlib.suppress(RuntimeError):
                    ops.dense_block(x, [weight], [ops.Norm(v, v, None, None)]).sum().backward()
            for op, by in dispatch.served() - before:
                assert by == backend, (op, by)
                found.setdefault(op, []).append(f"{str(dtype).removeprefix('torch.')} {how}")
    return found


def emulate_cuda() -> None:
    """Let the backend "cuda" serve CPU tensors, by its own sources compiled for the host."""
    from tests.cuda.emulation import build

    module = build.load(build.build())
    native.cuda, reason = lambda: module, dispatch.backend_reason
    dispatch.backend_reason = lambda backend, *rest: None if backend == "cuda" else reason(backend, *rest)


def asked(backend: str) -> dict[str, list[str]]:
    """``calls`` in a process of its own, set up for this backend."""
    environment = dict(os.environ)
    setup = ""
    if backend == "triton":
        environment["TRITON_INTERPRET"] = "1"
        setup = "from tests.triton import interpreter; "
    elif backend == "cuda":
        setup = "from tests.ops import served; served.emulate_cuda(); "
    code = f"{setup}import json; from tests.ops import served; print(json.dumps(served.calls({backend!r})))"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def table(backends: tuple[str, ...] = dispatch.BACKENDS) -> str:
    every = len(DTYPES) * len(LAYOUTS)
    served = {backend: asked(backend) for backend in backends}
    lines = [
        HEAD.format(
            len(DTYPES), ", ".join(str(d).removeprefix("torch.") for d in DTYPES), len(LAYOUTS), ", ".join(LAYOUTS)
        ),
        "| op | " + " | ".join(f"{backend} ({HOW[backend]})" for backend in backends) + " |\n",
        "|---" * (1 + len(backends)) + "|\n",
    ]
    for op in dispatch.OPS:
        cells = []
        for backend in backends:
            pairs = served[backend].get(op, [])
            names = [str(d).removeprefix("torch.") for d in DTYPES]
            whole = [name for name in names if all(f"{name} {how}" in pairs for how in LAYOUTS)]
            rest = [pair for pair in pairs if pair.split()[0] not in whole]
            cells.append("all" if len(pairs) == every else ", ".join([*whole, *rest]) or "none")
        lines.append(f"| {op} | " + " | ".join(cells) + " |\n")
    return "".join(lines)


if __name__ == "__main__":
    print(table(), end="")
