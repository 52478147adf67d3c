"""What the refusal dashboard does on demand: doses, answers under each edit, and their table."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from llama_probe.model.llama import Llama
from llama_probe.plots.frames import rows
from llama_probe.refusal.asking import Asked, answers, redacted
from llama_probe.refusal.dose import dose_response
from llama_probe.refusal.effects import with_plain
from llama_probe.refusal.study import RefusalStudy

Progress = Callable[[int, int], None]  # what is done, and the whole

_MOST_DOSED = 32  # requests of each set
_MOST_TOKENS = 48  # of an answer
_TABLE = (
    '<table class="lp-answers" style="border-collapse: collapse">'
    '<caption style="text-align: left">{caption}</caption>{rows}</table>'
)
_ROW = (
    '<tr><th scope="row" style="text-align: left; padding: 2px 12px 2px 0; vertical-align: top">'
    '{edit}</th><td style="white-space: pre-wrap; overflow-wrap: anywhere">{text}</td></tr>'
)


def edits_of(study: RefusalStudy) -> dict[str, Any]:
    """The plain model and the three edits along a study's direction, by name."""
    return with_plain(study.edits)


def dosed(
    model: Llama,
    study: RefusalStudy,
    asked: Mapping[str, Asked],
    doses: Sequence[float],
    progress: Progress,
    **random: int,
) -> pd.DataFrame:
    """The dose-response on at most 32 requests of each set, dose by dose: so it can be stopped."""
    few = {name: of[range(min(len(of), _MOST_DOSED))] for name, of in asked.items()}
    tables = []
    for number, dose in enumerate(doses):
        progress(number, len(doses))
        frame, _ = dose_response(
            model, study, few["restricted"], few["harmless"], study.tokens, doses=[dose],
            max_new_tokens=study.record["max_new_tokens"],
            n_random=random["n_random"], seed=random["seed"],
        )  # fmt: skip
        # Dose 0 comes with each.
        tables.append(frame if not number else rows(frame, frame["dose"] > 0))
    return pd.concat(tables, ignore_index=True)


def answered(
    model: Llama, asked: Asked, edits: Mapping[str, Any], progress: Progress
) -> dict[str, str]:
    """What is answered to one request under each edit, in at most 48 tokens."""
    said = {}
    for number, (edit, hooks) in enumerate(edits.items()):
        progress(number, len(edits))
        said[edit] = answers(model, asked, hooks, max_new_tokens=_MOST_TOKENS)[0]
    return said


def table(request: str, said: Mapping[str, str] | None, redact: bool) -> str:
    """The answers to a request as HTML; None: how to get them.

    >>> "<b>" in table("<b>", {"none": "<b>"}, False)
    False
    """
    name = html.escape(request)
    if said is None:
        return f"“Generate” answers request {name}, plain and under each edit."
    body = [
        _ROW.format(edit=edit, text=html.escape(redacted(text) if redact else text))
        for edit, text in said.items()
    ]
    return _TABLE.format(caption=f"Answers to request {name}", rows="".join(body))
