"""What is measured on a prediction: one number for each prompt.

A metric is any function of logits [batch d_vocab] that gives [batch], a row for each prompt in
their order. The ones here may name tokens by text, and one for each prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.model.llama import Llama

Metric = Callable[[Float[Tensor, "batch d_vocab"]], Float[Tensor, " batch"]]
Token = str | int
Tokens = Token | Sequence[Token]


@dataclass(frozen=True)
class LogitDiff:
    """The logit of one token minus that of another, for each row; see `logit_diff`."""

    answer: Tokens
    foil: Tokens

    def on(self, model: Llama, clean: Any = None) -> "LogitDiff":
        """The same with the tokens' ids.

        Raises:
            InputError: A text is not one token of this model.
        """
        return LogitDiff(_ids(self.answer, model), _ids(self.foil, model))

    @property
    def reads(self) -> list[int] | None:
        """The only tokens whose logits matter; None before `on`."""
        tokens = [*_listed(self.answer), *_listed(self.foil)]
        return None if _unresolved(tokens) else sorted({int(token) for token in tokens})

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        """The difference in logits.

        Raises:
            InputError: The tokens are texts that no model has turned into ids (`on`), or there
                is not one for each row.
        """
        return _picked(logits, self.answer) - _picked(logits, self.foil)


@dataclass(frozen=True)
class Prob:
    """The probability of one token, for each row; see `prob`."""

    answer: Tokens

    def on(self, model: Llama, clean: Any = None) -> "Prob":
        """The same with the tokens' ids.

        Raises:
            InputError: A text is not one token of this model.
        """
        return Prob(_ids(self.answer, model))

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        """The probability, a fraction.

        Raises:
            InputError: As for `LogitDiff`.
        """
        return _picked(logits.float().softmax(dim=-1), self.answer)


@dataclass(frozen=True)
class KL:
    """How far a prediction is from the clean one, for each row; see `kl`."""

    clean: Float[Tensor, "batch d_vocab"] | None = None

    def on(self, model: Llama, clean: Float[Tensor, "batch d_vocab"]) -> "KL":
        """The same with what the model says to the clean prompts."""
        return replace(self, clean=clean.float().log_softmax(dim=-1))

    def __call__(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        """The divergence in nats.

        Raises:
            InputError: The clean prediction is not known yet (`on`).
        """
        if self.clean is None:
            raise InputError("this metric compares with the clean run: use metric.on(model, clean)")
        log_probs = logits.float().log_softmax(dim=-1)
        return (self.clean.exp() * (self.clean - log_probs)).sum(dim=-1)


def logit_diff(answer: Tokens, foil: Tokens) -> LogitDiff:
    """A metric: the answer's logit minus the foil's.

    Args:
        answer: A token, as text of one token or as its id; or a list with one for each prompt.
        foil: The token to compare with; likewise.

    >>> logit_diff(2, 0)(torch.tensor([[0.5, 0.0, 2.0]]))
    tensor([1.5000])
    """
    return LogitDiff(answer, foil)


def prob(answer: Tokens) -> Prob:
    """A metric: the answer's probability, a fraction.

    Its floor at 0 hides what lowers it; prefer `logit_diff` (Zhang and Nanda 2024, arXiv
    2309.16042).

    Args:
        answer: A token, as text of one token or as its id; or a list with one for each prompt.

    >>> prob(1)(torch.zeros(1, 4))
    tensor([0.2500])
    """
    return Prob(answer)


def kl() -> KL:
    """A metric: KL(clean prediction ‖ this prediction) in nats, 0 for the clean run itself.

    >>> clean = torch.zeros(1, 4)
    >>> KL(clean.log_softmax(dim=-1))(clean)
    tensor([0.])
    """
    return KL()


def resolved(metric: Any, model: Llama, clean: Float[Tensor, "batch d_vocab"]) -> Metric:
    """A metric that is ready to be called; a function of the user's own is ready already."""
    return metric.on(model, clean) if hasattr(metric, "on") else metric


def measured(metric: Metric, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
    """What a metric says, checked.

    Raises:
        InputError: It is not one finite number for each row.
    """
    values = metric(logits)
    if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"the metric gave {got} for logits of {logits.shape[0]} rows, "
            "but should give one number a row"
        )
    if not values.isfinite().all():
        raise InputError("the metric gave a value that is not finite")
    return values


def _listed(tokens: Tokens) -> list[Token]:
    return [tokens] if isinstance(tokens, str | int) else list(tokens)


def _unresolved(tokens: Sequence[Token]) -> bool:
    return any(isinstance(token, str) for token in tokens)


def _ids(tokens: Tokens, model: Llama) -> int | list[int]:
    if isinstance(tokens, str | int):
        return model.to_single_token(tokens)
    return [model.to_single_token(token) for token in tokens]


def _picked(values: Float[Tensor, "batch d_vocab"], tokens: Tokens) -> Float[Tensor, " batch"]:
    """Each row's value for its token."""
    ids = _listed(tokens)
    if _unresolved(ids):
        raise InputError("this metric names its tokens by text: use metric.on(model)")
    if len(ids) not in (1, len(values)):
        raise InputError(f"the metric names {len(ids)} tokens for {len(values)} prompts")
    index = torch.tensor([int(token) for token in ids], device=values.device)
    return values.gather(1, index.expand(len(values))[:, None])[:, 0]
