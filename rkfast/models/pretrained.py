"""Networks in a folder: weights in safetensors beside a JSON file that says what they belong to. Nothing is pickled."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rkfast.extras import require
from rkfast.files import replacing

WEIGHTS, CONFIG = "model.safetensors", "config.json"
VERSION = 1
MAX_CONFIG = 1 << 20  # bytes
ALIAS = "same as "
SHOWN = 3  # keys in a message


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a network's state_dict and what ``from_pretrained`` makes it of, into ``folder``, which is made if missing.

    ``model.safetensors`` holds the tensors, each once, whatever shares them; ``config.json`` the name and options that
    ``create_model`` was called with. Of a network that it did not make there are the weights alone; so, with a warning,
    of one that has been changed since (restacked, folded, with step sizes attached, ...). Each file is written whole or
    not at all.

    Needs the extra: ``pip install 'rkfast[hub]'``.

    Raises:
        TypeError: an argument is of a wrong type, or something in the state_dict is no tensor.
        ValueError: folder is a file, or an option is nothing that JSON can hold.
        MissingExtra: safetensors is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    folder = _folder(folder)
    safetensors = require("safetensors.torch", "hub")
    tensors, aliases = _tensors(model)
    config = json.dumps({"rkfast": VERSION, **_made_by(model)}, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ValueError(f"folder: {str(folder)!r} is a file") from None
    with replacing(folder / WEIGHTS) as weights, replacing(folder / CONFIG) as text:
        safetensors.save_file(tensors, weights, {key: ALIAS + first for key, first in aliases.items()})
        text.write_text(config)


def from_pretrained(
    folder: str | os.PathLike[str], model: nn.Module | None = None, *, fused: bool = True, memory: str = "speed"
) -> nn.Module:
    """The network that ``save_pretrained`` wrote.

    Args:
        folder: where it was written.
        model: a network to fill, of whatever class, which stays in its mode, device and dtypes; None makes the one that
            ``config.json`` names, in evaluation mode, on the CPU, in the dtypes of the file.
        fused, memory: of the network that is made, as in ``create_model``.

    Returns:
        The network.

    Needs the extra: ``pip install 'rkfast[hub]'``.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: a file is missing or damaged, names no network of ``create_model``, or its tensors are not those of
            the network. A given model is as before.
        MissingExtra: safetensors is not installed.
    """
    folder = _folder(folder)
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module or None, got {type(model).__name__}")
    require("safetensors", "hub")
    for name in (WEIGHTS,) if model is not None else (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"folder: there is no {name} in {str(folder)!r}")
    made = model
    if made is None:
        made = _create(folder / CONFIG, fused, memory).eval()
    state = _read(folder / WEIGHTS)
    own = made.state_dict(keep_vars=True)
    _check(state, own, folder / WEIGHTS)
    if model is None:
        for key, tensor in own.items():
            tensor.data = tensor.data.to(state[key].dtype)
    made.load_state_dict(state)
    return made


def _folder(folder: Any) -> Path:
    if not isinstance(folder, (str, os.PathLike)):
        raise TypeError(f"folder: expected a path, got {type(folder).__name__}")
    return Path(folder)


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state_dict, and which of its keys are another one's tensor."""
    found: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    known: dict[Any, str] = {}
    for key, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"model: {key} is {type(tensor).__name__}, and safetensors holds tensors alone")
        if tensor.is_meta:
            raise TypeError(f"model: {key} is on the meta device and has no values")
        same = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        if tensor.numel() and same in known:
            aliases[key] = known[same]
            continue
        known[same] = key
        found[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return found, aliases


def _made_by(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    if not (isinstance(config, dict) and isinstance(config.get("name"), str)):
        return {"name": None}
    try:
        # What comes out of JSON is what the network will be made of.
        found = json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: its options are nothing that JSON can hold: {error}") from None
    if not _fits(model, found):
        warnings.warn(
            f"save_pretrained: the network is no longer what create_model({found['name']!r}) made; {CONFIG} names "
            "none, and from_pretrained(folder, model) will want one to fill",
            stacklevel=3,
        )
        return {"name": None}
    return found


def _fits(model: nn.Module, config: dict[str, Any]) -> bool:
    """Whether a network made anew has the modules and tensors of model."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            twin = _model(config, fused=True, memory="speed")
    except (TypeError, ValueError):
        return False
    return _modules(twin) == _modules(model) and _shapes(twin) == _shapes(model)


def _modules(model: nn.Module) -> dict[str, type]:
    return {name: getattr(module, "stock", type(module)) for name, module in model.named_modules()}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def _create(path: Path, fused: bool, memory: str) -> nn.Module:
    if path.stat().st_size > MAX_CONFIG:
        raise ValueError(f"folder: {path.name} is larger than {MAX_CONFIG} bytes")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"folder: {path.name} is no JSON: {error}") from None
    if not isinstance(config, dict) or config.get("rkfast") != VERSION:
        raise ValueError(f"folder: {path.name} is none that this rkfast wrote; expected version {VERSION} of it")
    if config.get("name") is None:
        raise ValueError(f"folder: {path.name} names no network, there are the weights alone; give a model to fill")
    options = config.get("options")
    if not isinstance(config["name"], str) or not isinstance(options, dict):
        raise ValueError(f"folder: {path.name}: expected a name and options of create_model")
    try:
        with torch.random.fork_rng(devices=[]):
            return _model(config, fused, memory)
    except (TypeError, ValueError) as error:
        raise ValueError(f"folder: {path.name}: {error}") from error


def _model(config: dict[str, Any], fused: bool, memory: str) -> nn.Module:
    from rkfast.models import create_model

    options = config["options"]
    for name in ("name", "fused", "memory"):
        if name in options:
            raise ValueError(f"{name}: not an option")
    return create_model(config["name"], fused=fused, memory=memory, **options)


def _read(path: Path) -> dict[str, Tensor]:
    safetensors = require("safetensors", "hub")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no dict
            notes = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"folder: {path.name} is damaged: {error}") from None
    for key, note in notes.items():
        if note.startswith(ALIAS) and note.removeprefix(ALIAS) in state:
            state.setdefault(key, state[note.removeprefix(ALIAS)])
    return state


def _check(state: dict[str, Tensor], own: dict[str, Any], path: Path) -> None:
    missing, more = [key for key in own if key not in state], [key for key in state if key not in own]
    if missing or more:
        said = [f"has no {_some(missing)}"] if missing else []
        said += [f"has {_some(more)} besides"] if more else []
        raise ValueError(f"folder: {path.name} is another network's: it {' and '.join(said)}")
    for key, tensor in own.items():
        if state[key].shape != tensor.shape:
            raise ValueError(
                f"folder: {path.name}: {key} is {list(state[key].shape)}, and the network's {list(tensor.shape)}"
            )


def _some(keys: list[str]) -> str:
    rest = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + rest
