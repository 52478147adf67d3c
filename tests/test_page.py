"""What an offline page is made of: packed arrays, linked views, and nothing that runs."""

import base64
import gzip
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_probe import plots
from llama_probe.errors import InputError
from llama_probe.page import Fill, Linked, Report, Strip, View, pack
from llama_probe.page.report import own_file, templates
from llama_probe.page.views import filled

NASTY = [
    "</script><script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'>",
    "%{x} $e^x$ &amp;",
    "‮right to left",
    "​zero width",
    "{query}",
    "\n",
    "",
]


def unpacked(about: dict[str, Any], blob: str, name: str) -> np.ndarray:
    """What the page's script makes of an array, in Python."""
    meta = about[name]
    raw = gzip.decompress(base64.b64decode(blob))
    kind = np.uint8 if meta["bits"] == 8 else np.dtype("<u2")
    codes = np.frombuffer(raw, kind, int(np.prod(meta["shape"])), meta["start"])
    share = codes.astype(float) / (2 ** meta["bits"] - 2)
    share = share**2 if meta["root"] else share
    values = meta["low"] + (meta["high"] - meta["low"]) * share
    return np.where(codes == 2 ** meta["bits"] - 1, np.nan, values).reshape(meta["shape"])


@given(
    st.lists(st.floats(-1e6, 1e6, width=32) | st.just(np.nan), min_size=1, max_size=40),
    st.booleans(),
)
def test_packing_is_rounding(values, amounts):
    array = np.array(values, dtype=np.float32)
    array = np.abs(array) if amounts else array
    about, blob = pack.packed({"other": np.arange(3.0), "x": array})
    back = unpacked(about, blob, "x")
    span = np.nanmax(array) - min(np.nanmin(array), 0) if np.isfinite(array).any() else 0
    assert (np.isnan(back) == np.isnan(array)).all()
    assert np.nanmax(np.abs(back - array), initial=0) <= span * 1e-4 + 1e-30
    assert unpacked(about, blob, "other").tolist() == pytest.approx([0, 1, 2], abs=1e-3)


def test_many_numbers_take_a_byte_each_and_small_ones_stay_apart():
    array = np.zeros((2, 2**20), dtype=np.float32)
    array[0, :3] = [1.0, 0.001, 0.0001]
    about, blob = pack.packed({"x": array})
    assert about["x"]["bits"] == 8 and about["x"]["shape"] == [2, 2**20]
    back = unpacked(about, blob, "x")
    assert back[0, 0] == 1 and 0.0005 < back[0, 1] < 0.0015 and back[0, 2] > 0


def test_the_same_arrays_give_the_same_text():
    arrays = {"x": np.linspace(-1, 1, 7), "t": [["a"], ["b"]]}
    assert pack.packed(arrays) == pack.packed(arrays)
    assert pack.packed(arrays)[0]["t"] == [["a"], ["b"]]


def pattern(n: int) -> np.ndarray:
    weights = np.tril(np.random.default_rng(0).random((2, n, n)) + 0.1).astype(np.float32)
    return weights / weights.sum(-1, keepdims=True)


