"""The routing explorer through its traits, without a browser."""

import numpy as np
import pytest
from tiny import make

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.interventions import ablate_experts, force_experts
from llama_probe.model.config import MoeConfig
from llama_probe.model.llama import Llama
from llama_probe.widgets.routing import RoutingExplorer
from llama_probe.widgets.selection import Selection

TASKS = ("facts", "arithmetic", "translation")


@pytest.fixture(scope="module")
def model():
    return lp.load("tiny-moe", progress=False)


@pytest.fixture(scope="module")
def texts():
    exam = lp.prompts.planted()["exam"]
    return [q["prompt"] + q["answer"] for task in TASKS for q in exam[task][:6]]


@pytest.fixture
def explorer(model, texts):
    made = RoutingExplorer(model, texts, [task for task in TASKS for _ in range(6)])
    yield made
    made.close()


def z(explorer, name):
    return np.array(explorer.figure(name).data[0].z, dtype=float)


def router_scores(model, text, layer):
    _, cache = model.run_with_cache(text, names_filter=lp.act_name("router_logits", layer))
    return cache["router_logits", layer][0].sigmoid().numpy()


def test_load_and_domains_show_the_planted_experts(explorer):
    planted = lp.prompts.planted()
    layer = planted["planted_layer"]
    for task in TASKS:
        expert = planted["expert_of_domain"][task]
        explorer.select(layer=layer, expert=expert)
        shares = explorer.figure("domains").data[0].y
        assert TASKS[int(np.argmax(shares))] == task and max(shares) > 0.7
    assert z(explorer, "load").shape == (4, 8)


def test_scores_of_a_prompt_and_of_a_token(model, texts, explorer):
    explorer.select(prompt=7, layer=1, expert=3, pos=2)
    expected = router_scores(model, texts[7], 1)
    np.testing.assert_allclose(z(explorer, "tokens"), expected, atol=1e-6)
    np.testing.assert_allclose(explorer.figure("strip").values, expected[:, 3], atol=1e-6)
    way = np.stack([router_scores(model, texts[7], layer)[2] for layer in range(4)])
    np.testing.assert_allclose(z(explorer, "route"), way, atol=1e-6)
    explorer._viewers["route"]._hear(None, {"click": {"x": 5, "y": 2}}, None)
    assert (explorer.layer, explorer.expert) == (2, 5)


def test_the_card_counts_an_experts_tokens(model, texts, explorer):
    explorer.select(layer=2, expert=2)
    taken: list[int] = []
    for text in texts:
        ids = model.to_tokens(text)[0]
        _, cache = model.run_with_cache(text, names_filter=lp.act_name("expert_indices", 2))
        taken += ids[(cache["expert_indices", 2][0] == 2).any(-1)].tolist()
    counts = np.bincount(taken)
    bars = explorer.figure("card").data[0]
    np.testing.assert_allclose(bars.x, np.sort(counts)[::-1][: len(bars.x)] / len(taken), atol=1e-6)


def test_what_an_expert_writes_is_a_mean_of_direct_attributions(model, texts, explorer):
    explorer.select(layer=2, expert=2)
    bars = explorer.figure("promotes").data[0]
    token_id = int(explorer._promoted(2, 2).token_id.iloc[0])
    values = []
    for text in texts[:16]:
        _, cache = model.run_with_cache(text, names_filter=lp.act_name("expert_indices", 2))
        for pos in (cache["expert_indices", 2][0, :, 0] == 2).nonzero().flatten().tolist():
            parts = lp.direct_logit_attribution(model, text, token_id, pos=pos, experts=True)
            of_expert = parts[(parts.layer == 2) & (parts.expert == 2)]
            values.append(float(of_expert.value.sum()))
    assert bars.x[0] == pytest.approx(np.mean(values), abs=1e-3)


