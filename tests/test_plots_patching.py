"""The figures of patching: maps over any two axes, and estimates against exact effects."""

import numpy as np
import pandas as pd
import pytest

import llama_probe as lp
from llama_probe.errors import InputError

FRAME = pd.DataFrame(
    {
        "layer": [0, 0, 1, 1],
        "pos": ["S2", "end", "S2", "end"],
        "site": "resid_pre",
        "metric": [1.0, 2.0, 3.0, 4.0],
        "effect": [0.0, 0.25, 0.5, 1.0],
        "ci_low": [np.nan, 0.2, 0.4, 0.9],
        "ci_high": [np.nan, 0.3, 0.6, 1.1],
        "n": 16,
    }
)


def test_named_positions_and_intervals():
    figure = lp.plots.patch(FRAME)
    (trace,) = figure.data
    assert trace.z.tolist() == [[0, 0.25], [0.5, 1]]
    assert figure.layout.xaxis.labelalias == {"0": "S2", "1": "end"}
    assert trace.customdata[0][0] == "<br>metric 1.000"
    assert trace.customdata[1][1] == " (0.900 to 1.100, n = 16)<br>metric 4.000"


@pytest.mark.parametrize("unit", ["head", "expert", "neuron"])
def test_units_run_to_the_right(unit):
    frame = FRAME.drop(columns=["pos", "ci_low"]).assign(**{unit: [0, 1, 0, 1]})
    figure = lp.plots.patch(frame)
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == (unit, "layer")


def test_agreement_has_a_point_a_cell_and_a_colour_a_site():
    other = FRAME.assign(site="<b>z", effect=[1.0, 0.0, 0.0, 0.5])
    exact = pd.concat([FRAME, other])
    figure = lp.plots.agreement(exact, exact.assign(effect=exact.effect / 2))
    first, second, diagonal = figure.data
    assert first.name == "resid_pre" and second.name == "&lt;b&gt;z"
    assert first.x.tolist() == [0, 0.25, 0.5, 1] and first.y.tolist() == [0, 0.125, 0.25, 0.5]
    assert first.text[1] == "pos end, layer 0"
    assert diagonal.x == diagonal.y == (0, 1)


def test_agreement_needs_cells_in_common():
    with pytest.raises(InputError, match="no cell in common"):
        lp.plots.agreement(FRAME, FRAME.assign(layer=7))
    with pytest.raises(InputError, match="effect"):
        lp.plots.agreement(FRAME, FRAME.drop(columns="effect"))
