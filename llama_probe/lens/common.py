"""What the lenses share: their precision, and the checks of a position, a layer and a head."""

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.model.config import LlamaConfig
from llama_probe.model.llama import Llama


def wide(x: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """In float32, or in x's own precision where that is higher."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def position(name: str, pos: int, n_pos: int) -> int:
    """A position counted from 0; negative ones count from the end.

    Raises:
        InputError: There is no such position.

    >>> position("pos", -1, 9)
    8
    """
    if not -n_pos <= pos < n_pos:
        raise InputError(f"{name} is {pos}, but the prompt has {n_pos} tokens")
    return pos % n_pos


def check_head(cfg: LlamaConfig, layer: int, head: int) -> None:
    """See that there is such a layer and such a head.

    Raises:
        InputError: There is not.
    """
    for name, index, n in (("layer", layer, cfg.n_layers), ("head", head, cfg.n_heads)):
        if not 0 <= index < n:
            raise InputError(f"{name} is {index}, but the model has {name}s 0 to {n - 1}")


def raised_and_lowered(model: Llama, logits: Float[Tensor, " d_vocab"], top_k: int) -> pd.DataFrame:
    """The tokens with the highest and the lowest values: `token`, `token_id`, `value`.

    Raised ones come first; there are `top_k` of either kind, as far as the vocabulary goes.
    """
    count = min(top_k, len(logits) // 2)
    high, low = logits.topk(count).indices, logits.topk(count, largest=False).indices
    ids = torch.cat((high, low.flip(0)))
    values = {"token_id": ids.tolist(), "value": logits[ids].tolist()}
    return pd.DataFrame({"token": model.to_str_tokens(ids), **values})
