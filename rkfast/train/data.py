"""The images that the papers train on, and scikit-learn's handwritten digits.

Files are read by torchvision's dataset classes, and lie under ``root`` as these want them:

    cifar10    cifar-10-batches-py/
    cifar100   cifar-100-python/
    svhn       train_32x32.mat, extra_32x32.mat, test_32x32.mat
    imagenet   train/<class>/ and val/<class>/, a folder of images for each of the 1000 classes
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from rkfast.extras import require
from rkfast.models.base import whole

AUGMENTATIONS = {
    "crop": "a crop of the image with 4 zeros on every side, half of them flipped (He et al. 2016)",
    "autoaugment": "AutoAugment's policy for CIFAR-10 (Cubuk et al. 2018), by itself",
    "scale": "a crop of the image with 256 to 480 pixels on its short side, half of them flipped (He et al. 2016)",
    "inception": (
        "a crop of 8 to 100 % of the image, 3:4 to 4:3, half of them flipped (Szegedy et al. 2015); brightness, "
        "contrast and saturation within 40 % (Howard 2014); light along the colours' principal axes (Krizhevsky et al. "
        "2012)"
    ),
}


class Kind(NamedTuple):
    """What is the same for every image of a data set.

    mean, std: of each channel of the training images, from 0 to 1; None leaves values at that (SVHN, of which the
    papers say that it is divided by 255).
    """

    classes: int
    channels: int
    size: int
    augmentations: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


DATA = {
    "digits": Kind(10, 1, 8),
    "cifar10": Kind(10, 3, 32, ("crop", "autoaugment"), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Kind(100, 3, 32, ("crop", "autoaugment"), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": Kind(10, 3, 32, ("crop", "autoaugment")),
    "imagenet": Kind(1000, 3, 224, ("scale", "inception"), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Data(NamedTuple):
    """Training and test images, each a pair of a float32 Tensor [channels, size, size] and its class, an int; and the
    names of the classes."""

    train: Dataset[tuple[Tensor, int]]
    test: Dataset[tuple[Tensor, int]]
    classes: int
    channels: int
    size: int
    names: tuple[str, ...]


def load(
    name: str,
    root: str | Path | None = None,
    *,
    augment: str | None = None,
    download: bool = False,
    size: int | None = None,
) -> Data:
    """A data set by name, ready to train on.

    Images are normalised by the mean and standard deviation of each channel of the training images, SVHN's divided by
    255 alone; its training images include the extra ones. Of ImageNet's, those to test are the middle of the image
    with 256 pixels on its short side. All that augmentation draws comes from torch's global generator.

    Args:
        name: one of DATA.
        root: folder of the files, as this module has it; None is "data". The digits need none.
        augment: of the training images, one of AUGMENTATIONS that the data set has, or None.
        download: fetch what is not there; not of ImageNet, which is given only to those who ask for it.
        size: height and width; None is that of the papers, and 8 of the digits.

    Raises:
        TypeError, ValueError: what an argument is or holds, and which file is missing or damaged. An image of ImageNet
            is decoded when it is asked for, and a damaged one told of then.
        RuntimeError: a download failed, or torchvision was installed for another torch.
        MissingExtra: torchvision, scikit-learn or scipy is not installed.
    """
    kind = check(name, augment)
    size = kind.size if size is None else whole("size", size, 1, 4096)
    if name == "digits":
        return _digits(size)
    root = Path("data" if root is None else root)
    if name == "imagenet" and download:
        raise ValueError(
            "download: ImageNet is not to be had without asking; get it from image-net.org, then give root"
        )
    train, test = _transforms(kind, augment, size)
    try:
        read = {"svhn": _svhn, "imagenet": _imagenet}.get(name) or functools.partial(_cifar, name)
        splits, names = read(root, train, test, download)
    except OSError as error:
        raise RuntimeError(f"{name}: {error}") from error
    return Data(*splits, kind.classes, kind.channels, size, names)


def check(name: object, augment: object = None) -> Kind:
    """What the data set of that name is, if it can be augmented so.

    Raises:
        TypeError, ValueError: name or augment is none, or they do not go together.
    """
    if not isinstance(name, str):
        raise TypeError(f"data: expected a str, got {type(name).__name__}")
    if name not in DATA:
        near = difflib.get_close_matches(name, DATA, 1)
        raise ValueError(f"data: expected one of {', '.join(DATA)}, got {name!r}" + (f"; {near[0]}?" if near else ""))
    if augment is not None and not isinstance(augment, str):
        raise TypeError(f"augment: expected a str or None, got {type(augment).__name__}")
    known = DATA[name].augmentations
    if augment is not None and augment not in known:
        has = f"{', '.join(known)} or None" if known else "None"
        raise ValueError(f"augment: of {name} expected {has}, got {augment!r}")
    return DATA[name]


class _Pairs(Dataset[tuple[Tensor, int]]):
    """Images [N, C, H, W] and labels [N] in memory."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def _digits(size: int) -> Data:
    from rkfast import demo  # which draws, too

    # One split for all seeds of a training, so that their errors are of the same images.
    train, test = demo.digits(0, torch.device("cpu"), size)
    kind = DATA["digits"]
    return Data(_Pairs(*train), _Pairs(*test), kind.classes, kind.channels, size, _DIGITS)


