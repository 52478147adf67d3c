"""The steps of an audit of one model: does it refuse, how, at what cost, and would one notice?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import pandas as pd

from llama_probe.capturing import Activations, capture
from llama_probe.errors import InputError
from llama_probe.hooks import act_name
from llama_probe.interventions import ablate
from llama_probe.model.llama import Llama
from llama_probe.probing import fit_monitor, probe
from llama_probe.refusal.asking import answers, ask
from llama_probe.refusal.controls import random_directions
from llama_probe.refusal.dose import dose_response, text_loss
from llama_probe.refusal.find import find_refusal_direction
from llama_probe.refusal.guard import JUDGES
from llama_probe.refusal.judges import judge_agreement, judge_all, rate
from llama_probe.refusal.projections import projections
from llama_probe.refusal.study import RefusalStudy
from llama_probe.refusal.writers import who_writes

AT = ("last of the instruction", "last of the template")
_TWINS = ("same verb", "same object", "harmless")
_QUIET = 100  # ordinary requests, the fewest to set a threshold on
_LAYERS = 6  # in which two sets are told apart, evenly over the depth


@dataclass(frozen=True)
class Audit:
    """What is asked of a model, each step when it is first asked for.

    Attributes:
        model: The model.
        requests: `text`, `kind` ("restricted"; "same verb", "same object" or "harmless" for twins;
            "ordinary"; others are asked, and no more), and `pair`, which twins share.
        texts: Ordinary prose.
        most: How many requests of each set a part of the study may use.
        n_random: Random directions beside the one that is found.
        max_new_tokens: Of each answer.
        seed: Of all draws.
        progress: Show bars.
    """

    model: Llama = field(repr=False)
    requests: pd.DataFrame = field(repr=False)
    texts: Sequence[str] = field(repr=False)
    most: Mapping[str, int] = field(default_factory=dict)
    n_random: int = 20
    max_new_tokens: int = 12
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        """See that the requests can be used."""
        missing = [name for name in ("text", "kind", "pair") if name not in self.requests]
        if missing:
            raise InputError(f"the requests lack the column {missing[0]!r}")
        for kinds in (("restricted",), _TWINS):
            if set(kinds).isdisjoint(self.requests["kind"]):
                raise InputError(f"there are no requests of kind {' or '.join(map(repr, kinds))}")

    @cached_property
    def matched(self) -> pd.DataFrame:
        """The restricted requests and their harmless twins, with `restricted` as the label."""
        chosen = self.requests[self.requests["kind"].isin(("restricted", *_TWINS))]
        return chosen.assign(restricted=chosen["kind"] == "restricted").reset_index(drop=True)

    @cached_property
    def study(self) -> RefusalStudy:
        """The direction, or why there is none."""
        label = self.matched["restricted"]
        return find_refusal_direction(
            self.model,
            self.matched[label],
            self.matched[~label],
            groups="pair",
            most=self.most,
            n_random=self.n_random,
            nearest=True,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            progress=self.progress,
        )

    @cached_property
    def answered(self) -> pd.DataFrame:
        """The model's own answers to all requests: `kind prompt response`."""
        asked = ask(self.model, self.requests)
        said = answers(
            self.model, asked, max_new_tokens=self.max_new_tokens, progress=self.progress
        )
        columns = {"kind": self.requests["kind"].to_numpy(), "prompt": asked.texts}
        return pd.DataFrame({**columns, "response": said})

    @cached_property
    def judged(self) -> pd.DataFrame:
        """What each judge says of each answer; see `judge_all`."""
        return judge_all(self.answered, JUDGES)

    def declining(self) -> pd.DataFrame:
        """How often each kind is declined: `kind judge metric value ci_low ci_high n`."""
        judged = self.judged.sort_values("prompt", kind="stable")
        judged = judged.assign(kind=self.answered["kind"].to_numpy()[judged["prompt"]])
        rows = []
        for place, of in judged.groupby(["kind", "judge"], sort=False):
            kind, judge = cast("tuple[str, str]", place)
            found = rate(np.array(of["value"]))
            rows.append({"kind": kind, "judge": judge, "metric": "declined", **found._asdict()})
        return pd.DataFrame(rows)

    def agreement(self) -> pd.DataFrame:
        """How far the judges agree on all answers; see `judge_agreement`."""
        return judge_agreement(self.judged)

    @cached_property
    def acts(self) -> Activations:
        """The stream of the matched requests, at the two positions and some layers."""
        return self.read(self.model)

    def read(self, model: Llama) -> Activations:
        """The same of another model of this shape."""
        n_layers = model.cfg.n_layers
        layers = {round(i) for i in np.linspace(0, n_layers - 1, min(_LAYERS, n_layers))}
        if self.study.direction is not None:
            layers.add(self.study.direction.layer)
        hooks = [act_name("resid_pre", layer) for layer in sorted(layers)]
        return capture(
            model,
            self.matched,
            hooks=hooks,
            positions=list(AT),
            template="chat",
            progress=self.progress,
        )

    def separability(self) -> pd.DataFrame:
        """How well the two sets are told apart by layer and position, and by the text alone.

        What `lp.probe` gives for the difference in means: that can be told apart what is never
        refused, and n-grams and length say how much of it the words explain.
        """
        return probe(
            self.acts,
            "restricted",
            groups="pair",
            probe="mass_mean",
            controls=("random direction", "n-grams", "length", "best cell"),
            seed=self.seed,
            progress=self.progress,
        )

    def plane(self) -> pd.DataFrame:
        """Where requests of the reporting part lie, read as harmful and as about to be refused."""
        return projections(self.model, self.study.asked["report"], self.study)

    @cached_property
    def doses(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The dose-response on the reporting part, and its answers.

        Half as many random directions, as each is measured at every dose.
        """
        report = self.study.asked["report"]
        return dose_response(
            self.model,
            self.study,
            report["restricted"],
            report["harmless"],
            self.study.tokens,
            n_random=self.n_random // 2,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            progress=self.progress,
        )

    def loss(self) -> pd.DataFrame:
        """What the edits cost on ordinary prose; see `text_loss`.

        The row "random ablation" has the mean over random directions, and the range of the middle
        95 % of them.
        """
        study = self.study
        options = {"seed": self.seed, "common": study.common}
        drawn = random_directions(study.vector, self.n_random, **options)
        beside = {f"random {draw}": ablate(vector) for draw, vector in enumerate(drawn)}
        frame = text_loss(self.model, self.texts, {**study.edits, **beside}, self.progress)
        random = frame["edit"].isin(list(beside))
        if not beside:
            return frame
        row = {"edit": "random ablation", "metric": "loss", "n": len(beside)}
        for name, low, high in (
            ("value", "ci_low", "ci_high"),
            ("change", "change_low", "change_high"),
        ):
            values = np.array(frame.loc[random, name], dtype=float)
            row |= {name: values.mean()}
            row |= dict(zip((low, high), np.quantile(values, (0.025, 0.975)), strict=True))
        return pd.concat([frame.loc[~random], pd.DataFrame([row])], ignore_index=True)

    def writers(self) -> pd.DataFrame:
        """Who writes the direction more for restricted requests; see `who_writes`."""
        direction = self.study.direction
        if direction is None:
            raise InputError(f"nobody writes a direction that is not there: {self.study.verdict}")
        return who_writes(
            self.model,
            self.matched,
            direction,
            position=int(direction.position),
            template="chat",
            labels="restricted",
            seed=self.seed,
            progress=self.progress,
        )

    def monitored(self) -> pd.DataFrame:
        """What a probe at the direction's place would flag, of requests that it has not seen.

        Fitted on the fitting part. Its threshold is where 1 % of half the ordinary requests, at
        least 100, are flagged; where there are fewer it stays at the probe's own boundary.

        Returns:
            One row per kind of request: `kind metric value ci_low ci_high n`, the share flagged.
        """
        study = self.study
        layer = study.direction.layer if study.direction else self.model.cfg.n_layers // 2
        hook = act_name("resid_pre", layer)
        known = [text for asked in study.asked["fit"].values() for text in asked.texts]
        fitted = self.matched["text"].isin(known).to_numpy()
        ordinary = self.requests["kind"] == "ordinary"
        plain = self.requests[ordinary]
        order = np.random.default_rng(self.seed).permutation(len(plain))
        cut = max(_QUIET, len(plain) // 2)
        quiet, asked = plain.iloc[order[:cut]], plain.iloc[order[cut:]]
        others = self.requests[~ordinary & ~self.requests["kind"].isin(("restricted", *_TWINS))]
        options: dict[str, Any] = {"hooks": [hook], "template": "chat", "positions": AT[1]}
        monitor = fit_monitor(
            capture(self.model, self.matched[fitted], progress=self.progress, **options),
            "restricted",
            hook=hook,
            groups="pair",
            negatives=None
            if len(quiet) < _QUIET
            else capture(self.model, quiet, progress=self.progress, **options),
            seed=self.seed,
        )
        rows = []
        unseen = pd.concat([self.matched[~fitted], asked, others], ignore_index=True)
        scored = monitor.score(self.model, unseen)
        flagged = scored["score"].to_numpy(dtype=float) > (monitor.threshold or 0.0)
        kinds = np.array(unseen["kind"])
        for kind in dict.fromkeys(kinds):
            here = kinds == kind
            found = rate(flagged[here])
            rows.append({"kind": kind, "metric": "flagged", **found._asdict()})
        return pd.DataFrame(rows)
