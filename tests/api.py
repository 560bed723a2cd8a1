"""Every public name, its signature, and the first sentence of its docstring: ``python -m tests.api > docs/api.md``."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from rkfast import cli

HEAD = """\
# API reference

Written by `python -m tests.api` and checked by `tests/test_docs.py`: every public name, its signature and the first
sentence of its docstring. `help(rkfast.fuse)` shows the whole docstring: formula, shapes, arguments, errors, source.

"""
MODULES = {
    "rkfast": "",
    "rkfast.swap": "What the calls above return.",
    "rkfast.models": "",
    "rkfast.nn": "",
    "rkfast.ops": "",
    "rkfast.tableau": "",
    "rkfast.ode": "",
    "rkfast.tsc": "",
    "rkfast.papers": "",
    "rkfast.measure": "",
}
# What a module shares with the others of its kind.
PLUMBING = {"forward", "forward_with_moments", "reads_moments", "extra_repr"}
FIRST_SENTENCE = re.compile(r"(.+?)\.(?:\s|$)", re.DOTALL)


class _AsWritten:
    """What ``inspect`` shows in a signature without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def names(module: types.ModuleType) -> list[str]:
    """What a module offers: ``__all__``, else functions and classes without an underscore."""
    found = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and OFFERED.get(module.__name__, _is_its_own)(module, value)
    ]
    return sorted(found, key=str.lower)


def _is_its_own(module: types.ModuleType, value: Any) -> bool:
    return getattr(value, "__module__", "") == module.__name__ and (inspect.isfunction(value) or inspect.isclass(value))


OFFERED = {
    "rkfast": lambda module, value: inspect.isfunction(value) and value.__module__.startswith("rkfast."),
    "rkfast.swap": lambda module, value: inspect.isclass(value),
}


def signature(value: Any) -> str:
    """Such as "(x: Tensor, *, relu: bool = False) -> Tensor"; of a class that of its making."""
    found = inspect.signature(value)
    parameters = [
        p.replace(annotation=_annotation(p.annotation), default=_default(p.default)) for p in found.parameters.values()
    ]
    returned = inspect.Signature.empty if inspect.isclass(value) else _annotation(found.return_annotation)
    return str(found.replace(parameters=parameters, return_annotation=returned))


def _annotation(annotation: Any) -> Any:
    if isinstance(annotation, typing.ForwardRef):
        annotation = annotation.__forward_arg__
    return _AsWritten(annotation) if isinstance(annotation, str) else annotation


def _default(default: Any) -> Any:
    if isinstance(default, functools.partial):
        given = (f"{name}={value!r}" for name, value in default.keywords.items())
        return _AsWritten(f"partial({', '.join([default.func.__qualname__, *given])})")
    if isinstance(default, types.MappingProxyType):
        return _AsWritten(repr(dict(default)))
    known = inspect.isclass(default) and default is not inspect.Parameter.empty
    return _AsWritten(default.__qualname__) if known else default


def summary(value: Any) -> str:
    """The first sentence of its own docstring.

    Raises:
        ValueError: it has none.
    """
    doc = getattr(value, "__doc__", None)
    inherited = inspect.isclass(value) and doc == value.__mro__[1].__doc__
    if not doc or inherited:
        raise ValueError(f"{value!r} has no docstring")
    first = inspect.cleandoc(doc).partition("\n\n")[0]
    match = FIRST_SENTENCE.match(first)
    text = " ".join((match[1] if match else first).split())
    return text.replace("``", "`").rstrip(".:")


def entries(name: str, value: Any) -> Iterator[str]:
    """A line for a name, and one for each method of a class."""
    # A class, to inspect of Python 3.10, is tuple[int] as well.
    if isinstance(value, types.GenericAlias) or not (inspect.isclass(value) or inspect.isroutine(value)):
        yield f"- `{name}`: `{value}`."
        return
    shown = "" if inspect.isclass(value) and issubclass(value, list) else signature(value)
    yield f"- `{name}{shown}`: {summary(value)}."
    for own, member in vars(value).items() if inspect.isclass(value) else ():
        if own.startswith("_") or own in PLUMBING or not getattr(member, "__doc__", None):
            continue
        if isinstance(member, property):
            yield f"  - `.{own}`: {summary(member)}."
        elif inspect.isfunction(member):
            yield f"  - `.{own}{signature(member).replace('(self, ', '(').replace('(self)', '()')}`: {summary(member)}."
        elif isinstance(member, classmethod):
            yield f"  - `{name}.{own}{signature(getattr(value, own))}`: {summary(member.__func__)}."


def page() -> str:
    lines = [HEAD]
    for home, about in MODULES.items():
        module = importlib.import_module(home)
        lines.append(f"## `{home}`\n\n")
        lines.append(f"{about or summary(module) + '.'}\n\n")
        for name in names(module):
            lines += [f"{line}\n" for line in entries(name, getattr(module, name))]
        lines.append("\n")
    lines.append("## Commands\n\n`rkfast COMMAND --help` has the arguments of each.\n\n")
    lines += [f"- `rkfast {name}`: {about}.\n" for name, (_, about) in cli.COMMANDS.items()]
    return "".join(lines)


if __name__ == "__main__":
    print(page(), end="")
