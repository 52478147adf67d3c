"""The logit lens explorer: what is set is what is drawn, and what a page holds."""

import json

import ipywidgets
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from test_plots import NASTY, lens_frame

import llama_probe as lp
from llama_probe import plots
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.plots.labels import token
from llama_probe.widgets.lens import LogitLensExplorer
from llama_probe.widgets.selection import Selection

TOKENS = tiny.tokens(batch=1, length=7)[0]
TEXT = "Mary and John went home. Mary and"


@pytest.fixture(scope="module", params=["llama-gqa", "qwen2-moe", "llama4-maverick"])
def model(request) -> Llama:
    return tiny.make(request.param)


@pytest.fixture(scope="module")
def tiny_moe() -> Llama:
    return lp.load("tiny-moe", device="cpu")


def rows(frame, layer, pos, top_k=8):
    here = (frame.layer == layer) & (frame.pos == pos)
    return frame[here & (frame["rank"] < top_k)]


def caption(explorer, name):
    return explorer._viewers[name].caption


def said(explorer):
    return explorer._status.value


def test_setting_layer_and_position_draws_the_list_there(model):
    explorer = LogitLensExplorer(model, TOKENS)
    frame = lp.logit_lens(model, TOKENS, top_k=8)
    assert (explorer.layer, explorer.pos) == (model.cfg.n_layers, 6)
    for layer, pos in ((model.cfg.n_layers, 6), (0, 3), (1, 0)):
        explorer.select(layer=layer, pos=pos)
        (bars,) = explorer.figure("top").data
        wanted = rows(frame, layer, pos)
        np.testing.assert_allclose(bars.x, wanted.prob, rtol=1e-5)
        assert list(bars.text) == [token(text) for text in wanted.token]
    assert explorer.figure("top").layout.xaxis.title.text == "probability (fraction)"
    assert caption(explorer, "top") == f"Likeliest at 0: <{TOKENS[0]}>, after 1 layer"


def test_a_click_in_grid_strip_or_line_selects(model):
    explorer = LogitLensExplorer(model, TOKENS)
    explorer._viewers["grid"]._hear(None, {"click": {"x": 2, "y": 1}}, [])
    assert (explorer.layer, explorer.pos) == (1, 2)
    assert explorer._viewers["grid"].marks == {"x": 2, "y": 1}
    explorer._viewers["prompt"]._hear(None, {"click": {"x": 4}}, [])
    explorer._viewers["ranks"]._hear(None, {"click": {"x": 0, "y": 12}}, [])
    assert (explorer.layer, explorer.pos) == (0, 4)
    assert explorer._viewers["prompt"].marks == {"●": 4}
    assert explorer._viewers["probs"].marks == {"x": 0}
    explorer._viewers["grid"]._hear(None, {"click": {"x": 99, "y": 1}}, [])
    assert explorer.pos == 4


def test_lines_are_the_watched_tokens_ranks_and_probabilities(model):
    explorer = LogitLensExplorer(model, TOKENS, watch=[9, 5])
    frame = lp.logit_lens(model, TOKENS, watch=[9, 5])
    explorer.pos = 3
    ranks, probs = explorer.figure("ranks"), explorer.figure("probs")
    assert [line.name for line in ranks.data] == ["&lt;9&gt;", "&lt;5&gt;"]
    assert ranks.data[0].marker.symbol != ranks.data[1].marker.symbol
    for i, watched in enumerate((9, 5)):
        wanted = frame[(frame.token_id == watched) & (frame.pos == 3)]
        np.testing.assert_array_equal(ranks.data[i].x, range(model.cfg.n_layers + 1))
        np.testing.assert_array_equal(ranks.data[i].y, wanted["rank"] + 1)
        np.testing.assert_allclose(probs.data[i].y, wanted.prob, rtol=1e-5)
    low, high = ranks.layout.yaxis.range
    assert ranks.layout.yaxis.type == "log" and low > high  # the likeliest on top


def test_without_a_watched_token_it_is_the_models_own_prediction(model):
    explorer = LogitLensExplorer(model, TOKENS)
    own = int(model(TOKENS)[0, -1].argmax())
    assert explorer.watch is None and explorer._field.value == f"<{own}>"
    assert explorer.figure("ranks").data[0].y[-1] == 1
    explorer.watch = 7
    assert explorer.watch == (7,) and explorer._field.value == "<7>"
    explorer.watch = None
    assert explorer._field.value == f"<{own}>"


