"""Every kernel once, on small odd shapes, through the gate: what ``compute-sanitizer`` watches in ``bench/gpu.sh``."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path

if not __package__:
    import runpy

    sys.path.pop(0)  # this folder
    runpy.run_path(str(Path(__file__).with_name("checkout.py")))
    __package__ = "rkfast.bench"

import torch

from rkfast import dispatch

from . import contest, gate
from .ops import OPS
from .workload import DTYPES, Case, arranged, dense


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    wrong = 0
    for backend in contest.backends(device):
        for cases in OPS.values():
            for tiny, dtype, channels_last in itertools.product(cases("tiny", device), DTYPES[device], (True, False)):
                case = dataclasses.replace(tiny, dtype=dtype, channels_last=channels_last)
                wrong += not _passes(case, device, backend)
    print(f"served: {dict(dispatch.served())}; {wrong} wrong")
    return int(wrong > 0)


def _passes(case: Case, device: str, backend: str) -> bool:
    inputs = arranged(case.draw(device), case.channels_last)
    # A slice of the channels: rows farther apart than they are long.
    sliced = inputs.map(lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]], lambda t: t)
    passed = True
    for given in (inputs, sliced):
        with contest.forced(backend):
            verdict = gate.check(case, given, dense(case.seed(device), case.channels_last))
        if verdict.failure is not None:
            print(f"{case.id} on {backend}: {verdict.failure}")
            passed = False
    return passed


if __name__ == "__main__":
    sys.exit(main())
