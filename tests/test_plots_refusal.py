"""Figures of refusal: what is chosen, where requests lie, what edits do, what changed."""

import itertools

import numpy as np
import pandas as pd
import plotly.io as pio
import pytest
from test_plots import aliases, as_csv

from llama_probe import plots
from llama_probe.errors import InputError

HOSTILE = "<b> %{x} $x$"


def candidates():
    frame = pd.DataFrame(
        itertools.product((-3, -2, -1), range(3)), columns=["position", "layer"]
    )  # -1, 1 is chosen; -1, 0 passes too
    frame["refusal_score"] = np.linspace(4, -4, 9)
    frame["steering_score"] = np.linspace(-6, 6, 9)
    frame["kl_div_score"] = np.geomspace(1e-3, 1, 9)
    frame["norm"] = 2.0
    passes = (frame["position"] == -1) & (frame["layer"] < 2)
    frame["dropped"] = np.where(passes, "", np.where(frame["layer"] == 2, "late layer", HOSTILE))
    return frame.assign(chosen=passes & (frame["layer"] == 1))


def guard_frame():
    rows = [
        (judge, name, value)
        for judge in ("phrase", HOSTILE)
        for name, value in (("restricted", 0.9), ("harmless", 0.05), ("difference", 0.85))
    ]
    frame = pd.DataFrame(rows, columns=["judge", "set", "value"])
    low, high = frame["value"] - 0.1, (frame["value"] + 0.1).clip(upper=1)
    return frame.assign(metric="declined", ci_low=low, ci_high=high, n=40, hits=36)


def request_frame():
    names = ["restricted"] * 6 + ["harmless"] * 5 + [HOSTILE] * 4
    harm = [1, 2, 1, -1, 1, 1.5, -1, -2, -1, 1, -1, 1, 1, -1, -1]
    refusal = [1, 1, 2, 1, -1, 1.5, -1, -1, -2, -1, 1, -1, -1, -1, -1]
    frame = pd.DataFrame({"set": names, "harmfulness": harm, "refusal": refusal})
    return frame.assign(prompt=[f"{HOSTILE} {i}" for i in range(15)], declined=frame.refusal > 0)


def dose_frame():
    rows = []
    for edit, name in (
        ("ablation", "restricted"),
        ("ablation", "harmless"),
        ("addition", "harmless"),
    ):
        for dose in (0.0, 0.5, 1.0):
            for metric in ("declined", "refusal score"):
                rows.append((edit, name, metric, dose, 1 - dose, "refusal", -1))
            for draw in range(5):
                rows.append((edit, name, "refusal score", dose, dose * draw, "random", draw))
    names = ["edit", "set", "metric", "dose", "value", "direction", "draw"]
    frame = pd.DataFrame(rows, columns=names)
    return frame.assign(ci_low=frame.value - 0.1, ci_high=frame.value + 0.2, n=30)


def effect_frame():
    rows = [
        (edit, name, value, "refusal", -1)
        for edit, values in {"none": (1, 0), "ablation": (0.2, 0), "addition": (1, 0.8)}.items()
        for name, value in zip(("restricted", "harmless"), values, strict=True)
    ]
    for kind, value in (("random", 0.95), ("matched random", 0.9)):
        rows += [("ablation", "restricted", value, kind, draw) for draw in range(4)]
        rows += [("addition", "harmless", 0.1 * draw, kind, draw) for draw in range(4)]
    frame = pd.DataFrame(rows, columns=["edit", "set", "value", "direction", "draw"])
    frame = frame.assign(metric="declined", ci_low=frame.value - 0.1, ci_high=frame.value + 0.1)
    return frame.assign(n=30, change=0.5, change_low=0.25, change_high=0.75)


def writer_frame():
    rows = [("embedding", -1, -1, -1, 0.1)]
    rows += [("head", layer, head, -1, layer - head) for layer in (0, 1) for head in (0, 1)]
    rows += [("expert", 1, -1, expert, -expert) for expert in (2, 5)] + [("mlp", 0, -1, -1, 0.5)]
    frame = pd.DataFrame(rows, columns=["component", "layer", "head", "expert", "value"])
    return frame.assign(ci_low=frame.value - 0.1, ci_high=frame.value + 0.2, n=40)


