"""PEFT's LoRA adapters, merged into their base model when they are loaded.

An adapter (LoRA, Hu et al. 2021, arXiv:2106.09685) turns a weight W [out in] into
W + (alpha / r) B A, with A [r in] and B [out r]; with `use_rslora` (Kalajdzievski 2023,
arXiv:2312.03732) the factor is alpha / sqrt(r). PEFT calls A and B after the linear layer of
transformers' model that they change. A `Llama` holds its weights in transformers' layout whatever
file they came from (rows that GGUF keeps in another order are put back when they are read), so
the layer's name is all that it takes to find the weight.
"""

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama_probe.checkpoints.assemble import fill, skeleton
from llama_probe.checkpoints.huggingface import read_json
from llama_probe.checkpoints.names import Source, only, sources
from llama_probe.checkpoints.save import keep_in_memory, why_kept
from llama_probe.errors import CheckpointError, near
from llama_probe.model.llama import Llama
from llama_probe.tokenizer import Tokenizer

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WHOLE_MODEL = ("model.safetensors", "model.safetensors.index.json")
_TENSOR = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_FLOATS = ("F64", "F32", "F16", "BF16")

_READ = frozenset(
    "peft_type base_model_name_or_path revision r lora_alpha use_rslora rank_pattern "
    "alpha_pattern".split()
)
# Keys that say how an adapter was made and trained: the tensors say which layers it changes.
_HARMLESS = frozenset(
    "auto_mapping corda_config ensure_weight_tying eva_config exclude_modules inference_mode "
    "layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config "
    "megatron_core peft_version qalora_group_size runtime_config target_modules task_type".split()
)
# What other keys may hold besides nothing. Other initialisations change the base as well.
_ALLOWED = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


def is_adapter(path: Path) -> bool:
    """Whether a path is a folder with an adapter_config.json."""
    return (path / _CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The base model that an adapter's configuration names.

    Raises:
        CheckpointError: It names none, or a revision of one; or a whole model lies in the folder
            too, so that it is unclear what should be loaded.
    """
    whole = next((file for file in _WHOLE_MODEL if (folder / file).is_file()), None)
    if whole is not None:
        raise CheckpointError(
            f"{folder} holds both a model ({whole}) and an adapter ({_CONFIG}): name the adapter's "
            "base (base=...), or keep the two in folders of their own"
        )
    config = read_json(folder / _CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{folder / _CONFIG} has base_model_name_or_path {base!r}, which names no model: name "
            "the base (base=...)"
        )
    if revision not in (None, "main"):
        raise CheckpointError(
            f"{folder / _CONFIG} asks for the revision {revision!r} of {base!r}: fetch it and name "
            "its folder (base=...)"
        )
    return base


def load_adapter(model: Llama, folder: str | Path, name: str = "") -> Llama:
    """Merge a LoRA adapter into a model.

    The sum is taken in float32 (float64 where the model has that) and kept in the model's dtype,
    as PEFT's `merge_and_unload` does it.

    Args:
        model: The base. It stays as it is; weights that the adapter does not touch are shared.
        folder: With adapter_config.json and adapter_model.safetensors; a tokenizer in it takes
            the place of the base's.
        name: What the adapter is called; the folder's name if empty.

    Returns:
        A new model, called "BASE + ADAPTER".

    Raises:
        CheckpointError: A file is missing or damaged, a switch is not implemented (DoRA, biases,
            `modules_to_save`, ...; the message names its key), or a tensor does not fit.
    """
    folder = Path(os.path.expanduser(folder))
    config = _read_config(folder / _CONFIG)
    targets = _targets(model)
    weights = {own: parameter.detach() for own, parameter in model.named_parameters()}
    where = str(folder / _WEIGHTS)
    with _opened(folder) as file:
        for layer, (a, b) in _pairs(file.keys(), where).items():
            if layer not in targets:
                raise CheckpointError(
                    f"{where} changes {layer!r}, which is no linear layer of "
                    f"{model.cfg.model_name}{near(layer, targets)}; embeddings, what is tied to "
                    "them, and experts cannot be merged"
                )
            weight, rank = weights[targets[layer]], config.rank(layer)
            n_out, n_in = weight.shape
            low = _checked(file, a, (rank, n_in), where), _checked(file, b, (n_out, rank), where)
            weights[targets[layer]] = _merged(weight, *low, config.scale(layer))
    cfg = model.cfg.but(model_name=f"{model.cfg.model_name} + {name or folder.resolve().name}")
    own_tokenizer = _tokenizer(folder) or model.tokenizer
    merged = fill(skeleton(cfg, own_tokenizer), weights, lambda own, _: [Source((own,))], where)
    why = why_kept(model)  # an adapter does not make a model of it that may be saved
    return merged if why is None else keep_in_memory(merged, why)


def _merged(
    weight: Float[Tensor, "n_out n_in"],
    a: Float[Tensor, "rank n_in"],
    b: Float[Tensor, "n_out rank"],
    scale: float,
) -> Float[Tensor, "n_out n_in"]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    a, b = (factor.to(weight.device, wide) for factor in (a, b))
    return (weight.to(wide) + scale * (b @ a)).to(weight.dtype)


def _targets(model: Llama) -> dict[str, str]:
    """Our weight for each linear layer of transformers' model that is a weight of ours as it is."""
    found: dict[str, str] = {}
    for own, parameter in model.named_parameters():
        if parameter.ndim != 2 or own == "embed.weight":
            continue
        for source in sources(own, model.cfg):
            if source.build is only:
                layer = source.names[0].removesuffix(".weight")
                found[layer if layer == "lm_head" else f"model.{layer}"] = own
    return found


def _tokenizer(folder: Path) -> Tokenizer | None:
    there = any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))
    return Tokenizer.from_folder(folder) if there else None


