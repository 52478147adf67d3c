import base64
import io
import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from llama_probe import plots
from llama_probe.errors import InputError
from llama_probe.plots import theme
from llama_probe.plots.labels import axis, token, visible

NASTY = ["<b>bold</b>", "%{z}", "</script>", "&amp;", "$x$", "\n", "", " a" * 30]


def lens_frame(n_layers=3, tokens=(" Mary", "<b>", "\n"), top_k=2):
    cells = [
        (layer, pos, rank)
        for layer in range(n_layers + 1)
        for pos in range(len(tokens))
        for rank in range(top_k)
    ]
    frame = pd.DataFrame(cells, columns=["layer", "pos", "rank"])
    frame["input_token"] = [tokens[pos] for pos in frame["pos"]]
    frame["token"] = [NASTY[(layer + pos + rank) % len(NASTY)] for layer, pos, rank in cells]
    frame["prob"] = [(layer + 1) / (n_layers + 1) / (rank + 2) for layer, _, rank in cells]
    return frame


def patch_frame(n_layers=3, tokens=("a", " b", "<i>")):
    cells = [(layer, pos) for layer in range(n_layers) for pos in range(len(tokens))]
    frame = pd.DataFrame(cells, columns=["layer", "pos"])
    frame["effect"] = [layer / 7 - pos for layer, pos in cells]
    frame["metric"] = frame["effect"] * 3 + 0.1
    frame["token"] = [tokens[pos] for pos in frame["pos"]]
    return frame.assign(site="resid_pre", clean=3.0, corrupted=0.1)


def head_frame():
    frame = patch_frame().drop(columns="token").rename(columns={"pos": "head"})
    return frame.assign(site="z")


def dla_frame(n_layers=2, n_heads=3, bias=True):
    rows: list[tuple] = [("embed", "embed", None, None, 0.5)]
    for layer in range(n_layers):
        rows += [(f"L{layer} H{h}", "head", layer, h, h - layer / 3) for h in range(n_heads)]
        rows += [(f"L{layer} bias", "bias", layer, None, 0.1)] * bias
        rows += [(f"L{layer} mlp", "mlp", layer, None, -0.25)]
    frame = pd.DataFrame(rows, columns=["component", "kind", "layer", "head", "value"])
    return frame.astype({"layer": "Int64", "head": "Int64"})


def heat_frame():
    return pd.DataFrame({"layer": [0, 0, 1], "pos": [0, 1, 0], "value": [0.1, 0.2, 0.3]})


def causal(n, seed=0):
    weights = np.tri(n) * np.random.default_rng(seed).random((n, n))
    return weights / weights.sum(axis=1, keepdims=True)


FRAMES = {
    "heatmap": (plots.heatmap, heat_frame()),
    "logit_lens": (plots.logit_lens, lens_frame()),
    "patch": (plots.patch, patch_frame()),
    "patch_heads": (plots.patch, head_frame()),
    "direct_logit_attribution": (plots.direct_logit_attribution, dla_frame()),
}
every_frame = pytest.mark.parametrize(("draw", "frame"), FRAMES.values(), ids=FRAMES)


def all_figures():
    figures = {name: draw(frame) for name, (draw, frame) in FRAMES.items()}
    return figures | {"attention": plots.attention(causal(3), ["a", "b", "c"])}


def as_csv(frame, **options):
    return pd.read_csv(io.StringIO(frame.to_csv(index=False)), **options)


def aliases(figure, name="xaxis"):
    return figure.layout[name].labelalias


@pytest.mark.parametrize(("name", "figure"), all_figures().items(), ids=all_figures())
def test_every_figure_names_its_axes_and_its_colours(name, figure):
    assert figure.layout.template == pio.templates["llama_probe"]
    for trace in figure.data:
        assert trace.hovertemplate.endswith("<extra></extra>")
        own_x = figure.layout[(trace.xaxis or "x").replace("x", "xaxis")]
        assert own_x.title.text
        if trace.type == "heatmap":
            assert trace.colorbar.title.text
            assert trace.z.dtype == np.float32
    assert figure.layout.yaxis.title.text


@every_frame
def test_a_csv_round_trip_draws_the_same(draw, frame):
    halves = pd.concat([frame.iloc[:2], frame.iloc[2:]], ignore_index=True)
    assert draw(as_csv(halves)).to_json() == draw(frame).to_json()
    assert draw(as_csv(halves, keep_default_na=False)).to_json() == draw(frame).to_json()


