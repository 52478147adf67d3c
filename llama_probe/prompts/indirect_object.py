"""Who receives the gift? Prompts for the task of the indirect object, and their corruptions.

Wang et al. 2022 (arXiv 2211.00593): "When Mary and John went to the store, John gave a drink to"
is continued with the name that stands there once, " Mary" (the indirect object, IO), not with the
one that stands there twice (the subject, S1 and S2). The sentences and the words are our own.

Names, places and gifts are one token each, so that all prompts of a template have one length and
a corruption, which only exchanges names, keeps it (symmetric token replacement; Zhang and Nanda
2023, arXiv 2309.16042).
"""

import random
from collections.abc import Iterator, Sequence
from itertools import product
from string import Formatter
from typing import Any, NamedTuple

import pandas as pd

from llama_probe.errors import InputError
from llama_probe.prompts.tokens import Splits, checked_n, listed, token_of, tokenizer_of

# {a} and {b} are the two people, {giver} is one of them. A name never starts the text, where it
# would be another token. How a model scores may reword TRAIN, never TEST.
TRAIN = (
    "As {a} and {b} waited outside the {place}, {giver} gave a {gift} to",
    "Last Sunday {a} and {b} visited the {place}, where {giver} bought a {gift} for",
    "Once {a} and {b} had reached the {place}, {giver} handed a {gift} to",
    "Because {a} and {b} were bored at the {place}, {giver} showed a {gift} to",
    "Early that morning {a} and {b} walked to the {place}. On the way {giver} lent a {gift} to",
    "Before {a} and {b} left the {place}, {giver} gave a {gift} to",
    "It was raining, so {a} and {b} stayed at the {place}. Later {giver} offered a {gift} to",
    "Everyone saw {a} and {b} at the {place} when {giver} presented a {gift} to",
    "At the {place}, {a} and {b} talked for an hour, and then {giver} gave a {gift} to",
    "Our neighbours {a} and {b} run the {place}. Yesterday {giver} brought a {gift} to",
    "A photo shows {a} and {b} near the {place}: {giver} is giving a {gift} to",
    "There was a {gift} at the {place}. Both {a} and {b} wanted it, but {giver} gave it to",
)
TEST = (
    "While {a} and {b} sat at the {place}, {giver} gave a {gift} to",
    "Yesterday {a} and {b} met outside the {place}, and {giver} handed a {gift} to",
    "On Friday {a} and {b} drove to the {place}. There {giver} bought a {gift} for",
    "As soon as {a} and {b} entered the {place}, {giver} offered a {gift} to",
    "The sun was setting when {a} and {b} reached the {place}. Smiling, {giver} passed a {gift} to",
    "Back at the {place}, {a} and {b} opened their bags, and {giver} gave a {gift} to",
    "All summer {a} and {b} worked at the {place}. In the end {giver} sent a {gift} to",
    "To celebrate, {a} and {b} went to the {place}, where {giver} presented a {gift} to",
    "Two friends, {a} and {b}, were seen at the {place}. Soon {giver} lent a {gift} to",
    "During the long trip to the {place}, {a} and {b} made up, and {giver} gave a {gift} to",
)
TEMPLATES: tuple[str, ...] = TRAIN + TEST

# Every other name belongs to the test set, before any tokenizer is asked.
NAMES = (
    "Mary", "John", "Tom", "Anna", "Peter", "Lucy", "James", "Emma", "David", "Sarah", "Paul",
    "Laura", "Mark", "Alice", "Simon", "Julia", "Daniel", "Kate", "Adam", "Helen", "Martin", "Nora",
    "Robert", "Claire", "George", "Diana", "Oliver", "Rachel", "Henry", "Sophie", "Frank", "Emily",
    "Jack", "Irene", "William", "Anne", "Michael", "Jane", "Thomas", "Susan", "Charles", "Karen",
    "Edward", "Linda", "Richard", "Lisa", "Joseph", "Maria", "Andrew", "Elizabeth", "Stephen",
    "Margaret", "Matthew", "Ruth", "Philip", "Jennifer", "Samuel", "Jessica", "Kevin", "Nancy",
    "Brian", "Amy", "Eric", "Rebecca", "Jason", "Michelle", "Ryan", "Barbara", "Luke", "Carol",
    "Harry", "Ellen", "Arthur", "Sandra", "Walter", "Maya", "Albert", "Sophia", "Patrick",
    "Victoria", "Alex", "Sara", "Max", "Eva", "Leo", "Julie", "Ben", "Katie", "Sam", "Rose",
)  # fmt: skip
PLACES = (
    "store", "park", "garden", "market", "beach", "station", "library", "office", "farm", "zoo",
    "school", "museum", "hospital", "restaurant", "hotel", "church", "theater", "lake", "castle",
    "airport", "bank", "bakery", "harbour", "village",
)  # fmt: skip
GIFTS = (
    "drink", "ring", "ball", "kite", "cake", "basket", "card", "coin", "scarf", "lamp", "ticket",
    "flute", "toy", "pear", "pencil", "necklace", "book", "letter", "flower", "hat", "key", "map",
    "watch", "bottle", "pen", "picture", "cup", "bag", "camera", "sandwich",
)  # fmt: skip

