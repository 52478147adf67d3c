"""Prompts of every kind as one table, and as the tokens that are really fed.

1. Texts, conversations, tables and files become a frame with one row a prompt.
2. A chat template, a system message and answers are put around them.
3. Each prompt becomes token ids; where its instruction, its template and its answer end is kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from llama_probe.errors import InputError, near
from llama_probe.model.llama import Llama

_READERS = {".csv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
# Two instructions that end in different tokens: what prompts have in common after them is template.
_SENTINELS = ("x", "7")
_OURS = ("n_tokens", "fed")


@dataclass(frozen=True)
class Encoded:
    """One prompt as token ids.

    Attributes:
        ids: All of them, an answer included.
        instruction: Where the instruction ends: the position after its last token.
        prompt: Where the prompt ends and the answer begins.
    """

    ids: list[int]
    instruction: int
    prompt: int


def as_frame(prompts: Any, text: str = "text") -> pd.DataFrame:
    """Prompts as a frame with one row each: a column `text`, and what else came with them.

    Args:
        prompts: A text, texts, conversations (lists of messages), a DataFrame, dictionaries, or the
            path of a CSV, JSONL or Parquet file.
        text: The column that has the prompts, in tables.

    Raises:
        InputError: There are no prompts, they are of several kinds, or a table lacks the column.
    """
    if isinstance(prompts, pd.DataFrame):
        return _table(prompts, text, "the frame")
    if isinstance(prompts, Path) or (
        isinstance(prompts, str) and Path(prompts).suffix in _READERS and "\n" not in prompts
    ):
        return _table(_file(Path(prompts)), text, str(prompts))
    if isinstance(prompts, str):
        return pd.DataFrame({"text": [prompts]})
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        raise InputError(
            f"prompts are a {type(prompts).__name__}, but should be texts, conversations, a frame, "
            "dictionaries, or the path of a CSV, JSONL or Parquet file"
        )
    rows = list(prompts)
    if not rows:
        raise InputError("there are no prompts: the list is empty")
    if all(isinstance(row, Mapping) for row in rows):
        if all({"role", "content"} <= set(row) for row in rows):
            raise InputError("a conversation is a list of messages: put it into a list of prompts")
        return _table(pd.DataFrame(rows), text, "the dictionaries")
    if all(isinstance(row, str) for row in rows) or all(map(_is_chat, rows)):
        return pd.DataFrame({"text": pd.Series(rows, dtype=object)})
    kinds = sorted({type(row).__name__ for row in rows})
    raise InputError(
        "prompts should be all texts, all dictionaries, or all conversations (lists of messages "
        f"with role and content), but these are of type {', '.join(kinds)}"
    )


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(isinstance(part, Mapping) and {"role", "content"} <= set(part) for part in prompt)
    )


def _file(path: Path) -> pd.DataFrame:
    kind = _READERS.get(path.suffix)
    if kind is None:
        raise InputError(f"{path} should be a .csv, .jsonl or .parquet file")
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    try:
        if kind == "csv":
            return pd.read_csv(path, encoding="utf-8-sig")
        return pd.read_json(path, lines=True) if kind == "jsonl" else pd.read_parquet(path)
    except (ValueError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as {kind}: {error}") from error


def _table(frame: pd.DataFrame, text: str, where: str) -> pd.DataFrame:
    columns = list(map(str, frame.columns))
    if text not in columns:
        raise InputError(
            f"{where} has no column {text!r}{near(text, columns)}; its columns are "
            f"{', '.join(columns)}, and text= says which one has the prompts"
        )
    if frame.empty:
        raise InputError(f"there are no prompts: {where} has no rows")
    frame = frame.set_axis(columns, axis=1).rename(columns={text: "text"}).reset_index(drop=True)
    if frame.columns.duplicated().any():
        raise InputError(f"{where} has the column 'text' beside {text!r}: rename one of them")
    missing = np.flatnonzero(frame["text"].isna())
    if len(missing):
        raise InputError(f"row {missing[0]} of {where} has no prompt in the column {text!r}")
    return frame


def encode(
    model: Llama,
    frame: pd.DataFrame,
    *,
    template: str | None = None,
    system: str | None = None,
    prepend_bos: bool | None = None,
    response: str | None = None,
) -> list[Encoded]:
    """The tokens of each prompt of a frame.

    Args:
        model: Its tokenizer and chat template are used.
        frame: As `as_frame` gives it; texts, or conversations.
        template: "chat" to wrap each text as a user's message; conversations always are.
        system: A system message to put first.
        prepend_bos: Whether plain texts begin with BOS; None: the checkpoint's own rule.
        response: The column with the answers to add.

    Raises:
        InputError: An argument cannot be used, or a prompt is empty or exceeds the context.
    """
    if template not in (None, "chat"):
        raise InputError(f"template is {template!r}, but should be 'chat' or None")
    chats = [isinstance(text, Sequence) and not isinstance(text, str) for text in frame["text"]]
    if any(chats) and not all(chats):
        raise InputError("prompts are all texts or all conversations, not a mixture")
    if system is not None and template is None and not all(chats):
        raise InputError("system goes with template='chat'")
    if response is not None and response not in frame:
        raise InputError(
            f"there is no column {response!r} with answers{near(response, frame.columns)}"
        )
    answers = [None] * len(frame) if response is None else frame[response].tolist()
    encoded = []
    for index, (text, answer) in enumerate(zip(frame["text"], answers, strict=True)):
        try:
            one = _encoded(model, text, template, system, prepend_bos)
        except InputError as error:
            raise InputError(f"prompt {index}: {error}") from error
        encoded.append(one if answer is None else _answered(model, one, answer, index))
        _check_length(model, encoded[-1], index)
    return encoded


def _encoded(
    model: Llama, text: Any, template: str | None, system: str | None, prepend_bos: bool | None
) -> Encoded:
    tokenizer = model._tokenizer()
    if isinstance(text, str) and template is None:
        if not text:
            raise InputError("it is empty")
        ids = tokenizer.encode(text, prepend_bos)
        return Encoded(ids, len(ids), len(ids))
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    ids = tokenizer.encode_chat(messages)
    return Encoded(ids, len(ids) - _template_tail(tokenizer, messages, ids), len(ids))


def _template_tail(tokenizer: Any, messages: Sequence[Any], ids: list[int]) -> int:
    """How many tokens of the template follow the last thing that the user says."""
    said = [index for index, part in enumerate(messages) if part["role"] == "user"]
    if not said:
        return 0
    tails = []
    for sentinel in _SENTINELS:
        other = [dict(part) for part in messages]
        other[said[-1]]["content"] = sentinel
        tails.append(_common_end(ids, tokenizer.encode_chat(other)))
    return min(*tails, len(ids) - 1)


def _common_end(a: Sequence[int], b: Sequence[int]) -> int:
    same = 0
    for one, other in zip(reversed(a), reversed(b), strict=False):
        if one != other:
            break
        same += 1
    return same


def _answered(model: Llama, prompt: Encoded, answer: Any, index: int) -> Encoded:
    if not isinstance(answer, str) or not answer:
        raise InputError(f"prompt {index} has no answer: give a text, or leave the prompt out")
    ids = model._tokenizer().encode(answer, prepend_bos=False, parse_special=False)
    return continued(prompt, ids)


def continued(prompt: Encoded, answer: Sequence[int]) -> Encoded:
    """A prompt with the tokens of an answer after it."""
    return Encoded([*prompt.ids, *answer], prompt.instruction, prompt.prompt)


def _check_length(model: Llama, one: Encoded, index: int) -> None:
    if len(one.ids) > model.cfg.n_ctx:
        raise InputError(
            f"prompt {index} has {len(one.ids)} tokens, but the context is {model.cfg.n_ctx}: "
            "shorten it or leave it out"
        )


def of_tokens(model: Llama, tokens: Tensor) -> tuple[pd.DataFrame, list[Encoded]]:
    """Prompts that are given as tokens [prompt pos]; padding at the start of rows is left out."""
    rows, mask = model.tokens_and_mask(tokens)
    ids = [row[real.bool()].tolist() for row, real in zip(rows, mask, strict=True)]
    texts = ["".join(model.to_str_tokens(row)) for row in ids]
    encoded = [Encoded(row, len(row), len(row)) for row in ids]
    for index, one in enumerate(encoded):
        _check_length(model, one, index)
    return pd.DataFrame({"text": texts}), encoded


def described(model: Llama, frame: pd.DataFrame, encoded: Sequence[Encoded]) -> pd.DataFrame:
    """The frame of prompts as results carry it: `text`, `n_tokens`, `fed`, and the other columns.

    Conversations stand in it as the last thing that the user says, and whole in `messages`.

    Raises:
        InputError: The prompts have a column of one of these names.
    """
    for name in _OURS:
        if name in frame:
            raise InputError(f"the prompts have a column {name!r}, which results use: rename it")
    texts = frame["text"].tolist()
    columns: dict[str, Any] = {
        "text": [text if isinstance(text, str) else _last_said(text) for text in texts],
        "n_tokens": [len(one.ids) for one in encoded],
        "fed": ["".join(model.to_str_tokens(one.ids)) for one in encoded],
    }
    if not isinstance(texts[0], str):
        columns["messages"] = [[dict(part) for part in text] for text in texts]
    return pd.DataFrame(columns).join(frame.drop(columns="text"))


def _last_said(messages: Sequence[Mapping[str, Any]]) -> str:
    said = [part["content"] for part in messages if part["role"] == "user"]
    return str(said[-1] if said else messages[-1]["content"])
