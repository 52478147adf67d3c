"""How well estimated patch effects agree with exact ones."""

import pandas as pd

from llama_probe.errors import InputError


def agreement(exact: pd.DataFrame, estimate: pd.DataFrame, *, k: int = 10) -> pd.DataFrame:
    """How well an estimate of patch effects agrees with the exact ones.

    Args:
        exact: Of `lp.patch`.
        estimate: Of `lp.attribution_patch`, or any other frame with the same cells.
        k: How many of the largest effects, by size, the estimate should find.

    Returns:
        One row for each site that both have: `site`, `n` (cells), `pearson`, `spearman`,
        `recall` (share of the exact top k among the estimated top k), and the sweeps' `seconds`
        and `estimate_seconds` (of all sites together; missing if the frames do not say).

    Raises:
        InputError: The frames have no site in common, or not the same cells there.

    >>> frame = pd.DataFrame({"layer": [0, 1, 2], "site": "z", "effect": [0.0, 0.5, 1.0]})
    >>> row = agreement(frame, frame.assign(effect=frame.effect**2), k=1).iloc[0]
    >>> [float(round(row[name], 2)) for name in ("pearson", "spearman", "recall")]
    [0.96, 1.0, 1.0]
    """
    sites = [site for site in exact["site"].unique() if (estimate["site"] == site).any()]
    if not sites:
        raise InputError("the two frames have no site in common")
    rows = []
    for site in sites:
        both = _paired(*(frame.loc[frame["site"] == site] for frame in (exact, estimate)))
        effect, guess = (
            pd.Series(both[name].to_numpy(dtype=float)) for name in ("effect", "effect_estimate")
        )
        top, found = (set(x.abs().nlargest(k).index) for x in (effect, guess))
        rows.append(
            {
                "site": site,
                "n": len(both),
                "pearson": effect.corr(guess),
                "spearman": effect.corr(guess, method="spearman"),
                "recall": len(top & found) / len(top),
                "seconds": exact.attrs.get("seconds"),
                "estimate_seconds": estimate.attrs.get("seconds"),
            }
        )
    return pd.DataFrame(rows)


def _paired(exact: pd.DataFrame, estimate: pd.DataFrame) -> pd.DataFrame:
    """The cells of one site with both effects; axes that the site does not have are left out."""
    names = ("layer", "pos", "head", "expert", "neuron", "prompt")
    keys = [name for name in names if name in exact and bool(exact[name].notna().any())]
    if not set(keys) <= set(estimate.columns):
        raise InputError(f"the exact frame has the columns {keys}, the estimate not all of them")
    both = exact.merge(estimate, on=keys, suffixes=("", "_estimate"), validate="one_to_one")
    if len(both) < max(len(exact), len(estimate)):
        site = exact["site"].iloc[0]
        raise InputError(
            f"of {site} only {len(both)} cells are in both frames, of {len(exact)} exact and "
            f"{len(estimate)} estimated ones"
        )
    return both
