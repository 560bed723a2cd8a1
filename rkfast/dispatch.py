"""Who computes: one ordered list of implementations per op, and the only place that chooses among them.

An explicit choice (``with rkfast.use("cpu"):`` or ``RKFAST_BACKEND=cpu``) that cannot serve a call raises the reason;
the automatic choice takes the first implementation that can, and remembers why the ones before it could not.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from rkfast import flops, native

BACKENDS = ("cuda", "triton", "cpu", "reference")
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

library = torch.library.Library("rkfast", "DEF")


class Implementation(NamedTuple):
    """One way to compute an op.

    ``module`` is imported at the first call it serves; ``supports(*args)`` answers None, or the reason why not, by
    device, dtype and emptiness of the op's lead alone, unless the op ``varies``.
    """

    backend: str
    module: str
    function: str
    supports: Callable[..., str | None] | None = None
    deterministic: bool = True


class Record(NamedTuple):
    """What happened at the last call of an op."""

    backend: str
    rejected: tuple[tuple[str, str], ...]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Choice(NamedTuple):
    op: str
    backend: str
    function: Callable[..., Any]
    rejected: tuple[tuple[str, str], ...]
    dtype: torch.dtype
    device: torch.device


OPS: dict[str, Op] = {}
_environment = os.environ.get("RKFAST_BACKEND") or "auto"
# Process-wide, so that it also holds in autograd's threads. Lists of one, because they are told apart by identity.
_forced: tuple[list[str], ...] = ()
_lock = threading.Lock()
_served: Counter[tuple[str, str]] = Counter()
_extension: Any = None  # the C++ extension, once it may serve calls without this module (csrc/cpu/dispatch.h)


class Op:
    """An op's implementations in the order in which they are tried. Calling it chooses and runs one.

    lead: which of the arguments decides, a tensor or the first of a list. varies: something else decides, too, and the
    choice is made at every call.
    """

    def __init__(
        self, name: str, implementations: tuple[Implementation, ...], lead: int = 0, varies: bool = False
    ) -> None:
        OPS[name] = self
        self.name = name
        self.implementations = implementations
        self._lead = lead
        self._last: tuple[Choice, torch.Size] | None = None
        self._once = not varies and all(i.deterministic for i in implementations)
        self._chosen: dict[tuple[str | None, torch.device, torch.dtype, bool], Choice] = {}

    def __call__(self, *args: Any) -> Any:
        first = args[self._lead]
        lead = first[0] if isinstance(first, (list, tuple)) else first
        choice = self._choice(lead, args)
        result = choice.function(*args)
        self._note(choice, lead.shape)
        return result

    def serves_itself(self, lead: torch.Tensor) -> bool:
        """Whether C++ code that has such a CPU tensor may call its own kernel in place of this, which is counted."""
        choice = self._choice(lead, (None,) * self._lead + (lead,))
        if choice.backend != "cpu":
            return False
        self._note(choice, lead.shape)
        return True

    def _choice(self, lead: torch.Tensor, args: tuple[Any, ...]) -> Choice:
        key = (forced() if _forced or _environment != "auto" else None, lead.device, lead.dtype, lead.numel() == 0)
        choice = self._chosen.get(key)
        if choice is None:
            choice = self._choose(lead, args)
            if self._once:
                self._chosen[key] = choice
        return choice

    def _note(self, choice: Choice, shape: torch.Size) -> None:
        with _lock:
            _served[choice[:2]] += 1
        self._last = choice, shape
        if _extension is not None:
            _extension.forget(self.name)

    @property
    def last(self) -> Record | None:
        """The last call served; None before the first."""
        own = None if _extension is None else _extension.last(self.name)
        if own is not None:
            sizes, dtype, by_name = own
            lead = torch.empty(0, dtype=dtype, device="cpu")
            others = (
                [] if by_name else [i for i in self.implementations if i.backend in BACKENDS[: BACKENDS.index("cpu")]]
            )
            rejected = tuple((i.backend, str(self._reason(i, lead, (), explicit=False))) for i in others)
            return Record("cpu", rejected, torch.Size(sizes), dtype, lead.device)
        if self._last is None:
            return None
        choice, shape = self._last
        return Record(choice.backend, choice.rejected, shape, choice.dtype, choice.device)

    def _choose(self, lead: torch.Tensor, args: tuple[Any, ...]) -> Choice:
        if not lead.is_floating_point():
            raise TypeError(f"rkfast.{self.name}: expected floating-point tensors, got {lead.dtype}")
        explicit = forced()
        if explicit is not None:
            found = [i for i in self.implementations if i.backend == explicit]
            reason = self._reason(found[0], lead, args, explicit=True) if found else "it has no such implementation"
            if reason is not None:
                raise RuntimeError(
                    f"rkfast.{self.name}: backend {explicit!r} was asked for and cannot serve this call: {reason}"
                )
            return self._loaded(found[0], [], lead)
        rejected: list[tuple[str, str]] = []
        for implementation in self.implementations:
            reason = self._reason(implementation, lead, args, explicit=False)
            if reason is None:
                return self._loaded(implementation, rejected, lead)
            rejected.append((implementation.backend, reason))
        raise RuntimeError(f"rkfast.{self.name}: no implementation can serve this call: {rejected}")

    def _reason(
        self, implementation: Implementation, lead: torch.Tensor, args: tuple[Any, ...], explicit: bool
    ) -> str | None:
        reason = backend_reason(implementation.backend, lead.device.type, explicit)
        if reason is not None:
            return reason
        if implementation.backend != "reference" and lead.dtype not in KERNEL_DTYPES:
            return f"dtype {lead.dtype} has no kernel; supported are float32, float64, bfloat16, float16"
        if not implementation.deterministic and torch.are_deterministic_algorithms_enabled():
            reason = "it is not deterministic and torch.use_deterministic_algorithms is on"
            if not (explicit and torch.is_deterministic_algorithms_warn_only_enabled()):
                return reason
            warnings.warn(f"rkfast.{self.name}: {implementation.backend}: {reason}", stacklevel=4)
        return implementation.supports(*args) if implementation.supports is not None else None

    def _loaded(self, implementation: Implementation, rejected: list[tuple[str, str]], lead: torch.Tensor) -> Choice:
        function = getattr(importlib.import_module(implementation.module), implementation.function)
        return Choice(self.name, implementation.backend, function, tuple(rejected), lead.dtype, lead.device)


def backend_reason(backend: str, device: str, explicit: bool = False) -> str | None:
    """Why ``backend`` cannot serve tensors on ``device`` (a device type) in this process; None where it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return native.cpu_reason() if device == "cpu" else f"serves CPU tensors, not {device} ones"
    if backend == "triton" and device == "cpu" and native.triton_interprets():
        return None if explicit else "Triton's interpreter serves CPU tensors only where it is asked for by name"
    if device != "cuda":
        return f"serves CUDA tensors, not {device} ones"
    return native.cuda_reason() if backend == "cuda" else native.triton_reason()