def cosine_frame():
    frame = pd.DataFrame({"layer": [0, 1, 2], "cosine": [0.9, 0.7, 0.4]})
    frame = frame.assign(ci_low=frame.cosine - 0.1, ci_high=frame.cosine + 0.05, n=50)
    return frame.assign(halves=0.8, halves_a=0.85, halves_b=[0.9, 0.91, 0.92], hook="x", at="-1")


def weight_frame():
    rows = [(layer, "attention", 1.0) for layer in (0, 1)]
    rows += [(1, "expert", 0.25), (1, "expert", 0.75), (-1, "embedding", 1.0), (0, "gate", np.nan)]
    return pd.DataFrame(rows, columns=["layer", "site", "share"]).assign(change=0.01)


def subspace_frame():
    kinds = {"logistic removed": (1.0, 0.8, 0.5), "random removed": (1.0, 0.99, 0.98)}
    rows = [(k, kind, value) for kind, values in kinds.items() for k, value in enumerate(values)]
    frame = pd.DataFrame(rows, columns=["k", "kind", "value"])
    return frame.assign(metric="auroc", ci_low=frame.value - 0.1, ci_high=frame.value, n=60)


FRAMES = {
    "refusal": candidates, "refusal_guard": guard_frame, "refusal_projections": request_frame,
    "refusal_plane": request_frame, "dose_response": dose_frame, "refusal_effects": effect_frame,
    "refusal_writers": writer_frame, "refusal_changes": cosine_frame,
    "weights": weight_frame, "refusal_subspace": subspace_frame,
}  # fmt: skip
every_figure = pytest.mark.parametrize("name", FRAMES)


def draw(name, frame, *arguments, **options):
    return getattr(plots, "refusal_changes" if name == "weights" else name)(
        frame, *arguments, **options
    )


@every_figure
def test_a_frame_draws_the_same_after_concat_and_a_csv_round_trip(name):
    frame = FRAMES[name]()
    halves = pd.concat([frame.iloc[:3], frame.iloc[3:]], ignore_index=True)
    for options in ({}, {"keep_default_na": False}):
        assert draw(name, as_csv(halves, **options)).to_json() == draw(name, frame).to_json()


@every_figure
def test_axes_are_named_hovers_end_and_texts_are_plain(name):
    frame = FRAMES[name]()
    figure = draw(name, frame)
    assert figure.layout.template == pio.templates["llama_probe"]
    for trace in figure.data:
        assert trace.hoverinfo == "skip" or trace.hovertemplate.endswith("<extra></extra>")
        assert figure.layout[(trace.xaxis or "x").replace("x", "xaxis")].title.text
        if trace.type == "heatmap" and trace.showscale is not False:
            assert trace.colorbar.title.text
    assert figure.layout.yaxis.title.text
    assert "<b> " not in figure.to_json() and "$x$" not in figure.to_json()
    assert draw(name, frame, title="<b>").layout.title.text == "&lt;b&gt;"
    assert draw(name, frame, title="").layout.title.text is None


@every_figure
def test_wrong_frames_get_a_sentence(name):
    frame = FRAMES[name]()
    wanted = ("value", "share", "ci_low", "refusal", "refusal_score")
    lost = next(column for column in wanted if column in frame)
    with pytest.raises(InputError, match=f"'{lost}'.*; it has: "):
        draw(name, frame.drop(columns=lost))
    with pytest.raises(InputError, match="no rows"):
        draw(name, frame.iloc[:0])
    if name not in ("refusal_projections", "refusal_plane", "weights"):
        with pytest.raises(InputError, match="share a"):
            draw(name, pd.concat([frame, frame]))