@pytest.mark.parametrize("at", ["resid_mid", "resid_post", "attn_out", "mlp_out"])
def test_another_site_is_run_live(model, at):
    explorer = LogitLensExplorer(model, TOKENS)
    explorer.at = at
    assert explorer.layer == model.cfg.n_layers - 1  # no row of the output alone
    frame = lp.logit_lens(model, TOKENS, at=at, top_k=8)
    np.testing.assert_allclose(
        explorer.figure("top").data[0].x, rows(frame, explorer.layer, 6).prob, rtol=1e-5
    )
    assert explorer.figure("grid").layout.yaxis.title.text == "layer"
    assert caption(explorer, "top").endswith(f"{at} of layer {explorer.layer}")


def test_only_sites_that_the_model_has_are_offered(model):
    explorer = LogitLensExplorer(model, TOKENS)
    menu = next(box for box in explorer.children[0].children if box.description == "Site")
    has_shared = any("hook_shared_out" in name for name in model.hook_dict)
    assert ("shared_out" in menu.options) == has_shared
    with pytest.raises(InputError, match="at is 'resid', but should be one of resid_pre, "):
        explorer.at = "resid"
    assert explorer.at == "resid_pre"


def test_layers_without_the_site_stay_empty():
    model = tiny.make("qwen2-moe")
    explorer = LogitLensExplorer(model, TOKENS, at="shared_out", watch=5)
    for colour in ("prob", "rank"):
        explorer.colour = colour
        z = explorer.figure("grid").data[0].z
        np.testing.assert_array_equal(np.isnan(z[:, 0]), [False, True, False])
    assert explorer.figure("grid").data[0].text[1] == [""] * 7
    explorer.layer = 1
    assert explorer.figure("top") is None
    assert explorer._viewers["top"].layout.display == "none"
    explorer.layer = 2
    assert explorer._viewers["top"].layout.display == ""
    assert np.isnan(explorer.arrays()["top"][1]).all()


def test_the_grid_takes_every_colour(model):
    explorer = LogitLensExplorer(model, TOKENS, watch=[9, 5])
    frame = lp.logit_lens(model, TOKENS, watch=[9, 5])
    top = frame[frame["rank"] == 0]
    shape = model.cfg.n_layers + 1, len(TOKENS)
    wanted = {"prob": top.prob, "entropy": top.entropy, "kl": top.kl}
    wanted["rank"] = np.log10(1 + frame[frame.token_id == 9]["rank"])
    bars = {
        "prob": "probability (fraction)",
        "entropy": "entropy (nats)",
        "kl": "KL to the output (nats)",
        "rank": "log10(1 + rank of &lt;9&gt;)",
    }
    for colour, values in wanted.items():
        explorer.colour = colour
        (trace,) = explorer.figure("grid").data
        z = values.to_numpy().reshape(shape)
        np.testing.assert_allclose(trace.z, z, rtol=1e-4, atol=1e-6)
        assert trace.colorbar.title.text == bars[colour] and trace.zmin == 0
    with pytest.raises(InputError, match="colour is 'logit', but should be one of prob, "):
        explorer.colour = "logit"


def test_a_token_is_typed_and_a_wrong_one_gets_a_sentence(tiny_moe):
    explorer = LogitLensExplorer(tiny_moe, TEXT)
    assert isinstance(explorer._field, ipywidgets.Text)
    explorer._field.value = " Mary"
    mary, john = (tiny_moe.to_single_token(text) for text in (" Mary", " John"))
    assert explorer.watch == (mary,) and explorer._field.value == "·Mary"
    assert [line.name for line in explorer.figure("ranks").data] == ["·Mary"]
    before = explorer.figure("ranks")
    explorer._field.value = "·Mary xyzzy"
    assert 'role="alert"' in said(explorer) and "tokens, not one" in said(explorer)
    assert explorer.watch == (mary,) and explorer.figure("ranks") is before
    explorer._field.value = "·John ·Mary"
    assert explorer.watch == (john, mary) and "alert" not in said(explorer)
    assert len(explorer.figure("probs").data) == 2
    explorer._field.value = ""
    assert explorer.watch is None and len(explorer.figure("probs").data) == 1
    with pytest.raises(InputError, match="not one"):
        explorer.watch = "xyzzy plugh"
    assert explorer.watch is None


