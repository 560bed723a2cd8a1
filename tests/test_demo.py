"""``rkfast demo`` as a user runs it, made small."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from rkfast import demo, dispatch, native
from tests.package.process import run

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

SMALL = ("--epochs", "1", "--model", "ho_resnet-4", "--method", "euler")


def test_runs_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    text = run(sys.executable, "-m", "rkfast", "demo", *SMALL, "--out", str(out), "--seed", "3")
    report = json.loads((out / "demo.json").read_text())
    assert (report["model"], report["epochs"], report["seed"]) == ("ho_resnet-4", 1, 3)
    assert report["options"] == {"method": "euler", "width": demo.WIDTH, "in_chans": 1}
    for name in ("stock", "fused"):
        result = report[name]
        assert len(result["losses"]) == report["steps"] == 1437 // demo.BATCH
        assert 0 <= result["test_accuracy"] <= 1
        low, high = result["step_ms_quartiles"]
        assert 0 < low <= result["step_ms"] <= high
        # Of 16 channels are the inputs of five convolutions and norms; three of them are read by both in one op.
        kept = 5 if name == "stock" or native.cpu_reason() else 3
        assert result["saved_bytes"] > kept * demo.BATCH * demo.WIDTH * demo.SIZE**2 * 4
        assert result["losses"][-1] < result["losses"][0]
        assert f"{result['test_accuracy']:.4f}" in text
    assert report["stock"]["losses"][0] == pytest.approx(report["fused"]["losses"][0], rel=1e-5)
    assert report["largest relative difference of losses"] < 0.1
    assert report["failure"] is None
    backend = "reference" if native.cpu_reason() else "cpu"
    assert {key.split(" by ")[1] for key in report["served"]} == {backend}
    if backend == "reference":
        assert "no kernels here" in text
    assert not (out / "steps.png").exists()
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "step/s" in text


@pytest.mark.parametrize("model", ("erknet-1x1_1x1", "irknet-2x1_2x1-ab"))
def test_other_families(model: str, tmp_path: Path) -> None:
    run(sys.executable, "-m", "rkfast", "demo", "--epochs", "1", "--model", model, "--out", str(tmp_path))
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["options"]["growth_rate"] == demo.GROWTH_RATE
    for name in ("stock", "fused"):
        assert report[name]["losses"][-1] < report[name]["losses"][0]
    op = "dense_block" if native.cpu_reason() is None else "bn_rk_sum"
    assert any(key.startswith(f"{op} by") for key in report["served"])


def test_step_sizes(tmp_path: Path) -> None:
    arguments = ("demo", "--epochs", "1", "--model", "tsc_resnet-8", "--out", str(tmp_path))
    text = run(sys.executable, "-m", "rkfast", *arguments)
    report = json.loads((tmp_path / "demo.json").read_text())
    assert report["options"] == {"in_chans": 1}
    assert list(report["step sizes"]) == ["layer1.0", "layer2.0", "layer3.0"]
    assert all(0 < size < 1 for size in report["step sizes"].values())
    assert f"evolution time T = {sum(report['step sizes'].values()):.3f}" in text
    assert f"wrote {tmp_path / 'demo.json'}, {tmp_path / 'demo.png'}, {tmp_path / 'steps.png'}" in text
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.skipif(native.cpu_reason() is not None, reason="the C++ kernels are not built")
def test_fails_where_the_reference_stands_in_for_a_kernel(tmp_path: Path) -> None:
    arguments = ("-m", "rkfast", "demo", *SMALL, "--out", str(tmp_path))
    text = run(sys.executable, *arguments, status=1, RKFAST_BACKEND="reference")
    assert "the reference served bn_relu_conv, " in text
    assert json.loads((tmp_path / "demo.json").read_text())["failure"]


def test_failure_names_the_op() -> None:
    assert demo.failure(Counter(), "cpu") is None
    assert demo.failure(Counter({("rk_sum", "cpu"): 3}), "cpu") is None
    found = demo.failure(Counter({("rk_sum", "cpu"): 3, ("rk_sum_backward", "reference"): 1}), "cpu")
    if native.cpu_reason() is None:
        assert found is not None
        assert found.startswith("the reference served rk_sum_backward, for which a kernel is built")
        assert demo.built("cpu") == set(dispatch.OPS)
    else:
        assert found is None
    assert demo.built("meta") == set()


@pytest.mark.parametrize("package", ("sklearn", "tqdm", "matplotlib"))
def test_a_missing_extra_is_named(package: str, tmp_path: Path) -> None:
    script = f"import sys; sys.modules[{package!r}] = None; from rkfast.cli import main; sys.exit(main())"
    text = run(sys.executable, "-c", script, "demo", *SMALL, "--out", str(tmp_path), status=1)
    assert "install it with: pip install 'rkfast[demo]'" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (("--model", "ho_resnet-12"), "layers: 12 does not fit rk4"),
        (("--method", "rk5"), "method: 'rk5' is not"),
        (("--device", "gpu"), "device"),
        (("--device", "mps" if torch.cuda.is_available() else "cuda"), "rkfast demo: "),
        (("--epochs", "0"), "expected at least 1, got 0"),
    ),
)
def test_bad_arguments_are_named(arguments: tuple[str, str], message: str, tmp_path: Path) -> None:
    text = run(sys.executable, "-m", "rkfast", "demo", *arguments, "--out", str(tmp_path), status=2)
    assert message in text
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_digits() -> None:
    (images, labels), (test_images, test_labels) = demo.digits(0, torch.device("cpu"))
    assert images.shape == (1437, 1, 32, 32)
    assert test_images.shape == (360, 1, 32, 32)
    assert sorted(set(labels.tolist())) == sorted(set(test_labels.tolist())) == list(range(10))
    assert torch.equal(images, demo.digits(0, torch.device("cpu"))[0][0])
    assert not torch.equal(images, demo.digits(1, torch.device("cpu"))[0][0])
    assert images.mean().abs() < 1e-5
    every = torch.cat([images, test_images]).flatten(1)
    assert len(every.unique(dim=0)) == len(every)  # no image is in both parts