@every_frame
def test_rows_may_come_in_any_order(draw, frame):
    figures = draw(frame.sample(frac=1, random_state=1)), draw(frame)
    for shuffled, sorted_ in zip(*(figure.data for figure in figures), strict=True):
        if sorted_.type == "heatmap":
            np.testing.assert_array_equal(shuffled.z, sorted_.z)
            assert list(shuffled.x) == list(sorted_.x)
            assert list(shuffled.y) == list(sorted_.y)
            assert shuffled.text == sorted_.text
            if sorted_.customdata is not None:
                np.testing.assert_array_equal(shuffled.customdata, sorted_.customdata)


@every_frame
def test_a_missing_column_and_an_empty_frame_are_named(draw, frame):
    needed = "effect" if "effect" in frame else "prob" if "prob" in frame else "value"
    with pytest.raises(InputError, match=f"no column '{needed}'; it has: .*layer"):
        draw(frame.drop(columns=needed))
    with pytest.raises(InputError, match="no rows"):
        draw(frame.iloc[:0])


@every_frame
def test_two_rows_in_one_cell_are_refused(draw, frame):
    with pytest.raises(InputError, match="share a cell, as at"):
        draw(pd.concat([frame, frame]))


@every_frame
def test_a_column_of_words_is_no_colour(draw, frame):
    color = "effect" if "effect" in frame else "prob" if "prob" in frame else "value"
    with pytest.raises(InputError, match=f"column '{color}' should hold numbers"):
        draw(frame.assign(**{color: "much"}))


@every_frame
def test_cells_without_a_number_stay_empty(draw, frame):
    color = "effect" if "effect" in frame else "prob" if "prob" in frame else "value"
    frame = frame.copy()
    lowest = frame["layer"] == 0
    frame.loc[lowest, color] = np.nan
    z = next(trace for trace in draw(frame).data if trace.type == "heatmap").z
    assert np.isnan(z[0]).all() and np.isfinite(z[1]).any()
    assert '"NaN"' not in draw(frame).to_json()


def test_heatmap_puts_each_row_in_its_cell():
    trace = plots.heatmap(heat_frame()).data[0]
    np.testing.assert_array_equal(trace.z, np.float32([[0.1, 0.2], [0.3, np.nan]]))
    assert (list(trace.x), list(trace.y)) == ([0, 1], [0, 1])


def test_heatmap_centres_effects_but_not_amounts():
    frame = heat_frame()
    amounts, effects = (plots.heatmap(frame), plots.heatmap(frame.assign(value=[-1, 0, 3])))
    assert amounts.data[0].zmid is None and effects.data[0].zmid == 0
    assert amounts.data[0].colorscale != effects.data[0].colorscale
    assert plots.heatmap(frame, diverging=True).data[0].zmid == 0


def test_heatmap_names_what_are_not_consecutive_numbers():
    layers = heat_frame().assign(layer=[0, 0, 8], pos=["a", "<b>", "a"])
    figure = plots.heatmap(layers, unit="logits", title="<b>%{x}")
    assert aliases(figure, "yaxis") == {"0": "0", "1": "8"}
    assert aliases(figure) == {"0": "a", "1": "&lt;b&gt;"}
    assert figure.data[0].colorbar.title.text == "value (logits)"
    assert figure.layout.title.text == "&lt;b&gt;&#37;{x}"


def test_heatmap_does_not_guess_an_axis_value():
    with pytest.raises(InputError, match="'pos' has missing values"):
        plots.heatmap(heat_frame().assign(pos=[0, 1, None]))


def test_heatmap_labels_positions_with_tokens():
    frame = heat_frame().assign(token=["the", " the", "the"])
    assert aliases(plots.heatmap(frame, tokens="token")) == {"0": "0: the", "1": "1: ·the"}


def test_logit_lens_shows_the_likeliest_token_and_lists_the_rest():
    figure = plots.logit_lens(lens_frame())
    (trace,) = figure.data
    assert trace.z.shape == (4, 3) and (trace.zmin, trace.zmax) == (0, 1)
    assert trace.text[0][0] == "&lt;b&gt;bold&lt;/…"
    assert trace.customdata[0][0].split("<br>") == [
        "0.125  &lt;b&gt;bold&lt;/b&gt;",
        "0.083  &#37;{z}",
    ]
    assert aliases(figure) == {"0": "0: ·Mary", "1": "1: &lt;b&gt;", "2": "2: ↵"}


