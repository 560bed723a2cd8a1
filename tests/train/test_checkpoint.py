"""Checkpoints: whole or not at all, and recognised when damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rkfast.train import checkpoint
from rkfast.train.checkpoint import Checkpoint

pytest.importorskip("safetensors")


def made(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(4, 3, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    tensors = {
        "model": {"weight": weight, "tied": weight, "part": weight[1:], "count": torch.tensor(step)},
        "optimizer": {"0.momentum_buffer": torch.randn(5, generator=generator).bfloat16()},
        "empty": {},
    }
    return Checkpoint(step, tensors, {"lr": 0.1 * 0.1 * step, "best": None})


def written(out: Path, *steps: int) -> Path:
    for step in steps:
        path = checkpoint.write(out, made(step))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, 44)
    assert sorted(file.name for file in path.iterdir()) == [
        *("empty.safetensors", "model.safetensors", "optimizer.safetensors", "state.json")
    ]
    found, expected = checkpoint.read(path), made(44)
    assert (found.step, found.state) == (expected.step, expected.state)
    torch.testing.assert_close(found.tensors, expected.tensors, rtol=0, atol=0)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def another(file: Path) -> None:
    shutil.copy(file.parents[1] / f"{1:08d}" / file.name, file)


@pytest.mark.parametrize("name", ("model.safetensors", "optimizer.safetensors", "state.json"))
@pytest.mark.parametrize("damage", (truncate, flip, empty, another, Path.unlink))
def test_a_damaged_one_is_recognised(name: str, damage: Callable[[Path], None], tmp_path: Path) -> None:
    file = written(tmp_path, 1, 2) / name
    damage(file)
    if damage is another and name == "state.json":
        # Whole, and of other files.
        message = r"00000002 is damaged: the checksum of \w+.safetensors is another"
    else:
        message = "00000002 is damaged: "
    with pytest.warns(UserWarning, match=message):
        found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1
    with pytest.raises(ValueError, match=message):
        checkpoint.read(checkpoint.at(tmp_path, 2))


def test_a_value_of_the_state_that_is_another_is_recognised(tmp_path: Path) -> None:
    file = written(tmp_path, 1) / "state.json"
    said = json.loads(file.read_text())
    said["state"]["lr"] = 0.5
    file.write_text(json.dumps(said))
    with pytest.warns(UserWarning, match="its checksum is another"):
        assert checkpoint.newest(tmp_path) is None


def test_the_newest(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    written(tmp_path, 99_999_999, 100_000_000)  # by number, not by name
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 100_000_000


def test_an_error_while_one_is_written_leaves_those_that_are_there(tmp_path: Path) -> None:
    written(tmp_path, 1, 2)
    broken = made(2)._replace(state={"lr": object()})
    with pytest.raises(TypeError, match="JSON"):
        checkpoint.write(tmp_path, broken)
    assert [path.name for path in sorted((tmp_path / checkpoint.FOLDER).iterdir())] == ["00000001", "00000002"]
    checkpoint.read(checkpoint.at(tmp_path, 2))


def test_one_takes_the_place_of_a_damaged_one(tmp_path: Path) -> None:
    (written(tmp_path, 1) / "model.safetensors").unlink()
    written(tmp_path, 1)
    assert checkpoint.read(checkpoint.at(tmp_path, 1)).step == 1


def steps(out: Path) -> list[int]:
    return [int(path.name) for path in checkpoint.paths(out)]


def test_prune_and_forget(tmp_path: Path) -> None:
    written(tmp_path, 1, 2, 3, 4, 5)
    checkpoint.prune(tmp_path, 2, 1)
    assert steps(tmp_path) == [1, 4, 5]
    checkpoint.prune(tmp_path, 1, None)
    assert steps(tmp_path) == [5]
    written(tmp_path, 1, 2)
    (tmp_path / checkpoint.FOLDER / ".00000006-half").mkdir()
    checkpoint.forget(tmp_path, 1)
    assert [path.name for path in (tmp_path / checkpoint.FOLDER).iterdir()] == ["00000001"]