def ordered(
    home: str,
    function: str,
    backends: tuple[str, ...] = BACKENDS,
    supports: Mapping[str, Callable[..., str | None]] | None = None,
) -> tuple[Implementation, ...]:
    """The usual list: ``function`` of the modules of ``home`` that are named as the backends are."""
    asked = supports or {}
    return tuple(Implementation(b, f"{home}.{b}", function, asked.get(b)) for b in backends)


def register(
    schema: str, body: Callable[..., Any], fake: Callable[..., Any], count: Callable[..., int] | None = None
) -> Any:
    """Register an entry point with torch.library, at import, once.

    Args:
        schema: torch schema, the name first.
        body: computes it; usually an Op.
        fake: allocates what ``body`` returns, for tracing and for meta tensors.
        count: its FLOPs from the shapes of its arguments, for torch's counter; None counts nothing, as torch does for
            sums and norms.

    Returns:
        The torch operator.
    """
    name = schema.split("(", 1)[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rkfast::{name}", functools.partial(_faked, name, fake), lib=library)
    packet = getattr(torch.ops.rkfast, name)
    if count is not None:
        flops.register(packet, count)
    return packet.default


def _faked(name: str, fake: Callable[..., Any], *args: Any) -> Any:
    """A meta tensor brings a call here whatever the others are, which would then be left unread and unwritten."""
    tensors = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg])]
    if len({t.is_meta for t in tensors if isinstance(t, torch.Tensor)}) > 1:
        raise ValueError(f"rkfast.{name}: some tensors are on device meta and some are not; move them to one")
    return fake(*args)


def forced() -> str | None:
    """The backend asked for by ``use`` or RKFAST_BACKEND; None leaves the choice automatic."""
    stack = _forced  # another thread may replace it
    if stack:
        return stack[-1][0]
    return None if _environment == "auto" else _known(_environment, "RKFAST_BACKEND")


def _known(backend: str, what: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{what}: {backend!r} is not a backend; choose one of {', '.join(BACKENDS)}")
    return backend


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Run every op on one backend: ``"cuda"``, ``"triton"``, ``"cpu"`` or ``"reference"``.

    It holds for the whole process (autograd's threads included) until the block ends. A call that the backend cannot
    serve raises RuntimeError with the reason.

    Raises:
        ValueError: ``backend`` is none of the four.
    """
    global _forced
    own = [_known(backend, "backend")]
    with _lock:
        _forced = (*_forced, own)
        _allow()
    try:
        yield
    finally:
        with _lock:
            _forced = tuple(other for other in _forced if other is not own)
            _allow()


@functools.cache
def extension() -> Any:
    """The C++ extension, which then serves plain calls of its own; None where it was not built."""
    global _extension
    if native.cpu_reason() is not None:
        return None
    with _lock:
        _extension = native.cpu()
        _allow()
    return _extension


def _allow() -> None:
    """Tell the C++ extension whether it may."""
    if _extension is not None:
        asked = _forced[-1][0] if _forced else _environment
        _extension.allow(asked in ("auto", "cpu"), asked != "auto")


def served() -> Counter[tuple[str, str]]:
    """How many calls each (op, backend) has served in this process."""
    with _lock:
        counts = Counter(_served)
    if _extension is not None:
        counts.update({(op, "cpu"): n for op, n in _extension.served().items() if n > 0})
    return counts


def explain(op: str | None = None) -> str:
    """What served the last call of each op (or of ``op``), and why the implementations before it did not.

    Raises:
        ValueError: there is no such op.
    """
    if op is not None and op not in OPS:
        raise ValueError(f"op: {op!r} is not an op; there are {', '.join(OPS)}")
    lines = []
    for name in [op] if op else OPS:
        last = OPS[name].last
        if last is None:
            lines.append(f"{name}: not called yet")
            continue
        shape = "x".join(map(str, last.shape))
        lines.append(f"{name}: {last.backend} ({shape} {str(last.dtype).removeprefix('torch.')} on {last.device.type})")
        lines.extend(f"  not {backend}: {reason}" for backend, reason in last.rejected)
    return "\n".join(lines)
