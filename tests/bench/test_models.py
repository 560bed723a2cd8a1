"""Whole networks: the table, the gate, and peers that may be missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rkfast
from rkfast import cli
from rkfast.bench import models, run
from rkfast.bench.contest import Contest
from tests.bench.test_run import PEER, ROW
from tests.package.process import ROOT, python

TINY = {case.id: case for family in models.TINY for case in models.cases(family, "tiny", "cpu")}


def measured(folder: Path, family: str, *args: str, peers: str = "eager", status: int = 0) -> dict[str, Any]:
    given = [
        "models", family, "--size", "tiny", "--device", "cpu", "--peers", peers, "--threads", "1", "--seconds", "0",
        "--malloc", "current", "--json", str(folder / "found.json"), *args,
    ]  # fmt: skip
    assert run.main(given) == status
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("family", models.TINY)
def test_every_step_and_inference_has_a_row(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = measured(tmp_path, family, peers="eager,eager_channels_last")
    name = models.TINY[family].name
    levels = ("", ", min memory")[: len(models.TINY[family].memory)]
    training = [(mode, memory) for mode in ("forward_grad", "backward", "both") for memory in levels]
    found = [(row["mode"], row["backend"]) for row in document["rows"]]
    served = found[0][1]
    assert served in ("cpu", "reference")
    assert found[:-1] == [*((mode, served + memory) for mode, memory in training), ("forward", served)]
    assert found[-1][0] == "forward"
    assert found[-1][1].endswith("folded")
    for row in document["rows"]:
        assert set(row) == ROW
        assert row["op"] == name
        assert row["case"] == ("inference" if row["mode"] == "forward" else "train")
        assert set(row["peers"]) == {"eager", "eager_channels_last"}
        assert set(row["peers"]["eager"]) == PEER
        assert row["peers"]["eager"]["compile_s"] is None
        assert row["first_s"] > 0
        assert row["peers"]["eager"]["first_s"] > 0
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert 0 < row["ms_low"] <= row["ms_p50"] <= row["ms_high"]
        assert row["bytes"] is row["gb_per_s"] is row["copy_share"] is None
        if row["mode"] == "both":
            assert 0 < row["saved_bytes"] < row["peers"]["eager"]["saved_bytes"]
    assert capsys.readouterr().out.count(f"\n| {name} | ") == len(found)


def test_min_memory_saves_less(tmp_path: Path) -> None:
    rows = measured(tmp_path, "densenet", "--filter", "/train")["rows"]
    speed, least = (row["saved_bytes"] for row in rows if row["mode"] == "both")
    assert least < speed


def _scale_logits(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, given, logits: logits * (1 + 1e-4))


def _scale_one_gradient(model: nn.Module) -> None:
    next(p for p in model.parameters() if p.dim() == 1).register_hook(lambda gradient: 1.01 * gradient)


def _move_statistics_too_far(model: nn.Module) -> None:
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).momentum = 0.5


@pytest.mark.parametrize(
    ("spoil", "case", "where"),
    (
        (_scale_logits, "inference", "outputs"),
        (_scale_logits, "train", "outputs"),
        (_scale_one_gradient, "train", "gradients"),
        (_move_statistics_too_far, "train", "buffers"),
    ),
)
def test_a_wrong_network_has_no_figure_and_fails_the_run(
    spoil: Callable[[nn.Module], None],
    case: str,
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = models.Networks._contender

    def wrong(*args: Any) -> models.Steps:
        steps = right(*args)
        spoil(steps.model)
        return steps

    monkeypatch.setattr(models.Networks, "_contender", wrong)
    document = measured(tmp_path, "erknet", "--filter", case, status=1)
    assert document["rows"] == []
    assert all(verdict["failure"].startswith(where) for verdict in document["gate"])
    table = capsys.readouterr().out
    assert "**wrong, no figure**: erknet-2x1_1x1/" in table
    assert "| erknet" not in table


def test_a_network_that_raises_fails_the_run_and_not_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = models.Networks._contender

    def broken(self: models.Networks, variant: models.Variant, *rest: Any) -> models.Steps:
        if variant.name == "folded":
            raise RuntimeError("broken")
        return right(self, variant, *rest)

    monkeypatch.setattr(models.Networks, "_contender", broken)
    document = measured(tmp_path, "erknet", "--filter", "inference", status=1)
    assert document["rows"]
    assert [g["failure"] for g in document["gate"] if "folded" in g["backend"]] == ["RuntimeError: broken"]
    assert [g["failure"] for g in document["gate"] if "folded" not in g["backend"]] == [None]


@pytest.mark.parametrize("times", (1, models.REDRAWN, 1 + models.REDRAWN))
def test_gradients_are_wrong_where_they_are_on_every_batch(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right, made = models.Networks._contender, 0

    def wrong_at_first(*args: Any) -> models.Steps:
        nonlocal made
        made += 1
        steps = right(*args)
        if made <= times:
            _scale_one_gradient(steps.model)
        return steps

    monkeypatch.setattr(models.Networks, "_contender", wrong_at_first)
    case = TINY["erknet-2x1_1x1/2x3x8x8/train"]
    verdict = models.Networks(case, Contest("cpu", ("auto",), (), 0.0, 1))._verdict(next(case.variants()))
    assert (verdict.failure is None) == (times <= models.REDRAWN)
    assert made == min(times, models.REDRAWN) + 1


def test_a_library_that_is_missing_is_named_and_the_rest_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("openvino", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    document = measured(tmp_path, "erknet", peers="eager,openvino,onnxruntime")
    assert all(set(row["peers"]) == {"eager"} for row in document["rows"])
    reasons = {v["id"].rpartition("/")[2]: v["failed_peers"] for v in document["gate"]}
    assert set(reasons["inference"]) == {"openvino", "onnxruntime"}
    assert reasons["train"] == {}
    said = capsys.readouterr().out
    assert "openvino could not run erknet-2x1_1x1/2x3x8x8/inference: MissingExtra: openvino is not installed" in said
    assert "pip install 'rkfast[bench]'" in said


@pytest.mark.parametrize("library", ("openvino", "onnxruntime"))
def test_another_library_is_a_peer(library: str, tmp_path: Path) -> None:
    pytest.importorskip(library)
    if library == "onnxruntime":
        pytest.importorskip("onnxscript")
    row, _ = measured(tmp_path, "irknet", "--filter", "/inference", peers=library)["rows"]
    assert row["peers"][library]["speedup"] > 0
    assert row["peers"][library]["compile_s"] > 0
    assert row["peers"][library]["peak_bytes"] is None


def test_a_peer_with_other_logits_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(networks: models.Networks) -> Callable[[], Any]:
        return lambda: 1.01 * networks.stock(networks.images).detach().numpy()

    monkeypatch.setattr(models, "_openvino", other)
    document = measured(tmp_path, "erknet", "--filter", "/inference", peers="openvino")
    assert all(row["peers"] == {} for row in document["rows"])
    assert "its results are off by 1.0e-02" in document["gate"][0]["failed_peers"]["openvino"]


@pytest.mark.parametrize("id", TINY)
def test_networks_are_fed_images_and_have_seen_some(id: str) -> None:
    networks = models.Networks(TINY[id], Contest("cpu", ("auto",), (), 0.0, 1))
    assert 1 < networks.images.std() < 2
    norms = [m for m in networks.stock.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.momentum is not None for norm in norms)
    assert all(norm.num_batches_tracked == models.SETTLING for norm in norms)
    assert not any(torch.equal(norm.running_var, torch.ones_like(norm.running_var)) for norm in norms)
    again = models.Networks(TINY[id], Contest("cpu", ("auto",), (), 0.0, 1))
    assert torch.equal(networks.images, again.images)
    for a, b in zip(networks.stock.state_dict().values(), again.stock.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_sizes() -> None:
    script = str(ROOT / "bench" / "run.py")
    listed = {
        size: python(script, "models", "--list", "--device", "cpu", "--size", size).split()
        for size in ("quick", "full")
    }
    assert len(listed["quick"]) == 16
    assert set(listed["quick"]) < set(listed["full"])
    assert [name for name in listed["full"] if name in listed["quick"]] == listed["quick"]
    assert "densenet121/4x3x224x224/train" in listed["quick"]
    assert "irknet-5x1_5x1_5x1-ab/32x3x32x32/inference" in listed["full"]
    assert "'vgg' is no family of models; there are densenet, erknet, irknet, ho_resnet, tsc, resnet" in python(
        script, "models", "vgg", status=2
    )


def test_command_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "models", "erknet", "--list", "--device", "cuda"]) == 0
    listed = capsys.readouterr().out.split()
    shapes = ("7x1_7x1_7x1/64x3x32x32", "3x1_3x1_4x1_2x1-b/256x3x224x224")
    assert listed == [f"erknet-{shape}/bfloat16/{mode}" for shape in shapes for mode in ("train", "inference")]


def test_the_networks_of_a_gpu_are_made() -> None:
    every = [case for family in models.FULL["cuda"] for case in models.cases(family, "full", "cuda")]
    assert len({case.id for case in every}) == len(every)
    with torch.device("meta"):
        for case in every:
            case.create(fused=True)


@pytest.mark.parametrize("case", ("train", "inference"))
def test_on_a_gpu_the_fastest_of_ours_is_graphed_too(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = []

    def graphed(model: nn.Module, sample: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        captured.append((model, sample.shape))
        return lambda images: model(images)

    every = models.Networks._variants

    def as_on_a_gpu(networks: models.Networks) -> list[models.Variant]:
        networks.graphs = True
        return every(networks)

    monkeypatch.setattr(rkfast, "graphed", graphed)
    monkeypatch.setattr(models.Networks, "_variants", as_on_a_gpu)
    rows = measured(tmp_path, "erknet", "--filter", case)["rows"]
    graphs = [row for row in rows if row["backend"].endswith("graphed")]
    assert {row["mode"] for row in graphs} == {row["mode"] for row in rows}
    assert {"folded" in row["backend"] for row in graphs} == {case == "inference"}
    assert all("memory" not in row["backend"] and row["peak_bytes"] is None for row in graphs)
    assert len(captured) >= 2  # the contender, and what the gate compares
    assert {shape for _, shape in captured} == {(2, 3, 8, 8)}
    assert {model.training for model, _ in captured} == {case == "train"}
