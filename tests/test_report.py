import html
import json
import os
import re

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import pytest

from llama_probe import plots
from llama_probe.errors import InputError
from llama_probe.page.pack import plotly_text
from llama_probe.page.report import Report

NASTY = "</script><script>alert(1)</script><!-- \"quoted\" 'single' & <b> {{ 7 * 7 }}"


def figure(title=None):
    return plots.attention([[1.0, 0.0], [0.5, 0.5]], ["<b>", NASTY], title)


def without_plotly(page):
    return page.replace(plotly_text(), "")


def nasty_report():
    frame = pd.DataFrame({NASTY: [NASTY, None], "value": [0.123456, np.nan]})
    report = Report(NASTY).heading(NASTY).text(NASTY)
    report.table(frame, caption=NASTY)
    report.tokens([NASTY, "a"], [1.0, np.nan], caption=NASTY)
    # Figures may come from elsewhere: this text is as it was given.
    chart = figure(NASTY).update_layout(meta=NASTY)
    return report.figure(chart, NASTY, table=frame)


def test_nothing_that_is_put_in_becomes_markup():
    page = without_plotly(nasty_report().html())
    assert "alert(1)" in page and "<script>alert" not in page
    assert page.count("<script") == page.count("</script>") == 4
    assert "<!--" not in page and "<b>" not in page and "{{ 7 * 7 }}" in page
    title = re.search(r"<title>(.*)</title>", page)
    assert title and html.unescape(title[1]) == NASTY
    label = re.search(r'role="img" aria-label="([^"]*)"', page)
    assert label and html.unescape(label[1]) == NASTY


def test_the_page_asks_for_nothing():
    page = nasty_report().figure(figure(), "again").html()
    assert page.count(plotly_text()) == 1
    own = without_plotly(page)
    assert not re.search(r'(src|href)="(?!data:)', own)
    assert "http:" not in own and "https:" not in own and "url(" not in own and "cdn" not in own
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', own)
    assert policy and "default-src 'none'" in policy[1] and "unsafe-eval" not in policy[1]


def test_a_figure_travels_whole_but_for_its_template():
    chart = figure("Title")
    before = chart.to_json()
    page = Report("r").figure(chart, "caption").html()
    (spec,) = re.findall(r'<script type="application/json" class="spec">(.*?)</script>', page)
    expected = json.loads(before)
    expected["layout"].pop("template")
    assert json.loads(spec) == expected
    assert chart.to_json() == before


def test_other_peoples_figures_are_taken_too():
    scatter = px.scatter(pd.DataFrame({"x": [0.0, np.nan], "y": [np.inf, 1.0]}), x="x", y="y")
    assert 'class="spec"' in Report("r").figure(scatter, "px").figure(go.Figure(), "empty").html()


def test_a_long_table_is_cut_and_says_so():
    frame = pd.DataFrame({"n": range(1000, 1060), "share": 1 / 3, "name": "x" * 80})
    page = without_plotly(Report("r").table(frame).html())
    assert page.count("<tr>") == 51 and "The first 50 of 60 rows." in page
    assert ">1049<" in page and ">1050<" not in page
    assert ">0.3333<" in page and "x" * 80 in page
    assert "of 60 rows" not in without_plotly(Report("r").table(frame, max_rows=60).html())
    with pytest.raises(InputError, match="max_rows is 0"):
        Report("r").table(frame, max_rows=0)


def test_missing_values_are_blank_and_whole_numbers_whole():
    frame = pd.DataFrame({"head": pd.array([12345, None], dtype="Int64"), "ok": [True, None]})
    cells = re.findall(r"<td[^>]*>(.*?)</td>", Report("r").table(frame).html())
    assert cells == ["12345", "True", "", ""]


def test_tokens_are_coloured_by_sign_and_size():
    page = Report("r").tokens([" a", "b\n", "c", "d"], [2.0, -1.0, 0.0, np.nan]).html()
    spans = re.findall(r'<span title="(.*?)"(?: style="(.*?)")?>(.*?)</span>', page)
    assert [(title, text) for title, _, text in spans] == [
        ("0: 2", "·a"),
        ("1: -1", "b↵"),
        ("2: 0", "c"),
        ("3: nan", "d"),
    ]
    opacity = [style.rpartition(", ")[2].rstrip(")") for _, style, _ in spans]
    assert opacity == ["0.550", "0.275", "0.000", ""]
    assert "213, 94, 0" in spans[0][1] and "0, 114, 178" in spans[1][1]
    assert page.count("</span><br>") == 1


def test_tokens_without_values_and_with_too_few():
    assert "<span>a</span>" in Report("r").tokens(["a", "b"]).html()
    assert '<span title="1: 0">b</span>' in Report("r").tokens(["a", "b"], [0, 0]).html()
    with pytest.raises(InputError, match="1 values for 2 tokens"):
        Report("r").tokens(["a", "b"], [1.0])


def test_a_figure_needs_a_caption():
    with pytest.raises(InputError, match="caption"):
        Report("r").figure(figure(), "  ")


def test_write_makes_folders_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "new" / "folder" / "report.html"
    assert Report("one").write(path) == path
    Report("two \ud800 é").write(str(path))
    page = path.read_text(encoding="utf-8")
    assert "<h1>two &#55296; é</h1>" in page and "one" not in page.partition("</h1>")[0][-40:]
    assert os.listdir(path.parent) == ["report.html"]


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    Report("old").write(path)
    before = path.read_bytes()

    def fail(part, target):
        assert part.parent == path.parent  # on the same disk, or it could not be moved at once
        assert "<h1>new</h1>" in part.read_text(encoding="utf-8")
        raise OSError("disk")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk"):
        Report("new").write(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        Report("r").write(tmp_path)
