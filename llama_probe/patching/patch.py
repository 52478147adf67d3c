"""Activation patching: put one run's activation at one place into another run.

Vig et al. 2020 (arXiv 2004.12265), Meng et al. 2022 (arXiv 2202.05262). On what the two directions
can and cannot show: Heimersheim and Nanda 2024 (arXiv 2404.15255).
"""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch
from pandas.api.types import is_integer_dtype

from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.patching import engine as fast
from llama_probe.patching import reference
from llama_probe.patching.engine import Sweep
from llama_probe.patching.frames import Scale, frame_of
from llama_probe.patching.metrics import resolved
from llama_probe.patching.progress import Progress
from llama_probe.patching.runs import (
    Answers,
    Pairs,
    Run,
    both_runs,
    ends,
    pairs_of,
    site_names,
    stream_names,
    target_and_source,
)
from llama_probe.patching.sites import Positions, Site, cells_of, sites_of

_ENGINES = {"fast": fast.values, "reference": reference.values}


@torch.no_grad()
def patch(
    model: Llama,
    clean: Any,
    corrupted: Any,
    *,
    metric: Any,
    at: str | Sequence[str] = "resid_pre",
    over: str | Sequence[str] | None = None,
    direction: str = "denoise",
    answer_at: Answers = -1,
    layers: Iterable[int] | None = None,
    positions: Positions = None,
    units: Iterable[int] | None = None,
    each: bool = False,
    engine: str = "fast",
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress = False,
) -> pd.DataFrame:
    """Patch one site cell by cell, and measure what each patch does to a prediction.

    Args:
        model: The model.
        clean: A prompt or a list of them: texts, or tokens [pos] or [prompt pos].
        corrupted: The prompts to compare with, each as many tokens as its clean one.
        metric: What is measured on the logits at the answer position: `lp.logit_diff`, `lp.prob`,
            `lp.kl`, or a function of logits [prompt d_vocab], in the prompts' order, that gives
            [prompt].
        at: The site, or several: "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out";
            by head "z", "q", "k", "v", "rot_q", "rot_k", "pattern" (of k, rot_k and v the units
            are the key-value heads); by neuron "post"; for mixtures of experts "router_logits",
            "expert_out" (what an expert adds: nothing where it is not chosen), "shared_out",
            "shared_post".
        over: What a cell is: "layer" and any of "pos" and the site's unit ("head", "neuron",
            "expert"); what is left out is patched as a whole. None: layer and head for sites with
            heads, else layer and position.
        direction: "denoise" puts clean activations into the corrupted run: what suffices?
            "noise" puts corrupted ones into the clean run: what is needed?
        answer_at: The position whose prediction is measured, or one for each prompt.
        layers: Only these layers.
        positions: Only these, or named ones: {"subject": [4, 5, 4]} has one for each prompt.
        units: Only these heads, experts or neurons.
        each: A row for each prompt, with no interval, instead of one for all.
        engine: "fast" runs only what a patch changes; "reference" is one forward pass a cell.
        batch_size: Most rows (one cell of one prompt each) that run at once; None: as memory
            allows.
        seed: Of the bootstrap.
        progress: Show a progress bar; or a function of how many cells of the site are done and
            of how many, which is called often, and ends the sweep where it raises.

    Returns:
        One row for each cell: the columns of `over` (positions of prompts of unequal length count
        from the end: -1 is the last), `token` at `pos` for a single pair, `site`, `metric` of the
        patched run, `effect` (denoise: (patched - corrupted) / (clean - corrupted), noise:
        (clean - patched) / (clean - corrupted); 0: nothing changes, 1: all of it), and the two
        runs' metrics, `clean` and `corrupted`. Over several prompts all of these are means, the
        effect a ratio of means, with its 95 % bootstrap interval over prompts, `ci_low` and
        `ci_high`, and `n`. `attrs` hold `direction` and `seconds`.

    Raises:
        InputError: Clean and corrupted prompts do not correspond, an argument is not one of those
            named, or the metric is the same for both, so that there is no effect to speak of.

    >>> from llama_probe.model.config import LlamaConfig
    >>> from llama_probe.patching.metrics import logit_diff
    >>> model = Llama(LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50))
    >>> clean, corrupted = torch.tensor([1, 2, 3]), torch.tensor([1, 9, 3])
    >>> frame = patch(model, clean, corrupted, metric=logit_diff(5, 6))
    >>> frame.shape, float(round(frame.effect[1], 3))
    ((6, 8), 1.0)
    """
    begun = time.perf_counter()
    check_direction(direction)
    sites = sites_of(model, at, over, positions, units)
    values = engine_of(engine, batch_size)
    pairs = pairs_of(model, clean, corrupted, answer_at)
    held = [name for site in sites for name in site_names(site)]
    continued = [*held, *stream_names(model)]
    names = (held, continued) if direction == "denoise" else (continued, held)
    clean_run, corrupted_run = both_runs(model, pairs, *names)
    measure = resolved(metric, model, clean_run.logits)
    scale = Scale.of(*ends(measure, clean_run, corrupted_run), direction)
    target, source = target_and_source(clean_run, corrupted_run, direction)
    frames = []
    for site in sites:
        cells = cells_of(site, over, pairs.real, layers=layers, positions=positions, units=units)
        sweep = sweep_of(model, pairs, site, target, source)
        patched = values(sweep, cells, measure, batch_size=batch_size, progress=progress)
        frame = frame_of(cells, patched, scale, pairs, site=site.name, each=each, seed=seed)
        frames.append(with_tokens(frame, model, target))
    return finished(frames, begun, direction=direction)


def check_direction(direction: str) -> None:
    """See that it is one.

    Raises:
        InputError: It is not.
    """
    if direction not in ("denoise", "noise"):
        raise InputError(f"direction is {direction!r}, but should be 'denoise' or 'noise'")


def sweep_of(model: Llama, pairs: Pairs, site: Site, target: Run, source: Run) -> Sweep:
    """The sweep that puts one run's activations into another."""
    chosen = {}
    if site.needs_indices:
        chosen = {layer: source.cache["expert_indices", layer] for layer in site.layers}
    values = {layer: site.by_position(source.cache[site.hook(layer)]) for layer in site.layers}
    return Sweep(model, pairs, site, target, values, chosen, same_before=True)


def engine_of(engine: str, batch_size: int | None) -> Any:
    """The function that runs a sweep.

    Raises:
        InputError: There is no such engine, or the batch size is below 1.
    """
    if engine not in _ENGINES:
        raise InputError(f"engine is {engine!r}, but should be one of {', '.join(_ENGINES)}")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, but should be at least 1")
    return _ENGINES[engine]


def with_tokens(frame: pd.DataFrame, model: Llama, target: Run) -> pd.DataFrame:
    """With the text at each position, where there is one prompt."""
    if "pos" not in frame or len(target.tokens) > 1 or not is_integer_dtype(frame["pos"]):
        return frame
    texts = model.to_str_tokens(target.tokens[0])
    frame.insert(list(frame).index("pos") + 1, "token", [texts[pos] for pos in frame.pos])
    return frame


def finished(frames: list[pd.DataFrame], begun: float, **attrs: Any) -> pd.DataFrame:
    """One frame of all sites, with what was done in its attrs."""
    frame = pd.concat(frames, ignore_index=True)
    frame.attrs = {**attrs, "seconds": time.perf_counter() - begun}
    return frame
