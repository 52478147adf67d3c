"""`lp.capture`: the right rows, whatever the prompts, the positions and the batches."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make
from torch import Tensor

import llama_probe as lp
from llama_probe.capturing import collect
from llama_probe.capturing.plan import batches, shards

TEXTS = ["Mary gave it to John.", "a", "The cat sat on the mat, again.", "Yes, two"]
STREAM = "blocks.*.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> lp.Llama:
    return lp.load("tiny-moe", device="cpu", progress=False)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal to 1e-5 of the largest value."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def alone(model: lp.Llama, text: str, hook: str) -> Tensor:
    _, cache = model.run_with_cache(text, names_filter=hook)
    return cache[hook][0]


def test_rows_are_those_of_each_prompt_alone(model: lp.Llama) -> None:
    hooks = ["hook_embed", STREAM, "blocks.1.attn.hook_z", "blocks.2.mlp.hook_router_logits"]
    acts = lp.capture(model, TEXTS, hooks, positions="all")
    assert acts.hooks == tuple(model.hook_names(hooks))
    for number, text in enumerate(TEXTS):
        some = acts.select(prompts=number)
        assert some.index["pos"].tolist() == list(range(len(some)))
        assert some.index["token"].tolist() == model.to_str_tokens(text)
        for hook in acts.hooks:
            assert close(some[hook], alone(model, text, hook))


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "qwen3-moe", "llama4-scout"])
def test_token_ids_of_every_family(family: str) -> None:
    ours = make(family)
    tokens = torch.randint(3, 199, (5, 9))
    acts = lp.capture(ours, tokens, None, positions=[-1, 2], batch_tokens=20)
    _, cache = ours.run_with_cache(tokens, names_filter=list(acts.hooks))
    for hook in acts.hooks:
        for at, pos in (("-1", -1), ("2", 2)):
            expected = cache[hook][:, pos]
            if expected.is_floating_point():
                assert close(acts.select(at=at)[hook], expected)
            else:
                assert (acts.select(at=at)[hook] == expected).all()


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 200), st.sampled_from([None, "mean", "max"]), st.randoms())
def test_neither_batches_nor_the_order_of_prompts_change_anything(
    model: lp.Llama, batch_tokens: int, pool: Any, random: Any
) -> None:
    order = random.sample(range(len(TEXTS)), len(TEXTS))
    whole = lp.capture(model, TEXTS, STREAM, slice(0, 3), pool=pool)
    other = lp.capture(
        model, [TEXTS[i] for i in order], STREAM, slice(0, 3), pool=pool, batch_tokens=batch_tokens
    )
    for place, number in enumerate(order):
        for hook in whole.hooks:
            mine, its = whole.select(prompts=number)[hook], other.select(prompts=place)[hook]
            assert close(mine, its)


def test_pooled_rows_are_mean_and_maximum(model: lp.Llama) -> None:
    hook = "blocks.3.hook_resid_post"
    for pool, reduce in (("mean", lambda x: x.mean(0)), ("max", lambda x: x.amax(0))):
        acts = lp.capture(model, TEXTS, hook, ["all", slice(1, None)][:1], pool=pool)
        assert acts.index["at"].tolist() == [f"{pool} of all"] * len(TEXTS)
        assert (acts.index["pos"] == -1).all() and (acts.index["token"] == "").all()
        for row, text in zip(acts[hook], TEXTS, strict=True):
            assert close(row, reduce(alone(model, text, hook)))


def test_positions_of_a_conversation(model: lp.Llama) -> None:
    asked = ["last of the instruction", "last of the template", "response", -1]
    rows = [
        {"q": "Do the work.", "answer": "It is done"},
        {"q": "Find Mary 7", "answer": "No"},
    ]
    frame = pd.DataFrame(rows)
    acts = lp.capture(
        model, frame, STREAM, asked, text="q", template="chat", response="answer", system="Be brief"
    )
    for number, row in frame.iterrows():
        some = acts.select(prompts=number).index
        prompt = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": row.q}]
        rendered = model.tokenizer.render_chat(prompt)
        ids = model.tokenizer.encode(rendered, prepend_bos=False)
        before = rendered[: rendered.index(row.q) + len(row.q)]
        end = len(model.tokenizer.encode(before, prepend_bos=False)) - 1
        answer = model.tokenizer.encode(row.answer, prepend_bos=False)
        by_name = some.groupby("at", sort=False)["pos"].agg(list).to_dict()
        assert by_name == {
            "last of the instruction": [end],
            "last of the template": [len(ids) - 1],
            "response": list(range(len(ids), len(ids) + len(answer))),
            "-1": [len(ids) + len(answer) - 1],
        }
        assert acts.prompts["fed"][number] == rendered + row.answer
        assert acts.prompts["ids"][number] == ids + answer


def test_answers_of_the_model_are_those_of_generate(model: lp.Llama) -> None:
    prompts = ["Please open the letter.", "Say yes"]
    acts = lp.capture(
        model, prompts, STREAM, "response", template="chat", max_new_tokens=6, batch_tokens=30
    )
    assert acts.prompts["response"].tolist() == model.generate(
        prompts, template="chat", max_new_tokens=6
    )
    for number in range(2):
        some = acts.select(prompts=number)
        ids = torch.tensor([acts.prompts["ids"][number]])
        _, cache = model.run_with_cache(ids, names_filter=STREAM)
        new = len(some)
        assert "".join(some.index["token"]) == acts.prompts["response"][number]
        for hook in acts.hooks:
            assert close(some[hook], cache[hook][0, -new:])


def test_conversations_and_what_is_recorded(model: lp.Llama) -> None:
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Go on"},
    ]
    acts = lp.capture(model, [chat], STREAM, "last of the instruction")
    assert acts.prompts["text"].tolist() == ["Go on"]
    assert acts.prompts["messages"][0] == chat
    assert acts.prompts["fed"][0] == model.tokenizer.render_chat(chat)
    assert acts.index["token"].tolist() == model.to_str_tokens("Go on")[-1:]
    assert acts.record["model"] == "tiny-moe" and len(acts.record["model_hash"]) == 64
    assert acts.record["positions"] == ["last of the instruction"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_files_and_tables_are_the_same(model: lp.Llama, tmp_path: Path, suffix: str) -> None:
    frame = pd.DataFrame({"statement": TEXTS, "label": [1, 0, 1, 0]})
    path = tmp_path / f"prompts.{suffix}"
    if suffix == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        getattr(frame, f"to_{suffix}")(path, index=False)
    hook = "blocks.0.hook_resid_post"
    expected = lp.capture(model, TEXTS, hook)
    for given_as in (
        path,
        str(path),
        frame,
        frame.to_dict("records"),
        iter(frame.to_dict("records")),
    ):
        acts = lp.capture(model, given_as, hook, text="statement")
        assert (acts[hook] == expected[hook]).all()
        assert acts.prompts["label"].tolist() == [1, 0, 1, 0]


def test_only_the_layers_down_to_the_deepest_hook_run(model: lp.Llama) -> None:
    ran: Counter[str] = Counter()
    watched = [model.blocks[i].mlp.register_forward_hook for i in range(4)]
    handles = [
        watch(lambda *_, layer=layer: ran.update([f"mlp {layer}"]))
        for layer, watch in enumerate(watched)
    ]
    try:
        lp.capture(model, TEXTS, ["blocks.1.hook_resid_mid", "blocks.0.attn.hook_z"])
    finally:
        for handle in handles:
            handle.remove()
    looked = 1  # one token through all layers tells the shapes
    assert ran == {"mlp 0": 1 + looked, "mlp 1": looked, "mlp 2": looked, "mlp 3": looked}
    assert not any(point.listening for point in model.hook_points())


def test_precision_and_integers(model: lp.Llama) -> None:
    hooks = ["blocks.0.hook_resid_post", "blocks.0.mlp.hook_expert_indices"]
    full, half = (lp.capture(model, TEXTS, hooks, dtype=dtype) for dtype in (None, "bfloat16"))
    assert half[hooks[0]].dtype == torch.bfloat16
    assert (half[hooks[0]] == full[hooks[0]].bfloat16()).all()
    assert half[hooks[1]].dtype == torch.int64
    assert half.numpy(hooks[0]).dtype == np.float32
    table = full.frame(hooks[0])
    assert table.shape == (len(TEXTS), 4 + model.cfg.d_model)
    assert table["5"].tolist() == full[hooks[0]][:, 5].tolist()


def test_moments_are_those_of_all_rows(model: lp.Llama) -> None:
    acts = lp.capture(model, TEXTS, STREAM, "all")
    x = acts["blocks.2.hook_resid_post"].double()
    moments = acts.moments("blocks.2.hook_resid_post", size=5)
    assert moments.n == len(x)
    assert torch.allclose(moments.mean, x.mean(0)) and torch.allclose(moments.covariance, x.T.cov())


def test_a_batch_that_does_not_fit_is_halved_and_says_so(
    model: lp.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lp.capture(model, TEXTS, STREAM, "all")
    run, sizes = collect.collect, []

    def limited(model: lp.Llama, ids: Any, *rest: Any) -> Any:
        sizes.append(len(ids))
        if len(ids) > 1:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return run(model, ids, *rest)

    monkeypatch.setattr(collect, "collect", limited)
    with pytest.warns(UserWarning, match="3 batches did not fit into memory and were halved"):
        halved = lp.capture(model, TEXTS, STREAM, "all")
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    for hook in whole.hooks:
        assert close(whole[hook], halved[hook])


def test_one_prompt_that_does_not_fit_gets_a_sentence(
    model: lp.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(collect, "collect", full)
    with pytest.raises(lp.InputError, match=r"prompt 2 has \d+ tokens and does not fit"):
        lp.capture(model, TEXTS, STREAM)


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    model: lp.Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(collect, "collect", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        lp.capture(model, TEXTS, STREAM)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120))
def test_batches_hold_every_prompt_once_and_no_more_than_allowed(
    lengths: list[int], most: int
) -> None:
    planned = batches(lengths, most)
    assert sorted(prompt for batch in planned for prompt in batch) == list(range(len(lengths)))
    for batch in planned:
        longest = max(lengths[prompt] for prompt in batch)
        assert len(batch) == 1 or longest * len(batch) <= most
    in_shards = shards(planned, lengths, [1] * len(lengths))
    assert [batch for shard in in_shards for batch in shard] == planned


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompts": []}, "there are no prompts: the list is empty"),
    ({"prompts": [""]}, "prompt 0: it is empty"),
    ({"prompts": ["a", 3]}, "all texts, all dictionaries, or all conversations .* int, str"),
    ({"prompts": 3}, "prompts are a int, but should be texts"),
    ({"prompts": [{"role": "user", "content": "a"}]}, "put it into a list of prompts"),
    ({"prompts": [{"statement": "a"}]}, "no column 'text'; its columns are statement"),
    ({"prompts": [{"txt": "a"}], "text": "text"}, "did you mean 'txt'"),
    ({"prompts": "none.csv"}, r"none\.csv does not exist"),
    ({"prompts": [{"text": None}]}, "row 0 of the dictionaries has no prompt"),
    ({"prompts": [{"text": "a", "fed": 1}]}, "a column 'fed', which results use"),
    ({"template": "chatty"}, "template is 'chatty', but should be 'chat' or None"),
    ({"system": "Be kind"}, "system goes with template='chat'"),
    ({"hooks": "blocks.0.hook_resid_pots"}, "did you mean 'blocks.0.hook_resid_post'"),
    ({"hooks": "blocks.0.attn.hook_pattern"}, "relates two tokens and has no row"),
    ({"positions": 99}, "positions is '99', but prompt 0 has 5 tokens"),
    ({"positions": slice(50, 60)}, "positions is '50:60', but prompt 0 has"),
    ({"positions": "respones"}, "did you mean 'response'"),
    ({"positions": "response"}, "prompt 0 has no answer"),
    ({"positions": 1.5}, "positions has 1.5, but should be whole numbers"),
    ({"positions": []}, "positions is an empty list"),
    ({"pool": "sum"}, "pool is 'sum', but should be 'mean' or 'max'"),
    ({"pool": "mean", "positions": slice(0, 4, 2)}, "give slices no step"),
    ({"response": "answer"}, "there is no column 'answer' with answers"),
    ({"dtype": "int8"}, "dtype is 'int8', but should be one of float32, float16, bfloat16"),
    ({"prompts": torch.tensor([[1, 2]]), "template": "chat"}, "but the prompts are tokens"),
    ({"prompts": ["x " * 2000]}, r"prompt 0 has \d+ tokens, but the context is 1024"),
]


@pytest.mark.parametrize(("wrong", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_wrong_input_gets_a_sentence(model: lp.Llama, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(lp.LlamaProbeError, match=sentence):
        lp.capture(model, **{"prompts": ["Mary gave it"], **wrong})


def test_a_selection_of_nothing_and_a_hook_that_was_not_captured(model: lp.Llama) -> None:
    acts = lp.capture(model, TEXTS, STREAM)
    with pytest.raises(lp.InputError, match="nothing is left of the selection: positions are -1"):
        acts.select(at="-2")
    with pytest.raises(lp.InputError, match="'blocks.0.hook_resid_pre' was not captured; did you"):
        acts["blocks.0.hook_resid_pre"]
    with pytest.raises(lp.InputError, match="prompts are rows from 0 to 3"):
        acts.select(prompts=[4])
    assert acts.select(layers=[1, 3]).hooks == acts.hooks[1::2]


def test_a_set_of_a_hundred_shows_its_size_and_its_progress(
    model: lp.Llama, capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        lp.capture(model, TEXTS * 25, "blocks.0.hook_resid_post")
    told = capsys.readouterr().err
    assert "100 prompts, " in told and "100 rows of 1 hooks: 0.1 MB to memory" in told
    assert "token/s" in told
    lp.capture(model, TEXTS * 25, "blocks.0.hook_resid_post", progress=False)
    assert capsys.readouterr().err == ""
