"""A report with every kind of figure, opened in a browser that has no network."""

import pandas as pd
import pytest
from browser import open_offline
from test_plots import NASTY, causal, dla_frame, head_frame, heat_frame, lens_frame, patch_frame

from llama_probe import plots
from llama_probe.page.report import Report

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    tokens = NASTY * 2
    report = Report("Every figure <script>throw 1</script>").tokens(tokens, range(len(tokens)))
    report.figure(plots.heatmap(patch_frame(), color="metric"), "heat map")
    lens = lens_frame(n_layers=2, tokens=tokens, top_k=4)
    report.figure(plots.logit_lens(lens), "lens", table=lens)
    report.figure(plots.attention(causal(16), tokens), "attention")
    report.figure(plots.attention(causal(512), [f" t{i}" for i in range(512)]), "long attention")
    report.figure(plots.attention([[1.0]], ["a"]), "one token")
    report.figure(plots.patch(patch_frame()), "patching")
    report.figure(plots.patch(head_frame()), "patching heads")
    report.figure(plots.direct_logit_attribution(dla_frame()), "attribution")
    report.figure(plots.heatmap(heat_frame().assign(pos=[998, 999, 1000])), "four digits")
    return report.write(tmp_path_factory.mktemp("report") / "report.html")


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_every_figure_is_drawn_offline(chromium, report, tmp_path, color_scheme):
    shot = tmp_path / "page.png"
    seen = open_offline(
        chromium, report, screenshot_path=shot, color_scheme=color_scheme, hover=True
    )
    assert seen.errors == [] and seen.requests == []
    assert seen.figures == [1, 1, 1, 1, 1, 1, 1, 4, 1]
    assert shot.stat().st_size > 50_000
    # A pointer reads the token's text as it is, also where the axis leaves the label out.
    assert "position 15: ·a·a·a" in seen.hovers[1]
    for text in ("%{z}", "</script>", "&amp;", "$x$"):
        assert text in seen.hovers[1]
    assert "query 15: " in seen.hovers[2]
    assert "2 queries from 510: ·t510" in seen.hovers[3]
    assert "position 2: <i>" in seen.hovers[5]
    assert "layer 1, head 2" in seen.hovers[7]
    assert "position 1000" in seen.hovers[8]


def test_errors_and_requests_would_be_seen(chromium, tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<html data-drawn><img src='http://localhost:9/x.png'><div class='js-plotly-plot'></div>"
        "<script>throw new Error('broken')</script>"
    )
    seen = open_offline(chromium, page)
    assert seen.figures == [0]
    assert any("broken" in error for error in seen.errors)
    assert seen.requests == ["http://localhost:9/x.png"]


def test_the_policy_stops_a_request(chromium, tmp_path):
    path = Report("r").table(pd.DataFrame({"a": [1]})).write(tmp_path / "page.html")
    page = path.read_text(encoding="utf-8")
    path.write_text(
        page.replace("</main>", "<img src='http://localhost:9/x.png'></main>"), encoding="utf-8"
    )
    seen = open_offline(chromium, path)
    assert any("Content Security Policy" in error for error in seen.errors)
