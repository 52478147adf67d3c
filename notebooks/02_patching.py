# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Patching: which parts carry the answer
#
# A model reads *"When Mary and John went to the store, John gave a drink to"* and says *Mary*.
# Patching finds what this rests on: take an activation out of one run, put it into another, and
# look at what becomes of the prediction.
#
# This chapter goes from the whole model to one head: the task (1), places in the residual stream
# (2), heads (3), one head taken apart (4), a fast estimate and when to trust it (5), and mixtures
# of experts (6). The task is that of [Wang et al. 2022](https://arxiv.org/abs/2211.00593).
#
# As it stands the notebook runs on `tiny-moe`, which comes with the package, in about a minute on
# a CPU. For a real model set `MODEL = "smollm2-135m-instruct"`: it is fetched once (100 MB), and
# the chapter then takes several minutes.

# %% tags=["parameters"]
MODEL = "tiny-moe"
FAST = True  # False: four times as many prompts, and narrower intervals

# %%
import pandas as pd
import plotly.express as px
import plotly.io as pio

import llama_probe as lp
from llama_probe import plots

grid = {"showgrid": True, "gridcolor": "#e1e5ea"}
pio.templates["lines"] = {"layout": {"plot_bgcolor": "white", "xaxis": grid, "yaxis": grid}}
px.defaults.template = "llama_probe+lines"

model = lp.load(MODEL, progress=False)
N = 16 if FAST else 64

# %% [markdown]
# ## 1. The task and its measure
#
# Each prompt names two people. One of them gives (*S*, the subject, who is named again), the other
# receives (*IO*, the indirect object). In the corrupted twin the other person gives. One token
# differs, *S2*, and with it the right answer, so that all the two runs have in common (grammar,
# the place, the gift) drops out and only what depends on *who gave* is left.

# %%
truth = lp.prompts.planted()  # what tiny-moe was taught
TAUGHT = {kind: truth[kind] for kind in ("names", "places", "gifts")}
# One story begins with a name, which would be another token there.
TAUGHT["templates"] = [story for story in truth["stories"] if not story.startswith("{")]
WORDS = TAUGHT if MODEL == "tiny-moe" else {}

pairs = lp.prompts.indirect_object(model, N, split="test", **WORDS)
pair = pairs.iloc[0]
tokens = model.to_str_tokens(pair.clean)
roles = {pair[role]: role for role in ("IO", "S1", "S2", "end")}
both = {"clean": tokens, "corrupted": model.to_str_tokens(pair.corrupted)}
pd.DataFrame({**both, "role": [roles.get(pos, "") for pos in range(len(tokens))]}).T

# %% [markdown]
# The measure is the logit of the right name minus that of the other: 0 is undecided, and one unit
# multiplies the odds by *e*. It is linear in what the model writes. A probability is not: near 0
# and 1 it hardly moves, which hides parts that speak against the answer.


# %%
def given(pairs):
    """What every sweep over these pairs takes."""
    metric = lp.logit_diff(pairs.answer.tolist(), pairs.foil.tolist())
    return {"clean": pairs.clean.tolist(), "corrupted": pairs.corrupted.tolist(), "metric": metric}


measure = given(pairs)["metric"].on(model)
differences = pd.DataFrame(
    {run: measure(model(given(pairs)[run], logits_at=-1)[:, -1]) for run in ("clean", "corrupted")}
)
measures = {
    "logit difference, clean": lp.stats.mean(differences.clean),
    "logit difference, corrupted": lp.stats.mean(differences.corrupted),
    "share right, clean": lp.stats.share(int((differences.clean > 0).sum()), N),
}
pd.DataFrame(measures.values(), index=measures).round(2)

# %%
px.strip(
    differences.melt(var_name="run", value_name="logit difference"),
    x="logit difference",
    y="run",
    height=260,
    title="Each pair: for the right name above 0, for the other below",
)

# %% [markdown]
# The two clouds have to lie apart: every effect below is a share of the distance between them. If
# they overlap, the model does not do the task, and there is nothing to find.

# %%
assert (differences.clean > 0).mean() > 0.8
assert (differences.corrupted < 0).mean() > 0.8

# %% [markdown]
# ## 2. Where and when: the residual stream
#
# Denoising puts activations of the clean run into the corrupted one, cell by cell. An effect of 1
# means that this one activation *suffices* to bring the clean answer back, 0 that nothing changed.

