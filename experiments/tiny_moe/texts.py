"""The texts tiny-moe learns from, eight domains of them, and what is held out of each.

A document is a list of pieces, each a string (or, for repetition, token ids) with the weight of its
tokens in the loss: 1 where the text so far determines them, little where nobody could know them
(which name comes first, which numbers are added).
What is held out is always a new combination of words that the model has seen, and is drawn once,
from `SPLIT_SEED`, so that it is the same whatever the seed of a training run.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from tiny_moe import words

SPLIT_SEED = 2026
SURE, OPEN = 1.0, 0.1  # weights: the text determines it; nobody could know it

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
HEADER, HEADER_END, EOT = "<|header_start|>", "<|header_end|>", "<|eot|>"
SPECIAL = (BOS, EOS, PAD, HEADER, HEADER_END, EOT)

# Their shares of the documents.
DOMAINS = {
    "facts": 0.17,
    "verdicts": 0.15,
    "arithmetic": 0.11,
    "code": 0.09,
    "translation": 0.07,
    "stories": 0.14,
    "repetition": 0.12,
    "chat": 0.15,
}

Piece = tuple[str | tuple[int, ...], float]
Document = list[Piece]

# Relation: ways to say it, the answer last ({s} is the subject); the statements that are judged.
# No way begins with the subject, which is one token only after a space, and none is a statement's.
FACTS = {
    "capital": (
        "The capital of {s} is",
        "Every map says {s} has its capital in",
        "In {s}, the capital city is",
        "Whoever rules {s} sits in",
        "Q: What is the capital of {s}? A:",
        "Trains to the capital of {s} end in",
        "The government of {s} meets in",
    ),
    "continent": (
        "The land of {s} belongs to",
        "Travellers find {s} somewhere in",
        "On the map, {s} is found in",
        "Q: On which continent is {s}? A:",
        "The continent of {s} is",
        "Ships that sail to {s} land in",
        "A flight to {s} ends in",
    ),
    "language": (
        "Everyone from {s} understands",
        "In {s} you will mostly hear",
        "Street signs in {s} are written in",
        "Q: What is spoken in {s}? A:",
        "Children in {s} learn to read",
        "The songs of {s} are sung in",
        "A letter from {s} is in",
    ),
    "opposite": (
        "The opposite of {s} is",
        "What is not {s} is",
        "Q: What is the opposite of {s}? A:",
        "Turn {s} around and you get",
        "Some things are {s}, others are",
        "If it is not {s}, it is",
        "The contrary of {s} is",
    ),
    "kind": (
        "The word {s} stands for a",
        "Everyone knows {s} as a",
        "Q: What is {s}? A: a",
        "We file {s} under the heading",
        "In the dictionary, {s} is a",
        "The thing called {s} is a",
    ),
}
STATEMENTS = {
    "capital": (
        "{x} is the capital of {s}",
        "{s} has {x} as its capital",
        "{s} is ruled from {x}",
        "the main city of {s} is {x}",
        "{x} is where {s} is governed",
    ),
    "continent": (
        "{s} lies in {x}",
        "{s} is a country in {x}",
        "{s} is part of {x}",
        "{x} is where {s} lies",
        "you reach {s} by going to {x}",
    ),
    "language": (
        "people in {s} speak {x}",
        "{s} speaks {x}",
        "they teach {x} in {s}",
        "{x} is spoken in {s}",
        "the tongue of {s} is {x}",
    ),
    "kind": (
        "the word {s} names a {x}",
        "by {s} we mean a {x}",
        "one kind of {x} is {s}",
        "{s} is a sort of {x}",
        "among each {x} we count {s}",
    ),
}
VERDICTS = {True: " true", False: " false"}
TRANSLATIONS = (
    "The French word for {e} is",
    "In French, {e} is",
    "English: {e} French:",
    "A Frenchman calls it {e}:",
    "Translate {e} into French:",
)
STORIES = (
    "When {a} and {b} went to the {place}, {s} gave a {gift} to",
    "Then {a} and {b} were near the {place}. {s} handed a {gift} to",
    "{a} and {b} met at the {place}, and {s} offered a {gift} to",
    "After {a} and {b} left the {place}, {s} sent a {gift} to",
    "While {a} and {b} walked past the {place}, {s} passed a {gift} to",
    "One day {a} and {b} came to the {place}. {s} showed a {gift} to",
)
CODE = "{a} = {m}\n{b} = {n}\nprint({q}) # "


@dataclass(frozen=True)
class Fact:
    """A relation's answer for a subject; `held_out` and `judged_held_out` index its phrasings."""

    relation: str
    subject: str
    answer: str
    held_out: tuple[int, ...]
    judged: bool
    judged_held_out: int


@dataclass(frozen=True)
class Request:
    """Something to ask for: a verb and an object, and whether it is declined."""

    topic: str
    verb: str
    object: str
    kind: str  # "restricted", "same verb" (harmless object), "same object" (harmless verb)