_PEOPLE = ["a", "b", "giver"]
ORDERS = ("ABBA", "BABA")
CORRUPTIONS = ("swap", "new_name", "new_names")
# Which templates of ours a split has; of other words every other one.
_OURS = {"all": slice(None), "train": slice(len(TRAIN)), "test": slice(len(TRAIN), None)}
_EVERY = {"all": slice(None), "train": slice(0, None, 2), "test": slice(1, None, 2)}
# Of fewer names a result would be about these names.
_LEAST_NAMES = 10


class _Words(NamedTuple):
    """What stories are told with: each word is one token, whose id it comes with."""

    names: dict[str, int]
    places: dict[str, int]
    gifts: dict[str, int]


class _Story(NamedTuple):
    """The parts of a clean prompt, and three further people for its corruptions."""

    number: int
    template: str
    order: str
    receiver: str
    giver: str
    others: list[str]
    place: str
    gift: str

    def clean(self) -> str:
        return self._told(self.receiver, self.giver, self.giver)

    def corrupted(self, corruption: str) -> str:
        match corruption:
            case "swap":
                return self._told(self.receiver, self.giver, self.receiver)
            case "new_name":
                return self._told(self.receiver, self.giver, self.others[0])
            case _:
                return self._told(*self.others)

    def _told(self, receiver: str, other: str, giver: str) -> str:
        people = (receiver, other) if self.order == "ABBA" else (other, receiver)
        return self.template.format(
            a=people[0], b=people[1], giver=giver, place=self.place, gift=self.gift
        )


