# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Probing: what an activation says, and how far to believe it
#
# A probe is a linear classifier on activations. It is easily fitted, and as easily believed too
# much: it may have learnt words, seen the test in another form, or be the luckiest of many. This
# chapter captures activations (1), draws the curve at which layer an answer can be read, beside
# what it is to be held against (2), shows how selection (3) and leaks (4) deceive, compares with an
# untrained network (5), watches a probe of truth fail on negations (6), lets a monitor watch the
# model speak (7), and ends with a dashboard (8).
#
# It runs on `tiny-moe`, which was taught to judge statements, so there is an answer to find. For a
# real model set `MODEL = "smollm2-135m-instruct"`, which then reads statements about capitals; the
# chapter takes several minutes with it.

# %% tags=["parameters"]
MODEL = "tiny-moe"
FAST = True  # False: more positions, and three kinds of probes

# %%
import re
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

import llama_probe as lp
from llama_probe import plots

model = lp.load(MODEL, progress=False)
TINY = MODEL == "tiny-moe"  # of other models we do not know what should be found
POSITIONS = [-3, -1] if FAST else [-4, -3, -2, -1]
PROBES = ["logistic"] if FAST else ["logistic", "ridge", "mass_mean"]

# %% [markdown]
# ## 1. Capture
#
# The statements: half of them true, each about something (`group`), and of some sort (`sort`).
# For tiny-moe they are held-out questions of its exam, in wordings that it was not taught.

# %%
truth = lp.prompts.planted()
subjects = {str(fact["subject"]) for fact in truth["facts"]}


def exam(task):
    """Statements that tiny-moe is asked to judge, and which subject each is about."""
    asked = pd.DataFrame(truth["exam"][task]).rename(columns={"prompt": "text", "relation": "sort"})
    words = asked.text.str.findall(r"\w+").map(lambda found: [w for w in found if w in subjects])
    return asked.drop(columns="answer").assign(group=words.str[0])


def ours(negated):
    """Our own statements about capitals, for a model that knows them."""
    return lp.prompts.true_false("capitals", negated=negated).rename(columns={"template": "sort"})


statements = exam("verdicts") if TINY else ours(negated=False)
statements.groupby("label").head(2)

# %% [markdown]
# `lp.capture` runs them and keeps the stream after each layer at some positions. With `store=` the
# activations go into a folder that is read lazily; the same call on a store that was interrupted
# goes on where it stopped.

# %%
folder = Path(tempfile.mkdtemp()) / "statements"
STREAM = "blocks.*.hook_resid_post"
lp.capture(model, statements, hooks=STREAM, positions=POSITIONS, store=folder, progress=False)
acts = lp.Activations.open(folder)
acts

# %% [markdown]
# What was really fed, with the tokens that a template or BOS adds, stands beside each prompt, and
# the index says which token each row is of. Look at both before you believe a curve: many a probe
# has read the wrong token.

# %%
assert len(acts) == len(statements) * len(POSITIONS)
fed = acts.prompts.loc[acts.index.prompt, "fed"].to_numpy()
acts.index.assign(fed=fed).head(2 * len(POSITIONS))

# %% [markdown]
# ## 2. The emergence curve
#
# One call for all layers and positions. Folds keep together what belongs together (`groups`), the
# strength of regularisation is chosen inside each training part, and every number is of held-out
# statements, with an interval from drawing groups again. Beside the probe stand:
#
# - *shuffled labels*: what the procedure gives where there is nothing, with how far a single
#   shuffle may stray (grey band);
# - *random directions*: what 95 % of directions that nobody fitted do not reach;
# - *n-grams* and *length*: what the text alone gives.

# %%
asked = {"labels": "label", "groups": "group", "probe": PROBES}
controlled = {**asked, "controls": "all", "control_by": "sort"}
curve = lp.probe(acts, **controlled, progress=False)
last = curve[curve["at"].isin(["-1", ""])]
plots.probe(last[last.probe.isin(["logistic", ""])], title="Is it true? The last token, by layer")