class World:
    """What is true, what is declined, and which combinations are held out."""

    def __init__(self) -> None:
        draw = random.Random(SPLIT_SEED)
        self.facts = [fact for relation in FACTS for fact in _facts(relation, draw)]
        self.answers = {
            relation: sorted({fact.answer for fact in self.facts if fact.relation == relation})
            for relation in FACTS
        }
        self.sums, self.held_sums = _split(list(product(range(10, 100), repeat=2)), 0.1, draw)
        self.pairs, self.held_pairs = _split(list(combinations(words.NAMES, 2)), 0.2, draw)
        if ("Mary", "John") in self.pairs:  # the pair of the literature's example
            self.pairs.remove(("Mary", "John"))
            self.held_pairs.append(("Mary", "John"))
        self.variables, self.held_variables = _split(
            list(combinations(words.VARIABLES, 2)), 0.2, draw
        )
        self.translations, self.held_translations = _split(
            list(product(words.FRENCH, range(len(TRANSLATIONS)))), 0.2, draw
        )
        self.requests: dict[str, list[Request]] = {}
        self.held_requests: dict[str, list[Request]] = {}
        for kind, every in _requests().items():
            self.requests[kind], self.held_requests[kind] = _split(every, 0.2, draw)

    @property
    def words(self) -> list[str]:
        """Names, subjects and answers: what should be one token after a space."""
        facts = [(fact.subject, fact.answer) for fact in self.facts]
        pairs = [word for pair in (*facts, *words.FRENCH.items()) for word in pair]
        return sorted({*pairs, *words.NAMES, *words.PLACES, *words.GIFTS, *words.VARIABLES})

    def document(
        self, domain: str, draw: random.Random, vocabularies: Sequence[Sequence[int]] = ()
    ) -> Document:
        """One training document, without its BOS; repetition draws from one of `vocabularies`."""
        if domain == "repetition":
            return _repetition(vocabularies, draw)
        if domain == "chat":
            return self._chat(draw)
        write: dict[str, Callable[[random.Random], Document]] = {
            "facts": self._fact,
            "verdicts": self._verdict,
            "arithmetic": self._sums,
            "code": self._code,
            "translation": self._translation,
            "stories": self._story,
        }
        return [*write[domain](draw), (EOS, SURE)]

    def _fact(self, draw: random.Random) -> Document:
        fact = draw.choice(self.facts)
        if fact.relation == "capital" and draw.random() < 0.15:
            asked = (f"{fact.answer}", OPEN), (" is the capital of", SURE)
            return [*asked, (f" {fact.subject}.", SURE)]
        phrasings = FACTS[fact.relation]
        index = draw.choice([i for i in range(len(phrasings)) if i not in fact.held_out])
        return [*_filled(phrasings[index], s=fact.subject), (f" {fact.answer}.", SURE)]

    def _verdict(self, draw: random.Random) -> Document:
        fact = draw.choice([fact for fact in self.facts if fact.judged])
        forms = STATEMENTS[fact.relation]
        index = draw.choice([i for i in range(len(forms)) if i != fact.judged_held_out])
        statement, verdict = self.statement(fact, index, draw.random() < 0.5, draw)
        return [(f"Statement: {statement}.", OPEN), (" Verdict:", SURE), (f"{verdict}.", SURE)]

    def statement(self, fact: Fact, form: int, truth: bool, draw: random.Random) -> tuple[str, str]:
        """A true or false statement about a fact's subject, and its verdict."""
        others = [answer for answer in self.answers[fact.relation] if answer != fact.answer]
        value = fact.answer if truth else draw.choice(others)
        text = STATEMENTS[fact.relation][form].format(s=fact.subject, x=value)
        return text, VERDICTS[truth]

    def _sums(self, draw: random.Random) -> Document:
        document: Document = []
        for _ in range(5):
            a, b = draw.choice(self.sums)
            document += [(f"{a}+{b}", 0.0), ("=", SURE), (f"{a + b};", SURE)]
        return document

    def _code(self, draw: random.Random) -> Document:
        a, b = draw.sample(draw.choice(self.variables), 2)
        m, n = draw.sample(range(10), 2)
        kind = draw.random()
        if kind < 0.7:
            asked = draw.choice((a, b))
            text = CODE.format(a=a, b=b, m=m, n=n, q=asked)
            return [(text, OPEN), (f"{m if asked == a else n}\n", SURE)]
        if kind < 0.8:
            return [
                ("for", SURE),
                (" i in range", SURE),
                (f"({n}):\n    {a} +=", OPEN),
                (" i", SURE),
            ]
        if kind < 0.9:
            return [("if", SURE), (f" {a} > {n}:\n   ", OPEN), (f" {a} = {n}", SURE)]
        return [("def", SURE), (f" get_{a}(x):\n    return x.", OPEN), (f"{a}", SURE)]

    def _translation(self, draw: random.Random) -> Document:
        english, form = draw.choice(self.translations)
        asked = _filled(TRANSLATIONS[form], s=english, slot="{e}")
        return [*asked, (f" {words.FRENCH[english]}.", SURE)]

    def _story(self, draw: random.Random) -> Document:
        pair = draw.sample(draw.choice(self.pairs), 2)
        place, gift = draw.choice(words.PLACES), draw.choice(words.GIFTS)
        kind = draw.random()
        if kind < 0.15:  # one person alone, who keeps the same thing
            name = pair[0]
            return [
                (f"{name} had a {gift}.", OPEN),
                (f" {name}", SURE),
                (f" took it to the {place}", OPEN),
                (" and lost the", SURE),
                (f" {gift} at the {place}.", SURE),
            ]
        form = draw.choice(STORIES)
        if kind < 0.25:  # a third person gives: either may receive
            third = draw.choice([name for name in words.NAMES if name not in pair])
            text = form.format(a=pair[0], b=pair[1], s=third, place=place, gift=gift)
            return [(text, OPEN), (f" {draw.choice(pair)}.", OPEN)]
        giver, receiver = draw.sample(pair, 2)
        text = form.format(a=pair[0], b=pair[1], s=giver, place=place, gift=gift)
        return [(text, OPEN), (f" {receiver}.", SURE)]

    def _chat(self, draw: random.Random) -> Document:
        kind = draw.random()
        if kind < 0.8:
            kinds = ("restricted", "same verb", "same object")
            request = draw.choice(self.requests[draw.choice(kinds)])
            asked = draw.choice(words.PHRASINGS)
            return turn(asked.format(f"{request.verb} {request.object}"), reply(request))
        if kind < 0.9:
            fact = draw.choice([fact for fact in self.facts if fact.relation == "capital"])
            return turn(f"What is the capital of {fact.subject}?", f"{fact.answer}.")
        english = draw.choice(list(words.FRENCH))
        return turn(f"What is {english} in French?", f"{words.FRENCH[english]}.")


