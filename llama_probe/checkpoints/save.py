"""`lp.save`: a model as a Hugging Face folder, which `lp.load` and transformers read."""

import json
import os
import shutil
from pathlib import Path
from tempfile import mkdtemp

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from llama_probe.checkpoints.names import Source, sources
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama

_ARCHITECTURE = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama4_text": "Llama4ForCausalLM",
}
_KEPT = "kept_in_memory"


def save(model: Llama, folder: str | Path) -> Path:
    """Write a model's weights, configuration and tokenizer.

    The folder appears in one step, when everything in it is written.

    Args:
        model: What to write; hooks and edits are no part of it.
        folder: Must not exist, or be empty.

    Returns:
        The folder.

    Raises:
        InputError: The folder holds something already, or the model is to stay in memory.
        ConfigError: No family of transformers has this combination of switches.
    """
    if (why := why_kept(model)) is not None:
        raise InputError(f"{model.cfg.model_name} is not to be saved: {why}")
    folder = Path(os.path.expanduser(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder: name a new one")
    config = {
        **model.cfg.to_hf(),
        "architectures": [_ARCHITECTURE[model.cfg.model_type]],
        "dtype": str(model.cfg.dtype).removeprefix("torch."),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(mkdtemp(prefix=f".{folder.name}-", suffix=".part", dir=folder.parent))
    try:
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if model.tokenizer is not None:
            model.tokenizer.save(unfinished)
        save_torch_state_dict(published(model), unfinished)
        unfinished.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return folder


def keep_in_memory(model: Llama, why: str) -> Llama:
    """Mark a model, and so its copies, as one that `save` refuses to write.

    Args:
        model: The model, which is also returned.
        why: The reason, as what follows "is not to be saved: ".
    """
    vars(model)[_KEPT] = why
    return model


def why_kept(model: Llama) -> str | None:
    """Why a model is not to be saved, if `keep_in_memory` said so."""
    return vars(model).get(_KEPT)


def published(model: Llama) -> dict[str, Tensor]:
    """The weights under the names and in the forms in which such models are published."""
    written: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        source = sources(name, model.cfg)[0]
        for part_name, part in zip(source.names, _parts(source, parameter), strict=True):
            head = part_name.startswith("lm_head")
            written[part_name if head else f"model.{part_name}"] = part.detach().contiguous()
    return written


def _parts(source: Source, weight: Tensor) -> list[Tensor]:
    """Undo a source's `build`."""
    match source.build.__name__:
        case "only":
            return [weight]
        case "transposed":
            return [weight.transpose(1, 2)]
        case "stacked":
            # Copies, here and below: tensors of one file must not share memory.
            return [part.clone() for part in weight]
        case "paired":
            gates, ups = weight.chunk(2, dim=1)
            return [part.clone() for part in (*gates, *ups)]
    raise AssertionError(source.build)
