"""`Tokenizer`: what the rest of the package asks of a tokenizer, whatever file it came from.

The work is done by a backend (`fast.py` over the library `tokenizers`, `spm.py` over
`sentencepiece`). This class adds the checkpoint's rules: when to begin with BOS, what ends a
response, and the chat template.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from llama_probe.errors import InputError
from llama_probe.tokenizer import chat

# Tokens that end a response in the families of this package, where a vocabulary has them.
_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eom|>",
    "<|im_end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
)

# One id, or several in a list, an array or a tensor: this file knows neither numpy nor torch.
Ids = Any


@runtime_checkable
class Backend(Protocol):
    """What does the splitting."""

    @property
    def added(self) -> Mapping[str, int]:
        """Ids of the tokens that are recognised by being written out, by content."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Those of them that are no text: BOS, EOS, ends of turns, …."""
        ...

    @property
    def vocab_size(self) -> int:
        """The highest id + 1."""
        ...

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of a text, nothing added to it."""
        ...

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text of ids."""
        ...

    def piece(self, token_id: int) -> str:
        """One token as text of its own; empty if there is no such token."""
        ...

    def save(self, folder: Path, bos: int | None) -> str:
        """Write the vocabulary; `bos` is what a text begins with. Returns HF's class name."""
        ...


class Tokenizer:
    """Turns text into token ids and back, by the rules of one checkpoint.

    Attributes:
        bos_token_id: The token a text begins with, or None.
        eos_token_id: The token a text ends with, or None.
        pad_token_id: The token to pad with, or None.
        unk_token_id: The token for what the vocabulary cannot express, or None.
        add_bos: Whether this checkpoint's texts begin with BOS.
        stop_ids: Tokens that end a response: EOS and the ends of turns.
        chat_template: A Jinja template, or None.
        padding_side: Always "left", so that the last position is the last token of every prompt.
    """

    padding_side = "left"

    def __init__(
        self,
        backend: Backend,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        unk_token_id: int | None = None,
        add_bos: bool = False,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ) -> None:
        self._backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.unk_token_id = unk_token_id
        self.add_bos = add_bos and bos_token_id is not None
        self.chat_template = chat_template
        ends = {token_id for text, token_id in backend.added.items() if text in _ENDS}
        own = set() if eos_token_id is None else {eos_token_id}
        self.stop_ids = frozenset(own | (ends & backend.special_ids) | set(stop_ids))

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read a Hugging Face folder: tokenizer.json, or else a SentencePiece tokenizer.model.

        Whether BOS is added follows tokenizer.json's post-processor, else `add_bos_token` of
        tokenizer_config.json. An EOS that a post-processor would add is left out.

        Raises:
            CheckpointError: There is neither file, or one of the files is damaged.
        """
        from llama_probe.tokenizer.folder import from_folder

        return from_folder(Path(folder))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """Build the tokenizer that a GGUF file's metadata describes.

        Raises:
            CheckpointError: A key is missing or wrong, or the kind of vocabulary
                (`tokenizer.ggml.model`) or of splitting (`tokenizer.ggml.pre`) is unknown.
        """
        from llama_probe.tokenizer.gguf_vocabulary import from_gguf

        return from_gguf(metadata)

    @classmethod
    def from_transformers(cls, hf_tokenizer: Any) -> "Tokenizer":
        """Copy a fast tokenizer of transformers, which stays as it is.

        Raises:
            InputError: It is not a fast tokenizer.
        """
        from llama_probe.tokenizer.fast import from_transformers

        return from_transformers(hf_tokenizer)

    @property
    def vocab_size(self) -> int:
        """The highest id + 1; a model may have more rows than that."""
        return self._backend.vocab_size

    def encode(
        self, text: str, prepend_bos: bool | None = None, *, parse_special: bool = True
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: What to encode.
            prepend_bos: Begin with BOS; None: the checkpoint's own rule. A text that begins with
                the BOS token written out gets no second one.
            parse_special: Special tokens written out in the text ("<|eot_id|>") become those
                tokens; False: they are text like any other.

        Raises:
            InputError: There is no BOS token to prepend, or the text holds half of a surrogate
                pair.
        """
        if prepend_bos and self.bos_token_id is None:
            raise InputError("this tokenizer has no BOS token: leave prepend_bos out")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text has half of a surrogate pair at character {error.start}, "
                "which is no Unicode character"
            ) from None
        ids = self._backend.encode(text, parse_special)
        wanted = self.add_bos if prepend_bos is None else prepend_bos
        if wanted and self.bos_token_id is not None and ids[:1] != [self.bos_token_id]:
            ids.insert(0, self.bos_token_id)
        return ids

    def decode(self, ids: Ids, skip_special: bool = False) -> str:
        """The text of token ids; those that stand for nothing give nothing.

        Args:
            ids: One id, or several (a list, an array, a row of a tensor).
            skip_special: Leave special tokens out.
        """
        return self._backend.decode(_as_list(ids), skip_special)

    def str_tokens(self, ids: Ids) -> list[str]:
        """Each token as text of its own, with its leading space.

        Bytes that are no whole character show as the replacement character.
        """
        return [self._backend.piece(token_id) for token_id in _as_list(ids)]

    def token_id(self, text: str) -> int | None:
        """The id of a special token by its content, or None.

        User-defined tokens that `tokenizers` recognises in a text count as well.
        """
        return self._backend.added.get(text)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in the model's own template, which runs in a sandbox.

        Args:
            messages: Each `{"role": …, "content": …}`.
            add_generation_prompt: End with the beginning of the model's reply.

        Raises:
            InputError: There is no template, or it refuses the messages.
            CheckpointError: The template is no valid Jinja.
        """
        if self.chat_template is None:
            raise InputError(
                "this tokenizer has no chat template (a base model?): write the prompt out, "
                "or set tokenizer.chat_template"
            )
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        ids = {name: getattr(self, f"{name}_id") for name in names}
        tokens = {name: self._backend.piece(i) for name, i in ids.items() if i is not None}
        return chat.render(
            self.chat_template,
            [dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tokens=tokens,
        )

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation: the template alone says whether BOS comes first.

        Raises:
            InputError: There is no template, or it refuses the messages.
            CheckpointError: The template is no valid Jinja.
        """
        return self.encode(self.render_chat(messages, add_generation_prompt), prepend_bos=False)

    def save(self, folder: str | Path) -> None:
        """Write the files from which `from_folder` gives the same tokenizer.

        tokenizer.json or tokenizer.model, tokenizer_config.json, and, for `stop_ids`,
        generation_config.json. The folder is made if need be.
        """
        from llama_probe.tokenizer.folder import save_configs

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        kind = self._backend.save(folder, self.bos_token_id if self.add_bos else None)
        save_configs(self, folder, kind)

    def __repr__(self) -> str:
        return (
            f"Tokenizer(vocab_size={self.vocab_size}, bos_token_id={self.bos_token_id}, "
            f"eos_token_id={self.eos_token_id}, add_bos={self.add_bos})"
        )


def _as_list(ids: Ids) -> list[int]:
    if hasattr(ids, "tolist"):  # arrays and tensors, whose items are not Python's ints
        ids = ids.tolist()
    numbers = [ids] if isinstance(ids, int) else list(ids)
    if any(not isinstance(number, int) or number < 0 for number in numbers):
        raise InputError("token ids should be one row of whole numbers from 0")
    return numbers
