"""Putting requests to a model under an edit: its logits at the next token, and its answers.

For the next token, edits act at every position (`lp.ablate`, `lp.add`, `lp.affine`, without
`positions`), so what all requests begin with, a system message above all, is read once for them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from llama_probe.capturing.plan import batches, fitting_tokens
from llama_probe.capturing.prompts import Encoded, as_frame, encode
from llama_probe.errors import InputError
from llama_probe.model.cache import KVCache
from llama_probe.model.llama import Llama

_WORTH_SHARING = 4  # tokens
_SHOWN = 24  # characters of an answer that is redacted


@dataclass(frozen=True)
class Asked:
    """Requests, and the tokens that are fed for them.

    Attributes:
        prompts: Texts or conversations.
        encoded: The tokens, and where the instruction ends.
        template: "chat", or None for texts that are fed as they are.
        system: A system message that is put first.
    """

    prompts: list[Any]
    encoded: list[Encoded]
    template: str | None
    system: str | None

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Iterable[int]) -> "Asked":
        """Those of some rows."""
        rows = list(rows)
        prompts, encoded = ([whole[i] for i in rows] for whole in (self.prompts, self.encoded))
        return replace(self, prompts=prompts, encoded=encoded)

    @property
    def texts(self) -> list[str]:
        """What is asked, as text: of a conversation, what was said last."""
        return [one if isinstance(one, str) else one[-1]["content"] for one in self.prompts]


def ask(
    model: Llama, prompts: Any, *, template: str | None = "chat", system: str | None = None
) -> Asked:
    """Make requests ready to be put to a model.

    Args:
        model: Whose tokenizer and template are used.
        prompts: What `lp.capture` takes: texts, a frame with a column `text`, a file, …
        template: "chat", or None to feed the texts as they are.
        system: A system message to put first.

    Raises:
        InputError: A prompt cannot be used.
    """
    frame = as_frame(prompts)
    encoded = encode(model, frame, template=template, system=system)
    return Asked(frame["text"].tolist(), encoded, template, system)


@torch.no_grad()
def next_logits(
    model: Llama, asked: Asked, edit: Iterable[Any] = ()
) -> Float[Tensor, "prompt d_vocab"]:
    """The logits at the token that follows each request, in the order of the requests.

    Args:
        model: The model.
        asked: Non-empty.
        edit: Hooks or edits that act at every position.

    Raises:
        InputError: There are no requests, or an edit names positions.
    """
    rows = [one.ids for one in asked.encoded]
    shared = _shared(rows)
    edit = _everywhere(edit)
    found: dict[int, Tensor] = {}
    with model.hooks(edit):
        start = None
        if shared:
            start = KVCache(model.cfg.n_layers)
            tokens = torch.tensor([rows[0][:shared]])
            # Said, since a first token that is also the pad token would pass for padding.
            model(tokens, attention_mask=tokens >= 0, kv_cache=start, logits_at=-1)
        for part in batches([len(row) - shared for row in rows], fitting_tokens(model, 0)):
            tokens, real, last = _right_padded([rows[i][shared:] for i in part])
            cache = start.repeated(len(part)) if start is not None else None
            logits = model(tokens, attention_mask=real, kv_cache=cache, logits_at=last)
            found |= zip(part, logits[:, 0].cpu(), strict=True)
    return torch.stack([found[i] for i in range(len(rows))])


def answers(
    model: Llama,
    asked: Asked,
    edit: Iterable[Any] = (),
    *,
    max_new_tokens: int = 24,
    progress: bool = False,
) -> list[str]:
    """What the model answers, greedily, as text; see `answer_tokens`."""
    rows = answer_tokens(model, asked, edit, max_new_tokens=max_new_tokens, progress=progress)
    return as_text(model, rows)


def as_text(model: Llama, rows: Sequence[Tensor]) -> list[str]:
    """Answers as text, special tokens left out."""
    return [model._tokenizer().decode(row.tolist(), skip_special=True) for row in rows]


def redacted(answer: str) -> str:
    """How an answer begins, and how much of it is not shown.

    >>> redacted("Sure. Take a walnut, and then …")
    'Sure. Take a walnut, and… (redacted: 7 characters)'
    """
    hidden = len(answer) - _SHOWN
    return answer if hidden <= 0 else f"{answer[:_SHOWN]}… (redacted: {hidden} characters)"


def answer_tokens(
    model: Llama,
    asked: Asked,
    edit: Iterable[Any] = (),
    *,
    max_new_tokens: int = 24,
    progress: bool = False,
) -> list[Int[Tensor, " new"]]:
    """The tokens that the model answers, greedily, in the order of the requests.

    Args:
        model: The model.
        asked: Non-empty.
        edit: Hooks or edits, on the request and on each new token.
        max_new_tokens: At most this many tokens each; a refusal shows in its first few.
        progress: Show a bar.
    """
    found: dict[int, Tensor] = {}
    lengths = [len(one.ids) for one in asked.encoded]
    edit = list(edit)
    with tqdm(total=len(asked), desc="answers", unit="request", disable=not progress) as bar:
        for part in batches(lengths, fitting_tokens(model, 0)):
            rows = [asked.encoded[i].ids for i in part]
            tokens, longest = model.pad(rows), max(map(len, rows))
            real = torch.tensor([[False] * (longest - len(r)) + [True] * len(r) for r in rows])
            new = model.generate(
                tokens,
                attention_mask=real,
                max_new_tokens=max_new_tokens,
                fwd_hooks=edit,
                return_type="tokens",
                progress=False,
            )
            found |= zip(part, new, strict=True)
            bar.update(len(part))
    return [found[i] for i in range(len(asked))]


def _everywhere(edit: Iterable[Any]) -> list[Any]:
    """An edit, if it acts at every position: others count in passes over whole requests."""
    pairs = list(edit)
    for name, function in pairs:
        if getattr(function, "keywords", {}).get("places") is not None:
            raise InputError(
                f"an edit of {name} names positions, but the requests are read in parts here: "
                "leave positions out"
            )
    return pairs


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with, leaving each at least one of its own."""
    if not rows:
        raise InputError("there are no requests")
    if len(rows) == 1:
        return 0
    shortest = min(map(len, rows))
    same = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
    same = min(same, shortest - 1)
    return same if same >= _WORTH_SHARING else 0


def _right_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, which of them are real, and where each row ends: nothing before padding sees it."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(longest) < lengths[:, None], lengths - 1