def test_selection_shows_three_scores_and_dims_what_is_dropped():
    frame = candidates()
    figure = plots.refusal(frame)
    assert figure.layout.title.text == "9 candidates for the refusal direction, 2 pass"
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    every, over = maps[::2], maps[1::2]
    for trace, column in zip(
        every, ["refusal_score", "steering_score", "kl_div_score"], strict=True
    ):
        table = frame.pivot(index="layer", columns="position", values=column).to_numpy()
        shown = np.log10(table) if column == "kl_div_score" else table
        np.testing.assert_allclose(trace.z, shown, atol=1e-6)
        assert trace.opacity < 0.5 and trace.z.dtype == np.float32
    for trace, whole in zip(over, every, strict=True):
        known = ~np.isnan(trace.z)
        assert np.argwhere(known).tolist() == [[0, 2], [1, 2]]  # layers 0 and 1 at -1
        assert (trace.z[known] == whole.z[known]).all() and trace.opacity == 1
    assert every[0].zmin == every[1].zmin == -6 and every[0].zmax == every[1].zmax == 6
    star = next(trace for trace in figure.data if trace.name == "chosen")
    assert (list(star.x), list(star.y)) == ([2], [1])
    ring = next(trace for trace in figure.data if trace.name == "passes")
    assert (list(ring.x), list(ring.y)) == ([2, 2], [0, 1])
    assert aliases(figure) == {"0": "−3", "1": "−2", "2": "−1"}
    hovers = every[0].customdata
    assert "position −1, before block 1" in hovers[1][2] and "<b>chosen</b>" in hovers[1][2]
    assert "dropped: late layer" in hovers[2][0] and "dropped: &lt;b&gt; &#37;{x}" in hovers[0][0]
    none = plots.refusal(frame.assign(dropped="KL", chosen=False))
    assert none.layout.title.text == "9 candidates for the refusal direction, none passes"


def test_the_chosen_one_stands_out_though_it_was_dropped():
    frame = candidates().assign(dropped="KL")
    over = plots.refusal(frame).data[1]
    assert np.argwhere(~np.isnan(over.z)).tolist() == [[1, 2]]


def test_a_kl_of_nothing_has_a_colour():
    frame = candidates().assign(kl_div_score=0.0)
    kl = [trace for trace in plots.refusal(frame).data if trace.type == "heatmap"][4]
    assert np.isfinite(kl.z).all() and kl.zmin < kl.zmax


def test_guard_has_a_mark_with_its_interval_for_each_judge_and_set():
    figure = plots.refusal_guard(guard_frame())
    assert [trace.name for trace in figure.data] == ["restricted", "harmless", "difference"]
    first = figure.data[0]
    np.testing.assert_allclose(first.y, [0.9, 0.9], rtol=1e-6)
    np.testing.assert_allclose(first.error_y.arrayminus, 0.1, rtol=1e-5)
    said = "judge phrase: 0.900 (95 &#37;: 0.800 to 1.000, n = 40)"
    assert first.customdata[0] == said
    assert len({trace.marker.symbol for trace in figure.data}) == 3
    assert figure.layout.yaxis.range[0] < guard_frame().ci_low.min()


def test_projections_are_a_histogram_for_each_set():
    figure = plots.refusal_projections(request_frame())
    bars = [trace for trace in figure.data if trace.type == "bar"]
    means = [trace for trace in figure.data if trace.type == "scatter"]
    assert [int(trace.base[0]) for trace in bars] == [2, 1, 0]  # the first set on top
    counts = [sum(int(text.split()[0]) for text in trace.customdata) for trace in bars]
    assert counts == [6, 5, 4]
    right = (np.array(bars[1].x) > 0) & (np.array(bars[1].y) > 0)
    assert [text[:6] for text, yes in zip(bars[1].customdata, right, strict=True) if yes] == [
        "1 of 5"
    ]
    own = request_frame().query("set == 'restricted'").refusal
    assert means[0].x[0] == pytest.approx(own.mean())
    assert means[0].error_x.array[0] == pytest.approx(1.96 * own.std() / 6**0.5)
    assert aliases(figure, "yaxis")["2"] == "restricted<br>83&#37; of 6 above 0"
    other = plots.refusal_projections(request_frame().assign(value=-own.abs()).dropna())
    assert other.layout.xaxis.title.text == "projection on the direction"
    assert aliases(other, "yaxis")["0"] == "restricted<br>0&#37; of 6 above 0"
    named = plots.refusal_projections(request_frame().assign(value=0.0), column="harmfulness")
    assert aliases(named, "yaxis")["2"].endswith("83&#37; of 6 above 0")
    with pytest.raises(InputError, match="set 'harmless' has no finite number"):
        gap = request_frame()
        plots.refusal_projections(gap.assign(refusal=gap.refusal.where(gap.set != "harmless")))


