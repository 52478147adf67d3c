"""Every head's attention from one forward pass: where it looks, how much it moves, what it writes.

Queries, keys and values are kept, not patterns: those of a long text would not fit into memory. A
head's pattern is worked out when it is asked for, by the model's own formula.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama_probe.hooks import act_name
from llama_probe.lens.common import check_head, position, raised_and_lowered, wide
from llama_probe.lens.heads import METRICS, summaries, wanted_keys
from llama_probe.model.llama import Llama
from llama_probe.model.masks import visible
from llama_probe.model.norm import rms

# Of more queries than this, scores are the mean of as many, evenly spread.
_MOST_QUERIES = 256


@dataclass(frozen=True)
class AttentionMaps:
    """What the heads of a model do on one prompt; `attention_maps` makes it.

    Attributes:
        model: The model.
        ids: The prompt's tokens.
        tokens: Their texts.
        queries: By layer, as they enter the product: after RoPE.
        keys: Likewise.
        values: By layer.
        stream: The residual stream after the last layer.
    """

    model: Llama
    ids: Int[Tensor, " pos"]
    tokens: list[str]
    queries: list[Float[Tensor, "pos head d_head"]]
    keys: list[Float[Tensor, "pos kv_head d_head"]]
    values: list[Float[Tensor, "pos kv_head d_head"]]
    stream: Float[Tensor, "pos d_model"]

    @torch.no_grad()
    def pattern(
        self, layer: int, head: int, queries: Any = slice(None)
    ) -> Float[Tensor, "query key"]:
        """A head's attention weights; 0 where a query cannot look.

        Args:
            layer: The layer.
            head: The query head.
            queries: Some of the positions that look, as anything that indexes a tensor.

        Raises:
            InputError: There is no such layer or head.
        """
        check_head(self.model.cfg, layer, head)
        return self._patterns(layer, slice(head, head + 1), queries)[0]

    @torch.no_grad()
    def value_weighted(
        self, layer: int, head: int, queries: Any = slice(None)
    ) -> Float[Tensor, "query key"]:
        """How much each key brings: the share of its weight times the norm of what it would write.

        A key with much weight may bring nothing, as a first token often does (Kobayashi et al.
        2020, arXiv 2004.10102). The shares of a query sum to 1.

        Raises:
            InputError: There is no such layer or head.
        """
        norms = self._written(layer, head).norm(dim=-1)
        moved = wide(self.pattern(layer, head, queries)) * norms
        return moved / moved.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(moved.dtype).tiny)

    @torch.no_grad()
    def scores(self) -> pd.DataFrame:
        """The summaries of `lp.head_scores` for this prompt: a row for each head and metric.

        The columns are the same. `n` is how many queries it is a mean of: all but the first, or
        256 of them, evenly spread. There is no interval, and what nothing is known of is missing.
        """
        n_pos = len(self.tokens)
        chosen = torch.linspace(1, n_pos - 1, min(_MOST_QUERIES, n_pos - 1)).round().long()
        chosen = chosen.to(self.ids.device)
        wanted = wanted_keys(self.ids)[:, chosen]
        rows = []
        for layer in range(self.model.cfg.n_layers):
            pattern = wide(self._patterns(layer, slice(None), chosen))
            for metric, values in zip(METRICS, summaries(pattern, wanted).tolist(), strict=True):
                rows += [(layer, head, metric, x, len(chosen)) for head, x in enumerate(values)]
        frame = pd.DataFrame(rows, columns=["layer", "head", "metric", "value", "n"])
        frame[["ci_low", "ci_high"]] = float("nan")
        order = {name: place for place, name in enumerate(METRICS)}
        return frame.sort_values(
            ["layer", "head", "metric"],
            key=lambda column: column.map(order) if column.name == "metric" else column,
            ignore_index=True,
        )

    @torch.no_grad()
    def writes(
        self, layer: int, head: int, query: int, key: int | None = None, *, top_k: int = 8
    ) -> pd.DataFrame:
        """Which tokens a head's output at a position raises and lowers most.

        The output is read in the vocabulary through the last norm, whose scale is held at what it
        is at that position, so that these are parts of the logits.

        Args:
            layer: The layer.
            head: The query head.
            query: The position that looks.
            key: The share that comes from one key alone; None: from all of them.
            top_k: How many tokens of either kind.

        Returns:
            A row for each token, raised ones first: `token`, `token_id`, `value` in logits.

        Raises:
            InputError: There is no such layer, head or position.
        """
        query = position("query", query, len(self.tokens))
        weights = wide(self.pattern(layer, head, [query])[0])
        if key is not None:
            key = position("key", key, len(self.tokens))
            weights = weights * (torch.arange(len(weights), device=weights.device) == key)
        out = weights @ self._written(layer, head)
        final = self.model.ln_final
        out = out * wide(final.weight) / rms(self.stream[query], final.eps)
        return raised_and_lowered(self.model, wide(self.model.unembed.weight) @ out, top_k)

    def _written(self, layer: int, head: int) -> Float[Tensor, "pos d_model"]:
        """What the head would add to the stream if it looked at each position alone."""
        check_head(self.model.cfg, layer, head)
        attn = self.model.blocks[layer].attn
        values = self.values[layer][:, head * attn.n_kv // attn.n_heads]
        return wide(values) @ wide(attn.W_O[head])

    def _patterns(self, layer: int, heads: slice, queries: Any) -> Float[Tensor, "head query key"]:
        attn = self.model.blocks[layer].attn
        q = self.queries[layer][queries, heads].transpose(0, 1)
        served = torch.arange(attn.n_heads, device=q.device)[heads] * attn.n_kv // attn.n_heads
        k = self.keys[layer][:, served].transpose(0, 1)
        scores = (q @ k.transpose(1, 2) * attn.scale).masked_fill(
            ~self._seen(layer, queries), -torch.inf
        )
        return wide(scores).softmax(dim=-1).to(q.dtype)

    def _seen(self, layer: int, queries: Any) -> Tensor:
        index = torch.arange(len(self.tokens), device=self.ids.device)
        cfg = self.model.cfg
        seen = visible(cfg.masks[layer], cfg.window, index[None], len(index), None)
        return index <= index[queries, None] if seen is None else seen[0, 0, queries]


@torch.no_grad()
def attention_maps(model: Llama, prompt: Any) -> AttentionMaps:
    """Run a prompt once, and keep what every head's attention can be worked out from.

    Args:
        model: The model.
        prompt: A text, or tokens [pos] or [1 pos].

    Raises:
        InputError: There is more than one prompt, or it does not fit into the context.

    >>> from llama_probe.model.config import LlamaConfig
    >>> model = Llama(LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50))
    >>> maps = attention_maps(model, torch.tensor([1, 2, 3]))
    >>> maps.pattern(layer=1, head=3).shape, float(maps.pattern(0, 0)[0, 0])
    (torch.Size([3, 3]), 1.0)
    """
    ids, mask = model.one_prompt(prompt)
    words = ("rot_q", "rot_k", "v")
    n_layers = model.cfg.n_layers
    stream, cache = model.run_with_cache(
        ids,
        attention_mask=mask,
        names_filter=[act_name(word, "*") for word in words],
        stop_at_layer=n_layers,
    )
    queries, keys, values = ([cache[word, layer][0] for layer in range(n_layers)] for word in words)
    tokens = model.to_str_tokens(ids[0])
    return AttentionMaps(model, ids[0], tokens, queries, keys, values, stream[0])
