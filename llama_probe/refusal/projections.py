"""Where requests lie on the refusal direction, and on that of harmfulness.

Zhao et al. 2025 (arXiv 2507.11878): models hold harmfulness at the last token of the instruction
and refusal at the template's tokens after it, along two directions. A request may be read as
harmful and not be refused, or the other way round.

Projections of different models and layers differ in origin and unit. So all are centred half way
between the means of harmless and restricted requests that the axis is fitted on, and scaled so that
these means are at -1 and +1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from llama_probe.capturing import capture
from llama_probe.errors import InputError
from llama_probe.hooks import act_name
from llama_probe.interventions.vectors import vector_of
from llama_probe.model.llama import Llama
from llama_probe.refusal.asking import Asked
from llama_probe.refusal.candidates import Candidates, read
from llama_probe.refusal.study import RefusalStudy

END_OF_INSTRUCTION, END_OF_TEMPLATE = "last of the instruction", "last of the template"
_NOTHING = 1e-9  # of the means' lengths: a smaller difference is rounding


@dataclass(frozen=True)
class Axis:
    """A direction with an origin and a unit.

    Attributes:
        unit: [d], of length 1.
        centre: The projection on it that counts as 0.
        scale: The projection that counts as 1, less the centre; below 0 where the axis runs the
            other way.
    """

    unit: Float[np.ndarray, " d"]
    centre: float
    scale: float

    def of(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """Where activations lie on it."""
        return (x @ self.unit - self.centre) / self.scale


@dataclass(frozen=True)
class Axes:
    """The axes of harmfulness and of refusal in the stream before one block.

    Attributes:
        hook: Where both are read.
        harmfulness: At the last token of the instruction.
        refusal: At the last token of the prompt, where the answer begins.
    """

    hook: str
    harmfulness: Axis
    refusal: Axis


def projection_axes(model: Llama, direction: Any, restricted: Asked, harmless: Asked) -> Axes:
    """Fit the axes of `projections` on requests; project others, or what is seen is the fit.

    Refusal is the direction that is given, read where the answer begins. Harmfulness is the
    difference of the means of restricted and harmless requests, at the same hook, at the last token
    of the instruction (Zhao et al. 2025, arXiv 2507.11878).

    Args:
        model: The model.
        direction: A `RefusalStudy` or `lp.Direction`, with its vector and hook.
        restricted: Requests to fit on, such as those of the fitting part.
        harmless: Likewise.

    Raises:
        InputError: The two sets do not differ along an axis.
    """
    vector, hook = vector_of(direction).numpy(), str(direction.hook)
    if vector.ndim != 1 or vector.shape[0] != model.cfg.d_model:
        raise InputError(
            f"the direction is {list(vector.shape)}, but should be one of {model.cfg.d_model} "
            "dimensions"
        )
    ends = [_read_ends(model, asked, hook) for asked in (restricted, harmless)]
    before = [of[END_OF_INSTRUCTION].mean(axis=0) for of in ends]
    after = [of[END_OF_TEMPLATE].mean(axis=0) for of in ends]
    return Axes(
        hook,
        axis_of(before[0] - before[1], before[0], before[1], f"{hook} at the {END_OF_INSTRUCTION}"),
        axis_of(vector, after[0], after[1], f"{hook} at the {END_OF_TEMPLATE}, on the direction"),
    )


def projections(
    model: Llama, sets: Mapping[str, Asked], study: RefusalStudy, *, axes: Axes | None = None
) -> pd.DataFrame:
    """Where each request lies on the axes of harmfulness and refusal.

    At -1 and +1 are the means of the harmless and the restricted requests that the axes were fitted
    on; 0 is half way.

    Args:
        model: The model.
        sets: Requests by name, others than those that the axes were fitted on, such as those of
            `study.asked["report"]`.
        study: With a direction.
        axes: Of `projection_axes`; None: fitted on the study's fitting part.

    Returns:
        One row per request: `set request prompt harmfulness refusal`, `request` being its number in
        its set and `prompt` its text.

    Raises:
        InputError: There are no requests, the study has no direction, or an axis cannot be fitted.
    """
    if not sets:
        raise InputError("there are no requests: sets is empty")
    if axes is None:
        axes = projection_axes(model, study, **study.asked.get("fit", {}))
    tables = []
    for name, asked in sets.items():
        of = _read_ends(model, asked, axes.hook)
        columns = {
            "set": name,
            "request": range(len(asked)),
            "prompt": asked.texts,
            "harmfulness": axes.harmfulness.of(of[END_OF_INSTRUCTION]),
            "refusal": axes.refusal.of(of[END_OF_TEMPLATE]),
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def candidate_projections(
    model: Llama, sets: Mapping[str, Asked], means: Candidates
) -> pd.DataFrame:
    """Where each request lies on each candidate, at the candidate's own position and layer.

    Args:
        model: The model.
        sets: Requests by name.
        means: Of a `RefusalStudy`; centre and scale come from them, as in `projections`.

    Returns:
        One row per candidate and request: `position layer set request prompt
        refusal`, the last missing where a candidate is 0, as before the first block at tokens that
        all prompts share.
    """
    tables = []
    for name, asked in sets.items():
        acts = read(model, asked, means.positions)
        at = acts.index["at"].to_numpy()
        for layer in range(means.restricted.shape[1]):
            x = acts[act_name("resid_pre", layer)].double().numpy()
            for place, position in enumerate(means.positions):
                one, other = means.restricted[place, layer], means.harmless[place, layer]
                try:
                    value = axis_of(one - other, one, other, "").of(x[at == str(position)])
                except InputError:  # no direction there
                    value = np.full(len(asked), np.nan)
                table = pd.DataFrame({"request": range(len(asked)), "refusal": value})
                table = table.assign(prompt=asked.texts, set=name, layer=layer, position=position)
                tables.append(table)
    columns = ["position", "layer", "set", "request", "prompt", "refusal"]
    return pd.concat(tables, ignore_index=True).reindex(columns=columns)


def axis_of(
    vector: Float[np.ndarray, " d"],
    restricted: Float[np.ndarray, " d"],
    harmless: Float[np.ndarray, " d"],
    where: str,
) -> Axis:
    """The axis along a vector on which two means are at +1 and -1.

    Args:
        vector: Its length does not matter.
        restricted: The mean that is at +1.
        harmless: The mean that is at -1.
        where: For the sentence of the error.

    Raises:
        InputError: The means do not differ along it.

    >>> axis = axis_of(*np.array([[2.0, 0.0], [3.0, 1.0], [1.0, 5.0]]), "here")
    >>> axis.of(np.array([[3.0, 0.0], [2.0, 9.0]])).tolist()
    [1.0, 0.0]
    """
    length = np.linalg.norm(vector)
    ends = [] if not length else [float(mean @ vector / length) for mean in (restricted, harmless)]
    least = _NOTHING * max(float(np.linalg.norm(restricted)), float(np.linalg.norm(harmless)))
    if not ends or abs(ends[0] - ends[1]) <= least:
        raise InputError(
            f"{where}: restricted and harmless requests have the same mean, so that nothing can be "
            "projected on what they differ by"
        )
    return Axis(vector / length, (ends[0] + ends[1]) / 2, (ends[0] - ends[1]) / 2)


def _read_ends(model: Llama, asked: Asked, hook: str) -> dict[str, Float[np.ndarray, "n d"]]:
    """The stream at both ends of each request, in float64."""
    acts = capture(
        model,
        asked.prompts,
        hooks=hook,
        positions=[END_OF_INSTRUCTION, END_OF_TEMPLATE],
        template=asked.template,
        system=asked.system,
        progress=False,
    )
    x, at = acts[hook].double().numpy(), acts.index["at"].to_numpy()
    return {end: x[at == end] for end in (END_OF_INSTRUCTION, END_OF_TEMPLATE)}
