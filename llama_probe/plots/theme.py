"""Two plotly templates, "llama_probe" and "llama_probe_dark", and what all figures share.

The colours are told apart with any common colour blindness. A colour means the same in both
templates; only ink and background change.
"""

from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from llama_probe.plots.labels import escape

LIGHT = "llama_probe"
DARK = "llama_probe_dark"

SEQUENTIAL = "Cividis"  # for amounts from 0 up
DIVERGING = "RdBu_r"  # for effects, with zmid=0: blue below, red above

# Okabe and Ito's eight; the last stands for black, or for white on a dark page.
_OKABE_ITO = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


def _template(ink: str, faint: str, empty: str, hover: str) -> go.layout.Template:
    """A template from its colours: of text, of lines, of cells without a value, behind hovers."""
    axis = {
        "automargin": True,
        "showgrid": False,
        "zeroline": False,
        "zerolinecolor": faint,
        "ticks": "outside",
        "ticklen": 3,
        "tickcolor": faint,
        "tickfont": {"size": 11},
        "title": {"font": {"size": 13}, "standoff": 12},
    }
    layout = go.Layout(
        font={"family": _FONT, "size": 13, "color": ink},
        title={"font": {"size": 16}, "x": 0, "xref": "container", "pad": {"l": 12}},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor=empty,
        colorway=[*_OKABE_ITO, ink],
        colorscale={"sequential": SEQUENTIAL, "diverging": DIVERGING},
        hoverlabel={
            "align": "left",
            "bgcolor": hover,
            "bordercolor": faint,
            "font": {"family": _FONT, "size": 13, "color": ink},
        },
        margin={"l": 56, "r": 24, "t": 56, "b": 48},
        xaxis=axis,
        yaxis=axis,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": faint, "activecolor": ink},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
    )
    bar = {"thickness": 14, "outlinewidth": 0, "ticklen": 3, "tickcolor": faint}
    bar["title"] = {"side": "right", "font": {"size": 13}}
    heatmap = go.Heatmap(colorbar=bar, colorscale=SEQUENTIAL, hoverongaps=False)
    return go.layout.Template(layout=layout, data={"heatmap": [heatmap]})


pio.templates[LIGHT] = _template("#1f2933", "#9aa5b1", "#e1e5ea", "#ffffff")
pio.templates[DARK] = _template("#e6e9ee", "#6b7785", "#2b323b", "#1b2027")


def height(rows: int) -> int:
    """The pixels a heat map of so many rows is high."""
    return min(max(150 + 20 * rows, 340), 860)


def gap(*sides: int) -> int:
    """The pixels between a heat map's cells: none where there are many."""
    return 1 if max(sides) <= 64 else 0


def heading(title: str | None) -> dict[str, Any]:
    """The part of a layout that is the title: without one, no room is kept for it.

    Args:
        title: Plain text.
    """
    return {"title": {"text": escape(title)}} if title else {"margin": {"t": 20}}


def chart(title: str | None) -> dict[str, Any]:
    """The layout of lines, points and bars: no ground of its own, which is for empty cells.

    Args:
        title: Plain text.
    """
    return {"template": LIGHT, "plot_bgcolor": "rgba(0,0,0,0)", **heading(title)}
