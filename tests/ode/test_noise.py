"""noise_sweep: the formula in plain PyTorch, and that it leaves no trace."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rkfast
from rkfast import ode

SIGMAS = [0.0, 0.5, 2]


def batches(sizes: tuple[int, ...] = (4, 3)) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 8, 8, generator=generator), torch.randint(0, 10, (n,), generator=generator)) for n in sizes
    ]


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return rkfast.create_model("tsc_resnet-8", **options)


def test_formula() -> None:
    """Every sigma meets the same noise, batch after batch."""
    model = network()
    found = ode.noise_sweep(model, batches(), SIGMAS, generator=torch.Generator().manual_seed(3))
    model.eval()
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn(images.shape, generator=generator) for images, _ in batches()]
    for point, sigma in zip(found, SIGMAS, strict=True):
        with torch.no_grad():
            pairs = zip(batches(), noise, strict=True)
            answers = torch.cat([model(images + sigma * more) for (images, _), more in pairs])
        labels = torch.cat([labels for _, labels in batches()])
        assert point.sigma == sigma
        assert point.accuracy == pytest.approx((answers.argmax(1) == labels).double().mean().item(), abs=1e-12)
        assert point.loss == pytest.approx(F.cross_entropy(answers, labels).item(), rel=1e-5)
    assert len({point.loss for point in found}) == 3


def test_generators_decide() -> None:
    model = network()
    seeds = (None, 0, 1)
    runs = [
        ode.noise_sweep(model, batches(), [1.0], generator=s if s is None else torch.Generator().manual_seed(s))
        for s in seeds
    ]
    assert runs[0] == runs[1] != runs[2]
    # A loader that can be gone through once gives the same.
    assert ode.noise_sweep(model, iter(batches()), [0.5, 1.0])[1] == runs[0][0]


@pytest.mark.parametrize("fails", (False, True))
def test_the_model_is_as_it_was(fails: bool) -> None:
    model = nn.Sequential(network(), nn.Dropout()).train()
    model[0].layer1.eval()
    modes = [module.training for module in model.modules()]
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    loader = torch.utils.data.DataLoader(list(zip(*batches((8,))[0], strict=True)), batch_size=4, shuffle=True)
    if fails:
        with pytest.raises(TypeError, match="loader: expected pairs"):
            ode.noise_sweep(model, [*loader, 3], SIGMAS)  # type: ignore[list-item]
        torch.set_rng_state(random)  # which [*loader] moved
    else:
        ode.noise_sweep(model, loader, SIGMAS)
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_images_are_left_alone_and_converted() -> None:
    model, ((images, labels),) = network().double(), batches((4,))
    kept = images.clone()
    (point,) = ode.noise_sweep(model, [(images, labels.int())], [0.0])
    assert torch.equal(images, kept)
    expected = F.cross_entropy(model.eval()(images.double()), labels)
    assert point.loss == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("sigmas", "kind", "message"),
    (
        ([], ValueError, "sigmas: there are none"),
        ([0.1, -1], ValueError, r"sigmas\[1\]: expected a finite number of at least 0, got -1"),
        ([math.nan], ValueError, r"sigmas\[0\]: expected a finite"),
        ([math.inf], ValueError, r"sigmas\[0\]: expected a finite"),
        ([True], TypeError, r"sigmas\[0\]: expected a number, got bool"),
        (["1"], TypeError, r"sigmas\[0\]: expected a number, got str"),
        (0.5, TypeError, "sigmas: expected numbers, such as a list of them, got float"),
        ("12", TypeError, "sigmas: expected numbers, such as a list of them, got str"),
    ),
)
def test_sigmas_are_checked(sigmas: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ode.noise_sweep(network(), batches(), sigmas)


def test_bad_arguments() -> None:
    model, ((images, labels),) = network(), batches((4,))
    for loader, kind, message in (
        ([], ValueError, "loader: there are no images in it"),
        ([images], TypeError, "loader: expected pairs"),
        ([(images.byte(), labels)], TypeError, r"loader: expected floating-point images, got torch\.uint8"),
        ([(images, labels.float())], TypeError, r"loader: expected labels of an integer dtype, got torch\.float32"),
        ([(images, labels[:3])], ValueError, r"loader: expected a label for each image, got images \[4, 3, 8, 8\]"),
    ):
        with pytest.raises(kind, match=message):
            ode.noise_sweep(model, loader, SIGMAS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a Module, got list"):
        ode.noise_sweep([], batches(), SIGMAS)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator, got int"):
        ode.noise_sweep(model, batches(), SIGMAS, generator=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model: expected answers \[4, classes\], got \[4, 3, 8, 8\]"):
        ode.noise_sweep(nn.Identity(), [(images, labels)], SIGMAS)
