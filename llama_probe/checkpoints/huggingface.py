"""Hugging Face's folders and in-memory models."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_probe.checkpoints.assemble import fill, skeleton
from llama_probe.checkpoints.names import sources
from llama_probe.errors import CheckpointError
from llama_probe.model.config import LlamaConfig
from llama_probe.model.llama import Llama
from llama_probe.tokenizer import Tokenizer


def load_folder(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    name: str = "",
    progress: bool = False,
) -> Llama:
    """Load config.json, safetensors and tokenizer from a folder.

    Args:
        folder: With config.json, model.safetensors or its shards, and the tokenizer's files.
        device: Where the weights go.
        dtype: What they become; None: what they are in the file.
        name: What the model is called; the folder's name if empty.
        progress: Show a progress bar.

    Raises:
        CheckpointError: A file is missing or damaged, or a tensor does not fit.
        ConfigError: The configuration is not one that this package implements.
    """
    cfg = LlamaConfig.from_hf(read_json(folder / "config.json"), name or folder.name)
    with ExitStack() as files:
        tensors = _Safetensors(folder, files)
        # Follow the file, not the configuration: without an unembedding it is the embedding.
        if "lm_head.weight" not in tensors:
            cfg = cfg.but(tied=True)
        model = skeleton(cfg, _tokenizer(folder))
        return fill(
            model, tensors, sources, str(folder), device=device, dtype=dtype, progress=progress
        )


def read_json(path: Path) -> Any:
    """The contents of a JSON file.

    Raises:
        CheckpointError: It is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None


def _tokenizer(folder: Path) -> Tokenizer | None:
    files = ("tokenizer.json", "tokenizer.model")
    there = any((folder / file).is_file() for file in files)
    return Tokenizer.from_folder(folder) if there else None


class _Safetensors(Mapping[str, Tensor]):
    """The tensors of one safetensors file or of its shards, each read when asked for."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self._files: dict[str, Any] = {}
        self._names: dict[str, str] = {}
        for path in _weight_files(folder):
            try:
                file = files.enter_context(safe_open(path, framework="pt"))
                held = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged or cut short: {error}") from None
            self._files.update(dict.fromkeys(held, file))
        prefix = text_prefix(self._files, str(folder))
        self._names = {name.removeprefix(prefix): name for name in self._files}
        if prefix.startswith("language_model."):
            self._names = {n.removeprefix("language_model."): f for n, f in self._names.items()}

    def __getitem__(self, name: str) -> Tensor:
        stored = self._names[name]
        try:
            return self._files[stored].get_tensor(stored)
        except SafetensorError as error:
            raise CheckpointError(f"{stored!r} cannot be read: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise CheckpointError(
                f"{folder} has neither model.safetensors nor {index.name}; "
                "other formats (pickled .bin and .pth files) are not read"
            )
        return [single]
    try:
        shards = sorted(set(read_json(index)["weight_map"].values()))
    except (TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{index} has no 'weight_map' from tensors to files") from None
    paths = [folder / str(shard) for shard in shards]
    for path in paths:
        # A shard's name must not lead out of the folder.
        if path.name != str(path.relative_to(folder)) or not path.is_file():
            raise CheckpointError(f"{index} names the file {path.name!r}, which is not in {folder}")
    return paths


def text_prefix(names: Mapping[str, Any], where: str) -> str:
    """What comes before `embed_tokens.weight` in a checkpoint's names.

    Raises:
        CheckpointError: There is no such tensor.
    """
    for name in names:
        if name.endswith("embed_tokens.weight"):
            return name.removesuffix("embed_tokens.weight")
    raise CheckpointError(f"{where} has no tensor 'model.embed_tokens.weight'")


def from_transformers(hf_model: Any, tokenizer: Any = None) -> Llama:
    """Probe a model that transformers has loaded; see `llama_probe.from_transformers`."""
    where = type(hf_model).__name__
    config = hf_model.config.to_dict()
    cfg = LlamaConfig.from_hf(config, str(config.get("_name_or_path") or ""))
    held = {name: parameter.detach() for name, parameter in hf_model.named_parameters()}
    prefix = text_prefix(held, where)
    tensors = {name.removeprefix(prefix): tensor for name, tensor in held.items()}
    if "lm_head.weight" not in tensors:
        cfg = cfg.but(tied=True)
    own = None if tokenizer is None else Tokenizer.from_transformers(tokenizer)
    return fill(skeleton(cfg, own), tensors, sources, where)