def test_the_plane_counts_its_quarters_and_hollows_what_was_answered():
    frame = request_frame()
    figure = plots.refusal_plane(frame)
    points = figure.data[0]
    assert len(points.x) == len(frame)
    np.testing.assert_allclose(points.y, frame.refusal)
    hollow = [symbol.endswith("-open") for symbol in points.marker.symbol]
    assert hollow == (frame.refusal < 0).tolist()
    assert [note.text for note in figure.layout.annotations] == [
        "harmful, refusing: 4", "harmless, refusing: 2", "harmful, complying: 4",
        "harmless, complying: 5",
    ]  # fmt: skip
    assert "restricted, declined" in points.text[0] and "harmless, answered" in points.text[6]
    assert "&lt;b&gt; &#37;{x}" in points.text[0]
    names = [trace.name for trace in figure.data[1:]]
    assert names[:2] == ["restricted", "harmless"] and names[-2:] == ["declined", "answered"]
    plain = plots.refusal_plane(frame[["set", "harmfulness", "refusal"]])
    assert not any(symbol.endswith("-open") for symbol in plain.data[0].marker.symbol)


def named(figure):
    return {trace.name: trace for trace in figure.data if trace.fill != "toself"}


def test_doses_have_lines_bands_and_the_spread_of_random_directions():
    frame = dose_frame()
    figure = plots.dose_response(frame)
    assert [note.text for note in figure.layout.annotations] == ["ablation", "addition"]
    lines = [trace for trace in figure.data if trace.fill != "toself"]
    assert [(trace.name, trace.xaxis) for trace in lines] == [
        ("restricted", "x"), ("harmless", "x"), ("harmless", "x2"),
    ]  # fmt: skip
    np.testing.assert_allclose(lines[0].y, [1, 0.5, 0])
    assert lines[0].customdata[1] == " (95 &#37;: 0.400 to 0.700, n = 30)"
    band = next(trace for trace in figure.data if trace.fill == "toself")
    np.testing.assert_allclose(band.y, [0.9, 0.4, -0.1, 0.2, 0.7, 1.2], rtol=1e-5)
    assert "not measured" in figure.layout.title.subtitle.text
    scored = plots.dose_response(frame, metric="refusal score")
    random = next(t for t in scored.data if t.name == "random directions, restricted")
    draws = np.arange(5)
    low, high = np.quantile(draws, [0.025, 0.975])
    np.testing.assert_allclose(random.y, [0, low / 2, low, high, high / 2, 0], rtol=1e-5, atol=1e-6)
    assert "5 random directions" in scored.layout.title.subtitle.text
    listed = [trace.name for trace in scored.data if trace.showlegend]
    assert len(listed) == len(set(listed)) == 4
    assert scored.layout.yaxis.title.text == "refusal score (log-odds)"
    with pytest.raises(InputError, match="no metric 'x'; it has: declined"):
        plots.dose_response(frame, metric="x")


