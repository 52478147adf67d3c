"""Generation: what is probed is what generates."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.model.generation import _choose, _nucleus
from llama_probe.model.llama import Llama

TEXTS = ["one", "a longer text", "and another"]
FAMILIES = ("llama-gqa", "mistral", "mixtral", "llama4-scout", "qwen2-moe")
CHAT = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tiny_tokenizer) -> Llama:
    import copy

    model = tiny.make(request.param, vocab_size=tiny_tokenizer.vocab_size)
    model.tokenizer = copy.copy(tiny_tokenizer)
    model.tokenizer.chat_template = CHAT
    return model


def naive(model: Llama, text: str, steps: int, hooks: Any = ()) -> list[int]:
    """Greedy decoding by full forward passes."""
    tokens = model.to_tokens(text)
    for _ in range(steps):
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    return tokens[0, -steps:].tolist()


def test_greedy_in_a_batch_equals_full_passes_alone(model):
    rows = model.generate(TEXTS, max_new_tokens=8, stop_tokens=[], return_type="tokens")
    assert [row.tolist() for row in rows] == [naive(model, text, 8) for text in TEXTS]


def test_hooks_act_in_every_step(model):
    seen = []

    def push(tensor: Tensor, hook: Any) -> Tensor:
        seen.append(tensor.shape[1])
        return tensor + 0.5

    hooks = [("blocks.1.hook_mlp_out", push)]
    (row,) = model.generate(
        TEXTS[:1], max_new_tokens=6, stop_tokens=[], fwd_hooks=hooks, return_type="tokens"
    )
    assert seen == [model.to_tokens(TEXTS[0]).shape[1], 1, 1, 1, 1, 1]
    assert row.tolist() == naive(model, TEXTS[0], 6, hooks)
    assert not any(point.has_hooks() for point in model.hook_points())


def test_a_stop_token_ends_a_row_and_the_others_go_on(model):
    first = naive(model, TEXTS[0], 8)
    stop = first[2]
    rows = model.generate(TEXTS, max_new_tokens=8, stop_tokens=[stop], return_type="tokens")
    assert rows[0].tolist() == first[: first.index(stop) + 1]
    for row, text in zip(rows[1:], TEXTS[1:], strict=True):
        expected = naive(model, text, 8)
        end = expected.index(stop) + 1 if stop in expected else 8
        assert row.tolist() == expected[:end]


def test_text_out_for_text_in(model):
    texts = model.generate(TEXTS, max_new_tokens=4, stop_tokens=[])
    assert len(texts) == 3 and all(isinstance(text, str) for text in texts)
    assert model.generate(TEXTS[0], max_new_tokens=4, stop_tokens=[]) == texts[0]


def test_sampling_is_seeded(model):
    options: dict[str, Any] = {"max_new_tokens": 8, "stop_tokens": [], "return_type": "tokens"}
    draws = [model.generate(TEXTS, temperature=1.5, seed=s, **options) for s in (1, 1, 2)]
    flat = [torch.cat(draw).tolist() for draw in draws]
    assert flat[0] == flat[1] != flat[2]


def test_top_k_of_one_is_greedy(model):
    options: dict[str, Any] = {"max_new_tokens": 5, "stop_tokens": [], "return_type": "tokens"}
    greedy = model.generate(TEXTS, **options)
    for sampled in (
        model.generate(TEXTS, temperature=1.0, top_k=1, seed=0, **options),
        model.generate(TEXTS, temperature=1.0, top_p=1e-6, seed=0, **options),
    ):
        assert torch.equal(torch.cat(greedy), torch.cat(sampled))


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p():
    probs = torch.tensor([[0.1, 0.5, 0.25, 0.15]])
    assert _nucleus(probs.log(), 0.5).tolist() == [[False, True, False, False]]
    assert _nucleus(probs.log(), 0.51).tolist() == [[False, True, True, False]]
    assert _nucleus(probs.log(), 1.0).all()


def test_sampling_follows_the_probabilities():
    probs = torch.tensor([0.6, 0.3, 0.1])
    logits = probs.log().expand(20_000, 3)
    random = torch.Generator().manual_seed(0)
    drawn = _choose(logits, 1.0, None, None, random).bincount(minlength=3) / 20_000
    torch.testing.assert_close(drawn, probs, atol=0.015, rtol=0)
    cooled = _choose(logits, 0.5, 2, None, random).bincount(minlength=3) / 20_000
    torch.testing.assert_close(cooled, torch.tensor([0.8, 0.2, 0.0]), atol=0.015, rtol=0)


def test_chat_templates(model):
    prompt = "[user]hello[assistant]"
    options: dict[str, Any] = {"max_new_tokens": 4, "stop_tokens": []}
    expected = model.generate(prompt, **options)
    assert model.generate("hello", template="chat", **options) == expected
    messages = [{"role": "user", "content": "hello"}]
    assert model.generate([messages], **options) == [expected]
    with_system = model.generate("hello", template="chat", system="short", **options)
    assert with_system == model.generate("[system]short" + prompt, **options)


def test_generation_from_tokens_without_a_tokenizer():
    model = tiny.make("llama-gqa")
    tokens = tiny.tokens(batch=2, length=5)
    rows = model.generate(tokens, max_new_tokens=3, return_type="tokens")
    assert [len(row) for row in rows] == [3, 3]
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    masked = model.generate(tokens, max_new_tokens=3, attention_mask=mask, return_type="tokens")
    alone = model.generate(tokens[:1, 1:], max_new_tokens=3, return_type="tokens")
    assert torch.equal(masked[0], alone[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0, "top_k": 0}, "top_k"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 600}, "context is 512"),
        ({"template": "chta"}, "'chat' or None"),
        ({"system": "x"}, "template='chat'"),
    ],
)
def test_bad_options_get_a_sentence(model, options, message):
    with pytest.raises(InputError, match=message):
        model.generate("hello", **options)


def test_prompts_padded_on_the_right_are_refused():
    tokens = tiny.tokens(batch=2, length=5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with pytest.raises(InputError, match="on the left"):
        tiny.make("llama-gqa").generate(tokens, attention_mask=mask, return_type="tokens")


def test_one_conversation_is_not_taken_for_texts(model):
    with pytest.raises(InputError, match="a list of messages"):
        model.generate([{"role": "user", "content": "hello"}], template="chat")


def test_a_mixture_of_texts_and_conversations_is_an_error(model):
    with pytest.raises(InputError, match="mixture"):
        model.generate(["hello", [{"role": "user", "content": "hello"}]])


def test_progress_is_shown_when_asked_for(model, capsys):
    model.generate("hello", max_new_tokens=2, stop_tokens=[], progress=True)
    assert "generate" in capsys.readouterr().err
