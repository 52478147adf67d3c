"""Sets of prompts that this project wrote, readers of public ones, and what tiny-moe was taught.

For patching: `indirect_object`, `factual_pairs`. For refusal: `requests`, and `plain_texts`. For
probing, the contrast sets, each a frame with `text`, `label` and `group` to be fitted on folds that
keep groups whole:

- `true_false`: is a statement true? Counts of words or letters and lengths say nothing; how alike
  two words are spelt says little (at most .57). A probe of affirmations may read "these two belong
  together": on denials it is then wrong.
- `sentiment`: does a remark approve? No word list finds it, but a probe may read the tone of single
  words rather than the remark.
- `language`: which of four? On the surface of the text, so only a check that the machinery works.
- `tense`, `number`: is it past, is it several? One word decides, which no other group has; but its
  ending gives it away, so fit on regular forms and test on irregular ones.

Accuracy on SmolLM2-135M-Instruct: the stream before layers 4, 14 and 24 at the last token, logistic
(C = 0.01, standardised), five folds that keep groups whole, affirmations only, in both templates;
beside it logistic regression on one and two words, and on one to four characters.

| set | layer 4 | layer 14 | layer 24 | words | characters | chance |
|---|---|---|---|---|---|---|
| capitals | .55 | .81 | .78 | .50 | .50 | .50 |
| animals | .67 | .86 | .79 | .50 | .50 | .50 |
| elements | .50 | .52 | .52 | .50 | .50 | .50 |
| sums | .51 | .48 | .49 | .50 | .50 | .50 |
| translations | .50 | .71 | .71 | .50 | .50 | .50 |
| sentiment | .79 | .91 | .95 | .49 | .52 | .50 |
| language | .97 | .95 | .99 | .92 | .97 | .25 |
| tense | .84 | 1.00 | 1.00 | .50 | .84 | .50 |
| number | .73 | .82 | .79 | .50 | .79 | .50 |

Nothing here shows that this model knows atomic numbers, or sums of two-digit numbers. At layer 14,
from affirmations to denials of held-out facts, AUROC is .13 for capitals, .06 for animals and .25
for translations. From one template to the other it is .70 to .94 in these three topics, but
accuracy .51 to .88: the threshold moves.
"""

import json
from pathlib import Path
from typing import Any

from llama_probe.prompts.contrast import contrast_set
from llama_probe.prompts.facts import factual_pairs
from llama_probe.prompts.indirect_object import indirect_object
from llama_probe.prompts.plain import plain_texts
from llama_probe.prompts.public_sets import (
    read_advbench,
    read_harmbench,
    read_jailbreakbench,
    read_statements,
    read_xstest,
)
from llama_probe.prompts.requests import requests
from llama_probe.prompts.sentences import language, number, sentiment, tense
from llama_probe.prompts.truth import true_false

__all__ = [
    "contrast_set",
    "factual_pairs",
    "indirect_object",
    "language",
    "number",
    "plain_texts",
    "planted",
    "read_advbench",
    "read_harmbench",
    "read_jailbreakbench",
    "read_statements",
    "read_xstest",
    "requests",
    "sentiment",
    "tense",
    "true_false",
]

_TINY_MOE = Path(__file__).resolve().parent.parent / "assets" / "tiny_moe" / "planted.json"


def planted() -> dict[str, Any]:
    """What was planted in tiny-moe, and the held-out questions of its exam.

    Returns:
        A fresh dictionary. `facts` (relation, subject, answer, whether a verdict on it was ever
        taught), `translations`, `names`, `places`, `gifts`, `stories`, `requests` (by topic the
        improper, sensitive, harmless and proper words), `domains`, `planted_layer` and
        `expert_of_domain` (the routing that was taught), `previous_token_head` and
        `induction_head` ([layer, head]), and `exam`: for each task a list of
        questions, each with a `prompt` (or `tokens`, or a `chat` message) and its `answer`; for
        "indirect object" also the `foil`. The model card says how each was held out.

    >>> truth = planted()
    >>> truth["exam"]["indirect object"][0].keys()
    dict_keys(['prompt', 'answer', 'foil'])
    >>> truth["expert_of_domain"]["arithmetic"]
    2
    """
    return json.loads(_TINY_MOE.read_text(encoding="utf-8"))
