"""What a training tells: rows in files, one for each epoch, and progress on standard error.

In the folder of a run

    metrics.jsonl   losses, errors, learning rate, step sizes: the same whenever the same training is done again
    metrics.csv     the same, without what is no number
    speed.jsonl     seconds, images per second, peak memory: what the machine made of it
    tensorboard/    all numbers, where tensorboard is installed
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rkfast.extras import require
from rkfast.files import replacing

METRICS, CSV, SPEED, TENSORBOARD = "metrics.jsonl", "metrics.csv", "speed.jsonl", "tensorboard"
EVERY = 30.0  # seconds between plain lines within an epoch
REFRESH = 0.5  # seconds between updates of the bar, of which one takes as long as a step of a small network


class Log:
    """Writes the rows of a run that goes on behind ``step`` steps; rows of later steps, which will be done again, go.

    Attributes:
        rows: of metrics.jsonl.

    Raises:
        ValueError: a file of the run is damaged.
    """

    def __init__(self, out: Path, step: int, steps: int, title: str) -> None:
        self.out, self.steps = out, steps
        self.rows = _cut(out / METRICS, step)
        _cut(out / SPEED, step)
        self._table()
        self._board = self._tensorboard(step)
        self._bar = _Bar(title, step, steps) if _rich() else None
        self._last = time.monotonic()

    def step(self, step: int, epoch: int) -> None:
        """Tell that ``step`` steps are done."""
        now = time.monotonic()
        if now - self._last < (EVERY if self._bar is None else REFRESH) and step < self.steps:
            return
        self._last = now
        if self._bar is not None:
            self._bar.update(step)
        elif step < self.steps:
            print(f"epoch {epoch}, step {step} of {self.steps}", file=sys.stderr)

    def row(self, metrics: dict[str, Any], speed: dict[str, Any]) -> None:
        """Write the rows of an epoch, which have ``epoch`` and ``step``."""
        self.rows.append(metrics)
        _append(self.out / METRICS, metrics)
        _append(self.out / SPEED, speed)
        self._table()
        if self._board is not None:
            for key, value in {**_flat(metrics), **_flat(speed)}.items():
                self._board.add_scalar(key, value, metrics["step"])
        text = ", ".join(f"{key} {value:.4g}" for key, value in _flat(metrics).items() if key != "step")
        if self._bar is not None:
            self._bar.print(text)
        else:
            print(text, file=sys.stderr)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._bar is not None:
            self._bar.close()

    def _table(self) -> None:
        rows = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in self.rows]
        with replacing(self.out / CSV) as path, open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)

    def _tensorboard(self, step: int) -> Any:
        if importlib.util.find_spec("tensorboard") is None:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.out / TENSORBOARD), purge_step=step + 1)


class _Bar:
    """rich's."""

    def __init__(self, title: str, step: int, steps: int) -> None:
        rich = require("rich.progress", "train")
        self._progress = rich.Progress(
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeRemainingColumn(),
            console=require("rich.console", "train").Console(stderr=True),
            refresh_per_second=1 / REFRESH,  # of a thread of its own
        )
        self._task = self._progress.add_task(title, total=steps, completed=step)
        self._progress.start()

    def update(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def print(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def _rich() -> bool:
    return sys.stderr.isatty() and importlib.util.find_spec("rich") is not None


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``.jsonl`` file; a last line that was not written to its end is none.

    Raises:
        ValueError: it cannot be read, or is damaged.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    rows = []
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{i} is damaged: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}:{i} is no row of a training")
        rows.append(row)
    return rows


def _cut(path: Path, step: int) -> list[dict[str, Any]]:
    """The rows up to step, which alone are left."""
    rows = [row for row in read(path) if row["step"] <= step] if path.exists() else []
    with replacing(path) as new:
        new.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def _append(path: Path, row: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _flat(row: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{key}/{name}": number for name, number in value.items()}
        elif value is not None:
            flat[key] = value
    return flat
