"""What this installation can do, and the reason for everything that it cannot: ``rkfast info``."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

import rkfast
from rkfast import dispatch, native


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _asked() -> str:
    asked = os.environ.get("RKFAST_BACKEND") or "auto"
    if asked == "auto":
        return "chosen per call; RKFAST_BACKEND forces one"
    wrong = (
        "" if asked in dispatch.BACKENDS else f": no backend, so every call fails; {', '.join(dispatch.BACKENDS)} are"
    )
    return f"RKFAST_BACKEND={asked}{wrong}"


def versions() -> dict[str, str]:
    return {
        "rkfast": f"{rkfast.__version__} in {Path(rkfast.__file__).parent}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}",
        "triton": _version("triton") + (", interpreted (TRITON_INTERPRET=1)" if native.triton_interprets() else ""),
        "backend": _asked(),
        "Python": platform.python_version(),
        "platform": platform.platform(),
    }


def built() -> dict[str, str]:
    record = native.build()
    if not record:
        return {"record": "none; this is a source tree that was never built"}
    lines = {"torch": str(record.get("torch"))}
    if record.get("torch") not in (None, torch.__version__):
        lines["torch"] += f", but this is torch {torch.__version__}; {native.REBUILD}"
    for key in ("compiler", "cuda", "commit"):
        lines[key] = str(record.get(key) or "none")
    lines["isa"] = ", ".join(record.get("isa", ())) or "none"
    for name in ("_C", "_cuda"):
        part = record.get(name, {})
        lines[f"rkfast.{name}"] = "built" if part.get("built") else f"not built: {part.get('reason', 'no record')}"
    return lines


def devices() -> dict[str, str]:
    found = {
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    }
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    if len(found) == 1:
        found["cuda"] = "none"
    return found


def reason(op: dispatch.Op, backend: str) -> str | None:
    """Why ``backend`` cannot serve ``op`` in this process, whatever the call; None where it can."""
    found = [i for i in op.implementations if i.backend == backend]
    if not found:
        return "there is no such implementation"
    device = "cpu" if backend == "cpu" or (backend == "triton" and native.triton_interprets()) else "cuda"
    why = dispatch.backend_reason(backend, device, explicit=True)
    if why is not None:
        return why
    try:
        getattr(importlib.import_module(found[0].module), found[0].function)
    except (ImportError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def table() -> Iterator[str]:
    """Op x backend: yes, or no and the number of the reason below."""
    reasons: dict[str, int] = {}
    width = max(map(len, dispatch.OPS))
    yield " ".join([" " * width, *(f"{backend:10}" for backend in dispatch.BACKENDS)]).rstrip()
    for name, op in dispatch.OPS.items():
        cells = []
        for backend in dispatch.BACKENDS:
            why = reason(op, backend)
            cells.append("yes" if why is None else f"no ({reasons.setdefault(why, len(reasons) + 1)})")
        yield " ".join([f"{name:{width}}", *(f"{cell:10}" for cell in cells)]).rstrip()
    yield ""
    for why, number in reasons.items():
        yield f"({number}) {why}"


def main() -> int:
    for title, found in (("", versions()), ("Build", built()), ("Devices", devices())):
        if title:
            print(f"\n{title}")
        width = max(map(len, found))
        for key, value in found.items():
            print(f"{key:{width}}  {value}")
    print("\nOp x backend")
    print("\n".join(table()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