def test_effects_stand_beside_random_directions():
    figure = plots.refusal_effects(effect_frame())
    traces = named(figure)
    np.testing.assert_allclose(traces["restricted"].y, [1, 0.2, 1])
    np.testing.assert_allclose(traces["restricted"].error_y.array, 0.1, rtol=1e-5)
    assert "change +0.500 (95 &#37;: 0.250 to 0.750)" in traces["restricted"].customdata[0]
    clouds = [trace for trace in figure.data if "directions" in trace.name]
    assert [len(trace.x) for trace in clouds] == [4, 4, 4, 4]
    assert {round(float(x)) for x in clouds[0].x} == {1}  # with ablation
    np.testing.assert_allclose(clouds[0].y, 0.95, rtol=1e-6)
    assert aliases(figure) == {"0": "none", "1": "ablation", "2": "addition"}
    said = "4 random directions of the same length of each of 2 kinds"
    assert said in figure.layout.title.subtitle.text
    alone = effect_frame().query("direction == 'refusal'")
    assert len(plots.refusal_effects(alone).data) == 2


def test_writers_are_a_map_of_heads_and_bars_by_size():
    figure = plots.refusal_writers(writer_frame())
    heads, bars = figure.data
    assert heads.z.tolist() == [[0, -1], [1, 0]] and heads.zmid == 0
    assert "95 &#37;: -1.100 to -0.800, n = 40" in heads.customdata[0][1]
    names = aliases(figure, "yaxis2")
    assert list(names.values()) == [
        "expert 5, layer 1", "expert 2, layer 1", "mlp, layer 0", "embedding",
    ]  # fmt: skip
    np.testing.assert_allclose(bars.x, [-5, -2, 0.5, 0.1], rtol=1e-6)
    assert figure.layout.title.text == "Who writes the direction: all parts sum to -6.4"
    few = plots.refusal_writers(writer_frame(), most=1)
    assert len(few.data[1].x) == 1 and "3 smaller parts are left" in few.layout.title.subtitle.text
    no_heads = writer_frame().query("component != 'head'")
    assert [trace.type for trace in plots.refusal_writers(no_heads).data] == ["bar"]


def test_changes_of_directions_have_their_ceiling():
    traces = named(plots.refusal_changes(cosine_frame()))
    np.testing.assert_allclose(traces["the two models"].y, [0.9, 0.7, 0.4], rtol=1e-6)
    np.testing.assert_allclose(traces["the two models, split halves"].y, 0.8, rtol=1e-6)
    ceiling = traces["the second with itself, split halves"]
    np.testing.assert_allclose(ceiling.y, [0.9, 0.91, 0.92], rtol=1e-6)
    assert traces["the two models"].customdata[0] == " (95 &#37;: 0.800 to 0.950, n = 50)"


def test_changes_of_weights_are_a_map_of_layers_and_sites():
    figure = plots.refusal_changes(weight_frame())
    (trace,) = figure.data
    np.testing.assert_allclose(
        trace.z, [[np.nan, np.nan, 1], [1, np.nan, np.nan], [1, 0.5, np.nan]]
    )
    assert "mean of 2 weights, 0.250 to 0.750" in trace.customdata[2][1]
    assert aliases(figure, "yaxis")["−1"] == "outside" and (trace.zmin, trace.zmax) == (0, 1)
    with pytest.raises(InputError, match="no weight that writes"):
        plots.refusal_changes(weight_frame().assign(share=np.nan))


def test_subspaces_fall_and_random_ones_do_not():
    traces = named(plots.refusal_subspace(subspace_frame()))
    np.testing.assert_allclose(traces["logistic removed"].y, [1, 0.8, 0.5], rtol=1e-6)
    np.testing.assert_allclose(traces["random removed"].y, [1, 0.99, 0.98], rtol=1e-6)
    assert traces["random removed"].line.color == "#7b8794"
    assert list(traces["chance"].y) == [0.5, 0.5]
    share = plots.refusal_subspace(subspace_frame().assign(metric="share"))
    assert "chance" not in named(share) and share.layout.title.text.startswith("Share of")
    with pytest.raises(InputError, match="no metric 'auroc refitted'; it has: auroc"):
        plots.refusal_subspace(subspace_frame(), metric="auroc refitted")
