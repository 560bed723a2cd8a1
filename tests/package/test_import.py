from __future__ import annotations

import pytest

from tests.package.process import python

# What `import rkfast` must not touch: importing it, or starting CUDA or another process (a compiler), is an error.
BLOCK = """
import os, subprocess, sys, time
import torch
BLOCKED = "triton torchvision timm lightning transformers accelerate sklearn tqdm matplotlib torchmetrics rich".split()
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED or name in (
            "rkfast._C", "rkfast._cuda",
            "torch.utils.cpp_extension", "torch.utils.flop_counter", "torch._inductor.codecache"
        ):
            raise AssertionError(f"imported {name}")
def refuse(*args, **kwargs):
    raise AssertionError(f"called with {args}")
sys.meta_path.insert(0, Blocked())
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse
os.system = subprocess.Popen = refuse
"""


def test_import_needs_torch_alone() -> None:
    code = BLOCK + "start = time.perf_counter(); import rkfast; print(time.perf_counter() - start)"
    seconds = float(python("-c", code))
    print(f"import rkfast takes {seconds:.3f} s beyond import torch")
    assert seconds < 2


@pytest.mark.parametrize(
    "attempt", ("import triton", "import rkfast._C", "import torchvision", "torch.cuda.init()", "os.system('true')")
)
def test_the_block_blocks(attempt: str) -> None:
    assert "AssertionError" in python("-c", f"{BLOCK}\nimport rkfast\n{attempt}", status=1)


def test_import_without_numpy() -> None:
    # torch itself warns and goes on.
    code = "import sys; sys.modules['numpy'] = None; import torch, rkfast; print(rkfast.ops.rk_sum.__name__)"
    assert python("-W", "ignore", "-c", code).strip().endswith("rk_sum")


def test_a_backend_is_loaded_at_first_need() -> None:
    code = (
        "import sys, torch, rkfast\n"
        "assert not [m for m in sys.modules if m.startswith('rkfast.') and m.endswith(('.cpu', '.triton', '.cuda'))]\n"
        "x = torch.ones(1, 1, 2, 2)\n"
        "with rkfast.use('reference'): rkfast.ops.rk_sum([x], [1.0])\n"
        "assert 'rkfast.ops.rk_sum.cpu' not in sys.modules"
    )
    python("-c", code)
