"""The backend over the library `tokenizers`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Engine
from tokenizers.processors import TemplateProcessing

from llama_probe.errors import CheckpointError, InputError
from llama_probe.tokenizer.tokenizer import Tokenizer


class Fast:
    """A backend over a `tokenizers.Tokenizer`, which belongs to it from then on."""

    def __init__(self, engine: Engine) -> None:
        # tokenizer.json may hold somebody's training settings.
        engine.no_truncation()
        engine.no_padding()
        added = engine.get_added_tokens_decoder()
        self._engine = engine
        self._contents = {token_id: token.content for token_id, token in added.items()}
        self._byte_level = "ByteLevel" in repr(engine.decoder)
        self.added = {content: token_id for token_id, content in self._contents.items()}
        self.vocab_size = max(engine.get_vocab().values(), default=-1) + 1
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of a text, nothing added to it."""
        if parse_special:
            return self._engine.encode(text, add_special_tokens=False).ids
        self._engine.encode_special_tokens = True
        try:
            return self._engine.encode(text, add_special_tokens=False).ids
        finally:
            self._engine.encode_special_tokens = False

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text of ids."""
        return self._engine.decode(list(ids), skip_special_tokens=skip_special)

    def piece(self, token_id: int) -> str:
        """One token as text of its own; empty if there is no such token."""
        if token_id in self._contents:
            return self._contents[token_id]
        if self._byte_level:
            return self._engine.decode([token_id], skip_special_tokens=False)
        # SentencePiece's way of writing, whose decoder would take the leading space away.
        return spm_text(self._engine.id_to_token(token_id) or "")

    def save(self, folder: Path, bos: int | None) -> str:
        """Write tokenizer.json, whose post-processor puts `bos` first."""
        if bos_of(self._engine) != bos:
            self._engine.post_processor = begins_with(bos, self.piece(bos or 0))  # pyright: ignore[reportAttributeAccessIssue]
        self._engine.save(str(folder / "tokenizer.json"))
        return "PreTrainedTokenizerFast"


def spm_text(piece: str) -> str:
    """The text of a SentencePiece token.

    >>> spm_text("▁Mary"), spm_text("<0x41>"), spm_text("<0xF0>")
    (' Mary', 'A', '�')
    """
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5]).decode(errors="replace")
    return piece.replace("▁", " ")


def bos_of(engine: Engine) -> int | None:
    """The token that the post-processor puts first, or None."""
    encoding = engine.encode("a")
    return encoding.ids[0] if encoding.ids and encoding.special_tokens_mask[0] else None


def begins_with(bos: int | None, content: str) -> TemplateProcessing:
    """A post-processor that puts `bos` first, or changes nothing.

    Only for saved files: this package adds BOS itself.
    """
    if bos is None:
        return TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    # As a list, not a string: the content may hold what the string form gives a meaning to.
    return TemplateProcessing(
        single=[content, "$A"],
        pair=[content, "$A", f"{content}:1", "$B:1"],
        special_tokens=[(content, bos)],
    )


def mark_special(engine: Engine, contents: list[str]) -> None:
    """Recognise tokens of the vocabulary as special where they are written out in a text."""
    known = engine.get_added_tokens_decoder().values()
    special = {token.content for token in known if token.special}
    missing = [c for c in contents if c not in special and engine.token_to_id(c) is not None]
    engine.add_special_tokens([AddedToken(c, special=True, normalized=False) for c in missing])


def engine_of(path: Path) -> Engine:
    """Read a tokenizer.json.

    Raises:
        CheckpointError: It is damaged, or newer than the library.
    """
    try:
        engine = Engine.from_file(str(path))
        engine.encode("a")  # some files can be read, but not used
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from None
    return engine


def from_transformers(hf_tokenizer: Any) -> Tokenizer:
    """Copy a fast tokenizer; see `Tokenizer.from_transformers`."""
    engine = getattr(hf_tokenizer, "backend_tokenizer", None)
    if not isinstance(engine, Engine):
        raise InputError(
            f"{type(hf_tokenizer).__name__} is not a fast tokenizer: load it with "
            "AutoTokenizer.from_pretrained(…, use_fast=True)"
        )
    copy = Engine.from_str(engine.to_str())
    template = hf_tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return Tokenizer(
        Fast(copy),
        bos_token_id=hf_tokenizer.bos_token_id,
        eos_token_id=hf_tokenizer.eos_token_id,
        pad_token_id=hf_tokenizer.pad_token_id,
        unk_token_id=hf_tokenizer.unk_token_id,
        add_bos=bos_of(copy) is not None and bos_of(copy) == hf_tokenizer.bos_token_id,
        chat_template=template,
    )
