"""The papers' images: read from files in their formats by torchvision's classes, and augmented, or refused."""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rkfast.train import data
from rkfast.train.data import DATA, Data, load
from tests.libraries import library
from tests.package.process import python
from tests.train.files import CLASSES, EACH, cifar, imagenet, pixels, write

FILES = [name for name in DATA if name != "digits"]
AUGMENTED = [(name, augment) for name in FILES for augment in DATA[name].augmentations]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    library("torchvision.datasets")
    with pytest.MonkeyPatch.context() as patch:
        yield {name: write(name, tmp_path_factory.mktemp(name), patch) for name in FILES}


def images(split: Any) -> Tensor:
    return torch.stack([split[n][0] for n in range(len(split))])


def labels(split: Any) -> list[int]:
    return [split[n][1] for n in range(min(len(split), 20))]


def normalised(name: str, values: np.ndarray[Any, Any]) -> Tensor:
    """Of uint8 [N, C, H, W]."""
    kind, x = DATA[name], torch.from_numpy(values).float() / 255
    if kind.mean is None or kind.std is None:
        return x
    return (x - torch.tensor(kind.mean)[:, None, None]) / torch.tensor(kind.std)[:, None, None]


def check_data(name: str, found: Data) -> None:
    kind = DATA[name]
    assert (found.classes, found.channels, found.size) == (kind.classes, kind.channels, kind.size)
    assert len(found.names) == kind.classes and all(isinstance(word, str) for word in found.names)
    for split in (found.train, found.test):
        image, label = split[0]
        assert image.shape == (kind.channels, kind.size, kind.size) and image.dtype == torch.float32
        assert type(label) is int
        batch, classes = next(iter(DataLoader(split, batch_size=4)))
        assert batch.shape[0] == len(classes) == 4 and classes.dtype == torch.int64


def test_digits() -> None:
    pytest.importorskip("sklearn")
    found = load("digits")
    check_data("digits", found)
    assert (len(found.train), len(found.test)) == (1437, 360)  # type: ignore[arg-type]
    assert set(labels(found.train)) == set(range(10))
    x = images(found.train)
    assert x.mean().item() == pytest.approx(0, abs=1e-3) and x.std().item() == pytest.approx(1, abs=1e-3)
    assert load("digits", size=32).train[0][0].shape == (1, 32, 32)


def test_cifar(roots: dict[str, Path]) -> None:
    for name, files in (("cifar10", 5), ("cifar100", 1)):
        found = load(name, roots[name])
        check_data(name, found)
        expected = np.concatenate([pixels((EACH, 3, 32, 32), seed) for seed in range(files)])
        torch.testing.assert_close(images(found.train), normalised(name, expected))
        torch.testing.assert_close(images(found.test), normalised(name, pixels((EACH, 3, 32, 32), 99)))
        assert labels(found.test) == list(range(EACH)) if name == "cifar100" else labels(found.test)[:3] == [0, 1, 2]
        assert found.names[:2] == ("class 0", "class 1")


def test_svhn_has_the_extra_images_and_is_divided_by_255(roots: dict[str, Path]) -> None:
    found = load("svhn", roots["svhn"])
    check_data("svhn", found)
    train, test, extra = (pixels((32, 32, 3, EACH), seed).transpose(3, 2, 0, 1) for seed in range(3))
    torch.testing.assert_close(images(found.train), torch.from_numpy(np.concatenate([train, extra])) / 255)
    torch.testing.assert_close(images(found.test), torch.from_numpy(np.ascontiguousarray(test)) / 255)
    assert labels(found.test) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]


def test_imagenet(roots: dict[str, Path]) -> None:
    found = load("imagenet", roots["imagenet"])
    check_data("imagenet", found)
    assert labels(found.train) == list(range(20))
    assert found.names[-1] == f"n{CLASSES - 1:08}"
    small = load("imagenet", roots["imagenet"], augment="inception", size=48)
    assert small.size == 48 and small.train[3][0].shape == small.test[3][0].shape == (3, 48, 48)


