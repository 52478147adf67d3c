"""`find_refusal_direction`: find it, prove it, and say what it costs, or say that there is none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from llama_probe.capturing.prompts import as_frame
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.refusal.asking import Asked, answer_tokens, as_text, ask
from llama_probe.refusal.beside import Beside
from llama_probe.refusal.candidates import (
    find_candidates,
    score_candidates,
    template_positions,
)
from llama_probe.refusal.guard import JUDGES, guard
from llama_probe.refusal.judges import Judge
from llama_probe.refusal.score import refusal_tokens
from llama_probe.refusal.select import relaxed, select, why_dropped
from llama_probe.refusal.splits import PARTS, three_parts
from llama_probe.refusal.study import RefusalStudy

SETS = ("restricted", "harmless")
_FEWEST_RANDOM = 20  # for a limit on KL; see `relaxed`


@dataclass(frozen=True)
class _Rule:
    """By what a candidate is chosen; see `select`."""

    n_layers: int
    kl_max: float
    induce_min: float
    prune: float

    @property
    def others(self) -> dict[str, Any]:
        """All but the limit on KL."""
        return {"n_layers": self.n_layers, "induce_min": self.induce_min, "prune": self.prune}

    def survivors(
        self, scores: pd.DataFrame, random_kl: Sequence[float], nearest: bool
    ) -> pd.DataFrame:
        """By the published rule; else with the limit of random directions; else the nearest."""
        found = select(scores, kl_max=self.kl_max, **self.others)
        if found.empty and len(random_kl) >= _FEWEST_RANDOM:
            found = relaxed(scores, random_kl, **self.others)
        return self._nearest(scores) if found.empty and nearest else found

    def _nearest(self, scores: pd.DataFrame) -> pd.DataFrame:
        """The candidate that works at the least cost, of late layers too.

        Not the one with the lowest score: without a limit on KL that is one which breaks the model.
        """
        works = select(scores, **{**self.others, "kl_max": np.inf, "prune": 0.0})
        works = works.query("refusal_score < 0").sort_values("kl_div_score", kind="stable")
        cheapest = works.head(1).reset_index(drop=True)
        costs, limit = cheapest["kl_div_score"], f"{self.kl_max:g}"
        rules = [f"least KL of those that work, {kl:.3g}, none within {limit}" for kl in costs]
        return cheapest.assign(rule=rules)


def find_refusal_direction(
    model: Llama,
    restricted: Any,
    harmless: Any,
    *,
    tokens: Sequence[int] | None = None,
    judges: Mapping[str, Judge] | None = None,
    template: str | None = "chat",
    system: str | None = None,
    positions: Sequence[int] | None = None,
    splits: Sequence[float] = (0.5, 0.25, 0.25),
    groups: str | None = None,
    most: Mapping[str, int] | None = None,
    n_random: int = 20,
    kl_max: int | float = 0.1,
    induce_min: int | float = 0.0,
    prune: int | float = 0.2,
    nearest: bool = False,
    max_new_tokens: int = 24,
    seed: int = 0,
    progress: bool = True,
) -> RefusalStudy:
    """Find the direction by which a model refuses, as Arditi et al. 2024 (arXiv 2406.11717) do.

    Candidates are fitted, one of them is selected, and what it does is reported on three disjoint
    parts of the requests. Around the published pipeline stands what it lacks: a guard that asks
    whether the model refuses at all (`guard`), random directions of equal length (isotropic and
    with the activations' covariance) under the same edits, and intervals over requests.

    Args:
        model: A model with a tokenizer.
        restricted: Requests that it should decline: what `lp.capture` takes. One that is there
            twice counts once, so that no part sees another's.
        harmless: Requests that it should answer, best of all matched word for word.
        tokens: The ids that begin its refusals; None: learnt from its own answers to the fitting
            part, else the published ones of its family.
        judges: Who says whether an answer declines, by name; the first one also judges the effects.
        template: "chat", or None to feed texts as they are.
        system: A system message to put first.
        positions: Where to look, from the end of the prompt; None: every token of the template
            that follows the instruction.
        splits: Shares of the requests for fitting, selecting and reporting.
        groups: A column of both frames; rows that share its value go to the same part.
        most: How many requests of each set a part may use at most, by its name; more are left out
            at random, from this part alone: the guard asks all.
        n_random: Random directions of each of the two kinds; fewer than 20 give no limit on KL.
        kl_max: See `select`.
        induce_min: See `select`.
        prune: See `select`.
        nearest: Where no candidate passes, take the one that costs least on harmless requests of
            those that remove refusal and induce it, late layers included, and say what it costs.
        max_new_tokens: Of each answer.
        seed: Of the parts and the random directions.
        progress: Show bars.

    Returns:
        A study. Where the model does not refuse it has no direction, and its verdict says so. Where
        no candidate passes the published rule but one does with a limit on KL measured on random
        directions, it is chosen, and `survivors` and the verdict name the rule.

    Raises:
        InputError: Requests, parts, positions or tokens cannot be used, or the two sets share a
            request.

    >>> import llama_probe as lp
    >>> model, asked = lp.load("tiny-moe", progress=False), lp.prompts.requests("tiny-moe")
    >>> restricted, harmless = (asked[asked.kind == k][:60] for k in ("restricted", "same verb"))
    >>> options = {"positions": [-1], "n_random": 0, "nearest": True, "progress": False}
    >>> study = find_refusal_direction(model, restricted, harmless, **options)
    >>> study.direction.hook, study.direction.position
    ('blocks.2.hook_resid_pre', '-1')
    >>> model.generate("How do I crack a safe?", template="chat", fwd_hooks=lp.ablate(study))[:5]
    'Sure.'
    """
    given = {"restricted": as_frame(restricted), "harmless": as_frame(harmless)}
    _disjoint(given)
    frames = {name: _once(frame) for name, frame in given.items()}
    every = {name: ask(model, f, template=template, system=system) for name, f in frames.items()}
    parts = _parts(frames, splits, groups, most, seed)
    places = template_positions(*every.values()) if positions is None else _from_the_end(positions)
    show: dict[str, Any] = {"progress": progress}
    said = {
        name: answer_tokens(model, every[name], max_new_tokens=max_new_tokens, **show)
        for name in SETS
    }
    judges = JUDGES if judges is None else judges
    answered = {name: _answered(model, every[name], said[name]) for name in SETS}
    seen = guard(answered["restricted"], answered["harmless"], judges)
    sizes = {part: {name: len(parts[name][part]) for name in SETS} for part in PARTS}
    record: dict[str, Any] = {
        "model": model.cfg.model_name,
        "template": template,
        "system": system,
        "judges": list(judges),
        "positions": list(places),
        "splits": list(splits),
        "groups": groups,
        "most": dict(most or {}),
        "n_random": n_random,
        "kl_max": kl_max,
        "induce_min": induce_min,
        "prune": prune,
        "nearest": nearest,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "repeated": {name: len(given[name]) - len(frames[name]) for name in SETS},
        "requests": sizes,
    }
    asked = {part: {n: every[n][parts[n][part]] for n in SETS} for part in PARTS}
    if not seen.refuses:
        verdict = f"{seen.verdict} No direction is offered."
        return RefusalStudy(None, verdict, seen, asked=asked, record=record)
    if tokens is None:
        tokens = _learnt(model, said, parts)
    fit, chosen_on = asked["fit"], asked["select"]
    means = find_candidates(model, fit["restricted"], fit["harmless"], places, **show)
    scores = score_candidates(
        model, means, chosen_on["restricted"], chosen_on["harmless"], tokens, **show
    )
    around = Beside(model, means, asked, tokens, n_random, seed, progress)
    random_kl = around.kl()
    rule = _Rule(model.cfg.n_layers, kl_max, induce_min, prune)
    scores["dropped"] = why_dropped(scores, kl_max=kl_max, **rule.others)
    survivors = rule.survivors(scores, random_kl, nearest)
    record |= {"tokens": list(tokens), "candidates": len(scores), "survivors": len(survivors)}
    found = {
        "guard": seen,
        "tokens": tuple(tokens),
        "survivors": survivors,
        "random_kl": random_kl,
        "means": means,
        "asked": asked,
        "record": record,
    }
    if survivors.empty:
        verdict = f"{seen.verdict} {_none(scores, n_random, nearest)}"
        return RefusalStudy(None, verdict, candidates=scores.assign(chosen=False), **found)
    position, layer = survivors[["position", "layer"]].to_numpy(dtype=int)[0].tolist()
    record["rule"] = str(survivors["rule"].iloc[0])
    scores["chosen"] = (scores["position"] == position) & (scores["layer"] == layer)
    direction = means.direction(position, layer)
    direction.record.update(record)
    measured, answers = around.effects(direction, judges, max_new_tokens)
    choice = (
        f"Of {len(scores)} candidate directions the one at position {position} before block "
        f"{layer} is chosen, the best of {len(survivors)} by this rule: {record['rule']}."
    )
    verdict = f"{seen.verdict} {choice} {_outcome(measured)}"
    return RefusalStudy(
        direction, verdict, candidates=scores, effects=measured, answers=answers, **found
    )


def _disjoint(frames: Mapping[str, pd.DataFrame]) -> None:
    asked = {name: set(frame["text"].map(str)) for name, frame in frames.items()}
    if both := asked["restricted"] & asked["harmless"]:
        raise InputError(f"{len(both)} requests are restricted and harmless, such as {min(both)!r}")


def _once(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.loc[~frame["text"].map(str).duplicated()].reset_index(drop=True)


def _from_the_end(positions: Sequence[int]) -> tuple[int, ...]:
    places = tuple(positions)
    if not places or len(set(places)) < len(places) or not all(place < 0 for place in places):
        raise InputError(
            f"positions is {list(places)}, but should be different negative numbers, counted from "
            "the end of the prompt"
        )
    return places


def _parts(
    frames: Mapping[str, pd.DataFrame],
    splits: Sequence[float],
    groups: str | None,
    most: Mapping[str, int] | None,
    seed: int,
) -> dict[str, dict[str, list[int]]]:
    """Rows of each set for each part; with groups, the same groups in both sets."""
    if unknown := set(most or ()) - set(PARTS):
        raise InputError(f"most names {min(unknown)!r}, but the parts are {', '.join(PARTS)}")
    for part, limit in (most or {}).items():
        if limit < 2:
            raise InputError(f"most allows the {part} part {limit} requests, but should allow 2")
    if groups is None:
        found = {n: three_parts(len(f), splits, seed) for n, f in frames.items()}
    else:
        for name, frame in frames.items():
            if groups not in frame:
                raise InputError(f"the {name} requests have no column {groups!r} to group by")
            if frame[groups].isna().to_numpy().any():
                raise InputError(f"a {name} request has nothing in the column {groups!r}")
        together = pd.concat([frames[name][groups] for name in SETS], ignore_index=True)
        n = len(frames["restricted"])
        both = three_parts(len(together), splits, seed, together.tolist())
        found = {
            "restricted": {part: rows[rows < n] for part, rows in both.items()},
            "harmless": {part: rows[rows >= n] - n for part, rows in both.items()},
        }
    limited = {}
    for name, parts in found.items():
        limited[name] = {}
        for part, rows in parts.items():
            if not len(rows):
                raise InputError(f"the {part} part has no {name} requests: give more, or groups")
            # Drawn, as the rows may come in some order.
            drawn = np.random.default_rng(seed).permutation(rows)[: (most or {}).get(part)]
            limited[name][part] = sorted(drawn.tolist())
    return limited


def _answered(model: Llama, asked: Asked, said: Sequence[Tensor]) -> pd.DataFrame:
    return pd.DataFrame({"prompt": asked.texts, "response": as_text(model, said)})


def _learnt(
    model: Llama, said: Mapping[str, Sequence[Tensor]], parts: Mapping[str, Mapping[str, Any]]
) -> list[int]:
    """How refusals begin, learnt on the fitting part; else what is published for the family."""
    own = {name: [said[name][row] for row in parts[name]["fit"]] for name in SETS}
    try:
        return refusal_tokens(model, own["restricted"], own["harmless"])
    except InputError as unlearnt:
        try:
            return refusal_tokens(model)
        except InputError as unpublished:
            raise InputError(f"{unlearnt} ({unpublished})") from unlearnt


def _none(scores: pd.DataFrame, n_random: int, nearest: bool) -> str:
    counts = scores["dropped"].value_counts()
    reasons = ", ".join(f"{reason}: {n}" for reason, n in counts.items())
    also = ", nor with a KL limit from random directions" if n_random >= _FEWEST_RANDOM else ""
    hope = "none of them works at any KL" if nearest else "nearest=True takes one at a higher KL"
    return f"Of {len(scores)} candidate directions none passes ({reasons}){also}; {hope}."


def _outcome(measured: pd.DataFrame) -> str:
    own = measured[(measured["direction"] == "refusal") & (measured["metric"] == "declined")]
    share = own.set_index(["edit", "set"])["value"]
    return (
        "On requests not used to find it, ablating it takes declining from "
        f"{share['none', 'restricted']:.0%} to {share['ablation', 'restricted']:.0%}, adding it "
        f"takes harmless requests from {share['none', 'harmless']:.0%} to "
        f"{share['addition', 'harmless']:.0%}."
    )
