"""`lp.load`: from a name, a folder or a file to a model."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_probe.checkpoints import catalogue, gguf_llama, huggingface
from llama_probe.errors import CheckpointError, DownloadError, InputError, UnknownNameError, near
from llama_probe.model.llama import Llama


def load(
    name: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    pretrained: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Llama:
    """Load a model, frozen and in evaluation mode.

    Args:
        name: A catalogue name ("tiny-moe", "smollm2-135m-instruct"), a Hugging Face folder, a GGUF
            file, or a name on the Hugging Face hub ("org/name"). What is not on disk is fetched.
        device: "auto" takes a GPU where there is one.
        dtype: What the weights become; None: what they are in the checkpoint, and float32 for
            GGUF, whose weights are dequantised.
        pretrained: False for a twin of the model with the random weights that training would
            begin with: a baseline for whatever is found in the trained one. (It still carries
            its tokens: a probe finds those in it.)
        seed: Which random weights.
        progress: Show progress bars.

    Raises:
        UnknownNameError: The name means nothing; the message gives the near ones.
        CheckpointError: A file is missing, damaged, or does not fit its configuration.
        ConfigError: The configuration is not one that this package implements.
        DownloadError: It could not be fetched.
        InputError: `dtype` or `device` cannot be used.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype is {dtype!r}, but should be a floating-point torch.dtype")
    options: dict[str, Any] = {"device": _device(device), "dtype": dtype, "progress": progress}
    model = _found(name, options)
    return model if pretrained else _twin(model, seed)


def _found(name: str | Path, options: dict[str, Any]) -> Llama:
    path = Path(os.path.expanduser(name))  # Path's own raises where there is no such user
    if path.is_dir():
        return huggingface.load_folder(path, **options)
    if path.is_file():
        return gguf_llama.load_gguf(path, **options)
    if path.suffix == ".gguf" or path.is_absolute() or str(name).startswith((".", "~")):
        raise CheckpointError(f"there is no folder or file {path}")
    if str(name) in catalogue.names():
        there = catalogue.pull(str(name), progress=bool(options["progress"]))
        read = huggingface.load_folder if there.is_dir() else gguf_llama.load_gguf
        return read(there, name=str(name), **options)
    if str(name).count("/") == 1:
        return huggingface.load_folder(_from_hub(str(name)), name=str(name), **options)
    raise UnknownNameError(
        f"{str(name)!r} is no folder, no file and no model of the catalogue"
        f"{near(str(name), catalogue.names())}; a model on the hub is called 'org/name'"
    )


def _twin(model: Llama, seed: int) -> Llama:
    """The same network with fresh random weights; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        twin = Llama(replace(model.cfg, device=torch.device("cpu")), model.tokenizer)
    twin = twin.to(device=model.cfg.device, dtype=model.cfg.dtype)
    return twin.eval().requires_grad_(False)


def from_transformers(hf_model: Any, tokenizer: Any = None) -> Llama:
    """Probe a model that transformers has loaded: its weights are shared, none is copied.

    The given model stays as it is and goes on working.

    Args:
        hf_model: A causal language model of a family that this package implements.
        tokenizer: Its fast tokenizer, or None to work with tokens only.

    Raises:
        ConfigError: The family, or a switch of it, is not implemented.
        CheckpointError: A weight is missing, quantised, or left over.
    """
    return huggingface.from_transformers(hf_model, tokenizer)


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:
        # AssertionError: torch was built without it.
        reason = str(error).splitlines()[0]
        raise InputError(f"the device {str(device)!r} cannot be used: {reason}") from None


def _from_hub(name: str) -> Path:
    """The folder of a snapshot of the hub, fetched unless it is there."""
    from huggingface_hub import snapshot_download

    # No pickled weights, no code.
    wanted = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        # The hub client raises its own, its HTTP library's and the operating system's errors.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DownloadError(
            f"{name!r} could not be had from the Hugging Face hub: {reason}"
        ) from error
