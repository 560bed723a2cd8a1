"""``rkfast train``, ``eval``, ``predict`` and ``plot run`` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rkfast import cli
from rkfast.commands import train
from rkfast.train import log
from tests import libraries

libraries.prepare()  # torchmetrics imports torchvision
for package in ("safetensors", "torchmetrics", "sklearn"):
    pytest.importorskip(package)
SMALL = ("train", "--recipe", "digits", "--model", "resnet-8", "--options", "{}", "--device", "cpu", "--batch", "64")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert cli.main([*SMALL, "--epochs", "4", "--lr", "0.05", "--out", str(folder)]) == 0
    torch.set_num_threads(threads)
    return folder


def test_train(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = log.read(run / log.METRICS)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4] and rows[-1]["test_error"] < 50
    assert cli.main([*SMALL, "--epochs", "4", "--lr", "0.05", "--out", str(run)]) == 0  # finished: nothing but the end
    out = capsys.readouterr()
    assert out.out == (
        f"test error {rows[-1]['test_error']:.2f} %, at best {min(r['test_error'] for r in rows):.2f} %\nwrote {run}\n"
    )
    assert "epoch" not in out.err


def test_plain_lines_when_it_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, "--epochs", "1", "--out", str(tmp_path)]) == 0
    row = log.read(tmp_path / log.METRICS)[0]
    assert f"epoch 1, lr {row['lr']:.4g}, train_loss {row['train_loss']:.4g}, train_error" in capsys.readouterr().err


def test_values_in_place_of_the_recipes(tmp_path: Path) -> None:
    def wanted(*argv: str) -> train.Recipe:
        parser = train.argparse.ArgumentParser()
        train.add_arguments(parser)
        return train.wanted(parser.parse_args(argv))

    assert wanted().name == "digits"
    found = wanted("--drops", "1", "0.5", "--no-nesterov", "--augment", "none")
    assert (found.drops, found.nesterov, found.augment) == ((1, 0.5), False, None)
    found = wanted("--model", "resnet-14", "--options", '{"shortcut": "a"}')
    assert (found.model, found.options["shortcut"]) == ("resnet-14", "a")
    assert wanted("--drops").drops == ()
    file = tmp_path / "mine.toml"
    file.write_text('recipe = "digits"\nlr = 0.25\nepochs = 7\n')
    found = wanted("--config", str(file), "--epochs", "8")
    assert (found.lr, found.epochs, found.batch) == (0.25, 8, wanted().batch)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--recipe", "digit"], "digits"),
        (["--options", "3"], "--options: expected an object"),
        (["--options", "{"], "--options: '{' is no JSON"),
        (["--config", "none.toml"], "none.toml"),
        (["--model", "vgg16"], "name: 'vgg16' is not a model"),
        (["--batch", "2000"], "batch: 2000 images are more than the 1437 of digits"),
        (["--device", "tpu"], "device: 'tpu' is not one"),
        (["--config", "x", "--recipe", "digits"], "--config: goes without --recipe"),
    ),
)
def test_what_train_refuses(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--out", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_training_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*SMALL, "--epochs", "1", "--lr", "1e6", "--weight-decay", "1e3", "--out", str(tmp_path)]) == 1
    assert "lower the learning rate" in capsys.readouterr().err


@pytest.mark.parametrize("weights", ("last", "best"))
def test_eval(weights: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "eval.json"
    arguments = ["--weights", weights, "--sigmas", "0", "1", "--json", str(file)]
    assert cli.main(["eval", str(run), *arguments]) == 0
    found = json.loads(file.read_text())
    rows = log.read(run / log.METRICS)
    error = rows[-1]["test_error"] if weights == "last" else min(row["test_error"] for row in rows)
    for name in ("fused", "stock"):
        assert found[name]["error"] == pytest.approx(error, abs=0.3)  # an image on the edge
        clean, noisy = found[name]["noise"]
        assert 100 * (1 - clean["accuracy"]) == pytest.approx(found[name]["error"], abs=1e-4)
        assert noisy["accuracy"] < clean["accuracy"]
    assert found["fused beside stock"]["probability"] < 1e-4
    out = capsys.readouterr().out
    assert "top-1 error with noise of 1, %" in out and "fused beside stock: probabilities differ by at most" in out


def test_predict(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i in range(8):
        pixels = torch.from_numpy(digits.images[i] / 16 * 255).round().byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    files = [str(tmp_path / f"{i}.png") for i in range(8)]
    assert cli.main(["predict", str(run), *files, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = [line.split(": ")[1].split(", ")[0].split() for line in lines]
    right = [digit == str(digits.target[i]) for i, (digit, _) in enumerate(first)]
    assert len(lines) == 8 and sum(right) >= 6
    (tmp_path / "no.png").write_text("no image")
    for file, message in (("no.png", "cannot identify"), ("none.png", "No such file")):
        assert cli.main(["predict", str(run), str(tmp_path / file)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["predict", str(run), files[0], "--top", "0"]) == 2


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["eval", str(tmp_path)], ["predict", str(tmp_path), "x.png"], ["plot", "run", str(tmp_path)]):
        assert cli.main(command) == 2
        assert str(tmp_path) in capsys.readouterr().err


def test_plot_run(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from rkfast.plot import runs

    out = tmp_path / "run.png"
    assert cli.main(["plot", "run", str(run), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    found = runs.rows(run)
    sizes = [{**row, "step_sizes": {"a": 0.1 * row["epoch"], "b": 0.5}} for row in found]
    figure = runs.draw({"plain": found, "stepped": sizes})
    loss, error, rate, speed, memory, steps = figure.axes
    assert [list(line.get_ydata()) for line in loss.lines[:2]] == [
        [row[f"{part}_loss"] for row in found] for part in ("train", "test")
    ]
    assert len(error.lines) == 4 and len(rate.lines) == len(speed.lines) == len(memory.lines) == 2
    assert list(speed.lines[0].get_ydata()) == [row["images_per_second"] for row in found]
    assert [list(line.get_ydata()) for line in steps.lines] == [[0.1 * row["epoch"] for row in found], [0.5] * 4]
    assert len(runs.draw({"plain": found}).axes) == 5