# --- adapter_config.json


@dataclass(frozen=True)
class _Config:
    """The ranks and factors of an adapter's layers."""

    r: int
    alpha: float
    rslora: bool
    ranks: dict[re.Pattern[str], int]
    alphas: dict[re.Pattern[str], float]

    def rank(self, layer: str) -> int:
        """The first pattern that fits decides, as in PEFT."""
        return next((n for pattern, n in self.ranks.items() if pattern.match(layer)), self.r)

    def scale(self, layer: str) -> float:
        """What B A is multiplied by."""
        alphas, rank = self.alphas.items(), self.rank(layer)
        alpha = next((value for pattern, value in alphas if pattern.match(layer)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _read_config(path: Path) -> _Config:
    config = read_json(path)
    if (kind := config.get("peft_type")) != "LORA":
        raise CheckpointError(f"{path} has peft_type {kind!r}, but only 'LORA' can be merged")
    for key, value in config.items():
        if value and key not in _READ | _HARMLESS and value not in _ALLOWED.get(key, ()):
            raise CheckpointError(
                f"{path} has {key} {value!r}, which is not implemented: only adapters that are "
                "W + (alpha / r) B A for weights W of linear layers can be merged"
            )
    return _Config(
        r=_rank(config.get("r"), f"r of {path}"),
        alpha=_alpha(config.get("lora_alpha"), f"lora_alpha of {path}"),
        rslora=bool(config.get("use_rslora")),
        ranks=_patterns(config, "rank_pattern", _rank, path),
        alphas=_patterns(config, "alpha_pattern", _alpha, path),
    )


def _rank(value: Any, where: str) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{where} is {value!r}, but should be a whole number from 1 up")
    return value


def _alpha(value: Any, where: str) -> float:
    # Beyond float32's range, and NaN, for which no comparison holds.
    if type(value) not in (int, float) or not abs(value) < 1e38:
        raise CheckpointError(f"{where} is {value!r}, but should be a finite number")
    return float(value)


def _patterns(
    config: dict[str, Any], key: str, checked: Callable[[Any, str], Any], path: Path
) -> dict[re.Pattern[str], Any]:
    """Values by the regular expression that the end of a layer's name should fit."""
    given = config.get(key) or {}
    try:
        return {
            re.compile(rf"(.*\.)?({pattern})$"): checked(value, f"{key}[{pattern!r}] of {path}")
            for pattern, value in given.items()
        }
    except (AttributeError, re.error) as error:
        raise CheckpointError(
            f"{path} has {key} {given!r}, but should have numbers by regular expression: {error}"
        ) from None


# --- adapter_model.safetensors


def _opened(folder: Path) -> Any:
    path = folder / _WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise CheckpointError(
            f"{folder} has no {_WEIGHTS}"
            + (
                "; adapter_model.bin is a pickle, which could run code: convert it with PEFT, "
                "whose save_pretrained writes safetensors"
                if pickled
                else ""
            )
        )
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from None


def _pairs(names: Iterable[str], where: str) -> dict[str, tuple[str, str]]:
    """The names of A and B by the layer that they change."""
    sides: dict[str, dict[str, str]] = {}
    for name in names:
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise CheckpointError(
                f"{where} has the tensor {name!r}, but only pairs of '<layer>.lora_A.weight' "
                "and '<layer>.lora_B.weight', with base_model.model before it, can be merged"
            )
        pair = sides.setdefault(found["layer"], {})
        if (twin := pair.setdefault(found["side"], name)) != name:
            raise CheckpointError(f"{where} has both {twin!r} and {name!r}: only one can be meant")
    for pair in sides.values():
        if len(pair) == 1:
            [(side, name)] = pair.items()
            raise CheckpointError(f"{where} has {name!r} without its lora_{'AB'[side == 'A']}")
    if not sides:
        raise CheckpointError(f"{where} has no tensors")
    return {layer: (pair["A"], pair["B"]) for layer, pair in sides.items()}


def _checked(file: Any, name: str, shape: tuple[int, int], where: str) -> Tensor:
    """One tensor, read once the file's header says that it is what it should be."""
    head = file.get_slice(name)
    if tuple(head.get_shape()) != shape:
        raise CheckpointError(
            f"{name!r} of {where} has shape {tuple(head.get_shape())}, but the rank in {_CONFIG} "
            f"and the base model ask for {shape}"
        )
    if head.get_dtype() not in _FLOATS:
        raise CheckpointError(
            f"{name!r} of {where} holds {head.get_dtype()}, but should hold one of "
            f"{', '.join(_FLOATS)}"
        )
    return file.get_tensor(name)