def test_without_a_tokenizer_ids_are_typed(model):
    explorer = LogitLensExplorer(model, TOKENS)
    explorer._field.value = "<7> 8"
    assert explorer.watch == (7, 8) and explorer._field.value == "<7> <8>"
    explorer._field.value = "the"
    assert "give ids" in said(explorer) and explorer.watch == (7, 8)
    explorer._field.value = "5000"
    assert "token ids go from 0 to 198" in said(explorer) and explorer.watch == (7, 8)


def test_the_model_runs_once_for_each_choice_of_site_and_tokens(model, monkeypatch):
    runs = []

    def counted(*args, **options):
        runs.append(options["at"])
        return lp.logit_lens(*args, **options)

    monkeypatch.setattr("llama_probe.widgets.lens.logit_lens", counted)
    explorer = LogitLensExplorer(model, TOKENS)
    explorer.select(layer=0, pos=1)
    explorer.colour = "kl"
    assert runs == ["resid_pre"]
    explorer.at = "resid_post"
    explorer.at = "resid_pre"
    assert runs == ["resid_pre", "resid_post"]


def test_one_token_and_a_model_with_text(tiny_moe):
    explorer = LogitLensExplorer(tiny_moe, torch.tensor([5]), top_k=3)
    assert explorer.pos == 0 and len(explorer.figure("top").data[0].x) == 3
    for colour in ("entropy", "kl", "rank", "prob"):
        explorer.colour = colour
    with pytest.raises(InputError, match="one prompt"):
        LogitLensExplorer(tiny_moe, ["a", "b"])


def test_what_another_explorer_selects_out_of_range_is_ignored(model):
    selection = Selection(layer=50, pos=1)
    explorer = LogitLensExplorer(model, TOKENS, selection=selection)
    assert (explorer.layer, explorer.pos) == (model.cfg.n_layers, 1)
    before = explorer.figure("top")
    selection.layer = 50
    assert explorer.figure("top") is before and said(explorer).count("Error") == 0
    selection.pos = 2  # drawn, at the last layer that there is
    frame = lp.logit_lens(model, TOKENS, top_k=8)
    wanted = rows(frame, model.cfg.n_layers, 2)
    np.testing.assert_allclose(explorer.figure("top").data[0].x, wanted.prob, rtol=1e-5)


def test_close_stops_listening(model):
    explorer = LogitLensExplorer(model, TOKENS)
    explorer.close()
    explorer.close()
    before = explorer.figure("top")
    explorer.selection.choose(pos=0, layer=0)
    assert explorer.closed and explorer.figure("top") is before


def test_a_pages_arrays_are_the_live_figures(model):
    explorer = LogitLensExplorer(model, TOKENS, watch=[9, 5])
    arrays = explorer.linked().arrays
    for layer, pos in ((0, 0), (2, 5), (model.cfg.n_layers, 3)):
        explorer.select(layer=layer, pos=pos)
        (bars,) = explorer.figure("top").data
        np.testing.assert_allclose(arrays["top"][layer, pos], bars.x, rtol=1e-5)
        assert arrays["top_tokens"][layer][pos] == list(bars.text)
        for i in range(2):
            for name in ("ranks", "probs"):
                line = explorer.figure(name).data[i].y
                np.testing.assert_allclose(arrays[f"{name}_{i}"][pos], line, rtol=1e-5)


def test_a_page_is_written_with_what_is_watched_now(tiny_moe, tmp_path):
    explorer = LogitLensExplorer(tiny_moe, TEXT)
    explorer.watch = [" Mary", " John"]
    page = explorer.to_html(tmp_path / "lens.html").read_text(encoding="utf-8")
    assert "Watched: ·Mary ·John." in page and "probs_1" in page
    assert explorer.linked().controls == ["layer", "pos"]


def test_a_page_of_a_long_prompt_leaves_the_lists_out(model, monkeypatch):
    monkeypatch.setattr("llama_probe.widgets.lens._MOST_LISTS", 10)
    linked = LogitLensExplorer(model, TOKENS).linked()
    names = [view.name for row in linked.rows for view in row]
    assert names == ["prompt", "grid", "ranks", "probs"]
    assert "top" not in linked.arrays and "left out" in linked.note


