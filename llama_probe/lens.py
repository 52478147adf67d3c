"""Reading the residual stream in the vocabulary: the logit lens and direct logit attribution.

1. The logit lens (nostalgebraist 2020) passes the stream as it stands before each layer through the
   last norm and the unembedding: what the model would predict if it stopped there.
2. Direct logit attribution (Elhage et al. 2021) splits the final stream into what the embedding,
   each head and each feed-forward wrote, and takes each part's share of a logit. The last norm's
   scale is held at its value in this run, which makes the split linear: the parts sum to the whole.
"""

from typing import Any

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.hooks import act_name
from llama_probe.model.llama import Llama


@torch.no_grad()
def logit_lens(model: Llama, prompt: Any, *, top_k: int = 5) -> pd.DataFrame:
    """What each layer would predict at each position.

    Args:
        model: The model.
        prompt: A text, or tokens [pos] or [1 pos].
        top_k: How many of the likeliest tokens to give.

    Returns:
        One row for each layer, position and rank: `layer` (0: the embedding; n_layers: the model's
        own output), `pos`, `input_token` (text at that position), `rank` (0: likeliest), `token`
        (its text), `token_id`, `prob` (a fraction), `logit`.

    Raises:
        InputError: There is more than one prompt, or `top_k` is out of range.

    >>> from llama_probe.model.config import LlamaConfig
    >>> cfg = LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50)
    >>> frame = logit_lens(Llama(cfg), torch.tensor([1, 2, 3]), top_k=1)
    >>> len(frame), int(frame.layer.max())
    (9, 2)
    """
    if not 1 <= top_k <= model.cfg.d_vocab:
        raise InputError(f"top_k is {top_k}, but should be 1 to {model.cfg.d_vocab}")
    tokens, mask = model.one_prompt(prompt)
    names = [act_name("resid_pre", "*"), act_name("resid_post", model.cfg.n_layers - 1)]
    _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=names, logits_at=-1)
    texts = model.to_str_tokens(tokens[0])
    frames = [
        _lens_frame(model, layer, stream[0], texts, top_k)
        for layer, stream in enumerate(cache.values())
    ]
    return pd.concat(frames, ignore_index=True)


def _lens_frame(
    model: Llama, layer: int, stream: Float[Tensor, "pos d_model"], texts: list[str], top_k: int
) -> pd.DataFrame:
    logits = model.unembed(model.ln_final.unhooked(stream)).float()
    top = logits.topk(top_k, dim=-1)
    probs = logits.softmax(dim=-1).gather(-1, top.indices)
    ids = top.indices.flatten().tolist()
    n_pos = len(texts)
    return pd.DataFrame(
        {
            "layer": layer,
            "pos": [pos for pos in range(n_pos) for _ in range(top_k)],
            "input_token": [text for text in texts for _ in range(top_k)],
            "rank": list(range(top_k)) * n_pos,
            "token": model.to_str_tokens(ids),
            "token_id": ids,
            "prob": probs.flatten().tolist(),
            "logit": top.values.flatten().tolist(),
        }
    )


@torch.no_grad()
def direct_logit_attribution(
    model: Llama,
    prompt: Any,
    answer: str | int,
    foil: str | int | None = None,
    *,
    pos: int = -1,
) -> pd.DataFrame:
    """How much each part of the model writes towards one token, or towards one against another.

    Args:
        model: The model.
        prompt: A text, or tokens [pos] or [1 pos].
        answer: The token, as text of one token or as its id.
        foil: The token to compare with; None for the answer's logit alone.
        pos: The position whose prediction is split.

    Returns:
        One row for each part: `component` ("embed", "L3 H5", "L3 mlp", "L3 bias"), `kind`
        ("embed", "head", "mlp", "bias"), `layer`, `head` (missing where there is none), `value`
        in logits. The values sum to the logit (difference) that the model gives.

    Raises:
        InputError: There is more than one prompt, a text is not one token, or there is no such
            position.

    >>> from llama_probe.model.config import LlamaConfig
    >>> model = Llama(LlamaConfig(n_layers=1, d_model=16, n_heads=4, d_mlp=32, d_vocab=50))
    >>> frame = direct_logit_attribution(model, torch.tensor([1, 2, 3]), answer=7, foil=8)
    >>> list(frame.component)
    ['embed', 'L0 H0', 'L0 H1', 'L0 H2', 'L0 H3', 'L0 mlp']
    """
    tokens, mask = model.one_prompt(prompt)
    if not -tokens.shape[1] <= pos < tokens.shape[1]:
        raise InputError(f"pos is {pos}, but the prompt has {tokens.shape[1]} tokens")
    names = ["hook_embed", act_name("z", "*"), act_name("mlp_out", "*"), "ln_final.hook_scale"]
    _, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=names)
    direction = model.unembed.weight[model.to_single_token(answer)].float()
    if foil is not None:
        direction = direction - model.unembed.weight[model.to_single_token(foil)]
    direction = direction * model.ln_final.weight / cache["ln_final.hook_scale"][0, pos]

    rows: list[tuple[str, str, int | None, int | None, float]] = []
    rows.append(("embed", "embed", None, None, _share(cache["hook_embed"][0, pos], direction)))
    for layer, block in enumerate(model.blocks):
        z, W_O = cache["z", layer][0, pos].float(), block.attn.W_O.float()
        written = einsum(z, W_O, "head d, head d d_model -> head d_model")
        for head, vector in enumerate(written):
            rows.append((f"L{layer} H{head}", "head", layer, head, _share(vector, direction)))
        if block.attn.o.bias is not None:
            rows.append((f"L{layer} bias", "bias", layer, None, _share(block.attn.b_O, direction)))
        mlp = _share(cache["mlp_out", layer][0, pos], direction)
        rows.append((f"L{layer} mlp", "mlp", layer, None, mlp))
    frame = pd.DataFrame(rows, columns=["component", "kind", "layer", "head", "value"])
    return frame.astype({"layer": "Int64", "head": "Int64"})


def _share(vector: Float[Tensor, " d_model"], direction: Float[Tensor, " d_model"]) -> float:
    return float(vector.float() @ direction)
