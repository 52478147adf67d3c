"""Between text and tokens: the model's side of the tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.model.config import LlamaConfig
from llama_probe.tokenizer import Tokenizer


class ModelText:
    """Methods of `Llama` that turn text into tokens and back."""

    cfg: LlamaConfig
    tokenizer: Tokenizer | None

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer: give it tokens, not text")
        return self.tokenizer

    def to_tokens(self, text: Any, prepend_bos: bool | None = None) -> Int[Tensor, "batch pos"]:
        """Tokens of a text or of several, padded on the left to one length.

        Args:
            text: One text or a list of them; token ids [pos] or [batch pos] stay what they are,
                in a tensor, an array or a list.
            prepend_bos: Begin with the BOS token, never twice; None: the checkpoint's own rule.

        Raises:
            InputError: A text is empty, or there is no tokenizer or no token to pad with.
        """
        if isinstance(text, Mapping):
            raise InputError(
                "the input is a dictionary: pass its 'input_ids', and its mask as well"
            )
        if not _is_text(text):
            return self._checked_tokens(_as_tensor(text))
        return self._checked_tokens(self.pad(self._encoded(text, prepend_bos)))

    def _encoded(self, text: Any, prepend_bos: bool | None) -> list[list[int]]:
        """The token ids of each text."""
        texts = [text] if isinstance(text, str) else text
        tokenizer = self._tokenizer()
        if not texts:
            raise InputError("there is no text to turn into tokens: the list is empty")
        for index, one in enumerate(texts):
            if not isinstance(one, str):
                raise InputError(f"text {index} is of type {type(one).__name__}, not str")
            if not one:
                raise InputError(
                    f"text {index} is empty; to start from the BOS token alone, pass its id"
                )
        return [tokenizer.encode(one, prepend_bos) for one in texts]

    def _checked_tokens(self, tokens: Tensor) -> Int[Tensor, "batch pos"]:
        rows = tokens[None] if tokens.ndim == 1 else tokens
        if rows.ndim != 2 or rows.is_floating_point() or rows.dtype == torch.bool:
            raise InputError(
                f"tokens are integers [batch pos], not {tokens.dtype} {tuple(tokens.shape)}"
            )
        if not rows.numel():
            raise InputError(f"the input is empty: tokens of shape {tuple(tokens.shape)}")
        if rows.min() < 0 or rows.max() >= self.cfg.d_vocab:
            raise InputError(
                f"token ids go from 0 to {self.cfg.d_vocab - 1}, but the input has "
                f"{int(rows.min())} to {int(rows.max())}"
            )
        return rows.to(self.cfg.device).long()

    def tokens_and_mask(
        self,
        prompt: Any,
        attention_mask: Any = None,
        *,
        prepend_bos: bool | None = None,
        continued: bool = False,
    ) -> tuple[Int[Tensor, "batch pos"], Tensor]:
        """Tokens, and which of them are no padding.

        Of texts this is known; of token ids it is taken from pad tokens at the start of rows.

        Args:
            prompt: As for `to_tokens`.
            attention_mask: What is known better; returned as it is.
            prepend_bos: As for `to_tokens`.
            continued: The tokens continue others: texts get no BOS of their own, and no token id
                is taken for padding.

        Raises:
            InputError: As `to_tokens` and `padding_mask`.
        """
        lengths = None
        if _is_text(prompt):
            rows = self._encoded(
                prompt, False if continued and prepend_bos is None else prepend_bos
            )
            lengths = torch.tensor([len(row) for row in rows], device=self.cfg.device)
            tokens = self._checked_tokens(self.pad(rows))
        else:
            tokens = self.to_tokens(prompt)
        if attention_mask is not None:
            mask = torch.as_tensor(attention_mask, device=tokens.device)
            return tokens, mask[None] if mask.ndim == 1 else mask
        if lengths is not None:
            n_pos = tokens.shape[1]
            return tokens, torch.arange(n_pos, device=tokens.device) >= n_pos - lengths[:, None]
        derived = None if continued else self.padding_mask(tokens)
        return tokens, torch.ones_like(tokens, dtype=torch.bool) if derived is None else derived

    def one_prompt(
        self, prompt: Any, prepend_bos: bool | None = None
    ) -> tuple[Int[Tensor, "1 pos"], Tensor]:
        """Tokens and mask of a single prompt, for analyses that take one.

        Raises:
            InputError: There are several, or the prompt cannot be used.
        """
        tokens, mask = self.tokens_and_mask(prompt, prepend_bos=prepend_bos)
        if tokens.shape[0] != 1:
            raise InputError(f"this analysis takes one prompt, not {tokens.shape[0]}")
        return tokens, mask

    def pad(self, rows: Sequence[Sequence[int]]) -> Int[Tensor, "batch pos"]:
        """Rows of token ids, padded on the left to one length.

        Raises:
            InputError: A row is empty, or rows differ in length and there is no token to pad with.
        """
        if not rows or not all(rows):
            raise InputError("a prompt has no tokens")
        length = max(map(len, rows))
        pad = self.pad_token_id
        if pad is None:
            if any(len(row) != length for row in rows):
                raise InputError(
                    "prompts of unequal length need padding, but the tokenizer has no token for "
                    "it: set model.tokenizer.pad_token_id"
                )
            pad = 0
        padded = [[pad] * (length - len(row)) + list(row) for row in rows]
        return torch.tensor(padded, device=self.cfg.device)

    @property
    def pad_token_id(self) -> int | None:
        """The token that rows are padded with: the tokenizer's own, else the end of a text."""
        if self.tokenizer is None:
            return None
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def padding_mask(self, tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"] | None:
        """Which tokens are not padding at the start of a row; None where there is no padding.

        Pads at the end of a row are left alone: nothing before them sees them.

        Raises:
            InputError: The pad token is also the BOS token and a row starts with several of them,
                so that nobody can say which is the BOS.
        """
        pad = self.pad_token_id
        if pad is None or not (tokens[:, 0] == pad).any():
            return None
        padding = (tokens == pad).long().cumprod(dim=1).bool()
        if self.tokenizer is not None and pad == self.tokenizer.bos_token_id:
            if (padding.sum(dim=1) > 1).any():
                raise InputError(
                    f"rows start with several tokens {pad}, which is padding and BOS at once: "
                    "pass attention_mask"
                )
            return None
        if padding.all(dim=1).any():
            raise InputError("a row consists of padding alone; pass attention_mask if it does not")
        return ~padding

    def to_string(self, tokens: int | Sequence[int] | Int[Tensor, "*pos"]) -> str:
        """The text of one row of tokens."""
        ids = torch.as_tensor(tokens).flatten().tolist()
        return self._tokenizer().decode(ids)

    def to_str_tokens(
        self, text: str | Sequence[int] | Int[Tensor, "*pos"], prepend_bos: bool | None = None
    ) -> list[str]:
        """Each token of a text, or of one row of tokens, as text of its own.

        Without a tokenizer, ids in angle brackets.
        """
        tokens = self.to_tokens(text, prepend_bos) if isinstance(text, str) else text
        ids = torch.as_tensor(tokens).flatten().tolist()
        return (
            [f"<{id}>" for id in ids] if self.tokenizer is None else self.tokenizer.str_tokens(ids)
        )

    def to_single_token(self, text: str | int) -> int:
        """The id of a text that is one token; an id stays what it is.

        Raises:
            InputError: The text is several tokens, which the message shows, or none; or there is
                no such id.
        """
        if not isinstance(text, str):
            text = int(text)
            if not 0 <= text < self.cfg.d_vocab:
                raise InputError(f"token ids go from 0 to {self.cfg.d_vocab - 1}, not to {text}")
            return text
        ids = self._tokenizer().encode(text, prepend_bos=False)
        if len(ids) != 1:
            parts = self._tokenizer().str_tokens(ids)
            # SentencePiece puts a space of its own before a text that starts with one.
            if len(ids) == 2 and parts[1] == text:
                return ids[1]
            raise InputError(f"{text!r} is {len(ids)} tokens, not one: {parts}")
        return ids[0]


def _is_text(prompt: Any) -> bool:
    """Whether a prompt is a text or a list that starts with one, or is empty."""
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, list | tuple) and (not prompt or isinstance(prompt[0], str))


def _as_tensor(ids: Any) -> Tensor:
    try:
        return torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"the input is a {type(ids).__name__}, but should be a text, a list of texts, or token "
            "ids [batch pos] in rows of one length"
        ) from None
