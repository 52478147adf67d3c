"""By what does a model refuse, is it one direction, and who writes it?

    llama-probe run experiments/refusal_direction.py -P model=smollm2-135m-refusal

It asks more than `llama-probe audit`: whether one direction is all, whether two of them act by
themselves, which experts carry it when topics are the same, and whether the edit in the weights is
the edit of the hooks. `requests` is a CSV file with `text`, `kind` and `pair`, and perhaps `topic`,
as `lp.prompts.requests` gives them. All edits live in memory: a copy with edited weights is there
for one check, and cannot be saved.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import llama_probe as lp

TINY = "tiny-moe"
LARGE = {"fit": 120, "select": 24, "report": 60}  # enough, for a model that takes its time
HERE = "at the direction"


def refusal_direction(
    model: str = "smollm2-135m-refusal", requests: str = "", n_random: int = 20, seed: int = 0
) -> lp.Experiment:
    """Find the direction by which a model refuses, and take it apart; each run is one model."""

    def body(run: lp.Run) -> None:
        made = lp.refusal.Audit(
            run.model,
            pd.read_csv(requests) if requests else asked_of(model),
            [],
            most={} if model == TINY else LARGE,
            n_random=n_random,
            max_new_tokens=8 if model == TINY else 24,
            seed=seed,
            progress=run.progress,
        )
        found = run.table("found", lambda: outcome(made)).iloc[0]
        behaviour(run, made, found)
        if found["hook"]:
            place = Place(found["hook"], int(found["position"]))
            effects(run, made)
            positions(run, made)
            doses(run, made)
            several(run, made, place)
            writers(run, made, place)
            if run.model.cfg.moe is not None:
                experts(run, made)
            weights(run, made)
        words(run, made)

    files = [Path(requests)] if requests else []
    return lp.Experiment(f"How {model} refuses, in depth", body, seed=seed, inputs=files)


class Place(NamedTuple):
    """Where the direction lies."""

    hook: str
    position: int


def asked_of(model: str) -> pd.DataFrame:
    """The requests that a model can be asked."""
    return lp.prompts.requests(TINY if model == TINY else "everyday")


def outcome(made: lp.refusal.Audit) -> pd.DataFrame:
    """The study in a row, so that a run that goes on need not study again to go on."""
    study, direction = made.study, made.study.direction
    row = {
        "verdict": study.verdict,
        "hook": direction.hook if direction else "",
        "position": direction.position if direction else "",
        "rule": study.record.get("rule", ""),
    }
    return pd.DataFrame([row])


# The steps, each with its tables. What is computed is asked of the study when a table is missing.


def behaviour(run: lp.Run, made: lp.refusal.Audit, found: pd.Series) -> None:
    """Whether it refuses, and what was chosen."""
    run.heading("Does it refuse?")
    run.note(found["verdict"])
    guard = run.table("guard", lambda: made.study.guard.frame)
    run.figure(lp.plots.refusal_guard(guard), "Declined, by judge.", table=guard)
    if found["hook"]:
        candidates = run.table("candidates", lambda: made.study.candidates)
        run.figure(lp.plots.refusal(candidates), "Every candidate's three scores.")
        run.table("random kl", partial(random_kl, made), caption="KL, ablated, in nats.")


def random_kl(made: lp.refusal.Audit) -> pd.DataFrame:
    """What ablating the chosen direction costs, and random ones."""
    own = made.study.candidates.query("chosen")["kl_div_score"].tolist()
    costs = {"refusal": own, "random": list(made.study.random_kl)}
    rows = [
        {"direction": name, "value": np.mean(kl), "highest": max(kl), "n": len(kl)}
        for name, kl in costs.items()
        if kl
    ]
    return pd.DataFrame(rows)


def effects(run: lp.Run, made: lp.refusal.Audit) -> None:
    """Ablation, addition and the affine edit, beside random directions."""
    run.heading("What do edits along it do?")
    found = run.table("effects", lambda: made.study.effects)
    for metric in ("declined", "refusal score", "kl"):
        run.figure(lp.plots.refusal_effects(found, metric=metric), f"By edit: {metric}.")
    run.table(
        "beside random directions",
        lambda: lp.refusal.random_changes(found),
        caption="The direction's change, and that of random ones of its length.",
    )
    own = found[(found["direction"] == "refusal") & (found["metric"] == "declined")]
    own = own[own["set"] == "restricted"].set_index("edit")
    told = ", ".join(f"{edit} {shown(own.loc[edit])}" for edit in ("none", "ablation", "affine"))
    run.note(f"Share of restricted requests that are declined: {told}.")


def positions(run: lp.Run, made: lp.refusal.Audit) -> None:
    """Harmfulness at the end of the instruction, refusal where the answer begins."""
    run.heading("Two positions")
    plane = run.table("plane", made.plane)
    run.figure(lp.plots.refusal_plane(plane), "Read as harmful, and about to be refused.")
    run.figure(lp.plots.refusal_projections(plane, column="refusal"), "On the refusal axis.")
    axes = ["harmfulness", "refusal"]
    within = plane[axes] - plane.groupby("set")[axes].transform("mean")
    run.note(
        "Harmfulness and refusal correlate over requests by "
        f"{plane[axes].corr().iloc[0, 1]:.2f}, within the sets by {within.corr().iloc[0, 1]:.2f}."
    )


def doses(run: lp.Run, made: lp.refusal.Audit) -> None:
    """How much of the direction it takes."""
    run.heading("How much of it?")
    response = run.table("doses", lambda: made.doses[0])
    answers = run.table("answers by dose", lambda: made.doses[1])
    for metric in ("declined", "refusal score", "kl"):
        run.figure(lp.plots.dose_response(response, metric=metric), f"By dose: {metric}.")
    index = lp.refusal.robustness_index(answers)
    run.note(f"Robustness index {shown(pd.Series(index._asdict()))}, 1 being the most robust.")


def several(run: lp.Run, made: lp.refusal.Audit, place: Place) -> None:
    """One direction or several: of the differences, of probes, under intervention."""
    run.heading("One direction, or several?")
    acts = run.capture(
        HERE, made.matched, hooks=place.hook, positions=[place.position], template="chat"
    )
    paired = both_kinds(made.matched)
    seeded: dict[str, Any] = {"n_random": max(made.n_random, 1), "seed": made.seed}
    along = run.table(
        "spectrum",
        lambda: lp.refusal.spectrum(acts, "restricted", "pair" if paired else None, **seeded).frame,
    )
    run.figure(lp.plots.refusal_subspace(along), "Along how many directions twins differ.")
    removed = run.table(
        "subspace",
        lambda: lp.refusal.refusal_subspace(acts, "restricted", groups="pair", **seeded).frame,
    )
    for metric in ("auroc", "auroc refitted"):
        run.figure(
            lp.plots.refusal_subspace(removed, metric=metric),
            f"How well they are told apart once k are removed: {metric}.",
        )
    apart = run.table(
        "independence",
        partial(two_candidates, made),
        caption="The refusal score under ablation of the chosen candidate, of the best one at "
        "another place, and of both.",
    )
    first = along[along["kind"] == "paired differences"].iloc[0]
    once = apart.set_index(["condition", "metric"])["value"]
    run.note(
        f"Of the squared differences of {first['n']} pairs {first['value']:.0%} lie along one "
        f"direction. Ablating the chosen candidate changes the score by "
        f"{once['first ablated', 'change']:.2f}, the next (cosine {apart['cosine'][0]:.2f}) by "
        f"{once['second ablated', 'change']:.2f}, and by "
        f"{once['second ablated', 'change after the other']:.2f} after the first."
    )


def both_kinds(matched: pd.DataFrame) -> bool:
    """Whether every pair has requests of both kinds."""
    return bool((matched.groupby("pair")["restricted"].nunique() == 2).all())


def two_candidates(made: lp.refusal.Audit) -> pd.DataFrame:
    """Whether the chosen candidate and the best one at another place act by themselves."""
    study, model = made.study, made.model
    ranked = study.candidates[study.candidates["dropped"] != "late layer"]
    ranked = ranked.sort_values(["chosen", "refusal_score"], ascending=[False, True])
    places = ranked[["position", "layer"]].head(2).to_numpy(dtype=int).tolist()
    means = study.means
    if means is None or len(places) < 2:
        raise lp.InputError("there is one candidate only, so none to compare it with")
    asked = study.asked["report"]["restricted"]

    def score(edit: Any) -> Any:
        return lp.refusal.refusal_score(lp.refusal.next_logits(model, asked, edit), study.tokens)

    first, second = (means.direction(position, layer) for position, layer in places)
    return lp.refusal.independence(score, first, second, seed=made.seed)


def writers(run: lp.Run, made: lp.refusal.Audit, place: Place) -> None:
    """Which parts write the direction, and that they sum to what is there."""
    run.heading("Who writes it?")
    parts = run.table("writers", made.writers)
    run.figure(lp.plots.refusal_writers(parts), "Restricted less harmless, part by part.")
    acts = lp.Activations.open(run.folder / "stores" / HERE)
    check = run.table("writers check", lambda: summed(made, acts[place.hook], parts))
    gap = abs(check["projection"][0] - check["parts"][0])
    top = parts.loc[parts["value"].abs().idxmax()]
    where = ", ".join(
        f"{name} {top[name]}" for name in ("layer", "head", "expert") if top[name] >= 0
    )
    run.note(
        f"All parts sum to {check['parts'][0]:.3f}, {gap:.1e} from the projection. The largest is "
        f"{top['component']} ({where}): {shown(top)}."
    )


def summed(made: lp.refusal.Audit, x: Any, parts: pd.DataFrame) -> pd.DataFrame:
    """The difference of the sets along the direction, read from the stream and from its parts."""
    unit = made.study.vector.numpy() / np.linalg.norm(made.study.vector.numpy())
    along, label = x.double().numpy() @ unit, made.matched["restricted"].to_numpy()
    projection = along[label].mean() - along[~label].mean()
    return pd.DataFrame({"projection": [projection], "parts": [parts["value"].sum()]})


def experts(run: lp.Run, made: lp.refusal.Audit) -> None:
    """Which experts restricted requests use, and which tokens an ablation sends elsewhere."""
    run.heading("Which experts?")
    contrast = run.table("expert contrast", partial(contrasts, made))
    for name, part in contrast.groupby("against", sort=False):
        run.figure(
            lp.plots.expert_contrast(part), f"Restricted requests against {name}.", table=part
        )
    found = contrast[contrast["q"] < 0.05].groupby("against", sort=False)["value"]
    told = [f"{name}: {len(of)}, the largest {of.abs().max():.3f}" for name, of in found]
    run.note(
        "Experts that restricted requests use more or less (q below 0.05) than others do, and by "
        f"what share of tokens: {'; '.join(told) or 'none'}."
    )
    flips = run.table(
        "route flips",
        lambda: lp.refusal.route_flips(
            made.model,
            made.matched[made.matched["restricted"]],
            lp.ablate(made.study),
            template="chat",
            seed=made.seed,
        ),
        caption="Tokens of restricted requests that ablation sends to other experts.",
    )
    total = flips["changed"].sum() / flips["n"].sum()
    run.note(f"Ablation changes the experts of {total:.1%} of tokens, over all layers.")


def contrasts(made: lp.refusal.Audit) -> pd.DataFrame:
    """Restricted requests against twins, as they are and within topics, and ordinary ones."""
    label = made.matched["restricted"]
    sets = {"restricted": made.matched[label], "twins": made.matched[~label]}
    sets["ordinary requests"] = made.requests[made.requests["kind"] == "ordinary"]
    routes = {name: routes_of(made.model, of) for name, of in sets.items() if len(of) > 1}
    restricted = routes.pop("restricted")
    compare: Callable[..., pd.DataFrame] = partial(
        lp.expert_contrast, made.model, restricted, seed=made.seed
    )
    tables = {name: compare(of) for name, of in routes.items()}
    if "topic" in made.matched:
        topics = tuple(sets[name]["topic"].tolist() for name in ("restricted", "twins"))
        tables["twins of the same topics"] = compare(routes["twins"], topics=topics)
    return pd.concat(
        [table.assign(against=name) for name, table in tables.items()], ignore_index=True
    )


def routes_of(model: lp.Llama, frame: pd.DataFrame) -> lp.Routes:
    """How requests are routed, in the chat template."""
    return lp.routes_of(model, [one.ids for one in lp.refusal.ask(model, frame).encoded])


def weights(run: lp.Run, made: lp.refusal.Audit) -> None:
    """Whether ablation in the weights of a copy is the ablation of the hooks."""
    run.heading("The same edit, in the weights of a copy")
    check = run.table(
        "weights check",
        partial(equality, made),
        caption="The largest difference of any logit at the next token, and what a comparison of "
        "the weights says of the copy.",
    ).iloc[0]
    run.note(
        f"Hooks and the orthogonalised copy differ by {check['difference']:.1e} of a logit at "
        f"most. Compared with the model, the copy is recognised: {check['mark']}."
    )


def equality(made: lp.refusal.Audit) -> pd.DataFrame:
    """The largest difference of logits, and the mark that the edit leaves in the weights."""
    copy = lp.refusal.orthogonalised(made.model, made.study)
    largest = 0.0
    for asked in made.study.asked["report"].values():
        hooked = lp.refusal.next_logits(made.model, asked, lp.ablate(made.study))
        gap = (lp.refusal.next_logits(copy, asked) - hooked).abs().max().item()
        largest = max(largest, gap)
    mark = lp.refusal.mark_of_editing(copy, made.model, seed=made.seed).verdict
    return pd.DataFrame([{"difference": largest, "mark": mark}])


def words(run: lp.Run, made: lp.refusal.Audit) -> None:
    """How well the sets are told apart, by the stream and by the words alone."""
    run.heading("Told apart, and by the words alone")
    told = run.table("separability", made.separability)
    run.figure(lp.plots.probe(told, "auroc"), "Restricted against harmless.", table=told)
    auroc = told[told["metric"] == "auroc"].set_index("kind")
    kinds = {"best cell, corrected": "a probe reaches", "n-grams": "word counts alone"}
    reached = [
        f"{said} {shown(auroc.loc[kind])}" for kind, said in kinds.items() if kind in auroc.index
    ]
    run.note(
        f"Restricted and harmless requests told apart, AUROC: {', '.join(reached)}. That does not "
        "say that the model refuses."
    )


def shown(row: pd.Series) -> str:
    """A value with its interval."""
    return f"{row['value']:.2f} [{row['ci_low']:.2f}, {row['ci_high']:.2f}]"
