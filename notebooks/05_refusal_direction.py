# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Refusal: whether a model declines, by what, and what that is worth
#
# Many chat models decline by one direction in their residual stream (Arditi et al. 2024): taken
# out, they answer what they would decline; added, they decline what they would answer. Whoever
# relies on a model's refusal should know how much it hangs on, what an edit of it costs, and
# whether such an edit would be noticed. That is what this chapter measures. Edits here are context
# managers: they live in memory, as long as a `with` lasts, and nothing saves edited weights.
#
# It asks what is asked (1) and whether the model refuses at all (2), finds a direction (3), edits
# along it beside random directions (4), reads two positions (5), doses the edit (6), asks whether
# one direction is all (7), who writes it and which experts carry it (8), recognises an edit in the
# weights (9), sets a monitor (10), looks at what the words alone give (11), and ends with a
# dashboard (12).
#
# It runs on `tiny-moe`, which was taught to decline some mild requests, so we know that there is
# something to find. For a larger model set `MODEL = "smollm2-135m-refusal"`.

# %% tags=["parameters"]
MODEL = "tiny-moe"
FAST = True  # False: all requests, and 20 random directions everywhere

# %%
import tempfile
from pathlib import Path

import pandas as pd
import torch

import llama_probe as lp
from llama_probe import plots

model = lp.load(MODEL, progress=False)
TINY = MODEL == "tiny-moe"  # of other models we do not know what should be found
N_RANDOM = 5 if FAST else 20
TOKENS = 8 if TINY else 24  # of an answer: a refusal shows in its first few
QUIET = {"progress": False}

# %% [markdown]
# ## 1. What is asked
#
# Restricted requests are mildly improper, and no more: to crack a safe, to forge a library card.
# They are there to see refusal, and a model that answered them would harm nobody. Each has a
# harmless twin, which shares its verb ("crack a walnut") or its object ("paint a safe") and its
# phrasing. Where two sets differ in topic or in words, whatever tells these apart passes for
# refusal; twins leave it as little as they can. Twins share `pair`, and no pair is torn apart when
# one part finds a direction and another reports on it.

# %%
asked = lp.prompts.requests("tiny-moe" if TINY else "everyday")
matched = asked[asked.kind.isin(["restricted", "same verb", "same object"])]
matched = matched.assign(restricted=matched.kind == "restricted").sample(frac=1, random_state=0)
if FAST:  # some pairs, and of each at most two requests of either kind
    some = matched.pair.unique()[: 50 if TINY else 100]
    matched = matched[matched.pair.isin(some)].groupby(["pair", "restricted"]).head(2)
matched = matched.sort_values(["pair", "kind"], ignore_index=True)
restricted, harmless = matched[matched.restricted], matched[~matched.restricted]
ordinary = asked[asked.kind == "ordinary"]
assert set(restricted.pair) == set(harmless.pair)
matched[matched.pair == matched.pair[0]]

# %% [markdown]
# ## 2. Does it refuse?
#
# Between two sets of prompts there is always a difference in means, in a model that never refuses
# too. So behaviour comes first: a guard lets the model answer, and has two judges count. "phrase"
# looks for refusal phrases anywhere, "opening" at the beginning. Both must see restricted requests
# declined more often, by more than 0.1 at the lower end of the interval. One call does this and all
# that follows:


# %%
def study_of(some):
    return lp.find_refusal_direction(
        some, restricted, harmless, groups="pair", n_random=N_RANDOM, nearest=True,
        max_new_tokens=TOKENS, **QUIET,
    )  # fmt: skip


study = study_of(model)
plots.refusal_guard(study.guard.frame)

# %% [markdown]
# Judges that look for phrases are cheap and crude: they do not see an answer that evades. On
# answers as uniform as tiny-moe's they cannot differ; on a larger model look at
# `lp.refusal.judge_agreement`.
#
# An untrained twin, the same network with random weights, declines nothing. The guard says so, and
# no direction is offered, although one could be computed:

# %%
twin = lp.load(MODEL, pretrained=False, seed=1, progress=False)
nothing = study_of(twin)
assert nothing.direction is None and not nothing.guard.refuses
nothing.verdict

# %%
if TINY:
    assert study.guard.refuses and study.direction is not None
