from __future__ import annotations

import pytest

from rkfast.ops import launches
from rkfast.ops.launches import Cut


@pytest.mark.parametrize(
    ("itemsize", "sizes", "sides", "warps"),
    (
        (2, (802816, 128, 992), (128, 128, 64), 8),
        (2, (802816, 100, 40), (128, 128, 64), 8),
        (2, (65536, 64, 33), (128, 64, 64), 8),
        (2, (49, 128, 16), (64, 128, 16), 8),
        (2, (9, 3, 3), (16, 16, 16), 4),
        (4, (802816, 128, 992), (64, 128, 32), 8),
        (4, (802816, 64, 992), (64, 64, 32), 4),
    ),
)
def test_no_side_is_longer_than_its_size(
    itemsize: int, sizes: tuple[int, int, int], sides: tuple[int, int, int], warps: int
) -> None:
    found = launches.cut("product", "", itemsize, 8, *sizes)
    assert found == Cut(*sides, warps, 2)


@pytest.mark.parametrize(
    ("name", "gpu"),
    (
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", ""),
        ("", ""),
    ),
)
def test_devices(name: str, gpu: str) -> None:
    assert launches.gpu(name) == gpu


def test_what_was_tuned_is_taken_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = Cut(256, 64, 32, 4, 3)
    monkeypatch.setitem(launches.TUNED, ("H200", "product", 2), tuned)
    sizes = (802816, 128, 992)
    assert launches.cut("product", "NVIDIA H200", 2, 8, *sizes) == tuned
    for kernel, device, itemsize in (
        ("data_gradient", "NVIDIA H200", 2),
        ("product", "NVIDIA H100", 2),
        ("product", "NVIDIA H200", 4),
    ):
        assert launches.cut(kernel, device, itemsize, 8, *sizes) == launches.UNTUNED[kernel, itemsize]


def test_names_are_those_of_kernels() -> None:
    kernels = {"product", "data_gradient", "weight_gradient"}
    assert all(gpu in launches.GPUS and kernel in kernels for gpu, kernel, _ in launches.TUNED)


@pytest.mark.parametrize(
    ("itemsize", "unit", "rows", "read"),
    ((2, 8, 128, 64), (2, 4, 128, 64), (2, 2, 64, 32), (2, 1, 32, 16), (4, 2, 64, 32), (4, 1, 32, 16)),
)
def test_narrow_loads_take_smaller_tiles(itemsize: int, unit: int, rows: int, read: int) -> None:
    found = launches.cut("product", "", itemsize, unit, 65536, 150, 600)
    assert (found.rows, found.read) == (rows, read)
