"""Principal components of activations: many prompts as points in a plane, layer by layer.

1. Run the prompts in batches, and keep what is at one site of every layer at one position.
2. In each layer take the mean over prompts away, and rotate to the two directions along which the
   prompts differ most (Pearson 1901).
3. Give each prompt's place on them, and the share of the variance that they hold.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.hooks import HookPoint, act_name, reads_only
from llama_probe.model.llama import Llama

# What is [batch pos d_model] in every layer that has it.
SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "shared_out")
_BATCH = 32


@torch.no_grad()
def activation_pca(
    model: Llama,
    prompts: Any,
    at: str = "resid_post",
    pos: int = -1,
    *,
    labels: Sequence[Any] | None = None,
) -> pd.DataFrame:
    """Where each prompt lies on the two principal components of a site's activations.

    A component may as well point the other way; here its largest loading is positive, so that two
    runs agree. The components of one layer say nothing about those of another.

    Args:
        model: The model.
        prompts: Two or more texts, or tokens [batch pos].
        at: The site: a stream ("resid_pre", "resid_mid", "resid_post") or what is added to it
            ("attn_out", "mlp_out"; "shared_out" in layers with a shared expert).
        pos: The position in each prompt: from 0, or negative ones from its end; padding does not
            count.
        labels: What to call each prompt's kind, as a column `label`; None: an empty text.

    Returns:
        One row for each layer and prompt: `layer`, `prompt` (which), `text`, `pc1`, `pc2` (in the
        activations' own units), `explained1`, `explained2` (fractions of that layer's variance; 0
        if the prompts do not differ), `label`.

    Raises:
        InputError: There are fewer than two prompts, or not one label for each; the site is
            unknown, or the model has none; or a prompt has no such position.

    >>> from llama_probe.model.config import LlamaConfig
    >>> cfg = LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50)
    >>> frame = activation_pca(Llama(cfg), torch.tensor([[1, 2], [1, 3], [1, 4]]))
    >>> len(frame), bool((frame.explained1 >= frame.explained2).all())
    (6, True)
    """
    layers = checked_layers(model, at)
    texts = prompt_texts(model, prompts)
    names = _labels(labels, len(texts))
    kept = _capture(model, prompts, at, pos, layers)
    frames = [
        pd.DataFrame({"layer": layer, "prompt": range(len(texts)), "text": texts, **_plane(points)})
        for layer, points in kept.items()
    ]
    frame = pd.concat(frames, ignore_index=True)
    return frame.assign(label=names * len(kept))


def sites_of(model: Llama) -> list[str]:
    """The sites that some layer of a model has."""
    return [at for at in SITES if _layers_with(model, at)]


def checked_layers(model: Llama, at: str) -> list[int]:
    """The layers that have a site.

    Raises:
        InputError: There is no such site, or the model has none.
    """
    if at not in SITES:
        raise InputError(f"at is {at!r}, but should be one of {', '.join(SITES)}")
    layers = _layers_with(model, at)
    if not layers:
        raise InputError(f"at is {at!r}, but no layer of this model has a shared expert")
    return layers


def prompt_texts(model: Llama, prompts: Any) -> list[str]:
    """The text of each of several prompts; of tokens without a tokenizer, ids in angle brackets.

    Raises:
        InputError: There are fewer than two.
    """
    few = InputError("components need two or more prompts, as a list of texts")
    if isinstance(prompts, str) or not len(prompts):
        raise few
    if isinstance(prompts[0], str):
        texts = list(prompts)
    else:
        texts = ["".join(model.to_str_tokens(row)) for row in model.to_tokens(prompts)]
    if len(texts) < 2:
        raise few
    return texts


def _place(pos: int, lengths: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """A position of each prompt, counted from its own start.

    Args:
        pos: The position; negative ones count from the end.
        lengths: How many tokens each prompt has.

    Raises:
        InputError: A prompt is too short for that.

    >>> _place(-1, torch.tensor([3, 5])).tolist()
    [2, 4]
    """
    found = lengths + pos if pos < 0 else torch.full_like(lengths, pos)
    short = (found < 0) | (found >= lengths)
    if short.any():
        which = int(short.nonzero()[0])
        raise InputError(f"pos is {pos}, but prompt {which} has {int(lengths[which])} tokens")
    return found


def _layers_with(model: Llama, at: str) -> list[int]:
    return [layer for layer in range(model.cfg.n_layers) if act_name(at, layer) in model.hook_dict]


def _labels(labels: Sequence[Any] | None, n: int) -> list[str]:
    if labels is None:
        return [""] * n
    if len(labels) != n:
        raise InputError(f"there are {len(labels)} labels for {n} prompts; give one each")
    return list(map(str, labels))


def _capture(
    model: Llama, prompts: Any, at: str, pos: int, layers: Sequence[int]
) -> dict[int, Float[Tensor, "prompt d_model"]]:
    """What is at the site at one position of each prompt, by layer."""
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    tokens, mask = model.tokens_and_mask(prompts)
    lengths = mask.long().sum(dim=1)
    columns = tokens.shape[1] - lengths + _place(pos, lengths)
    for some in torch.arange(len(tokens), device=tokens.device).split(_BATCH):
        # Padding on the left that the whole batch has in common costs time for nothing.
        start = int(tokens.shape[1] - lengths[some].max())
        batch, at_columns = tokens[some, start:], columns[some] - start

        def keep(tensor: Tensor, hook: HookPoint, at_columns: Tensor = at_columns) -> None:
            rows = torch.arange(len(tensor), device=tensor.device)
            parts[hook.layer()].append(tensor[rows, at_columns].double().cpu())

        model.run_with_hooks(
            batch,
            attention_mask=mask[some, start:],
            fwd_hooks=[([act_name(at, layer) for layer in layers], reads_only(keep))],
            stop_at_layer=max(layers) + 1,
        )
    return {layer: torch.cat(part) for layer, part in parts.items()}


def _plane(points: Float[Tensor, "prompt d_model"]) -> dict[str, list[float] | float]:
    """The columns of the two first components; with two prompts the second one is empty."""
    centred = points - points.mean(dim=0)
    u, spread, loadings = torch.linalg.svd(centred, full_matrices=False)
    largest = loadings.gather(1, loadings.abs().argmax(dim=1, keepdim=True))[:, 0]
    scores = u * spread * torch.where(largest < 0, -1.0, 1.0)
    total = spread.square().sum()
    shares = spread.square() / total if total > 0 else torch.zeros_like(spread)
    return {
        "pc1": scores[:, 0].tolist(),
        "pc2": scores[:, 1].tolist(),
        "explained1": float(shares[0]),
        "explained2": float(shares[1]),
    }