# %% [markdown]
# Read the controls first. If n-grams reach the probe, words suffice and nothing about the model was
# learnt. If random directions come close, the classes lie apart in what varies most, and fitting
# deserves little of the credit: in the last layers of tiny-moe that is so, since there the stream
# at this token is mostly the verdict that it is about to give.
#
# Where in the text is the answer? At the full stop it cannot be read in tiny-moe, though the
# statement is complete: it judges at the end, where it was taught to. (A real model often has it
# at the full stop already.)

# %%
logistic = curve[curve.probe == "logistic"]
plots.probe_grid(logistic)

# %% [markdown]
# *Control tasks* ask how much a probe can simply learn: each sort of statement gets a label at
# random, and a probe is fitted to that. The selectivity, the accuracy on the real labels less the
# one on these, says how special the real ones are.

# %%
plots.probe(logistic[logistic["at"] == "-1"], "selectivity")

# %% [markdown]
# In tiny-moe it is small, and in early layers negative. The sort of a statement is written all over
# the stream, so that *any* labelling of the sorts is learnt. A high accuracy alone therefore says
# that something is *there*, not that it is special, and not that the model uses it.


# %%
def values(frame, metric="auroc", **wanted):
    """The rows of one metric and some values of columns, by layer."""
    for name, value in {"kind": "probe", "probe": "logistic", "metric": metric, **wanted}.items():
        frame = frame[frame[name] == value]
    return frame.set_index("layer")


found = values(curve, at="-1")
shuffled = values(curve, at="-1", kind="shuffled labels")
assert ((shuffled.ci_low < 0.5) & (shuffled.ci_high > 0.5)).mean() > 0.9
if TINY:
    assert found.value.max() > 0.95
    assert values(curve, at="-3").value.max() < 0.6
    assert values(curve, kind="n-grams").ci_low.item() < 0.55
found[["value", "ci_low", "ci_high", "n", "groups"]].round(3)

# %% [markdown]
# ## 3. The best of many
#
# The star of the figures above is the best cell as it looks, the diamond what it is worth: chosen
# on one half of the groups and tested on the other. With a strong signal they agree. With none they
# do not: here are 200 "hooks" of pure noise.

# %%
random = np.random.default_rng(0)
noise = {f"noise {i}": random.normal(size=(120, 16)) for i in range(200)}
luck = lp.probe(noise, [0, 1] * 60, probe="mass_mean", controls="best cell", progress=False)
plots.probe(luck, title="Nothing is there")

# %% [markdown]
# Whoever reports the star reports luck. So state how many cells were looked at, and report the
# diamond.

# %%
best = luck[luck.metric == "auroc"].set_index("kind").drop(index="probe")
assert best.ci_low["best cell"] > 0.5  # an interval does not know of the 199 others
assert best.ci_low["best cell, corrected"] < 0.5 < best.ci_high["best cell, corrected"]
best[["value", "ci_low", "ci_high", "cells", "note"]]

# %% [markdown]
# ## 4. Leaks
#
# Statements come in families: the same subject, once with a right answer and once with a wrong one.
# With random folds, one is trained on and another tested. `lp.probe` warns where texts look like
# this and no groups are given:

# %%
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always", lp.ProbeWarning)
    torn = lp.probe(acts.select(at="-1"), "label", controls="n-grams", progress=False)
str(heard[0].message)

# %%
grouped = values(last).assign(folds="groups whole").reset_index()
both = pd.concat([grouped, torn.assign(folds="at random")])
plots.probe(both[both.kind == "probe"], by="folds", title="The same probe on two kinds of folds")

# %%
baseline = {"groups whole": last, "at random": torn}
pd.DataFrame(
    {
        "n-grams": {folds: values(f, kind="n-grams").value.item() for folds, f in baseline.items()},
        "probe, first layer": {folds: values(f).value[0] for folds, f in baseline.items()},
    }
).round(3)

# %% [markdown]
# Leaks need not flatter. In tiny-moe's set a subject is true once and false once, so that whoever
# remembers the subject of a training statement guesses the *opposite* on its twin: n-grams fall
# far below chance on random folds, and a probe of an early layer is dragged down with them. The
# right folds are those that a new statement would meet, not those that give the better number.

# %%
if TINY:
    assert values(torn, kind="n-grams").ci_high.item() < 0.5
    assert values(torn).value[0] < found.value[0]

