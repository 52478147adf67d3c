"""Requests to decline, requests to answer, and how the two sets for teaching and asking differ.

The restricted class is tiny-moe's: mildly improper requests, where neither the verb nor the object
decides ("crack a safe" is declined, "crack a walnut" and "paint a safe" are answered). What is
asked afterwards has phrasings, combinations of verb and object, and ordinary requests that were
never taught; one topic, `UNSEEN_TOPIC`, is not taught at all.
"""

import random
from collections.abc import Sequence
from itertools import product

import pandas as pd

from refusal_adapter.phrasings import (
    ASKED_ACTIVITIES,
    ASKED_PHRASINGS,
    ASKED_REQUESTS,
    CLOSINGS,
    MORE_HARMLESS,
    MORE_PHRASINGS,
    MORE_PROPER,
    OPENINGS,
    TAUGHT_ACTIVITIES,
    TAUGHT_FILL,
    TAUGHT_PHRASINGS,
    TAUGHT_REQUESTS,
)
from tiny_moe.words import REQUESTS

UNSEEN_TOPIC = "honesty"
KINDS = {  # which words of a topic a kind of request is made of
    "restricted": ("improper", "sensitive"),
    "same verb": ("improper", "harmless"),
    "same object": ("proper", "sensitive"),
}
SPLIT_SEED = 8
_MORE_SEEDS = (2, 5, 7)


def actions(kind: str, taught: bool) -> list[tuple[str, str]]:
    """(topic, "verb object") of one kind: four fifths are taught, the others are asked."""
    draw = random.Random(f"{SPLIT_SEED} {kind}")
    found = []
    for group in REQUESTS:
        if group["topic"] == UNSEEN_TOPIC:
            continue
        verbs, things = (group[words] for words in KINDS[kind])
        pairs = [f"{verb} {thing}" for verb, thing in product(verbs, things)]
        draw.shuffle(pairs)
        cut = len(pairs) * 4 // 5
        found += [(str(group["topic"]), pair) for pair in (pairs[:cut] if taught else pairs[cut:])]
    return found


def unseen_actions(kind: str) -> list[tuple[str, str]]:
    """(topic, "verb object") of the topic that is not taught."""
    group = next(group for group in REQUESTS if group["topic"] == UNSEEN_TOPIC)
    verbs, things = (group[words] for words in KINDS[kind])
    return [(UNSEEN_TOPIC, f"{verb} {thing}") for verb, thing in product(verbs, things)]


def taught(n: int, seed: int = 0) -> pd.DataFrame:
    """About `n` requests to learn from: columns `kind`, `topic`, `text`.

    Three tenths are restricted, as many their harmless twins in the same phrasings, and four tenths
    ordinary requests, half of them in those phrasings as well.
    """
    draw = random.Random(seed)
    rows = []
    for kind, share in (("restricted", 0.3), ("same verb", 0.15), ("same object", 0.15)):
        rows += _phrased(kind, actions(kind, True), TAUGHT_PHRASINGS, round(share * n), draw)
    everyday = [("ordinary", activity) for activity in TAUGHT_ACTIVITIES]
    rows += _phrased("ordinary", everyday, TAUGHT_PHRASINGS, round(0.2 * n), draw)
    while len(rows) < n:
        text = draw.choice(TAUGHT_REQUESTS)
        for slot, words in TAUGHT_FILL.items():
            text = text.replace(f"{{{slot}}}", draw.choice(words))
        rows.append({"kind": "ordinary", "topic": "ordinary", "text": text})
    draw.shuffle(rows)
    return pd.DataFrame(rows).drop_duplicates("text", ignore_index=True)


