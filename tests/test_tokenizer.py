"""The tokenizer against the libraries' own results, and against hostile files."""

import io
import json
import random
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine

from llama_probe.errors import CheckpointError, InputError
from llama_probe.tokenizer import Tokenizer
from llama_probe.tokenizer.gguf_vocabulary import _SPLITTINGS

BPE_TOKENS = ["<s>", "</s>", "<|eot_id|>", "<tool>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
BPE_MERGES = ["Ġ M", "a r", "ĠM ar", "ĠMar y", "Ġ Ġ", "1 2", "12 3", "h e"]
BPE_TOKENS += [merge.replace(" ", "") for merge in BPE_MERGES]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def bpe_metadata(pre: str = "llama-bpe", **changes: Any) -> dict[str, Any]:
    types = {"<s>": 3, "</s>": 3, "<|eot_id|>": 3, "<tool>": 4}
    ggml = {
        "model": "gpt2",
        "pre": pre,
        "tokens": BPE_TOKENS,
        "merges": BPE_MERGES,
        "token_type": [types.get(token, 1) for token in BPE_TOKENS],
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    metadata = {f"tokenizer.ggml.{key}": value for key, value in ggml.items() if value is not None}
    return {**metadata, "tokenizer.chat_template": TEMPLATE}


BPE = Tokenizer.from_gguf(bpe_metadata())
MARY = BPE_TOKENS.index("ĠMary")


# --- text to ids and back


def test_bos_follows_the_rule_and_the_override():
    assert BPE.add_bos
    assert BPE.encode(" Mary") == [0, MARY]
    assert BPE.encode(" Mary", prepend_bos=False) == [MARY]
    plain = Tokenizer.from_gguf(bpe_metadata(add_bos_token=False))
    assert plain.encode(" Mary") == [MARY]
    assert plain.encode(" Mary", prepend_bos=True) == [0, MARY]
    assert BPE.encode("") == [0]


@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_bos_is_never_doubled(prepend_bos):
    assert BPE.encode("<s> Mary", prepend_bos) == [0, MARY]


def test_prepending_a_bos_that_is_not_there():
    tokens = [token for token in BPE_TOKENS if token != "<s>"]
    changes = {"tokens": tokens, "token_type": [1] * len(tokens), "bos_token_id": None}
    tokenizer = Tokenizer.from_gguf(bpe_metadata(**changes))
    assert not tokenizer.add_bos
    with pytest.raises(InputError, match="no BOS"):
        tokenizer.encode("a", prepend_bos=True)


def test_special_tokens_in_a_text():
    assert BPE.encode("<|eot_id|>", prepend_bos=False) == [2]
    as_text = BPE.encode("<|eot_id|>", prepend_bos=False, parse_special=False)
    assert len(as_text) == len("<|eot_id|>")
    assert BPE.decode(as_text) == "<|eot_id|>"
    assert BPE.encode("<s>", parse_special=False)[0] == 0  # BOS of the rule, then the text
    assert len(BPE.encode("<s>", parse_special=False)) == 4
    assert BPE.encode("<|eot_id|>", prepend_bos=False) == [2]  # the setting does not stick


def test_ids_of_special_tokens_and_the_end_of_a_response():
    assert BPE.token_id("<|eot_id|>") == 2
    assert BPE.token_id("<tool>") == 3
    assert BPE.token_id("ĠMary") is None
    assert BPE.stop_ids == {1, 2}
    assert BPE.vocab_size == len(BPE_TOKENS)
    assert BPE.padding_side == "left"


def test_only_special_tokens_end_a_response():
    types = [4 if token == "<|eot_id|>" else 1 for token in BPE_TOKENS]
    assert Tokenizer.from_gguf(bpe_metadata(token_type=types)).stop_ids == {1}


def test_str_tokens_keep_spaces_and_show_broken_characters():
    ids = BPE.encode(" Mary½", prepend_bos=False)
    assert BPE.str_tokens(ids) == [" Mary", "\ufffd", "\ufffd"]
    assert BPE.str_tokens([0, 10**6]) == ["<s>", ""]


def test_decode_takes_what_holds_ids():
    assert BPE.decode([0, MARY, 2]) == "<s> Mary<|eot_id|>"
    assert BPE.decode([0, MARY, 2], skip_special=True) == " Mary"
    assert BPE.decode(MARY) == BPE.decode(torch.tensor(MARY)) == " Mary"
    assert (
        BPE.decode(torch.tensor([MARY, MARY])) == BPE.decode(np.array([MARY] * 2)) == " Mary Mary"
    )
    assert BPE.decode([10**6]) == ""


@pytest.mark.parametrize("ids", [[-1], [[1, 2]]])
def test_ids_that_are_none(ids):
    with pytest.raises(InputError, match="one row of whole numbers"):
        BPE.decode(np.array(ids))


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(InputError, match="character 1"):
        BPE.encode("a\ud800")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(TEXT)
def test_byte_level_round_trip(text):
    assert BPE.decode(BPE.encode(text, prepend_bos=False)) == text
    as_text = BPE.encode(text, prepend_bos=False, parse_special=False)
    assert BPE.decode(as_text) == text


# --- how text is split before merging


def random_texts(count: int, parts: list[str], longest: int = 25) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(parts, k=rng.randint(0, longest))) for _ in range(count)]


