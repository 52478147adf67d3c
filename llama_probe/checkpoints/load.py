"""`lp.load`: from a name, a folder or a file to a model."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama_probe.checkpoints import adapters, catalogue, gguf_llama, huggingface
from llama_probe.errors import (
    CheckpointError,
    DownloadError,
    InputError,
    LlamaProbeError,
    UnknownNameError,
    near,
)
from llama_probe.model.llama import Llama


def load(
    name: str | Path,
    *,
    base: str | Path | Llama | None = None,
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
            A folder with an adapter_config.json is a LoRA adapter as PEFT saves it, which is
            merged into its base; the model's name is then "BASE + ADAPTER".
        base: What an adapter is merged into, as `name` or as a model, which stays as it is and
            whose device and dtype are kept unless others are asked for; None: what the adapter's
            configuration names.
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
        CheckpointError: A file is missing, damaged, or does not fit its configuration or base.
        ConfigError: The configuration is not one that this package implements.
        DownloadError: It could not be fetched.
        InputError: `dtype`, `device` or `base` cannot be used.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype is {dtype!r}, but should be a floating-point torch.dtype")
    options: dict[str, Any] = {"device": _device(device), "dtype": dtype, "progress": progress}
    path, called = _located(name, progress)
    if not adapters.is_adapter(path):
        if base is not None:
            raise InputError(f"base is for adapters, but {path} has no adapter_config.json")
        model = _whole(path, called, options)
    elif isinstance(base, Llama):
        model = adapters.load_adapter(base, path, called)
        model.to(device=None if device == "auto" else options["device"], dtype=dtype)
    else:
        model = adapters.load_adapter(_base(path, base, options), path, called)
    return model if pretrained else _twin(model, seed)


def _located(name: str | Path, progress: bool) -> tuple[Path, str]:
    """Where a model lies, fetched unless it is there, and its name; "": as the file is called."""
    path = Path(os.path.expanduser(name))  # Path's own raises where there is no such user
    if path.is_dir() or path.is_file():
        return path, ""
    if path.suffix == ".gguf" or path.is_absolute() or str(name).startswith((".", "~")):
        raise CheckpointError(f"there is no folder or file {path}")
    if str(name) in catalogue.names():
        return catalogue.pull(str(name), progress=progress), str(name)
    if str(name).count("/") == 1:
        return _from_hub(str(name)), str(name)
    raise UnknownNameError(
        f"{str(name)!r} is no folder, no file and no model of the catalogue"
        f"{near(str(name), catalogue.names())}; a model on the hub is called 'org/name'"
    )


def _whole(path: Path, called: str, options: dict[str, Any]) -> Llama:
    read = huggingface.load_folder if path.is_dir() else gguf_llama.load_gguf
    return read(path, name=called, **options)


def _base(adapter: Path, given: str | Path | None, options: dict[str, Any]) -> Llama:
    """The model that an adapter is merged into."""
    if given is not None and not isinstance(given, str | Path):
        raise InputError(
            f"base is {type(given).__name__}, but should be what `load` takes, or a Llama: "
            "`from_transformers` makes one of a model of transformers"
        )
    named = adapters.base_of(adapter) if given is None else given
    try:
        path, called = _located(named, bool(options["progress"]))
        if adapters.is_adapter(path):
            raise CheckpointError(
                f"{str(named)!r} is an adapter itself: load it, and give that model as the base"
            )
        return _whole(path, called, options)
    except LlamaProbeError as error:
        if given is not None:
            raise
        raise type(error)(
            f"the base that {adapter} asks for cannot be loaded (base=... names another): {error}"
        ) from error


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
    weights = ["model*.safetensors", "adapter_model.safetensors"]
    wanted = ["*.json", *weights, "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:
        # The hub client raises its own, its HTTP library's and the operating system's errors.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DownloadError(
            f"{name!r} could not be had from the Hugging Face hub: {reason}"
        ) from error
