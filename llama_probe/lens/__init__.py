"""Lenses: what a stream, a part of the model, a head or a rotary frequency says in one run."""

from llama_probe.lens.attention import AttentionMaps, attention_maps
from llama_probe.lens.attribution import direct_logit_attribution
from llama_probe.lens.heads import head_scores
from llama_probe.lens.logit_lens import logit_lens
from llama_probe.lens.rope import rope_contributions, rope_distance

__all__ = [
    "AttentionMaps",
    "attention_maps",
    "direct_logit_attribution",
    "head_scores",
    "logit_lens",
    "rope_contributions",
    "rope_distance",
]
