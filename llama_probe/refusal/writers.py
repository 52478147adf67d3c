"""Which parts of a model write a direction, on average and for each prompt.

The sums are exact: see `decompose.py`. A part's own share says nothing of what it does by way of
later parts, whose shares have that; `lp.path_patch` follows it.
"""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from llama_probe.capturing.prompts import Encoded, as_frame, encode, of_tokens
from llama_probe.errors import InputError, near
from llama_probe.model.llama import Llama
from llama_probe.patching.progress import Progress
from llama_probe.probing.labels import Labels, as_array, coded
from llama_probe.refusal.decompose import decomposed

RESAMPLES = 2000


def who_writes(
    model: Llama,
    prompts: Any,
    direction: Any,
    *,
    at: str | None = None,
    position: int | str = -1,
    template: str | None = None,
    labels: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """How much each part of a model writes along a direction, on average over prompts.

    Known as direct feature attribution (Arditi et al. 2024, arXiv 2406.11717, section 5, for heads
    and the refusal direction). With two classes of prompts, say restricted requests and their
    harmless twins, the value is the difference of their means: which parts tell the two apart.

    Args:
        model: The model. Edits that are in place are seen.
        prompts: As for `lp.capture`.
        direction: A vector [d_model], or what has one (`lp.Direction`); its length does not matter.
        at: Where the stream is read: "blocks.{i}.hook_resid_pre" is the input of a block, the last
            block's "hook_resid_post" the final stream. None: the direction's own hook.
        position: One token of each prompt, as for `lp.capture`.
        template: "chat" to wrap texts in the model's chat template, as a user's message.
        labels: Two classes: a column of the prompts, or a label for each. They are sorted, as for
            `lp.contrast_direction`: the second is True, 1, or the later text.
        seed: Of the resamples.
        progress: True for a bar, or a function of (done, total); None: a bar for 100 prompts and
            more.

    Returns:
        One row for each part: `component` ("embedding", "head", "attention bias", "mlp", "mlp
        bias", "expert", "shared expert"), `layer head expert` (-1 where there is none), `value` in
        units of the stream, `ci_low ci_high` (95 %, percentile bootstrap of 2,000 resamples of the
        prompts, within their class; missing where there is one prompt) and `n` prompts. With labels
        also `first` and `second`, the means of the two classes, and `value` is `second - first`.

        An expert adds 0 for a prompt whose token it does not serve; one that serves none has no
        row. An output bias is a part of its own, and is not in the heads or the "mlp". The values
        sum to the projection, `attrs["total"]`, but for rounding: `attrs["error"]` is the largest
        gap of any prompt as a share of the sum of its parts' sizes.

    Raises:
        InputError: The direction, the place, the position, a prompt or the labels cannot be used;
            or the parts do not sum to the projection, as where an edit changes the stream itself.

    >>> from llama_probe.model.config import LlamaConfig
    >>> model = Llama(LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50))
    >>> import torch
    >>> tokens, direction = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.ones(16)
    >>> frame = who_writes(model, tokens, direction, at="blocks.1.hook_resid_pre")
    >>> frame.component.tolist()
    ['embedding', 'head', 'head', 'head', 'head', 'mlp']
    >>> bool(abs(frame.value.sum() - frame.attrs["total"]) < 1e-6)
    True
    """
    frame, encoded = encoded_prompts(model, prompts, template)
    classes = None if labels is None else _classes(frame, labels)
    found = decomposed(model, encoded, direction, at, position, progress)
    served = ~np.isnan(found.values).all(axis=0)
    # The projection itself goes along as the last column.
    values = np.column_stack([np.nan_to_num(found.values[:, served]), found.total])
    columns = _estimates(values, classes, np.random.default_rng(seed))
    summary = found.parts[served].reset_index(drop=True)
    summary = summary.assign(**{name: column[:-1] for name, column in columns.items()})
    summary.attrs = {**found.attrs, "total": float(columns["value"][-1])}
    if classes is not None and classes.classes is not None:
        summary.attrs |= dict(zip(("first", "second"), map(str, classes.classes), strict=True))
    return summary.assign(n=len(values))


def writes_of(
    model: Llama,
    prompts: Any,
    direction: Any,
    *,
    at: str | None = None,
    position: int | str = -1,
    template: str | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """How much each part of a model writes along a direction, for each prompt by itself.

    Args:
        model: The model. Edits that are in place are seen.
        prompts: As for `lp.capture`.
        direction: As for `who_writes`, like all that follows.
        at: Where the stream is read.
        position: One token of each prompt.
        template: "chat" to wrap texts in the model's chat template.
        progress: True for a bar, or a function of (done, total).

    Returns:
        One row for each prompt and part, as in `who_writes`: `prompt component layer head expert
        value total`. An expert has rows of the prompts whose token it serves. A prompt's values sum
        to its `total`, the projection, but for rounding.

    Raises:
        InputError: As `who_writes`.
    """
    _, encoded = encoded_prompts(model, prompts, template)
    found = decomposed(model, encoded, direction, at, position, progress)
    prompt, part = np.nonzero(~np.isnan(found.values))
    frame = found.parts.iloc[part].reset_index(drop=True)
    frame.insert(0, "prompt", prompt)
    frame = frame.assign(value=found.values[prompt, part], total=found.total[prompt])
    frame.attrs = found.attrs
    return frame


def encoded_prompts(
    model: Llama, prompts: Any, template: str | None
) -> tuple[pd.DataFrame, list[Encoded]]:
    """Prompts of every kind that `lp.capture` takes, as a frame with a row each and as tokens.

    Raises:
        InputError: A prompt or the template cannot be used.
    """
    if not isinstance(prompts, Tensor):
        frame = as_frame(prompts)
        return frame, encode(model, frame, template=template)
    if template is not None:
        raise InputError("template goes with texts, but the prompts are tokens")
    return of_tokens(model, prompts)


def resampled_means(
    values: Float[np.ndarray, "n cell"], draw: np.random.Generator
) -> Float[np.ndarray, "resample cell"]:
    """The means of 2,000 resamples of the rows (Efron 1979); missing where there is one row only.

    >>> resampled_means(np.array([[1.0], [3.0]]), np.random.default_rng(0)).mean().round(1)
    np.float64(2.0)
    """
    n = len(values)
    if n == 1:
        return np.full((RESAMPLES, values.shape[1]), np.nan)
    return draw.multinomial(n, [1 / n] * n, size=RESAMPLES) @ values / n


def _classes(frame: pd.DataFrame, labels: Any) -> Labels:
    """The two classes of the prompts."""
    if isinstance(labels, str):
        names = list(map(str, frame.columns))
        if labels not in names:
            raise InputError(
                f"labels: the prompts have no column {labels!r}{near(labels, names)}; they have "
                f"{', '.join(names)}"
            )
        labels = frame[labels]
    values = as_array(labels)
    if values.shape != (len(frame),):
        raise InputError(
            f"labels have shape {values.shape}, but there are {len(frame)} prompts: give one each"
        )
    found = coded(values, "classes", what="labels")
    if not found.two:
        raise InputError(
            f"two classes are compared, but the labels have {len(found.classes or ())}"
        )
    return found


def _estimates(
    values: Float[np.ndarray, "prompt cell"], classes: Labels | None, draw: np.random.Generator
) -> dict[str, Float[np.ndarray, " cell"]]:
    """Means over prompts, or the difference of two classes' means, with their intervals."""
    if classes is None:
        columns = {"value": values.mean(axis=0)}
        resampled = resampled_means(values, draw)
    else:
        first, second = (values[classes.values == code] for code in (0, 1))
        columns = {"first": first.mean(axis=0), "second": second.mean(axis=0)}
        columns["value"] = columns["second"] - columns["first"]
        resampled = -resampled_means(first, draw)
        resampled += resampled_means(second, draw)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return {**columns, "ci_low": low, "ci_high": high}
