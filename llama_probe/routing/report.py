"""Who is used, when, and how surely: what one pass says about a mixture of experts.

Measures follow OLMoE (Muennighoff et al. 2024, arXiv 2409.02060, section 5) where it has them.
Intervals are 95 % bootstraps over prompts, as the tokens of one prompt depend on each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from llama_probe.model.llama import Llama
from llama_probe.routing.resampling import ratio_interval
from llama_probe.routing.routes import Routes, as_routes


@dataclass(frozen=True)
class RoutingReport:
    """Tidy frames, one for each measure; those that do not apply are None.

    Attributes:
        load: `layer expert metric value ci_low ci_high uniform n`: "load", the share of tokens
            that choose the expert (sums to k), and "weighted_load", its share of the chosen
            experts' weights (sums to 1; its interval holds for the weights of these prompts).
            `uniform` is what equal use would give, k / E and 1 / E; `n` counts tokens.
        router: `layer metric value sd ci_low ci_high scores n`: the mean over tokens, and its
            standard deviation, of "entropy" (of the router's scores, divided by that of equal
            ones) and "margin" (highest score less second highest). `scores` says of what:
            "softmax", or "normalised sigmoid" (sigmoids divided by their sum).
        coactivation: `layer expert other value share baseline n`, for k of at least 2: `value` is
            the lift, P(both) / (P(expert) P(other)); `share` is P(other | expert), OLMoE's
            equation 6; `baseline` is the lift of k experts drawn at random without replacement,
            which is below 1; `n` counts tokens that choose both.
        transition: `layer next_layer expert next_expert value lift n`, for two layers at least:
            P(next_expert | expert) from each mixture-of-experts layer to the next one (sums to k),
            and that divided by the next expert's load. `n` counts the expert's tokens.
        persistence: `layer metric value ci_low ci_high n`: which share of its experts a token has
            in common with the token before it ("previous_token"), with another token of its
            prompt whatever the order ("same_prompt"), and with any other token ("any_prompt").
            "order" is the first less the second: what the neighbour has in common beyond what the
            prompt does. `n` counts pairs of neighbours.
        contributions: `layer kind expert metric value share n`, if asked for. For each expert, and
            the shared one (`kind` "shared", no `expert`), the mean over the `n` tokens that it
            sees of "norm" (norm of what it writes / norm of the layer's update) and "signed" (its
            component along the update, a fraction of it: 1 in sum over a token's experts);
            `share` is the mean over all tokens, where an expert that is not chosen writes 0.
        by_label: `layer label expert value ci_low ci_high uniform n`, if there are labels: the load
            by the tokens of each label's prompts (OLMoE's domain specialisation).
    """

    load: pd.DataFrame
    router: pd.DataFrame
    persistence: pd.DataFrame
    coactivation: pd.DataFrame | None = None
    transition: pd.DataFrame | None = None
    contributions: pd.DataFrame | None = None
    by_label: pd.DataFrame | None = None


def routing_report(
    model: Llama | Routes,
    prompts: Any = None,
    labels: Sequence[Any] | None = None,
    *,
    contributions: bool = False,
    seed: int = 0,
) -> RoutingReport:
    """Who is used, when, and how surely, from one pass over prompts.

    Args:
        model: The model, or the `Routes` of its prompts.
        prompts: A text, a list of texts, or tokens, as for `routes_of`; None with `Routes`.
        labels: One label for each prompt, for `by_label`.
        contributions: Measure what each expert writes, too; costs more than the pass itself.
            Of `Routes`, it is there if it was recorded.
        seed: Of the bootstraps.

    Raises:
        InputError: As `routes_of`.

    >>> import llama_probe as lp
    >>> report = routing_report(lp.load("tiny-moe"), ["12+30=42;", "45+11=56;"])
    >>> load = report.load[(report.load.layer == 2) & (report.load.metric == "load")]
    >>> int(load.expert[load.value.idxmax()])  # the expert of arithmetic
    2
    """
    if isinstance(model, Routes):
        routes = as_routes(model, prompts, labels)
    else:
        routes = as_routes(model, prompts, labels, contributions=contributions)
    return RoutingReport(
        load=_load(routes, seed),
        router=_router(routes, seed),
        persistence=_persistence(routes, seed),
        coactivation=_coactivation(routes) if routes.top_k > 1 else None,
        transition=_transition(routes) if len(routes.layers) > 1 else None,
        contributions=None if routes.norm_share is None else _contributions(routes),
        by_label=None if routes.labels is None else _by_label(routes, seed),
    )


def _grid(routes: Routes) -> pd.DataFrame:
    """A row for each layer and expert."""
    layer = np.repeat(routes.layers, routes.n_experts)
    return pd.DataFrame(
        {"layer": layer, "expert": np.tile(np.arange(routes.n_experts), len(routes.layers))}
    )


def _by_prompt(values: Float[np.ndarray, "layer prompt cell"]) -> Float[np.ndarray, "prompt all"]:
    return values.transpose(1, 0, 2).reshape(values.shape[1], -1)


def _load(routes: Routes, seed: int) -> pd.DataFrame:
    counts, weights = routes.per_prompt(), routes.per_prompt(routes.weights)
    tokens = routes.lengths[:, None].astype(float)
    weight = np.broadcast_to(weights.sum(axis=2, keepdims=True), weights.shape)
    k, n_experts = routes.top_k, routes.n_experts
    frames = []
    for metric, parts, wholes, uniform in (
        ("load", counts, tokens, k / n_experts),
        ("weighted_load", weights, _by_prompt(weight), 1 / n_experts),
    ):
        value, low, high = ratio_interval(_by_prompt(parts), wholes, seed)
        columns = {"metric": metric, "value": value, "ci_low": low, "ci_high": high}
        frames.append(_grid(routes).assign(**columns, uniform=uniform, n=len(routes.tokens)))
    return pd.concat(frames, ignore_index=True)


def _by_label(routes: Routes, seed: int) -> pd.DataFrame:
    assert routes.labels is not None
    counts, lengths = _by_prompt(routes.per_prompt()), routes.lengths[:, None].astype(float)
    frames = []
    for label in dict.fromkeys(routes.labels):
        own = routes.labels == label
        value, low, high = ratio_interval(counts[own], lengths[own], seed)
        columns = {"value": value, "ci_low": low, "ci_high": high}
        uniform = routes.top_k / routes.n_experts
        frame = _grid(routes).assign(**columns, uniform=uniform, n=int(lengths[own].sum()))
        frame.insert(1, "label", label)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _sums(
    routes: Routes, values: Float[np.ndarray, "layer token"]
) -> Float[np.ndarray, "prompt layer"]:
    """The sum over each prompt's tokens."""
    return np.array([np.bincount(routes.prompt, layer) for layer in values]).T


