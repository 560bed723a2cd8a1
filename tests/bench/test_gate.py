"""A wrong result is refused, and has no figure."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rkfast.bench import gate, run, sanitize
from rkfast.bench.ops import OPS, rk_sum
from rkfast.bench.ops.rk_sum import RkSum
from rkfast.bench.workload import DTYPES, Case, arranged

TINY = {case.id: case for cases in OPS.values() for case in cases("tiny", "cpu")}


@pytest.mark.parametrize("id", TINY)
def test_right_results_pass(id: str) -> None:
    case = TINY[id]
    inputs = arranged(case.draw("cpu"), case.channels_last)
    verdict = gate.check(case, inputs, case.seed("cpu"))
    assert verdict.failure is None
    assert verdict.eager > 0


class _Scale(torch.autograd.Function):
    """The value as it is, its gradient scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return ctx.factor * grad, None


def _one_element(out: Tensor, by: float) -> Tensor:
    wrong = out.clone()
    wrong.view(-1)[7] += by * out.detach().abs().max()
    return wrong


WRONG: dict[str, tuple[Callable[[Tensor, torch.dtype], Tensor], str]] = {
    "one element": (lambda out, dtype: _one_element(out, 8 * torch.finfo(dtype).eps), "outputs"),
    "NaN": (lambda out, dtype: torch.cat([out[:1], out[1:] * float("nan")]), "outputs"),
    "shape": (lambda out, dtype: out[:1].expand_as(out)[:, :, :, :-1], "outputs"),
    "gradient": (lambda out, dtype: _Scale.apply(out, 1 + 16 * torch.finfo(dtype).eps), "gradients"),
}


def test_sanitize_forces_only_what_an_op_implements_and_outlives_what_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize.contest, "backends", lambda device: ("cuda", "reference"))
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--device", "cpu", "conv"])
    assert sanitize.main() == 0
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--device", "cpu", "channel_moments"])
    assert sanitize.main() == 1
    said = capsys.readouterr().out
    assert "on cuda: RuntimeError: rkfast.channel_moments" in said
    assert "on reference" not in said


@pytest.mark.parametrize("dtype", DTYPES["cpu"], ids=str)
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_results_are_refused(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, where = WRONG[kind]
    right = rk_sum.rk_sum
    case = Case(RkSum(3), (2, 3, 5, 3), dtype, channels_last=False)
    inputs, seed = case.draw("cpu"), case.seed("cpu")
    if kind == "shape":
        monkeypatch.setattr(gate.torch.autograd, "grad", lambda *_: [])
    monkeypatch.setattr(rk_sum, "rk_sum", lambda *args, **kwargs: spoil(right(*args, **kwargs), dtype))
    failure = gate.check(case, inputs, seed).failure
    assert failure is not None
    assert failure.startswith(where)


def test_a_relu_may_flip_beside_its_kink_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(RkSum(2, relu=True), (2, 3, 5, 3), channels_last=False)
    inputs, seed = case.draw("cpu"), case.seed("cpu")
    y, k = inputs.activations
    right = rk_sum.rk_sum

    def shifted(by: float) -> Callable[..., Any]:
        # Less than an error that would be noticed in the value, yet another sign, and so another gradient.
        return lambda terms, coeffs, **kwargs: right([*terms, torch.full_like(y, by)], [*coeffs, 1.0], **kwargs)

    y.view(-1)[7] = -0.5 * k.view(-1)[7]  # the sum is exactly at the kink
    monkeypatch.setattr(rk_sum, "rk_sum", shifted(1e-7))
    assert gate.check(case, inputs, seed).failure is None
    y.view(-1)[7] += -1e-3
    monkeypatch.setattr(rk_sum, "rk_sum", shifted(2e-3))
    failure = gate.check(case, inputs, seed).failure
    assert failure is not None


@pytest.mark.parametrize("wrong", (0.01, float("nan")))
def test_one_wrong_tensor_among_many_is_refused_beside_relus_that_flip(wrong: float) -> None:
    truth = [torch.randn(50, dtype=torch.float64) for _ in range(100)]
    eager, ours = ([t.float() * (1 + 1e-3 * torch.randn(50)) for t in truth] for _ in range(2))
    assert gate.compare(*(gate.Results([], side, []) for side in (ours, eager, truth)), rms=True).failure is None
    ours[7] = ours[7] * (1 + wrong)
    failure = gate.compare(*(gate.Results([], side, []) for side in (ours, eager, truth)), rms=True).failure
    assert failure is not None
    assert failure.startswith("gradients, the worst" if wrong == 0.01 else "gradients, their mean")


def test_buffers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    from rkfast.bench.ops import bn_rk_sum
    from rkfast.bench.ops.bn_rk_sum import BnRkSum

    right = bn_rk_sum.bn_rk_sum
    monkeypatch.setattr(bn_rk_sum, "bn_rk_sum", lambda *args, **kwargs: right(*args, **{**kwargs, "momentum": 0.2}))
    case = Case(BnRkSum(), (2, 3, 5, 3))
    failure = gate.check(case, case.draw("cpu"), case.seed("cpu")).failure
    assert failure is not None
    assert failure.startswith("buffers[0]")


def _args(tmp_path: Path, *more: str) -> list[str]:
    return [
        "ops", "rk_sum", "--size", "tiny", "--device", "cpu", "--malloc", "current", "--peers", "eager",
        "--threads", "1", "--seconds", "0", "--json", str(tmp_path / "found.json"), *more,
    ]  # fmt: skip


def test_a_wrong_op_has_no_figure_and_fails_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = rk_sum.rk_sum

    def wrong(terms: list[Tensor], coeffs: list[float], **kwargs: Any) -> Any:
        return right(terms, [1.001 * c for c in coeffs] if len(terms) == 8 else coeffs, **kwargs)

    monkeypatch.setattr(rk_sum, "rk_sum", wrong)
    assert run.main(_args(tmp_path, "--filter", "/float32/")) == 1
    document = json.loads((tmp_path / "found.json").read_text())
    assert {g["id"].split("/")[1] for g in document["gate"] if g["failure"]} == {"n=8"}
    assert "n=8" not in {row["case"] for row in document["rows"]}
    assert "n=14" in {row["case"] for row in document["rows"]}
    table = capsys.readouterr().out
    assert "**wrong, no figure**: rk_sum/n=8/" in table
    assert "| n=8 |" not in table


def test_a_peer_that_breaks_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        def function(*args: Any) -> Any:
            raise RuntimeError("no compiler here")

        return function

    monkeypatch.setattr(torch, "compile", broken)
    args = _args(tmp_path, "--filter", "/n=2/")
    args[args.index("eager")] = "eager,compile"
    assert run.main(args) == 0
    assert "compile could not run rk_sum/n=2/" in capsys.readouterr().out
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert rows
    assert all(set(row["peers"]) == {"eager"} for row in rows)
