"""From named tensors to a model: every weight found, none left over, every shape right."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from llama_probe.checkpoints.names import IGNORED, Source
from llama_probe.errors import CheckpointError, near
from llama_probe.model.config import LlamaConfig
from llama_probe.model.llama import Llama
from llama_probe.tokenizer import Tokenizer

Sources = Callable[[str, LlamaConfig], list[Source]]


@runtime_checkable
class Tensors(Protocol):
    """A checkpoint: tensors by name, each read when it is asked for."""

    def __getitem__(self, name: str, /) -> Tensor: ...
    def __contains__(self, name: object, /) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...


def skeleton(cfg: LlamaConfig, tokenizer: Tokenizer | None) -> Llama:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return Llama(cfg, tokenizer)


def fill(
    model: Llama,
    tensors: Tensors,
    sources: Sources,
    where: str,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    also_used: Iterable[str] = (),
    progress: bool = False,
) -> Llama:
    """Give a skeleton its weights, frozen and in evaluation mode.

    Args:
        model: From `skeleton`.
        tensors: The checkpoint.
        sources: Where each weight may stand in it.
        where: What the checkpoint is called in errors.
        device: Where the weights go; None: where they are.
        dtype: What they become; None: what the embedding is.
        also_used: Names in the checkpoint that are accounted for already.
        progress: Show a progress bar.

    Raises:
        CheckpointError: A tensor is missing, has the wrong shape or kind, or is used by nothing.
    """
    names = list(tensors)
    used = set(also_used)
    parameters = list(model.named_parameters())
    for name, parameter in tqdm(parameters, desc="weights", disable=not progress, leave=False):
        source = _present(sources(name, model.cfg), tensors, names, where)
        used.update(source.names)
        tensor = _built(source, tensors, parameter, where)
        # Files may keep norms in another precision than the rest; a pass needs one for all.
        dtype = dtype or tensor.dtype
        tensor = tensor.to(device=device, dtype=dtype)
        owner, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(owner), own_name, nn.Parameter(tensor, requires_grad=False))
    if model.cfg.tied:
        model.unembed.weight = model.embed.weight
        used.add("lm_head.weight")
    left = [name for name in names if name not in used and not any(i in name for i in IGNORED)]
    if left:
        raise CheckpointError(
            f"{where} has {len(left)} tensors that nothing uses, among them {left[0]!r}: "
            "its configuration does not describe it"
        )
    model.to(model.embed.weight.device)  # lets the configuration know
    return model.eval()


def _present(sources: list[Source], tensors: Tensors, names: list[str], where: str) -> Source:
    for source in sources:
        if all(name in tensors for name in source.names):
            return source
    missing = next(name for name in sources[0].names if name not in tensors)
    raise CheckpointError(f"{where} has no tensor {missing!r}{near(missing, names)}")


def _built(source: Source, tensors: Tensors, parameter: Tensor, where: str) -> Tensor:
    parts = [tensors[name] for name in source.names]
    asked = source.asked(tuple(parameter.shape))
    for name, part in zip(source.names, parts, strict=True):
        if not part.is_floating_point():
            raise CheckpointError(
                f"{name!r} of {where} holds {part.dtype}, not numbers that a weight can have: "
                "quantised weights can be loaded from GGUF files only"
            )
        if part.shape != asked:
            raise CheckpointError(
                f"{name!r} of {where} has shape {tuple(part.shape)}, "
                f"but the configuration asks for {asked}"
            )
    return source.build(parts)
