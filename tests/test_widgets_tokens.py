"""The token strip: alone, set anew, and beside others on one selection."""

import json

import numpy as np
import pytest
import torch
from test_plots import NASTY

from llama_probe.errors import InputError
from llama_probe.page import Strip
from llama_probe.widgets.selection import Selection
from llama_probe.widgets.tokens import TokenStrip


def sent(strip):
    """What the browser gets."""
    viewer = strip._viewers["strip"]
    return json.loads(viewer.spec) | {"caption": viewer.caption, "marks": viewer.marks}


def test_a_click_selects_a_position_and_the_caption_names_it():
    strip = TokenStrip(["The", " cat"], [0.5, -1.0], unit="nats")
    assert strip.pos == 0 and sent(strip)["caption"] == "Token 0: The: click another"
    strip._viewers["strip"]._hear(None, {"click": {"x": 1}}, [])
    assert strip.pos == strip.selection.pos == 1
    now = sent(strip)
    assert (now["tokens"], now["values"], now["unit"]) == (["The", "·cat"], [0.5, -1.0], "nats")
    assert now["caption"] == "Token 1: ·cat: click another" and now["marks"] == {"●": 1}
    strip._viewers["strip"]._hear(None, {"click": {"x": 7}}, [])
    assert strip.pos == 1
    with pytest.raises(InputError, match="pos is 2, but should be 0 to 1"):
        strip.pos = 2


@pytest.mark.parametrize(
    "values",
    [[1, 2.5], np.array([1, 2.5], dtype=np.float32), torch.tensor([1, 2.5], requires_grad=True)],
    ids=["list", "array", "tensor"],
)
def test_values_can_be_set_again_in_any_form(values):
    strip = TokenStrip(["a", "b"])
    assert strip.values is None and sent(strip)["values"] is None
    strip.values = values
    np.testing.assert_array_equal(strip.values, [1, 2.5])
    assert sent(strip)["values"] == [1, 2.5]
    shown = strip.figure("strip")
    assert isinstance(shown, Strip) and shown.values is strip.values
    strip.values = None
    assert sent(strip)["values"] is None


def test_missing_values_have_no_colour():
    strip = TokenStrip(["a", "b", "c"], [np.nan, None, float("inf")])
    assert sent(strip)["values"] == [None, None, None]


def test_wrong_values_get_a_sentence_and_change_nothing():
    strip = TokenStrip(["a", "b"], [1, 2])
    for wrong, message in (
        ([1], "there are 1 values for 2 tokens"),
        ([[1, 2]], r"values should be \[pos\], not \[1, 2\]"),
        (["a", "b"], "values should be numbers"),
    ):
        with pytest.raises(InputError, match=message):
            strip.values = wrong
    assert sent(strip)["values"] == [1, 2]
    with pytest.raises(InputError, match="no tokens"):
        TokenStrip([])
    with pytest.raises(InputError, match="3 values for 1 tokens"):
        TokenStrip(["a"], [1, 2, 3])


def test_hostile_tokens_are_shown_and_written_as_text(tmp_path):
    strip = TokenStrip(NASTY, range(len(NASTY)), caption="{pos} </script><b>")
    shown = sent(strip)["tokens"]
    assert shown[5] == "↵" and shown[6] == "∅" and shown[2] == "</script>"
    page = strip.to_html(tmp_path / "strip.html").read_text(encoding="utf-8")
    assert page.count("</script>") == page.count("<script") and "<b>bold" not in page


def test_strips_share_a_selection_and_ignore_what_they_have_not():
    selection = Selection(pos=1)
    long, short = (TokenStrip(list(text), selection=selection) for text in ("abcdef", "ab"))
    assert (long.pos, short.pos) == (1, 1)
    long.pos = 5
    assert sent(long)["marks"] == {"●": 5} and sent(short)["marks"] == {"●": 1}
    short.pos = 0
    assert sent(long)["marks"] == {"●": 0}
    short.close()
    assert short.closed and not long.closed
    long.pos = 2
    assert sent(long)["marks"] == {"●": 2}


def test_one_token_is_enough():
    strip = TokenStrip([" "], torch.zeros(1))
    assert sent(strip)["tokens"] == ["·"] and strip.linked().controls == []
