"""What all figures have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from rkfast import cli, plot

# Small, and as different from the defaults as they can be.
ARGUMENTS = {
    "figure4": ["--dataset", "svhn"],
    "order": ["--methods", "rk4", "verner89", "--problem", "limit cycle"],
    "region": ["--methods", "dopri5"],
    "increments": ["--model", "ho_resnet-26", "--options", '{"method": "fehlberg45", "width": 4}', "--eval"],
    "trajectory": ["--method", "rk4", "--steps", "0.1", "--pair", "dopri5", "--tol", "1e-4", "--end", "1"],
    "stability": ["--model", "resnet-8", "--images", "digits", "--options", '{"in_chans": 1}'],
}


@pytest.mark.parametrize("figure", ARGUMENTS)
def test_every_figure_is_written(figure: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / f"{figure}.png"
    assert cli.main(["plot", figure, *ARGUMENTS[figure], "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (
            ["order", "--methods", "rk4", "rk5"],
            "method: 'rk5' is not a Runge-Kutta method; choose one of euler, midpoint",
        ),
        (["region", "--methods", "nystroem"], "method: 'nystroem' is not a Runge-Kutta method; choose one of euler"),
        (["trajectory", "--pair", "rk4"], "tol: rk4 has no embedded weights"),
        (["trajectory", "--end", "nan"], "t1: expected a finite number, got nan"),
        (["trajectory", "--steps", "0"], "h: expected a finite number above 0, got 0.0"),
        (["trajectory", "--tol", "0"], "tol: expected a finite number above 0, got 0.0"),
        (["trajectory", "--steps", "1e-6"], "h: 1e-06 makes 3.3e+06 steps from 0 to 3.3; take a larger h"),
        (["trajectory", "--end", "30000", "--steps", "5"], "h: with steps of 5 y is no longer finite at t ="),
        (["increments", "--model", "densenet-7"], "model: DenseNet has no RKStep"),
        (["increments", "--model", "vgg16"], "name: 'vgg16' is not a model"),
        (["increments", "--options", "width=3"], "--options 'width=3' is no JSON: Expecting"),
        (["increments", "--options", "[3]"], "--options '[3]': expected an object"),
        (["increments", "--options", '{"wide": 3}'], "wide: not an option of ho_resnet"),
        (["increments", "--options", '{"width": "3"}'], "--model ho_resnet-58: width: expected an int"),
        (["stability", "--model", "densenet-7"], "block1 is a DenseBlock, whose layers do not add"),
        (["stability", "--model", "ho_resnet-18"], "model: HOResNet has no residual blocks"),
        (["noise", "--options", "3"], "--options '3': expected an object"),
        (["noise", "--weights", "none.pt"], "--weights none.pt cannot be loaded: [Errno 2] No such file"),
        (["noise", "--model", "resnet-8"], "--model resnet-8: controller: not an option of resnet"),
        (["noise", "--model", "tsc_resnet-9"], "name: depth: expected 2 + 6 * blocks"),
        (["increments", "--weights", "none.pt"], "--weights none.pt cannot be loaded: [Errno 2] No such file"),
    ),
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main(["plot", *arguments, "--out", str(tmp_path / "new" / "figure.png")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("rkfast plot: ") and message in printed, printed
    assert not list(tmp_path.iterdir())


def test_help_lists_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["plot", "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert all(f"\n    {name}" in printed for name in plot.FIGURES)
    # Those that read a file or train have files of their own; run is in tests/commands/test_train.py.
    assert [*ARGUMENTS, "steps", "stacking", "noise", "depth", "run"] == list(plot.FIGURES)
