"""`lp.probe`: what activations say of labels, hook by hook, and how far to believe it.

1. Folds are drawn once for each target and position: groups whole, classes in equal shares.
2. In each fold everything is fitted on the training part, the strength of regularisation on inner
   folds of it; what the probe says of the rest are its held-out scores.
3. Metrics of those, with intervals from drawing groups again, stand beside what the text alone
   gives, what shuffled labels give, and what the best cell is worth when chosen elsewhere.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import groupby
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from llama_probe.errors import InputError, near
from llama_probe.probing.baselines import of_texts
from llama_probe.probing.bootstrap import RESAMPLES
from llama_probe.probing.cells import OF_TEXTS, Asked, Plan, cell
from llama_probe.probing.data import Source, source
from llama_probe.probing.fit import check_kind, check_strength
from llama_probe.probing.planning import Wanted, plans
from llama_probe.probing.table import Place, Result, best_cells, frame, row
from llama_probe.probing.templates import ProbeWarning, share_templates

Progress = Callable[[int, int], None]
CONTROLS = ("shuffled labels", "random direction", "control task", "n-grams", "length", "best cell")


def probe(
    acts: Any,
    labels: Any,
    *,
    groups: Any = None,
    probe: str | Sequence[str] = "logistic",
    hooks: Any = None,
    task: str | None = None,
    folds: int = 5,
    strength: int | float | None = None,
    controls: str | Sequence[str] | None = None,
    control_by: Any = None,
    repeats: int = 5,
    texts: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool | None | Progress = None,
) -> pd.DataFrame:
    """How well linear probes read labels from activations, on held-out groups and with controls.

    Each kind of probe (see `fit`) is cross-validated at each hook and position for each target.
    Folds keep groups together and spread classes evenly, and all rows of a prompt are in one fold.
    Whatever is fitted is fitted on the training part of a fold: the standardising, and the
    strength of regularisation on three inner folds, which keep groups together too.

    Metrics of held-out samples, for classes: "accuracy", "balanced_accuracy", "auroc" and
    "average_precision" (both within folds, then averaged; more than two classes: the mean over each
    against the rest). For two classes, whose second one is the positive: "recall_at_1pct_fpr", the
    share of a fold's positives above the threshold that flags 1 % of the negatives of the other
    folds, and "fpr_at_1pct_threshold", what share of the fold's negatives that threshold flags;
    both refused below 100 negatives. For logistic probes: "ece" (ten bins) and "brier". For
    numbers: "r2".

    Rows by `kind`:

    - "probe": the probe.
    - "shuffled labels": the same with labels that mean nothing, at the strengths chosen for the
      real ones: groups take each other's labels, in random order within a group; without groups,
      samples do. The mean over the shuffles, and an interval that covers a single one.
    - "random direction": AUROC along 500 random directions on standardised features, each pointing
      where it does better: the mean with the interval of 95 % of them, and the 95th percentile.
    - "control task": labels drawn at random for each type of input (Hewitt and Liang 2019, arXiv
      1909.03368), and "selectivity", the accuracy on the real labels less the one on those. Not
      applicable where most held-out samples have a type that the training part lacks.
    - "n-grams", "length": logistic regression (ridge for numbers) on counts of words and pairs of
      words, and on the numbers of characters and words; once for each target.
    - "best cell", "best cell, corrected": the best of several hooks, positions and kinds of probes
      for the target, by accuracy and by AUROC (numbers: by r2); then chosen on one half of the
      groups, where everything is fitted, and tested on the other, both ways.

    Args:
        acts: `Activations`, the folder of a store, a dict of arrays or tensors [n d] by name, or
            one of these. Features of several axes are flattened.
        labels: For each prompt or each row of activations one: an array or sequence, or the name of
            a column of the prompts. A sequence of such names, or a dict of name and labels: several
            targets.
        groups: What must not be torn apart, likewise. None: each prompt by itself.
        probe: "logistic", "ridge", "mass_mean", or several of them.
        hooks: Which hooks, by name or glob; None: all.
        task: "classes", "number", or None: bools, texts and whole numbers of at most 20 different
            values are classes, other numbers are to be predicted (by "ridge").
        folds: How many.
        strength: Of the regularisation, as in `fit`; None: chosen for each fold.
        controls: Some of those kinds, "all", or () for none. None: all but the control task, and
            n-grams and length where texts are known.
        control_by: The type of input of each prompt or row, as `groups`; None: its token.
        repeats: How many times labels are shuffled, and drawn for the control task.
        texts: The texts of the prompts, where `acts` does not know them.
        seed: Of folds, shuffles, directions and resamples.
        progress: Whether to show a bar; None: on a terminal. Or a function of how many cells are
            done and of how many: what it raises ends the call.

    Returns:
        One row for each metric: `hook`, `layer` (-1 outside of blocks), `at` and `pos` (as in
        `Activations.index`; -1 if it differs between rows), `target` ("label" unless it has a
        name), `probe`, `kind`, `metric`, `value`, `ci_low` and `ci_high` (95 %, from 1,000
        resamples of groups), `n` (held-out samples), `groups` (what was resampled), `cells` (hooks
        times positions times kinds of probes that were looked at for the target), `note` (why a
        value is missing).

    Raises:
        InputError: An argument does not fit the others: the sentence says which and how.
        HookNameError: A hook is not there.
        CheckpointError: The folder holds no finished store.

    Warns:
        ProbeWarning: No groups are given and most texts have 60 % of their words in common with
            another one.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(40, 8))
    >>> table = probe(x, x[:, 0] > 0, controls=())
    >>> table.loc[table.metric == "auroc", "value"].item() > 0.9
    True
    """
    from threadpoolctl import threadpool_limits

    found = source(acts, hooks, texts)
    check_strength(strength)
    fixed = None if strength is None else float(strength)
    kinds, wanted = _probes(probe), _controls(controls, found)
    if len(kinds) * len(found.ats) * len(found.hooks) == 1:  # of one cell none is the best
        wanted = tuple(name for name in wanted if name != "best cell")
    asked = Asked(kinds, wanted, fixed, seed)
    if repeats < 1:
        raise InputError(f"repeats is {repeats}, but should be at least 1")
    _warn_of_templates(found, groups)
    planned = plans(found, Wanted(labels, groups, control_by, task, folds, repeats), asked)
    found.check_finite()
    # One thread for each cell: the products are small, and their rounding stays the same.
    with threadpool_limits(1):
        results = _results(found, planned, asked, progress)
        rows: list[dict[str, object]] = []
        for _, of_target in groupby(results, key=lambda result: result.plan.target):
            rows += _rows(list(of_target), found, asked)
    return frame(rows, folds=folds, seed=seed, resamples=RESAMPLES, grouped=groups is not None)


def _rows(results: list[Result], source: Source, asked: Asked) -> list[dict[str, object]]:
    """All rows of one target."""
    plan, cells = results[0].plan, len(results) * len(asked.probes)
    found = [(result.place, one) for result in results for one in result.measured]
    if asked.of_texts:
        texts = source.prompts["text"].tolist()
        found += [(Place(), one) for one in of_texts(texts, plan, asked)]
    if "best cell" in asked.controls:
        found += best_cells(results, asked.seed)
    return [row(place, plan.target, cells, one) for place, one in found]


def _probes(probe: str | Sequence[str]) -> tuple[str, ...]:
    kinds = (probe,) if isinstance(probe, str) else tuple(dict.fromkeys(probe))
    if not kinds:
        raise InputError("probe is empty, but should name at least one kind of probe")
    for kind in kinds:
        check_kind(kind)
    return kinds


def _controls(controls: str | Sequence[str] | None, source: Source) -> tuple[str, ...]:
    if controls is None:
        left_out = ("control task", *(() if source.has_texts else OF_TEXTS))
        return tuple(name for name in CONTROLS if name not in left_out)
    names = (controls,) if isinstance(controls, str) else tuple(controls)
    names = CONTROLS if names == ("all",) else names
    for name in names:
        if name not in CONTROLS:
            raise InputError(
                f"there is no control {name!r}{near(str(name), CONTROLS)}; there are "
                f"{', '.join(CONTROLS)}"
            )
        if name in OF_TEXTS and not source.has_texts:
            raise InputError(
                f"the control {name!r} needs the texts of the prompts: give texts=, one for each, "
                "or leave it out"
            )
    return names


def _warn_of_templates(source: Source, groups: Any) -> None:
    if groups is None and source.has_texts:
        used = source.prompts["text"].iloc[source.index["prompt"].unique()]
        if share_templates(used.tolist()):
            warnings.warn(
                "most prompts share most of their words with another one, and no groups are given: "
                "what they share may leak between folds; give groups= to keep them together",
                ProbeWarning,
                stacklevel=3,
            )


def _results(
    source: Source, planned: Sequence[Plan], asked: Asked, progress: bool | None | Progress
) -> list[Result]:
    """Every cell, in order; computed in threads."""
    from joblib import Parallel, cpu_count, delayed

    def result(plan: Plan, hook: str) -> Result:
        place = Place(hook, plan.at, plan.pos)
        return Result(place, plan, *cell(source.features(hook, plan.at), plan, asked))

    todo = [(plan, hook) for plan in planned for hook in source.hooks]
    threads = min(len(todo), cpu_count())
    workers = Parallel(n_jobs=threads, backend="threading", return_as="generator")
    results: Any = workers(delayed(result)(*one) for one in todo)
    tell = progress if callable(progress) else None
    hidden = None if progress is None else tell is not None or not progress
    done: list[Result] = []
    with closing(results):
        for one in tqdm(results, total=len(todo), desc="probes", unit="cell", disable=hidden):
            done.append(one)
            if tell is not None:
                tell(len(done), len(todo))
    return done
