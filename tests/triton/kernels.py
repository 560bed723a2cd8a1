"""What steps of the networks of the benchmarks launch, and what each kernel takes of a multiprocessor:

    python -m tests.triton.kernels > KERNELS.md

Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import triton

from tests.triton import compiler, steps

HEAD = f"""\
# Kernels

Written by `python -m tests.triton.kernels` with Triton {triton.__version__}, without a GPU, and checked by
`tests/triton/test_kernels.py`. Nothing here is a measurement of time.

## What a step launches

Fused networks in bfloat16, channels_last, counted on meta tensors (`tests/triton/steps.py`): Triton's launches are
those of the real launchers, PyTorch's operators count as the kernels that they are on CUDA. "Inference" is that of
`rkfast.fold`. Launches are on activations; the small ones are on vectors and weights alone, as second stages of sums
are. The design is that of fused 1x1 products, which counts no small ones. Bytes are what a kernel must read and write.
Not counted are the optimizer, and the casts of autocast: two small launches for each weight, or for all of a block.

| network | step | launches | design | small | GB | design |
|---|---|--:|--:|--:|--:|--:|
"""
MIDDLE = """
## What a kernel takes

Of all specialisations that these steps ask for, compiled ahead of time: least and most registers of a thread, bytes
of shared memory, share of a multiprocessor's warps that run at once, and bytes that a thread loads and stores at once
where that is widest. None spills, products use tensor cores, and those that stream move 16 bytes at once.

| kernel | sm | specialisations | warps | registers | shared | occupancy | loads | stores |
|---|--:|--:|--:|--:|--:|--:|--:|--:|
"""
TARGETS = (80, 90, 100)
STREAMS = {"forward", "backward", "moments"}  # they read whole tensors
PRODUCTS = {"bottleneck", "read_backward", "weight_gradient"}


def short(name: str) -> str:
    return name.strip("_").removesuffix("_kernel")


def compiled(targets: Sequence[int], networks: Iterable[steps.Network]) -> dict[tuple[str, int], list[compiler.Kernel]]:
    """By kernel and target, every specialisation that steps of the networks launch."""
    found: dict[tuple[str, int], list[compiler.Kernel]] = defaultdict(list)
    calls = [(n, steps.step(n, steps.made(n, training))) for n in networks for training in (True, False)]
    for cc in targets:
        with compiler.compiling_for(cc) as kernels:
            for network, call in calls:
                with steps.running(steps.Counted(network.batch)):
                    call()
        for each in kernels:
            kernel = compiler.inspect(each, cc)
            found[short(kernel.name), cc].append(kernel)
    return found


def wrong(name: str, kernels: Sequence[compiler.Kernel]) -> list[str]:
    """What these specialisations should not do."""
    faults = []
    for kernel in kernels:
        if kernel.local:
            faults.append(f"spills {kernel.local} bytes")
        if kernel.shared > compiler.SHARED[kernel.cc] // 2:
            faults.append(f"takes {kernel.shared} bytes of shared memory, more than half of what there is")
        if name in PRODUCTS and not kernel.tensor_cores:
            faults.append("multiplies without tensor cores")
    if name in STREAMS and not all(16 in kernel.accesses("ld") for kernel in kernels):
        faults.append("loads less than 16 bytes at once")
    return [f"{name} on sm_{kernels[0].cc}: {fault}" for fault in faults]


def between(values: Iterable[int]) -> str:
    least, most = min(found := list(values)), max(found)
    return str(least) if least == most else f"{least}-{most}"


def row(name: str, cc: int, kernels: Sequence[compiler.Kernel]) -> str:
    cells = [
        name, cc, len(kernels), between(k.warps for k in kernels), between(k.registers for k in kernels),
        between(k.shared for k in kernels), between(round(100 * k.occupancy) for k in kernels) + " %",
        *(between(max(k.accesses(kind), default=0) for k in kernels) for kind in ("ld", "st")),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |\n"


def page(targets: Sequence[int] = TARGETS, networks: Sequence[steps.Network] = steps.NETWORKS) -> str:
    lines = [HEAD]
    for network in networks:
        for training in (True, False):
            found = steps.total(steps.count(network, training))
            plan = network.train if training else network.inference
            planned = (plan.launches, plan.gigabytes) if plan else ("", "")
            lines.append(
                f"| {network.label} | {'training' if training else 'inference'} | {found.launches} | {planned[0]} | "
                f"{found.small} | {found.gigabytes:.2f} | {planned[1]} |\n"
            )
    lines.append(MIDDLE)
    kernels = compiled(targets, networks)
    faults = [fault for (name, _), group in kernels.items() for fault in wrong(name, group)]
    if faults:
        raise AssertionError("; ".join(dict.fromkeys(faults)))
    lines += [row(name, cc, kernels[name, cc]) for name, cc in sorted(kernels)]
    return "".join(lines)


if __name__ == "__main__":
    print(page(), end="")
