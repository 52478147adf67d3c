"""LoRA adapters of random factors, written as PEFT writes them, to be merged or damaged."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import torch
from conftest import unchecked
from safetensors.torch import load_file, save_file
from torch import Tensor

import llama_probe as lp
from llama_probe.model.llama import Llama

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "base_model.model.model.layers.1.self_attn.q_proj"


@cache
def base(family: str = "llama-gqa") -> Llama:
    """A model to merge into, not to be changed."""
    return tiny.make(family)


def write(folder: Path, layers: dict[str, tuple[int, int, int]], **changes: Any) -> Path:
    """An adapter of random factors: rank, inputs and outputs by layer."""
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": None, "r": 4, "lora_alpha": 6}
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))
    torch.manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for layer, (rank, n_in, n_out) in layers.items():
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, n_in) / 4
        tensors[f"{layer}.lora_B.weight"] = torch.randn(n_out, rank) / 4
    save_file(tensors, folder / WEIGHTS)
    return folder


def small(parent: Path) -> Path:
    """An adapter for one projection of `base()`, with alpha / r = 1.5."""
    return write(parent / "small", {Q: (4, 64, 64)})


def change_config(folder: Path, **changes: Any) -> None:
    """Set some keys of adapter_config.json."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the tensors after a change of the dictionary that they are."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def load(path: str | Path, **options: Any) -> Llama:
    """`lp.load` on the CPU and in silence."""
    return lp.load(path, device="cpu", progress=False, **options)


def gap(a: Any, b: Any) -> float:
    """Largest difference of logits between two models, ours or transformers'."""
    with unchecked():
        one, other = (getattr(out := model(tiny.tokens()), "logits", out) for model in (a, b))
    return float((one - other).abs().max())
