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
    parser.add_argument("names", nargs="*", metavar="OP", help="all by default")
    args = parser.parse_args()
    device = args.device
    wrong = 0
    for op in args.names or OPS:
        for backend in contest.serving(contest.backends(device), op):
            every = itertools.product(OPS[op]("tiny", device), DTYPES[device], (True, False))
            for tiny, dtype, channels_last in every:
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
        try:
            with contest.forced(backend):
                verdict = gate.check(case, given, dense(case.seed(device), case.channels_last))
        except Exception as error:
            verdict = contest.raised(error)
        if verdict.failure is not None:
            print(f"{case.id} on {backend}: {verdict.failure}")
            passed = False
    return passed


if __name__ == "__main__":
    # Which convolutions of eager PyTorch take tf32 is cuDNN's choice, and the budget is twice their error.
    torch.backends.cudnn.allow_tf32 = False
    sys.exit(main())
