"""Statements that are true or false, about facts of five topics, affirmed and denied.

Facts come in twos which exchange their answers: "The capital of France is Paris", "... of Slovakia
is Bratislava" are true, "... of France is Bratislava", "... of Slovakia is Paris" false. So in each
group every subject and every answer is true as often as false, and no word gives the label away.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import pandas as pd

from llama_probe.errors import InputError, near
from llama_probe.prompts.contrast import contrast_set, table


class _Template(NamedTuple):
    """One way to put a fact, and the same denied."""

    affirmed: str
    denied: str


# In one template of each topic the answer comes last, in the other the subject.
TOPICS = {
    "capitals": (
        _Template(
            "The capital of {subject} is {answer}.",
            "The capital of {subject} is not {answer}.",
        ),
        _Template(
            "{answer} is the capital of {subject}.",
            "{answer} is not the capital of {subject}.",
        ),
    ),
    "animals": (
        _Template(
            "The {subject} is a kind of {answer}.",
            "The {subject} is not a kind of {answer}.",
        ),
        _Template(
            "A list of all {answer} species would include the {subject}.",
            "A list of all {answer} species would not include the {subject}.",
        ),
    ),
    "elements": (
        _Template(
            "The atomic number of {subject} is {answer}.",
            "The atomic number of {subject} is not {answer}.",
        ),
        _Template(
            "Element number {answer} of the periodic table is {subject}.",
            "Element number {answer} of the periodic table is not {subject}.",
        ),
    ),
    "sums": (
        _Template(
            "The sum of {subject} is {answer}.",
            "The sum of {subject} is not {answer}.",
        ),
        _Template(
            "The number {answer} is the sum of {subject}.",
            "The number {answer} is not the sum of {subject}.",
        ),
    ),
    "translations": (
        _Template(
            "The French word '{subject}' means '{answer}'.",
            "The French word '{subject}' does not mean '{answer}'.",
        ),
        _Template(
            "In French, the word for '{answer}' is '{subject}'.",
            "In French, the word for '{answer}' is not '{subject}'.",
        ),
    ),
}


def true_false(topic: str | None = None, negated: bool | None = None) -> pd.DataFrame:
    """Statements about facts, half of them true, written by us.

    After the true/false sets of Azaria and Mitchell 2023 (arXiv 2304.13734), Marks and Tegmark 2023
    (arXiv 2310.06824) and, for the negations, Levinstein and Herrmann 2023 (arXiv 2307.00175). The
    facts are of 2025 and undisputed; left out are capitals that are disputed, being moved, or named
    like their country. Whether a model knows the facts is not asked here.

    Args:
        topic: "capitals" (92 countries), "animals" (the class of 90 animals), "elements" (atomic
            numbers 1 to 80), "sums" (100 of two numbers below 50) or "translations" (120 French
            nouns); None: all five.
        negated: True: only denials ("is not"); False: only affirmations; None: both.

    Returns:
        One row for each statement: `text`, `label` (1 true, 0 false), `group` (the two facts that
        exchange their answers), `topic`, `subject`, `answer` (the one stated), `correct` (the right
        one), `negated`, and `template` (its number within the topic). Fit on folds of `group`:
        those of `subject` leak, as a held-out statement's answer is in the training set with the
        opposite label.

    Raises:
        InputError: There is no such topic.

    >>> statements = true_false("capitals", negated=False)
    >>> statements[statements.subject == "France"][["text", "label"]].values.tolist()[:2]
    [['The capital of France is Paris.', 1], ['The capital of France is Bratislava.', 0]]
    """
    if topic is not None and topic not in TOPICS:
        raise InputError(
            f"topic is {topic!r}, but should be one of {', '.join(TOPICS)}"
            f"{near(str(topic), TOPICS)}"
        )
    names = TOPICS if topic is None else [topic]
    rows = [row for name in names for row in _statements(name)]
    return contrast_set(pd.DataFrame([r for r in rows if negated in (None, r["negated"])]))


def _statements(topic: str) -> Iterator[dict[str, Any]]:
    for line in table(f"truth/{topic}"):
        one, other = (
            (line["subject"], line["answer"]),
            (line["other_subject"], line["other_answer"]),
        )
        group = f"{one[0]} / {other[0]}"
        for (subject, right), (_, wrong) in [(one, other), (other, one)]:
            wordings = product(enumerate(TOPICS[topic]), (False, True), (right, wrong))
            for (number, template), negated, answer in wordings:
                words = template.denied if negated else template.affirmed
                yield {
                    "text": words.format(subject=subject, answer=answer),
                    "label": int((answer == right) != negated),
                    "group": group,
                    "topic": topic,
                    "subject": subject,
                    "answer": answer,
                    "correct": right,
                    "negated": negated,
                    "template": number,
                }
