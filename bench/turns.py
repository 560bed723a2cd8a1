"""Processes that measure by turns, so that all of them see the same machine, however its speed drifts."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

SLICE_S = 0.2  # of one turn; long beside what changing turns costs: threads that spin, and caches that are cold


@dataclass
class Turns:
    """A process's own end: it runs while it has the turn, and ``pause`` gives it up where it has lasted long enough."""

    take: int  # file descriptors: a byte read is the turn, a byte written gives it up
    give: int
    since: float = 0.0

    def wait(self) -> None:
        if not os.read(self.take, 1):
            sys.exit("the process that gives turns is gone")
        self.since = time.perf_counter()

    def pause(self) -> None:
        if time.perf_counter() - self.since > SLICE_S:
            os.write(self.give, b".")
            self.wait()


class _Started:
    def __init__(self, start: Callable[[tuple[int, int]], subprocess.Popen[bytes]]) -> None:
        taken, self.give = os.pipe()
        self.take, given = os.pipe()
        self.process = start((taken, given))
        for theirs in (taken, given):  # so that its end is seen when it exits
            os.close(theirs)

    def turn(self) -> bool:
        """Let it run until it gives the turn back; False once it has exited."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.give, b".")
        return bool(os.read(self.take, 1))

    def end(self) -> int:
        os.close(self.give)
        os.close(self.take)
        return self.process.wait()


def run(starts: Sequence[Callable[[tuple[int, int]], subprocess.Popen[bytes]]]) -> list[int]:
    """Start processes that use ``Turns`` and give each the turn until all have exited.

    Args:
        starts: each starts one process that inherits the two file descriptors and waits for its first turn.

    Returns:
        Their exit statuses.
    """
    processes: list[_Started] = []
    try:
        for start in starts:
            processes.append(_Started(start))  # noqa: PERF401  # those started are ended if the next does not start
        running = list(processes)
        while running:
            running = [each for each in running if each.turn()]
    finally:
        statuses = [each.end() for each in processes]
    return statuses
