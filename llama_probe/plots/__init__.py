"""Figures as pure functions: a tidy frame or an array in, a `plotly` figure out; nothing is shown.

Every figure carries the template "llama_probe"; `figure.update_layout(template="llama_probe_dark")`
makes it fit a dark page. A frame draws the same after `pandas.concat` and a CSV round trip.
"""

from llama_probe.plots.attention import attention
from llama_probe.plots.experts import before_after, routing_by_label, routing_scores
from llama_probe.plots.heads import head_scores
from llama_probe.plots.heatmap import heatmap
from llama_probe.plots.held_out import probe_errors, probe_scores
from llama_probe.plots.lens import direct_logit_attribution, logit_lens, token_ranks
from llama_probe.plots.monitoring import monitor
from llama_probe.plots.patching import agreement, effects, patch
from llama_probe.plots.pca import activation_pca
from llama_probe.plots.probing import probe
from llama_probe.plots.probing_maps import probe_grid, transfer
from llama_probe.plots.refusal import refusal, refusal_guard
from llama_probe.plots.refusal_edits import dose_response, refusal_effects
from llama_probe.plots.refusal_parts import refusal_changes, refusal_subspace, refusal_writers
from llama_probe.plots.refusal_prompts import refusal_plane, refusal_projections
from llama_probe.plots.rope import (
    rope_angles,
    rope_contributions,
    rope_distance,
    rope_wavelengths,
)
from llama_probe.plots.routing import (
    expert_contrast,
    routing_coactivation,
    routing_load,
    routing_transition,
    specialisation,
)
from llama_probe.plots.tokens import top_tokens

__all__ = [
    "activation_pca",
    "agreement",
    "attention",
    "before_after",
    "direct_logit_attribution",
    "dose_response",
    "effects",
    "expert_contrast",
    "head_scores",
    "heatmap",
    "logit_lens",
    "monitor",
    "patch",
    "probe",
    "probe_errors",
    "probe_grid",
    "probe_scores",
    "refusal",
    "refusal_changes",
    "refusal_effects",
    "refusal_guard",
    "refusal_plane",
    "refusal_projections",
    "refusal_subspace",
    "refusal_writers",
    "rope_angles",
    "rope_contributions",
    "rope_distance",
    "rope_wavelengths",
    "routing_by_label",
    "routing_coactivation",
    "routing_load",
    "routing_scores",
    "routing_transition",
    "specialisation",
    "token_ranks",
    "top_tokens",
    "transfer",
]
