"""One training at a time in a folder."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

FILE = ".lock"


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if missing. The operating system takes the lock back when the process
    ends, however that happens; its empty file stays. Where files cannot be locked, as on some network file systems,
    none is held.

    Raises:
        ValueError: another process holds it.
        OSError: the folder or the file cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / FILE, "ab") as file:
        try:
            _lock(file.fileno())
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"out: another training writes to {out}; wait for it, or take another folder") from error
        except OSError:
            pass
        yield


def _lock(handle: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        # Not flock: workers that load images would inherit it, and hold it for seconds behind a kill.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
