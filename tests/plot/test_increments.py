from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

import rkfast
from rkfast import ode
from rkfast.plot import increments


def arguments(**changed: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    increments.add_arguments(parser)
    args = parser.parse_args(["--model", "ho_resnet-26", "--options", '{"method": "fehlberg45", "width": 4}'])
    return argparse.Namespace(**(vars(args) | changed))


def test_what_is_drawn_is_what_was_probed() -> None:
    pytest.importorskip("matplotlib")
    name, found = increments.data(arguments())
    above, below = increments.draw(name, found).axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in above.get_lines()}
    steps = list(found)
    assert len(steps) == 2
    # Of six stages two have no weight.
    for stage in (1, 3, 4, 5):
        assert lines.pop(f"|h b k|, stage {stage}") == [step.increments[stage - 1] for step in steps]
    assert lines == {"|y|": [step.size for step in steps], "local error": [step.error for step in steps]}
    assert below.get_lines()[0].get_ydata().tolist() == [1.0, 1.0]
    assert above.get_title() == "ho_resnet-26"


def test_seed_and_weights(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first, again, other = (increments.data(arguments(seed=seed))[1] for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    torch.randn(32, 3, 32, 32)
    model = rkfast.create_model("ho_resnet-26", method="fehlberg45", width=4)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(0)
    expected = ode.probe(model, torch.randn(32, 3, 32, 32))
    assert increments.data(arguments(weights=tmp_path / "weights.pt"))[1] == expected != first
    (tmp_path / "bad.pt").write_bytes(b"bad")
    torch.save([3], tmp_path / "list.pt")
    for name in ("bad.pt", "list.pt"):
        with pytest.raises(ValueError, match=f"--weights .*{name} cannot be loaded"):
            increments.data(arguments(weights=tmp_path / name))


def test_digits_and_modes() -> None:
    pytest.importorskip("sklearn")
    found = [increments.data(arguments(images="digits", eval=mode))[1] for mode in (False, True)]
    assert found[0] != found[1]
    assert all(len(probe) == 2 for probe in found)
