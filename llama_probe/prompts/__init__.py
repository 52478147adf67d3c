"""Sets of prompts that this project wrote, and what is known about the models it trained."""

import json
from pathlib import Path
from typing import Any

from llama_probe.prompts.facts import factual_pairs
from llama_probe.prompts.indirect_object import indirect_object

__all__ = ["factual_pairs", "indirect_object", "planted"]

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
