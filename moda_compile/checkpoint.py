"""load and saved_config: converted models from checkpoints.

A converted model's state_dict says how the model was converted (see :mod:`moda_compile.markers`),
so whatever saves a state_dict saves that too. This module reads it back. A checkpoint is data from
anywhere: tensors and JSON are all that is taken from one, and nothing in it is ever run.
"""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moda_compile.backend import Compiler
from moda_compile.config import MoDAConfig
from moda_compile.convert import ExampleInputs, convert, revert
from moda_compile.errors import InputError
from moda_compile.markers import CONFIG_KEY, Saved, WriteConfig

Model = TypeVar("Model", bound=nn.Module)
Checkpoint = Mapping[str, Any] | str | os.PathLike[str]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"  # as transformers names them
_SHOWN = 4  # names in an error message, at most


def load(
    model: Model,
    checkpoint: Checkpoint,
    example_inputs: ExampleInputs | None = None,
    backend: Compiler = "inductor",
    *,
    prefix: str = "",
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    dynamic: bool | None = None,
) -> Model:
    """Convert ``model`` as the model that was saved had been, and load its weights, all of them.

    Everything is compared before any weight is written: a checkpoint that doesn't fit leaves
    ``model`` as it was. Weights take on the model's own dtypes and devices. What the model ties may
    be in the checkpoint once, as transformers saves it.

    Args:
        model: the model before its conversion, of the same class and sizes as the one saved; what
            its weights are does not matter.
        checkpoint: a converted model's state_dict; or the path of one that ``torch.save`` wrote
            (read with ``weights_only=True``), of a ``.safetensors`` file, of a
            ``.safetensors.index.json`` or of a folder that transformers' ``save_pretrained`` wrote.
            Where that renames weights on their way to the disk, as it does for some mixtures of
            experts, save with ``save_original_format=False``.
        example_inputs: as for :func:`moda_compile.convert`.
        backend: as for :func:`moda_compile.convert`.
        prefix: what the names in the checkpoint begin with, if ``model`` was a part of what was
            saved: ``"encoder."``, or DDP's ``"module."``. All other entries are left out.
        mode: as for :func:`moda_compile.convert`.
        options: as for :func:`moda_compile.convert`.
        dynamic: as for :func:`moda_compile.convert`.

    Returns:
        ``model`` itself, converted.

    Raises:
        InputError: if the model is converted already, the checkpoint is a plain model's or can't
            be read, or its entries are not the converted model's by name, shape or kind of dtype.
        RewriteError: if ``model`` can't be converted.
    """
    hooks = getattr(model, "_state_dict_hooks", {})
    if any(isinstance(hook, WriteConfig) for hook in hooks.values()):
        raise InputError(
            "model: it is converted already; use its load_state_dict, or call "
            "moda_compile.revert(model) first."
        )
    entries = _entries(checkpoint, lambda name: True)
    own = {n.removeprefix(prefix): entry for n, entry in entries.items() if n.startswith(prefix)}
    if CONFIG_KEY not in own:
        raise _no_config(entries, prefix)
    saved = Saved.from_tensor(own.pop(CONFIG_KEY), prefix + CONFIG_KEY)
    convert(
        model,
        saved.config,
        example_inputs,
        backend,
        saved.strict,
        mode=mode,
        options=options,
        dynamic=dynamic,
    )
    try:
        model.load_state_dict(_fitting(model, own))
    except BaseException:
        revert(model)
        raise
    return model


def saved_config(checkpoint: Checkpoint, prefix: str = "") -> MoDAConfig | None:
    """How the model that a checkpoint is of was converted.

    Args:
        checkpoint: as for :func:`load`.
        prefix: as for :func:`load`.

    Returns:
        The options of its conversion, or ``None`` for a plain model.

    Raises:
        InputError: if the checkpoint can't be read, or says something else than a configuration.
    """
    name = prefix + CONFIG_KEY
    entries = _entries(checkpoint, lambda other: other == name)
    return Saved.from_tensor(entries[name], name).config if name in entries else None


# --- does it fit ---------------------------------------------------------------------------------


def _no_config(entries: Iterable[str], prefix: str) -> InputError:
    others = [n for n in entries if n == CONFIG_KEY or n.endswith(f".{CONFIG_KEY}")]
    if others:
        return InputError(
            f"checkpoint: it has no {prefix + CONFIG_KEY!r}, but {_some(others)}: pass what stands "
            f"before {CONFIG_KEY} as prefix=, and as model the part that had been converted."
        )
    return InputError(
        f"checkpoint: it has no {prefix + CONFIG_KEY!r}, so it is a plain model's: load it with "
        "load_state_dict or from_pretrained, and call moda_compile.convert afterwards."
    )


