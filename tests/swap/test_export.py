"""rkfast.export: files of operators of PyTorch or ONNX alone, which compute what the model does."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rkfast
from rkfast import extras
from rkfast.swap.export import FORMATS
from tests.libraries import network
from tests.swap.test_fold import made, settled

NETS = ("resnet", "densenet", "stepped", "ho_resnet-10", "erknet", "irknet", "tsc_densenet-10")


def needs(format: str) -> None:
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)


@pytest.mark.parametrize("name", NETS)
def test_pt2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = made(name), tmp_path / "net.pt2"
    state = copy.deepcopy(model.state_dict())
    error = rkfast.export(model, path, torch.randn(1, 3, 12, 10))
    assert 0 <= error < 1e-5  # the same kernels may run
    assert capsys.readouterr().out == f"{path}: pt2, any batch, largest error {error:.1e} of the largest result\n"
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    program = torch.export.load(path)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets and not [t for t in targets if "rkfast" in t or "mkldnn" in t]
    x = torch.randn(3, 3, 12, 10)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ("resnet", "densenet", "irknet"))
def test_onnx(name: str, tmp_path: Path) -> None:
    needs("onnx")
    import onnx

    path = tmp_path / "net.onnx"
    assert rkfast.export(rkfast.fuse(made(name)), path, torch.randn(2, 3, 12, 10)) < 1e-5
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}
    if name == "resnet":
        assert "BatchNormalization" not in {node.op_type for node in graph.node}
    assert list(tmp_path.iterdir()) == [path]


def test_aoti(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    path = tmp_path / "net.pt2"
    try:
        error = rkfast.export(model, str(path), torch.randn(2, 3, 4, 4), format="aoti")
    except RuntimeError as failure:
        if "needs a C++ compiler" not in str(failure):
            raise
        pytest.skip(str(failure))
    assert error < 1e-5
    x = torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(torch._inductor.aoti_load_package(str(path))(x), model(x))


class Fixed(nn.Module):
    """Knows its batch, and has two inputs and results."""

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"a": x.reshape(2, -1) + 1, "b": [y * 2]}


class Ours(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return rkfast.ops.rk_sum([x, x], [1.0, 2.0])


def test_a_folded_and_a_fixed_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(2, 3, 12, 10)
    folded = rkfast.fold(made("resnet"))
    folded(x)
    assert rkfast.export(folded, tmp_path / "folded.pt2", x) < 1e-5
    assert "any batch" in capsys.readouterr().out
    assert rkfast.export(Fixed(), tmp_path / "fixed.pt2", torch.ones(2, 3), torch.ones(2, 1)) == 0
    assert "this batch alone" in capsys.readouterr().out
    found = torch.export.load(tmp_path / "fixed.pt2").module()(torch.ones(2, 3), torch.ones(2, 1))
    assert found["b"][0].eq(2).all()


def test_errors_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, path = made("resnet"), torch.randn(2, 3, 12, 10), tmp_path / "net.pt2"
    path.write_text("before")
    cases: list[tuple[Any, ...]] = [
        ((3, path, x), {}, TypeError, r"model: expected an nn\.Module, got int"),
        ((model, 3, x), {}, TypeError, "path: expected a path, got int"),
        ((model, path), {}, ValueError, "inputs: expected what the network is called with"),
        ((model, path, "x"), {}, TypeError, r"inputs\[0\]: expected a Tensor, got str"),
        ((model, tmp_path / "net.txt", x), {}, ValueError, r"path: 'net\.txt' ends in no format"),
        ((model, path, x), {"format": "tflite"}, ValueError, "format: expected one of onnx, pt2, aoti, got 'tflite'"),
        ((model, path, x), {"format": "onnx"}, ValueError, r"path: expected \.onnx at its end for onnx"),
        ((model, tmp_path / "no" / "net.pt2", x), {}, ValueError, "path: there is no folder"),
        ((Ours(), path, x), {}, RuntimeError, r"model: it calls rkfast\.rk_sum"),
    ]
    for args, options, error, message in cases:
        with pytest.raises(error, match=message):
            rkfast.export(*args, **options)

    def wrong(*_: Any) -> Any:
        return lambda inputs: [torch.zeros(len(inputs[0]), 5)]

    monkeypatch.setitem(rkfast.swap.export.__globals__["_WRITERS"], "pt2", wrong)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="pt2: the file's results are off by 1"):
        rkfast.export(model, path, x)
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"] and path.read_text() == "before"
    assert set(FORMATS) == {"onnx", "pt2", "aoti"}


def test_a_missing_package_or_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made("resnet"), torch.randn(2, 3, 12, 10)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(extras.MissingExtra, match=r"onnx is not installed; .*'rkfast\[export\]'"):
        rkfast.export(model, tmp_path / "net.onnx", x)
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(RuntimeError, match="format: aoti needs a C"):
        rkfast.export(model, tmp_path / "net.pt2", x, format="aoti")


@pytest.mark.parametrize("address", ("torchvision.resnet18", "timm.densenet121"))
def test_networks_of_libraries(address: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert rkfast.export(settled(network(address)), tmp_path / "net.pt2", torch.randn(1, 3, 64, 64)) < 1e-4