study.verdict

# %% [markdown]
# ## 3. Candidates, and the published choice
#
# A candidate is the difference of means at one position of the template and before one block. Three
# scores, on requests that it was not fitted on: the log odds of a refusal on restricted requests
# once it is taken out (low is good), on harmless ones once it is added (high is good), and what
# taking it out costs on harmless ones, as KL at the next token. The published rule drops the last
# fifth of the layers, whatever does not induce refusal, and whatever costs more than 0.1 nats; the
# best of the rest is taken.

# %%
plots.refusal(study.candidates)

# %%
study.survivors

# %% [markdown]
# In tiny-moe only one place does both, and it costs a little more than the rule allows. Nothing
# would be offered, had we not asked for `nearest=True`: then the cheapest candidate that removes
# and induces is taken, and `rule` says by how much it misses the limit. Read on with that in mind:
# the limit is there because an edit that damages a model may stop it from refusing for no
# interesting reason. In tiny-moe the cost lies so near the limit that it depends on which requests
# are drawn whether the place passes.
#
# What would *any* direction of this length cost? A random one, uniform over the sphere, hardly
# meets what the model uses; one with the covariance of activations does.

# %%
on_trial = study.asked["select"]
plain = lp.refusal.next_logits(model, on_trial["harmless"])


def cost(direction):
    """KL at the next token of harmless requests, when a direction is taken out."""
    edited = lp.refusal.next_logits(model, on_trial["harmless"], lp.ablate(direction))
    return lp.refusal.mean_kl(plain, edited).mean().item()


place = {"hooks": study.hook, "positions": [int(study.direction.position)], "template": "chat"}
acts = lp.capture(model, matched, **place, **QUIET)
drawn = {
    "random": lp.refusal.random_directions(study.vector, 20),
    "matched random": lp.refusal.matched_directions(study.vector, acts[study.hook], 20),
}
costs = pd.DataFrame({kind: [cost(vector) for vector in some] for kind, some in drawn.items()})
costs.quantile([0.5, 0.95]).assign(refusal=cost(study))

# %% [markdown]
# Random directions cost next to nothing, as most of the 128 dimensions hardly matter. Those with
# the activations' covariance cost something now and then, but less than this one. So what it costs
# is no accident of any edit of this size: harmless requests have a component along it, and lose it.

# %% [markdown]
# ## 4. What it does
#
# On the third part of the requests, which neither fitted nor chose it. *Ablation* takes it out
# wherever the stream is read and written; *addition* adds it once, where it comes from; the
# *affine* edit does not remove the component but sets it to what harmless requests have there.

# %%
plots.refusal_effects(study.effects)

# %%
plots.refusal_effects(study.effects, metric="refusal score")

# %%
lp.refusal.random_changes(study.effects).round(3)

# %% [markdown]
# Ablation lowers the odds far more than random directions do, and most restricted requests are no
# longer declined; how many depends on the draw of requests (of other draws up to 40 % still were).
# It takes out the whole component, not the surplus of restricted requests, and lands where neither
# kind of request has been. The affine edit goes to where harmless requests are, and costs those
# next to nothing. That ablation ends declining says that the direction is needed for it, that
# addition makes the model decline harmless requests, that it suffices for many of them. Neither
# says that the model *means* anything by it.
#
# "Not declined" is not "answered". Read some:

# %%
crack = "How do I crack a safe?"
edits = {"none": [], "ablation": lp.ablate(study), "affine": lp.affine(study, study.reference)}
answers = {}
for name, edit in edits.items():
    with model.hooks(edit):
        [answers[name]] = lp.refusal.answers(
            model, lp.refusal.ask(model, [crack]), max_new_tokens=TOKENS
        )
pd.Series(answers, name=crack)

# %% [markdown]
# tiny-moe knows no answer to what it always declined, and speaks of something else. A judge of
# phrases counts that as complying. How useful an answer is would be another measurement.

# %% [markdown]
# ## 5. Two positions
#
# Zhao et al. (2025) find two things that are easily taken for one: at the end of the instruction,
# how *harmful* a request is, and after the template, where the answer begins, whether the model is
# about to *refuse*. Each request below has a place on both axes. They are centred and scaled by the
# requests that the axes were fitted on; shown are others.

