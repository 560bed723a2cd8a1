"""A training that is killed again and again, and the same one left alone: ``python -m tests.train.killed FOLDER``.

Children are forked from a process that has everything imported, so that the time goes into training.
"""

from __future__ import annotations

import importlib
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from rkfast.train import checkpoint, engine
from rkfast.train.recipes import Recipe
from tests import libraries
from tests.train import tiny

libraries.prepare()
importlib.import_module("torchmetrics.classification")  # before the children are forked

KILLS = 12
RECIPE = tiny.recipe("erknet-2x1_1x1-b", {"growth_rate": 4, "drop_rate": 0.2}, epochs=40)


def train(out: Path, recipe: Recipe = RECIPE) -> None:
    engine.train(recipe, out, every=2, keep=3, ema=0.9, device="cpu")


def child(out: Path) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 2)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # a damaged checkpoint is warned of
                    train(out)
            status = 0
        finally:
            os._exit(status)
    return pid


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    engine.load = tiny.load  # type: ignore[assignment]
    seed = int(time.time())
    print(f"seed {seed}")
    chance = random.Random(seed)
    alone, killed = folder / "alone", folder / "killed"
    train(
        folder / "first", tiny.recipe(RECIPE.model, RECIPE.options, epochs=1)
    )  # what is loaded at first is then there in every child
    start = time.perf_counter()
    assert os.waitpid(child(alone), 0)[1] == 0
    seconds = time.perf_counter() - start
    seen = []
    for _ in range(KILLS):
        pid = child(killed)
        time.sleep(chance.uniform(0, 1 / KILLS) * seconds)  # so that all together do not reach the end
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "it ended before it was killed"
        seen.append(int(checkpoint.paths(killed)[-1].name) if checkpoint.paths(killed) else 0)
    assert os.waitpid(child(killed), 0)[1] == 0
    print(f"{seconds:.1f} s alone; killed {KILLS} times, with checkpoints behind {seen} steps")
    assert len(set(seen)) > KILLS // 2, "it did not get on between the kills"
    for name in ("model.safetensors", "config.json", "metrics.jsonl", "metrics.csv"):
        assert (alone / name).read_bytes() == (killed / name).read_bytes(), f"{name} is another"
    last = checkpoint.paths(alone)[-1].name
    for file in (alone / checkpoint.FOLDER / last).glob("*.safetensors"):
        assert file.read_bytes() == (killed / checkpoint.FOLDER / last / file.name).read_bytes(), (
            f"{file.name} is another"
        )
    assert [path.name for path in checkpoint.paths(alone)] == [path.name for path in checkpoint.paths(killed)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
