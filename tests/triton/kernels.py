"""What steps of the networks of the benchmarks launch, and what each kernel takes of a multiprocessor:

    python -m tests.triton.kernels > KERNELS.md    # minutes
    python -m tests.triton.kernels KERNELS.md      # says what is not so any more

Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
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
where that is widest. None spills, products use tensor cores, and activations are loaded and stored 16 bytes at once
where the channels of all slots divide into them: at 36 channels it is 8, and at 150 it is 4.

| kernel | sm | specialisations | warps | registers | shared | occupancy | loads | stores |
|---|--:|--:|--:|--:|--:|--:|--:|--:|
"""
TARGETS = (80, 90, 100)
STREAMS = {"forward", "backward", "moments"}  # they read whole tensors
PRODUCTS = {"product", "data_gradient", "weight_gradient"}
QUICK = ("irknet-5x1_5x1_5x1-ab, growth_rate 150",)


class Specialisation(NamedTuple):
    op: str
    name: str
    unit: int  # elements that a thread may load at once, where that is told
    multiplies: bool
    kernel: compiler.Kernel


def specialisation(compiled: Any, cc: int) -> Specialisation:
    constants = {compiled.src.fn.arg_names[path[0]]: value for path, value in compiled.src.constants.items()}
    kernel = compiler.inspect(compiled, cc)
    name = kernel.name.strip("_").removesuffix("_kernel")
    op = compiled.src.fn.fn.__module__.split(".")[2]
    # Without a bottleneck, data_gradient is given what it would multiply.
    return Specialisation(op, name, constants.get("UNIT", 1), name in PRODUCTS and "conv" not in constants, kernel)


def compiled(targets: Sequence[int], networks: Iterable[steps.Network]) -> dict[tuple[str, int], list[Specialisation]]:
    """By kernel and target, every specialisation that steps of the networks launch."""
    found: dict[tuple[str, int], list[Specialisation]] = defaultdict(list)
    calls = [(n, steps.step(n, steps.made(n, training))) for n in networks for training in (True, False)]
    for cc in targets:
        with compiler.compiling_for(cc) as kernels:
            for network, call in calls:
                with steps.running(steps.Counted(network.batch)):
                    call()
        for each in kernels:
            one = specialisation(each, cc)
            found[f"{one.op}: {one.name}", cc].append(one)
    return found


def wrong(one: Specialisation) -> list[str]:
    """What this specialisation should not do."""
    _, name, unit, multiplies, kernel = one
    faults = []
    if kernel.local:
        faults.append(f"spills {kernel.local} bytes")
    if kernel.shared > compiler.SHARED[kernel.cc] // 2:
        faults.append(f"takes {kernel.shared} bytes of shared memory, more than half of what there is")
    if multiplies and not kernel.tensor_cores:
        faults.append("multiplies without tensor cores")
    least = unit * torch.bfloat16.itemsize
    loads, stores = kernel.accesses("ld"), kernel.accesses("st")
    if name in STREAMS | PRODUCTS and (max(loads) < least or 2 in (loads | stores) - {least}):
        faults.append(f"loads {sorted(loads)} and stores {sorted(stores)} bytes at once, where {least} are possible")
    return [f"{one.op}: {name} on sm_{kernel.cc}: {fault}" for fault in faults]


def between(values: Iterable[int]) -> str:
    least, most = min(found := list(values)), max(found)
    return str(least) if least == most else f"{least}-{most}"


def row(name: str, cc: int, specialisations: Sequence[Specialisation]) -> str:
    kernels = [each.kernel for each in specialisations]
    cells = [
        name, cc, len(kernels), between(k.warps for k in kernels), between(k.registers for k in kernels),
        between(k.shared for k in kernels), between(round(100 * k.occupancy) for k in kernels) + " %",
        *(between(max(k.accesses(kind), default=0) for k in kernels) for kind in ("ld", "st")),
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |\n"


def launched(networks: Sequence[steps.Network] = steps.NETWORKS) -> str:
    """The first table."""
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
    return "".join(lines)


def checked(targets: Sequence[int], networks: Sequence[steps.Network]) -> dict[tuple[str, int], list[Specialisation]]:
    kernels = compiled(targets, networks)
    faults = [fault for group in kernels.values() for each in group for fault in wrong(each)]
    if faults:
        raise AssertionError("; ".join(dict.fromkeys(faults)))
    return kernels


def page() -> str:
    first = launched()
    kernels = checked(TARGETS, steps.NETWORKS)
    return first + MIDDLE + "".join(row(name, cc, kernels[name, cc]) for name, cc in sorted(kernels))


def stale(committed: str, targets: Sequence[int] = (90,), networks: Sequence[str] = QUICK) -> list[str]:
    """What a page says that is not so: of the first table all, of the second one the kernels of some networks."""
    first, _, second = committed.partition(MIDDLE)
    found = [] if first == launched() else ["what a step launches"]
    rows = {tuple(cells[:2]): cells for line in second.splitlines() if (cells := line.strip("| ").split(" | "))}
    chosen = [network for network in steps.NETWORKS if network.label.startswith(tuple(networks))]
    for (name, cc), group in checked(targets, chosen).items():
        cells = rows.get((name, str(cc)))
        for title, at, values in (
            ("registers", 4, [each.kernel.registers for each in group]),
            ("shared memory", 5, [each.kernel.shared for each in group]),
        ):
            if cells is None or not set(values) <= set(_range(cells[at])):
                found.append(f"{name} on sm_{cc}: {title} {between(values)}, {cells and cells[at]} on the page")
    return found


def _range(text: str) -> range:
    least, _, most = text.partition("-")
    return range(int(least), int(most or least) + 1)


if __name__ == "__main__":
    if sys.argv[1:]:
        raise SystemExit("\n".join(stale(Path(sys.argv[1]).read_text())) or None)
    print(page(), end="")