_DIGITS = tuple("0123456789")
Transform = Callable[[Any], Any]
Read = tuple[tuple[Dataset[tuple[Tensor, int]], Dataset[tuple[Tensor, int]]], tuple[str, ...]]


def _cifar(name: str, root: Path, train: Transform, test: Transform, download: bool) -> Read:
    home = _torchvision("datasets")
    made = home.CIFAR10 if name == "cifar10" else home.CIFAR100
    meta = made.meta["filename"], made.meta["md5"]
    # The files are pickles: torchvision opens them once their checksums are those of the original.
    files = {root / made.base_folder / file: md5 for file, md5 in (*made.train_list, *made.test_list, meta)}
    splits = _opened(name, root, files, download, lambda: (
        made(root, train=True, transform=train, download=download),
        made(root, train=False, transform=test, download=download),
    ))  # fmt: skip
    for split in splits:
        _check_classes(name, root, split.targets, len(split.classes))
    return splits, tuple(splits[0].classes)


def _svhn(root: Path, train: Transform, test: Transform, download: bool) -> Read:
    require("scipy.io", "train")  # which torchvision reads these files with
    made = _torchvision("datasets").SVHN
    files = {root / file: md5 for _, file, md5 in made.split_list.values()}
    splits = _opened("svhn", root, files, download, lambda: [
        made(root, split=split, transform=test if split == "test" else train, download=download)
        for split in ("train", "extra", "test")
    ])  # fmt: skip
    for split in splits:
        _check_classes("svhn", root, split.labels.tolist(), len(_DIGITS))
    return (ConcatDataset(splits[:2]), splits[2]), _DIGITS


def _opened(name: str, root: Path, files: dict[Path, str], download: bool, made: Callable[[], Any]) -> Any:
    """What ``made`` makes; where it fails, which file is missing or damaged, of those with these checksums."""
    if not download and not any(file.exists() for file in files):
        first = next(iter(files)).relative_to(root).parts[0]
        raise ValueError(f"root: {root} has no {first} of {name}; give the folder that has it, or download=True")
    if download:
        root.mkdir(parents=True, exist_ok=True)
    try:
        return made()
    except RuntimeError as error:
        if download:
            raise RuntimeError(f"{name} could not be fetched into {root}: {error}") from error
        intact = _torchvision("datasets.utils").check_integrity
        for file, md5 in files.items():
            if not intact(file, md5):
                what = "is damaged, or only part of the original; remove it" if file.exists() else "is missing; get it"
                raise ValueError(f"{name}: {file} {what}, or let download=True do so") from error
        raise