PARTS = [
    *(
        "a",
        "B",
        "É",
        "ñ",
        "ǅ",
        "ʰ",
        "日本",
        "नि",
        "1",
        "23",
        "½",
        "٣",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
    ),
    *("'s", "'LL", "'", "-", "/", "!", "//\n", "<|eot_id|>", "🎉", "e\u0301", "\u00a0", "_"),
]


def pieces(patterns: tuple[str, ...], text: str) -> list[str]:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return [piece for piece, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(text)]


@pytest.mark.parametrize(
    "pre",
    [
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "pixtral",
        "qwen2",
        "tekken",
        "gpt-4o",
        "llama4",
    ],
)
def test_splitting_equals_transformers(pre):
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    for text in random_texts(500, PARTS):
        theirs = pieces((GGUF_PRE_TOKENIZER_SPLITS[pre],), text)
        assert pieces(_SPLITTINGS[pre].patterns, text) == theirs


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", pre_tokenizers.Digits(individual_digits=True)),
        ("gpt-2", None),
    ],
)
def test_splitting_equals_tokenizers_own_byte_level(pre, expected):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs = pre_tokenizers.Sequence([expected, byte_level] if expected else [byte_level])
    ours = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in random_texts(500, PARTS):
        expected_pieces = [piece for piece, _ in theirs.pre_tokenize_str(text)]
        found = [ours.pre_tokenize_str(p)[0][0] for p in pieces(_SPLITTINGS[pre].patterns, text)]
        assert found == expected_pieces


def test_a_piece_that_is_a_token_needs_no_merges():
    tokens = [*BPE_TOKENS, "hello"]  # no merge leads there
    changes = {"tokens": tokens, "token_type": [1] * len(tokens), "bos_token_id": None}
    whole = Tokenizer.from_gguf(bpe_metadata("llama-bpe", **changes))
    merged = Tokenizer.from_gguf(bpe_metadata("qwen2", **changes))
    assert whole.encode("hello") == [len(BPE_TOKENS)]
    assert merged.str_tokens(merged.encode("hello")) == ["he", "l", "l", "o"]


def test_qwen_normalises():
    tokenizer = Tokenizer.from_gguf(bpe_metadata("qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
    assert BPE.encode("e\u0301") != BPE.encode("\u00e9")


# Rows of llama.cpp's models/ggml-vocab-smollm.gguf.out, made with the published tokenizer.
SMOLLM_ROWS = {
    "ied 4 ½ months": [885, 216, 36, 216, 16738, 2704],
    " this is 🦙.cpp": [451, 314, 15107, 116, 243, 30, 35392],
    "w048 7tuijk dsdfhu": [103, 32, 36, 40, 216, 39, 24961, 47112, 21554, 3492, 15995],
    "    Hello\n    Hello": [333, 38699, 472, 38699],
    "\n\n\n": [16506],
    "333": [35, 35, 35],
}


@pytest.fixture(scope="module")
def smollm(smollm2_path: Path) -> Tokenizer:
    from llama_probe.checkpoints.gguf import GgufFile

    with GgufFile(smollm2_path) as file:
        return Tokenizer.from_gguf(file.metadata)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "ids"), SMOLLM_ROWS.items())
