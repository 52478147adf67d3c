"""The dashboard of probes through its traits, and its measuring in the background."""

import threading

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from traitlets import TraitError

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.page import Strip
from llama_probe.widgets.probing import ProbeDashboard

N = 60
LABELS = np.array([False, True] * (N // 2))
TEXTS = [f"text {i} <b>%{{x}}" for i in range(N)]
BOTH = ("logistic", "mass_mean")


def activations(hooks=("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")):
    """The later the hook, the better can the labels be read."""
    random = np.random.default_rng(0)
    signal = np.where(LABELS, 1.0, -1.0)[:, None]
    return {hook: 0.4 * i * signal + random.normal(size=(N, 5)) for i, hook in enumerate(hooks)}


ARGUMENTS = {"groups": np.arange(N) // 2, "probe": BOTH, "texts": TEXTS, "strength": 1.0}
FEW = ("shuffled labels", "best cell")


@pytest.fixture(scope="module")
def frame():
    return lp.probe(activations(), LABELS, **ARGUMENTS, controls=FEW, repeats=1, progress=False)


@pytest.fixture
def made(frame):
    dashboard = ProbeDashboard(activations(), LABELS, **ARGUMENTS, controls=FEW, frame=frame)
    yield dashboard
    dashboard.close()


def click(dashboard, view, **point):
    dashboard._viewers[view]._hear(None, {"click": {"trace": 0, **point}}, None)
    assert "Error" not in dashboard._status.value


def value_of(frame, **wanted):
    for name, value in {"kind": "probe", **wanted}.items():
        frame = frame[frame[name] == value]
    return frame["value"].item()


def test_it_opens_on_the_best_layer_of_a_frame(made, frame):
    assert made.layer == 1 and (made.probe, made.metric) == ("logistic", "auroc")
    traces = made.figure("curve").data
    line = next(trace for trace in traces if trace.name == "logistic" and trace.fill is None)
    auroc = frame[(frame.kind == "probe") & (frame.metric == "auroc") & (frame.probe == "logistic")]
    np.testing.assert_allclose(line.y, auroc.value, rtol=1e-6)
    assert "grid" not in made._viewers  # one position


@pytest.mark.parametrize("probe", BOTH)
def test_scores_are_those_that_the_curve_is_made_of(made, frame, probe):
    made.probe = probe
    for layer in (0, 1):
        click(made, "curve", x=layer, y=0.5)
        assert made.layer == layer
        points, ring = made.figure("scores").data
        right = (np.array(points.x) > 0) == LABELS
        accuracy = value_of(frame, layer=layer, probe=probe, metric="accuracy")
        assert right.mean() == pytest.approx(accuracy, abs=1e-12)
        assert ring.x[0] == points.x[made.prompt]


def test_scores_are_in_the_order_of_the_samples():
    """A probe that knows the answer scores each sample by its own label."""
    x = {"blocks.0.x": np.where(LABELS, 1.0, -1.0)[:, None] * np.arange(1, N + 1)[:, None]}
    dashboard = ProbeDashboard(x, LABELS, frame=None, controls=(), probe="mass_mean")
    score = np.array(dashboard.figure("scores").data[0].x)
    assert (score > 0).tolist() == LABELS.tolist()
    assert np.corrcoef(np.abs(score), np.arange(N))[0, 1] > 0.99
    assert dashboard.wait(60.0)
    dashboard.close()


def test_a_sample_is_read_by_clicking_its_point_or_its_bar(made):
    click(made, "scores", x=0.0, y=1.0, index=7)
    assert made.prompt == 7
    shown = made.figure("text")
    assert isinstance(shown, Strip) and "".join(shown.tokens) == TEXTS[7]
    ring = made.figure("scores").data[1]
    assert ring.x[0] == made.figure("scores").data[0].x[7]
    scores = np.array(made.figure("scores").data[0].x)
    margin = np.where(LABELS, scores, -scores)
    bars, texts = made.figure("wrong").data
    np.testing.assert_allclose(bars.x, np.sort(-margin)[::-1][:12], rtol=1e-6)
    click(made, "wrong", x=0.0, y=2.0)
    assert made.prompt == np.argsort(margin)[2]
    assert texts.text[2].startswith(f"{LABELS[made.prompt]}: text {made.prompt} &lt;b&gt;&#37;")
    click(made, "wrong", x=0.0, y=40.0)  # there is no such bar
    click(made, "scores", x=0.0, y=1.0, index=3, trace=1)  # the ring is no sample
    assert made.prompt == np.argsort(margin)[2]


def test_another_metric_or_probe(made):
    made.metric = "ece"
    assert made.figure("curve").layout.yaxis.title.text == "calibration error"
    made.probe = "mass_mean"  # gives no probabilities
    assert made.figure("curve") is None
    assert "calibration error is not measured for mass_mean" in made._status.value
    made.metric = "auroc"
    assert {trace.name for trace in made.figure("curve").data} >= {"mass mean", "shuffled labels"}
    with pytest.raises(InputError, match="metric is 'aurc', .* did you mean 'auroc'"):
        made.metric = "aurc"
    with pytest.raises(TraitError):
        made.probe = 3


def test_the_best_cell_is_told_as_it_looks_and_as_it_is(made, frame):
    auroc = frame[frame.metric == "auroc"].set_index("kind").value
    said = made.note()
    assert said.startswith("The best of 4 cells by AUROC is ")
    assert f"{auroc['best cell']:.3f}" in said and f"{auroc['best cell, corrected']:.3f}" in said


def test_a_dashboard_measures_by_itself(frame):
    dashboard = ProbeDashboard(activations(), LABELS, **ARGUMENTS, controls=FEW, repeats=1)
    assert dashboard.wait(60.0) and "Error" not in dashboard._status.value
    pd.testing.assert_frame_equal(dashboard.frame, frame)
    assert isinstance(dashboard.figure("curve"), go.Figure)
    assert dashboard._again.layout.display == "none"
    dashboard.close()


def test_measuring_can_be_stopped_and_begun_again(monkeypatch):
    begun, go_on = threading.Event(), threading.Event()

    def stay(dashboard, done, total):
        begun.set()
        assert go_on.wait(60)

    monkeypatch.setattr(ProbeDashboard, "_progressed", stay)
    dashboard = ProbeDashboard(activations(), LABELS, **ARGUMENTS, controls=())
    assert begun.wait(60) and dashboard._stop.layout.display == ""
    assert isinstance(dashboard.figure("scores"), go.Figure)  # there meanwhile
    click(dashboard, "scores", x=0.0, y=1.0, index=5)
    dashboard._stop.click()
    go_on.set()
    assert dashboard.wait(60.0)
    assert dashboard.frame is None and dashboard.figure("curve") is None
    assert "stopped" in dashboard._status.value and dashboard._again.layout.display == ""
    dashboard._again.click()
    assert dashboard.wait(60.0) and dashboard.frame is not None
    dashboard.close()


def test_what_goes_wrong_while_measuring_is_a_sentence():
    dashboard = ProbeDashboard(activations(), LABELS, controls="lenght", strength=1.0)
    assert dashboard.wait(60.0)
    assert "InputError: there is no control" in dashboard._status.value
    assert dashboard._again.layout.display == ""
    dashboard.close()


def test_several_positions_have_a_grid():
    model = lp.load("tiny-moe", progress=False)
    questions = lp.prompts.planted()["exam"]["verdicts"][:N]
    prompts = pd.DataFrame(questions).rename(columns={"prompt": "text"})
    acts = lp.capture(model, prompts, "blocks.*.hook_resid_p*", [-1, -3], progress=False)
    dashboard = ProbeDashboard(acts, "label", groups="text", probe="mass_mean", controls=())
    assert dashboard.wait(60.0) and dashboard.title == "Probes of label in tiny-moe"
    assert (dashboard.at, dashboard.site) == ("-3", "hook_resid_pre")
    (cells,) = dashboard.figure("grid").data
    assert cells.z.shape == (4, 2)
    click(dashboard, "grid", x=list(cells.x)[1], y=3)
    assert (dashboard.at, dashboard.layer) == ("-1", 3)
    right = value_of(dashboard.frame, at="-1", hook="blocks.3.hook_resid_pre", metric="accuracy")
    labels = prompts.label.to_numpy(dtype=bool)
    assert ((np.array(dashboard.figure("scores").data[0].x) > 0) == labels).mean() == right
    dashboard.site = "hook_resid_post"
    assert value_of(dashboard.frame, at="-1", hook="blocks.3.hook_resid_post", metric="auroc") == (
        pytest.approx(dashboard.figure("curve").data[-1].y[3], rel=1e-6)
    )
    dashboard.close()


def test_samples_may_be_tokens():
    model = lp.load("tiny-moe", progress=False)
    texts = [f"{a}+{b}=" for a in (12, 31, 45) for b in (17, 60)] + ["The capital of France is"] * 4
    acts = lp.capture(model, texts, "blocks.1.hook_resid_post", slice(1, None), progress=False)
    dashboard = ProbeDashboard(
        acts, [True] * 6 + [False] * 4, probe="mass_mean", controls=(), folds=2
    )
    row = acts.index.iloc[7]
    dashboard.select(prompt=7)
    assert "".join(dashboard.figure("text").tokens).startswith(f"{row.pos}: {row.token!r} of ")
    dashboard.close()


def test_a_page_holds_what_clicks_would_show(made):
    arrays = made.linked().arrays
    for layer, prompt in ((0, 3), (1, 11)):
        made.select(layer=layer, prompt=prompt)
        points, ring = made.figure("scores").data
        bars, texts = made.figure("wrong").data
        np.testing.assert_allclose(points.x, arrays["scores"][layer], rtol=1e-6)
        np.testing.assert_allclose(ring.x, arrays["ring_x"][layer, prompt], rtol=1e-6)
        np.testing.assert_allclose(ring.y, arrays["ring_y"][prompt], rtol=1e-6)
        np.testing.assert_allclose(bars.x, arrays["wrong"][layer], rtol=1e-6)
        assert list(bars.text) == arrays["hovers"][layer]
        assert list(texts.text) == arrays["texts"][layer]
        np.testing.assert_allclose(texts.x, arrays["left"][layer], rtol=1e-6)
    assert arrays["words"][11] == ["text", "·11", "·<b>%{x}"]
    assert made.controls() == ["layer", "prompt"]


def test_a_page_is_one_file(made, tmp_path):
    page = made.to_html(tmp_path / "page.html").read_text()
    assert "text 11" in page and "<b>%{x}" not in page


def test_layers_that_were_not_captured_have_nothing_to_show():
    hooks = ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post", "ln_final.hook_normalized")
    x = activations(hooks)
    dashboard = ProbeDashboard(x, LABELS, controls=(), probe="mass_mean")
    names = ["layer 0 (not captured)", "layer 1", "layer 2 (not captured)", "layer 3"]
    assert dashboard.labels["layer"] == [*names, "ln_final.hook_normalized"]
    dashboard.select(layer=2)
    assert dashboard.figure("scores") is None and dashboard.figure("wrong") is None
    dashboard.select(layer=4)
    assert isinstance(dashboard.figure("scores"), go.Figure)
    assert np.isnan(dashboard.arrays()["scores"][2]).all()
    assert dashboard.wait(60.0)
    dashboard.close()


def test_of_many_samples_some_are_shown(monkeypatch, made):
    monkeypatch.setattr("llama_probe.widgets.probing._MOST_POINTS", 20)
    dashboard = ProbeDashboard(activations(), LABELS, **ARGUMENTS, frame=made.frame)
    points = dashboard.figure("scores").data[0]
    assert len(points.x) == 20 and points.x[-1] == made.figure("scores").data[0].x[-1]
    assert "20 of 60 samples are shown" in dashboard.note()
    assert dashboard.labels["prompt"][-1] == "59, labelled True"
    dashboard.close()


@pytest.mark.parametrize("labels", [np.arange(N) % 3, np.linspace(0.0, 1.0, N)])
def test_more_classes_and_numbers(labels):
    dashboard = ProbeDashboard(activations(), labels, probe="ridge", controls=(), strength=1.0)
    assert dashboard.wait(60.0)
    name = "accuracy" if labels.dtype == int else "r2"
    points = dashboard.figure("scores").data[0]
    expected = value_of(dashboard.frame, metric=name, layer=dashboard.layer)
    if name == "accuracy":
        assert (np.array(points.x) > 0).mean() == pytest.approx(expected)
    else:
        error = np.square(np.array(points.x) - labels).sum() / np.square(labels - 0.5).sum()
        assert 1 - error == pytest.approx(expected, abs=1e-5)
        np.testing.assert_allclose(points.y, labels, rtol=1e-6)
    dashboard.linked()
    dashboard.close()


def test_a_leak_is_told():
    texts = [f"The city of {i} is in country {i}." for i in range(N)]
    dashboard = ProbeDashboard(activations(), LABELS, texts=texts, controls=(), probe="mass_mean")
    assert dashboard.wait(60.0) and dashboard.frame is not None
    assert "may leak between folds" in dashboard.note()
    assert "may leak between folds" in dashboard._says.value
    dashboard.close()


def test_wrong_input_gets_a_sentence(frame):
    x = activations()
    with pytest.raises(InputError, match="there are 3 for 60 prompts"):
        ProbeDashboard(x, [0, 1, 1])
    with pytest.raises(InputError, match="one target, but there are a, b"):
        ProbeDashboard(x, {"a": LABELS, "b": ~LABELS})
    with pytest.raises(InputError, match="probe is 'logit'"):
        ProbeDashboard(x, LABELS, probe="logit")
    with pytest.raises(InputError, match="no row of 'ridge'"):
        ProbeDashboard(x, LABELS, **(ARGUMENTS | {"probe": "ridge"}), frame=frame)
    with pytest.raises(InputError, match="no column 'hook'"):
        ProbeDashboard(x, LABELS, frame=pd.DataFrame({"value": [1.0]}))
    x["blocks.1.hook_resid_post"][4, 2] = np.nan
    with pytest.raises(InputError, match=r"blocks\.1.*NaN.*row 4"):
        ProbeDashboard(x, LABELS)