def _imagenet(root: Path, train: Transform, test: Transform, download: bool) -> Read:
    made = _torchvision("datasets").ImageFolder
    splits = []
    for folder, transform in (("train", train), ("val", test)):
        if not (root / folder).is_dir():
            raise ValueError(f"root: {root} has no folder {folder} of ImageNet; give the folder that has train and val")
        try:
            splits.append(made(root / folder, transform=transform, loader=_decoded))
        except FileNotFoundError as error:  # no class has a folder, or a class no image
            raise ValueError(f"imagenet: {error}") from error
        _check_classes("imagenet", root / folder, splits[-1].targets, len(splits[-1].classes))
        _decoded(splits[-1].samples[0][0])
    if splits[0].classes != splits[1].classes:
        odd = sorted(set(splits[0].classes) ^ set(splits[1].classes))
        raise ValueError(f"imagenet: the classes of train and val in {root} differ: only one of them has {odd[0]}")
    return (splits[0], splits[1]), tuple(splits[0].classes)


def _decoded(path: str) -> Any:
    """An image, whole, with three channels."""
    try:
        return _torchvision("datasets.folder").pil_loader(path)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"imagenet: {path} is damaged or no image: {error}") from error


def _check_classes(name: str, where: Path, labels: Sequence[int], found: int) -> None:
    expected = DATA[name].classes
    if found != expected:
        raise ValueError(f"{name}: {where} has {found} classes, expected {expected}")
    if not labels:
        raise ValueError(f"{name}: {where} has no images")
    if not 0 <= min(labels) <= max(labels) < expected:
        raise ValueError(f"{name}: {where} has labels {min(labels)} to {max(labels)}, expected 0 to {expected - 1}")


def _torchvision(module: str) -> Any:
    try:
        return require(f"torchvision.{module}", "train")
    except RuntimeError as error:  # its operators cannot be registered
        raise RuntimeError(f"torchvision was installed for another torch: {error}") from error


def _transforms(kind: Kind, augment: str | None, size: int) -> tuple[Transform, Transform]:
    """Of images to train on and to test with: PIL.Image -> Tensor [channels, size, size]."""
    t = _torchvision("transforms")
    finish = [t.ToTensor(), *([t.Normalize(kind.mean, kind.std)] if kind.mean else [])]
    flip = t.RandomHorizontalFlip()
    if kind is DATA["imagenet"]:
        short = round(size * 256 / 224)
        whole_image = [t.Resize(short), t.CenterCrop(size)]
    else:
        whole_image = [t.Resize((size, size))] if size != kind.size else []
    test = t.Compose([*whole_image, *finish])
    if augment is None:
        return test, test
    before = {
        "crop": lambda: [*whole_image, t.RandomCrop(size, padding=4), flip],
        # Like the mean of the images is what lies beside a moved one.
        "autoaugment": lambda: [
            *whole_image,
            t.AutoAugment(t.AutoAugmentPolicy.CIFAR10, fill=[round(255 * m) for m in kind.mean or (0.5, 0.5, 0.5)]),
        ],
        "scale": lambda: [RandomShortSide(round(size * 256 / 224), round(size * 480 / 224)), t.RandomCrop(size), flip],
        "inception": lambda: [t.RandomResizedCrop(size), flip, t.ColorJitter(0.4, 0.4, 0.4)],
    }
    light = [RandomLight()] if augment == "inception" else []
    return t.Compose([*before[augment](), finish[0], *light, *finish[1:]]), test


class RandomShortSide:
    """An image made as large that its short side has low to high pixels, each as likely."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Any) -> Any:
        side = int(torch.randint(self.low, self.high + 1, ()))
        return _torchvision("transforms.functional").resize(image, side)


class RandomLight:
    """Krizhevsky et al.'s colours of light: to all pixels of Tensor [3, H, W], from 0 to 1, is added
    ``sum_i alpha_i lambda_i v_i`` of the principal components of ImageNet's colours, alpha normal with deviation
    ``scale``."""

    # Eigenvalues and, as columns, eigenvectors of the covariance of ImageNet's red, green and blue.
    VALUES = (0.2175, 0.0188, 0.0045)
    VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))

    def __init__(self, scale: float = 0.1) -> None:
        self.scale = scale

    def __call__(self, image: Tensor) -> Tensor:
        alpha = self.scale * torch.randn(3)
        return image + (torch.tensor(self.VECTORS) @ (alpha * torch.tensor(self.VALUES)))[:, None, None]
