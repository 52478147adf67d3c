# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Attention and RoPE: what a head does, and how position gets in
#
# Which heads copy, which only mark time on the first token, and what lets a head know *the token
# before*: this chapter goes from scores of all heads (1) to one head's pattern (2), what it moves
# and writes (3), the part of position (4) and a test by ablation (5).
#
# As it stands the notebook runs on `tiny-moe`, in which an induction head was planted. For a real
# model set `MODEL = "smollm2-135m-instruct"` (fetched once, 100 MB).

# %% tags=["parameters"]
MODEL = "tiny-moe"
FAST = True  # False: four times as many sequences, and narrower intervals

# %%
import pandas as pd

import llama_probe as lp
from llama_probe import plots

model = lp.load(MODEL, progress=False)
N = 8 if FAST else 32

# %% [markdown]
# ## 1. Every head in a few numbers
#
# On random tokens that are said twice, nothing but position and repetition can tell tokens apart.
# What a head looks at there it looks at by mechanism: the *previous token*, the *first token*, an
# earlier copy of its own token (*duplicate*), or what came after that copy (*induction*, [Olsson et
# al. 2022](https://arxiv.org/abs/2209.11895)).

# %%
scores = lp.head_scores(model, n=N, length=24)
plots.head_scores(scores, "induction", "Induction, on random tokens said twice")

# %%
plots.head_scores(scores, "previous_token", "Weight on the token before")

# %%
by_metric = scores.sort_values("value", ascending=False).groupby("metric", sort=False)
strongest = by_metric.head(2)[["metric", "layer", "head", "value", "ci_low", "ci_high"]]
strongest = strongest.sort_values(["metric", "value"], ascending=[True, False])
strongest.round(3)


# %%
def best_head(metric):
    """Layer and head with the highest score."""
    best = scores[scores.metric == metric].nlargest(1, "value").iloc[0]
    return int(best["layer"]), int(best["head"])


induction, previous = best_head("induction"), best_head("previous_token")
if MODEL == "tiny-moe":
    assert induction == (3, 0)  # as it was planted
induction, previous

# %% [markdown]
# ## 2. One head's pattern
#
# The same on a text. The explorer opens on the strongest induction head; a click on a weight locks
# its query and key, and the strips show the row and the column. Try *Compare: side by side* with
# the previous-token head.

# %%
TEXT = "The capital of France is Paris. The capital of Spain is Madrid. The capital of France is"
selection = lp.Selection()
attention = lp.AttentionExplorer(model, TEXT, selection=selection)
attention.select(layer=induction[0], head=induction[1], query=len(model.to_str_tokens(TEXT)) - 1)
attention.other_layer, attention.other_head = previous
attention

# %% [markdown]
# A pattern is a matrix of fractions: each row sums to 1, and nothing looks ahead.

# %%
maps = lp.attention_maps(model, TEXT)
pattern = maps.pattern(*induction)
assert float((pattern.sum(-1) - 1).abs().max()) < 1e-5
assert float(pattern.triu(1).abs().max()) == 0
tokens = maps.tokens
looks = pd.DataFrame({"token": tokens, "weight": pattern[-1].tolist()})
looks.nlargest(4, "weight").round(3)

# %% [markdown]
# ## 3. What is moved, and what is written
#
# A weight says how much a head looks, not how much it takes from there: where nothing else fits,
# many heads park their weight on the first token, whose value is next to nothing ([Kobayashi et al.
# 2020](https://arxiv.org/abs/2004.10102)). Weighted by the length of what each key would write, the
# picture can change.

# %%
shares = maps.value_weighted(*induction)
assert float((shares.sum(-1) - 1).abs().max()) < 1e-5
first = pd.DataFrame(
    [
        (layer, head, float(maps.pattern(layer, head)[1:, 0].mean()),
         float(maps.value_weighted(layer, head)[1:, 0].mean()))
        for layer in range(model.cfg.n_layers)
        for head in range(model.cfg.n_heads)
    ],
    columns=["layer", "head", "weight on the first token", "share of what is moved"],
)  # fmt: skip
first.nlargest(5, "weight on the first token").round(3)

# %%
plots.top_tokens(
    maps.writes(*induction, query=-1),
    title=f"What L{induction[0]} H{induction[1]} writes at the last position",
)

# %% [markdown]
# ## 4. Where position comes in
#
# A score is the product of a query and a key that have been turned by their positions ([Su et al.
# 2021](https://arxiv.org/abs/2104.09864)): pair *i* of their coordinates by an angle that grows
# with position, fast for the first pair, slowly for the last. So a score depends on *how far
# apart* the two are, and each pair tells a part of that story. The strips choose a query and a
# key; the menus put another RoPE beside the model's own.

# %%
rope = lp.RopeExplorer(model, TEXT, selection=selection)
rope.select(layer=previous[0], head=previous[1], query=5, key=4)
rope

# %% [markdown]
# The pairs' shares sum to the score exactly.

# %%
frame = lp.rope_contributions(model, TEXT, *previous, query=5, key=4)
name = lp.act_name("attn_scores", previous[0])
_, cache = model.run_with_cache(TEXT, names_filter=name)
score = float(cache[name][0, previous[1], 5, 4])
assert abs(frame.value.sum() - score) < 1e-3
plots.rope_contributions(frame)

# %% [markdown]
# With the mean query and key, the curve of the previous-token head should be highest at distance 1;
# what the tokens say is averaged out, and what is left is the head's taste in distances.

# %%
curve = lp.rope_distance(model, TEXT, *previous, max_distance=32)
if MODEL == "tiny-moe":
    assert int(curve.loc[curve.value.idxmax(), "distance"]) == 1
plots.rope_distance(curve, "The previous-token head, against distance")

# %% [markdown]
# ## 5. Does the head matter?
#
# A pattern that looks like induction is a guess at what a head does. Ablation tests it: replace
# what each head writes by its mean over such texts, and see what is lost of the prediction that the
# pattern should bring about.

# %%
# Said three times, of which the last lacks the answer.
FACTS = [("France", "Paris"), ("Spain", "Madrid"), ("Italy", "Rome"), ("Japan", "Tokyo")]
said = [f"The capital of {country} is {city}. " * 2 + f"The capital of {country} is"
        for country, city in FACTS]  # fmt: skip
lost = lp.ablate_each(
    model, said, metric=lp.prob([f" {city}" for _, city in FACTS]), at="z", by="mean"
)
assert lost.effect.notna().all()
plots.patch(lost, "Share of the answer's probability that is lost with each head")

# %% [markdown]
# The facts are known to the model, not only repeated in the prompt, so that losing the induction
# head need not cost the answer: patterns show what *could* be used, ablation what *is*. How to ask
# that with care, with many prompts and intervals, is the subject of
# [the chapter on patching](02_patching.ipynb).