def test_smollm2_gives_the_published_ids(smollm, text, ids):
    assert smollm.encode(text) == ids
    assert smollm.decode(ids) == text


@pytest.mark.slow
def test_smollm2_in_a_folder_is_the_same_to_us_and_to_transformers(smollm, tmp_path):
    from transformers import AutoTokenizer

    smollm.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    copied = Tokenizer.from_transformers(theirs)
    for text in [*random_texts(300, PARTS), *SMOLLM_ROWS]:
        assert smollm.encode(text) == again.encode(text) == copied.encode(text)
        assert smollm.encode(text) == theirs(text)["input_ids"]
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    rendered = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert smollm.render_chat(chat) == again.render_chat(chat) == rendered
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert smollm.encode_chat(chat) == ids
    assert rules(smollm) == rules(again)
    assert smollm.stop_ids == {0, 2}


def rules(tokenizer: Tokenizer) -> dict[str, Any]:
    return {name: value for name, value in vars(tokenizer).items() if name != "_backend"}


# --- GGUF metadata that is wrong


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": "bert"}, "of kind 'bert'"),
        ({"model": None}, "of kind None"),
        ({"pre": "llama-bpf"}, "'llama-bpf'.*did you mean 'llama-bpe'"),
        ({"pre": None}, "no 'tokenizer.ggml.pre'"),
        ({"tokens": None}, "'tokenizer.ggml.tokens' should be a list of strings"),
        ({"tokens": [1, 2]}, "'tokenizer.ggml.tokens' should be a list of strings"),
        ({"merges": None}, "'tokenizer.ggml.merges'"),
        ({"merges": ["a zz"]}, "do not fit"),
        ({"merges": ["ab"]}, "do not fit"),
        ({"merges": ["a b c"]}, "do not fit"),
        ({"token_type": [1]}, "'tokenizer.ggml.token_type' should hold"),
        ({"bos_token_id": 10**6}, "'tokenizer.ggml.bos_token_id' is 1000000"),
        ({"eos_token_id": -1}, "'tokenizer.ggml.eos_token_id' is -1"),
        ({"eos_token_id": "x"}, "'tokenizer.ggml.eos_token_id' is 'x'"),
    ],
)
def test_wrong_metadata(changes, match):
    with pytest.raises(CheckpointError, match=match):
        Tokenizer.from_gguf(bpe_metadata(**changes))


# --- SentencePiece


SENTENCES = [
    "Mary had a little lamb, its fleece was white as snow.",
    "And everywhere that Mary went the lamb was sure to go: 12, 345 and 6789 times.",
    "  Two spaces begin this line, and   three are inside; naïve café.",
] * 20