def test_logit_lens_without_the_likeliest_tokens_or_the_input():
    frame = lens_frame()
    assert aliases(plots.logit_lens(frame.drop(columns="input_token"))) == {}
    with pytest.raises(InputError, match="rank 0"):
        plots.logit_lens(frame[frame["rank"] > 0])


def test_logit_lens_of_a_long_prompt_writes_no_text_into_cells():
    frame = lens_frame(n_layers=30, tokens=["the"] * 512, top_k=1)
    figure = plots.logit_lens(frame)
    assert figure.data[0].texttemplate is None and figure.data[0].customdata is None
    assert "%{text}" in figure.data[0].hovertemplate
    assert len(figure.to_json()) < 2_000_000


def test_attention_leaves_out_what_a_causal_model_cannot_see():
    figure = plots.attention(causal(4).astype(np.float16), list("abcd"))
    (trace,) = figure.data
    np.testing.assert_array_equal(np.isnan(trace.z), ~np.tri(4, dtype=bool))
    assert trace.z.dtype == np.float32 and (trace.zmin, trace.zmax) == (0, 1)
    assert figure.layout.yaxis.autorange == "reversed"


def test_attention_shows_a_weight_that_should_not_be_there():
    weights = np.array([[0.5, 0.5], [0.5, 0.5]])
    assert plots.attention(weights, ["a", "b"]).data[0].z[0, 1] == 0.5


def test_attention_with_a_cache_has_more_keys_than_queries():
    figure = plots.attention([[0.5, 0.5, 0.0]], ["c"], keys=["a", "b", "c"])
    np.testing.assert_array_equal(figure.data[0].z, [[0.5, 0.5, 0.0]])
    assert aliases(figure, "yaxis") == {"0": "0: c"}
    assert aliases(figure)["2"] == "2: c"


@pytest.mark.parametrize("n", [256, 257, 512, 1000])
def test_attention_of_a_long_prompt_is_pooled_and_says_so(n):
    weights = causal(n)
    weights[n - 1, 3] = 0.875
    figure = plots.attention(weights, [f" t{i}" for i in range(n)], "L0 H1")
    (trace,) = figure.data
    size = -(-n // 256)
    assert max(trace.z.shape) <= 256
    assert trace.z[(n - 1) // size, 3 // size] == 0.875
    assert trace.x[1] == size and aliases(figure)[str(size)] == f"{size}: ·t{size}"
    assert (f"largest weight of each {size} × {size}" in figure.layout.title.text) == (n > 256)
    assert len(figure.to_json()) < 2_000_000


def test_attention_of_one_token():
    figure = plots.attention([[1.0]], [""])
    assert figure.data[0].z.tolist() == [[1.0]] and aliases(figure) == {"0": "0: ∅"}


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (np.zeros((2, 3, 3)), r"\[2, 3, 3\].*one head's \[query, key\]"),
        (np.zeros((0, 0)), r"\[0, 0\]"),
        (np.zeros((2, 3)), r"\[2, 3\], but there are 2 tokens for the queries and 2 for the keys"),
        (np.full((2, 2), -np.inf), "before the softmax"),
        (np.full((2, 2), 3.0), "between 0 and 1"),
        ([["a", "b"], ["c", "d"]], "should be a CPU array"),
    ],
)
def test_attention_refuses_what_is_no_pattern(pattern, said):
    with pytest.raises(InputError, match=said):
        plots.attention(pattern, ["a", "b"])


def test_patch_centres_on_no_effect():
    figure = plots.patch(patch_frame())
    (trace,) = figure.data
    assert trace.zmid == 0 and trace.z.shape == (3, 3)
    assert trace.z[0, 2] == -2 and trace.customdata[0][2] == "<br>metric -5.900"
    assert aliases(figure)["2"] == "2: &lt;i&gt;"
    assert figure.layout.title.text == "Effect of patching resid_pre"


