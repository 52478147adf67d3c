"""Figures of mixtures of experts."""

import numpy as np
import pandas as pd
import plotly.io as pio
import pytest
import tiny
from test_plots import as_csv

from llama_probe import plots
from llama_probe.errors import InputError
from llama_probe.routing import expert_contrast, routes_of, routing_report, specialisation

ROWS = tiny.tokens(batch=8, length=9).tolist()
NAMES = [
    "routing_load",
    "routing_transition",
    "routing_coactivation",
    "specialisation",
    "expert_contrast",
]
every_figure = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def frames() -> dict[str, pd.DataFrame]:
    model = tiny.make("qwen2-moe")
    routes = routes_of(model, ROWS, list("aabbabab"))
    report = routing_report(routes)
    return {
        "routing_load": report.load,
        "routing_transition": report.transition,
        "routing_coactivation": report.coactivation,
        "specialisation": specialisation(routes, permutations=19),
        "expert_contrast": expert_contrast(model, ROWS[:4], ROWS[4:], permutations=19),
    }


@every_figure
def test_a_frame_draws_the_same_after_concat_and_a_csv_round_trip(frames, name):
    draw, frame = getattr(plots, name), frames[name]
    halves = pd.concat([frame.iloc[:3], frame.iloc[3:]], ignore_index=True)
    for options in ({}, {"keep_default_na": False}):
        assert draw(as_csv(halves, **options)).to_json() == draw(frame).to_json()


@every_figure
def test_axes_are_named_and_hovers_end(frames, name):
    figure = getattr(plots, name)(frames[name])
    assert figure.layout.template == pio.templates["llama_probe"]
    assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text
    for trace in figure.data:
        assert trace.hovertemplate.endswith("<extra></extra>")
    titled = getattr(plots, name)(frames[name], title="<b>")
    assert titled.layout.title.text == "&lt;b&gt;"


@every_figure
def test_wrong_frames_get_a_sentence(frames, name):
    draw, frame = getattr(plots, name), frames[name]
    with pytest.raises(InputError, match="no column 'value'; it has: .*layer"):
        draw(frame.drop(columns="value"))
    with pytest.raises(InputError, match="no rows"):
        draw(frame.iloc[:0])
    with pytest.raises(InputError, match="share a"):
        draw(pd.concat([frame, frame]))


def test_load_is_drawn_in_doublings(frames):
    frame = frames["routing_load"].copy()
    (trace,) = plots.routing_load(frame).data
    own = frame[frame.metric == "load"]
    wanted = np.clip(np.log2(own.value.clip(lower=1e-9) / own.uniform), -4, 4)
    np.testing.assert_allclose(trace.z, wanted.to_numpy().reshape(2, 8), rtol=1e-5)
    np.testing.assert_allclose(trace.customdata, own.value.to_numpy().reshape(2, 8), rtol=1e-5)
    assert trace.colorbar.title.text == "log2(load / uniform)"
    assert (trace.zmid, -trace.zmin) == (0, trace.zmax)
    weighted = plots.routing_load(frame, "weighted_load")
    assert weighted.layout.title.text == "Weighted load"
    with pytest.raises(InputError, match="no metric 'use'; it has: load, weighted_load"):
        plots.routing_load(frame, "use")


def test_an_expert_that_is_never_used_lies_at_the_end_of_the_scale():
    frame = pd.DataFrame({"layer": 0, "expert": [0, 1, 2], "value": [0.0, 1.0, np.nan]})
    (trace,) = plots.routing_load(frame.assign(metric="load", uniform=0.5)).data
    np.testing.assert_array_equal(trace.z, np.array([[-4, 1, np.nan]], dtype=np.float32))
    assert (trace.zmin, trace.zmax) == (-4, 4)


def test_a_transition_is_drawn_from_one_layer_to_the_next(frames):
    frame = frames["routing_transition"]
    figure = plots.routing_transition(frame)
    np.testing.assert_allclose(figure.data[0].z, frame.value.to_numpy().reshape(8, 8), rtol=1e-6)
    assert (figure.data[0].zmin, figure.data[0].zmax) == (0, pytest.approx(frame.value.max()))
    assert figure.layout.title.text == "From layer 0 to layer 2"
    assert figure.layout.xaxis.title.text == "expert of layer 2"
    assert figure.layout.yaxis.title.text == "expert of layer 0"
    with pytest.raises(InputError, match="no layer 1; it has: 0"):
        plots.routing_transition(frame, 1)


def test_coactivation_is_drawn_against_a_random_draw(frames):
    frame = frames["routing_coactivation"]
    figure = plots.routing_coactivation(frame, 2)
    (trace,) = figure.data
    assert np.isnan(np.diag(trace.z)).all()
    row = frame[(frame.layer == 2) & (frame.n > 0)].iloc[0]
    wanted = np.clip(np.log2(row.value / row.baseline), -4, 4)
    assert trace.z[int(row.expert), int(row.other)] == pytest.approx(wanted, abs=1e-5)
    assert figure.layout.title.text == "Chosen together in layer 2"


def test_specialisation_has_a_line_and_its_chance_for_each_metric(frames):
    frame = frames["specialisation"].assign(p=lambda f: np.where(f.layer == 0, 0.01, 0.2))
    figure = plots.specialisation(frame)
    assert len(figure.data) == 6
    names = [trace.name for trace in figure.data[::2]]
    assert names == ["expert and label", "expert and label, given the token", "expert and token"]
    for metric, value, chance in zip(
        ("mutual_information", "given_token", "by_token"),
        figure.data[::2],
        figure.data[1::2],
        strict=True,
    ):
        own = frame[frame.metric == metric]
        np.testing.assert_allclose(value.y, own.value, rtol=1e-5)
        np.testing.assert_allclose(chance.y, own.baseline, rtol=1e-5)
        assert [symbol.endswith("-open") for symbol in value.marker.symbol] == [False, True]
        assert (chance.line.dash, chance.line.color) == ("dot", value.line.color)


def test_a_contrast_is_a_volcano(frames):
    frame = frames["expert_contrast"].copy()
    frame["q"] = np.where(frame.index < 3, 0.01, 0.2)
    no, yes = plots.expert_contrast(frame).data
    assert (len(no.x), len(yes.x)) == (len(frame) - 3, 3)
    np.testing.assert_allclose(yes.x, frame.value[:3], rtol=1e-5)
    np.testing.assert_allclose(yes.y, -np.log10(frame.p[:3]), rtol=1e-5)
    assert yes.marker.symbol != no.marker.symbol
    assert yes.name == "q below 0.05"


def test_large_models_make_small_figures():
    layers, experts = 48, 128
    layer, expert = (side.ravel() for side in np.indices((layers, experts)))
    value = np.random.default_rng(0).random(len(layer))
    frame = pd.DataFrame({"layer": layer, "expert": expert, "value": value, "p": 0.5, "q": 0.9})
    frame = frame.assign(metric="load", uniform=0.5, ci_low=value, ci_high=value, stability=0.1)
    assert len(plots.routing_load(frame).to_json()) < 200_000
    assert len(plots.expert_contrast(frame).to_json()) < 500_000
    pair, other = (side.ravel() for side in np.indices((experts, experts)))
    square = pd.DataFrame({"layer": 0, "next_layer": 1, "expert": pair, "next_expert": other})
    square = square.assign(other=other, value=0.5, lift=1.5, share=0.1, baseline=0.9)
    assert len(plots.routing_transition(square).to_json()) < 500_000
    assert len(plots.routing_coactivation(square).to_json()) < 500_000
