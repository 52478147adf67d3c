"""The published rule on published runs and on planted ties; what each candidate fails."""

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_probe.errors import InputError
from llama_probe.refusal.select import relaxed, select, why_dropped

COLUMNS = ["position", "layer", "refusal_score", "steering_score", "kl_div_score"]
# Layers; how many candidates fail first by which reason: the table of safety_science.md, 1.4.
RUNS = {
    "llama-2-7b-chat-hf": (
        32,
        {"late layer": 40, "KL": 100, "does not induce": 45, "not a number": 2, "": 5},
    ),
    "meta-llama-3-8b-instruct": (32, {"late layer": 35, "KL": 41, "does not induce": 59, "": 25}),
    "qwen-1_8b-chat": (24, {"late layer": 25, "KL": 40, "does not induce": 43, "": 12}),
}


@pytest.fixture(params=RUNS)
def run(request, shared) -> tuple[str, int, pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """A released run: its name, its layers, all candidates, those that passed, the chosen one."""
    folder = shared / "data" / "refusal_selection" / request.param
    if not folder.is_dir():
        pytest.skip(f"no reference data: {folder} does not exist")
    names = ("direction_evaluations", "direction_evaluations_filtered", "direction_metadata")
    every, passed, chosen = (json.loads((folder / f"{name}.json").read_text()) for name in names)
    return request.param, RUNS[request.param][0], *map(pd.DataFrame, (every, passed)), chosen


def test_a_released_run_is_reproduced(run):
    _, n_layers, every, passed, chosen = run
    found = select(every, n_layers=n_layers)
    pd.testing.assert_frame_equal(found[COLUMNS], passed[COLUMNS], check_exact=True)
    assert {"pos": found.position[0], "layer": found.layer[0]} == chosen
    assert set(found.rule) == {"published"}


def test_a_released_run_s_candidates_fail_for_the_reasons_counted(run):
    name, n_layers, every, *_ = run
    counts = why_dropped(every, n_layers=n_layers).value_counts().to_dict()
    assert counts == RUNS[name][1]
    assert sum(counts.values()) == len(every)


@pytest.mark.parametrize(
    "change",
    [{"kl_max": 0.05}, {"induce_min": 3.5}, {"kl_max": 20.0, "induce_min": -20.0}],
    ids=str,
)
def test_another_rule_does_not_reproduce_a_released_run(run, change):
    _, n_layers, every, passed, _ = run
    assert len(select(every, n_layers=n_layers, **change)) != len(passed)


def test_another_pruning_does_not_reproduce_the_released_runs(run):
    name, n_layers, every, passed, _ = run
    assert len(select(every, n_layers=n_layers, prune=0.5)) < len(passed)
    counts = why_dropped(every, n_layers=n_layers, prune=0.15).value_counts()
    assert counts["late layer"] != RUNS[name][1]["late layer"]


def scores(*rows: tuple[Any, ...]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS)


def test_what_is_equal_to_a_limit_passes():
    """Read strictly, as in the paper, the rule would drop both."""
    edge = scores((-1, 0, 1.0, 0.0, 0.05), (-1, 1, 2.0, 1.0, 0.1))
    assert len(select(edge, n_layers=10)) == 2
    strict = edge[(edge.kl_div_score < 0.1) & (edge.steering_score > 0)]
    assert len(strict) == 0
    beyond = edge.assign(
        steering_score=[np.nextafter(0, -1), 1.0], kl_div_score=[0.05, np.nextafter(0.1, 1)]
    )
    assert why_dropped(beyond, n_layers=10).tolist() == ["does not induce", "KL"]


@pytest.mark.parametrize(("n_layers", "first"), [(18, 14), (32, 25), (24, 19), (10, 8), (4, 3)])
def test_the_first_layer_that_is_pruned(n_layers, first):
    every = scores(*((-1, layer, 0.0, 1.0, 0.0) for layer in range(n_layers)))
    reasons = why_dropped(every, n_layers=n_layers)
    assert (reasons == "late layer").tolist() == [layer >= first for layer in range(n_layers)]
    assert (why_dropped(every, n_layers=n_layers, prune=0) == "").all()


def test_the_first_reason_counts():
    nan = math.nan
    every = scores(
        (-1, 9, nan, -1.0, 9.0), (-1, 9, 0.0, -1.0, 9.0), (-1, 1, 0.0, -1.0, 9.0),
        (-1, 1, 0.0, -1.0, 0.0), (-1, 1, 0.0, 1.0, 0.0), (-1, 1, 0.0, 1.0, nan),
        (-1, 1, 0.0, nan, 0.0),
    )  # fmt: skip
    every.index = [f"row {i}" for i in range(7)]
    reasons = why_dropped(every, n_layers=10)
    assert reasons.tolist() == [
        "not a number", "late layer", "KL", "does not induce", "", "not a number", "not a number",
    ]  # fmt: skip
    assert reasons.index.equals(every.index) and reasons.name == "dropped"


def test_a_direction_of_no_length_is_a_candidate_like_others():
    nothing = scores((-5, 0, 8.36, 0.5, 0.0), (-5, 2, -1.0, 0.5, 0.05))
    assert select(nothing, n_layers=8).layer.tolist() == [2, 0]


def test_other_columns_stay_and_the_frame_is_not_changed():
    every = scores((-1, 1, 2.0, 1.0, 0.0), (-2, 1, 1.0, 1.0, 0.0)).assign(norm=[3.0, 4.0])
    before = every.copy(deep=True)
    found = select(every, n_layers=10)
    assert found.columns.tolist() == [*COLUMNS, "norm", "rule"]
    assert found.norm.tolist() == [4.0, 3.0] and found.index.tolist() == [0, 1]
    pd.testing.assert_frame_equal(every, before)


def test_where_none_passes_there_are_columns_and_no_rows():
    found = select(scores((-1, 9, 0.0, 1.0, 0.0)), n_layers=10)
    assert found.empty and found.columns.tolist() == [*COLUMNS, "rule"]
    assert select(scores().astype(float), n_layers=10).columns.tolist() == [*COLUMNS, "rule"]


def test_other_limits_are_not_called_published():
    one = scores((-1, 1, 0.0, 1.0, 0.3))
    assert select(one, n_layers=10, kl_max=0.5).rule[0] == "published but for kl_max = 0.5"
    assert select(one, n_layers=10, kl_max=0.5, prune=0.0).rule[0].endswith("0.5, prune = 0.0")


# Few values, so that ties and limits come up often.
some = st.sampled_from([-1.0, 0.0, 0.1, 0.25, 1.0, math.nan])
rows = st.lists(st.tuples(st.integers(-5, -1), st.integers(0, 9), some, some, some), max_size=25)


@settings(deadline=None, max_examples=100)
@given(rows, some.filter(math.isfinite), some.filter(math.isfinite), st.sampled_from([0.0, 0.2, 1]))
def test_it_is_the_published_rule_row_by_row(rows, kl_max, induce_min, prune):
    def passes(row: tuple[Any, ...]) -> bool:
        _, layer, refusal, steering, kl = row
        if any(math.isnan(score) for score in (refusal, steering, kl)):
            return False
        return layer < int(10 * (1 - prune)) and not kl > kl_max and not steering < induce_min

    every = scores(*rows).astype({"layer": int})
    found = select(every, n_layers=10, kl_max=kl_max, induce_min=induce_min, prune=prune)
    # Python's sort keeps the order of ties.
    expected = sorted(filter(passes, rows), key=lambda row: row[2])
    assert found[COLUMNS].values.tolist() == [list(row) for row in expected]


RANDOM = np.linspace(0.0, 1.0, 21)


def test_a_measured_limit_is_said():
    every = scores((-1, 1, 0.0, 1.0, 0.95), (-1, 2, 1.0, 1.0, 0.96), (-1, 9, -1.0, 1.0, 0.0))
    found = relaxed(every, RANDOM, n_layers=10)
    assert found.layer.tolist() == [1]
    assert found.rule[0] == "KL limit at the 95th percentile of 21 random directions: 0.95"
    assert relaxed(every, RANDOM, n_layers=10, prune=0.0).layer.tolist() == [9, 1]
    assert relaxed(every, RANDOM, n_layers=10, induce_min=2).empty
    assert select(every, n_layers=10).empty


def test_a_measured_limit_may_be_the_stricter():
    every = scores((-1, 1, 0.0, 1.0, 0.09))
    assert len(select(every, n_layers=10)) == 1
    assert relaxed(every, RANDOM / 100, n_layers=10).empty


@pytest.mark.parametrize(
    ("random_kl", "message"),
    [
        (RANDOM[:19], "at least 20"),
        (RANDOM.reshape(3, 7), "should be a row"),
        (np.append(RANDOM, np.nan), "nan at 21, but should be finite"),
        (["a"] * 20, "row of numbers"),
    ],
)
def test_what_gives_no_limit(random_kl, message):
    with pytest.raises(InputError, match=message):
        relaxed(scores((-1, 1, 0.0, 1.0, 0.0)), random_kl, n_layers=10)
    relaxed(scores((-1, 1, 0.0, 1.0, 0.0)), RANDOM[:20], n_layers=10)


ONE = scores((-1, 1, 0.0, 1.0, 0.0))


@pytest.mark.parametrize(
    ("every", "options", "message"),
    [
        (ONE.drop(columns="kl_div_score"), {}, "no column 'kl_div_score'; they have: position,"),
        (ONE, {"n_layers": 1}, "name layer 1, but the model has layers 0 to 0"),
        (ONE.assign(layer=-1), {}, "name layer -1"),
        (ONE.assign(layer=1.5), {}, "name layer 1.5"),
        (ONE.assign(layer=np.nan), {}, "name layer nan"),
        (ONE, {"n_layers": 0}, "n_layers is 0"),
        (ONE, {"prune": 1.2}, "prune is 1.2"),
        (ONE, {"kl_max": math.nan}, "kl_max is not a number"),
        (ONE.assign(refusal_score="low"), {}, "'refusal_score' of the scores should hold numbers"),
    ],
)
def test_what_cannot_be_selected_from(every, options, message):
    with pytest.raises(InputError, match=message):
        select(every, **{"n_layers": 10, **options})
