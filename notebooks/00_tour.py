# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour: from a prompt to the head behind its answer
#
# Ten minutes, five views: what a model predicts, where its heads look, how RoPE tells near from
# far, what each layer would say, and which part carries the answer. Every view answers clicks;
# with the keyboard, Tab reaches a view, arrow keys move in it and Enter selects.
#
# As it stands the tour runs on `tiny-moe`, a mixture of experts that comes with the package. For a
# real model set `MODEL = "smollm2-135m-instruct"`: it is fetched once (100 MB).

# %% tags=["parameters"]
MODEL = "tiny-moe"
FAST = True  # False: the tour also opens SmolLM2 at its end (fetched once, 100 MB)

# %%
import pandas as pd

import llama_probe as lp

model = lp.load(MODEL, progress=False)
model

# %% [markdown]
# ## 1. A prompt, and what comes next
#
# The sentence names two people; one of them gives, so the other should receive. In its corrupted
# twin the other one gives.

# %%
CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Mary and John went to the store, Mary gave a drink to"


def likeliest(prompt, k=4):
    """The k likeliest next tokens."""
    top = model(prompt, logits_at=-1)[0, -1].softmax(-1).topk(k)
    return dict(zip(model.to_str_tokens(top.indices), top.values.tolist(), strict=True))


predictions = {"clean": likeliest(CLEAN), "corrupted": likeliest(CORRUPTED)}
assert next(iter(predictions["clean"])) == " Mary"
assert next(iter(predictions["corrupted"])) == " John"
pd.DataFrame(
    [(name, token, prob) for name, top in predictions.items() for token, prob in top.items()],
    columns=["prompt", "next token", "probability"],
).round(3)

# %% [markdown]
# ## 2. Where the heads look
#
# The grid on the left scores every head; click one, and its pattern appears beside it. Click a
# weight there: the strips below show what its query looks at, and who looks at its key. At the
# bottom stands what the head writes, read in the vocabulary. Under *Compare*, a second head or
# prompt can stand beside the first, or be taken off it.
#
# The first text says some names twice, so that heads which look for *what came after this token
# before* can be seen. That score is called induction; the explorer opens on the strongest head.

# %%
NAMES = "Mary John Tom Anna Mary John Tom Anna Mary John"
attention = lp.AttentionExplorer(model, [NAMES, CLEAN, CORRUPTED])
attention

# %% [markdown]
# What a click does, a line of Python does too. `figure` gives what a view shows.

# %%
scores = lp.attention_maps(model, NAMES).scores()
best = scores[scores.metric == "induction"].nlargest(1, "value").iloc[0]
attention.select(layer=int(best["layer"]), head=int(best["head"]))
row = attention.figure("row")
assert best["value"] > 0.5
assert abs(float(pd.Series(row.values).sum()) - 1) < 1e-4  # a query's weights sum to 1
best[["layer", "head", "value"]]

# %% [markdown]
# ## 3. How RoPE tells near from far
#
# Queries and keys turn with their position, pair of coordinates by pair: the first pair fast, the
# last hardly at all. A score is a sum over pairs. Choose a query and a key in the strips, and see
# which pairs add what; the curve shows the score against distance, what is said being equal.

# %%
rope = lp.RopeExplorer(model, CLEAN)
rope

# %%
frame = lp.rope_contributions(model, CLEAN, rope.layer, rope.head, rope.query, rope.key)
_, cache = model.run_with_cache(CLEAN, names_filter=lp.act_name("attn_scores", rope.layer))
score = cache["attn_scores", rope.layer][0, rope.head, rope.query, rope.key]
assert abs(frame.value.sum() - float(score)) < 1e-3  # the pairs sum to the score
f"{len(frame)} pairs sum to {frame.value.sum():.4f}; the model's score is {float(score):.4f}"

# %% [markdown]
# ## 4. What each layer would say
#
# The logit lens reads the residual stream after every layer as if it were the last. Click a cell
# for its list of tokens; the line follows the answer up through the layers.

# %%
lens = lp.LogitLensExplorer(model, CLEAN, watch=[" Mary", " John"])
lens

# %%
layers = lp.logit_lens(model, CLEAN, top_k=1)
last = layers[layers.pos == layers.pos.max()].set_index("layer")
assert last.token.iloc[-1] == " Mary"
last[["token", "prob"]].round(3)

# %% [markdown]
# ## 5. Which part carries the answer
#
# Patching puts one activation of the clean run into the corrupted one. Where that alone brings the
# clean answer back, the effect is 1. Click a cell of the map: below it stand the sites and the
# heads at that place, and where the strongest head looks. *Sweep all heads* works in the
# background; *Open the head* shows it as in section 2.

# %%
patching = lp.PatchingExplorer(model, CLEAN, CORRUPTED, metric=lp.logit_diff(" Mary", " John"))
patching

# %%
effects = patching.frames["resid_pre"]
# Before layer 0 one token differs: with it, the whole of the clean prompt is back.
assert abs(effects[effects.layer == 0].effect.max() - 1) < 1e-3
effects[effects.effect > 0.5][["layer", "pos", "token", "effect"]].round(2)

# %% [markdown]
# ## 6. Take it along
#
# Any explorer writes itself into one file, which works without Python and without a network, and
# still answers clicks. Where widgets do not run (VS Code, Colab), `patching.show_static()` shows
# the same page in place.

# %%
from pathlib import Path
from tempfile import gettempdir

page = patching.to_html(Path(gettempdir()) / "patching.html")
assert page.stat().st_size < 6e6
f"{page} ({page.stat().st_size / 1e6:.1f} MB)"

# %% [markdown]
# ## 7. A real model
#
# All of this works on any Llama. With `FAST = False` the last cell opens SmolLM2, 30 layers deep.

# %%
real = None
if not FAST:
    smol = lp.load("smollm2-135m-instruct", progress=False)
    real = lp.PatchingExplorer(smol, CLEAN, CORRUPTED, metric=lp.logit_diff(" Mary", " John"))
real

# %% [markdown]
# On to [attention and RoPE](01_attention_and_rope.ipynb), or to
# [patching](02_patching.ipynb), which does with many prompts and intervals what section 5 did with
# one.
