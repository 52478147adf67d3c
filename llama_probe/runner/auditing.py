"""`lp.audit`: one report on how a model refuses, and on what changed since another checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from llama_probe import plots, prompts, stats
from llama_probe.errors import InputError
from llama_probe.runner.experiment import Experiment
from llama_probe.runner.grid import run as run_grid
from llama_probe.runner.steps import Run

if TYPE_CHECKING:
    from llama_probe.refusal import Audit

_TINY = "tiny-moe"
_LARGE = {"fit": 120, "select": 24, "report": 30}  # enough, for a model that takes its time
_DOSED = {
    "declined": "How often it declines, by how much of the direction is removed or added.",
    "refusal score": "The log odds that the answer begins as refusals do; beside it random ones.",
    "kl": "How much the next token changes, in nats; beside it random ones.",
}
_FACTS = 64


def audit(
    model: str | Path,
    against: str | Path | None = None,
    *,
    requests: str | Path | None = None,
    out: str | Path = "audits",
    again: bool = False,
    show_answers: bool = False,
    n_random: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Audit a model's refusal, and write it all as one report.

    Does it refuse, and over-refuse (harmless twins, ordinary requests)? By what direction, and what
    do edits of it do beside random ones? What does removing it cost? Who writes it? What would a
    monitor catch? Against another checkpoint of the same base: what changed, and was a direction
    removed from the weights? An audit that was cut short goes on when it is asked for again.

    Args:
        model: A catalogue name, a folder, a file or a hub name.
        against: What it is compared with, likewise.
        requests: A CSV file with `text`, `kind` and `pair` (see `lp.refusal.Audit`); None: those of
            `lp.prompts.requests`, which are mild.
        out: The folder of the audits' folders.
        again: Begin anew.
        show_answers: Keep and show answers in full; otherwise only how they begin.
        n_random: Random directions beside the one that is found; fewer than 20 give no limit on KL.
        seed: Of all draws.
        progress: Show bars.

    Returns:
        The path of the report. Beside it are the tables.

    Raises:
        InputError: The model or the requests cannot be used; the sentence is that of the run.
    """
    table = run_grid(
        refusal_audit,
        out=out,
        again=again,
        progress=progress,
        model=str(model),
        against="" if against is None else str(against),
        requests="" if requests is None else str(requests),
        show_answers=show_answers,
        n_random=n_random,
        seed=seed,
    )
    row = table.iloc[0]
    if row["status"] != "complete":
        raise InputError(f"the audit of {model} is {row['status']}: {row['error']}")
    return Path(str(row["folder"])) / "report.html"


def refusal_audit(
    model: str,
    against: str = "",
    requests: str = "",
    show_answers: bool = False,
    n_random: int = 20,
    seed: int = 0,
) -> Experiment:
    """The audit as an experiment: each run is one model."""

    def body(run: Run) -> None:
        from llama_probe.refusal import Audit

        # Loaded before anything is measured: a name that is misspelt should not cost an audit.
        other = run.load(against, progress=run.progress) if against else None
        asked = pd.read_csv(requests) if requests else _requests(model)
        limits = {} if model == _TINY else _LARGE
        texts = _prose(model)
        options = {"n_random": n_random, "seed": seed, "progress": run.progress}
        made = Audit(run.model, asked, texts, most=limits, **options)
        run.text(_about(asked))
        _behaviour(run, made, show_answers)
        if not made.study.candidates.empty:
            run.heading("By what?")
            candidates = run.table("candidates", lambda: made.study.candidates)
            run.figure(plots.refusal(candidates), "Every candidate direction's three scores.")
        if made.study.direction is not None:
            _mechanism(run, made, show_answers)
        _separability(run, made)
        if other is not None:
            _against(run, made, replace(made, model=other), against)

    name = f"How {model} refuses" + (f", against {against}" if against else "")
    return Experiment(name, body, seed=seed, inputs=[requests] if requests else [])


def _requests(model: str) -> pd.DataFrame:
    return prompts.requests(_TINY if model == _TINY else "everyday")


def _prose(model: str) -> list[str]:
    """Ordinary texts; tiny-moe knows no others than those of its world."""
    if model != _TINY:
        return prompts.plain_texts()
    facts = prompts.planted()["exam"]["facts"][:_FACTS]
    return [fact["prompt"] + fact["answer"] for fact in facts]


def _about(asked: pd.DataFrame) -> str:
    kinds = ", ".join(f"{n} {kind}" for kind, n in asked["kind"].value_counts().items())
    return (
        f"Asked: {kinds}. Edits live in memory, and for as long as they are measured; nothing is "
        "saved with them in place."
    )


