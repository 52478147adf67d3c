"""Figures of heads, of RoPE, and of finer attributions: from frames as the analyses give them."""

import numpy as np
import pandas as pd
import plotly.io as pio
import pytest
import tiny
from test_plots import as_csv

import llama_probe as lp
from llama_probe import plots
from llama_probe.errors import InputError

TOKENS = tiny.tokens(batch=1, length=9)[0]


@pytest.fixture(scope="module")
def frames():
    model = tiny.make("qwen2-moe")
    lines = [
        lp.rope_distance(model, TOKENS, 0, 1, max_distance=5),
        lp.rope_distance(model, TOKENS, 2, 3, query=4, max_distance=5),
    ]
    return {
        "head_scores": lp.head_scores(model, n=2, length=4),
        "rope_contributions": lp.rope_contributions(model, TOKENS, 1, 0, 5, 2),
        "rope_distance": pd.concat(lines, ignore_index=True),
        "direct_logit_attribution": lp.direct_logit_attribution(
            model, TOKENS, 7, 8, experts=True, neurons=3
        ),
        "logit_lens": lp.logit_lens(model, TOKENS, watch=[5, 6]),
    }


NAMES = ["head_scores", "rope_contributions", "rope_distance", "direct_logit_attribution"]
every_figure = pytest.mark.parametrize("name", [*NAMES, "logit_lens"])


@every_figure
def test_a_frame_draws_the_same_after_concat_a_csv_round_trip_and_in_any_order(frames, name):
    draw, frame = getattr(plots, name), frames[name]
    figure = draw(frame)
    halves = pd.concat([frame.iloc[:3], frame.iloc[3:]], ignore_index=True)
    for options in ({}, {"keep_default_na": False}):
        assert draw(as_csv(halves, **options)).to_json() == figure.to_json()
    shuffled = draw(frame.sample(frac=1, random_state=1))
    for ours, theirs in zip(shuffled.data, figure.data, strict=True):
        np.testing.assert_allclose(np.asarray(ours.y, float), np.asarray(theirs.y, float))


@every_figure
def test_axes_are_named_and_hovers_say_what_is_there(frames, name):
    figure = getattr(plots, name)(frames[name])
    assert figure.layout.template == pio.templates["llama_probe"]
    assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text
    for trace in figure.data:
        assert trace.hovertemplate.endswith("<extra></extra>")


@pytest.mark.parametrize("name", NAMES)
def test_wrong_frames_get_a_sentence(frames, name):
    draw, frame = getattr(plots, name), frames[name]
    with pytest.raises(InputError, match="no column 'value'; it has: .*layer"):
        draw(frame.drop(columns="value"))
    with pytest.raises(InputError, match="no rows"):
        draw(frame.iloc[:0])
    with pytest.raises(InputError, match="share a"):
        draw(pd.concat([frame, frame]))


def test_head_scores_draw_one_metric(frames):
    frame = frames["head_scores"]
    (trace,) = plots.head_scores(frame, "previous_token").data
    rows = frame[frame.metric == "previous_token"]
    np.testing.assert_array_equal(trace.z.ravel(), rows.value.to_numpy(dtype=np.float32))
    assert (trace.zmin, trace.zmax) == (0, 1)
    assert trace.customdata[0][0].endswith(", n = 2)") and " to " in trace.customdata[0][0]
    (entropy,) = plots.head_scores(frame, "entropy").data
    assert entropy.zmax is None and entropy.colorbar.title.text == "entropy (nats)"
    single = plots.head_scores(frame.assign(ci_low=np.nan, ci_high=np.nan, n=1)).data[0]
    assert single.customdata[0][0] == " (n = 1)"
    with pytest.raises(InputError, match="no metric 'copying'; it has: entropy, previous_token"):
        plots.head_scores(frame, "copying")


def test_bars_of_pairs_stay_within_what_they_can_be(frames):
    frame = frames["rope_contributions"]
    at_most, share = plots.rope_contributions(frame).data
    np.testing.assert_array_equal(share.y, frame.value.to_numpy(dtype=np.float32))
    top = np.asarray(at_most.base, dtype=float) + np.asarray(at_most.y, dtype=float)
    np.testing.assert_allclose(top, frame.amplitude, rtol=1e-5)
    assert (np.abs(share.y) <= top * (1 + 1e-5)).all()
    title = plots.rope_contributions(frame).layout.title.text
    assert title.startswith("L1 H0, position 5 looking at 2: the pairs sum to ")
    assert title.endswith(f"{frame.value.sum():.2f}")


def test_a_line_of_distances_says_whose_it_is(frames):
    mean, one = plots.rope_distance(frames["rope_distance"]).data
    assert (mean.name, one.name) == ("L0 H1", "L2 H3, query 4")
    assert list(mean.x) == [0, 1, 2, 3, 4, 5]


def test_bars_of_a_finer_attribution_sum_to_its_parts(frames):
    frame = frames["direct_logit_attribution"]
    _, *bars = plots.direct_logit_attribution(frame).data
    assert [bar.name for bar in bars] == ["expert", "shared", "neuron", "rest", "embed"]
    rest = frame[frame.kind != "head"].value.sum()
    assert sum(np.asarray(bar.x, dtype=float).sum() for bar in bars) == pytest.approx(rest)
    experts = frame[frame.kind == "expert"].groupby("layer").value.sum()
    np.testing.assert_allclose(bars[0].x, experts, rtol=1e-5)
    assert list(bars[0].y) == experts.index.tolist()


def test_watched_tokens_are_in_the_lens_hover(frames):
    (trace,) = plots.logit_lens(frames["logit_lens"]).data
    assert trace.z.shape == (4, 9)
    assert "&lt;5&gt;" in trace.customdata[0][0] and "&lt;6&gt;" in trace.customdata[0][0]
