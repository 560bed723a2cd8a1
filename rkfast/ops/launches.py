"""How the fused products are cut into tiles: a pure function of kernel, GPU and sizes. Nothing is tried at run time."""

from __future__ import annotations

from typing import NamedTuple


class Cut(NamedTuple):
    """Sides of the tiles of a product, and how many warps and loads in flight work on one."""

    rows: int
    width: int  # channels that are made
    read: int  # channels that are read
    warps: int
    stages: int


SMALLEST = 16  # side that the tensor cores take
NARROW = 8  # bytes; what loads fewer at once keeps an address for each
UNTUNED = {
    ("product", 2): Cut(128, 128, 64, 8, 2),
    ("product", 4): Cut(64, 128, 32, 8, 2),
    # Its loop over the width reads a few vectors besides; to have them and the next tiles in flight takes too many
    # registers.
    ("data_gradient", 2): Cut(128, 64, 64, 8, 1),
    ("data_gradient", 4): Cut(128, 64, 32, 8, 1),
    ("weight_gradient", 2): Cut(64, 128, 64, 8, 2),
    ("weight_gradient", 4): Cut(32, 128, 64, 8, 2),
}
"""By kernel and bytes of an element, what compiles without spills everywhere."""
GPUS = ("A100", "H100", "H200")
TUNED: dict[tuple[str, str, int], Cut] = {}
"""By GPU, kernel and bytes of an element, what was measured to be fastest there; nothing has been measured yet."""


def gpu(name: str) -> str:
    """Of those in TUNED, the one that a device's name ("NVIDIA H200", "NVIDIA A100-SXM4-80GB") tells of, else ""."""
    return next((known for known in GPUS if known in name), "")


def cut(kernel: str, device: str, itemsize: int, unit: int, rows: int, width: int, read: int) -> Cut:
    """For a product of these sizes on the device of this name: no side is longer than its size.

    unit: elements that a thread may load at once; what loads half of NARROW keeps twice the addresses, and has
    registers for tiles of half the rows and half of what is read.
    """
    most = TUNED.get((gpu(device), kernel, itemsize), UNTUNED[kernel, itemsize])
    shrink = max(1, NARROW // (unit * itemsize))
    most = most._replace(rows=most.rows // shrink, read=most.read // shrink)
    sides = (_side(limit, size) for limit, size in zip(most, (rows, width, read), strict=False))
    found = most._replace(**dict(zip(("rows", "width", "read"), sides, strict=True)))
    # A small tile is the work of few warps.
    return found._replace(warps=min(most.warps, 8 if found.rows * found.width >= 8192 else 4))


def _side(limit: int, size: int) -> int:
    return max(SMALLEST, min(limit, 1 << (size - 1).bit_length()))
