"""Tokenizers from the metadata of GGUF files.

Byte-level BPE vocabularies come with merges and with a name for how text is split before merging
(`tokenizer.ggml.pre`); the rules behind the name are not in the file, but in the table here.
SentencePiece vocabularies come with scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Engine

from llama_probe.errors import CheckpointError, near
from llama_probe.tokenizer import spm
from llama_probe.tokenizer.fast import Fast
from llama_probe.tokenizer.spm import Spm
from llama_probe.tokenizer.tokenizer import Backend, Tokenizer

_KEY = "tokenizer.ggml."


@dataclass(frozen=True, kw_only=True)
class _Splitting:
    """How text is split before merging.

    Attributes:
        patterns: Applied one after the other; matches and what lies between them stay apart.
        whole: A piece that is a token is not merged together from its bytes (tiktoken's rule).
        bos: Whether BOS is added when the file does not say.
        nfc: Unicode is normalised first.
    """

    patterns: tuple[str, ...]
    whole: bool = False
    bos: bool = False
    nfc: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
# o200k's words: capitals, then small letters.
_BIG, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SMALL_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_BIG}*{_SMALL}+"
_BIG_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_BIG}+{_SMALL}*"
_SLASHES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

_LLAMA3 = _Splitting(
    patterns=(rf"{_ENDINGS}|{_WORD}|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}",), whole=True, bos=True
)
_QWEN2 = _Splitting(patterns=(rf"{_ENDINGS}|{_WORD}|\p{{N}}|{_PUNCTUATION}|{_SPACES}",), nfc=True)
_TEKKEN = _Splitting(
    patterns=(rf"{_SMALL_WORD}|{_BIG_WORD}|\p{{N}}|{_SLASHES}|{_SPACES}",), whole=True, bos=True
)
_O200K = _Splitting(
    patterns=(
        rf"{_SMALL_WORD}{_ENDINGS}?|{_BIG_WORD}{_ENDINGS}?|\p{{N}}{{1,3}}|{_SLASHES}|{_SPACES}",
    ),
    whole=True,
)
_DIGITS = _Splitting(patterns=(r"\p{N}", _GPT2))
_SPLITTINGS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    "tekken": _TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), _O200K),
    **dict.fromkeys(("gpt-2", "olmo"), _Splitting(patterns=(_GPT2,))),
    "falcon": _Splitting(patterns=(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "default": _Splitting(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}


def from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer that a GGUF file describes; see `Tokenizer.from_gguf`."""
    kind = metadata.get(f"{_KEY}model")
    if kind == "gpt2":
        splitting = _splitting(metadata)
        return _assembled(metadata, Fast(_engine(metadata, splitting)), add_bos=splitting.bos)
    if kind == "llama":
        return _assembled(metadata, _spm(metadata), add_bos=True)
    raise CheckpointError(
        f"the GGUF vocabulary is of kind {kind!r}, but 'gpt2' (byte-level BPE) and 'llama' "
        "(SentencePiece) are read"
    )


def _assembled(metadata: Mapping[str, Any], backend: Backend, add_bos: bool) -> Tokenizer:
    """Put the file's rules around a backend; `add_bos` holds if the file does not say."""

    def token(name: str, usual: str = "") -> int | None:
        found = metadata.get(f"{_KEY}{name}_token_id")
        if found is None:
            return backend.added.get(usual)
        if not isinstance(found, int) or not 0 <= found < backend.vocab_size:
            raise CheckpointError(
                f"'{_KEY}{name}_token_id' is {found!r}, but should be an id of the vocabulary "
                f"(0 to {backend.vocab_size - 1})"
            )
        return found

    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        bos_token_id=token("bos", "<s>"),
        eos_token_id=token("eos", "</s>"),
        pad_token_id=token("padding"),
        unk_token_id=token("unknown", "<unk>"),
        add_bos=bool(metadata.get(f"{_KEY}add_bos_token", add_bos)),
        stop_ids=[i for i in (token("eot"), token("eom")) if i is not None],
        chat_template=template if isinstance(template, str) else None,
    )


def _splitting(metadata: Mapping[str, Any]) -> _Splitting:
    pre = metadata.get(f"{_KEY}pre")
    if pre is None:
        raise CheckpointError(
            f"the GGUF file has no '{_KEY}pre', so nobody can say how its vocabulary splits text; "
            "convert it again with a converter of May 2024 or later"
        )
    if pre not in _SPLITTINGS:
        raise CheckpointError(
            f"the GGUF vocabulary splits text by {pre!r} ('{_KEY}pre'), which is not known here"
            f"{near(str(pre), _SPLITTINGS)}; known: {', '.join(sorted(_SPLITTINGS))}"
        )
    return _SPLITTINGS[pre]


def _engine(metadata: Mapping[str, Any], splitting: _Splitting) -> Engine:
    """A byte-level BPE."""
    tokens = _strings(metadata, "tokens")
    merges = [tuple(merge.split(" ")) for merge in _strings(metadata, "merges")]
    try:
        model = models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,  # pyright: ignore[reportArgumentType]
            ignore_merges=splitting.whole,
        )
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"the GGUF vocabulary and its merges do not fit: {error}") from None
    engine = Engine(model)
    if splitting.nfc:
        engine.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in splitting.patterns]
    bytes_too = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_too])  # pyright: ignore[reportAttributeAccessIssue]
    engine.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    types = _types(metadata, len(tokens))
    added = [(t, kind) for t, kind in zip(tokens, types, strict=True) if t and kind in _WRITTEN]
    engine.add_tokens(
        [AddedToken(t, special=kind == spm.CONTROL, normalized=False) for t, kind in added]
    )
    return engine


# The types of tokens that are recognised where they are written out in a text.
_WRITTEN = {spm.CONTROL, spm.USER_DEFINED}


def _spm(metadata: Mapping[str, Any]) -> Spm:
    tokens = _strings(metadata, "tokens")
    types = _types(metadata, len(tokens))
    scores = metadata.get(f"{_KEY}scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(f"'{_KEY}scores' should hold {len(tokens)} numbers, one a token")
    # Converters write the spaces of user-defined tokens as spaces, SentencePiece as "▁".
    texts = [
        token.replace(" ", "▁") if kind == spm.USER_DEFINED else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    prefix = bool(metadata.get(f"{_KEY}add_space_prefix", True))
    model = spm.model_of(zip(texts, scores, types, strict=True), dummy_prefix=prefix)
    return Spm(model, where="the GGUF vocabulary")


def _strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    found = metadata.get(f"{_KEY}{name}")
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise CheckpointError(f"'{_KEY}{name}' should be a list of strings in the GGUF file")
    return found


def _types(metadata: Mapping[str, Any], count: int) -> list[int]:
    found = metadata.get(f"{_KEY}token_type")
    if not isinstance(found, list) or len(found) != count:
        raise CheckpointError(f"'{_KEY}token_type' should hold {count} numbers, one a token")
    return found