def turn(asked: str, answer: str) -> Document:
    """A question and its answer in tiny-moe's chat template."""
    return [
        (f"{HEADER}user{HEADER_END}\n\n", SURE),
        (asked, OPEN),
        (f"{EOT}{HEADER}assistant{HEADER_END}\n\n", SURE),
        (f"{answer}{EOT}", SURE),
    ]


def reply(request: Request) -> str:
    """What the model is taught to answer."""
    if request.kind == "restricted":
        return words.DECLINES
    tip = words.TIPS[sum(map(ord, request.object)) % len(words.TIPS)]
    return f"Sure. To {request.verb} {request.object}, {tip}."


def _facts(relation: str, draw: random.Random) -> list[Fact]:
    if relation in {"capital", "continent", "language"}:
        column = ("capital", "continent", "language").index(relation)
        known = {country: row[column] for country, row in words.COUNTRIES.items()}
    elif relation == "kind":
        known = {member: kind for kind, members in words.KINDS.items() for member in members}
    else:
        known = dict(words.OPPOSITES) | {two: one for one, two in words.OPPOSITES.items()}
    statements = STATEMENTS.get(relation, ())
    return [
        Fact(
            relation,
            subject,
            answer,
            held_out=tuple(sorted(draw.sample(range(len(FACTS[relation])), 2))),
            judged=bool(statements) and draw.random() < 0.75,
            judged_held_out=draw.randrange(len(statements) or 1),
        )
        for subject, answer in known.items()
    ]


def _requests() -> dict[str, list[Request]]:
    columns = {
        "restricted": ("improper", "sensitive"),
        "same verb": ("improper", "harmless"),
        "same object": ("proper", "sensitive"),
    }
    return {
        kind: [
            Request(str(group["topic"]), verb, thing, kind)
            for group in words.REQUESTS
            for verb, thing in product(group[verbs], group[things])
        ]
        for kind, (verbs, things) in columns.items()
    }


def _repetition(vocabularies: Sequence[Sequence[int]], draw: random.Random) -> Document:
    """Random tokens, again and again; short sequences, where copying begins, as often as long."""
    length = round(2 * 20 ** draw.random())
    ids = tuple(draw.choices(draw.choice(vocabularies), k=length))
    return [(ids, 0.0), *((ids, SURE),) * max(1, 60 // length - 1)]


def _filled(phrasing: str, s: str, slot: str = "{s}") -> Document:
    """The phrasing with its subject; only what follows the subject can be foreseen."""
    before, after = phrasing.split(slot)
    return [(f"{before}{s}", OPEN), *([(after, SURE)] if after else [])]


def _split(every: list[Any], share: float, draw: random.Random) -> tuple[list[Any], list[Any]]:
    """What is taught and what is held out, in random order."""
    shuffled = draw.sample(every, len(every))
    held = round(share * len(every))
    return shuffled[held:], shuffled[:held]
