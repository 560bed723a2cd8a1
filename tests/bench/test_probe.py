"""The probe of cuDNN, with PyTorch's own operations in its place."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rkfast.bench import engines, probe

SHAPE = probe.TINY[0]
Asked = probe.Asked


def answered(question: str) -> dict[str, Any]:
    return probe.answered(Asked(question, SHAPE), "cpu", 0.0)


def test_every_question_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", None)
    engines.handle.cache_clear()
    files = ["--json", str(tmp_path / "found.json"), "--markdown", str(tmp_path / "found.md")]
    assert probe.main(["--size", "tiny", "--device", "cpu", "--seconds", "0", *files]) == 0
    document = json.loads((tmp_path / "found.json").read_text())
    assert {"machine", "versions", "commit", "date"} <= set(document)
    rows = document["rows"]
    assert [row["question"] for row in rows] == [name for name in probe.QUESTIONS for _ in range(2)]
    for row in rows[:8]:
        assert not row["failed"]
        first, *others = row["contenders"].values()
        assert first["speed"] == 1
        assert others
        for each in (first, *others):
            assert 0 < each["ms_p20"] <= each["ms_p50"] <= each["ms_p80"]
    for row in rows[8:]:
        assert not row["contenders"]
        assert {"one engine", "one engine, from a slot"} <= set(row["failed"])
        assert all(why.startswith("ModuleNotFoundError") for why in row["failed"].values())
    assert rows[1]["shape"].endswith("not padded")
    assert len(document["outcomes"]) == len(probe.QUESTIONS)
    table = capsys.readouterr().out
    assert table == (tmp_path / "found.md").read_text() + "\n"
    assert table.count("\n| ") == 1 + sum(len(row["contenders"]) + len(row["failed"]) for row in rows)
    assert all(f"- {outcome}\n" in table for outcome in document["outcomes"])


def test_without_time_what_is_left_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(probe, "SPARE", -1)
    path = tmp_path / "found.md"
    assert probe.main(["--size", "tiny", "--device", "cpu", "--seconds", "0", "--markdown", str(path)]) == 1
    assert "**12 convolutions were left out" in path.read_text()


@pytest.mark.parametrize("shape", probe.GROWTHS)
def test_padded_slots_are_aligned(shape: probe.Shape) -> None:
    tiny = shape._replace(n=1, side=2)
    padded, packed = (probe.Data(tiny, torch.bfloat16, "cpu", padded) for padded in (True, False))
    for data in (padded, packed):
        assert 0 < data.first < data.first + shape.k < data.buffer.shape[1]
        aligned = data.slot.data_ptr() % 16 == data.slot.stride(3) % 8 == 0
        assert aligned == (data is padded or shape.k % 8 == 0)


def off(self: probe.Data) -> Tensor:
    return self.slot.copy_(1.1 * self.conv(self.x))


def beside(self: probe.Data) -> Tensor:
    self.buffer[:, self.first - 1] += 1e-2
    return self.slot.copy_(self.conv(self.x))


def behind(self: probe.Data) -> Tensor:
    self.buffer[:, self.first + self.slot.shape[1]] += 1e-2
    return self.slot.copy_(self.conv(self.x))


def unwritten(self: probe.Data) -> Tensor:
    return self.slot


def broken(self: probe.Data) -> Tensor:
    raise RuntimeError("no engine\nwas found")


@pytest.mark.parametrize(
    ("straight", "why"),
    [
        (off, "wrong: off by "),
        (beside, "wrong: wrote beside the slot"),
        (behind, "wrong: wrote beside the slot"),
        (unwritten, "wrong: off by nan"),
        (broken, "RuntimeError: no engine"),
    ],
)
def test_what_is_wrong_or_breaks_has_no_figure(straight: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.Data, "straight", straight)
    found = answered("a slot")
    assert set(found["contenders"]) == {"a tensor of its own", "copied into the slot"}
    assert set(found["failed"]) == {"straight into the slot", "straight, by another thread"}
    assert all(reason.startswith(why) for reason in found["failed"].values())
    document = {"rows": [found], "outcomes": list(probe.outcomes([found])), "left": 0}
    monkeypatch.setattr(probe.report, "where", lambda _: "here")
    table = probe.markdown(document)
    assert f"| straight into the slot | | | {why}" in table
    assert "straight into the slot: right in 0 of 1 (" in table


def test_what_is_right_only_at_first_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []

    def once(self: probe.Data) -> Tensor:
        calls.append(None)
        return self.slot.copy_(self.conv(self.x)) if len(calls) <= 2 else off(self)

    monkeypatch.setattr(probe.Data, "straight", once)
    assert len(answered("a slot")["failed"]) == 2


@pytest.mark.parametrize("at", ["Data", "timing"])
def test_one_question_that_fails_ends_nothing(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    if at == "Data":
        monkeypatch.setattr(probe, "Data", fail)
    else:
        monkeypatch.setattr(probe.timing, "interleave", fail)
    found = answered("a slot")
    assert not found["contenders"]
    assert found["failed"] == {probe.ALL: "RuntimeError: out of memory"}


def test_where_the_first_is_wrong_nothing_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.Data, "conv", lambda self, x, bias=None: x / 0 if x.dtype != torch.float64 else x)
    found = answered("a slot")
    assert not found["contenders"]
    assert found["failed"][probe.ALL].startswith("RuntimeError: a tensor of its own: ")


def test_an_outcome_is_computed_of_the_figures() -> None:
    def row(*speeds: float, **failed: str) -> dict[str, Any]:
        names = ("first", "second")
        contenders = {name: {"speed": speed} for name, speed in zip(names, speeds, strict=False)}
        return {"question": "why", "contenders": contenders, "failed": failed}

    rows = [row(1, 2), row(1, 0.5), row(1, 8), row(1, second="wrong"), row(**{probe.ALL: "gone"})]
    assert list(probe.outcomes(rows)) == [
        "**why**: first: right in 4 of 5; second: right in 3 of 5, 2.00 times as fast (0.50–8.00) (wrong); "
        "all of them: right in 0 of 5 (gone)."
    ]


@pytest.fixture
def aten() -> Iterator[torch.library.Library]:
    """cuDNN's operators of PyTorch, for a CPU."""
    library = torch.library.Library("aten", "IMPL", "CPU")

    def out(
        x: Tensor, w: Tensor, padding: Any, stride: Any, dilation: Any, groups: int, *_: bool, out: Tensor
    ) -> Tensor:
        return out.copy_(F.conv2d(x, w, None, stride, padding, dilation, groups))

    def relu(x: Tensor, w: Tensor, bias: Tensor, *sizes: Any) -> Tensor:
        return F.conv2d(x, w, bias, *sizes).relu_()

    def add_relu(x: Tensor, w: Tensor, z: Tensor, alpha: float, bias: Tensor, *sizes: Any) -> Tensor:
        return F.conv2d(x, w, bias, *sizes).add_(z, alpha=alpha).relu_()

    library.impl("cudnn_convolution.out", out)
    library.impl("cudnn_convolution_relu", relu)
    library.impl("cudnn_convolution_add_relu", add_relu)
    yield library
    library._destroy()