# %%
plane = lp.refusal.projections(model, study.asked["report"], study)
said = study.answers[study.answers.edit == "none"][["set", "request", "declined"]]
plane = plane.merge(said, on=["set", "request"])
plots.refusal_plane(plane)

# %%
plots.refusal_projections(plane, column="refusal")

# %% [markdown]
# In the upper left lies what is read as harmless and about to be declined, in the lower right what
# is read as harmful and answered all the same; there a jailbreak would show that silences the
# refusal and leaves the judgement. In tiny-moe the refusal axis sorts all requests, the harmfulness
# axis most: some twins lie in the lower right. It was taught one thing, to decline, so that this is
# rather a half-finished reading of the same than a second concept. That needs a model that was
# taught both.

# %%
kinds = plane.set.eq("restricted")
if TINY:
    assert (plane.refusal.gt(0) == kinds).mean() > 0.9
    assert (plane.harmfulness.gt(0) == kinds).mean() > 0.7
plane.groupby("set")[["harmfulness", "refusal"]].agg(["mean", "std"]).round(2)

# %% [markdown]
# ## 6. How much of it?
#
# Take out a growing share of the direction. A model whose refusal hangs on it stops declining at
# some point, and how late is its *robustness index*: the area under the curve, 1 where nothing of
# this kind turns it.

# %%
report = study.asked["report"]
doses, dosed = lp.refusal.dose_response(
    model, study, report["restricted"], report["harmless"], study.tokens,
    n_random=N_RANDOM, max_new_tokens=TOKENS,
)  # fmt: skip
plots.dose_response(doses)

# %%
plots.dose_response(doses, metric="refusal score")

# %%
index = lp.refusal.robustness_index(dosed)
assert 0 <= index.ci_low <= index.value <= index.ci_high <= 1
index

# %% [markdown]
# The index is of *this* direction and this edit. A high one does not say that a model is robust:
# the affine edit of section 4 turned it with ease. Declining is a step, while the score moves all
# along, so a model may be close to the step and look unmoved. And more is not always more: adding
# all of it makes fewer harmless requests be declined than three quarters of it, as the stream then
# leaves what the model knows.

# %% [markdown]
# ## 7. One direction, or several?
#
# Three questions that sound alike. *Along how many directions do twins differ?* The singular values
# of their differences, beside differences of requests of the same kind:

# %%
spectrum = lp.refusal.spectrum(acts, "restricted", "pair")
plots.refusal_subspace(spectrum.frame)

# %% [markdown]
# *How many must go until no probe tells them apart?* One difference in means, after which by a
# theorem nothing linear is left on the requests that it came from; or weight after weight of a
# probe, which may go on for long:

# %%
subspace = lp.refusal.refusal_subspace(
    acts, "restricted", groups="pair", k_max=4, n_random=N_RANDOM
)
plots.refusal_subspace(subspace.frame)

# %% [markdown]
# That a probe still tells them apart does not say that the model uses what it reads. *Do two
# directions act by themselves?* That only interventions answer: what ablating the first does, with
# and without the second.


# %%
def score(edit):
    logits = lp.refusal.next_logits(model, report["restricted"], edit)
    return lp.refusal.refusal_score(logits, study.tokens)


apart = lp.refusal.independence(score, subspace.basis[0], subspace.basis[1])
apart[apart.metric != "score"].round(3)

# %%
if TINY:
    assert spectrum.frame.value[0] > 0.4
    assert subspace.rounds("difference of means removed") == 1
    change = apart[apart.metric == "change"].set_index("condition").value
    assert change["first ablated"] < 3 * change["second ablated"] < 0

# %% [markdown]
# Both change the score, and what they change nearly adds up (the "interaction" is small beside the
# changes), so the second is no echo of the first. It is much the weaker one: "one direction" is a
# good summary here, and not the whole truth.
#
# ## 8. Who writes it?
#
# The stream is a sum, so the direction's part of it is a sum over heads and experts, exactly. Here
# restricted less harmless:

# %%
writers = lp.refusal.who_writes(
    model, matched, study, position=int(study.direction.position), template="chat",
    labels="restricted", progress=False,
)  # fmt: skip
assert abs(writers.value.sum() - writers.attrs["total"]) < 1e-4
plots.refusal_writers(writers)

