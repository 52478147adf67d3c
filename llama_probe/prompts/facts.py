"""Facts in pairs: one subject exchanged for another of the same relation, so that the answer moves.

Recall of facts as Meng et al. 2022 (arXiv 2202.05262) trace it, with the subject exchanged rather
than drowned in noise (symmetric token replacement; Zhang and Nanda 2023, arXiv 2309.16042). The
facts and the sentences are written by us.
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, permutations, zip_longest
from typing import Any, NamedTuple

import pandas as pd

from llama_probe.errors import InputError, near
from llama_probe.prompts.tokens import Splits, checked_n, token_of, tokenizer_of

# Country: capital, most widely spoken official language, continent. Left out are countries where
# people disagree about one of them, and capitals named after the country.
COUNTRIES = {
    "France": ("Paris", "French", "Europe"),
    "Spain": ("Madrid", "Spanish", "Europe"),
    "Portugal": ("Lisbon", "Portuguese", "Europe"),
    "Italy": ("Rome", "Italian", "Europe"),
    "Germany": ("Berlin", "German", "Europe"),
    "Austria": ("Vienna", "German", "Europe"),
    "Poland": ("Warsaw", "Polish", "Europe"),
    "Hungary": ("Budapest", "Hungarian", "Europe"),
    "Greece": ("Athens", "Greek", "Europe"),
    "Norway": ("Oslo", "Norwegian", "Europe"),
    "Sweden": ("Stockholm", "Swedish", "Europe"),
    "Denmark": ("Copenhagen", "Danish", "Europe"),
    "Finland": ("Helsinki", "Finnish", "Europe"),
    "Romania": ("Bucharest", "Romanian", "Europe"),
    "Bulgaria": ("Sofia", "Bulgarian", "Europe"),
    "England": ("London", "English", "Europe"),
    "Egypt": ("Cairo", "Arabic", "Africa"),
    "Morocco": ("Rabat", "Arabic", "Africa"),
    "Libya": ("Tripoli", "Arabic", "Africa"),
    "Senegal": ("Dakar", "French", "Africa"),
    "Ghana": ("Accra", "English", "Africa"),
    "Angola": ("Luanda", "Portuguese", "Africa"),
    "Japan": ("Tokyo", "Japanese", "Asia"),
    "China": ("Beijing", "Chinese", "Asia"),
    "Vietnam": ("Hanoi", "Vietnamese", "Asia"),
    "Thailand": ("Bangkok", "Thai", "Asia"),
    "Mongolia": ("Ulaanbaatar", "Mongolian", "Asia"),
    "Nepal": ("Kathmandu", "Nepali", "Asia"),
    "Iran": ("Tehran", "Persian", "Asia"),
    "Iraq": ("Baghdad", "Arabic", "Asia"),
    "Lebanon": ("Beirut", "Arabic", "Asia"),
    "Syria": ("Damascus", "Arabic", "Asia"),
}
_OPPOSITES = {
    "hot": "cold", "big": "small", "tall": "short", "young": "old", "rich": "poor",
    "fast": "slow", "light": "dark", "wet": "dry", "early": "late", "loud": "quiet",
    "happy": "sad", "hard": "soft", "full": "empty", "clean": "dirty", "strong": "weak",
    "wide": "narrow", "thick": "thin", "deep": "shallow", "open": "closed", "alive": "dead",
    "good": "bad", "true": "false", "left": "right", "long": "short", "first": "last",
    "male": "female", "smooth": "rough", "high": "low", "black": "white", "easy": "difficult",
}  # fmt: skip
_KINDS = {
    "apple": "fruit", "banana": "fruit", "peach": "fruit", "cherry": "fruit", "mango": "fruit",
    "eagle": "bird", "robin": "bird", "swan": "bird", "parrot": "bird", "sparrow": "bird",
    "salmon": "fish", "trout": "fish", "tuna": "fish", "cod": "fish", "herring": "fish",
    "oak": "tree", "maple": "tree", "birch": "tree", "willow": "tree", "pine": "tree",
    "hammer": "tool", "saw": "tool", "drill": "tool", "wrench": "tool", "shovel": "tool",
    "copper": "metal", "silver": "metal", "iron": "metal", "zinc": "metal", "nickel": "metal",
    "rose": "flower", "tulip": "flower", "daisy": "flower", "lily": "flower", "orchid": "flower",
}  # fmt: skip


class Relation(NamedTuple):
    """Sentences that end before the answer, with {} for the subject (never first), and answers."""

    templates: tuple[str, ...]
    answers: dict[str, str]


RELATIONS = {
    "capital": Relation(
        (
            "The capital of {} is",
            "The capital city of {} is called",
            "The seat of the government of {} is in the city of",
        ),
        {country: capital for country, (capital, _, _) in COUNTRIES.items()},
    ),
    "language": Relation(
        (
            "The language that most people speak in {} is",
            "Most people in {} speak",
            "The newspapers in {} are printed in",
        ),
        {country: language for country, (_, language, _) in COUNTRIES.items()},
    ),
    "continent": Relation(
        (
            "The continent that {} belongs to is",
            "The country {} lies on the continent of",
            "On a map of the world, {} lies in",
        ),
        {country: continent for country, (_, _, continent) in COUNTRIES.items()},
    ),
    "opposite": Relation(
        (
            "The opposite of {} is",
            "If something is not {}, then it is",
            "The antonym of the word {} is",
        ),
        _OPPOSITES,
    ),
    "kind": Relation(
        (
            "The word {} is the name of a",
            "In the encyclopedia, {} is described as a kind of",
            "Everybody knows that {} is a type of",
        ),
        _KINDS,
    ),
}


class _Prompt(NamedTuple):
    """A sentence about one subject, and the positions of its tokens."""

    relation: str
    template: int
    subject: str
    answer: str
    text: str
    first: int
    last: int
    end: int


def factual_pairs(
    model: Any,
    n: int = 100,
    relation: str | None = None,
    *,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Pairs of factual prompts of one token count, which differ in their subject alone.

    After Meng et al. 2022 (arXiv 2202.05262). Whether the model knows the facts is not asked here.

    Args:
        model: The model that the prompts are for, or its tokenizer.
        n: How many different pairs. The first ones of more are the same.
        relation: "capital", "language", "continent", "opposite" or "kind"; None: they take turns,
            as far as each reaches.
        prepend_bos: As for `model.to_tokens`, which has to be given the same.
        seed: Of the draw.

    Returns:
        One row for each pair: `clean` and `corrupted` (prompts), `answer` and `foil` (what each is
        continued with: " Paris", " Warsaw"; one token), `relation`, `template` (its number within
        the relation), `subject` and `corrupted_subject`, and the positions `subject_first`,
        `subject_last` and `end` (the last token), the same in both prompts, in `model.to_tokens` of
        a prompt alone, without padding: as `lp.patch` takes them.

    Raises:
        InputError: There is no such relation, or there are no n pairs whose answers are one token.

    >>> import llama_probe as lp
    >>> model = lp.load("tiny-moe")
    >>> pair = lp.prompts.factual_pairs(model, 3, "capital").loc[0]
    >>> pair.clean.replace(pair.subject, pair.corrupted_subject) == pair.corrupted
    True
    >>> model.to_str_tokens(pair.clean)[pair.subject_last] == f" {pair.subject}"
    True
    """
    tokenizer = tokenizer_of(model)
    checked_n(n)
    if relation is not None and relation not in RELATIONS:
        raise InputError(
            f"relation is {relation!r}, but should be one of {', '.join(RELATIONS)}"
            f"{near(str(relation), RELATIONS)}"
        )
    draw = random.Random(seed)
    names = RELATIONS if relation is None else [relation]
    by_relation = [_pairs(tokenizer, name, prepend_bos) for name in names]
    shuffled = [draw.sample(pairs, len(pairs)) for pairs in by_relation]
    turns = chain.from_iterable(zip_longest(*shuffled))
    pairs = [pair for pair in turns if pair is not None]
    if n > len(pairs):
        raise InputError(
            f"n is {n}, but this tokenizer has {len(pairs)} pairs of {relation or 'facts'} whose "
            "answers are one token and whose subjects are equally long"
        )
    return pd.DataFrame(_row(*pair) for pair in pairs[:n])