def test_the_middle_of_an_image_is_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame of a seventh of the image is cut off: 256 - 224 pixels of 256."""
    imagenet("imagenet", tmp_path, monkeypatch)
    image = library("PIL.Image")
    picture = np.zeros((256, 512, 3), np.uint8)
    picture[16:240, 144:368] = 255
    image.fromarray(picture).save(tmp_path / "val" / "n00000000" / "val_0.JPEG", quality=100)
    white = normalised("imagenet", np.full((1, 3, 224, 224), 255, np.uint8))[0]
    assert (load("imagenet", tmp_path).test[0][0] - white).abs().mean() < 0.01


@pytest.mark.parametrize(("name", "augment"), AUGMENTED)
def test_augmentation(name: str, augment: str, roots: dict[str, Path]) -> None:
    """Of the training images alone, and a function of torch's generator alone."""
    plain, found = load(name, roots[name]), load(name, roots[name], augment=augment)
    drawn = []
    for seed, other in ((0, 0), (0, 1), (1, 1)):
        torch.manual_seed(seed)
        random.seed(other)
        np.random.seed(other)
        drawn.append(torch.stack([found.train[n][0] for n in range(8)]))
    assert drawn[0].shape == (8, 3, DATA[name].size, DATA[name].size)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    assert all(found.train[n][1] == plain.train[n][1] for n in range(8))
    state = torch.get_rng_state()
    assert torch.equal(found.test[1][0], plain.test[1][0])
    assert torch.equal(torch.get_rng_state(), state)


def test_crop_is_a_window_of_the_padded_image_or_its_mirror(roots: dict[str, Path]) -> None:
    found = load("svhn", roots["svhn"], augment="crop")
    image = torch.from_numpy(pixels((32, 32, 3, EACH), 0).transpose(3, 2, 0, 1)[0] / np.float32(255))
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    seen = set()
    torch.manual_seed(0)
    for _ in range(60):
        crop = found.train[0][0]
        at = [
            (y, x, flip)
            for y, x, flip in itertools.product(range(9), range(9), (False, True))
            if torch.allclose(crop.flip(2) if flip else crop, padded[:, y : y + 32, x : x + 32])
        ]
        assert len(at) == 1
        seen.add(at[0])
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(9))
    assert {flip for _, _, flip in seen} == {False, True}


def test_scale_keeps_the_shape_of_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short side becomes 256 to 480 pixels: a step of brightness along the long one keeps its slope."""
    library("torchvision")
    resize = data.RandomShortSide(256, 480)
    image = library("PIL.Image").new("RGB", (60, 40))
    torch.manual_seed(0)
    sides = [resize(image).size for _ in range(400)]
    assert {min(side) for side in sides} <= set(range(256, 481))
    assert min(min(side) for side in sides) < 262 and max(min(side) for side in sides) > 474
    assert all(abs(w / h - 1.5) < 0.01 for w, h in sides)


def test_light_moves_along_principal_axes() -> None:
    vectors, values = torch.tensor(data.RandomLight.VECTORS), torch.tensor(data.RandomLight.VALUES)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3), atol=1e-3, rtol=0)
    torch.manual_seed(0)
    image = torch.rand(3, 2, 2)
    moved = torch.stack([data.RandomLight()(image) - image for _ in range(4000)])
    assert torch.allclose(moved, moved[:, :, :1, :1].expand_as(moved), atol=1e-6)
    along = moved[:, :, 0, 0] @ vectors
    torch.testing.assert_close(along.std(0), 0.1 * values, rtol=0.1, atol=1e-4)


def test_colours_of_an_even_grey(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Howard's distortions leave a grey grey, and 40 % brighter or darker at most; light gives it a tint."""
    imagenet("imagenet", tmp_path, monkeypatch)
    library("PIL.Image").new("RGB", (64, 64), (128, 128, 128)).save(tmp_path / "train" / "n00000000" / "train_0.JPEG")
    found = load("imagenet", tmp_path, augment="inception", size=32)
    kind = DATA["imagenet"]
    assert kind.mean and kind.std
    torch.manual_seed(0)
    drawn = torch.stack([found.train[0][0] for _ in range(40)])
    drawn = drawn * torch.tensor(kind.std)[:, None, None] + torch.tensor(kind.mean)[:, None, None]
    colours = drawn[:, :, 0, 0]
    assert torch.allclose(drawn, colours[:, :, None, None].expand_as(drawn), atol=1e-5)
    assert 2e-4 < (colours - colours.mean(1, keepdim=True)).abs().mean() < 0.01
    assert colours.mean(1).min() < 0.8 * 128 / 255 and colours.mean(1).max() > 1.2 * 128 / 255


def test_torchvision_is_not_imported_for_the_digits() -> None:
    pytest.importorskip("sklearn")
    python(
        "-c",
        "import sys, rkfast\nassert 'rkfast.train' not in sys.modules\n"
        "from rkfast.train.data import load\nassert 'sklearn' not in sys.modules\n"
        "load('digits')\nassert 'torchvision' not in sys.modules",
    )