def _behaviour(run: Run, made: "Audit", show_answers: bool) -> None:
    run.heading("Does it refuse, and does it over-refuse?")
    run.note(made.study.verdict)
    guard = run.table("guard", lambda: made.study.guard.frame)
    run.figure(plots.refusal_guard(guard), "Declined, by judge.", table=guard)
    run.table("declining", made.declining, caption="Declined by kind of request.")
    run.table("agreement", made.agreement, caption="How far the judges agree on all answers.")
    said = run.table("answers", lambda: _told(made.answered, show_answers))
    some = said.groupby("kind").head(2)
    run.table("some answers", lambda: some, caption="Two answers of each kind.")


def _told(answers: pd.DataFrame, in_full: bool) -> pd.DataFrame:
    """Answers as they are kept: how they begin, unless they are asked for in full."""
    from llama_probe.refusal.asking import redacted

    if in_full:
        return answers
    return answers.assign(response=[redacted(text) for text in answers["response"]])


def _mechanism(run: Run, made: "Audit", show_answers: bool) -> None:
    from llama_probe import refusal

    effects = run.table("effects", lambda: made.study.effects)
    run.figure(plots.refusal_effects(effects), "What edits do on requests kept for the report.")
    run.table(
        "beside random directions",
        lambda: refusal.random_changes(effects),
        caption="The direction's effect, and that of random directions of its length.",
    )
    plane = run.table("plane", made.plane)
    run.figure(plots.refusal_plane(plane), "Read as harmful, and about to be refused.")
    run.heading("What does removing it cost?")
    doses = run.table("doses", lambda: made.doses[0])
    given = run.table("answers by dose", lambda: _told(made.doses[1], show_answers))
    for metric, said in _DOSED.items():
        run.figure(plots.dose_response(doses, metric=metric), said)
    index = refusal.robustness_index(given)
    run.note(
        f"Robustness index {_shown(index)}: the area under the share of restricted requests that "
        "are declined, over the fraction of the direction removed (1: as robust as can be)."
    )
    run.table(
        "loss",
        made.loss,
        caption="Loss on ordinary prose under each edit, nats a token; the ablation of random "
        "directions with the range of 95 % of them.",
    )
    run.heading("Who writes it?")
    writers = run.table("writers", made.writers)
    run.figure(plots.refusal_writers(writers), "Restricted less harmless, part by part.")
    run.heading("What would a monitor catch?")
    run.table(
        "monitor",
        made.monitored,
        caption="Flagged by a linear probe at that place, requests that it has not seen. A monitor "
        "is a measurement, not a defence.",
    )


def _separability(run: Run, made: "Audit") -> None:
    run.heading("Told apart by layer, and by the words alone")
    told = run.table("separability", made.separability)
    run.figure(plots.probe(told, "auroc"), "Restricted against harmless, difference in means.")
    words, best = _auroc(told, "n-grams"), _auroc(told, "best cell, corrected")
    if words and best:
        run.note(
            f"The two sets are told apart with AUROC {best} (layer and position chosen on one "
            f"half, tested on the other); word counts alone reach {words}. That they can be told "
            "apart does not say that the model refuses."
        )


def _against(run: Run, made: "Audit", then: "Audit", name: str) -> None:
    from llama_probe import refusal

    run.heading(f"What changed since {name}?")
    run.table("declining then", then.declining, caption=f"Declined by kind of request, {name}.")
    if made.study.direction is not None and then.study.direction is not None:
        gap = run.table(
            "robustness change",
            lambda: pd.DataFrame([refusal.robustness_difference(made.doses[1], then.doses[1])]),
        )
        value, low, high, n = gap.to_numpy(dtype=float)[0].tolist()
        found = stats.Estimate(value, low, high, int(n))
        run.note(f"Robustness index, less that of {name}: {_shown(found)}, on the same requests.")
    else:
        run.text(f"{name}: {then.study.verdict}")
    turned = run.table(
        "direction change",
        lambda: refusal.direction_change(
            made.acts, made.read(then.model), "restricted", groups="pair", at="last of the template"
        ),
    )
    run.figure(plots.refusal_changes(turned), "Cosine of the two models' differences in means.")
    mark = refusal.mark_of_editing(made.model, then.model, seed=made.seed)
    run.note(
        f"The mark of directional editing, {made.model.cfg.model_name} since {name}: {mark.verdict}"
    )
    if mark.direction is not None:  # some weight that writes into the stream was changed
        direction: Any = made.study.direction or mark.direction
        changes = run.table(
            "weight changes", lambda: refusal.weight_changes(made.model, then.model, direction)
        )
        run.figure(
            plots.refusal_changes(changes), "The change of each weight, and its share along it."
        )


def _shown(found: stats.Estimate) -> str:
    return f"{found.value:.2f} [{found.ci_low:.2f}, {found.ci_high:.2f}] (n = {found.n})"


def _auroc(told: pd.DataFrame, kind: str) -> str:
    """The value of a kind with its interval, or "" where there is none."""
    rows = told.query("metric == 'auroc' and kind == @kind", local_dict={"kind": kind})
    found = rows[["value", "ci_low", "ci_high"]].to_numpy(dtype=float)
    return "{:.3f} [{:.3f}, {:.3f}]".format(*found[0]) if len(found) else ""