def _router(routes: Routes, seed: int) -> pd.DataFrame:
    tokens = routes.lengths[:, None].astype(float)
    frames = []
    for metric, values in (("entropy", routes.entropy), ("margin", routes.margin)):
        value, low, high = ratio_interval(_sums(routes, values), tokens, seed)
        columns = {"layer": routes.layers, "metric": metric, "value": value}
        columns |= {"sd": values.std(axis=1, dtype=float), "ci_low": low, "ci_high": high}
        frames.append(pd.DataFrame(columns).assign(scores=routes.scores, n=len(routes.tokens)))
    return pd.concat(frames, ignore_index=True)


def _pairs(
    left: Int[np.ndarray, "token k"], right: Int[np.ndarray, "token k"], n_experts: int
) -> Float[np.ndarray, "expert expert"]:
    """How many tokens choose each expert of `left` and each one of `right`."""
    both = left.astype(np.int64)[:, :, None] * n_experts + right[:, None, :]
    counts = np.bincount(both.ravel(), minlength=n_experts**2)
    return counts.reshape(n_experts, n_experts).astype(float)


def _coactivation(routes: Routes) -> pd.DataFrame:
    k, n_experts, n_tokens = routes.top_k, routes.n_experts, len(routes.tokens)
    expert, other = np.nonzero(~np.eye(n_experts, dtype=bool))
    frames = []
    for layer, chosen in zip(routes.layers, routes.experts, strict=True):
        both = _pairs(chosen, chosen, n_experts)
        used = np.diag(both)
        with np.errstate(divide="ignore", invalid="ignore"):  # an expert that is never used
            share = both / used[:, None]
            lift = share * n_tokens / used
        columns = {"layer": layer, "expert": expert, "other": other}
        columns |= {"value": lift[expert, other], "share": share[expert, other]}
        frames.append(pd.DataFrame(columns).assign(n=both[expert, other].astype(int)))
    frame = pd.concat(frames, ignore_index=True)
    frame.insert(5, "baseline", (k - 1) * n_experts / (k * (n_experts - 1)))
    return frame


