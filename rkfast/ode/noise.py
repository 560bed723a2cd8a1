"""How a classifier bears noise on its images (Yang et al., "Dynamical System Inspired Adaptive Time Stepping Controller
for Residual Network Families", Figure 4)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rkfast.ode.untouched import as_it_was


class NoisePoint(NamedTuple):
    """What is left at one level of noise: ``accuracy`` (0 to 1) and ``loss`` (mean cross entropy) over all images."""

    sigma: float
    accuracy: float
    loss: float


def noise_sweep(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    sigmas: Iterable[float],
    *,
    generator: torch.Generator | None = None,
) -> list[NoisePoint]:
    """Accuracy and loss of ``model(images + sigma * noise)`` in eval mode, noise of the standard normal distribution.

    The loader is gone through once: every sigma sees the same images with the same noise, only more or less of it.
    Modes, buffers and the global random numbers are left as they were.

    Args:
        model: Tensor [N, C, H, W] -> [N, classes].
        loader: of images, a floating-point Tensor [N, C, H, W], and labels, an integer Tensor [N], on any device; they
            are moved to that of the model's first parameter, the images to its dtype.
        sigmas: standard deviations, in the units of the images (of normalised images, normalised ones).
        generator: of the noise, on any device; None is one with seed 0.

    Returns:
        A NoisePoint for each sigma, in their order.

    Raises:
        TypeError: an argument, or what the loader or the model gives, is of a wrong type.
        ValueError: there are no sigmas or no images, a sigma is negative or not finite, or labels or answers have a
            shape that does not fit the images.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a Module, got {type(model).__name__}")
    levels = _checked(sigmas)
    if not isinstance(generator, (torch.Generator, type(None))):
        raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
    source = torch.Generator().manual_seed(0) if generator is None else generator
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    images_seen, correct, losses = 0, [0] * len(levels), [0.0] * len(levels)
    with as_it_was(model, evaluating=True), torch.no_grad():
        for batch in loader:
            images, labels = _batch(batch)
            noise = torch.randn(images.shape, generator=source, device=source.device).to(images)
            images_seen += len(labels)
            labels = labels.to(images.device if like is None else like.device, torch.long)
            for i, sigma in enumerate(levels):
                x = images + sigma * noise
                answers = model(x if like is None else x.to(like.device, like.dtype))
                _check_answers(answers, labels)
                correct[i] += int((answers.argmax(1) == labels).sum())
                wide = answers.to(torch.promote_types(answers.dtype, torch.float32))
                losses[i] += F.cross_entropy(wide, labels, reduction="sum").item()
    if not images_seen:
        raise ValueError("loader: there are no images in it; a generator that was gone through once is empty")
    return [
        NoisePoint(sigma, right / images_seen, loss / images_seen)
        for sigma, right, loss in zip(levels, correct, losses, strict=True)
    ]


def _checked(sigmas: Iterable[float]) -> list[float]:
    if isinstance(sigmas, (str, bytes, Tensor)) or not isinstance(sigmas, Iterable):
        raise TypeError(f"sigmas: expected numbers, such as a list of them, got {type(sigmas).__name__}")
    levels = list(sigmas)
    for i, sigma in enumerate(levels):
        if isinstance(sigma, bool) or not isinstance(sigma, numbers.Real):
            raise TypeError(f"sigmas[{i}]: expected a number, got {type(sigma).__name__}")
        if not 0 <= sigma < math.inf:
            raise ValueError(f"sigmas[{i}]: expected a finite number of at least 0, got {sigma}")
    if not levels:
        raise ValueError("sigmas: there are none; 0 is that of the images themselves")
    return [float(sigma) for sigma in levels]


def _batch(batch: object) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not all(isinstance(t, Tensor) for t in batch):
        raise TypeError("loader: expected pairs of images and labels, both Tensors")
    images, labels = batch
    if not images.is_floating_point():
        raise TypeError(f"loader: expected floating-point images, got {images.dtype}; convert and normalise them")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"loader: expected labels of an integer dtype, got {labels.dtype}")
    if labels.dim() != 1 or images.dim() < 1 or len(labels) != len(images):
        raise ValueError(
            f"loader: expected a label for each image, got images {list(images.shape)} and labels {list(labels.shape)}"
        )
    return images, labels


def _check_answers(answers: object, labels: Tensor) -> None:
    if not isinstance(answers, Tensor):
        raise TypeError(f"model: expected it to return a Tensor [N, classes], got {type(answers).__name__}")
    if answers.dim() != 2 or len(answers) != len(labels):
        raise ValueError(f"model: expected answers [{len(labels)}, classes], got {list(answers.shape)}")