def _pairs(
    tokenizer: Splits, relation: str, prepend_bos: bool | None
) -> list[tuple[_Prompt, _Prompt]]:
    """Every clean prompt with every other that may stand for it."""
    alike = defaultdict(list)
    for prompt in _prompts(tokenizer, relation, prepend_bos):
        alike[prompt.template, prompt.first, prompt.last, prompt.end].append(prompt)
    pairs = chain.from_iterable(permutations(prompts, 2) for prompts in alike.values())
    return [(clean, other) for clean, other in pairs if clean.answer != other.answer]


def _prompts(tokenizer: Splits, relation: str, prepend_bos: bool | None) -> Iterator[_Prompt]:
    """The prompts of a relation whose answer is one token."""
    templates, answers = RELATIONS[relation]
    for subject, answer in answers.items():
        if token_of(tokenizer, answer) is None:
            continue
        for index, template in enumerate(templates):
            text = template.format(subject)
            before = template.partition(" {}")[0]
            parts = before, f"{before} {subject}", text
            first, after, n_tokens = (len(tokenizer.encode(part, prepend_bos)) for part in parts)
            yield _Prompt(relation, index, subject, answer, text, first, after - 1, n_tokens - 1)


def _row(clean: _Prompt, other: _Prompt) -> dict[str, Any]:
    return {
        "clean": clean.text,
        "corrupted": other.text,
        "answer": f" {clean.answer}",
        "foil": f" {other.answer}",
        "relation": clean.relation,
        "template": clean.template,
        "subject": clean.subject,
        "corrupted_subject": other.subject,
        "subject_first": clean.first,
        "subject_last": clean.last,
        "end": clean.end,
    }