@pytest.mark.parametrize("question", list(probe.QUESTIONS)[:4])
@pytest.mark.parametrize("shape", probe.TINY)
def test_cudnn_is_called_as_its_operators_are_declared(question: str, shape: probe.Shape, aten: Any) -> None:
    data = probe.Data(shape, torch.bfloat16, "cpu")
    data.device = "cuda"
    asked, failed = probe.QUESTIONS[question](data), dict[str, str]()
    assert set(probe.right(asked, failed)) == set(asked.contenders)
    assert not failed


def test_without_cudnn_its_operators_fail() -> None:
    """Else the test above says nothing."""
    data = probe.Data(SHAPE, torch.bfloat16, "cpu")
    data.device = "cuda"
    for question in (probe.slots, probe.active, probe.joined):
        failed: dict[str, str] = {}
        probe.right(question(data), failed)
        assert failed
        assert all("Could not run 'aten::cudnn_convolution" in why for why in failed.values())


class Piece:
    """A tensor of a graph of cuDNN's; here it knows how it is computed."""

    def __init__(self, compute: Any) -> None:
        self.compute, self.asked = compute, dict[str, Any]()

    def __getattr__(self, name: str) -> Any:
        def ask(value: Any) -> Piece:
            self.asked[name] = value
            return self

        return ask


