"""The step sizes of a network over its training."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rkfast.tsc.attach import BlockSteps, StepSizes, steps


class StepHistory:
    """Collects ``rkfast.tsc.steps(model)`` call by call, such as once an epoch::

        history = rkfast.tsc.StepHistory()
        for epoch in range(epochs):
            ...
            history(model, epoch + 1)
        history.save("steps.json")      # rkfast plot steps steps.json

    Attributes:
        steps: the StepSizes.
        at: where they were recorded, a number for each: the second argument, or how many there were before.
    """

    def __init__(self) -> None:
        self.steps: list[StepSizes] = []
        self.at: list[float] = []

    def __call__(self, model: nn.Module, at: float | None = None) -> StepSizes:
        """Record the step sizes as they are now, on the CPU.

        Args:
            model: a network with controllers, or a wrapper of it; each time the same blocks.
            at: such as the epoch.

        Raises:
            TypeError, ValueError: as in ``rkfast.tsc.steps``; or at is no finite number, or the blocks are others than
                before. Nothing is recorded then.
        """
        place = len(self.steps) if at is None else at
        if isinstance(place, bool) or not isinstance(place, (int, float)):
            raise TypeError(f"at: expected a number, got {type(place).__name__}")
        if not math.isfinite(place):
            raise ValueError(f"at: expected a finite number, got {place}")
        found = steps(model)
        if self.steps and [b.name for b in found.blocks] != [b.name for b in self.steps[0].blocks]:
            raise ValueError("model: its blocks are others than those recorded before; take a StepHistory for each")
        record = StepSizes([b._replace(sizes=b.sizes.cpu()) for b in found.blocks], found.evolution_time)
        self.steps.append(record)
        self.at.append(place)
        return record

    def __len__(self) -> int:
        return len(self.steps)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write a JSON object of ``blocks``, their names, and ``records``, of each ``at`` and ``sizes``, a list of step
        sizes per block; whole, or not at all.

        Raises:
            OSError: it cannot be written.
        """
        path = Path(file)
        names = [block.name for block in self.steps[0].blocks] if self.steps else []
        records = [
            # 9 digits are what a float32 has.
            {"at": at, "sizes": [[float(f"{v:.9g}") for v in block.sizes.tolist()] for block in record.blocks]}
            for at, record in zip(self.at, self.steps, strict=True)
        ]
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_text(json.dumps({"blocks": names, "records": records}) + "\n", encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> StepHistory:
        """What ``save`` wrote; step sizes are in float32, whatever their dtype was.

        Raises:
            ValueError: it cannot be read, or is no such file.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        except ValueError as error:
            raise ValueError(f"{file} is no JSON: {error}") from error
        history = cls()
        try:
            names = [_name(name) for name in content["blocks"]]
            for record in content["records"]:
                sizes = [torch.tensor([float(v) for v in block], dtype=torch.float32) for block in record["sizes"]]
                if not all(map(len, sizes)):
                    raise ValueError("sizes")
                blocks = [BlockSteps.of(name, block) for name, block in zip(names, sizes, strict=True)]
                history.steps.append(StepSizes.of(blocks))
                history.at.append(float(record["at"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is not what rkfast.tsc.StepHistory.save writes") from error
        return history


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("blocks")
    return value