@pytest.fixture(scope="module")
def model() -> bytes:
    """A small SentencePiece model, with Llama 2's settings."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
        sentence_iterator=iter(SENTENCES),
        model_writer=out,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        control_symbols=["<|eot_id|>"],
        user_defined_symbols=["▁▁▁▁", "<tool>"],
        minloglevel=2,
    )
    return out.getvalue()


def spm_metadata(model: bytes, **changes: Any) -> dict[str, Any]:
    """What a converter writes for a SentencePiece model."""
    p = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(p.get_piece_size())

    def kind(i: int) -> int:
        if p.is_unknown(i) or p.is_control(i):
            return 2 if p.is_unknown(i) else 3
        return 6 if p.is_byte(i) else 4 if p.id_to_piece(i) in ("▁▁▁▁", "<tool>") else 1

    kinds = [kind(i) for i in ids]
    tokens = [p.id_to_piece(i).replace("▁", " " if kinds[i] == 4 else "▁") for i in ids]
    scores = [p.get_score(i) for i in ids]
    ggml = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds, **changes}
    return {f"tokenizer.ggml.{key}": value for key, value in ggml.items() if value is not None}


SPM_PARTS = [
    *(
        "a",
        "lamb",
        "Mary",
        "M",
        " ",
        " ",
        "  ",
        "     ",
        "\n",
        "\t",
        "1",
        "345",
        ".",
        ",",
        "é",
        "ï",
    ),
    *("日", "🎉", "e\u0301", "\x00", "\u00a0", "<tool>", "<0x41>", "was "),
]


def test_spm_from_gguf_equals_sentencepiece(model):
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = Tokenizer.from_gguf(spm_metadata(model))
    assert ours.add_bos and (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (1, 2, 0)
    for text in [*random_texts(2000, SPM_PARTS), "", " ", "  Hello", "   "]:
        assert ours.encode(text) == [1, *theirs.encode(text)]
        assert ours.decode(ours.encode(text), skip_special=True) == text


def test_spm_without_the_dummy_prefix(model):
    ours = Tokenizer.from_gguf(spm_metadata(model, add_space_prefix=False, add_bos_token=False))
    assert "".join(ours.str_tokens(ours.encode("Mary"))) == "Mary"
    for text in random_texts(300, SPM_PARTS):
        assert ours.decode(ours.encode(text)) == text


def test_spm_special_tokens_in_a_text(model):
    ours = Tokenizer.from_gguf(spm_metadata(model))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    eot = ours.token_id("<|eot_id|>")
    text = "<s>Mary<|eot_id|>  a lamb</s>"
    assert ours.encode(text) == [1, *theirs.encode("Mary"), eot, *theirs.encode("  a lamb"), 2]
    assert ours.decode(ours.encode(text)) == text
    assert ours.encode(text, parse_special=False) == [1, *theirs.encode(text)]
    assert ours.stop_ids == {2, eot}


def test_spm_str_tokens(model):
    ours = Tokenizer.from_gguf(spm_metadata(model))
    assert "".join(ours.str_tokens(ours.encode("Mary had a lamb"))) == "<s> Mary had a lamb"
    assert ours.str_tokens(ours.encode("🎉", prepend_bos=False)) == [" ", *["\ufffd"] * 4]
    assert ours.str_tokens([10**6]) == [""]
    assert ours.decode([10**6]) == ""


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scores": None}, "'tokenizer.ggml.scores' should hold 420 numbers"),
        ({"token_type": None}, "'tokenizer.ggml.token_type' should hold 420 numbers"),
        ({"tokens": ["a"] * 420}, "no SentencePiece model"),
        ({"token_type": [1] * 420}, "no SentencePiece model"),
    ],
)
def test_wrong_spm_metadata(model, changes, match):
    with pytest.raises(CheckpointError, match=match):
        Tokenizer.from_gguf(spm_metadata(model, **changes))


def test_a_bare_tokenizer_model(model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    ours = Tokenizer.from_folder(tmp_path)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert ours.add_bos and ours.vocab_size == 420
    for text in random_texts(200, SPM_PARTS):
        assert ours.encode(text) == [1, *theirs.encode(text)]
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False})
    assert not Tokenizer.from_folder(tmp_path).add_bos


def test_tokens_that_a_folder_adds_to_its_tokenizer_model(model, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model)
    write_json(
        tmp_path / "added_tokens.json", {"<|im_start|>": 420, "<|im_end|>": 421, "<|im_end|>2": 422}
    )
    config = {
        "eos_token": "<|im_end|>",
        "added_tokens_decoder": {"2": {"content": "</s>", "special": True}},
    }
    write_json(tmp_path / "tokenizer_config.json", config)
    ours = Tokenizer.from_folder(tmp_path)
    ids = ours.encode("<|im_start|>Mary<|im_end|><|im_end|>2", prepend_bos=False)
    assert (ids[0], ids[-2:]) == (420, [421, 422])  # the longer one wins
    assert (ours.vocab_size, ours.eos_token_id) == (423, 421)
    assert ours.stop_ids == {421, ours.token_id("<|eot_id|>")}
    ours.save(tmp_path / "again")
    again = Tokenizer.from_folder(tmp_path / "again")
    assert rules(again) == rules(ours)
    assert again.encode("a <|im_end|>") == ours.encode("a <|im_end|>")

    write_json(tmp_path / "added_tokens.json", {"<|im_start|>": 500})
    with pytest.raises(CheckpointError, match="go on from 420 without gaps"):
        Tokenizer.from_folder(tmp_path)


# --- folders


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    BPE.save(tmp_path)
    return tmp_path


def test_a_saved_tokenizer_is_the_same(folder):
    again = Tokenizer.from_folder(folder)
    assert rules(again) == rules(BPE)
    for text in random_texts(200, PARTS):
        assert again.encode(text) == BPE.encode(text)
    assert again.render_chat(CHAT) == BPE.render_chat(CHAT)


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_changed_rule_is_saved(folder, add_bos):
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_folder(folder)
    for tokenizer.add_bos in (not add_bos, add_bos):  # the post-processor comes and goes
        tokenizer.save(folder)
    again = Tokenizer.from_folder(folder)
    assert again.add_bos is add_bos
    assert again.encode(" Mary") == AutoTokenizer.from_pretrained(folder)(" Mary")["input_ids"]


@pytest.mark.parametrize("config", [{}, {"add_bos_token": False}, {"add_bos_token": True}])
def test_the_post_processor_decides_before_the_configuration(folder, config):
    write_json(folder / "tokenizer_config.json", config)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.bos_token_id == 0  # known from the post-processor alone
    assert tokenizer.add_bos


def test_without_a_post_processor_the_configuration_decides(folder):
    plain = Tokenizer.from_gguf(bpe_metadata(add_bos_token=False))
    for add_bos in (True, False):
        plain.save(folder)
        write_json(folder / "tokenizer_config.json", {"add_bos_token": add_bos, "bos_token": "<s>"})
        assert Tokenizer.from_folder(folder).add_bos is add_bos


def test_special_tokens_as_objects_and_from_the_map(folder):
    (folder / "generation_config.json").unlink()
    write_json(folder / "tokenizer_config.json", {"bos_token": None, "eos_token": None})
    write_json(
        folder / "special_tokens_map.json",
        {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}, "pad_token": "ĠMary"},
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.pad_token_id == MARY
    assert tokenizer.token_id("ĠMary") == MARY  # named as special, so it is


def test_what_ends_a_response_is_gathered(folder):
    write_json(folder / "tokenizer_config.json", {})
    write_json(folder / "generation_config.json", {"eos_token_id": [7, 8]})
    write_json(folder / "config.json", {"eos_token_id": 9})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.stop_ids == {2, 7, 8, 9}
    assert tokenizer.eos_token_id == 7


def test_where_chat_templates_lie(folder):
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    write_json(folder / "tokenizer_config.json", {"chat_template": named})
    assert Tokenizer.from_folder(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("½", encoding="utf-8")
    assert Tokenizer.from_folder(folder).chat_template == "½"


def test_truncation_and_padding_of_a_file_do_not_count(folder):
    engine = Engine.from_file(str(folder / "tokenizer.json"))
    engine.enable_truncation(2)
    engine.enable_padding(length=9)
    engine.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer.from_folder(folder).encode("abcdef")) == 7


UNUSABLE = Engine(models.WordLevel({"x": 0}, unk_token="none")).to_str()


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("tokenizer.json", "{", "cannot be read as a tokenizer"),
        ("tokenizer.json", '{"model": {}}', "cannot be read as a tokenizer"),
        ("tokenizer.json", UNUSABLE, "cannot be read as a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read as JSON"),
        ("tokenizer_config.json", "[" * 10**5, "tokenizer_config.json cannot be read as JSON"),
        ("tokenizer_config.json", "[]", "should hold a JSON object, not list"),
        ("generation_config.json", "nope", "generation_config.json cannot be read"),
    ],
)
def test_damaged_files(folder, name, content, match):
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=match):
        Tokenizer.from_folder(folder)


def test_a_template_file_that_is_no_text(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="UTF-8"):
        Tokenizer.from_folder(folder)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match="neither tokenizer.json nor tokenizer.model"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_model_that_is_none(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's form
    with pytest.raises(CheckpointError, match="no SentencePiece model"):
        Tokenizer.from_folder(tmp_path)


# --- transformers


def llama2_like() -> Engine:
    """A tokenizer.json of Llama 2's make: SentencePiece's way of writing, byte fallback."""
    vocab = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
    ]
    engine = Engine(
        models.BPE(
            vocab={token: i for i, token in enumerate(vocab)},
            merges=[("▁", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    engine.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    engine.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    engine.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")]
    )
    engine.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return engine


def hf_tokenizer(**options: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=llama2_like(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **options,
    )


def test_from_transformers_copies_and_leaves_the_original():
    theirs = hf_tokenizer()
    theirs("a b", max_length=2, truncation=True)  # leaves truncation switched on in its backend
    before = theirs.backend_tokenizer.to_str()
    ours = Tokenizer.from_transformers(theirs)
    assert theirs.backend_tokenizer.to_str() == before
    assert (ours.bos_token_id, ours.eos_token_id, ours.unk_token_id) == (1, 2, 0)
    assert (ours.pad_token_id, ours.add_bos, ours.stop_ids) == (None, True, {2})
    assert ours.chat_template is None
    ours.encode("a</s>", parse_special=False)
    for text in random_texts(200, ["a", "b", " ", "  ", "½", "</s>", "<s>"]):
        ids = theirs(text, truncation=False)["input_ids"]
        if not text.startswith("<s>"):  # which they double
            assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)
        assert ours.decode(ids, skip_special=True) == theirs.decode(ids, skip_special_tokens=True)


def test_str_tokens_of_a_sentencepiece_like_tokenizer_json():
    ours = Tokenizer.from_transformers(hf_tokenizer())
    assert ours.str_tokens(ours.encode("a ab½")) == ["<s>", " a", " a", "b", "\ufffd", "\ufffd"]


def test_several_templates_of_transformers():
    theirs = hf_tokenizer(chat_template={"default": "D", "tools": "T"})
    assert Tokenizer.from_transformers(theirs).chat_template == "D"


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(InputError, match="not a fast tokenizer"):
        Tokenizer.from_transformers(object())


# --- chat


CHAT = [{"role": "user", "content": " Mary"}]


def test_chat_equals_transformers():
    from transformers import PreTrainedTokenizerFast

    chat = [*CHAT, {"role": "assistant", "content": "<b>&½"}]
    template = (
        "{% for message in messages %}\n    {% if loop.index > 9 %}{% break %}{% endif %}\n"
        "{{ message | tojson }}{{ message | tojson(indent=2) }}\n"
        "{% generation %}{{ eos_token }}{% endgeneration %}{% endfor %}\n"
        "{{ strftime_now('%Y') }}{{ tools is none }}{{ add_generation_prompt }}"
    )
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=llama2_like(), eos_token="</s>", chat_template=template
    )
    ours = Tokenizer.from_transformers(theirs)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert ours.render_chat(chat, add_generation_prompt=prompt) == expected


def test_encoding_a_chat_leaves_bos_to_the_template():
    assert BPE.render_chat(CHAT) == "<s>[user] Mary<|eot_id|>[assistant]"
    ids = BPE.encode_chat(CHAT)
    assert ids.count(0) == 1 and ids[0] == 0 and MARY in ids and 2 in ids
    without = Tokenizer.from_gguf(bpe_metadata())
    without.chat_template = "{{ messages[0].content }}"
    assert without.encode_chat(CHAT) == [MARY]
    assert BPE.encode_chat(CHAT, add_generation_prompt=False)[-1] == 2


def test_a_template_that_refuses():
    with pytest.raises(InputError, match="no tools here"):
        BPE.render_chat([{"role": "tool", "content": "x"}])


def test_no_template():
    tokenizer = Tokenizer.from_gguf(bpe_metadata())
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        tokenizer.render_chat(CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_what_the_sandbox_forbids(template):
    tokenizer = Tokenizer.from_gguf(bpe_metadata())
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="refuses") as caught:
        tokenizer.render_chat(CHAT)
    assert isinstance(
        caught.value.__cause__,
        jinja2.exceptions.SecurityError | OverflowError | jinja2.UndefinedError,
    )
    assert CHAT == [{"role": "user", "content": " Mary"}]


def test_a_template_that_is_no_jinja():
    tokenizer = Tokenizer.from_gguf(bpe_metadata())
    tokenizer.chat_template = "\n{% for %}"
    with pytest.raises(CheckpointError, match="line 2"):
        tokenizer.render_chat(CHAT)
