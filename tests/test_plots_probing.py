"""Figures of probes: the emergence curve, its grid, the transfer matrix, a watched text."""

import numpy as np
import pandas as pd
import plotly.io as pio
import pytest
from test_plots import aliases, as_csv

import llama_probe as lp
from llama_probe import plots
from llama_probe.errors import InputError

TEXTS = [f"a{i} <b>{i % 2}" for i in range(80)]
HOSTILE = "<b> %{x} $x$\n"


def activations(layers=3, hook="blocks.{}.hook_resid_post"):
    """Labels that can be read the better the later the layer."""
    random = np.random.default_rng(0)
    signal = np.tile([-1.0, 1.0], 40)[:, None]
    return {hook.format(i): 0.3 * i * signal + random.normal(size=(80, 6)) for i in range(layers)}


@pytest.fixture(scope="module")
def frame():
    return lp.probe(
        activations(), [0, 1] * 40, texts=TEXTS, groups=np.arange(80) // 4, controls="all",
        control_by=np.arange(80) % 5, probe=["logistic", "mass_mean"], strength=1.0, repeats=1,
        progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def matrix():
    acts, y = activations(), np.array([0, 1] * 40)
    sets = {"one": (acts, y), HOSTILE: (acts, 1 - y)}
    return lp.transfer(sets, strength=1.0, progress=False)


@pytest.fixture(scope="module")
def tokens():
    scores = [0.5, 2.0, 1.0, np.nan]
    running = [np.nan, 2.0, 2.0, 2.0]
    flagged = pd.array([False, True, True, True], "boolean")
    texts = ["<b>", " %{x}", "\n", ""]
    columns = {"pos": range(4), "token": texts, "score": scores, "running": running}
    return pd.DataFrame(columns).assign(flagged=flagged, new=[False, False, True, True])


@pytest.fixture(scope="module")
def held():
    labels, score = ["no", "yes", "no"], np.array([-1.0, -2.0, 0.5])
    margin = np.where(np.array(labels) == "yes", score, -score)
    columns = {"label": labels, "score": score, "margin": margin, "text": [HOSTILE, "b", "c"]}
    return pd.DataFrame(columns).assign(task="classes")


def drawn(name, frames):
    return getattr(plots, name)(frames[name])


@pytest.fixture(scope="module")
def frames(frame, matrix, tokens, held):
    grid = frame[frame.probe == "logistic"].assign(at="-1")
    return {
        "probe": frame, "probe_grid": grid, "transfer": matrix, "monitor": tokens,
        "probe_scores": held, "probe_errors": held,
    }  # fmt: skip


NAMES = ["probe", "probe_grid", "transfer", "monitor", "probe_scores", "probe_errors"]
every_figure = pytest.mark.parametrize("name", NAMES)


@every_figure
def test_a_frame_draws_the_same_after_concat_and_a_csv_round_trip(frames, name):
    frame = frames[name]
    if name in ("probe", "probe_grid"):  # "-1" comes back as a number, "" as a gap
        frame = frame.assign(at=np.where(frame["hook"] == "", "", "-1"))
    draw = getattr(plots, name)
    halves = pd.concat([frame.iloc[:3], frame.iloc[3:]], ignore_index=True)
    for options in ({}, {"keep_default_na": False}):
        assert draw(as_csv(halves, **options)).to_json() == draw(frame).to_json()


@every_figure
def test_axes_are_named_hovers_end_and_titles_are_plain_text(frames, name):
    figure = drawn(name, frames)
    assert figure.layout.template == pio.templates["llama_probe"]
    assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text
    for trace in figure.data:
        assert trace.hoverinfo == "skip" or trace.hovertemplate.endswith("<extra></extra>")
    titled = getattr(plots, name)(frames[name], title="<b>")
    assert titled.layout.title.text == "&lt;b&gt;"


@every_figure
def test_wrong_frames_get_a_sentence(frames, name):
    draw, frame = getattr(plots, name), frames[name]
    lost = next(column for column in ("value", "running", "margin") if column in frame)
    with pytest.raises(InputError, match=f"no column '{lost}'; it has: "):
        draw(frame.drop(columns=lost))
    with pytest.raises(InputError, match="no rows"):
        draw(frame.iloc[:0])
    if name not in ("probe_scores", "probe_errors"):
        with pytest.raises(InputError, match="share a"):
            draw(pd.concat([frame, frame]))


def named(figure):
    """Traces by name; of the same name the one that is a line rather than its band."""
    return {trace.name: trace for trace in figure.data if trace.fill != "toself"}


def test_a_curve_has_a_line_for_each_probe_and_each_control(frame):
    traces = named(plots.probe(frame))
    lines = ("logistic", "mass mean")
    controls = ("chance", "shuffled labels", "random direction, 95th percentile", "n-grams")
    assert {*lines, *controls, "length"} < set(traces)
    auroc = frame[(frame.metric == "auroc") & (frame.probe == "mass_mean")]
    of_probe = auroc[auroc.kind == "probe"]
    np.testing.assert_allclose(traces["mass mean"].x, [0, 1, 2])
    np.testing.assert_allclose(traces["mass mean"].y, of_probe.value, rtol=1e-6)
    np.testing.assert_allclose(
        traces["mass mean"].customdata, of_probe[["ci_low", "ci_high"]], rtol=1e-6
    )
    p95 = frame[frame.metric == "auroc_p95"].value
    np.testing.assert_allclose(traces["random direction, 95th percentile"].y, p95, rtol=1e-6)
    words = frame[(frame.kind == "n-grams") & (frame.metric == "auroc")].value.item()
    np.testing.assert_allclose(traces["n-grams"].y, [words, words], rtol=1e-6)
    assert list(traces["chance"].y) == [0.5, 0.5]
    assert all(traces[name].line.dash not in (None, "solid") for name in controls[1:])
    assert traces["logistic"].line.width > max(traces[name].line.width for name in controls)


def test_bands_are_the_intervals(frame):
    figure = plots.probe(frame[frame.probe != "mass_mean"])
    band = next(trace for trace in figure.data if trace.fill == "toself")
    rows = frame[(frame.kind == "probe") & (frame.probe == "logistic") & (frame.metric == "auroc")]
    outline = [*rows.ci_low, *rows.ci_high[::-1], rows.ci_low.iloc[0]]
    np.testing.assert_allclose(band.y[:-1], outline, rtol=1e-6)
    assert list(band.x[:-1]) == [0, 1, 2, 2, 1, 0, 0] and band.hoverinfo == "skip"


def test_the_best_cell_is_marked_as_it_looks_and_as_it_is(frame):
    rows = frame[frame.metric == "auroc"].set_index("kind")
    naive, corrected = rows.loc["best cell"], rows.loc["best cell, corrected"]
    traces = named(plots.probe(frame))
    star = traces[f"best of 6 cells: {naive.value:.3f}"]
    diamond = traces[f"chosen on one half, tested on the other: {corrected.value:.3f}"]
    assert (star.x[0], star.y[0]) == (naive.layer, pytest.approx(naive.value))
    assert diamond.y[0] == pytest.approx(corrected.value)
    assert "chosen on one half: " in diamond.hovertemplate
    assert plots.probe(frame).layout.title.subtitle.text == (
        "6 cells looked at; 80 held-out samples in 20 groups; bands: 95 &#37;"
    )


def test_a_legend_names_each_thing_once(frame):
    both = pd.concat([frame.assign(target="<a>"), frame.assign(target="b")])
    figure = plots.probe(both)
    listed = [trace.name for trace in figure.data if trace.showlegend]
    assert len(listed) == len(set(listed)) and "logistic" in listed
    assert [note.text for note in figure.layout.annotations] == ["&lt;a&gt;", "b"]
    assert {trace.xaxis for trace in figure.data} == {"x", "x2"}


def test_lines_are_told_apart_by_what_differs(frame):
    logistic = frame[frame.probe == "logistic"]
    both = pd.concat([logistic.assign(model="<i>"), logistic.assign(model="twin")])
    assert {"&lt;i&gt;", "twin"} < set(named(plots.probe(both, by="model")))
    places = pd.concat([logistic.assign(at="-1"), logistic.assign(at="-2")])
    assert {"at -1", "at -2"} < set(named(plots.probe(places)))
    sites = logistic.assign(hook=logistic["hook"].str.replace("post", "mid"))
    assert {"hook_resid_post", "hook_resid_mid"} < set(named(plots.probe(pd.concat(
        [logistic, sites[sites["hook"] != ""]]))))  # fmt: skip
    with pytest.raises(InputError, match="by= what tells them apart"):
        plots.probe(both)


def test_the_curve_of_another_metric(frame):
    selectivity = named(plots.probe(frame, "selectivity"))
    rows = frame[(frame.metric == "selectivity") & (frame.probe == "logistic")]
    np.testing.assert_allclose(selectivity["logistic"].y, rows.value, rtol=1e-6)
    accuracy = named(plots.probe(frame, "accuracy"))
    assert "control task" in accuracy and "chance" not in accuracy
    with pytest.raises(InputError, match="no metric 'f1'; it has: accuracy"):
        plots.probe(frame, "f1")


def test_what_was_refused_is_said_and_gaps_are_gaps(frame):
    refused = plots.probe(frame, "recall_at_1pct_fpr")  # 40 negatives
    (note,) = refused.layout.annotations
    assert note.text.startswith("refused: 40 negatives cannot show 1 &#37; of false")
    gap = frame.copy()
    here = (gap.layer == 1) & (gap.kind == "probe") & (gap.probe == "logistic")
    gap.loc[here, ["value", "ci_low", "ci_high"]] = np.nan
    figure = plots.probe(gap[gap.probe == "logistic"])
    assert np.isnan(named(figure)["logistic"].y[1]) and not figure.layout.annotations
    band = next(trace for trace in figure.data if trace.fill == "toself")
    assert 1 not in list(band.x) and list(band.x).count(None) == 2


def test_one_layer_and_hooks_outside_of_blocks():
    y = [0, 1] * 40
    one = lp.probe(activations(1), y, controls="shuffled labels", strength=1.0, progress=False)
    figure = plots.probe(one)
    assert list(named(figure)["logistic"].x) == [0] and figure.layout.xaxis.range == (-0.5, 0.5)
    x = activations()
    named_hooks = {"hook_embed": x.popitem()[1], **x, "ln_final.<b>": next(iter(x.values()))}
    figure = plots.probe(lp.probe(named_hooks, y, controls=(), strength=1.0, progress=False))
    xs = {place for trace in figure.data if trace.name != "chance" for place in trace.x}
    assert xs - {None} == {-1, 0, 1, 2}
    assert aliases(figure)["−1"] == "hook_embed" and aliases(figure)["2"] == "ln_final.&lt;b&gt;"
    arrays = plots.probe(
        lp.probe({"<a>": x.popitem()[1]}, y, controls=(), strength=1.0, progress=False)
    )
    assert arrays.layout.xaxis.title.text == "activations" and aliases(arrays)["0"] == "&lt;a&gt;"
    bare = plots.probe(
        lp.probe(named_hooks["hook_embed"], y, controls=(), strength=1.0, progress=False)
    )
    assert aliases(bare)["0"] == "the array"


def test_numbers_are_read_too():
    y = np.linspace(0, 1, 80)
    frame = lp.probe(activations(), y, probe="ridge", controls=(), strength=1.0, progress=False)
    figure = plots.probe(frame)
    assert figure.layout.yaxis.title.text == "R²" and list(named(figure)["chance"].y) == [0, 0]


def test_a_grid_of_layers_and_positions(frame):
    logistic = frame[(frame.probe == "logistic") & (frame.kind == "probe")]
    both = pd.concat([logistic.assign(at="last of the template"), logistic.assign(at="mean <i>")])
    (trace,) = plots.probe_grid(both).data
    assert trace.z.shape == (3, 2) and (trace.zmin, trace.zmax, trace.zmid) == (0, 1, 0.5)
    auroc = logistic[logistic.metric == "auroc"].value
    np.testing.assert_allclose(trace.z, np.stack([auroc, auroc], axis=1), rtol=1e-6)
    names = aliases(plots.probe_grid(both))
    assert names == {"0": "last of the template", "1": "mean &lt;i&gt;"}
    apart = pd.concat([logistic.assign(at="-1"), logistic.assign(at="-4")])
    assert aliases(plots.probe_grid(apart)) == {"0": "-4", "1": "-1"}
    assert plots.probe_grid(both, "ece").data[0].zmid is None
    with pytest.raises(InputError, match="no metric 'f1'"):
        plots.probe_grid(both, "f1")


def test_an_inversion_jumps_out_of_the_transfer_matrix(matrix):
    figure = plots.transfer(matrix, layer=2)
    (trace,) = figure.data
    of_layer = matrix[(matrix.layer == 2) & (matrix.metric == "auroc")].value
    np.testing.assert_allclose(trace.z.ravel(), of_layer, rtol=1e-6)
    assert trace.z[0, 0] > 0.9 and trace.z[0, 1] < 0.1
    assert (trace.zmin, trace.zmid, trace.zmax) == (0, 0.5, 1)
    assert trace.text[0][1] == f"{trace.z[0, 1]:.2f}"
    assert " to " in trace.customdata[0][0] and "n = 80" in trace.customdata[0][0]
    assert (
        aliases(figure)["1"] == aliases(figure, "yaxis")["1"] == "&lt;b&gt; &#37;{x} &#36;x&#36;\n"
    )
    assert figure.layout.yaxis.autorange == "reversed"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == (
        "tested on", "trained on",
    )  # fmt: skip


def test_the_transfer_matrix_of_the_best_layer_or_of_one(matrix):
    assert plots.transfer(matrix).layout.title.text == "AUROC, layer 2"
    assert plots.transfer(matrix, "accuracy", 0).layout.title.text == "Accuracy, layer 0"
    with pytest.raises(InputError, match="no layer 9; it has: 0, 1, 2"):
        plots.transfer(matrix, layer=9)
    some = matrix[(matrix.layer == 0) & ~((matrix.train == "one") & (matrix.test == "one"))]
    trace = plots.transfer(some).data[0]
    assert np.isnan(trace.z[0, 1]) or np.isnan(trace.z[0, 0])
    assert "" in {text for line in trace.text for text in line}


def test_a_watched_text(tokens):
    figure = plots.monitor(tokens, 1.5)
    bars, running, flagged, threshold = figure.data
    np.testing.assert_array_equal(bars.y, tokens.score.astype(np.float32))
    np.testing.assert_array_equal(running.y, tokens.running.astype(np.float32))
    assert list(flagged.x) == [1, 2, 3] and list(threshold.y) == [1.5, 1.5]
    assert aliases(figure) == {"0": "0: &lt;b&gt;", "1": "1: ·&#37;{x}", "2": "2: ↵", "3": "3: ∅"}
    (generated,) = figure.layout.shapes
    assert (generated.x0, generated.x1) == (1.5, 3.5)
    plain = plots.monitor(tokens.drop(columns="new").assign(flagged=pd.NA))
    assert len(plain.data) == 3 and not len(plain.data[2].x) and not plain.layout.shapes


def test_held_out_scores_lie_on_the_side_that_the_probe_says(held):
    figure = plots.probe_scores(held)
    (points,) = figure.data
    assert list(points.x) == [-1.0, -2.0, 0.5]
    assert list(np.round(points.y)) == [0, 1, 0] and aliases(figure, "yaxis") == {
        "0": "no",
        "1": "yes",
    }
    assert figure.layout.xaxis.title.text.endswith("(right of 0: says yes)")
    assert points.text[0] == "<b>no</b><br>&lt;b&gt; &#37;{x} &#36;x&#36;↵"
    three = held.assign(label=["a", "b", "c"])
    assert "left of 0: wrong" in plots.probe_scores(three).layout.xaxis.title.text
    numbers = held.assign(label=[0.5, 1.0, 2.0], task="number")
    figure = plots.probe_scores(numbers)
    assert (
        list(figure.data[0].y) == [0.5, 1.0, 2.0] and figure.layout.xaxis.title.text == "predicted"
    )


def test_the_most_wrong_come_first(held):
    bars, texts = plots.probe_errors(held, most=2).data
    assert list(bars.x) == [2.0, 0.5] and texts.text == ("yes: b", "no: c")
    bars, texts = plots.probe_errors(held).data
    assert list(bars.x) == [2.0, 0.5, -1.0] and list(texts.x) == [-1.0, -1.0, -1.0]


def test_rows_of_the_transfer_matrix_are_what_was_trained_on():
    pairs = {"train": list("aabb"), "test": list("baba"), "value": [0.1, 0.9, 0.7, 0.6]}
    frame = pd.DataFrame(pairs).assign(hook="x", layer=0, at="-1", metric="auroc", n=9)
    (trace,) = plots.transfer(frame.assign(ci_low=0.0, ci_high=1.0)).data
    np.testing.assert_allclose(trace.z, [[0.9, 0.1], [0.6, 0.7]], rtol=1e-6)
