"""Linear probes: what an activation says, how far to believe it, and what to do with it."""

from llama_probe.probing.direction import Direction, contrast_direction, direction_similarity
from llama_probe.probing.erasure import Eraser, erasure_check, leace
from llama_probe.probing.fit import choose_strength, fit
from llama_probe.probing.linear import LinearProbe
from llama_probe.probing.monitor import Monitor
from llama_probe.probing.probe import probe
from llama_probe.probing.templates import ProbeWarning
from llama_probe.probing.training import fit_monitor
from llama_probe.probing.transfer import transfer

__all__ = [
    "Direction",
    "Eraser",
    "LinearProbe",
    "Monitor",
    "ProbeWarning",
    "choose_strength",
    "contrast_direction",
    "direction_similarity",
    "erasure_check",
    "fit",
    "fit_monitor",
    "leace",
    "probe",
    "transfer",
]