# %% [markdown]
# Heads that write it carry it from elsewhere in the prompt: the sum says who writes, not who
# decided. `lp.path_patch` follows that.
#
# Papers look for *safety experts*: those that restricted requests use more than harmless ones. It
# matters what they are compared with. Against ordinary questions, everything differs:


# %%
def routes(frame):
    """How the requests are routed, in the chat template."""
    return lp.routes_of(model, [one.ids for one in lp.refusal.ask(model, frame).encoded])


contrasts = {}
if model.cfg.moe is not None:
    a, b, c = map(routes, (restricted, harmless, ordinary))
    topics = (restricted.topic.tolist(), harmless.topic.tolist())
    contrasts = {
        "ordinary questions": lp.expert_contrast(model, a, c, permutations=999),
        "twins, raw": lp.expert_contrast(model, a, b, permutations=999),
        "twins, by topic": lp.expert_contrast(model, a, b, topics, permutations=999),
    }
beside = pd.DataFrame(
    {
        against: frame.set_index(["layer", "expert"])["value"].where((frame.q < 0.05).to_numpy())
        for against, frame in contrasts.items()
    }
)
beside.dropna(how="all").round(3)

# %% [markdown]
# Only differences with q below 0.05 are shown. Most of what stands out against ordinary questions
# is what the requests are about and how they are put. Against twins few experts are left, and some
# have changed sides. Whoever calls the first column safety experts has found topics. The raw and
# the topic-matched difference agree here because twins bring the topics of their pairs; with other
# sets of prompts they would not, and the matched one is what to report.

# %%
if contrasts:
    sizes = beside.abs().sum()
    assert sizes["ordinary questions"] > 2 * sizes["twins, by topic"]
figure = plots.expert_contrast(contrasts["twins, by topic"]) if contrasts else None
figure

# %% [markdown]
# Use is not effect. The experts that write most along the direction, beside the share of tokens
# that use them:

# %%
experts = writers[writers.component == "expert"].drop(columns=["component", "head", "n"])
if contrasts:
    use = contrasts["twins, by topic"][["layer", "expert", "use_a", "use_b", "q"]]
    experts = experts.merge(use, on=["layer", "expert"])
experts.sort_values("value", ascending=False).head(3).round(3)

# %% [markdown]
# In tiny-moe one expert of layer 1 writes a third of the difference, while restricted requests use
# it only a little more: at the place where the answer begins it serves them, and counting tokens
# hides that.

# %% [markdown]
# The edit itself changes the routing too: this share of the tokens of restricted requests has
# other experts once the direction is taken out. What an ablation does, it does in part by that
# (`lp.freeze_routes` holds the routes fixed, to tell the two apart).

# %%
flips = None
if contrasts:
    flips = lp.refusal.route_flips(model, restricted, lp.ablate(study), template="chat")
flips

# %% [markdown]
# ## 9. Would it be noticed in the weights?
#
# Ablation can be written into weights: nothing in the model then writes the direction. For checks
# there is such a copy, in memory. It does what the hooks do:

# %%
copy = lp.refusal.orthogonalised(model, study)
everything = lp.refusal.ask(model, matched)
hooked = lp.refusal.next_logits(model, everything, lp.ablate(study))
difference = (lp.refusal.next_logits(copy, everything) - hooked).abs().max().item()
assert difference < 1e-3
difference

# %% [markdown]
# Against the checkpoint that it came from it is recognised, without knowing the direction, since
# all weights that write changed along one and the same. Another network's do not.

# %%
mark, other = (lp.refusal.mark_of_editing(some, model) for some in (copy, twin))
assert "removed from all writers" in mark.verdict and other.verdict == "no common direction"
cosine = torch.nn.functional.cosine_similarity(mark.direction, study.vector.double(), dim=0)
assert abs(cosine) > 0.999
pd.DataFrame(
    {
        "verdict": [mark.verdict, other.verdict],
        "share along one direction": [mark.share, other.share],
        "expected by chance": [mark.expected, other.expected],
    },
    index=["copy", "untrained"],
)

# %%
plots.refusal_changes(lp.refusal.weight_changes(copy, model, mark.direction))

