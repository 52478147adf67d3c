# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Expert routing: who is used, for what, and does it matter
#
# A mixture of experts sends each token to a few of many feed-forwards. This chapter looks at the
# routes (1, 2), asks whether experts stand for domains or only for words (3), compares two sets of
# prompts (4), and takes experts out to see what becomes of the answers (5).
#
# It runs on `tiny-moe`, where the answer is known: in one layer, an expert was planted for each
# domain of text. For another model give `texts` and `domains` of your own.

# %% tags=["parameters"]
MODEL = "tiny-moe"
FAST = True  # False: four times as many texts and permutations

# %%
import numpy as np
import pandas as pd

import llama_probe as lp
from llama_probe import plots

model = lp.load(MODEL, progress=False)
truth = lp.prompts.planted()
TASKS = ("facts", "verdicts", "arithmetic", "code", "translation")
N = 12 if FAST else 48
PERMUTATIONS = 999 if FAST else 9999

questions = {task: truth["exam"][task][:N] for task in TASKS}
texts = [q["prompt"] + q["answer"] for task in TASKS for q in questions[task]]
domains = [task for task in TASKS for _ in questions[task]]
pd.DataFrame({"domain": domains, "text": texts}).groupby("domain", sort=False).head(1)

# %% [markdown]
# ## 1. Look
#
# The load map shows which experts are used more (red) or less (blue) than their equal part. Click
# an expert: its card says which tokens it takes, how its load differs by domain, and what it
# writes, read in the vocabulary. Click a token of the strip to follow it through the layers. Under
# *Edit* the expert is taken out, or given every token.

# %%
explorer = lp.RoutingExplorer(model, texts, domains)
explorer

# %% [markdown]
# In the planted layer the expert of arithmetic should take the sums, and little else.

# %%
layer, expert = truth["planted_layer"], truth["expert_of_domain"]["arithmetic"]
explorer.select(layer=layer, expert=expert, prompt=domains.index("arithmetic"))
by_label = explorer.report.by_label
of_expert = by_label[(by_label.layer == layer) & (by_label.expert == expert)].set_index("label")
assert of_expert.value["arithmetic"] > 0.7
assert of_expert.value.drop("arithmetic").max() < 0.1
of_expert[["value", "ci_low", "ci_high", "uniform"]].round(3)

# %% [markdown]
# ## 2. The report in numbers
#
# One pass over the texts gives tidy frames: load, how sure the router is, where tokens go next, and
# whether neighbours share experts.

# %%
report = lp.routing_report(model, texts, domains)
plots.routing_load(report.load)

# %%
columns = ["layer", "metric", "value", "sd", "scores"]
report.router[columns].round(3)

# %% [markdown]
# ## 3. Domains, or only words?
#
# Knowing a token's expert tells something about the domain of its text: so many bits. But sums
# consist of digits and stories of names, and *any* router, even an untrained one, sends the same
# word to the same expert. So the same is asked given the token, and of an untrained twin: what
# that one has is vocabulary alone.

# %%
found = lp.specialisation(model, texts, domains, permutations=PERMUTATIONS)
plots.specialisation(found)

# %%
twin = lp.load(MODEL, pretrained=False, seed=1, progress=False)
untrained = lp.specialisation(twin, texts, domains, permutations=99)
metric = "mutual_information"
table = pd.DataFrame(
    {
        "bits": found[found.metric == metric].set_index("layer").corrected,
        "p": found[found.metric == metric].set_index("layer").p,
        "given the token": found[found.metric == "given_token"].set_index("layer").corrected,
        "vocabulary alone": untrained[untrained.metric == metric].set_index("layer").corrected,
    }
)
assert table.bits[layer] > table["vocabulary alone"][layer] + 0.5
assert table.p[layer] <= 1 / (PERMUTATIONS + 1) + 1e-9
table.round(3)

# %% [markdown]
# And where there is nothing to find, nothing should be found: two random halves of one domain.

# %%
sums = [q["prompt"] + q["answer"] for q in truth["exam"]["arithmetic"][: 2 * N]]
halves = np.random.default_rng(0).permutation(["one"] * N + ["other"] * N).tolist()
nothing = lp.specialisation(model, sums, halves, permutations=PERMUTATIONS)
nothing = nothing[nothing.metric == "mutual_information"]
assert nothing.p.min() > 0.001
nothing[["layer", "value", "baseline", "p"]].round(4)

# %% [markdown]
# ## 4. Two sets of prompts
#
# Which experts are used more in one set than in another? The difference comes with an interval, and
# a `q` that keeps false discoveries among all experts rare.

# %%
facts = [q["prompt"] + q["answer"] for q in truth["exam"]["facts"][: 2 * N]]
contrast = lp.expert_contrast(model, sums, facts, permutations=PERMUTATIONS)
top = contrast.loc[contrast.value.idxmax()]
assert (top["layer"], top["expert"]) == (layer, expert)
plots.expert_contrast(contrast)

# %% [markdown]
# ## 5. Take it out
#
# That an expert is used does not say that it is needed. *refill* asks what the model would do if
# the expert did not exist: the next best takes its place. *zero* asks what its output contributes.


# %%
def share_right(edit=()):
    """How many sums the model completes correctly, with an edit in place."""
    right = 0
    for question in truth["exam"]["arithmetic"][: 2 * N]:
        ids = model.to_tokens(question["prompt"] + question["answer"])
        n_prompt = model.to_tokens(question["prompt"]).shape[1]
        with model.hooks(edit):
            said = model(ids)[0, n_prompt - 1 : -1].argmax(-1)
        right += bool((said == ids[0, n_prompt:]).all())
    return right / (2 * N)


others = [e for e in range(8) if e != expert]
edits = {
    "nothing": [],
    "the expert of arithmetic, refilled": lp.ablate_experts({layer: [expert]}),
    "the expert of arithmetic, zeroed": lp.ablate_experts({layer: [expert]}, how="zero"),
    "the expert of stories, refilled": lp.ablate_experts({layer: [5]}),
    "every token to the expert of facts": lp.force_experts({layer: [0]}),
}
right = pd.Series({name: share_right(edit) for name, edit in edits.items()}, name="share right")
assert right["nothing"] > 0.9
assert right["the expert of stories, refilled"] > 0.9
assert right["the expert of arithmetic, refilled"] < right["nothing"] - 0.2
right.round(2).to_frame()

# %% [markdown]
# The planted expert is needed for sums, and another is not. With a model of which less is known,
# this is the step that turns "is used for" into "does": choose on some texts, ablate on others, and
# compare with as many random experts.
