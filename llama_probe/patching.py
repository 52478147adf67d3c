"""Activation patching: put the clean run's activation at one place into the corrupted run.

Vig et al. 2020 (arXiv 2004.12265), Meng et al. 2022 (arXiv 2202.05262). The effect is 0 where
nothing changes and 1 where the patch alone restores the clean prediction:
(patched - corrupted) / (clean - corrupted).

All cells of a layer run as one batch, from that layer on: what lies before it is the corrupted
run's, which is known.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from llama_probe.errors import InputError
from llama_probe.hooks import ActivationCache, Hook, HookPoint, act_name
from llama_probe.model.llama import Llama

Metric = Callable[[Float[Tensor, "batch d_vocab"]], Float[Tensor, " batch"]]
_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z")


@dataclass(frozen=True)
class LogitDiff:
    """The logit of one token minus that of another, for each row; see `logit_diff`."""

    answer: str | int
    foil: str | int

    def on(self, model: Llama) -> "LogitDiff":
        """The same with the tokens' ids.

        Raises:
            InputError: A text is not one token of this model.
        """
        return LogitDiff(model.to_single_token(self.answer), model.to_single_token(self.foil))

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        """The difference in logits.

        Raises:
            InputError: The tokens are texts that no model has turned into ids (`on`).
        """
        if isinstance(self.answer, str) or isinstance(self.foil, str):
            raise InputError("this metric names its tokens by text: use metric.on(model)")
        return logits[:, self.answer] - logits[:, self.foil]


def logit_diff(answer: str | int, foil: str | int) -> LogitDiff:
    """A metric: the answer's logit minus the foil's.

    Args:
        answer: A token, as text of one token or as its id.
        foil: The token to compare with.

    >>> logit_diff(2, 0)(torch.tensor([[0.5, 0.0, 2.0]]))
    tensor([1.5000])
    """
    return LogitDiff(answer, foil)


@torch.no_grad()
def patch(
    model: Llama,
    clean: Any,
    corrupted: Any,
    *,
    metric: Metric | LogitDiff,
    at: str = "resid_pre",
    over: Sequence[str] | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> pd.DataFrame:
    """Patch one site, in every layer at every position or in every head.

    Args:
        model: The model.
        clean: The prompt whose activations are put in: a text, or tokens [pos] or [1 pos].
        corrupted: The prompt that runs; as many tokens as `clean`.
        metric: What is measured on the last position's logits [batch d_vocab], a number a row.
        at: The site: "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out" or "z".
        over: ("layer", "pos"), or ("layer", "head") for "z", where a head is patched at all
            positions; None: the one that the site has.
        batch_size: Cells that run at once.
        progress: Show a progress bar.

    Returns:
        One row for each cell: `layer`, `pos` and `token` (its text in the corrupted prompt) or
        `head`, `site`, `metric` (of the patched run), `effect`, `clean` and `corrupted` (the two
        runs' metrics).

    Raises:
        InputError: The prompts differ in length, an argument is not one of those named, or the
            metric is the same for both prompts, so that there is no effect to speak of.

    >>> from llama_probe.model.config import LlamaConfig
    >>> model = Llama(LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50))
    >>> clean, corrupted = torch.tensor([1, 2, 3]), torch.tensor([1, 9, 3])
    >>> frame = patch(model, clean, corrupted, metric=logit_diff(5, 6))
    >>> frame.shape, float(round(frame.effect[1], 3))
    ((6, 8), 1.0)
    """
    axis = "head" if at == "z" else "pos"
    _check(at, over, axis, batch_size)
    clean_tokens, corrupted_tokens, mask = _pair(model, clean, corrupted)
    measure = metric.on(model) if isinstance(metric, LogitDiff) else metric
    site = act_name(at, "*")
    clean_logits, source = model.run_with_cache(
        clean_tokens, attention_mask=mask, names_filter=site, logits_at=-1
    )
    corrupted_logits, streams = model.run_with_cache(
        corrupted_tokens,
        attention_mask=mask,
        names_filter=act_name("resid_pre", "*"),
        logits_at=-1,
    )
    ends = _measured(measure, clean_logits), _measured(measure, corrupted_logits)
    clean_value, corrupted_value = (float(end[0]) for end in ends)
    if clean_value == corrupted_value:
        raise InputError(
            f"the metric is {clean_value} for both prompts: there is no effect to split"
        )

    n_cells = model.cfg.n_heads if axis == "head" else clean_tokens.shape[1]
    frames = []
    for layer in tqdm(range(model.cfg.n_layers), desc=f"patch {at}", disable=not progress):
        cells = torch.arange(n_cells, device=clean_tokens.device)
        values = [
            _measured(measure, _patched(model, layer, at, part, source, streams, mask))
            for part in cells.split(batch_size)
        ]
        frames.append(pd.DataFrame({"layer": layer, axis: cells.tolist(), "metric": _list(values)}))
    frame = pd.concat(frames, ignore_index=True)
    frame["effect"] = (frame["metric"] - corrupted_value) / (clean_value - corrupted_value)
    frame["clean"], frame["corrupted"], frame["site"] = clean_value, corrupted_value, at
    if axis == "pos":
        texts = model.to_str_tokens(corrupted_tokens[0])
        frame["token"] = [texts[pos] for pos in frame["pos"]]
    return frame


def _check(at: str, over: Sequence[str] | None, axis: str, batch_size: int) -> None:
    if at not in _SITES:
        raise InputError(f"at is {at!r}, but should be one of {', '.join(_SITES)}")
    if over is not None and tuple(over) != ("layer", axis):
        raise InputError(f"over is {tuple(over)}, but {at} is patched over ('layer', {axis!r})")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, but should be at least 1")


def _pair(model: Llama, clean: Any, corrupted: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of both prompts and the mask that they share."""
    (clean_tokens, clean_mask), (tokens, mask) = map(model.one_prompt, (clean, corrupted))
    lengths = int(clean_mask.sum()), int(mask.sum())
    if clean_tokens.shape != tokens.shape or lengths[0] != lengths[1]:
        raise InputError(
            f"the clean prompt has {lengths[0]} tokens and the corrupted one {lengths[1]}: "
            "positions only correspond where the lengths are equal"
        )
    return clean_tokens, tokens, mask