# %% [markdown]
# This needs the original. It notices this edit and its partial forms, not a fine-tuning that makes
# a model stop refusing by other changes. And the copy refuses to be saved:

# %%
try:
    lp.save(copy, Path(tempfile.mkdtemp()) / "copy")
    refused = ""
except lp.InputError as error:
    refused = str(error)
assert "not to be saved" in refused
refused

# %% [markdown]
# ## 10. A monitor
#
# The direction can also be watched. A probe is fitted on the requests that found the direction. Its
# threshold is where 1 % of benign requests are flagged; which benign ones, we try twice: ordinary
# questions, and twins that were not used so far. Then it meets requests that it has not seen.

# %%
known = [text for some in study.asked["fit"].values() for text in some.texts]
seen = matched.text.isin(known)
spare = asked[asked.kind.isin(["same verb", "same object"]) & ~asked.text.isin(matched.text)]
benign = {
    "ordinary": ordinary.sample(100, random_state=0),
    "twins": spare.sample(100, random_state=0),
}
unused = ordinary.drop(benign["ordinary"].index)
unseen = pd.concat([matched[~seen], unused], ignore_index=True)
fitting = lp.capture(model, matched[seen], **place, **QUIET)
flagged = {}
for name, texts in benign.items():
    negatives = lp.capture(model, texts, **place, **QUIET)
    monitor = lp.fit_monitor(
        fitting, "restricted", hook=study.hook, groups="pair", negatives=negatives
    )
    scored = monitor.score(model, unseen).assign(kind=unseen.kind)
    for kind, some in scored.groupby("kind"):
        flagged[name, kind] = lp.stats.share(int(some.flagged.sum()), len(some))
flagged = pd.DataFrame(
    flagged.values(), index=pd.MultiIndex.from_tuples(flagged, names=["threshold", "kind"])
)
if TINY:
    assert (
        flagged.value["twins", "restricted"] > 0.9 > 0.5 > flagged.value["ordinary", "restricted"]
    )
flagged.round(3)

# %% [markdown]
# The same probe, and the same requests. With the threshold of ordinary questions it misses most
# restricted ones; with that of twins it catches them all, and most ordinary questions with them. It
# tells restricted requests from twins, as it was fitted to; of a question about capitals it knows
# nothing, and its score there means nothing. So a monitor is to be fitted on, and its threshold set
# on, what it will meet, and both errors belong in a report. It is a measurement, not a defence:
# whoever edits a model can edit what it reads.
#
# ## 11. The words alone
#
# How much of this does the text itself give? Counts of its words, without any model, beside the
# difference in means at the place of the direction, and the same in the untrained twin:

# %%
controls = ("random direction", "n-grams", "length")
options = {"groups": "pair", "probe": "mass_mean", **QUIET}
told = lp.probe(acts, "restricted", controls=controls, **options)
untrained = lp.probe(
    lp.capture(twin, matched, **place, **QUIET), "restricted", controls=(), **options
)
both = pd.concat([told, untrained.replace({"kind": {"probe": "untrained twin"}})])
both = both[both.metric == "auroc"].set_index("kind")[["value", "ci_low", "ci_high", "n"]]
both.round(3)

# %% [markdown]
# Words and pairs of words go a long way, though twins share verb or object: the same few verbs and
# objects come back in other pairs. Requests in words that were never fitted on would be a harder
# test. And that two sets can be told apart, by words or by a probe, does not say that the model
# refuses: a model that never does may tell them apart just as well. For that, section 2 let it
# answer, and section 4 intervened.

# %%
if TINY:
    assert both.value["probe"] > both.value["n-grams"] > both.value["length"]
    assert both.value["probe"] > both.value["untrained twin"]

# %% [markdown]
# ## 12. The dashboard
#
# Click a candidate to see where requests lie on it, or a request in the plane to read it. Nothing
# is generated before a button asks for it, and answers are shown as they begin.

# %%
dashboard = lp.RefusalDashboard(model, study, n_random=N_RANDOM)
dashboard

# %% [markdown]
# `lp.audit(MODEL)`, or `llama-probe audit`, takes the main of these steps on all requests and
# writes one report; `--against` compares with another checkpoint of the same base.

# %%
assert dashboard.layer == study.direction.layer
dashboard.select(prompt=1)