def test_hostile_tokens_are_only_text(model, tmp_path, monkeypatch):
    nasty = lambda ids: [NASTY[int(i) % len(NASTY)] for i in ids]  # noqa: E731
    monkeypatch.setattr(model, "to_str_tokens", nasty)
    explorer = LogitLensExplorer(model, TOKENS, watch=[1, 2])
    explorer.colour = "rank"
    page = explorer.to_html(tmp_path / "lens.html").read_text(encoding="utf-8")
    assert page.count("</script>") == page.count("<script") and "<b>bold" not in page
    for name in ("grid", "top", "ranks", "probs"):
        assert "<b>" not in explorer.figure(name).to_json()


# The figures on their own.


def watched_frame():
    frame = lens_frame(top_k=4).assign(token_id=lambda f: f["rank"], entropy=1.5, kl=0.0)
    return frame.assign(watched=frame["rank"] == 2)


def test_the_default_colour_is_probability_as_ever():
    frame = watched_frame()
    assert plots.logit_lens(frame) == plots.logit_lens(frame, colour="prob")
    (trace,) = plots.logit_lens(frame).data
    assert trace.hovertemplate == (
        "position %{x}<br>after %{y} layers<br>%{customdata}<extra></extra>"
    )


def test_colours_are_amounts_with_units():
    frame = watched_frame()
    (entropy,) = plots.logit_lens(frame, colour="entropy").data
    assert (entropy.z == 1.5).all() and (entropy.zmin, entropy.zmax) == (0, 1.5)
    assert "entropy (nats): %{z:.3f}" in entropy.hovertemplate
    (kl,) = plots.logit_lens(frame, colour="kl").data
    assert (kl.z == 0).all() and kl.zmax == 1
    (rank,) = plots.logit_lens(frame, colour="rank").data
    np.testing.assert_allclose(rank.z, np.log10(3), rtol=1e-6)
    assert "log10(1 + rank of " in rank.colorbar.title.text
    halves = pd.concat([frame.iloc[:5], frame.iloc[5:]], ignore_index=True)
    shuffled = halves.sample(frac=1, random_state=1)
    np.testing.assert_array_equal(plots.logit_lens(shuffled, colour="rank").data[0].z, rank.z)


def test_wrong_colours_and_frames_get_a_sentence():
    frame = watched_frame()
    with pytest.raises(InputError, match="colour is 'logit', but should be one of prob, entropy"):
        plots.logit_lens(frame, colour="logit")
    with pytest.raises(InputError, match="no column 'entropy'"):
        plots.logit_lens(frame.drop(columns="entropy"), colour="entropy")
    with pytest.raises(InputError, match="no column 'watched'"):
        plots.logit_lens(frame.drop(columns="watched"), colour="rank")
    with pytest.raises(InputError, match="several tokens are watched"):
        plots.logit_lens(frame.assign(watched=True), colour="rank")
    with pytest.raises(InputError, match="no row of the frame is of a watched token"):
        plots.logit_lens(frame.assign(watched=False), colour="rank")


def test_rank_lines_of_one_position():
    frame = watched_frame()
    here = frame[frame.pos == 1]
    (line,) = plots.token_ranks(here).data
    assert line.x.tolist() == [0, 1, 2, 3] and line.y.tolist() == [3, 3, 3, 3]
    (probs,) = plots.token_ranks(here, value="prob").data
    np.testing.assert_allclose(probs.y, here[here["rank"] == 2].prob, rtol=1e-6)
    for figure in (plots.token_ranks(here), plots.token_ranks(here, value="prob")):
        assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text
    with pytest.raises(InputError, match="rows of one position"):
        plots.token_ranks(frame)
    with pytest.raises(InputError, match="value is 'logit'"):
        plots.token_ranks(here, value="logit")
    with pytest.raises(InputError, match="watched token"):
        plots.token_ranks(here.assign(watched=False))
    assert json.loads(plots.token_ranks(here).to_json())["data"][0]["name"]


def test_rank_lines_survive_a_csv_round_trip(tmp_path):
    here = watched_frame().query("pos == 1")
    here.to_csv(tmp_path / "a.csv", index=False)
    again = pd.read_csv(tmp_path / "a.csv", keep_default_na=False)
    assert plots.token_ranks(again).to_json() == plots.token_ranks(here).to_json()