def test_patch_takes_the_columns_that_vary():
    both = pd.concat([patch_frame(), head_frame()], ignore_index=True)
    heads = plots.patch(both[both["site"] == "z"])
    assert heads.layout.xaxis.title.text == "head" and heads.layout.yaxis.title.text == "layer"
    for options in ({}, {"keep_default_na": False}):
        read = as_csv(both[both["head"].isna() | (both["head"] == 0)], **options)
        one_head = plots.patch(read[read["site"] == "z"])
        assert one_head.layout.xaxis.title.text == "head"
    one = patch_frame(tokens=["a"])
    assert plots.patch(one).layout.xaxis.title.text == "position"
    sites = pd.concat([one, one.assign(site="z")])
    assert plots.patch(sites).layout.xaxis.title.text == "site"


def test_patch_needs_two_columns_and_no_more():
    sites = pd.concat([patch_frame(), patch_frame().assign(site="z")])
    with pytest.raises(InputError, match="pos, site, layer all vary"):
        plots.patch(sites)
    with pytest.raises(InputError, match="needs two of the columns"):
        plots.patch(patch_frame()[["effect", "layer"]].drop_duplicates("layer"))


def test_attribution_draws_heads_as_cells_and_the_rest_as_bars():
    figure = plots.direct_logit_attribution(dla_frame())
    heads, *bars = figure.data
    assert heads.type == "heatmap" and heads.zmid == 0 and heads.z.shape == (2, 3)
    np.testing.assert_array_equal(heads.z[1], np.float32([-1 / 3, 2 / 3, 5 / 3]))
    assert {bar.name: list(bar.x) for bar in bars} == {
        "mlp": [-0.25, -0.25],
        "bias": list(np.float32([0.1, 0.1])),
        "embed": [0.5],
    }
    assert [list(bar.y) for bar in bars] == [[0, 1], [0, 1], [-1]]
    assert f"sum to {dla_frame()['value'].sum():.2f} logits" in figure.layout.title.text


def test_attribution_without_biases_and_with_what_cannot_be():
    frame = dla_frame(bias=False)
    assert [t.name for t in plots.direct_logit_attribution(frame).data[1:]] == ["mlp", "embed"]
    with pytest.raises(InputError, match="kind is 'attn', but should be"):
        plots.direct_logit_attribution(frame.assign(kind="attn"))
    with pytest.raises(InputError, match="no rows of kind 'head'"):
        plots.direct_logit_attribution(frame[frame["kind"] != "head"])
    mlps = frame[frame["kind"] == "mlp"]
    with pytest.raises(InputError, match="two rows of kind 'mlp'"):
        plots.direct_logit_attribution(pd.concat([frame, mlps]))


@pytest.mark.parametrize("text", NASTY)
def test_token_text_cannot_do_anything(text):
    shown = token(text)
    assert not set(shown) & set("<>$%\n") and shown
    assert "&" not in shown.replace("&amp;", "").replace("&lt;", "").replace("&gt;", "").replace(
        "&#36;", ""
    ).replace("&#37;", "")


def test_token_text_can_be_seen():
    assert visible(" \t\r\n\u200b\u202e\ud800é") == "·⇥␍↵\\u200b\\u202e\\ud800é"
    assert visible(np.nan) == visible(None) == visible("") == "∅"
    assert visible(7) == "7"
    assert token("x" * 40) == "x" * 15 + "…"


def test_nothing_in_a_figure_can_end_a_script():
    figure = plots.logit_lens(lens_frame(tokens=NASTY), title="</script>")
    assert "</script>" not in figure.to_json()
    assert "<b>" not in figure.to_json()


@pytest.mark.parametrize(("n", "step"), [(1, 1), (64, 1), (65, 2), (200, 5), (512, 10)])
def test_labels_do_not_crowd(n, step):
    assert axis(list(range(n)), "position", {}, x=True)["dtick"] == step


def test_both_templates_are_registered_and_readable():
    def luminance(colour):
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    for name in (theme.LIGHT, theme.DARK):
        layout = pio.templates[name].layout
        assert layout.paper_bgcolor == "rgba(0,0,0,0)"
        for ground in (layout.plot_bgcolor, layout.hoverlabel.bgcolor):
            light, dark = sorted(map(luminance, (layout.font.color, ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) > 7
    assert pio.templates.default != theme.LIGHT


def test_a_figure_can_be_turned_dark_and_sends_cells_as_bytes():
    figure = plots.patch(patch_frame()).update_layout(template=theme.DARK)
    assert isinstance(figure, go.Figure)
    z = json.loads(figure.to_json())["data"][0]["z"]
    assert z["dtype"] == "f4" and len(base64.b64decode(z["bdata"])) == 36
