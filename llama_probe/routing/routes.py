"""Where a model sends its tokens: one pass over prompts that records what the measures need.

Of each token and each mixture-of-experts layer it keeps the chosen experts, their weights and how
sure the router was: a few numbers. The router's logits and what each expert writes are kept only
when asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.routing.recorder import Recorder


@dataclass(frozen=True)
class Routes:
    """The routing of some prompts, padding left out; tokens in the order of the prompts.

    Attributes:
        layers: The layers that are mixtures of experts; `layer` axes follow their order.
        n_experts: Routed experts in a layer.
        scores: What `entropy` and `margin` are of: "softmax", or "normalised sigmoid" where the
            router scores each expert by itself (Llama 4).
        tokens: Token ids.
        prompt: Which prompt each token is from.
        pos: Its position in the prompt.
        experts: The chosen experts.
        weights: What multiplies each of them, by the family's own rule.
        entropy: Of a token's scores, divided by that of equal ones: 0 (sure) to 1.
        margin: The highest of a token's scores less the second highest.
        labels: Each prompt's label, if there are any.
        logits: The router's logits, if asked for.
        norm_share: `norm(c) / norm(u)`, if asked for, for what each chosen expert (then the shared
            one, where there is one) writes, c, and the layer's whole update u, their sum.
        signed_share: `(c . u) / (u . u)`, likewise: sums to 1 over a token's experts.
    """

    layers: tuple[int, ...]
    n_experts: int
    scores: str
    tokens: Int[np.ndarray, " token"]
    prompt: Int[np.ndarray, " token"]
    pos: Int[np.ndarray, " token"]
    experts: Int[np.ndarray, "layer token k"]
    weights: Float[np.ndarray, "layer token k"]
    entropy: Float[np.ndarray, "layer token"]
    margin: Float[np.ndarray, "layer token"]
    labels: np.ndarray | None = None
    logits: Float[np.ndarray, "layer token expert"] | None = None
    norm_share: Float[np.ndarray, "layer token part"] | None = None
    signed_share: Float[np.ndarray, "layer token part"] | None = None

    @property
    def top_k(self) -> int:
        """Experts chosen for each token."""
        return self.experts.shape[2]

    @property
    def n_prompts(self) -> int:
        """How many prompts there are."""
        return int(self.prompt[-1]) + 1

    @property
    def lengths(self) -> Int[np.ndarray, " prompt"]:
        """How many tokens each prompt has."""
        return np.bincount(self.prompt)

    def per_prompt(
        self, values: Float[np.ndarray, "layer token k"] | None = None
    ) -> Float[np.ndarray, "layer prompt expert"]:
        """For each prompt and expert, the sum of something over the tokens that choose it.

        Args:
            values: What to sum; None: 1, which counts the tokens.
        """
        shape = (self.n_prompts, self.n_experts)
        place = self.prompt[:, None] * self.n_experts
        sums = [
            np.bincount(
                (place + chosen).ravel(),
                None if values is None else values[index].ravel(),
                minlength=shape[0] * shape[1],
            )
            for index, chosen in enumerate(self.experts)
        ]
        return np.array(sums, dtype=float).reshape(-1, *shape)

    def shares(self) -> Float[np.ndarray, "layer prompt expert"]:
        """The share of each prompt's tokens that choose each expert: sums to k over experts."""
        return self.per_prompt() / self.lengths[:, None]


