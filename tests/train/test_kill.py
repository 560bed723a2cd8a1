"""SIGKILL of ``rkfast train`` at random instants costs nothing but the steps since the last checkpoint."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rkfast.train import checkpoint, engine
from tests import libraries
from tests.package.process import ROOT, environment

libraries.prepare()  # torchmetrics imports torchvision
for package in ("safetensors", "torchmetrics", "sklearn"):
    pytest.importorskip(package)

KILLS = 3
TRAIN = (
    *("-m", "tests.command", "train", "--model", "erknet-2x1_1x1-b"),
    *("--options", '{"growth_rate": 4, "drop_rate": 0.2}', "--epochs", "4", "--ema", "0.9", "--every", "2"),
    *("--keep", "3", "--device", "cpu", "--out"),
)


def started(out: Path, log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab") as file:
        env = environment(ROOT, OMP_NUM_THREADS="1")
        return subprocess.Popen([sys.executable, *TRAIN, str(out)], env=env, stdout=file, stderr=file)


def begun(out: Path) -> float:
    """When a training in ``out`` began last; all before is imports."""
    path = out / engine.RUN
    return path.stat().st_mtime if path.exists() else 0.0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_a_killed_training_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    alone, killed, log = tmp_path / "alone", tmp_path / "killed", tmp_path / "log"
    assert started(alone, log).wait() == 0, log.read_text()
    seconds = (alone / "model.safetensors").stat().st_mtime - begun(alone)
    seed = time.time_ns()
    chance = random.Random(seed)
    seen = []
    for _ in range(KILLS):
        before = begun(killed)
        with started(killed, log) as process:
            while begun(killed) == before:
                assert process.poll() is None, log.read_text()
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 1 / KILLS) * seconds)  # so that all together do not reach the end
            process.kill()
            assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
        seen.append(max((int(path.name) for path in checkpoint.paths(killed)), default=0))
    assert started(killed, log).wait() == 0, log.read_text()
    print(f"seed {seed}, {seconds:.1f} s alone; killed {KILLS} times, with checkpoints behind {seen} steps")
    assert "damaged" not in log.read_text()
    assert len(set(seen)) > KILLS // 3, "it did not get on between the kills"
    for name in ("model.safetensors", "config.json", "metrics.jsonl", "metrics.csv"):
        assert (alone / name).read_bytes() == (killed / name).read_bytes(), f"{name} is another"
    last = checkpoint.paths(alone)[-1]
    for file in last.glob("*.safetensors"):
        other = checkpoint.at(killed, int(last.name)) / file.name
        assert file.read_bytes() == other.read_bytes(), f"{file.name} is another"
    assert [path.name for path in checkpoint.paths(alone)] == [path.name for path in checkpoint.paths(killed)]