def _measured(metric: Metric, logits: Float[Tensor, "batch 1 d_vocab"]) -> Float[Tensor, " batch"]:
    values = metric(logits[:, -1])
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"the metric gave {got} for logits of {logits.shape[0]} rows, "
            "but should give one number a row"
        )
    return values


def _patched(
    model: Llama,
    layer: int,
    at: str,
    cells: Tensor,
    source: ActivationCache,
    streams: ActivationCache,
    mask: Tensor,
) -> Float[Tensor, "batch 1 d_vocab"]:
    """Logits of the corrupted run with one cell patched in each row."""
    stream = streams["resid_pre", layer].expand(len(cells), -1, -1)
    hook = _put_in(source[at, layer], cells, axis=2 if at == "z" else 1)
    with model.hooks([(act_name(at, layer), hook)]):
        return model(
            stream,
            attention_mask=mask.expand(len(cells), -1),
            start_at_layer=layer,
            logits_at=-1,
        )


def _put_in(clean: Tensor, cells: Tensor, axis: int) -> Hook:
    """In row i, replace index `cells[i]` of an axis by the clean run's."""

    def put_in(tensor: Tensor, hook: HookPoint) -> Tensor:
        rows = torch.arange(len(cells), device=tensor.device)
        chosen = torch.zeros(len(cells), tensor.shape[axis], dtype=torch.bool, device=tensor.device)
        chosen[rows, cells] = True
        shape = [len(cells), *(tensor.shape[a] if a == axis else 1 for a in range(1, tensor.ndim))]
        return torch.where(chosen.view(shape), clean.to(tensor), tensor)

    return put_in


def _list(values: list[Tensor]) -> list[float]:
    return torch.cat(values).tolist()
