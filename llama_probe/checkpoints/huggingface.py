"""Hugging Face's folders and in-memory models."""

import json
from collections.abc import Iterable, Iterator, Mapping
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
    config = read_json(folder / "config.json")
    cfg = LlamaConfig.from_hf(config, name or folder.name)
    with ExitStack() as files:
        tensors = _Safetensors(folder, files)
        model = skeleton(as_stored(cfg, config, tensors), _tokenizer(folder))
        return fill(
            model, tensors, sources, str(folder), device=device, dtype=dtype, progress=progress
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: It is missing, no JSON, or no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} should hold a JSON object, not {type(found).__name__}")
    return found


def _tokenizer(folder: Path) -> Tokenizer | None:
    files = ("tokenizer.json", "tokenizer.model")
    there = any((folder / file).is_file() for file in files)
    return Tokenizer.from_folder(folder) if there else None


class _Safetensors(Mapping[str, Tensor]):
    """The tensors of one safetensors file or of its shards, each read when asked for."""

    def __init__(self, folder: Path, files: ExitStack) -> None:
        self._files: dict[str, Any] = {}
        for path in _weight_files(folder):
            try:
                file = files.enter_context(safe_open(path, framework="pt"))
                held = list(file.keys())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is damaged or cut short: {error}") from None
            self._files.update(dict.fromkeys(held, file))
        self._names = text_names(self._files, str(folder))

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
    for shard in shards:
        # A shard's name must not lead out of the folder.
        if Path(str(shard)).name != shard or not (folder / shard).is_file():
            raise CheckpointError(f"{index} names the file {shard!r}, which is not in {folder}")
    return [folder / shard for shard in shards]


def text_names(names: Iterable[str], where: str) -> dict[str, str]:
    """A checkpoint's names, by what is left of them without the way to the text model.

    >>> text_names(["model.embed_tokens.weight", "lm_head.weight"], "a folder")
    {'embed_tokens.weight': 'model.embed_tokens.weight', 'lm_head.weight': 'lm_head.weight'}

    Raises:
        CheckpointError: There is no embedding.
    """
    names = list(names)
    embedding = next((name for name in names if name.endswith("embed_tokens.weight")), None)
    if embedding is None:
        raise CheckpointError(f"{where} has no tensor 'model.embed_tokens.weight'")
    prefix = embedding.removesuffix("embed_tokens.weight")
    # The unembedding lies beside the model whose layers these are.
    outer = "language_model." if prefix.startswith("language_model.") else ""
    return {name.removeprefix(prefix).removeprefix(outer): name for name in names}


def as_stored(
    cfg: LlamaConfig, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> LlamaConfig:
    """Follow the weights on whether the unembedding is the embedding.

    A stored unembedding that differs is kept, whatever the configuration says; a missing one is the
    embedding, unless the configuration says that it should be there.
    """
    if "lm_head.weight" not in tensors:
        said = config.get("text_config", config).get("tie_word_embeddings")
        return cfg if said is False else cfg.but(tied=True)
    if not cfg.tied:
        return cfg
    head, embedding = tensors["lm_head.weight"], tensors["embed_tokens.weight"]
    return cfg.but(tied=torch.equal(head, embedding.to(head)))


def from_transformers(hf_model: Any, tokenizer: Any = None) -> Llama:
    """Probe a model that transformers has loaded; see `llama_probe.from_transformers`."""
    where = type(hf_model).__name__
    config = hf_model.config.to_dict()
    cfg = LlamaConfig.from_hf(config, str(config.get("_name_or_path") or ""))
    held = {name: parameter.detach() for name, parameter in hf_model.named_parameters()}
    tensors = {name: held[full] for name, full in text_names(held, where).items()}
    own = None if tokenizer is None else Tokenizer.from_transformers(tokenizer)
    return fill(skeleton(as_stored(cfg, config, tensors), own), tensors, sources, where)
