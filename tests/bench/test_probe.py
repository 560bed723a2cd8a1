"""The probe of cuDNN, with PyTorch's own operations in its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from rkfast.bench import probe

SHAPE = probe.TINY[0]


def answered(make: Any) -> dict[str, Any]:
    return probe.answered(make(SHAPE, torch.bfloat16, "cpu"), "cpu", 0.0)


def test_every_question_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", None)
    files = ["--json", str(tmp_path / "found.json"), "--markdown", str(tmp_path / "found.md")]
    assert probe.main(["--size", "tiny", "--device", "cpu", "--seconds", "0", *files]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["question"] for row in rows] == [
        *("a slot", "a slot", "bias, sum and ReLU", "bias, sum and ReLU"),
        *("BatchNorm and moments", "BatchNorm and moments"),
    ]
    for row in rows:
        first, *_ = row["contenders"].values()
        assert first["speed"] == 1 and 0 < first["ms_p20"] <= first["ms_p50"] <= first["ms_p80"]
    for row in rows[:4]:
        assert not row["failed"] and len(row["contenders"]) == (3 if row["question"] == "a slot" else 2)
    for row in rows[4:]:
        assert set(row["contenders"]) == {"three passes"}
        assert set(row["failed"]) == {"one engine", "one engine, into a slot"}
        assert all("cudnn" in why for why in row["failed"].values())
    table = capsys.readouterr().out
    assert table == (tmp_path / "found.md").read_text() + "\n"
    assert table.count("\n| ") == 1 + sum(len(row["contenders"]) + len(row["failed"]) for row in rows)


def test_what_is_wrong_or_breaks_has_no_figure() -> None:
    def off() -> probe.Outcome:
        return tuple(1.1 * t for t in question.contenders["a tensor of its own"]())

    def beside() -> probe.Outcome:
        found, before, after = question.contenders["a tensor of its own"]()
        return found, before + 1, after

    def nan() -> probe.Outcome:
        return tuple(t / 0 for t in off())

    def broken() -> probe.Outcome:
        raise RuntimeError("no engine\nwas found")

    question = probe.slots(SHAPE, torch.bfloat16, "cpu")
    question.contenders.update({"off": off, "beside": beside, "nan": nan, "broken": broken})
    found = probe.answered(question, "cpu", 0.0)
    assert set(found["contenders"]) == {"a tensor of its own", "straight into the slot", "copied into the slot"}
    assert found["failed"]["broken"] == "RuntimeError: no engine"
    assert all(found["failed"][name].startswith("wrong: off by ") for name in ("off", "beside", "nan"))


def test_writing_beside_the_slot_is_wrong() -> None:
    question = probe.slots(SHAPE, torch.bfloat16, "cpu")
    straight = question.contenders["straight into the slot"]

    def careless() -> probe.Outcome:
        slot, before, after = straight()
        assert before.shape[1] == probe.BEFORE and after.shape[1] == probe.AFTER
        assert {t.untyped_storage().data_ptr() for t in (slot, before, after)} == {slot.untyped_storage().data_ptr()}
        after[:, 0] += 1
        return slot, before, after

    question.contenders["careless"] = careless
    assert "wrong" in probe.answered(question, "cpu", 0.0)["failed"]["careless"]


class Piece:
    """A tensor of a graph of cuDNN's; here it knows how it is computed."""

    def __init__(self, compute: Any) -> None:
        self.compute, self.asked = compute, []

    def __getattr__(self, name: str) -> Any:
        def ask(value: Any) -> Piece:
            self.asked.append((name, value))
            return self

        return ask


class Graph:
    """Stands for cudnn.pygraph, and computes in PyTorch."""

    def __init__(self, **kinds: Any) -> None:
        self.kinds, self.built = kinds, None
        self.values: dict[Piece, torch.Tensor] = {}

    def _of(self, piece: Piece) -> torch.Tensor:
        return self.values[piece] if piece in self.values else piece.compute()

    def tensor_like(self, t: torch.Tensor) -> Piece:
        return Piece(None)

    def scale(self, *, input: Piece, scale: Piece) -> Piece:
        return Piece(lambda: self._of(input).float() * self._of(scale))

    def bias(self, *, input: Piece, bias: Piece) -> Piece:
        return Piece(lambda: self._of(input) + self._of(bias))

    def relu(self, *, input: Piece) -> Piece:
        return Piece(lambda: self._of(input).relu())

    def conv_fprop(self, *, image: Piece, weight: Piece, **sizes: Any) -> Piece:
        return Piece(lambda: F.conv2d(self._of(image), self._of(weight).float(), **sizes))

    def genstats(self, *, input: Piece) -> tuple[Piece, Piece]:
        made = [Piece(lambda power=power: self._of(input).pow(power).sum((0, 2, 3), keepdim=True)) for power in (1, 2)]
        self.outputs = (input, *made)
        return made[0], made[1]

    def build(self, modes: Any) -> None:
        self.built = modes

    def get_workspace_size(self) -> int:
        return 16

    def execute(self, given: dict[Piece, torch.Tensor], space: torch.Tensor, *, handle: Any) -> None:
        assert self.built and space.numel() == 16 and handle == "handle"
        self.values = {piece: t for piece, t in given.items() if piece not in self.outputs}
        for piece in self.outputs:
            assert ("set_output", True) in piece.asked
            given[piece].copy_(piece.compute())


def test_one_engine_for_batchnorm_and_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        data_type=SimpleNamespace(BFLOAT16="bf16", HALF="fp16", FLOAT="fp32"),
        heur_mode=SimpleNamespace(A="A", FALLBACK="B"),
        create_handle=lambda: "handle",
        set_stream=lambda **_: None,
        pygraph=Graph,
    )
    monkeypatch.setitem(sys.modules, "cudnn", fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    found = answered(probe.normalised)
    assert not found["failed"]
    assert set(found["contenders"]) == {"three passes", "one engine", "one engine, into a slot"}
    data = probe.Data(SHAPE, torch.bfloat16, "cpu")
    monkeypatch.setattr(probe, "Data", lambda *_: data)
    answered(probe.normalised)
    truth = F.conv2d(
        (data.x * data.scale.view(1, -1, 1, 1) + data.shift.view(1, -1, 1, 1)).relu(), data.weight, padding=1
    )
    assert torch.allclose(data.slot, truth, atol=0.05)  # that of the engine, not a copy