def test_without_torchvision_the_pip_line_is_told() -> None:
    out = python(
        "-c",
        "import sys\nsys.modules['torchvision'] = None\nfrom rkfast.train.data import load\nload('svhn')",
        status=1,
    )
    assert "pip install 'rkfast[train]'" in out


def refused(message: str, name: str, root: Path | None = None, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, root, **options)


def test_arguments(tmp_path: Path) -> None:
    refused(r"data: expected one of digits, .*, got 'cifar11'; cifar10\?", "cifar11")
    refused("augment: of digits expected None, got 'crop'", "digits", augment="crop")
    refused("augment: of cifar10 expected crop, autoaugment or None, got 'flip'", "cifar10", augment="flip")
    refused("size: expected 1 to 4096, got 0", "digits", size=0)
    refused("download: ImageNet is not to be had without asking", "imagenet", tmp_path, download=True)
    with pytest.raises(TypeError, match="data: expected a str, got int"):
        load(10)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="augment: expected a str or None, got bool"):
        load("cifar10", augment=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FILES)
def test_missing_folder(name: str, tmp_path: Path) -> None:
    library("torchvision.datasets")
    first = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python", "svhn": "train_32x32.mat"}
    refused(f"root: {tmp_path / 'no'} has no {first.get(name, 'folder train')} of", name, tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("name", "file"),
    (
        ("cifar10", "cifar-10-batches-py/data_batch_3"),
        ("cifar10", "cifar-10-batches-py/batches.meta"),
        ("cifar100", "cifar-100-python/test"),
        ("svhn", "extra_32x32.mat"),
    ),
)
def test_truncated_and_missing_files(name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(name, tmp_path, monkeypatch)
    os.truncate(tmp_path / file, (tmp_path / file).stat().st_size - 1)
    refused(f"{name}: {tmp_path / file} is damaged, or only part of the original", name, tmp_path)
    (tmp_path / file).unlink()
    refused(f"{name}: {tmp_path / file} is missing", name, tmp_path)


def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = library("torchvision.datasets").CIFAR10
    monkeypatch.setattr(made, "url", (tmp_path / "nothing.tar.gz").as_uri())
    with pytest.raises(RuntimeError, match="cifar10"):
        load("cifar10", tmp_path / "new", download=True)


def test_truncated_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imagenet("imagenet", tmp_path, monkeypatch, side=64)
    for n in (5, 0):
        file = tmp_path / "train" / f"n{n:08}" / f"train_{n}.JPEG"
        os.truncate(file, file.stat().st_size // 2)
        message = f"imagenet: {file} is damaged or no image"
        if n:
            with pytest.raises(ValueError, match=message):
                load("imagenet", tmp_path).train[n]
        else:
            refused(message, "imagenet", tmp_path)


def test_wrong_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        cifar("cifar10", tmp_path / "names", patch, names=9)
        refused("cifar10: .*names has 9 classes, expected 10", "cifar10", tmp_path / "names")
    with monkeypatch.context() as patch:
        cifar("cifar100", tmp_path / "label", patch, label=100)
        refused("cifar100: .*label has labels 0 to 100, expected 0 to 99", "cifar100", tmp_path / "label")
    with monkeypatch.context() as patch:
        write("svhn", tmp_path / "svhn", patch, label=11)
        refused("svhn: .*svhn has labels 1 to 11, expected 0 to 9", "svhn", tmp_path / "svhn")
    imagenet("imagenet", tmp_path / "few", monkeypatch, classes=3)
    refused("imagenet: .*train has 3 classes, expected 1000", "imagenet", tmp_path / "few")
    imagenet("imagenet", tmp_path / "other", monkeypatch)
    (tmp_path / "other" / "val" / "n00000007").rename(tmp_path / "other" / "val" / "n1")
    refused("only one of them has n00000007", "imagenet", tmp_path / "other")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    refused("imagenet: Couldn't find any class folder", "imagenet", tmp_path / "flat")


@pytest.mark.skipif(sys.platform == "win32", reason="workers of another kind")
def test_workers_draw_like_the_process_itself(roots: dict[str, Path]) -> None:
    """Given torch's seed, which DataLoader gives its workers, an image is augmented alike wherever it is read."""
    found = load("cifar10", roots["cifar10"], augment="autoaugment").train

    class Seeded(torch.utils.data.Dataset[Tensor]):
        def __getitem__(self, index: int) -> Tensor:
            torch.manual_seed(index)
            return found[index][0]

        def __len__(self) -> int:
            return EACH

    alone, beside = (list(DataLoader(Seeded(), num_workers=workers)) for workers in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