def indirect_object(
    model: Any,
    n: int = 100,
    *,
    order: str = "both",
    corruption: str = "swap",
    split: str = "all",
    templates: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    places: Sequence[str] | None = None,
    gifts: Sequence[str] | None = None,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Different prompts for the task of the indirect object, each with a corrupted twin.

    Wang et al. 2022 (arXiv 2211.00593), in sentences of our own.

    Args:
        model: The model that the prompts are for, or its tokenizer.
        n: How many; templates and orders take turns. The first ones of more are the same.
        order: "ABBA" (the receiver is named first), "BABA" (second), or "both".
        corruption: What is exchanged: "swap", the giver by the other person, so that the answer
            becomes the foil; "new_name", the giver by a third person, so that both fit;
            "new_names", all people by three others. The clean prompts are the same for all.
        split: "train" and "test" have neither a template nor a name in common; "all" is both.
        templates: Sentences to use in place of ours, with {a} and {b} (the two people), {giver},
            {place} and {gift}; every other one belongs to the test set.
        names: People to use; every other one belongs to the test set. Like places and gifts they
            are one token each, with a space before.
        places: Places to use, after "the".
        gifts: Gifts to use, after "a".
        prepend_bos: As for `model.to_tokens`, which has to be given the same.
        seed: Of the draw.

    Returns:
        One row for each pair: `clean` and `corrupted` (prompts of one token count), `answer` and
        `foil` of the clean one (" Mary", " John"), `order`, `template` (its number), `corruption`,
        and the positions `IO`, `S1`, `S2` and `end` (the last token) in `model.to_tokens(clean)`
        of that prompt alone, without padding: as `lp.patch` takes them.

    Raises:
        InputError: An argument is not one of those named, a template of yours lacks a part, a word
            of yours is not one token, too few of ours are, or there are no n different prompts.

    >>> import llama_probe as lp
    >>> model = lp.load("tiny-moe")
    >>> pairs = lp.prompts.indirect_object(model, 40)
    >>> pair = pairs.loc[0]
    >>> pair.clean.replace(pair.foil + " gave", pair.answer + " gave") == pair.corrupted
    True
    >>> tokens = model.to_str_tokens(pair.clean)
    >>> tokens[pair.IO] == pair.answer, tokens[pair.S1] == tokens[pair.S2] == pair.foil
    (True, True)
    """
    tokenizer = tokenizer_of(model)
    checked_n(n)
    _one_of("order", order, ("both", *ORDERS))
    _one_of("corruption", corruption, CORRUPTIONS)
    _one_of("split", split, tuple(_EVERY))
    words = _Words(
        _usable(tokenizer, "names", names, NAMES, split, least=_LEAST_NAMES),
        _usable(tokenizer, "places", places, PLACES),
        _usable(tokenizer, "gifts", gifts, GIFTS),
    )
    cells = list(product(_templates(templates, split), ORDERS if order == "both" else (order,)))
    return pd.DataFrame(
        _row(tokenizer, story, corruption, words.names, prepend_bos)
        for story in _draw(n, cells, words, random.Random(seed))
    )


def _one_of(argument: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{argument} is {value!r}, but should be one of {', '.join(allowed)}")


def _templates(given: Sequence[str] | None, split: str) -> list[tuple[int, str]]:
    """The numbered templates of a split; the caller's are looked at."""
    if given is None:
        return list(enumerate(TEMPLATES))[_OURS[split]]
    _refuse_text("templates", given)
    for template in given:
        _check_template(template)
    chosen = list(enumerate(dict.fromkeys(given)))[_EVERY[split]]
    if not chosen:
        raise InputError(f"templates has none for the split {split!r}: it takes every other one")
    return chosen


def _check_template(template: str) -> None:
    try:
        slots = [slot for _, slot, _, _ in Formatter().parse(template) if slot is not None]
    except ValueError as error:
        raise InputError(f"the template {template!r} is malformed: {error}") from None
    people = [slot for slot in slots if slot in _PEOPLE]
    if people != _PEOPLE or sorted(slots) != sorted([*_PEOPLE, "place", "gift"]):
        raise InputError(
            f"the template {template!r} has the parts {', '.join(slots) or 'none'}, but should "
            "have {a}, {b} and {giver} in this order, {place} and {gift}, each once"
        )
    if any(f" {{{slot}}}" not in template for slot in slots):
        raise InputError(
            f"in the template {template!r} a part has no space before it, but should: "
            "elsewhere a word is another token"
        )


def _refuse_text(kind: str, given: Sequence[str] | None) -> None:
    """A text is a sequence of texts as well: its letters."""
    if isinstance(given, str):
        raise InputError(f"{kind} is the text {given!r}, but should be a list of texts")


def _usable(
    tokenizer: Splits,
    kind: str,
    given: Sequence[str] | None,
    ours: Sequence[str],
    split: str = "all",
    least: int = 1,
) -> dict[str, int]:
    """The words of a split that are one token; of the caller's words all have to be."""
    _refuse_text(kind, given)
    words = list(dict.fromkeys(ours if given is None else given))[_EVERY[split]]
    ids = {word: token_of(tokenizer, word) for word in words}
    usable = {word: token for word, token in ids.items() if token is not None}
    missing = [word for word in words if word not in usable]
    if given is not None and missing:
        raise InputError(
            f"{kind} should be one token each, with a space before, but not so {listed(missing)}"
        )
    if len(usable) < least:
        lacking = f"; no single token are {listed(missing)}" if missing else ""
        raise InputError(
            f"of the {kind} (split {split!r}) {len(usable)} can be used, but it takes at least "
            f"{least}{lacking}: pass {kind}= with words that are one token of this tokenizer"
        )
    return usable


def _draw(
    n: int, cells: list[tuple[tuple[int, str], str]], words: _Words, draw: random.Random
) -> Iterator[_Story]:
    """Different stories; templates and orders take turns."""
    pairs = len(words.names) * (len(words.names) - 1)
    most = len(cells) * pairs * len(words.places) * len(words.gifts)
    if n > most:
        raise InputError(f"n is {n}, but there are {most} different prompts of these words")
    names, places, gifts = map(list, words)
    told = set()
    while len(told) < n:
        (number, template), order = cells[len(told) % len(cells)]
        receiver, giver, *others = draw.sample(names, 5)
        place, gift = draw.choice(places), draw.choice(gifts)
        story = _Story(number, template, order, receiver, giver, others, place, gift)
        if story.clean() not in told:
            told.add(story.clean())
            yield story


def _row(
    tokenizer: Splits,
    story: _Story,
    corruption: str,
    names: dict[str, int],
    prepend_bos: bool | None,
) -> dict[str, Any]:
    clean, corrupted = story.clean(), story.corrupted(corruption)
    tokens = tokenizer.encode(clean, prepend_bos)
    receiver = [pos for pos, token in enumerate(tokens) if token == names[story.receiver]]
    giver = [pos for pos, token in enumerate(tokens) if token == names[story.giver]]
    length = len(tokenizer.encode(corrupted, prepend_bos))
    if (len(receiver), len(giver), length) != (1, 2, len(tokens)):
        raise InputError(
            f"in {clean!r} the receiver should be one token, once, and the giver one, twice, and "
            f"{corrupted!r} should have as many tokens, but this tokenizer splits them otherwise, "
            "or a name is also another word of the prompt"
        )
    return {
        "clean": clean,
        "corrupted": corrupted,
        "answer": f" {story.receiver}",
        "foil": f" {story.giver}",
        "order": story.order,
        "template": story.number,
        "corruption": corruption,
        "IO": receiver[0],
        "S1": giver[0],
        "S2": giver[1],
        "end": len(tokens) - 1,
    }
