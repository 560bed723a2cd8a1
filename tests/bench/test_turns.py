"""Processes that measure by turns."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from rkfast.bench import turns

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc settings are what it is for")

# Says when each of its slices began and ended, and exits with STATUS after COUNT of them.
WORKER = """
import sys, time
FOLDER, COUNT, STATUS, TAKE, GIVE = sys.argv[1], *map(int, sys.argv[2:])
sys.path.append(FOLDER)
import turns
turns.SLICE_S = 0.01
own = turns.Turns(TAKE, GIVE)
own.wait()
for _ in range(COUNT):
    start = time.monotonic()
    time.sleep(0.02)
    print(start, time.monotonic(), flush=True)
    own.pause()
sys.exit(STATUS)
"""


def _start(out: Path, count: int, status: int, ends: tuple[int, int]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WORKER, str(Path(turns.__file__).parent), *map(str, (count, status, *ends))]
    with out.open("w") as file:
        return subprocess.Popen(command, stdout=file, pass_fds=ends)


def _slices(out: Path) -> list[tuple[float, float]]:
    return [(float(line.split()[0]), float(line.split()[1])) for line in out.read_text().splitlines()]


def test_one_runs_at_a_time_and_who_is_left_goes_on(tmp_path: Path) -> None:
    asked = {"a": (4, 0), "b": (8, 3), "c": (4, 0)}
    statuses = turns.run([functools.partial(_start, tmp_path / name, *each) for name, each in asked.items()])
    assert statuses == [0, 3, 0]
    found = {name: _slices(tmp_path / name) for name in asked}
    assert {name: len(each) for name, each in found.items()} == {name: count for name, (count, _) in asked.items()}
    everyone = sorted((start, end, name) for name, each in found.items() for start, end in each)
    assert all(end <= start for (_, end, _), (start, _, _) in itertools.pairwise(everyone))
    assert [name for *_, name in everyone] == ["a", "b", "c"] * 4 + ["b"] * 4


def test_a_pause_before_a_slice_is_over_keeps_the_turn() -> None:
    own = turns.Turns(take=-1, give=-1, since=float("inf"))
    own.pause()  # would fail on either descriptor
