"""Run the code of a Markdown page from its first block to its last: ``python -m tests.page docs/limits.md``.

A fenced block says in its first word what it is:

- ``python``: runs; all such blocks of a page share their names. With a second word it is a file of that name.
- ``sh``: runs in a shell, whose ``rkfast``, ``torchrun`` and ``python`` are those of this interpreter.
- ``text``: right behind one of them, what it prints, ``...`` for anything; where it begins with the name of an error,
  the error that the block ends with. Elsewhere it is only shown.

A block behind ``<!-- not run: REASON -->`` is not run.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

LANGUAGES = ("python", "sh", "text")
MARKER = re.compile(r"<!-- not run: (\S.*) -->")
ERROR = re.compile(r"[\w.]*(Error|Exception|MissingExtra): ")
LENIENT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PROGRAMS = {
    "python": "",
    "torchrun": "-m torch.distributed.run",
    "rkfast": "-m tests.command",
}


class Block(NamedTuple):
    """line: of its first line of code in the page. expected: the text behind it. reason: why it is not run."""

    language: str
    file: str
    code: str
    line: int
    expected: str | None
    reason: str | None


def blocks(page: Path) -> list[Block]:
    """The code of a page.

    Raises:
        ValueError: a block says not what it is.
    """
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    before, i = "", 0  # before: the last line that is not empty
    while i < len(lines):
        if lines[i].startswith("```"):
            language, _, file = lines[i][3:].partition(" ")
            if language not in LANGUAGES:
                raise ValueError(f"{page.name}:{i + 1}: a block of {language!r}, expected {', '.join(LANGUAGES)}")
            end = lines.index("```", i + 1)
            code = "\n".join(lines[i + 1 : end]) + "\n"
            if language == "text":
                if before == "```" and found:
                    found[-1] = found[-1]._replace(expected=code)
            else:
                marker = MARKER.fullmatch(before)
                found.append(Block(language, file, code, i + 2, None, marker and marker[1]))
            # A text behind a text is shown only.
            before, i = "```" if language != "text" else "", end
        elif lines[i].strip():
            before = lines[i]
        i += 1
    return found


def run(page: Path) -> None:
    """Run the code of a page in the current folder.

    Raises:
        AssertionError: a block does not end as the page says.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    with programs() as path:
        for block in blocks(page):
            where = f"{page.name}:{block.line}"
            if block.reason is not None:
                print(f"{where}: not run: {block.reason}")
            elif block.file:
                Path(block.file).write_text(block.code, encoding="utf-8")
            else:
                got, failed = _python(block, page, names) if block.language == "python" else _shell(block, path)
                _compare(where, block.expected, got, failed)


def _python(block: Block, page: Path, names: dict[str, Any]) -> tuple[str, bool]:
    """What the block prints and then the error that it ends with, and whether it is one."""
    out, code = io.StringIO(), "\n" * (block.line - 1) + block.code
    expected_error = block.expected is not None and ERROR.match(block.expected)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            exec(compile(code, str(page), "exec"), names)
        except Exception as error:
            if not expected_error:
                return out.getvalue() + traceback.format_exc(), True
            return "".join(traceback.format_exception_only(error)), True
    return out.getvalue(), False


def _shell(block: Block, path: str) -> tuple[str, bool]:
    environment = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-e", "-c", block.code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.stdout, done.returncode != 0


def _compare(where: str, expected: str | None, got: str, failed: bool) -> None:
    error = expected is not None and ERROR.match(expected) is not None
    assert failed == error, f"{where}: expected {expected if error else 'no error'}, got\n{got}"
    if expected is not None:
        same = doctest.OutputChecker().check_output(expected, got, LENIENT)
        assert same, f"{where}: expected\n{expected}\ngot\n{got}"


@contextlib.contextmanager
def programs() -> Iterator[str]:
    """A folder with the programs that a shell is to find."""
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in PROGRAMS.items():
            program = Path(folder, name)
            program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments} "$@"\n')
            program.chmod(0o755)
        yield folder


if __name__ == "__main__":
    from tests import libraries

    libraries.prepare()
    run(Path(sys.argv[1]))