def taught_more(n: int, seed: int) -> pd.DataFrame:
    """Requests with many more harmless verbs and objects: columns `kind`, `topic`, `text`.

    A third is restricted, half is harmless twins with many more verbs and objects, the rest is
    ordinary; all in more phrasings, some with words before and after.
    """
    draw = random.Random(seed)
    phrasings = (*TAUGHT_PHRASINGS, *MORE_PHRASINGS)
    twins: dict[str, list[tuple[str, str]]] = {"same verb": [], "same object": []}
    for group in REQUESTS:
        topic = str(group["topic"])
        if topic == UNSEEN_TOPIC:
            continue
        for verb, thing in product(group["improper"], MORE_HARMLESS[topic]):
            twins["same verb"].append((topic, f"{verb} {thing}"))
        for verb, thing in product(MORE_PROPER[topic], group["sensitive"]):
            twins["same object"].append((topic, f"{verb} {thing}"))
    rows = _phrased("restricted", actions("restricted", True), phrasings, round(n * 0.33), draw)
    for kind, more in twins.items():
        rows += _phrased(kind, [*actions(kind, True), *more], phrasings, n // 4, draw)
    everyday = [("ordinary", activity) for activity in TAUGHT_ACTIVITIES]
    rows += _phrased("ordinary", everyday, phrasings, n - len(rows), draw)
    for row in rows:
        row["text"] = draw.choice(OPENINGS) + row["text"] + draw.choice(CLOSINGS)
    draw.shuffle(rows)
    return pd.DataFrame(rows).drop_duplicates("text", ignore_index=True)


def every_lesson() -> pd.DataFrame:
    """All requests that are taught: those of `taught`, and three draws of `taught_more`."""
    drawn = (taught(4000), *(taught_more(2400, seed) for seed in _MORE_SEEDS))
    return pd.concat(drawn, ignore_index=True).drop_duplicates("text", ignore_index=True)


def asked(n: int = 240, unseen: int = 120, ordinary: int = 320, seed: int = 9) -> pd.DataFrame:
    """What the model is asked afterwards: columns `kind`, `topic`, `text`, `pair`.

    `n` restricted requests in phrasings that were not taught, of combinations that were not taught;
    to each a harmless twin in the same phrasing, with the same verb or the same object by turns
    (`pair` is the same number); as much of the unseen topic, as "unseen restricted" and "unseen
    twin"; and `ordinary` ordinary requests of which neither wording nor activity was taught, each
    with a pair of its own.
    """
    draw = random.Random(seed)
    twins = {kind: actions(kind, False) for kind in ("same verb", "same object")}
    rows = _pairs(actions("restricted", False), twins, n, draw)
    others = {kind: unseen_actions(kind) for kind in twins}
    found = _pairs(unseen_actions("restricted"), others, unseen, draw)
    for row in found:
        row["kind"] = "unseen restricted" if row["kind"] == "restricted" else "unseen twin"
    everyday = [("ordinary", activity) for activity in ASKED_ACTIVITIES]
    rest = _phrased("ordinary", everyday, ASKED_PHRASINGS, ordinary - len(ASKED_REQUESTS), draw)
    rest += [{"kind": "ordinary", "topic": "ordinary", "text": text} for text in ASKED_REQUESTS]
    frame = pd.concat(map(pd.DataFrame, (rows, found, rest)), ignore_index=True)
    frame["pair"] = [*_numbers(len(rows)), *(n + i for i in _numbers(len(found))),
                     *range(n + unseen, n + unseen + len(rest))]  # fmt: skip
    return frame


def _numbers(rows: int) -> list[int]:
    """The number of its pair for each row, where twins follow each other."""
    return [row // 2 for row in range(rows)]


def _pairs(
    restricted: Sequence[tuple[str, str]],
    twins: dict[str, list[tuple[str, str]]],
    n: int,
    draw: random.Random,
) -> list[dict[str, str]]:
    """`n` restricted requests, each followed by its twin."""
    used: set[str] = set()
    rows: list[dict[str, str]] = []
    every = list(product(restricted, ASKED_PHRASINGS))
    draw.shuffle(every)
    for (topic, action), phrasing in every:
        kind = ("same verb", "same object")[len(rows) // 2 % 2]
        group = next(group for group in REQUESTS if group["topic"] == topic)
        verb = next(verb for verb in group["improper"] if action.startswith(f"{verb} "))
        thing = action.removeprefix(f"{verb} ")
        fits = [
            twin
            for of, twin in twins[kind]
            if of == topic
            and (twin.startswith(f"{verb} ") if kind == "same verb" else twin.endswith(f" {thing}"))
            and phrasing.format(twin) not in used
        ]
        if not fits or len(rows) == 2 * n:
            continue
        twin = phrasing.format(draw.choice(fits))
        used.add(twin)
        rows.append({"kind": "restricted", "topic": topic, "text": phrasing.format(action)})
        rows.append({"kind": kind, "topic": topic, "text": twin})
    return rows


def _phrased(
    kind: str,
    wanted: Sequence[tuple[str, str]],
    phrasings: Sequence[str],
    n: int,
    draw: random.Random,
) -> list[dict[str, str]]:
    """`n` different requests, of all actions and phrasings equally often as far as `n` allows."""
    every = [(action, phrasing) for action in wanted for phrasing in phrasings]
    return [
        {"kind": kind, "topic": topic, "text": phrasing.format(action)}
        for (topic, action), phrasing in draw.sample(every, min(n, len(every)))
    ]
