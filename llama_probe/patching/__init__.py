"""Causal experiments: change an activation, and see what becomes of the prediction.

1. `patch.py`: put one run's activations into another, cell by cell.
2. `ablation.py`: put in nothing, a mean, or another prompt's.
3. `path.py`: let a change reach one receiver only.
4. `attribution.py`: estimate all patches at once from gradients; `agreement.py`: how well?

They share the metrics (`metrics.py`), the sites and their cells (`sites.py`), the runs that are
compared (`runs.py`), the engine that runs only what a patch changes (`engine.py`; `reference.py` is
the plain way) and the frames (`frames.py`).
"""

from llama_probe.patching.ablation import ablate_each
from llama_probe.patching.agreement import agreement
from llama_probe.patching.attribution import attribution_patch
from llama_probe.patching.metrics import kl, logit_diff, prob
from llama_probe.patching.patch import patch
from llama_probe.patching.path import path_patch

__all__ = [
    "ablate_each",
    "agreement",
    "attribution_patch",
    "kl",
    "logit_diff",
    "patch",
    "path_patch",
    "prob",
]
