"""Which experts does a behaviour use, rather than the topics it comes with?

The risk difference of SteerMoE (arXiv 2509.09660), with prompts as units where that counts tokens,
and matched by topic, as routing follows topics (arXiv 2605.29708).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import false_discovery_control

from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.routing.resampling import RESAMPLES, count_at_least, shuffled_within
from llama_probe.routing.routes import Routes, routes_of

_CHUNK = 500  # permutations at once


def expert_contrast(
    model: Llama,
    set_a: Any,
    set_b: Any,
    topics: tuple[Sequence[Any], Sequence[Any]] | None = None,
    pairs: bool = False,
    permutations: int = 9999,
    seed: int = 0,
    *,
    top: int = 10,
) -> pd.DataFrame:
    """How much more each expert is used in one set of prompts than in another.

    The use of an expert is the share of a prompt's tokens that choose it, and a set's use the mean
    over its prompts. With topics, the difference is taken within each topic that both sets have,
    and averaged over topics: what is left when both sets talk about the same.

    The null swaps the sets' labels, within pairs or topics where these are given. The least p is
    1 / (permutations + 1), and `q` at most that times the number of experts of all layers: for
    thousands of experts take more permutations, or `p_max`.

    Args:
        model: The model.
        set_a: Prompts, as for `routes_of`, or their `Routes`.
        set_b: The same, of the other set.
        topics: The topics of the prompts of each set: ([...], [...]).
        pairs: Prompt i of `set_a` belongs to prompt i of `set_b`.
        permutations: How many.
        seed: Of the permutations and resamples.
        top: How many experts, those with the largest differences whatever the sign, count as found
            in a resample, for `stability`.

    Returns:
        One row for each layer and expert: `layer expert value ci_low ci_high raw use_a use_b p q
        p_max stability n_a n_b`. `value` is the difference within topics where these are given,
        else `raw`, that of the two uses. `p` (two-sided), its Benjamini-Hochberg `q` over all
        rows, and `p_max` (against the largest of all differences, each in units of its deviation
        under the null: the chance of any false discovery) are of `value`. So are the interval
        (95 %, bootstrap over prompts, or pairs, within topics; missing where a topic has one prompt
        only) and `stability`: the share of 2,000 resamples in which the expert is among the `top`.
        `n_a` and `n_b` count the prompts that `value` rests on.

    Raises:
        InputError: A set has fewer than two prompts, the sets are no pairs or of two models, topics
            are missing or have nothing in common, those of a pair differ, or as `routes_of`.

    >>> import llama_probe as lp
    >>> sums = [f"{a}+{b}={a + b};" for a, b in [(12, 30), (45, 11), (77, 20), (31, 18)]]
    >>> facts = [f"The capital of {c} is" for c in ("France", "Spain", "Italy", "Japan")]
    >>> frame = expert_contrast(lp.load("tiny-moe"), sums, facts)
    >>> top = frame.loc[frame.value.idxmax()]
    >>> int(top.layer), int(top.expert)  # the expert of arithmetic
    (2, 2)
    """
    if permutations < 1:
        raise InputError(f"permutations is {permutations}, but should be at least 1")
    a, b = (x if isinstance(x, Routes) else routes_of(model, x) for x in (set_a, set_b))
    if (a.layers, a.n_experts) != (b.layers, b.n_experts):
        raise InputError("the sets are Routes of models that differ in their layers or experts")
    shares = np.concatenate([_flat(a), _flat(b)])
    units = _units(a.n_prompts, b.n_prompts, topics, pairs)
    value = units.weights @ shares
    p, p_max = _permutation_p(shares, units, permutations, seed)
    low, high, stability = _bootstrap(shares, units, top, seed)
    use_a, use_b = shares[: a.n_prompts].mean(axis=0), shares[a.n_prompts :].mean(axis=0)
    columns = {
        "layer": np.repeat(a.layers, a.n_experts),
        "expert": np.tile(np.arange(a.n_experts), len(a.layers)),
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "raw": use_a - use_b,
        "use_a": use_a,
        "use_b": use_b,
        "p": p,
        "q": false_discovery_control(p, method="bh"),
        "p_max": p_max,
        "stability": stability,
        "n_a": int((units.weights > 0).sum()),
        "n_b": int((units.weights < 0).sum()),
    }
    return pd.DataFrame(columns)


def _flat(routes: Routes) -> Float[np.ndarray, "prompt cell"]:
    shares = routes.shares()
    return shares.transpose(1, 0, 2).reshape(routes.n_prompts, -1)


class _Units(NamedTuple):
    """How prompts enter the difference, and within what they are swapped and drawn.

    Attributes:
        weights: The difference is their sum of products with the prompts' uses.
        swapped: The stratum within which labels are swapped: pair, topic, or all.
        drawn: What is drawn together: the prompt itself, or its pair.
        within: The stratum of each thing drawn: its topic, and its set where there are no pairs.
    """

    weights: Float[np.ndarray, " prompt"]
    swapped: Int[np.ndarray, " prompt"]
    drawn: Int[np.ndarray, " prompt"]
    within: Int[np.ndarray, " drawn"]


def _units(
    n_a: int, n_b: int, topics: tuple[Sequence[Any], Sequence[Any]] | None, pairs: bool
) -> _Units:
    if min(n_a, n_b) < 2:
        raise InputError(f"the sets have {n_a} and {n_b} prompts, but each should have two or more")
    if pairs and n_a != n_b:
        raise InputError(f"pairs is set, but the sets have {n_a} and {n_b} prompts")
    topic = _topics(n_a, n_b, topics)
    is_a = np.arange(n_a + n_b) < n_a
    of_a, of_b = (np.bincount(topic[own], minlength=topic.max() + 1) for own in (is_a, ~is_a))
    common = (of_a > 0) & (of_b > 0)
    if not common.any():
        raise InputError("the two sets have no topic in common")
    with np.errstate(divide="ignore"):
        weights = np.where(is_a, 1 / of_a[topic], -1 / of_b[topic]) / common.sum()
    weights = np.where(common[topic], weights, 0.0)
    if not pairs:
        return _Units(weights, topic, np.arange(n_a + n_b), 2 * topic + is_a)
    if (topic[:n_a] != topic[n_a:]).any():
        raise InputError("pairs is set, but the topics of a pair differ")
    pair = np.tile(np.arange(n_a), 2)
    return _Units(weights, pair, pair, topic[:n_a])


def _topics(
    n_a: int, n_b: int, topics: tuple[Sequence[Any], Sequence[Any]] | None
) -> Int[np.ndarray, " prompt"]:
    if topics is None:
        return np.zeros(n_a + n_b, dtype=np.int64)
    if len(topics) != 2 or (len(topics[0]), len(topics[1])) != (n_a, n_b):
        raise InputError(
            f"topics should be a pair of lists, with {n_a} and {n_b} topics, one for each prompt"
        )
    codes = pd.factorize(np.array([*topics[0], *topics[1]], dtype=object))[0]
    if (codes < 0).any():
        raise InputError("a topic is missing")
    return codes


def _permutation_p(
    shares: Float[np.ndarray, "prompt cell"], units: _Units, n: int, seed: int
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """For each expert the p of its own difference, and against the largest one of all.

    Differences count in units of their standard deviation when labels are swapped, else the
    largest one would always be that of an expert whose use differs much from prompt to prompt.
    """
    spread = _null_deviation(shares, units)
    scaled = np.divide(shares, spread, out=np.zeros_like(shares), where=spread > 1e-12)
    value = np.abs(units.weights @ scaled)
    draw = np.random.default_rng(seed)
    hits = np.ones((2, len(value)))
    for start in range(0, n, _CHUNK):
        size = min(_CHUNK, n - start)
        null = np.abs(shuffled_within(units.weights, units.swapped, size, draw) @ scaled)
        hits[0] += count_at_least(null, value)
        hits[1] += count_at_least(null.max(axis=1, keepdims=True), value)
    own, largest = hits / (n + 1)
    return own, largest


def _null_deviation(
    shares: Float[np.ndarray, "prompt cell"], units: _Units
) -> Float[np.ndarray, " cell"]:
    """Of each difference over all ways to swap the labels, in closed form."""
    variance = np.zeros(shares.shape[1])
    for stratum in np.unique(units.swapped):
        own = units.swapped == stratum
        if own.sum() > 1:
            variance += (
                units.weights[own].var()
                * shares[own].var(axis=0)
                * own.sum() ** 2
                / (own.sum() - 1)
            )
    return np.sqrt(variance)


def _bootstrap(
    shares: Float[np.ndarray, "prompt cell"], units: _Units, top: int, seed: int
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Bounds of each difference, and how often it is among the largest."""
    used = np.bincount(units.drawn, np.abs(units.weights)) > 0
    sizes = np.bincount(units.within)
    if (sizes[units.within[used]] == 1).any():
        missing = np.full(shares.shape[1], np.nan)
        return missing, missing, missing
    times = _times_drawn(units.within, np.random.default_rng(seed))
    values = (times[:, units.drawn] * units.weights) @ shares
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    n_top = min(top, values.shape[1])
    largest = np.argpartition(-np.abs(values), n_top - 1, axis=1)[:, :n_top]
    return low, high, np.bincount(largest.ravel(), minlength=values.shape[1]) / len(values)


def _times_drawn(
    within: Int[np.ndarray, " drawn"], draw: np.random.Generator
) -> Float[np.ndarray, "resample drawn"]:
    """How often each is drawn when as many as there are in its stratum are, with replacement."""
    times = np.zeros((RESAMPLES, len(within)))
    for stratum in np.unique(within):
        own = np.flatnonzero(within == stratum)
        times[:, own] = draw.multinomial(len(own), [1 / len(own)] * len(own), size=RESAMPLES)
    return times
