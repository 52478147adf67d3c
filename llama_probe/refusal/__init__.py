"""Refusal: does a model refuse, by what, who writes it, what does an edit of it do and cost?

For measuring and monitoring. Edits live in memory, for as long as a context lasts; nothing here
writes edited weights. The order of the questions:

    guard                   Does the model refuse at all? If not, there is no direction to offer.
    find_refusal_direction  Candidates, the published choice, and what the chosen one does.
    dose_response           How much of it must go? `robustness_index` is one number for that.
    refusal_subspace        Is it one direction, or several? `independence`: under intervention.
    who_writes              Which heads, MLPs and experts write it? `route_flips`: what an edit
                            changes in the routing.
    weight_changes          What differs between two checkpoints, and was a direction removed?
"""

from llama_probe.refusal.asking import Asked, answers, ask, next_logits
from llama_probe.refusal.audit import Audit
from llama_probe.refusal.changes import Mark, mark_of_editing, weight_changes
from llama_probe.refusal.controls import matched_directions, random_directions
from llama_probe.refusal.direction_change import direction_change
from llama_probe.refusal.dose import (
    dose_response,
    robustness_difference,
    robustness_index,
    text_loss,
)
from llama_probe.refusal.effects import effects
from llama_probe.refusal.find import find_refusal_direction
from llama_probe.refusal.guard import Guard, guard
from llama_probe.refusal.independence import independence
from llama_probe.refusal.judges import (
    REFUSAL_PHRASES,
    Judge,
    declines,
    declines_at_once,
    judge_agreement,
    judge_all,
    rate,
)
from llama_probe.refusal.llama_guard import LlamaGuard
from llama_probe.refusal.projections import projection_axes, projections
from llama_probe.refusal.route_flips import route_flips
from llama_probe.refusal.score import (
    REFUSAL_TOKENS,
    mean_kl,
    opening_tokens,
    refusal_score,
    refusal_tokens,
)
from llama_probe.refusal.select import relaxed, select, why_dropped
from llama_probe.refusal.spectrum import spectrum
from llama_probe.refusal.study import RefusalStudy, random_changes
from llama_probe.refusal.subspace import Subspace, refusal_subspace
from llama_probe.refusal.weights import orthogonalised
from llama_probe.refusal.writers import who_writes, writes_of

__all__ = [
    "REFUSAL_PHRASES",
    "REFUSAL_TOKENS",
    "Asked",
    "Audit",
    "Guard",
    "Judge",
    "LlamaGuard",
    "Mark",
    "RefusalStudy",
    "Subspace",
    "answers",
    "ask",
    "declines",
    "declines_at_once",
    "direction_change",
    "dose_response",
    "effects",
    "find_refusal_direction",
    "guard",
    "independence",
    "judge_agreement",
    "judge_all",
    "mark_of_editing",
    "matched_directions",
    "mean_kl",
    "next_logits",
    "opening_tokens",
    "orthogonalised",
    "projection_axes",
    "projections",
    "random_changes",
    "random_directions",
    "rate",
    "refusal_score",
    "refusal_subspace",
    "refusal_tokens",
    "relaxed",
    "robustness_difference",
    "robustness_index",
    "route_flips",
    "select",
    "spectrum",
    "text_loss",
    "weight_changes",
    "who_writes",
    "why_dropped",
    "writes_of",
]