# %%
metric = lp.logit_diff(pair.answer, pair.foil)
plots.patch(
    lp.patch(model, pair.clean, pair.corrupted, metric=metric),
    title="One pair: the residual stream before each layer, at each position",
)

# %% [markdown]
# Read it from the bottom. Before layer 0 the runs differ at S2 alone, so that cell is 1 and the
# others are 0 by construction: a check on the method, no finding. Where a column fades, someone has
# read the name there and carried it on; where another begins, it has arrived. At the top only the
# last position counts, since the answer is read there.
#
# For many prompts, positions need names: the sixth token of one sentence is not the sixth of
# another. The intervals are 95 % bootstrap intervals over pairs.


# %%
def facets(figure):
    """Plain titles of the panels, and a legend that keeps clear of them."""
    figure.for_each_annotation(lambda note: note.update(text=note.text.split("=")[-1]))
    return figure.update_layout(margin_t=100, legend={"y": 1.1, "title": None})


layers = {"dtick": max(1, model.cfg.n_layers // 6)}  # no ticks between two layers
places = pairs.assign(**{"S2+1": pairs.S2 + 1})
positions = {role: places[role].tolist() for role in ("IO", "S1", "S2", "S2+1", "end")}
sites = ["resid_pre", "attn_out", "mlp_out"]
sweep = lp.patch(model, **given(pairs), at=sites, positions=positions)
bars = sweep.assign(above=sweep.ci_high - sweep.effect, below=sweep.effect - sweep.ci_low)
figure = px.line(
    bars,
    x="layer",
    y="effect",
    color="pos",
    facet_col="site",
    error_y="above",
    error_y_minus="below",
    markers=True,
    title=f"{N} pairs: what suffices, by site, layer and position",
)
facets(figure).update_xaxes(layers)

# %% [markdown]
# The left panel says where the information *is*, the others which layer's attention or feed-forward
# *moves or makes* it there. Two traps:
#
# - **What is not named is not seen.** If in some layer all curves of the left panel are low, the
#   information has not vanished: it sits at a position that has no name yet. The map above, with
#   all positions of one pair, shows where. In tiny-moe, which has a head in layer 0 that was taught
#   to look at the token before, it is S2+1; without that name there would be a gap.
# - **An effect of a batch is a ratio of means**, not a mean of ratios. A pair whose two runs hardly
#   differ has a tiny denominator, and one such pair can ruin a mean of ratios. Look at the pairs
#   one by one before you believe a curve:

# %%
end = {"end": pairs.end.tolist()}
each = lp.patch(model, **given(pairs), positions=end, each=True)
whole = sweep[(sweep.site == "resid_pre") & (sweep.pos == "end")]
figure = px.line(
    each,
    x="layer",
    y="effect",
    line_group="prompt",
    height=380,
    title="The residual stream at the last position: each pair, and the ratio of means",
)
figure.update_traces(line={"width": 1, "color": "#9aa5b1"})
figure.add_scatter(x=whole.layer, y=whole.effect, line={"width": 4, "color": "#0072B2"})
figure.update_layout(showlegend=False).update_xaxes(layers)

# %%
first = sweep[(sweep.site == "resid_pre") & (sweep.layer == 0)].set_index("pos").effect
assert abs(first["S2"] - 1) < 0.01
assert first.drop("S2").abs().max() < 0.01

# %% [markdown]
# ## 3. Who: the heads
#
# `at="z"` patches what one head has gathered, before it writes. A head is *chosen* below, so we
# look at one half of the names and sentences, and report numbers from the other half: the best of
# many noisy numbers is too good on the prompts that it was chosen on.

# %%
looked_at = lp.prompts.indirect_object(model, N, split="train", **WORDS)
heads = lp.patch(model, **given(looked_at), at="z")
plots.patch(heads, title="Each head's output, at all positions")

# %%
last = {"end": looked_at.end.tolist()}
over = ("layer", "pos", "head")
heads_at_end = lp.patch(model, **given(looked_at), at="z", over=over, positions=last)
figure = plots.patch(heads_at_end, title="Each head's output, at the last position only")
scale = heads.effect.abs().max()  # the colours of the figure before
figure.update_traces(zmin=-scale, zmax=scale)

# %% [markdown]
# A head that is strong in the first figure and not in the second works earlier in the sentence:
# it moves the name on its way. The heads of the second figure bring it to where the answer is read.
#
# ### Four questions that sound alike
#
# | | put in | into | asks |
# | --- | --- | --- | --- |
# | denoise | the clean activation | the corrupted run | is it enough? |
# | noise | the corrupted activation | the clean run | is it needed? |
# | mean ablation | the mean over prompts | the clean run | what did it say about this prompt? |
# | zero ablation | nothing | the clean run | what is lost if it falls silent? |

# %%
clean, metric = given(pairs)["clean"], given(pairs)["metric"]
ways = {
    "denoise": lp.patch(model, **given(pairs), at="z"),
    "noise": lp.patch(model, **given(pairs), at="z", direction="noise"),
    "mean ablation": lp.ablate_each(model, clean, metric=metric),
    "zero ablation": lp.ablate_each(model, clean, metric=metric, by="zero"),
}
joined = pd.concat([frame.assign(way=way) for way, frame in ways.items()])
joined["name"] = joined.layer.astype(str) + "." + joined["head"].astype(str)
wide = joined.pivot(index="name", columns="way", values="effect")[list(ways)]
wide.sort_values("denoise", key=abs, ascending=False).head(8).round(2)

# %%
points = wide.reset_index().melt(["name", "denoise"], value_name="effect")
strong = points[["denoise", "effect"]].abs().max(axis=1) > 0.15
figure = px.scatter(
    points.assign(text=points.name.where(strong, "")),
    x="denoise",
    y="effect",
    facet_col="way",
    text="text",
    hover_name="name",
    title="Every head: other ways against denoising",
)
sides = ["middle left", "middle right"] * len(wide)  # neighbours keep clear of one another
figure.update_traces(textposition=sides[: len(wide)], marker_size=8)
low, high = wide.min().min(), wide.max().max()
diagonal = {"x0": low, "y0": low, "x1": high, "y1": high, "line": {"color": "#9aa5b1", "width": 1}}
figure.add_shape(type="line", layer="below", row="all", col="all", **diagonal)
around = [low - 0.2 * (high - low), high + 0.2 * (high - low)]
facets(figure).update_xaxes(range=around).update_yaxes(range=around)

# %% [markdown]
# - **Direction.** In a chain, where each link is both enough and needed, noise and denoise agree.
#   A head above the diagonal is needed without being enough: it works together with others. One
#   below has a stand-in, which is enough as well.
# - **Self-repair.** When a head fails, later ones may step in, in the same forward pass. What is
#   lost is then less than what the head did: a small effect of noise or ablation is no proof that
#   a head does nothing.
# - **Different rulers.** Noise leads all the way to the *other answer* (effect 1), ablation to
#   *no information* (1: no preference is left, above 1: the other name is preferred).
# - **Zero is not neutral.** Later layers are used to what a head says on average. Taking that away
#   as well breaks things that have nothing to do with the task: heads that are high for zero
#   ablation alone are most likely of that kind. Prefer the mean.

# %%
assert wide.denoise.corr(wide.noise) > 0.5

# %% [markdown]
# ## 4. One head, taken apart
#
# We take the head that does most at the last position, of those that can have a sender before them.
# First its number on pairs that it was not chosen on.

# %%
candidates = heads_at_end[heads_at_end.layer > 0]
best = candidates.loc[candidates.effect.idxmax()]
layer, head = int(best.layer), int(best["head"])
one = {"layers": [layer], "units": [head]}
reported = lp.patch(model, **given(pairs), at="z", over=over, positions=end, **one)
columns = ["layer", "head", "effect", "ci_low", "ci_high", "n"]
reported[columns].assign(chosen_from=len(candidates)).round(3)

# %% [markdown]
# ### Where it looks

# %%
_, cache = model.run_with_cache(pair.clean, names_filter=lp.act_name("pattern", layer))
pattern = cache["pattern", layer][0, head].numpy(force=True)
plots.attention(pattern, tokens, title=f"Attention of head {layer}.{head}")

# %% [markdown]
# The last row is what it sees from where the answer is read. A weight says where a head looks, not
# what it takes from there, nor whether that matters.
#
# ### What it writes
#
# The logits are a sum of what the parts wrote (the last norm's scale is held fixed), and each part
# has its share of the difference. That is the head's *direct* effect, through its OV matrix.

# %%
parts = lp.direct_logit_attribution(model, pair.clean, pair.answer, pair.foil)
plots.direct_logit_attribution(parts)

# %% [markdown]
# A head may be strong in section 3 and pale here: then it does not name anyone itself but tells
# later layers. Patching only the path from a head straight to the logits, beside patching all that
# it reaches, tells the two apart over all pairs.

# %%
names = wide.denoise.abs().nlargest(8).index
direct = lp.path_patch(model, **given(pairs), receiver="logits")
direct["name"] = direct.layer.astype(str) + "." + direct["head"].astype(str)
effects = {"all it reaches": wide.denoise, "straight to logits": direct.set_index("name").effect}
table = pd.DataFrame(effects).loc[names]
figure = px.bar(
    table.reset_index().melt("name", var_name="path", value_name="effect"),
    x="name",
    y="effect",
    color="path",
    barmode="group",
    height=380,
    title="The strongest heads: direct effect, and all of it",
)
figure.update_xaxes(type="category", title="head").update_layout(legend_title=None)

# %% [markdown]
# ### Who talks to it
#
# Path patching changes what one head sends to one *input* of the receiver and leaves all else as it
# was: into its queries (where it looks from), its keys (what it finds) or its values (what it
# takes along).

# %%
inputs = [(kind, layer, head) for kind in ("q", "k", "v")]
sent = pd.concat([lp.path_patch(model, **given(pairs), receiver=to) for to in inputs])
sent["sender"] = sent.layer.astype(str) + "." + sent["head"].astype(str)
strongest = sent.groupby("sender").effect.agg(lambda effect: effect.abs().max()).nlargest(8).index
bars = sent.assign(above=sent.ci_high - sent.effect, below=sent.effect - sent.ci_low)
figure = px.bar(
    bars[bars.sender.isin(strongest)],
    x="sender",
    y="effect",
    color="receiver",
    barmode="group",
    error_y="above",
    error_y_minus="below",
    height=380,
    title=f"Heads that send to head {layer}.{head}, by the direct path",
)
figure.update_xaxes(type="category", categoryarray=list(strongest), categoryorder="array")
figure.update_layout(legend_title=None)

# %% [markdown]
# Only direct paths count here: what a sender says by way of a feed-forward in between is left out,
# unless `through_mlps=True`. Heads that share keys and values are told apart: only the named one
# sees the change.
#
# ### What it does elsewhere
#
# On random tokens that are repeated, meaning is no help, and a head shows what it does by
# mechanism: an induction head looks at what followed the same token earlier on.

# %%
scores = lp.head_scores(model)
plots.head_scores(scores, "induction")

# %% [markdown]
# On text a head may have other habits. Who looks at the token before, in our own prompts?

# %%
on_text = lp.head_scores(model, pairs.clean.tolist())
plots.head_scores(on_text, "previous_token", title="Previous token, in the prompts of this chapter")

# %% [markdown]
# A score is a name for a habit, not for a role: that a head does induction on random tokens does
# not say that it does so here. Set the strong cells beside those of section 3.

# %%
assert reported.ci_low.item() > 0
assert abs(parts.value.sum() - differences.clean[0]) < 1e-2
if MODEL == "tiny-moe":  # two heads were taught where to look
    looks = {"induction": scores, "previous_token": on_text}
    for habit, frame in looks.items():
        value = frame[frame.metric == habit].set_index(["layer", "head"]).value
        planted = tuple(truth["induction_head" if habit == "induction" else "previous_token_head"])
        assert value.idxmax() == planted and value[planted] > 0.5

# %% [markdown]
# ## 5. All patches at once, estimated
#
# Exact patching runs part of the model for each cell. Attribution patching takes two forward passes
# and one backward pass for all cells: each effect is estimated as the change of the activation
# times the metric's gradient there. It is exact where the model is linear, and a softmax or a norm
# is not. Two remedies are at hand: `method="integrated"` averages the gradient along the path
# between the runs, and `qk_fix=True` computes new attention patterns exactly.

# %%
many = lp.prompts.indirect_object(model, 5 * N, split="test", **WORDS)
# Sentences of one template have one length, so that positions mean the same in all.
alike = many[many.template == many.template[0]].head(N // 4)
sites = ["resid_pre", "attn_out", "mlp_out", "z", "q", "k"]
exact = lp.patch(model, **given(alike), at=sites)
methods = {
    "gradient": {"at": sites},
    "integrated": {"at": sites, "method": "integrated"},
    "QK fix": {"at": ["q", "k"], "qk_fix": True},
}
estimates = {
    name: lp.attribution_patch(model, **given(alike), **options)
    for name, options in methods.items()
}
agreement = pd.concat(
    [lp.agreement(exact, estimate).assign(method=name) for name, estimate in estimates.items()]
)
table = agreement.pivot(index="site", columns="method", values=["pearson", "recall"])
table = table.reindex(index=sites).reindex(columns=methods, level="method")
table["largest effect", ""] = exact.effect.abs().groupby(exact.site).max()
table.style.format("{:.2f}", na_rep="")

# %%
plots.agreement(exact, estimates["gradient"], title="The plain gradient, against exact effects")

# %%
plots.agreement(exact, estimates["integrated"], title="Integrated gradients, against exact effects")

# %% [markdown]
# How to read them:
#
# - **Look at the largest effect first.** Where it is near 0, the site carries nothing here, and a
#   correlation compares noise with noise.
# - **Most cells are 0 in both**, all positions before S2 among them. They flatter a correlation
#   over all cells; `recall`, how many of the ten strongest the estimate finds among its own ten
#   strongest, is what matters if you use it to decide what to patch exactly.
# - **A cell can be badly wrong.** The first layer's stream at S2 has an effect of exactly 1; see
#   what the plain gradient makes of it. Swapping a whole name is a large change, and a gradient
#   knows about small ones.
#
# What it costs: seconds, for all sites together. The lead of the estimates grows with the number
# of layers, heads and positions.

# %%
seconds = {"exact": exact.attrs["seconds"]}
seconds |= {method: estimate.attrs["seconds"] for method, estimate in estimates.items()}
pd.DataFrame([seconds], index=["seconds"]).round(2)

# %%
strong = table[table["largest effect", ""] > 0.5]
assert len(strong) >= 1
assert (strong["pearson", "integrated"] > 0.7).all()

# %% [markdown]
# ## 6. Mixtures of experts
#
# In a mixture of experts a router chooses, for each token, which feed-forwards (experts) it passes
# through. Two questions, which are easily confused: does it matter *who* is chosen
# (`router_logits`), and does it matter *what the chosen one says* (`expert_out`)? A dense model has
# no such sites; this section then goes on with tiny-moe.

# %%
mixture, words = model, WORDS
if model.cfg.moe is None:
    mixture, words = lp.load("tiny-moe", progress=False), TAUGHT
told = lp.prompts.indirect_object(mixture, N, split="test", **words)
over = ("layer", "expert")
experts = lp.patch(mixture, **given(told), at=["expert_out", "router_logits"], over=over)
of_site = {site: experts[experts.site == site] for site in ("expert_out", "router_logits")}
plots.patch(of_site["expert_out"], title="What each expert says, at all positions")

# %%
figure = plots.patch(of_site["router_logits"], title="Each expert's router logit")
scale = experts.effect.abs().max()  # the colours of the figure before
figure.update_traces(zmin=-scale, zmax=scale)

# %% [markdown]
# An expert that is not chosen in either run says nothing in either, so its effect is 0. A patch of
# its router logit acts only if it changes the choice or, little by little, the weight of the chosen
# one. The clean and the corrupted prompt are about the same things, and the router sends them much
# the same way: what differs is what the chosen expert is given to work on.
#
# Both sites keep everything else as it was, and layers after the patch choose their experts anew.
# Gradients of router logits know only the weights of the chosen experts, never that another would
# have been chosen: do not trust attribution there where choices flip.

# %%
said = of_site["expert_out"].set_index(["layer", "expert"]).effect
if mixture.cfg.model_name == "tiny-moe":  # in one layer each domain was given its own expert
    planted = said[truth["planted_layer"]]
    expert = truth["expert_of_domain"]["stories"]
    assert planted.abs().idxmax() == expert
    assert planted.drop(expert).abs().max() < 0.1

# %% [markdown]
# ## What to report
#
# The corruption and the measure; the direction, and for ablations what was put in; how many pairs,
# with intervals; what was chosen on which prompts, and how many parts were tried. And that the two
# runs lie apart, which the first figure shows.
#
# The same sweeps for many prompts, with a record of the run: `experiments/ioi_patching.py`.