def _transition(routes: Routes) -> pd.DataFrame:
    n_experts, n_tokens = routes.n_experts, len(routes.tokens)
    expert, following = (side.ravel() for side in np.indices((n_experts, n_experts)))
    frames = []
    for index in range(len(routes.layers) - 1):
        here, there = routes.experts[index], routes.experts[index + 1]
        counts = _pairs(here, there, n_experts)
        used, used_next = (np.bincount(x.ravel(), minlength=n_experts) for x in (here, there))
        with np.errstate(divide="ignore", invalid="ignore"):  # an expert that is never used
            share = counts / used[:, None]
            lift = share * n_tokens / used_next
        columns = {"layer": routes.layers[index], "next_layer": routes.layers[index + 1]}
        columns |= {"expert": expert, "next_expert": following}
        columns |= {"value": share.ravel(), "lift": lift.ravel(), "n": used[expert]}
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _persistence(routes: Routes, seed: int) -> pd.DataFrame:
    k, n_tokens = routes.top_k, len(routes.tokens)
    next_to = np.flatnonzero(np.diff(routes.prompt) == 0)
    neighbours = (routes.lengths - 1)[:, None].astype(float)
    counts = routes.per_prompt()
    together = np.zeros((len(routes.layers), n_tokens))
    for index, chosen in enumerate(routes.experts):
        same = chosen[next_to, :, None] == chosen[next_to + 1, None, :]
        together[index, next_to] = same.sum(axis=(1, 2)) / k
    # Two different tokens of a prompt that uses an expert c times both use it in c (c - 1) of
    # n (n - 1) cases; prompts count by their neighbours, n - 1, as in "previous_token".
    alike = (counts * (counts - 1)).sum(axis=2).T / k / np.maximum(routes.lengths[:, None], 1)
    previous = _sums(routes, together)
    totals = counts.sum(axis=1)
    if n_tokens > 1:
        chance = (totals * (totals - 1)).sum(axis=1) / (n_tokens * (n_tokens - 1)) / k
    else:
        chance = np.full(len(routes.layers), np.nan)
    unknown = np.full(len(routes.layers), np.nan)
    rows = {
        "previous_token": ratio_interval(previous, neighbours, seed),
        "same_prompt": ratio_interval(alike, neighbours, seed),
        "order": ratio_interval(previous - alike, neighbours, seed),
        "any_prompt": (chance, unknown, unknown),
    }
    frames = [
        pd.DataFrame({"layer": routes.layers, "metric": metric, "value": value})
        .assign(ci_low=low, ci_high=high, n=int(neighbours.sum()))
        for metric, (value, low, high) in rows.items()
    ]  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def _contributions(routes: Routes) -> pd.DataFrame:
    assert routes.norm_share is not None and routes.signed_share is not None
    frames = []
    for metric, shares in (("norm", routes.norm_share), ("signed", routes.signed_share)):
        for layer, chosen, values in zip(routes.layers, routes.experts, shares, strict=True):
            part = values[:, : routes.top_k].ravel()
            count = np.bincount(chosen.ravel(), minlength=routes.n_experts)
            total = np.bincount(chosen.ravel(), part, minlength=routes.n_experts)
            experts: list[Any] = list(range(routes.n_experts))
            kinds = ["expert"] * routes.n_experts
            if values.shape[1] > routes.top_k:
                experts, kinds = [*experts, None], [*kinds, "shared"]
                count = np.append(count, len(values))
                total = np.append(total, values[:, -1].sum(dtype=float))
            with np.errstate(invalid="ignore"):  # an expert that is never used
                columns = {"value": total / count, "share": total / len(values), "n": count}
            frame = pd.DataFrame({"layer": layer, "kind": kinds, "expert": experts})
            frames.append(frame.assign(metric=metric, **columns))
    return pd.concat(frames, ignore_index=True).astype({"expert": "Int64"})
