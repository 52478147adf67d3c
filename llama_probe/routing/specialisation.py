"""Do experts follow the domain of a text, or its tokens? In bits, against permuted labels.

The experts of a text's tokens depend on each other, so it is the labels of whole prompts that are
permuted, never those of tokens. An estimate of mutual information from few data is too high (Miller
1955); the mean over the permutations is by how much.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from scipy.special import xlogy

from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.routing.resampling import p_value
from llama_probe.routing.routes import Routes, as_routes

_MOST_NUMBERS = 2_000_000  # of an array of permutations
_TOKEN_SHUFFLES = 199


def specialisation(
    model: Llama | Routes,
    prompts: Any = None,
    labels: Sequence[Any] | None = None,
    permutations: int = 9999,
    seed: int = 0,
) -> pd.DataFrame:
    """How much a token's expert says about the domain of its text, layer by layer.

    "mutual_information" is I(expert; label). Part of it is vocabulary: words of a domain have
    experts of their own. "given_token" is I(expert; label | token): what remains among tokens that
    are the same; tokens of a single label's prompts say nothing about it. Its null keeps for each
    token the labels that it has, and deals them out among the prompts that it is in: labels
    permuted over all prompts would give tokens more labels than they have, and with them a
    baseline above what is there. The order in which prompts are dealt labels is the same for all
    tokens, as those of one prompt depend on each other.

    "by_token" is I(expert; token), of token identities; its null, of 199 shuffles at most, shuffles
    the places of each prompt's experts.

    Where k experts are chosen, each counts as one observation.

    Args:
        model: The model, or the `Routes` of its prompts.
        prompts: A list of texts, or tokens, as for `routes_of`; None with `Routes`.
        labels: One label for each prompt; None with `Routes`: those recorded.
        permutations: How many.
        seed: Of the permutations.

    Returns:
        For each layer and metric one row: `layer metric value baseline corrected p permutations
        n_prompts n_tokens`, in bits. `baseline` is the mean over permutations, `corrected` is
        `value` less that, `p` the share of permutations that are at least as large.

    Raises:
        InputError: Labels are missing, all the same or all different, or as `routes_of`.

    >>> import llama_probe as lp
    >>> sums = [f"{a}+{b}={a + b};" for a, b in [(12, 30), (45, 11), (77, 20), (31, 18)]]
    >>> facts = [f"The capital of {c} is" for c in ("France", "Spain", "Italy", "Japan")]
    >>> frame = specialisation(lp.load("tiny-moe"), sums + facts, ["sum"] * 4 + ["fact"] * 4)
    >>> row = frame[(frame.layer == 2) & (frame.metric == "mutual_information")].iloc[0]
    >>> bool(row.corrected > 0.5), bool(row.p < 0.05)
    (True, True)
    """
    if permutations < 1:
        raise InputError(f"permutations is {permutations}, but should be at least 1")
    routes = as_routes(model, prompts, labels)
    codes = _codes(routes.labels)
    parts = [
        _of_labels(routes, metric, given, codes, permutations, seed)
        for metric, given in (
            ("mutual_information", np.zeros_like(routes.tokens)),
            ("given_token", routes.tokens),
        )
    ]
    parts.append(_by_token(routes, min(permutations, _TOKEN_SHUFFLES), seed))
    frame = pd.concat(parts).sort_values("layer", kind="stable").reset_index(drop=True)
    return frame.assign(n_prompts=routes.n_prompts, n_tokens=len(routes.tokens))


def _codes(labels: np.ndarray | None) -> Int[np.ndarray, " prompt"]:
    if labels is None:
        raise InputError("labels are missing: give one for each prompt")
    codes, found = pd.factorize(labels)
    if not 1 < len(found) < len(labels):
        raise InputError(
            f"the {len(labels)} prompts have {len(found)} different labels, but there should be "
            "two at least, and prompts that share one"
        )
    return codes


def _of_labels(
    routes: Routes,
    metric: str,
    given: Int[np.ndarray, " token"],
    codes: Int[np.ndarray, " prompt"],
    permutations: int,
    seed: int,
) -> pd.DataFrame:
    """I(expert; label | given) in each layer, against permuted labels."""
    units = _Units(routes.prompt, given, codes)
    tables = [_Table(units, experts, routes.n_experts) for experts in routes.experts]
    value = np.array([table.information(units.one_hot()).item() for table in tables])
    null = np.empty((permutations, len(tables)))
    draw = np.random.default_rng(seed)
    for start in range(0, permutations, units.at_once):
        some = slice(start, min(start + units.at_once, permutations))
        labels = units.permuted(some.stop - some.start, draw)
        for index, table in enumerate(tables):
            null[some, index] = table.information(labels)
    return _with_null(pd.DataFrame({"layer": routes.layers, "metric": metric}), value, null)


def _with_null(
    frame: pd.DataFrame,
    value: Float[np.ndarray, " row"],
    null: Float[np.ndarray, "permutation row"],
) -> pd.DataFrame:
    baseline = null.mean(axis=0)
    columns = {"value": value, "baseline": baseline, "corrected": value - baseline}
    return frame.assign(**columns, p=p_value(value, null), permutations=len(null))


class _Units:
    """What has a label: the part of a prompt that lies in one group of tokens.

    Only groups that have several labels: the others say nothing of them.

    Attributes:
        of_token: Each token's unit; -1: none.
        group: Each unit's group.
    """

    def __init__(
        self,
        prompt: Int[np.ndarray, " token"],
        group: Int[np.ndarray, " token"],
        codes: Int[np.ndarray, " prompt"],
    ) -> None:
        ranks = np.unique(group, return_inverse=True)[1]
        pairs, unit = np.unique(ranks * len(codes) + prompt, return_inverse=True)
        groups, prompts = np.divmod(pairs, len(codes))
        seen = np.zeros((int(groups[-1]) + 1, int(codes.max()) + 1), dtype=bool)
        seen[groups, codes[prompts]] = True
        several = seen.sum(axis=1)[groups] > 1
        self.of_token = np.where(several, np.cumsum(several) - 1, -1)[unit]
        self.group, self.prompt = groups[several], prompts[several]
        self.n_prompts, self.labels = len(codes), np.arange(codes.max() + 1)
        self.codes = codes[self.prompt]
        self.sorted = self.codes[np.lexsort((self.codes, self.group))]
        widest = max(len(codes), len(self.group) * len(self.labels))
        self.at_once = max(1, _MOST_NUMBERS // widest)

    def one_hot(
        self, codes: Int[np.ndarray, "p unit"] | None = None
    ) -> Float[np.ndarray, "unit label p"]:
        """Which label each unit has, its own or that of a permutation."""
        codes = self.codes[None] if codes is None else codes
        return (codes.T[:, None] == self.labels[:, None]).astype(float, order="C")

    def permuted(self, n: int, draw: np.random.Generator) -> Float[np.ndarray, "unit label p"]:
        """Prompts are put in random order, and the labels of each group dealt out in that order."""
        random = draw.random((n, self.n_prompts))[:, self.prompt]
        codes = np.empty(random.shape, dtype=np.int64)
        np.put_along_axis(codes, np.argsort(self.group + random, axis=1), self.sorted[None], axis=1)
        return self.one_hot(codes)


def _n_log_n(counts: np.ndarray) -> float:
    """Summed over all of them."""
    return float(xlogy(counts, counts).sum())


class _Table:
    """One layer's counts of (group, expert) by unit, for I(expert; label | group).

    With n the counts and S the sum of n log n, the information is
    (S(group) - S(group, expert) - S(group, label) + S(group, expert, label)) / N. A group adds
    nothing, whatever the labels, where its prompts use experts in equal proportions: most tokens
    are such groups, and are left out.
    """

    def __init__(self, units: _Units, experts: Int[np.ndarray, "token k"], n_experts: int) -> None:
        self.n = experts.size
        known = units.of_token >= 0
        rows = np.repeat(units.of_token[known], experts.shape[1])
        cell = units.group[rows] * n_experts + experts[known].ravel()
        cells, places = np.unique(cell, return_inverse=True)
        # Entries of one place are summed.
        counts = csr_array(
            (np.ones(len(rows)), (places, rows)), shape=(len(cells), len(units.group))
        )
        self.joint, groups = _varying(counts, cells // n_experts)
        place = groups, np.arange(len(groups))
        into = csr_array(
            (np.ones(len(groups)), place), shape=(int(groups.max(initial=-1)) + 1, len(groups))
        )
        self.by_group = csr_array(into @ self.joint)
        self.fixed = _n_log_n(self.by_group.sum(axis=1)) - _n_log_n(self.joint.sum(axis=1))

    def information(self, labels: Float[np.ndarray, "unit label p"]) -> Float[np.ndarray, " p"]:
        """In bits, for each permutation of the labels."""
        n_units, n_labels, n = labels.shape
        flat = labels.reshape(n_units, n_labels * n)

        def n_log_n(counts: csr_array) -> Float[np.ndarray, " p"]:
            product = counts @ flat
            of_labels = product.reshape(len(product), n_labels, n)
            return xlogy(of_labels, of_labels).sum(axis=(0, 1))

        joint, by_group = n_log_n(self.joint), n_log_n(self.by_group)
        # Rounding may leave a little less than nothing.
        return np.maximum(self.fixed + joint - by_group, 0) / self.n / np.log(2)


def _varying(
    counts: csr_array, groups: Int[np.ndarray, " cell"]
) -> tuple[csr_array, Int[np.ndarray, " kept"]]:
    """The cells of groups whose units differ in the proportions of their experts."""
    table = counts.tocoo()
    cell, unit = table.coords
    in_unit, in_cell = counts.sum(axis=0)[unit], counts.sum(axis=1)[cell]
    group = groups[cell]
    in_group = np.bincount(group, table.data)[group]
    # Of counts in proportion each is row total * column total / total; the sums of both agree, so
    # that an entry of 0 that should not be one shows at another entry.
    differs = np.bincount(group, table.data * in_group != in_unit * in_cell) > 0
    keep = np.flatnonzero(differs[groups])
    return counts[keep], np.unique(groups[keep], return_inverse=True)[1]


def _by_token(routes: Routes, shuffles: int, seed: int) -> pd.DataFrame:
    """I(expert; token), and what is left of it when the experts of each prompt change places."""
    draw = np.random.default_rng(seed)
    found, tokens = np.unique(routes.tokens, return_inverse=True)
    size = len(found) * routes.n_experts
    place = tokens[:, None] * routes.n_experts
    n = routes.experts[0].size

    def joint(experts: Int[np.ndarray, "token k"]) -> float:
        return _n_log_n(np.bincount((place + experts).ravel(), minlength=size))

    orders = [np.argsort(routes.prompt + draw.random(len(tokens))) for _ in range(shuffles)]
    by_token = _n_log_n(np.bincount(tokens) * routes.top_k)
    value, null = [], []
    for experts in routes.experts:
        known = n * np.log(n) - by_token - _n_log_n(np.bincount(experts.ravel()))
        value.append(known + joint(experts))
        null.append([known + joint(experts[order]) for order in orders])
    bits = n * np.log(2)
    frame = pd.DataFrame({"layer": routes.layers, "metric": "by_token"})
    return _with_null(frame, np.array(value) / bits, np.array(null).T / bits)