class Plan:
    """Stands for cudnn.pygraph, and computes in PyTorch; only of float results between it is built."""

    def __init__(self, **kinds: Any) -> None:
        self.kinds, self.built = kinds, False
        self.values: dict[Piece, Tensor] = {}
        self.outputs: list[Piece] = []

    def _of(self, piece: Piece) -> Tensor:
        return self.values[piece] if piece in self.values else piece.compute()

    def tensor(self, *, dim: list[int], stride: list[int], data_type: str) -> Piece:
        piece = Piece(None)
        piece.asked = {"given": (tuple(dim), tuple(stride), data_type)}
        return piece

    def scale(self, *, input: Piece, scale: Piece) -> Piece:
        return Piece(lambda: self._of(input).float() * self._of(scale))

    def bias(self, *, input: Piece, bias: Piece) -> Piece:
        return Piece(lambda: self._of(input) + self._of(bias))

    def relu(self, *, input: Piece) -> Piece:
        return Piece(lambda: self._of(input).relu())

    def conv_fprop(self, *, image: Piece, weight: Piece, **sizes: Any) -> Piece:
        made = Piece(lambda: F.conv2d(self._of(image), self._of(weight).float(), **sizes))
        self.outputs.append(made)
        return made

    def conv_wgrad(self, *, image: Piece, loss: Piece, **sizes: Any) -> Piece:
        def compute() -> Tensor:
            x, grad = self._of(image), self._of(loss).float()
            size = (grad.shape[1], x.shape[1], *(2 * p + 1 for p in sizes["padding"]))
            return torch.nn.grad.conv2d_weight(x, size, grad, **sizes)

        made = Piece(compute)
        self.outputs.append(made)
        return made

    def genstats(self, *, input: Piece) -> list[Piece]:
        made = [Piece(lambda power=power: self._of(input).pow(power).sum((0, 2, 3), keepdim=True)) for power in (1, 2)]
        self.outputs += made
        return made

    def build(self, modes: Any) -> None:
        if self.kinds["intermediate_data_type"] != "fp32":
            raise RuntimeError("not supported")
        self.built = modes == ["A", "FALLBACK"]

    def get_workspace_size(self) -> int:
        return 16

    def execute(self, given: dict[Piece, Tensor], space: Tensor, *, handle: Any) -> None:
        kinds = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        assert self.built
        assert space.numel() == 16
        assert handle == self.kinds["handle"] == "handle"
        self.values = {piece: t for piece, t in given.items() if piece not in self.outputs}
        assert all(p.asked["given"] == (t.shape, t.stride(), kinds[t.dtype]) for p, t in self.values.items())
        for piece in self.outputs:
            t = given[piece]
            wanted = {"set_output": True, "set_dim": list(t.shape), "set_stride": list(t.stride())}
            assert piece.asked == {**wanted, "set_data_type": kinds[t.dtype]}
            t.copy_(piece.compute())


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    module = SimpleNamespace(
        data_type=SimpleNamespace(BFLOAT16="bf16", HALF="fp16", FLOAT="fp32"),
        heur_mode=SimpleNamespace(A="A", FALLBACK="FALLBACK"),
        create_handle=lambda: "handle",
        set_stream=lambda **_: None,
        pygraph=Plan,
    )
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    engines.handle.cache_clear()
    yield module
    engines.handle.cache_clear()


@pytest.mark.parametrize("question", list(probe.QUESTIONS)[4:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_engine_and_batchnorm(question: str, dtype: torch.dtype, cudnn: SimpleNamespace) -> None:
    found = probe.answered(Asked(question, SHAPE, dtype), "cpu", 0.0)
    assert not found["failed"]
    assert {"one engine", "one engine, from a slot"} < set(found["contenders"])


def test_an_engine_writes_into_the_slot(cudnn: SimpleNamespace) -> None:
    data = probe.Data(SHAPE, torch.bfloat16, "cpu")
    data.spoil()
    probe.normalised(data).contenders["one engine, into a slot"]()
    assert torch.allclose(data.slot.float(), data.conv(data.active()).float(), atol=0.05)
    assert data.intact()


def test_one_engine_that_is_refused_ends_nothing(cudnn: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Plan, modes: Any) -> None:
        raise RuntimeError(f"no {self.kinds['intermediate_data_type']}")

    monkeypatch.setattr(Plan, "build", refuse)
    found = answered("BatchNorm and moments")
    assert set(found["failed"].values()) == {"RuntimeError: RuntimeError: no bf16; in float32 RuntimeError: no fp32"}


def test_another_thread_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[bool] = []

    def straight(self: probe.Data) -> Tensor:
        threads.append(threading.current_thread() is threading.main_thread())
        return self.slot.copy_(self.conv(self.x))

    monkeypatch.setattr(probe.Data, "straight", straight)
    data = probe.Data(SHAPE, torch.bfloat16, "cpu")
    contenders = {**probe.slots(data).contenders, **probe.measured_slots(data).contenders}
    names = ("straight into the slot", "straight, by another thread", "straight, by another thread, then moments")
    for name in names:
        contenders[name]()
    assert threads == [True, False, False]


def test_engines_are_asked_for_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    data = probe.Data(SHAPE, torch.bfloat16, "cpu")
    assert torch.equal(data.x, data.read)
    assert data.x.stride(3) == SHAPE.c < data.read.stride(3)

    def forward(x: Tensor, *rest: Any) -> Any:
        return lambda: (x.stride(3), rest[-1].stride(3))

    monkeypatch.setattr(engines, "forward", forward)
    monkeypatch.setattr(engines, "weight_gradient", forward)
    _, own, into, read = (call() for call in probe.normalised(data).contenders.values())
    wide = data.buffer.shape[1]
    assert (own, into, read) == ((8, 4), (8, wide), (16, 4))
    _, own, read = (call() for call in probe.renormalised(data).contenders.values())
    assert (own[0], read[0]) == (8, 16)