@pytest.mark.parametrize(
    ("edit", "factory"), [("ablate", ablate_experts), ("force", force_experts)]
)
def test_an_edit_is_shown_beside_the_plain_model(model, texts, explorer, edit, factory):
    explorer.select(prompt=7, layer=2, expert=2)
    assert explorer.figure("effect") is None
    explorer.edit = edit
    text = texts[7]
    plain, edited = explorer.figure("effect").data
    with model.hooks(factory({2: [2]})):
        expected = model(text)[0, -1].softmax(-1)
        loss = float(model(text, return_type="loss"))
    top = explorer._effects(edit, 7, 2, 2)[0]
    ids = [model.to_single_token(token) for token in top.token]
    np.testing.assert_allclose(edited.y, expected[ids], atol=1e-6)
    np.testing.assert_allclose(plain.y, model(text)[0, -1].softmax(-1)[ids], atol=1e-6)
    assert f"edited {loss:.3f}." in explorer._status.value
    explorer.expert = 0
    assert "nats a token" in explorer._status.value
    explorer.edit = "none"
    assert explorer.figure("effect") is None


def test_another_prompt_has_other_positions(explorer):
    explorer.select(prompt=0, pos=9)
    explorer.prompt = 8
    assert len(explorer.labels["pos"]) == len(explorer.figure("strip").tokens)
    assert explorer.pos < len(explorer.labels["pos"])


@pytest.mark.parametrize("family", ["mixtral", "qwen2-moe", "llama4-maverick"])
def test_other_families_and_dense_layers(family, tiny_tokenizer):
    model = make(family, vocab_size=tiny_tokenizer.vocab_size)
    model.tokenizer = tiny_tokenizer
    explorer = RoutingExplorer(model, ["Mary", "ab John", "x"])
    explorer.layer = 1
    dense = [layer for layer, is_moe in enumerate(model.cfg.moe_layers) if not is_moe]
    for layer in dense:
        explorer.layer = layer
    explorer.edit = "ablate"
    assert explorer.figure("effect") is not None
    assert (explorer.figure("together") is None) == (model.cfg.moe.top_k == 1)
    page = explorer.linked()
    assert page.arrays["scores"].shape[0] == model.cfg.n_layers
    explorer.prompt = 2  # one token and perhaps BOS
    explorer.close()


def test_a_model_without_experts_is_refused():
    with pytest.raises(InputError, match="mixture"):
        RoutingExplorer(make("llama-gqa"), ["a"])


def test_a_shared_selection_of_a_larger_model(model, texts, explorer):
    selection = Selection(layer=29, expert=100)
    other = RoutingExplorer(model, texts[:2], selection=selection)
    assert other.layer < 4 and other.expert < 8
    selection.choose(layer=3, expert=1)
    assert (other.layer, other.expert) == (3, 1)


def test_the_page_holds_what_clicks_would_show(explorer):
    arrays = explorer.linked().arrays
    for layer, expert, pos in ((2, 2, 3), (0, 5, 1)):
        explorer.select(layer=layer, expert=expert, pos=pos)
        np.testing.assert_allclose(z(explorer, "tokens"), arrays["scores"][layer])
        np.testing.assert_allclose(z(explorer, "route"), arrays["moe_scores"][:, pos])
        domains = np.array(explorer.figure("domains").data[0].y)
        np.testing.assert_allclose(domains, arrays["by_label"][layer, expert], atol=1e-6)
        card = np.array(explorer.figure("card").data[0].x)
        np.testing.assert_allclose(card, arrays["card"][layer, expert][: len(card)], atol=1e-6)
        shown = z(explorer, "transition")
        np.testing.assert_allclose(shown, arrays["transition"][layer], atol=1e-6)


@pytest.mark.slow
def test_48_layers_of_128_experts_stay_light(tiny_tokenizer, tmp_path):
    moe = MoeConfig(n_experts=128, top_k=8, d_expert=4, rule="softmax", renormalise=True)
    cfg = lp.LlamaConfig(
        n_layers=48, d_model=16, n_heads=2, d_mlp=8, d_vocab=tiny_tokenizer.vocab_size, n_ctx=64,
        moe=moe,
    )  # fmt: skip
    model = Llama(cfg)
    model.tokenizer = tiny_tokenizer
    text = "a quick brown fox jumps over the lazy dog and sleeps on it"
    prompts = [text[i % 8 :] for i in range(80)]
    explorer = RoutingExplorer(model, prompts)
    assert len(explorer._routes.tokens) >= 4096
    for name, viewer in explorer._viewers.items():
        assert len(viewer.spec) < 2_000_000, name
    assert z(explorer, "load").shape == (48, 128)
    assert explorer.to_html(tmp_path / "page.html").stat().st_size < 8_000_000
