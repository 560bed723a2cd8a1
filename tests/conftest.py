import pytest
import torch

from rkfast import dispatch

# A compiler sees the ops, not what serves them: plain PyTorch is asked where there is nothing else.
KERNELS_ONLY = {"test_compile_fullgraph"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = getattr(metafunc.cls, "CASES", None)
    if cases is not None and "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(cases.values()), ids=list(cases))
    if "target" in metafunc.fixturenames:
        from tests.ops.tester import TARGETS

        marks = {"cuda": [pytest.mark.gpu]}
        asked = TARGETS
        if metafunc.function.__name__ in KERNELS_ONLY:
            asked = [t for t in TARGETS if t[0] != "reference"] or TARGETS
        targets = [pytest.param((b, d), id=f"{b}-{d}", marks=marks.get(d, [])) for b, d in asked]
        served = getattr(metafunc.module, "SERVED", None)  # backends that have the op
        metafunc.parametrize("target", [t for t in targets if served is None or t.values[0][0] in served])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that take minutes begin first: at the end the other workers would wait for them."""
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)


@pytest.fixture(autouse=True)
def _as_it_was() -> object:
    """No test leaves a mode on."""
    threads, default = torch.get_num_threads(), torch.get_default_dtype()
    yield
    assert dispatch.forced() == (None if dispatch._environment == "auto" else dispatch._environment)
    assert not torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.set_default_dtype(default)
