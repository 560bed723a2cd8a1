"""One evaluation of the controllers for several micro-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from rkfast.tsc.attach import attached


@contextlib.contextmanager
def accumulate(model: nn.Module) -> Iterator[None]:
    """``with accumulate(model):`` the controllers run once for all forwards inside, and backward once, at its end.

    The gradients are those of as many full passes::

        with rkfast.tsc.accumulate(model):
            for x, y in micro_batches:
                scaler.scale(loss(model(x), y) / n).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)

    Inside, parameters must stay as they are, the controllers have no gradients yet, and the convolutions do not have
    all of theirs: unscale, clip and step behind it. Where an exception leaves it, the controllers get none.

    With DistributedDataParallel the last micro-batch comes behind, because gradients are exchanged as a backward makes
    them::

        with ddp.no_sync(), rkfast.tsc.accumulate(ddp):
            ...  # all micro-batches but the last
        ...  # the last

    An evaluation, ``with torch.no_grad(), rkfast.tsc.accumulate(model):``, runs them once for all its batches.

    Args:
        model: a network with controllers, or a wrapper or larger module that has it.

    Raises:
        TypeError: model is no module.
        ValueError: nothing is attached to it, or it is inside another ``accumulate``.
    """
    found = attached(model)
    sizes = [module.step_sizes(run) for _, module, run in found]
    leaves = [size.detach().requires_grad_(size.requires_grad) for size in sizes]
    for (_, _, run), leaf in zip(found, leaves, strict=True):
        run.controller.held = leaf
    try:
        yield
    finally:
        for _, _, run in found:
            run.controller.held = None
    met = [(size, leaf.grad) for size, leaf in zip(sizes, leaves, strict=True) if leaf.grad is not None]
    if met:
        torch.autograd.backward([size for size, _ in met], [grad for _, grad in met])
