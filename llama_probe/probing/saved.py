"""What was fitted, as a folder: tensors in a safetensors file, the rest in record.json, no pickle.

The tensors' file is named by its content, and record.json, which names it, is written after it: a
process that is killed leaves the folder as it was.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from llama_probe.errors import CheckpointError, InputError
from llama_probe.files import locked, sweep, write_text, written

_FORMAT = 1
_RECORD = "record.json"


def write_folder(
    folder: str | Path, kind: str, tensors: dict[str, Tensor], record: dict[str, Any]
) -> Path:
    """Write tensors and their record; what the folder had of ours is replaced.

    Args:
        folder: New, empty, or one that this function wrote.
        kind: What is written, such as "Direction"; reading asks for it.
        tensors: On any device.
        record: JSON values.

    Returns:
        The folder.

    Raises:
        InputError: The folder holds something else, or the record has a value that JSON lacks.
        OutputError: The disk is full, or another process is writing there.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not _may_write(folder):
        raise InputError(f"{folder} exists and is no folder of ours to overwrite: name a new one")
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    file = f"{digest[:16]}.safetensors"
    head = {"format": _FORMAT, "kind": kind, "tensors": file, "sha256": digest}
    try:
        text = json.dumps({**head, **record}, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"the record of a {kind} takes JSON values only: {error}") from error
    with locked(folder):
        sweep(folder)
        with written(folder / file) as part:
            part.write_bytes(data)
        write_text(folder / _RECORD, text)
        for old in folder.glob("*.safetensors"):
            if old.name != file:
                old.unlink()
    return folder


def _may_write(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return not names or _RECORD in names


def read_folder(folder: str | Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record that `write_folder` wrote.

    Raises:
        CheckpointError: The folder is missing, damaged, holds something else, or was written by a
            newer version of this package.
    """
    folder = Path(folder).expanduser()
    path = folder / _RECORD
    if not path.is_file():
        raise CheckpointError(f"{folder} is no saved {kind}: it has no {_RECORD}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found, format, file, digest = (
            record.pop(key) for key in ("kind", "format", "tensors", "sha256")
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged, or is not the record of a {kind}") from error
    if format != _FORMAT:
        raise CheckpointError(
            f"{path} has format {format}, but this version of llama_probe reads format {_FORMAT}"
        )
    if found != kind:
        raise CheckpointError(f"{folder} holds a {found}, not a {kind}")
    # A name with a folder in it would lead out of this one.
    if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
        raise CheckpointError(f"{folder} is damaged: the tensors that {_RECORD} names are missing")
    data = (folder / file).read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(f"{folder / file} is damaged: its SHA-256 is not the one on record")
    try:
        return load(data), record
    except SafetensorError as error:
        raise CheckpointError(f"{folder / file} is damaged: {error}") from error
