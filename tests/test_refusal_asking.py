"""Requests under an edit: what is read once for all, in batches, is what each alone would be."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import llama_probe as lp
from llama_probe.capturing.prompts import Encoded
from llama_probe.errors import InputError
from llama_probe.model.cache import KVCache
from llama_probe.model.llama import Llama
from llama_probe.refusal.asking import Asked, answer_tokens, answers, ask, next_logits
from tests.tiny import make, tokens

BEGIN = "When Mary and John went to the store, "  # past the windows of 12 and the chunks of 16
TEXTS = [BEGIN + end for end in ("she", "he gave a drink of water to", "x", "Mary asked: ", "his")]


@pytest.fixture(scope="module")
def tiny_moe() -> Llama:
    return lp.load("tiny-moe")


@pytest.fixture(scope="module")
def requests() -> list[str]:
    """Twelve, of many lengths."""
    frame = lp.prompts.requests("tiny-moe")
    return [text for kind in ("restricted", "same verb", "ordinary")
            for text in frame.loc[frame["kind"] == kind, "text"].head(4)]  # fmt: skip


def reader(family: str, tokenizer: Any) -> Llama:
    model = make(family, vocab_size=tokenizer.vocab_size)
    model.tokenizer = tokenizer
    return model


def edits(d: int) -> list[Any]:
    vector = torch.randn(d, generator=torch.Generator().manual_seed(1))
    return [(), lp.ablate(vector), lp.add(vector, at="blocks.1.hook_resid_pre")]


@torch.no_grad()
def one_by_one(model: Llama, rows: Sequence[Sequence[int]], edit: Any) -> Tensor:
    with model.hooks(edit):
        real = [torch.ones(1, len(row), dtype=torch.bool) for row in rows]
        return torch.cat([
            model(torch.tensor([row]), attention_mask=every)[:, -1]
            for row, every in zip(rows, real, strict=True)
        ])  # fmt: skip


def agrees(model: Llama, asked: Asked, edit: Any) -> bool:
    rows = [one.ids for one in asked.encoded]
    assert len({len(row) for row in rows}) > 1
    found, expected = next_logits(model, asked, edit), one_by_one(model, rows, edit)
    return torch.allclose(found, expected, rtol=0, atol=1e-4)


def fed(model: Llama, asked: Asked) -> int:
    """How many tokens the model reads, padding included."""
    counted: list[int] = []

    def count(x: Tensor, hook: Any) -> None:
        counted.append(x.shape[0] * x.shape[1])

    next_logits(model, asked, [("hook_embed", count)])
    return sum(counted)


@pytest.mark.parametrize("family", ["mixtral", "mistral", "llama4-scout"])
def test_logits_are_those_of_each_request_alone(family: str, tiny_tokenizer: Any) -> None:
    model = reader(family, tiny_tokenizer)
    asked = ask(model, TEXTS, template=None)
    plain = next_logits(model, asked)
    for edit in edits(64):
        assert agrees(model, asked, edit)
        assert not edit or (next_logits(model, asked, edit) - plain).abs().max() > 0.1
    # With nothing in common, nothing is shared, and rows are padded all the same.
    assert agrees(model, ask(model, ["Mary", "she went out", "x"], template=None), ())


def test_logits_in_tiny_moe_s_chat(tiny_moe: Llama, requests: list[str]) -> None:
    asked = ask(tiny_moe, requests)
    assert all(agrees(tiny_moe, asked, edit) for edit in edits(tiny_moe.cfg.d_model))


def test_what_requests_begin_with_is_read_once(tiny_tokenizer: Any) -> None:
    model = reader("llama-gqa", tiny_tokenizer)
    asked = ask(model, [BEGIN + end for end in ("abc", "def", "ghi", "jkl")], template=None)
    n = len(asked.encoded[0].ids)
    assert fed(model, asked) == (n - 3) + 4 * 3
    assert fed(model, asked[[0]]) == n
    same = Asked(["x"] * 2, [asked.encoded[0]] * 2, None, None)
    assert fed(model, same) == (n - 1) + 2  # each keeps a token of its own
    short = ask(model, ["abc", "abd", "abcd"], template=None)
    assert fed(model, short) == 3 * len(short.encoded[-1].ids)  # too little to share


def test_a_first_token_that_also_pads_is_no_padding(tiny_tokenizer: Any) -> None:
    model = reader("llama-gqa", tiny_tokenizer)
    pad = model.pad_token_id
    rows = [[pad, 40, 41, 42, 43, 44, *end] for end in ([7], [8, 9], [10])]
    asked = Asked(["?"] * 3, [Encoded(row, len(row), len(row)) for row in rows], None, None)
    assert agrees(model, asked, ())


def test_an_edit_of_some_positions_is_refused(tiny_moe: Llama, requests: list[str]) -> None:
    asked, vector = ask(tiny_moe, requests), torch.ones(tiny_moe.cfg.d_model)
    for positions in (-1, "prompt", slice(2, 4)):
        with pytest.raises(InputError, match="names positions, .*leave positions out"):
            next_logits(tiny_moe, asked, lp.ablate(vector, positions=positions))
    next_logits(tiny_moe, asked[[0]], lp.bias_router({0: {0: 1.0}}))


def test_there_must_be_requests(tiny_moe: Llama, requests: list[str]) -> None:
    with pytest.raises(InputError, match="there are no requests"):
        next_logits(tiny_moe, ask(tiny_moe, requests)[[]])


@pytest.mark.slow
def test_answers_are_those_of_each_request_alone(tiny_moe: Llama, requests: list[str]) -> None:
    asked = ask(tiny_moe, requests)
    edit = lp.add(torch.ones(tiny_moe.cfg.d_model), 0.2, at="blocks.2.hook_resid_pre")
    for hooks in ((), edit):
        alone = [
            tiny_moe.generate(text, template="chat", max_new_tokens=12, fwd_hooks=hooks)
            for text in requests
        ]
        assert answers(tiny_moe, asked, hooks, max_new_tokens=12) == alone
        assert len(set(alone)) > 6  # so that their order is seen
    # The tokens end with the one that ends an answer.
    stop = tiny_moe.tokenizer.stop_ids
    assert all(len(row) == 12 or int(row[-1]) in stop
               for row in answer_tokens(tiny_moe, asked, max_new_tokens=12))  # fmt: skip


def test_a_system_message_and_conversations(tiny_moe: Llama, requests: list[str]) -> None:
    plain, told = ask(tiny_moe, requests), ask(tiny_moe, requests, system="Be brief.")
    assert agrees(tiny_moe, told, ())
    assert not torch.equal(next_logits(tiny_moe, told), next_logits(tiny_moe, plain))
    chats = ask(tiny_moe, [[{"role": "user", "content": text}] for text in requests])
    assert chats.texts == requests and chats.encoded == plain.encoded


@pytest.mark.parametrize("way", [next_logits, answers])
def test_no_hook_survives_an_exception(way: Any, tiny_moe: Llama, requests: list[str]) -> None:
    def fail(x: Tensor, hook: Any) -> Tensor:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        way(tiny_moe, ask(tiny_moe, requests), [("blocks.1.hook_mlp_out", fail)])
    assert not [name for name, point in tiny_moe.hook_dict.items() if point.listening]


# The cache of one prompt, for many


def read(model: Llama, row: Tensor, **options: Any) -> KVCache:
    cache = KVCache(model.cfg.n_layers)
    with torch.no_grad():
        model(row, kv_cache=cache, **options)
    return cache


def held(cache: KVCache) -> list[Tensor]:
    return [x for x in (*cache._keys, *cache._values) if x is not None]


def test_a_repeated_cache_leaves_the_first_as_it_was() -> None:
    model = make("llama-gqa")
    cache = read(model, tokens(1, 10))
    before = [x.clone() for x in held(cache)]
    wide, ends = cache.repeated(3), tokens(3, 4, seed=1)
    with torch.no_grad():
        first = model(ends, kv_cache=wide)
        assert (wide.length, cache.length) == (14, 10)
        assert all(torch.equal(a, b) for a, b in zip(held(cache), before, strict=True))
        assert not {x.data_ptr() for x in held(cache)} & {x.data_ptr() for x in held(wide)}
        assert torch.equal(model(ends, kv_cache=cache.repeated(3)), first)
        whole = torch.cat((tokens(1, 10).expand(3, -1), ends), dim=1)
        assert torch.allclose(first, model(whole)[:, -4:], atol=1e-4)


def test_a_repeated_cache_knows_what_is_padding() -> None:
    model = make("llama-gqa")
    mask = torch.arange(10)[None] >= 3
    cache, ends = read(model, tokens(1, 10), attention_mask=mask).repeated(2), tokens(2, 4, seed=1)
    with torch.no_grad():
        whole = torch.cat((tokens(1, 10)[:, 3:].expand(2, -1), ends), dim=1)
        expected = model(whole)[:, -4:]
        assert torch.allclose(model(ends, kv_cache=cache), expected, atol=1e-4)


def test_what_cannot_be_repeated() -> None:
    model = make("llama-gqa")
    caches = (KVCache(3), read(model, tokens(2, 5)), read(model, tokens(1, 5), stop_at_layer=1))
    for cache in caches:
        with pytest.raises(InputError, match="a cache can be repeated if it is of one prompt"):
            cache.repeated(2)
