"""The dashboard of refusal through its traits, and what it does on demand."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.page import Strip
from llama_probe.refusal.find import find_refusal_direction
from llama_probe.refusal.guard import guard
from llama_probe.refusal.study import RefusalStudy
from llama_probe.widgets import refusal_work
from llama_probe.widgets.refusal import RefusalDashboard

pytestmark = pytest.mark.slow  # a study is made for them


@pytest.fixture(scope="module")
def model():
    return lp.load("tiny-moe", progress=False)


@pytest.fixture(scope="module")
def sets():
    exam = lp.prompts.planted()["exam"]
    harmless = [*exam["same verb"][:30], *exam["same object"][:30]]
    rows = {"restricted": exam["restricted"][:60], "harmless": harmless}
    return {name: [row["chat"] for row in of] for name, of in rows.items()}


@pytest.fixture(scope="module")
def study(model, sets):
    options = {"n_random": 0, "splits": (0.6, 0.2, 0.2), "max_new_tokens": 10}
    found = find_refusal_direction(model, **sets, nearest=True, progress=False, **options)
    assert found.direction is not None
    return found


@pytest.fixture
def made(model, study, sets):
    dashboard = RefusalDashboard(model, study, **sets, n_random=2)
    yield dashboard
    dashboard.close()


def click(dashboard, view, **point):
    dashboard._viewers[view]._hear(None, {"click": {"trace": 0, **point}}, None)
    assert "Error" not in dashboard._status.value


def test_it_opens_on_the_chosen_candidate(made, study):
    chosen = study.candidates.query("chosen").iloc[0]
    assert made.layer == chosen.layer == study.direction.layer
    assert made._places[made.pos] == chosen.position == int(study.direction.position)
    star = next(t for t in made.figure("selection").data if t.name == "chosen")
    assert (star.x[0], star.y[0]) == (made.pos, made.layer)
    assert made.labels["pos"][-1] == "−1: ↵"


def test_a_click_on_a_cell_picks_that_candidate(made, study):
    click(made, "selection", x=2.0, y=3.0)
    assert (made.pos, made.layer) == (2, 3)
    here = (study.candidates.position == made._places[2]) & (study.candidates.layer == 3)
    one = study.candidates[here].iloc[0]
    title = made.figure("projections").layout.title.text.replace("−", "-")
    assert f"Score {one.refusal_score:.2f} ablated, {one.steering_score:.2f} added" in title
    assert f"KL {one.kl_div_score:.3g}; dropped: {one.dropped}" in title
    own = made._of_candidates
    own = own[(own.layer == 3) & (own.position == made._places[2]) & (own.set == "harmless")]
    mean = made.figure("projections").data[3]
    assert mean.name == "harmless" and mean.x[0] == pytest.approx(own.refusal.mean(), abs=1e-5)
    assert made._viewers["projections"].caption.startswith("Requests on the candidate at −4: assis")
    made.select(layer=0)
    assert made.figure("projections") is None and "This candidate is 0" in made._status.value
    click(made, "selection", x=2.0, y=99.0)  # there is no such block
    assert made.layer == 0


def test_requests_are_others_than_those_that_were_fitted_on(made, study, sets):
    fit = {text for of in study.asked["fit"].values() for text in of.texts}
    assert len(fit) > 60
    assert not fit & set(made._plane_of.prompt)
    assert set(made._plane_of.prompt) == {*sets["restricted"], *sets["harmless"]} - fit


def test_a_request_is_picked_by_clicking_its_point(made):
    click(made, "plane", x=0.0, y=0.0, index=30)
    assert made.prompt == 30
    frame = made._plane_of
    assert frame["set"][30] == "harmless" and frame["set"][23] == "restricted"
    ring = made.figure("plane").data[1]
    assert ring.y[0] == pytest.approx(frame.refusal[30], abs=1e-5)
    shown = made.figure("request")
    assert isinstance(shown, Strip) and "".join(shown.tokens) == frame.prompt[30]
    click(made, "plane", x=0.0, y=0.0, index=3, trace=1)  # the ring is no request
    assert made.prompt == 30


def test_doses_are_measured_on_demand(made, study, monkeypatch):
    monkeypatch.setattr(refusal_work, "_MOST_DOSED", 6)
    assert made.doses is None and made.figure("dose") is None
    made.compute([0.5, 1.0])
    assert made.wait(120.0)
    frame = made.doses
    assert (
        frame is not None
        and not frame.duplicated(["edit", "dose", "set", "metric", "direction", "draw"]).any()
    )
    assert sorted(set(frame.dose)) == [0, 0.5, 1] and set(frame.n) == {6}
    own = frame[(frame.direction == "refusal") & (frame.metric == "declined")]
    share = own.set_index(["edit", "set", "dose"])["value"]
    assert share["ablation", "restricted", 0.0] == 1 > share["ablation", "restricted", 1.0]
    assert share["addition", "harmless", 0.0] == 0 < share["addition", "harmless", 1.0]
    lines = {t.name: t for t in made.figure("dose").data if t.fill is None and t.xaxis == "x"}
    here = own[(own.edit == "ablation") & (own.set == "restricted")].sort_values("dose")
    np.testing.assert_allclose(lines["restricted"].y, here.value, rtol=1e-6)
    made.metric = "refusal score"
    names = {trace.name for trace in made.figure("dose").data}
    assert "random directions, restricted" in names
    assert made.figure("effects").layout.yaxis.title.text == "refusal score (log-odds)"


def test_answers_are_generated_on_demand_and_redacted(made, model):
    assert "“Generate” answers request 0" in made._table.value
    made.generate()
    assert made.wait(60.0)
    said = made.answers[0]
    assert list(said) == ["none", "ablation", "addition", "affine"]
    plain = model.generate(
        made._plane_of.prompt[0], template="chat", max_new_tokens=48, progress=False
    )
    assert said["none"] == plain == "Sorry, I can't help with that."
    assert "Sorry" not in said["ablation"] and len(said["ablation"]) > 24
    hidden = f"… (redacted: {len(said['ablation']) - 24} characters)"
    assert said["ablation"][:24] + hidden in made._table.value.replace("&#x27;", "'")
    assert said["ablation"][:26] not in made._table.value
    made.select(prompt=5)
    assert "Sure" not in made._table.value and "“Generate”" in made._table.value
    made.select(prompt=0)
    assert hidden in made._table.value


def test_whole_answers_are_shown_only_when_asked_for(model, study, sets):
    dashboard = RefusalDashboard(model, study, **sets, redact=False)
    dashboard.answers[0] = {"none": "<img src=x> " + "y" * 60}
    dashboard.select(prompt=1)
    dashboard.select(prompt=0)
    assert "y" * 60 in dashboard._table.value and "redacted" not in dashboard._table.value
    assert "<img" not in dashboard._table.value and "&lt;img" in dashboard._table.value
    dashboard.close()


def test_a_page_has_the_figures_and_no_answer(made, tmp_path):
    made.answers[0] = {"none": "an answer that is said"}
    made.select(prompt=1)
    made.select(prompt=0)
    arrays = made.linked().arrays
    np.testing.assert_allclose(arrays["ring_y"][:, 0], made._plane_of.refusal, rtol=1e-5)
    page = made.to_html(tmp_path / "page.html").read_text()
    assert "candidates for the refusal direction" in page and made.study.verdict[:40] in page
    assert "an answer that is said" not in page and "https://" not in page.split("<body")[0]
    assert made.controls() == ["prompt"]


def test_without_requests_those_of_the_report_are_shown(model, study):
    dashboard = RefusalDashboard(model, study)
    report = study.asked["report"]
    assert dashboard._plane_of.prompt.tolist() == [
        *report["restricted"].texts, *report["harmless"].texts
    ]  # fmt: skip
    dashboard.close()


def test_without_a_direction_there_is_the_verdict_and_the_guard(model, sets):
    answered = pd.DataFrame({"prompt": ["a"] * 20, "response": ["Sure <b>."] * 20})
    seen = guard(answered, answered)
    study = RefusalStudy(None, f"{seen.verdict} <b>", seen)
    dashboard = RefusalDashboard(model, study, **sets)
    assert list(dashboard._viewers) == ["guard"]
    assert isinstance(dashboard.figure("guard"), go.Figure)
    assert "does not refuse" in dashboard.children[1].value
    assert "&lt;b&gt;" in dashboard.children[1].value
    with pytest.raises(InputError, match="no refusal direction to edit: This model does not"):
        dashboard.generate()
    with pytest.raises(InputError, match="no refusal direction to edit"):
        dashboard.compute()
    assert dashboard.controls() == [] and dashboard.linked().arrays == {}
    dashboard.close()


def test_wrong_input_gets_a_sentence(model, study, sets, made):
    fit = study.asked["fit"]["harmless"].texts
    with pytest.raises(InputError, match=f"all {len(fit)} harmless requests are among"):
        RefusalDashboard(model, study, sets["restricted"], fit)
    with pytest.raises(InputError, match="prompt is 999, but should be 0 to "):
        made.prompt = 999