def _fitting(model: nn.Module, entries: dict[str, Any]) -> dict[str, Any]:
    """``entries`` with what ``model`` ties under every name, once all of it is known to fit."""
    expected = model.state_dict()
    del expected[CONFIG_KEY]
    entries = dict(entries)
    for names in _tied(model):
        have = [name for name in names if name in entries]
        if any(not _same(entries[have[0]], entries[name]) for name in have[1:]):
            raise InputError(
                f"checkpoint: {_some(have)} differ, but are one tensor in the model: untie them."
            )
        if have:
            entries |= {n: entries[have[0]] for n in names if n in expected}
    missing = [name for name in expected if name not in entries]
    unexpected = [name for name in entries if name not in expected]
    if missing or unexpected:
        raise InputError(
            "checkpoint: its entries are not those of this model, once it is converted as the "
            f"checkpoint says. Missing: {_some(missing)}. Unexpected: {_some(unexpected)}. Pass a "
            "model of the class and sizes that were saved; if save_pretrained has renamed weights, "
            "save again with save_original_format=False."
        )
    wrong = [
        f"{name}: got {_describe(entries[name])}, expected {_describe(tensor)}"
        for name, tensor in expected.items()
        if not _fits(entries[name], tensor)
    ]
    if wrong:
        raise InputError(f"checkpoint: {'; '.join(wrong[:_SHOWN])} ({len(wrong)} in all).")
    unreal = [name for name, t in expected.items() if isinstance(t, Tensor) and t.is_meta]
    if unreal:
        raise InputError(
            f"model: {_some(unreal)} are on the meta device, where there is nothing to load into; "
            "call model.to_empty(device=...) first."
        )
    return entries


def _tied(model: nn.Module) -> list[list[str]]:
    """Names of each tensor of ``model`` that has more than one."""
    found: dict[int, list[str]] = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            found.setdefault(id(tensor), []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _same(one: object, other: object) -> bool:
    if one is other:
        return True
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    if one.shape != other.shape or one.dtype != other.dtype or one.is_meta or other.is_meta:
        return False
    one, other = one.cpu(), other.cpu()
    return bool(((one == other) | (one != one) & (other != other)).all())  # NaNs


def _fits(entry: object, tensor: object) -> bool:
    """Whether load_state_dict can copy the one into the other, and mean it."""
    if not isinstance(tensor, Tensor):  # a module's extra state, which is its own affair
        return True
    if not isinstance(entry, Tensor) or entry.is_meta or entry.layout != tensor.layout:
        return False
    return entry.shape == tensor.shape and torch.can_cast(entry.dtype, tensor.dtype)


def _describe(entry: object) -> str:
    if not isinstance(entry, Tensor):
        return reprlib.repr(entry)
    layout = "" if entry.layout == torch.strided else f" {entry.layout}"
    return f"{entry.dtype} {list(entry.shape)}{layout}{' on the meta device' * entry.is_meta}"


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_SHOWN]) or "none"
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


# --- reading -------------------------------------------------------------------------------------


def _entries(checkpoint: Checkpoint, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The entries with a wanted name; others are not read where the format lets them be."""
    if isinstance(checkpoint, Mapping):
        return _strings(checkpoint, wanted, "checkpoint")
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise InputError(
            f"checkpoint: got {type(checkpoint).__name__}, expected a state_dict or a path."
        )
    path = Path(checkpoint)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise InputError(f"checkpoint: there is no file {str(path)!r}.")
    if path.name.endswith(".safetensors.index.json"):
        return _sharded(path, wanted)
    if path.suffix == ".safetensors":
        return _safetensors(path, wanted)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many kinds, as the file may be anything
        raise InputError(
            f"{path}: it is no file of tensors by name, which is all that is read: write one with "
            f"torch.save(model.state_dict(), path). (torch.load: {_first_line(error)})"
        ) from error
    if not isinstance(loaded, Mapping):
        raise InputError(f"{path}: got {type(loaded).__name__}, expected a state_dict.")
    return _strings(loaded, wanted, str(path))


def _strings(
    mapping: Mapping[Any, Any], wanted: Callable[[str], bool], what: str
) -> dict[str, Any]:
    odd = [key for key in mapping if not isinstance(key, str)]
    if odd:
        raise InputError(f"{what}: got the key {reprlib.repr(odd[0])}, expected names of tensors.")
    return {name: entry for name, entry in mapping.items() if wanted(name)}


def _in_folder(folder: Path) -> Path:
    found = [folder / name for name in (_WEIGHTS, _INDEX) if (folder / name).is_file()]
    if len(found) == 1:
        return found[0]
    if found:  # one of them is left over from an older save
        raise InputError(
            f"{folder}: it holds both {_WEIGHTS} and {_INDEX}; pass the path of the one you mean."
        )
    raise InputError(
        f"{folder}: it holds neither {_WEIGHTS} nor {_INDEX}, which transformers' save_pretrained "
        "writes; pass the path of the file."
    )


def _sharded(index: Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    try:
        content = json.loads(index.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{index}: it is no JSON: {error}") from error
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise InputError(f"{index}: it has no 'weight_map' from names of tensors to files.")
    by_file: dict[str, list[str]] = {}
    for name, shard in shards.items():
        if wanted(name):
            by_file.setdefault(shard, []).append(name)
    entries: dict[str, Any] = {}
    for shard, names in by_file.items():
        path = index.parent / shard
        if Path(shard).name != shard or not path.is_file():  # nothing outside of the folder
            raise InputError(f"{index}: there is no file {shard!r} beside it.")
        held = _safetensors(path, set(names).__contains__)
        lost = [name for name in names if name not in held]
        if lost:
            raise InputError(f"{path}: it does not hold {_some(lost)}, as {index.name} says.")
        entries |= held
    return entries


def _safetensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise InputError(
            f"{path}: it takes safetensors to read it (pip install safetensors)."
        ) from error
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}
    except SafetensorError as error:
        raise InputError(f"{path}: it is no safetensors file: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