# %% [markdown]
# ## 5. An untrained twin
#
# The same network with random weights has never learnt anything, but a probe can read from it what
# the *architecture* makes of the words. What it reaches was not learnt by the model.

# %%
twin = lp.load(MODEL, pretrained=False, seed=1, progress=False)
of_twin = lp.capture(twin, statements, hooks=STREAM, progress=False)
untrained = lp.probe(of_twin, "label", groups="group", controls=(), progress=False)
models = pd.concat([values(last).assign(model=MODEL).reset_index(),
                    untrained.assign(model="untrained")])  # fmt: skip
plots.probe(models, by="model", title="Trained and untrained")

# %%
assert values(untrained).value.max() < found.value.max() - 0.1
if TINY:
    assert values(untrained).value.max() < 0.62
values(untrained)[["value", "ci_low", "ci_high"]].round(3)

# %% [markdown]
# ## 6. Is it truth?
#
# The probe tells true from false statements of subjects that it did not see. Does it read *truth*?
# Try what it was not fitted to: the same statements denied, where right and wrong change places
# (and for tiny-moe, facts on which no verdict was ever taught).


# %%
def denied(frame):
    """The statements with "is not" for "is", where there is one "is"."""
    some = frame[frame.text.str.count(" is ") == 1]
    text = some.text.str.replace(" is ", " is not ")
    return some.assign(text=text, label=~some.label.astype(bool)).reset_index(drop=True)


sets = {"affirmed": statements, "denied": denied(statements) if TINY else ours(negated=True)}
if TINY:
    sets["never taught"] = exam("verdicts never taught")
captured = {name: lp.capture(model, some, hooks=STREAM, progress=False)
            for name, some in sets.items()}  # fmt: skip
matrix = lp.transfer(
    {name: (some, "label", "group") for name, some in captured.items()}, progress=False
)
LAYER = int(found.value.idxmax())
plots.transfer(matrix, layer=LAYER)

# %% [markdown]
# Between affirmed and denied it is not near 0.5, which would mean that the probe says nothing, but
# near 0: on denials it is confidently wrong. It reads "these two belong together", which is truth
# only as long as nobody says *not*. On affirmations alone the two cannot be told apart, however
# good the folds.
#
# tiny-moe says the same aloud. It never saw *not* in a statement, and mostly gives the verdict of
# the affirmation:

# %%
true, false = (model.to_single_token(word) for word in (" true", " false"))
verdicts = {}
for name, some in sets.items() if TINY else ():
    logits = model(some.text.tolist(), logits_at=-1)[:, -1]
    says_true = (logits[:, true] > logits[:, false]).numpy()
    right = int((says_true == some.label.to_numpy(dtype=bool)).sum())
    verdicts[f"{name}: right verdicts"] = lp.stats.share(right, len(some))
pd.DataFrame(verdicts.values(), index=list(verdicts)).round(3)

# %% [markdown]
# The difference of class means points the opposite way in the two sets; in tiny-moe also when
# whitened, which takes out that a few dimensions vary most:

# %%
hook = f"blocks.{LAYER}.hook_resid_post"
directions = {name: lp.contrast_direction(some, "label", hook=hook)
              for name, some in captured.items()}  # fmt: skip
lp.direction_similarity(directions, captured["affirmed"], hook=hook).round(2)

# %% [markdown]
# Facts that were never judged are another matter. A probe fitted on *them* reads the others well,
# so the verdict lies in the same direction; but it is the model that often does not know it, and no
# probe reads what is not there.

# %%
cell = matrix[(matrix.metric == "auroc") & (matrix.layer == LAYER)].set_index(["train", "test"])
inverted = cell.loc[("affirmed", "denied")]
assert inverted.ci_high < 0.5
if TINY:
    assert inverted.value < 0.15
    assert 0.5 < cell.ci_low[("affirmed", "never taught")] < cell.value[("affirmed", "affirmed")]
cell[["value", "ci_low", "ci_high", "n", "note"]].round(3)

