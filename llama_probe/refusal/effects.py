"""What edits do: how often the model declines under them, its score, and the cost."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from llama_probe import stats
from llama_probe.errors import InputError
from llama_probe.interventions import Edit, ablate, add, affine
from llama_probe.model.llama import Llama
from llama_probe.probing import Direction
from llama_probe.refusal.asking import Asked, answers, next_logits
from llama_probe.refusal.guard import Judge, verdicts
from llama_probe.refusal.judges import declines, rate
from llama_probe.refusal.score import mean_kl, refusal_score

_SAID = ["edit", "set", "request", "prompt", "response", "declined"]


def effects(
    model: Llama,
    sets: Mapping[str, Asked],
    edits: Mapping[str, Iterable[Any]],
    tokens: Sequence[int],
    *,
    judge: Judge | None = declines,
    max_new_tokens: int = 24,
    progress: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Put requests to a model under each of several edits.

    Args:
        model: The model.
        sets: Requests by name.
        edits: By name, each at every position; the plain model is always there, as "none".
        tokens: How refusals begin, for the score.
        judge: Who says whether an answer declines; None: nothing is answered, only the next token's
            metrics are measured.
        max_new_tokens: Of each answer.
        progress: Show a bar.

    Returns:
        A tidy frame, and the answers. The frame has one row per `edit`, `set` and `metric`:
        `value ci_low ci_high n`, and `change` with `change_low change_high` against the plain model
        on the same requests (a paired bootstrap). Metrics: "declined" (a share, Wilson), "refusal
        score" (mean log-odds), "kl" (nats at the next token, plain against edited). The answers:
        `edit set request prompt response declined`.

    Raises:
        InputError: An edit is called "none" or names positions, or a set has no requests.
    """
    plan = with_plain(edits)
    rows, said = [], []
    plain: dict[str, dict[str, np.ndarray]] = {}
    base: dict[str, torch.Tensor] = {}
    jobs = [(edit, name) for edit in plan for name in sets]
    for edit, name in tqdm(jobs, "edits", unit="run", disable=not progress):
        asked, hooks = sets[name], list(plan[edit])
        logits = next_logits(model, asked, hooks)
        base.setdefault(name, logits)
        values = {
            "refusal score": refusal_score(logits, tokens).numpy(),
            "kl": mean_kl(base[name], logits).numpy(),
        }
        if judge is not None:
            response = answers(model, asked, hooks, max_new_tokens=max_new_tokens)
            hits = verdicts(asked.texts, response, judge)
            values["declined"] = np.array(hits, dtype=float)
            said.append(_said(asked, response, hits).assign(edit=edit, set=name))
        plain.setdefault(name, values)
        rows += [
            {
                "edit": edit,
                "set": name,
                "metric": metric,
                **measured(metric, of, plain[name][metric]),
            }
            for metric, of in values.items()
        ]
    answered = pd.concat(said, ignore_index=True) if said else pd.DataFrame(columns=_SAID)
    return pd.DataFrame(rows), answered.reindex(columns=_SAID)


def edits_along(direction: Direction, reference: Float[Tensor, " d"]) -> dict[str, Edit]:
    """The three edits of a direction: "ablation", "addition" and "affine".

    Args:
        direction: What is removed, added, and set.
        reference: Where the affine edit sets it: the mean of harmless requests.
    """
    return {
        "ablation": ablate(direction),
        "addition": add(direction),
        "affine": affine(direction, reference),
    }


def with_plain(edits: Mapping[str, Iterable[Any]]) -> dict[str, Iterable[Any]]:
    """The edits, after the plain model."""
    if "none" in edits:
        raise InputError("an edit is called 'none', which is the plain model's name: call it else")
    return {"none": (), **edits}


def _said(asked: Asked, response: Sequence[str], hits: Sequence[bool]) -> pd.DataFrame:
    columns = {"prompt": asked.texts, "response": response, "declined": hits}
    return pd.DataFrame(columns).rename_axis("request").reset_index()


def measured(metric: str, values: np.ndarray, plain: np.ndarray) -> dict[str, float]:
    """A metric's value with its interval, and its change against the plain model with another."""
    found = rate(values) if metric == "declined" else stats.mean(values)
    change = stats.mean(values - plain)
    return {
        **found._asdict(),
        "change": change.value,
        "change_low": change.ci_low,
        "change_high": change.ci_high,
    }
