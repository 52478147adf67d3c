"""Edits as values: what a run shall do differently, made without a model and put into any.

An `Edit` goes wherever hooks go (`model.hooks(edit)`, `model.run_with_hooks(tokens,
fwd_hooks=edit)`, `model.generate(prompt, fwd_hooks=edit)`), and edits join with `+`. At one hook
they act in the order in which they were joined; between hooks a pass has its own order: a router's
logits, then the experts chosen, then their weights.

The edits of experts ask different questions:

    ablate_experts(how="refill")  What if the expert did not exist? The next best takes its place.
    ablate_experts(how="zero")    What does its output contribute? Nobody takes its place.
    force_experts                 What would this expert do with the token?
    bias_router                   What if the router liked it a little more?
    freeze_routes                 What does another edit do, apart from sending tokens elsewhere?

The edits of directions of the residual stream:

    ablate                         What if nothing had a component along it?
    add                            What if there were more of it, or less?
    affine                         What if the component were that of other prompts?
    replace                        What if this were there?

`positions`, which every edit takes, says which tokens of a pass it is about, all by default:

    an int, a list of ints, a slice     Positions, counted in the pass (padding too); negative ones
                                        from its end.
    a mask [pos] or [batch pos]         True where the edit acts.
    "prompt", "new"                     For `generate`: passes of several tokens, which read a
                                        prompt, or passes of one token, which continue it. (A prompt
                                        of a single token counts as new.)

With a KV cache a pass sees only what is new, and an edit cannot know what came before. So the first
two kinds refuse passes of a single token rather than take each new token for position 0.
"""

from llama_probe.interventions.directions import ablate, add, affine, replace
from llama_probe.interventions.edit import Edit
from llama_probe.interventions.experts import (
    ablate_experts,
    bias_router,
    force_experts,
    freeze_routes,
)
from llama_probe.interventions.vectors import HasVector, vector_of

__all__ = [
    "Edit",
    "HasVector",
    "ablate",
    "ablate_experts",
    "add",
    "affine",
    "bias_router",
    "force_experts",
    "freeze_routes",
    "replace",
    "vector_of",
]
