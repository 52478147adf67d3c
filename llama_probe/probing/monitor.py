"""A probe with all that it takes to apply it: to texts, to their tokens, to a running generation.

It says how much an activation resembles those that the probe was trained on, and no more than that:
its figures on one distribution of texts say little of another.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from llama_probe.capturing.positions import rows_of
from llama_probe.capturing.prompts import Encoded, as_frame, described, encode, of_tokens
from llama_probe.errors import CheckpointError, InputError
from llama_probe.model.generation import _check
from llama_probe.model.llama import Llama
from llama_probe.probing.aggregate import Aggregate
from llama_probe.probing.linear import LinearProbe
from llama_probe.probing.reading import counting, hashes_of, position_of, token_scores
from llama_probe.probing.saved import read_folder, write_folder
from llama_probe.probing.watch import Sampling, Watched, watched

FEWEST_NEGATIVES = 100


@dataclass(frozen=True)
class Monitor:
    """A saved probe, ready to be applied; `lp.fit_monitor` makes one.

    A monitor is a measurement, not a defence: inputs made to deceive a probe take its recall from
    all to nothing, and retraining it does not end that (Bailey et al. 2024, arXiv 2412.09565).

    It belongs to the model that it was trained on, and refuses others; a model is looked at once,
    so do not change its weights afterwards.

    Attributes:
        probe: With two classes; a score above 0 leans to the second.
        hook: Where it reads.
        positions: The tokens that count in a text's score, as `acts.index["at"]` names them.
        aggregate: How their scores become that of the text.
        template: "chat" if texts are wrapped as they were in training; None: as they are.
        system: The system message of training.
        prepend_bos: Whether texts begin with BOS; None: the checkpoint's own rule.
        threshold: Scores above it are flagged; None: nothing is.
        model_hash: SHA-256 of the model's configuration and weights.
        tokenizer_hash: SHA-256 of its tokenizer.
        record: How it was trained and where its threshold comes from, as JSON values.
    """

    probe: LinearProbe = field(repr=False)
    hook: str
    positions: str
    aggregate: Aggregate
    template: str | None
    system: str | None
    prepend_bos: bool | None
    threshold: int | float | None
    model_hash: str = field(repr=False)
    tokenizer_hash: str = field(repr=False)
    record: dict[str, Any] = field(repr=False)

    def score(
        self, model: Llama, prompts: Any, *, text: str = "text", response: str | None = None
    ) -> pd.DataFrame:
        """The score of each prompt, at the cost of a forward pass up to the hook.

        Args:
            model: The model that the probe was trained on.
            prompts: As for `lp.capture`; texts get the template and system message of training,
                tokens are taken as they are.
            text: The column of a table that has the prompts.
            response: The column of a table that has answers, to put after the prompts.

        Returns:
            One row a prompt: `prompt` (which), `text`, `n_tokens`, `score`, `flagged` (missing
            without a threshold).

        Raises:
            InputError: It is another model or tokenizer, a prompt cannot be used, or an activation
                is not finite.
        """
        self.check(model)
        texts, encoded = self._encoded(model, prompts, text, response)
        rows = rows_of(encoded, [position_of(self.positions)], None)
        scores = token_scores(model, self.probe, self.hook, encoded, rows)
        per_prompt = self.aggregate.by_prompt(scores, rows["prompt"].to_numpy())
        return pd.DataFrame(
            {
                "prompt": range(len(encoded)),
                "text": texts,
                "n_tokens": [len(one.ids) for one in encoded],
                "score": per_prompt,
                "flagged": self._flagged(per_prompt),
            }
        )

    def tokens(self, model: Llama, prompt: Any) -> pd.DataFrame:
        """The score of each token of one prompt.

        Args:
            model: The model that the probe was trained on.
            prompt: A text, or tokens [pos] or [1, pos].

        Returns:
            One row a token, those of the template included: `pos`, `token`, `score` (the probe's,
            there), `running` (the score of the text up to here; missing before the first token
            that counts), `flagged`.

        Raises:
            InputError: As `score`, or there are several prompts.
        """
        self.check(model)
        one = self._one(model, prompt)
        rows = rows_of([one], ["all"], None)
        scores = token_scores(model, self.probe, self.hook, [one], rows)
        counts = counting(self.positions, one, finished=True)
        counted = np.array([counts(pos) for pos in range(len(scores))])
        running = np.full(len(scores), np.nan)
        running[counted] = self.aggregate.running(scores[counted])
        running = pd.Series(running).ffill().to_numpy()
        return pd.DataFrame(
            {
                "pos": range(len(scores)),
                "token": model.to_str_tokens(one.ids),
                "score": scores,
                "running": running,
                "flagged": self._flagged(running),
            }
        )

    def watch(
        self,
        model: Llama,
        prompt: Any,
        *,
        max_new_tokens: int = 64,
        temperature: int | float = 0.0,
        top_k: int | None = None,
        top_p: int | float | None = None,
        seed: int | None = None,
        stop_tokens: Iterable[int] | None = None,
    ) -> Iterator[Watched]:
        """Generate, and see each token's score as soon as the model has read it.

        The tokens are those of `model.generate` with the same arguments, and no pass is run for
        the scores. A loop that ends early ends the generation: nothing runs ahead.

        Args:
            model: The model that the probe was trained on.
            prompt: A text, which gets the template of training, or tokens [pos] or [1, pos].
            max_new_tokens: At most so many.
            temperature: 0 takes the likeliest token; otherwise logits are divided by it.
            top_k: Sample among the k likeliest tokens.
            top_p: Sample among the likeliest that together have this probability.
            seed: Of the sampling; None draws one.
            stop_tokens: Ids that end it; None: the tokenizer's.

        Returns:
            An iterator of `Watched`: the prompt's tokens first, then each new one, with the
            running score of the text. The last token is never read, and its own score is NaN.

        Raises:
            InputError: As `score`; the positions count from the end of a finished text; or an
                argument cannot be used.
        """
        self.check(model)
        _check(max_new_tokens, temperature, top_k, top_p)
        one = self._one(model, prompt)
        if (total := len(one.ids) + max_new_tokens) > model.cfg.n_ctx:
            raise InputError(
                f"prompt and continuation may have {total} tokens, "
                f"but the context is {model.cfg.n_ctx}: lower max_new_tokens"
            )
        if stop_tokens is None:
            stop_tokens = model.tokenizer.stop_ids if model.tokenizer is not None else ()
        random = torch.Generator(model.cfg.device)
        random.manual_seed(seed) if seed is not None else random.seed()
        sampling = Sampling(temperature, top_k, top_p, random, frozenset(stop_tokens))
        counts = counting(self.positions, one, finished=False)
        return watched(self, model, one.ids, counts, max_new_tokens, sampling)

    def with_threshold(
        self, negatives: Float[Any, " n"], fpr: int | float = 0.01, *, source: str = ""
    ) -> "Monitor":
        """The same monitor with a threshold that flags at most a share of benign texts.

        Report recall and false positives on other texts than these.

        Args:
            negatives: The scores of benign texts, as `score` gives them; at least 100.
            fpr: The share of them that may be above it.
            source: Where the texts come from, for the record.

        Raises:
            InputError: There are too few for that rate, or one is not finite.
        """
        scores = np.sort(np.asarray(negatives, dtype=float))[::-1]
        if not 0 < fpr < 1:
            raise InputError(f"fpr is {fpr}, but should be between 0 and 1, such as 0.01")
        fewest = max(FEWEST_NEGATIVES, int(np.ceil(1 / fpr - 1e-9)))
        if len(scores) < fewest:
            raise InputError(
                f"a threshold at a false-positive rate of {fpr:g} needs at least {fewest} "
                f"negatives, but there are {len(scores)}"
            )
        if not np.isfinite(scores).all():
            raise InputError("a negative's score is not finite")
        threshold = scores[int(fpr * len(scores) + 1e-9)].item()
        where = {
            "fpr_wanted": fpr,
            "negatives": len(scores),
            "fpr_on_them": float((scores > threshold).mean()),
            "source": source,
        }
        return replace(self, threshold=threshold, record={**self.record, "threshold": where})

    def check(self, model: Llama) -> None:
        """Refuse a model that the probe was not trained on.

        Raises:
            InputError: The weights, the configuration or the tokenizer differ.
        """
        mine, its = (self.model_hash, self.tokenizer_hash), hashes_of(model)
        for what, wanted, found in zip(("weights", "tokenizer"), mine, its, strict=True):
            if wanted != found:
                raise InputError(
                    f"this monitor was trained on {self.record.get('model')!r}, and this model "
                    f"({model.cfg.model_name!r}) differs in its {what}: SHA-256 {found[:12]}, not "
                    f"{wanted[:12]}; train one for this model"
                )

    def save(self, folder: str | Path) -> Path:
        """Write the monitor as safetensors and JSON; `load` reads it.

        Args:
            folder: New, empty, or one with a saved monitor, which is replaced.

        Raises:
            InputError: The folder holds something else.
            OutputError: It cannot be written to.
        """
        record = {name: getattr(self, name) for name in _TYPES}
        record |= {"aggregate": asdict(self.aggregate), **self.probe.record()}
        return write_folder(folder, "Monitor", self.probe.tensors(), record)

    @classmethod
    def load(cls, folder: str | Path) -> "Monitor":
        """The monitor that `save` wrote.

        Raises:
            CheckpointError: The folder is missing or damaged, or holds something else.
        """
        tensors, record = read_folder(folder, "Monitor")
        probe = LinearProbe.of(tensors, record, str(folder))
        if probe.classes is None or len(probe.classes) != 2:
            raise CheckpointError(f"{folder} is damaged: its probe does not have two classes")
        for name, kind in _TYPES.items():
            if not isinstance(record.get(name), kind):
                raise CheckpointError(f"{folder} is damaged: its {name} cannot be used")
        try:
            aggregate = Aggregate(**record["aggregate"])
        except (InputError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} is damaged: its aggregate cannot be used") from error
        return cls(probe, aggregate=aggregate, **{name: record[name] for name in _TYPES})

    def _encoded(
        self, model: Llama, prompts: Any, text: str = "text", response: str | None = None
    ) -> tuple[list[str], list[Encoded]]:
        """Prompts as they were fed in training, and what to call them."""
        if isinstance(prompts, Tensor):
            frame, encoded = of_tokens(model, prompts)
            return frame["text"].tolist(), encoded
        frame = as_frame(prompts, text)
        encoded = encode(
            model,
            frame,
            template=self.template,
            system=self.system,
            prepend_bos=self.prepend_bos,
            response=response,
        )
        return described(model, frame.filter(["text"]), encoded)["text"].tolist(), encoded

    def _one(self, model: Llama, prompt: Any) -> Encoded:
        encoded = self._encoded(model, prompt)[1]
        if len(encoded) != 1:
            raise InputError(f"this takes one prompt, not {len(encoded)}")
        return encoded[0]

    def _flagged(self, scores: Float[np.ndarray, " n"]) -> Any:
        missing = self.threshold is None
        return pd.array([pd.NA] * len(scores) if missing else scores > self.threshold, "boolean")


# What record.json holds as it is, and of what type.
_TYPES: dict[str, Any] = {
    "hook": str,
    "positions": str,
    "template": str | None,
    "system": str | None,
    "prepend_bos": bool | None,
    "threshold": int | float | None,
    "model_hash": str,
    "tokenizer_hash": str,
    "record": dict,
}