@torch.no_grad()
def routes_of(
    model: Llama,
    prompts: Any,
    labels: Sequence[Any] | None = None,
    *,
    contributions: bool = False,
    logits: bool = False,
    batch_tokens: int = 4096,
) -> Routes:
    """Record the routing of prompts, in one pass that stops after the last mixture of experts.

    Hooks and edits that are in place act as in any other run, so that the routing under them can be
    recorded as well.

    Args:
        model: The model.
        prompts: A text, a list of texts, tokens [pos] or [batch pos], or a list of rows of tokens
            of any lengths.
        labels: One label for each prompt: its domain, its class.
        contributions: Record what share of the layer's update each expert writes. Needs each
            chosen expert's output, of one layer and one batch at a time.
        logits: Keep the router's logits, 4 bytes for each token, layer and expert.
        batch_tokens: Tokens of a batch, padding included, at most; a longer prompt runs alone.

    Raises:
        InputError: The model has no mixture of experts, there is no prompt, one cannot be used, or
            labels are missing or not as many as prompts.

    >>> import llama_probe as lp
    >>> routes = routes_of(lp.load("tiny-moe"), ["The capital of France is Paris.", "12+30=42;"])
    >>> routes.experts.shape, routes.lengths.tolist()
    ((4, 18, 1), [8, 10])
    """
    moe = model.cfg.moe
    layers = tuple(layer for layer, is_moe in enumerate(model.cfg.moe_layers) if is_moe)
    if moe is None or not layers:
        raise InputError("no layer of this model is a mixture of experts: there is no routing")
    rows = _rows(model, prompts)
    checked = None if labels is None else _checked_labels(labels, len(rows))
    recorder = Recorder(moe, layers, contributions, logits)
    order = []
    for batch in _batches(rows, batch_tokens):
        tokens, recorder.real = _padded(model, [rows[index] for index in batch])
        with model.hooks(recorder.hooks()):
            model(tokens, attention_mask=recorder.real, stop_at_layer=layers[-1] + 1)
        order += batch
    lengths = np.array([len(rows[index]) for index in order])
    prompt = np.repeat(order, lengths)
    back = np.argsort(prompt, kind="stable")
    return Routes(
        layers=layers,
        n_experts=moe.n_experts,
        scores="softmax" if moe.rule == "softmax" else "normalised sigmoid",
        tokens=np.concatenate([np.asarray(row) for row in rows]),
        prompt=prompt[back],
        pos=np.concatenate([np.arange(len(row)) for row in rows]),
        labels=checked,
        **{name: np.stack([layer[back] for layer in kept]) for name, kept in recorder.all()},
    )


def as_routes(model: Any, prompts: Any, labels: Any, **options: Any) -> Routes:
    """The routes of a model's prompts, or routes that were recorded before.

    Args:
        model: A model, or its `Routes`.
        prompts: As for `routes_of`; None with `Routes`.
        labels: As for `routes_of`; None with `Routes`: those recorded.
        **options: Of `routes_of`.

    Raises:
        InputError: Prompts are given beside routes, or neither; or as `routes_of`.
    """
    if not isinstance(model, Routes):
        if prompts is None:
            raise InputError("prompts are missing: give them, or the Routes of some")
        return routes_of(model, prompts, labels, **options)
    if prompts is not None:
        raise InputError("these are Routes already: prompts should be None")
    if labels is None:
        return model
    return replace(model, labels=_checked_labels(labels, model.n_prompts))


def _checked_labels(labels: Sequence[Any], n_prompts: int) -> np.ndarray:
    column = pd.Series(list(labels), dtype=object)
    if len(column) != n_prompts:
        raise InputError(f"there are {len(column)} labels for {n_prompts} prompts")
    if column.isna().any():
        raise InputError(f"the label of prompt {int(column.isna().argmax())} is missing")
    return column.to_numpy()


def _rows(model: Llama, prompts: Any) -> list[list[int]]:
    """The token ids of each prompt, without padding."""
    several = isinstance(prompts, list | tuple) and not all(isinstance(p, int) for p in prompts)
    if isinstance(prompts, list | tuple) and not prompts:
        raise InputError("there is no prompt to look at: the list is empty")
    rows = []
    for prompt in prompts if several else [prompts]:
        tokens, mask = model.tokens_and_mask(prompt)
        rows += [row[real].tolist() for row, real in zip(tokens, mask.bool(), strict=True)]
    return rows


def _batches(rows: list[list[int]], most: int) -> Iterator[list[int]]:
    """Prompts of similar length together, so that there is little padding."""
    batch: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
        if batch and (len(batch) + 1) * len(rows[index]) > most:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _padded(
    model: Llama, rows: list[list[int]]
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Rows padded on the left, and which tokens are no padding; the mask hides any pad token."""
    length = max(map(len, rows))
    pad = model.pad_token_id or 0
    tokens = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    real = torch.arange(length) >= length - lengths[:, None]
    return tokens.to(model.cfg.device), real.to(model.cfg.device)