def linked(tokens: list[str] = NASTY, **changes: Any) -> Linked:
    """Two heads' patterns: a map, and a strip of what a query looks at."""
    weights = pattern(len(tokens))
    hidden = np.where(np.tri(len(tokens), dtype=bool), weights, np.nan)
    state = {"head": 0, "query": 3, "key": 1}
    map_view = View(
        "map", "Head {head} at {query}", lambda: plots.attention(weights[0], tokens), ("head",),
        {"x": "key", "y": "query"},
        fills=(Fill("pattern", ("head",), pool=-(-len(tokens) // 256)),),
    )  # fmt: skip
    row_view = View(
        "row", "What {query} looks at", lambda: Strip(tokens, hidden[0, 3]), ("head", "query"),
        {"x": "key"}, {"query": "Q", "key": "K"},
        (Fill("pattern", ("head", "query"), "values", None),),
    )  # fmt: skip
    column_view = View(
        "column", "Who looks at {key}", lambda: Strip(tokens, hidden[0, :, 1]), ("head", "key"),
        fills=(Fill("pattern", ("head", None, "key"), "values", None),),
    )  # fmt: skip
    names = [f"{i}: {text}" for i, text in enumerate(tokens)]
    labels = {"head": ["0", "1"], "query": names, "key": names}
    whole = {
        "title": "Linked", "rows": [[map_view], [row_view], [column_view]], "state": state,
        "labels": labels, "arrays": {"pattern": hidden}, "controls": ["head"],
    }  # fmt: skip
    return Linked(**{**whole, **changes})


def test_no_token_becomes_markup_or_a_request():
    page = Report("Linked").linked(linked()).html().replace(pack.plotly_text(), "")
    assert "<script>window" not in page and "<img" not in page
    # Templates, plotly, our script, the views and their numbers.
    assert page.count("<script") == page.count("</script>") == 5
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http:" not in page and "https:" not in page and "cdn" not in page


def test_a_view_says_what_a_click_sets_and_what_it_is_filled_from():
    page = Report("Linked").linked(linked()).html()
    (spec,) = re.findall(r'<script type="application/json" class="spec">(.*?)</script>', page)
    views = {view["name"]: view for view in json.loads(spec)["views"]}
    assert views["map"]["marks"] == {"key": "x", "query": "y"}
    assert views["map"]["reads"] == ["head", "key", "query"]
    assert views["row"]["spec"]["tokens"][6:] == ["↵", "∅"]
    (fill,) = views["column"]["fills"]
    assert (fill["index"], fill["attribute"], fill["trace"]) == (
        ["head", None, "key"], "values", None
    )  # fmt: skip


@pytest.mark.parametrize("arrays", [{}, {"pattern": np.zeros(3)}])
def test_a_fill_without_its_array_is_refused(arrays):
    with pytest.raises(InputError, match="view '(map|row)' is filled from array 'pattern'"):
        Report("r").linked(linked(arrays=arrays))


def test_a_view_with_nothing_to_show_is_left_out():
    nothing = View("nothing", "Nothing", lambda: None)
    page = Report("r").linked(linked(rows=[[nothing], *linked().rows])).html()
    assert 'data-view="map"' in page and 'data-view="nothing"' not in page


def test_a_strip_needs_a_number_for_each_token():
    with pytest.raises(InputError, match="1 values for 2 tokens"):
        Strip(["a", "b"], [1.0])


def test_captions_name_what_is_selected():
    assert filled("{layer} {pos} {other}", {"layer": 2, "pos": 1}, {"pos": ["a", "b"]}) == (
        "2 b {other}"
    )


def test_a_report_without_figures_does_not_carry_plotly():
    assert len(Report("r").text("only words").html()) < 100_000


def luminance(colour: str) -> float:
    """Of a colour as #rrggbb, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def over(colour: tuple[int, int, int], share: float, ground: str) -> str:
    """A half transparent colour on a ground."""
    base = [int(ground[i : i + 2], 16) for i in (1, 3, 5)]
    mixed = (round(share * c + (1 - share) * b) for c, b in zip(colour, base, strict=True))
    return "#" + "".join(f"{c:02x}" for c in mixed)


def colours() -> dict[str, dict[str, str]]:
    found = re.findall(r"^  (light|dark): \{(.*)\},$", own_file("views.js"), re.M)
    return {mode: dict(re.findall(r'(\w+): "(#\w{6})"', text)) for mode, text in found}


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_can_be_read_on_every_ground(mode):
    own = colours()[mode]
    assert contrast(own["ink"], own["card"]) >= 4.5
    assert contrast(own["faint"], own["card"]) >= 4.5
    assert contrast(own["mark"], own["card"]) >= 4.5
    assert contrast(templates()[mode]["layout"]["font"]["color"], own["card"]) >= 4.5
    for strongest in ((213, 94, 0), (0, 114, 178)):
        assert contrast(own["ink"], over(strongest, 0.55, own["card"])) >= 4.5


def test_a_low_contrast_would_be_seen():
    assert contrast("#777777", "#888888") < 4.5 and contrast("#000000", "#ffffff") == 21
