"""Figure of tokens that are raised or lowered: bars with the token's text."""

import pandas as pd
import plotly.graph_objects as go

from llama_probe.plots import theme
from llama_probe.plots.frames import check, column, numbers
from llama_probe.plots.labels import escape, token


def top_tokens(
    frame: pd.DataFrame,
    value: str = "value",
    title: str | None = None,
    *,
    unit: str = "contribution (logits)",
) -> go.Figure:
    """Tokens from top to bottom, in the order of the frame, with a bar each.

    Args:
        frame: One row for each token: `token` (its text) and the column of numbers.
        value: That column.
        title: The figure's title, as plain text.
        unit: What the numbers are, for the axis.

    Raises:
        InputError: A column is missing, the frame is empty, or the column does not hold numbers.

    >>> top_tokens(pd.DataFrame({"token": [" Mary"], "value": [2.0]})).data[0].text
    ('·Mary',)
    """
    check(frame, "token", value)
    bars = go.Bar(
        x=numbers(frame, value),
        y=list(range(len(frame))),
        orientation="h",
        text=[token(text) for text in column(frame, "token")],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{text}<br>%{x:.3f}<extra></extra>",
    )
    figure = go.Figure(bars, {"showlegend": False, **theme.chart(title)})
    figure.update_xaxes(title_text=escape(unit), zeroline=True)
    figure.update_yaxes(title_text="rank", autorange="reversed", dtick=max(1, len(frame) // 8))
    # Room for the text of the longest bar.
    return figure.update_layout(height=120 + 20 * len(frame), margin={"r": 110})
