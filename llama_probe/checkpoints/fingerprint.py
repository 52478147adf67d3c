"""What a model or a tokenizer is, as a short hash, which results record and stores check."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from llama_probe.model.llama import Llama
from llama_probe.tokenizer import Tokenizer

# What a model is called and where it lies does not change what it computes.
_NOT_THE_MODEL = ("model_name", "device", "dtype")


def model_hash(model: Llama) -> str:
    """The SHA-256 of a model's configuration and weights, values and precision.

    Reads every weight once: about a second a gigabyte.

    >>> from llama_probe.model.config import LlamaConfig
    >>> cfg = LlamaConfig(n_layers=1, d_model=8, n_heads=2, d_mlp=8, d_vocab=9)
    >>> model, other = Llama(cfg), Llama(cfg)
    >>> model_hash(model) == model_hash(model), model_hash(model) == model_hash(other)
    (True, False)
    """
    found = hashlib.sha256()
    cfg = {name: value for name, value in asdict(model.cfg).items() if name not in _NOT_THE_MODEL}
    found.update(json.dumps(cfg, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.state_dict().items()):
        found.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        values = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(values.numpy().data)
    return found.hexdigest()


def tokenizer_hash(tokenizer: Tokenizer | None) -> str:
    """The SHA-256 of what `Tokenizer.save` writes; "none" for no tokenizer."""
    if tokenizer is None:
        return "none"
    found = hashlib.sha256()
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)
        for path in sorted(Path(folder).iterdir()):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()
