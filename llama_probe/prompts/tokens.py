"""What a set of prompts has to ask of a tokenizer."""

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from llama_probe.errors import InputError


@runtime_checkable
class Splits(Protocol):
    """What is asked of a tokenizer; `llama_probe.tokenizer.Tokenizer` has it."""

    def encode(self, text: str, prepend_bos: bool | None = None) -> list[int]:
        """Token ids of a text."""
        ...

    def str_tokens(self, ids: Any) -> list[str]:
        """Each token as text of its own, with its leading space."""
        ...


def tokenizer_of(model: Any) -> Splits:
    """The tokenizer of a model; a tokenizer stays what it is.

    Raises:
        InputError: The model has none, or this is neither a model nor a tokenizer of ours.
    """
    tokenizer = getattr(model, "tokenizer", model)
    if tokenizer is None:
        raise InputError(
            "this model has no tokenizer, so that nobody can say which words are one token: "
            "set model.tokenizer"
        )
    if not isinstance(tokenizer, Splits):
        raise InputError(
            f"model is of type {type(model).__name__}, but should be a model or a Tokenizer of "
            "this package (Tokenizer.from_transformers makes one)"
        )
    return tokenizer


def token_of(tokenizer: Splits, word: str) -> int | None:
    """The id of a word with a space before it, or None where that is not one token.

    >>> import llama_probe as lp
    >>> tokenizer = tokenizer_of(lp.load("tiny-moe"))
    >>> tokenizer.str_tokens(token_of(tokenizer, "Mary")), token_of(tokenizer, "Maryland")
    ([' Mary'], None)
    """
    text = f" {word}"
    ids = tokenizer.encode(text, prepend_bos=False)
    # SentencePiece puts a space of its own before a text that starts with one.
    if len(ids) == 2 and tokenizer.str_tokens(ids)[1] == text:
        del ids[0]
    return ids[0] if len(ids) == 1 else None


def checked_n(n: int) -> None:
    """See that a number of prompts is one.

    Raises:
        InputError: It is not a whole number from 1.
    """
    if not isinstance(n, int) or n < 1:
        raise InputError(f"n is {n!r}, but should be a whole number of prompts, at least 1")


def listed(words: Iterable[str]) -> str:
    """Words in quotes for a message: at most eight of them."""
    words = list(words)
    more = f" and {len(words) - 8} more" if len(words) > 8 else ""
    return ", ".join(map(repr, words[:8])) + more