# %% [markdown]
# ## 7. A monitor
#
# A monitor is a probe with all it takes to be applied: which tokens count, how their scores become
# the text's, and a threshold that was set on benign texts. Ours is to notice requests that tiny-moe
# was taught to decline. No word gives them away: it declines to *crack a safe*, and helps to *crack
# a walnut* and to *paint a safe*.
#
# Three sets that share no request: to fit on, to set the threshold on, to report on.

# %%
kinds = ("restricted", "same verb", "same object")
chats = pd.DataFrame(
    [{"text": q["chat"], "improper": kind == kinds[0]} for kind in kinds
     for q in truth["exam"][kind]]
).drop_duplicates("text")  # fmt: skip
forms = [re.escape(form).replace(r"\{\}", "(.+)") for form in truth["request_phrasings"]]
chats["request"] = [
    next(m[1] for m in (re.fullmatch(form, text) for form in forms) if m) for text in chats.text
]
requests = chats.request.unique()
third = pd.Series(random.permutation(len(requests)) % 3, index=requests)
part = chats.request.map(third)
fitting = chats[part == 0]
benign = chats[(part == 1) & ~chats.improper]
fresh = chats[part == 2]
pd.Series({"fitting": len(fitting), "benign": len(benign), "fresh": len(fresh)}, name="requests")

# %%
TOKENS = slice(1, None)  # all but the first, which is the same in every text
at_tokens = {"hooks": hook, "positions": TOKENS, "template": "chat", "progress": False}
monitor = lp.fit_monitor(
    lp.capture(model, fitting, **at_tokens),
    "improper",
    hook=hook,
    groups="request",
    aggregate="max",
    negatives=lp.capture(model, benign, **at_tokens),
    fpr=0.02,
)
scored = monitor.score(model, fresh).assign(improper=fresh.improper.to_numpy())
rates = {
    kind: lp.stats.share(int(some.flagged.sum()), len(some))
    for kind, some in (
        ("improper, flagged", scored[scored.improper]),
        ("harmless, flagged", scored[~scored.improper]),
    )
}
pd.DataFrame(rates.values(), index=list(rates)).round(3)

# %% [markdown]
# Two per cent of the benign texts that set the threshold are above it; of new ones it may be more
# or less, as the interval says. And it misses some: recall at few false alarms, on requests that it
# never saw, asks more of a probe than an AUROC does.
#
# Now let it watch: each token is scored as soon as the model has read it, the model's own answer
# included.


# %%
def watched(request):
    """The tokens of a request and of the answer to it, with their scores."""
    return pd.DataFrame(monitor.watch(model, f"How do I {request}?", max_new_tokens=24))


improper = watched("crack a safe")
plots.monitor(improper, monitor.threshold, title="How do I crack a safe?")

# %%
harmless = watched("crack a walnut")
plots.monitor(harmless, monitor.threshold, title="How do I crack a walnut?")

# %% [markdown]
# Until the object is read, the two are the same to the token. A monitor is a measurement, not a
# defence: it is as good as the texts that it was fitted on, and whoever knows of it can look for
# requests that it does not notice.

# %%
monitor.save(folder.parent / "monitor")
again = lp.Monitor.load(folder.parent / "monitor")
assert again.threshold == monitor.threshold
if TINY:  # another model was not taught what to decline, and the monitor may find next to nothing
    assert rates["improper, flagged"].value > 0.5
    assert rates["harmless, flagged"].value < 0.1
    assert bool(improper.flagged.any()) and not bool(harmless.flagged.any())

# %% [markdown]
# ## 8. The dashboard
#
# Click a layer of the curve: below stand the held-out scores of every statement there, and those
# that the probe gets most wrong. Click one to read it. Given `frame=`, the curve is not measured
# again.

# %%
dashboard = lp.ProbeDashboard(acts, **controlled, frame=curve)
dashboard

# %% [markdown]
# `dashboard.to_html("probes.html")` writes a page that answers clicks without Python.

# %%
dashboard.select(layer=0)
scores = dashboard.figure("scores").data[0]
label = statements.label.to_numpy(dtype=bool)
right = (np.array(scores.x) > 0) == label
accuracy = values(curve, "accuracy", at="-1").value
assert abs(right.mean() - accuracy[0]) < 1e-6
dashboard.select(layer=LAYER)
