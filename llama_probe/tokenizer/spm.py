"""The backend over `sentencepiece`, for tokenizer.model files and GGUF vocabularies of that kind.

SentencePiece never reads special tokens out of a text, so the text is split on them first; each
stretch between them is encoded on its own, dummy prefix included, as Llama 2 was trained.
"""

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llama_probe.errors import CheckpointError
from llama_probe.tokenizer.fast import spm_text

# The types of a piece; GGUF's `token_type` uses the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class Spm:
    """A backend over a serialised SentencePiece model."""

    def __init__(self, model: bytes, *, where: str) -> None:
        try:
            processor = SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{where} is no SentencePiece model ({error}); if it is one of tiktoken's rank "
                "files, as Llama 3's original tokenizer.model is, use a folder with tokenizer.json"
            ) from None
        self._model = model
        self._processor = processor
        self.added = {
            processor.id_to_piece(i): i
            for i in range(len(processor))
            if processor.is_control(i) or processor.is_unknown(i)
        }
        self.special_ids = frozenset(self.added.values())
        longest_first = sorted(self.added, key=len, reverse=True)
        self._specials = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @property
    def vocab_size(self) -> int:
        """The highest id + 1."""
        return len(self._processor)

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Ids of a text, nothing added to it but SentencePiece's own dummy prefix."""
        if not parse_special:
            return self._processor.encode(text)
        ids: list[int] = []
        # The pattern captures, so every second part is a special token.
        for index, part in enumerate(self._specials.split(text)):
            ids += [self.added[part]] if index % 2 else self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """The text of ids: `encode` undone, stretch by stretch."""
        parts: list[str] = []
        stretch: list[int] = []
        for token_id in ids:
            if token_id in self.special_ids:
                parts.append(self._processor.decode(stretch))
                stretch = []
                if not skip_special:
                    parts.append(self._processor.id_to_piece(token_id))
            elif token_id < self.vocab_size:
                stretch.append(token_id)
        return "".join([*parts, self._processor.decode(stretch)])

    def piece(self, token_id: int) -> str:
        """One token as text of its own; empty if there is no such token."""
        if token_id >= self.vocab_size:
            return ""
        piece = self._processor.id_to_piece(token_id)
        return piece if token_id in self.special_ids else spm_text(piece)

    def save(self, folder: Path, bos: int | None) -> str:
        """Write tokenizer.model, which does not say whether BOS comes first."""
        (folder / "tokenizer.model").write_bytes(self._model)
        return "LlamaTokenizer"

    def special(self, role: str) -> int | None:
        """The id that the model gives to "bos", "eos", "pad" or "unk", or None."""
        token_id = getattr(self._processor, f"{role}_id")()
        return token_id if token_id >= 0 else None


def model_of(pieces: Iterable[tuple[str, float, int]], *, dummy_prefix: bool) -> bytes:
    """Serialise a SentencePiece model that merges by score.

    Args:
        pieces: Text, score and type of every piece, in the order of their ids.
        dummy_prefix: Put a space before a text.
    """
    written = list(pieces)
    # Field numbers as in SentencePiece's sentencepiece_model.proto: TrainerSpec's model_type
    # (2: BPE) and byte_fallback, NormalizerSpec's name, add_dummy_prefix,
    # remove_extra_whitespaces and escape_whitespaces.
    bytes_too = any(kind == BYTE for _, _, kind in written)
    trainer = _number(3, 2) + _number(35, int(bytes_too))
    normalizer = (
        _bytes(1, b"identity") + _number(3, int(dummy_prefix)) + _number(4, 0) + _number(5, 1)
    )
    return pieces_of(written) + _bytes(2, trainer) + _bytes(3, normalizer)


def pieces_of(pieces: Iterable[tuple[str, float, int]]) -> bytes:
    """Serialise pieces; behind a serialised model, they are appended to its own."""
    return b"".join(
        _bytes(1, _bytes(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
        for text, score, kind in pieces
    )


def extended(model: bytes, added: Mapping[int, tuple[str, bool]], *, where: str) -> bytes:
    """Append the tokens that a folder's configuration adds to a SentencePiece model.

    Args:
        model: The serialised model.
        added: Content of each added token and whether it is special; known ones are passed over.
        where: Names the folder in errors.

    Raises:
        CheckpointError: The ids do not continue those of the model, or it is no such model.
    """
    size = Spm(model, where=where).vocab_size
    new = sorted(token_id for token_id in added if token_id >= size)
    if new != list(range(size, size + len(new))):
        raise CheckpointError(
            f"{where} adds tokens {new[:5]}…, but their ids should go on from {size} without gaps"
        )
    kinds = (
        (added[token_id][0], CONTROL if added[token_id][1] else USER_DEFINED) for token_id in new
    )
    return model + pieces_of((text.replace(" ", "▁"), 0.0, kind) for text, kind in kinds)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
