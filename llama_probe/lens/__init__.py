"""Lenses: what a stream, a part of the model, a head or a rotary frequency says in one run."""

from llama_probe.lens.attention import AttentionMaps, attention_maps
from llama_probe.lens.attribution import direct_logit_attribution
from llama_probe.lens.heads import head_scores
from llama_probe.lens.logit_lens import logit_lens
from llama_probe.lens.pca import activation_pca
from llama_probe.lens.rope import (
    RopeMaps,
    rope_angles,
    rope_contributions,
    rope_distance,
    rope_maps,
    rope_wavelengths,
)

__all__ = [
    "AttentionMaps",
    "RopeMaps",
    "activation_pca",
    "attention_maps",
    "direct_logit_attribution",
    "head_scores",
    "logit_lens",
    "rope_angles",
    "rope_contributions",
    "rope_distance",
    "rope_maps",
    "rope_wavelengths",
]
