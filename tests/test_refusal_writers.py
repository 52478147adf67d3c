"""Who writes a direction: exact sums, their intervals, and what cannot be asked."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import llama_probe as lp
from llama_probe import stats
from llama_probe.errors import InputError
from llama_probe.hooks import HookPoint, act_name
from llama_probe.model.llama import Llama
from llama_probe.probing.direction import Direction
from llama_probe.refusal import decompose
from llama_probe.refusal.writers import resampled_means, who_writes, writes_of
from tests.conftest import unchecked
from tests.tiny import FAMILIES, make, tokens

FINAL = "blocks.{}.hook_resid_post"
KEY = ["component", "layer", "head", "expert"]


TEXTS = ["When Mary and John went out", "Mary", "12+30=42;"]


def reader(family: str, tokenizer: Any) -> Llama:
    """A tiny model that reads texts, which it pads on the left."""
    model = make(family, vocab_size=tokenizer.vocab_size)
    model.tokenizer = tokenizer
    return model


def listening(model: Llama) -> list[str]:
    return [name for name, point in model.hook_dict.items() if point.listening]


# One prompt at a time by the plain hooks, among them hook_result: what all else is compared with


def by_hand(model: Llama, row: Tensor, unit: Tensor) -> Iterator[tuple[tuple[Any, ...], float]]:
    """(component, layer, head, expert) and value of all that is written, at the last token."""
    with torch.no_grad():
        _, cache = model.run_with_cache(row[None], names_filter=lambda name: "pattern" not in name)

    def along(*name: Any) -> Tensor:
        return cache[name][0, -1].double() @ unit

    yield ("embedding", -1, -1, -1), along("hook_embed").item()
    for layer, block in enumerate(model.blocks):
        for head, value in enumerate(along("result", layer).tolist()):
            yield ("head", layer, head, -1), value
        if model.cfg.o_bias:
            yield ("attention bias", layer, -1, -1), (block.attn.b_O.double() @ unit).item()
        if model.cfg.moe_layers[layer]:
            chosen = cache["expert_indices", layer][0, -1].tolist()
            for expert, value in zip(chosen, along("expert_out", layer).tolist(), strict=True):
                yield ("expert", layer, -1, expert), value
            if block.mlp.shared is not None:
                yield ("shared expert", layer, -1, -1), along("shared_out", layer).item()
        else:
            bias = (block.mlp.b_out.double() @ unit).item()
            yield ("mlp", layer, -1, -1), along("mlp_out", layer).item() - bias
            if model.cfg.mlp_bias:
                yield ("mlp bias", layer, -1, -1), bias


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_is_what_its_hook_says_and_all_sum_to_the_projection(
    family: str, tiny_tokenizer: Any
) -> None:
    model, direction = reader(family, tiny_tokenizer), torch.randn(64)
    unit = direction.double() / direction.double().norm()
    at = FINAL.format(model.cfg.n_layers - 1)
    frame = writes_of(model, TEXTS, direction, at=at)
    assert frame.attrs["error"] < 1e-5
    for prompt, text in enumerate(TEXTS):
        alone = model.to_tokens(text)[0]
        with unchecked(), torch.no_grad():
            total = model(alone[None], stop_at_layer=model.cfg.n_layers)[0, -1].double() @ unit
            expected = dict(by_hand(model, alone, unit))
        mine = frame[frame["prompt"] == prompt]
        size = mine["value"].abs().sum()
        found = dict(zip(mine[KEY].itertuples(index=False, name=None), mine["value"], strict=True))
        assert found.keys() == expected.keys()
        assert all(abs(found[key] - expected[key]) < 1e-5 * size for key in expected)
        assert np.allclose(mine["total"], total, rtol=0, atol=1e-5 * size)
        assert abs(mine["value"].sum() - total) < 1e-4 * size
        # Leaving out any of those that write much is seen.
        largest = mine[mine["component"].isin(["head", "expert"])]["value"].abs().max()
        assert largest > 1e-2 * size


def test_a_part_that_is_left_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each head, and each expert, in turn."""
    model = make("mixtral")
    at, unit = "blocks.1.hook_resid_pre", torch.randn(64)
    honest, n, lost = decompose._shares, 1 + 8 + 6, [False]
    for part in range(1, n):

        def lacking(sources: Any, tensors: Any, part: int = part) -> Any:
            shares = honest(sources, tensors)
            lost[:] = [not np.isnan(shares[:, part]).all()]
            shares[:, part] = np.nan
            return shares

        monkeypatch.setattr(decompose, "_shares", lacking)
        try:
            writes_of(model, tokens(2, 9), unit, at=at)
        except InputError as error:
            assert "sums to" in str(error) and lost == [True]
        else:
            assert lost == [False] and part > 8  # an expert that serves neither


def test_the_place_says_which_layers_count() -> None:
    model, direction = make("llama-biased"), torch.randn(64)
    expected = {
        "blocks.0.hook_resid_pre": {"embedding"},
        "blocks.0.hook_resid_mid": {"embedding", "head", "attention bias"},
        "blocks.0.hook_resid_post": {"embedding", "head", "attention bias", "mlp", "mlp bias"},
    }
    for at, components in expected.items():
        frame = who_writes(model, tokens(2, 9), direction, at=at)
        assert set(frame["component"]) == components and set(frame["layer"]) <= {-1, 0}
    later = who_writes(model, tokens(2, 9), direction, at="blocks.1.hook_resid_pre")
    pd.testing.assert_frame_equal(later, frame)
    # The direction's own hook, and its length does not matter.
    own = Direction(3 * direction.double(), "blocks.1.hook_resid_pre", 1, "-1", {})
    pd.testing.assert_frame_equal(who_writes(model, tokens(2, 9), own), later)


@pytest.mark.parametrize("family", ["llama-biased", "llama4-scout"])
def test_at_the_end_it_agrees_with_the_attribution_of_a_logit(family: str) -> None:
    model, row, answer = make(family), tokens(1, 12), 7
    _, cache = model.run_with_cache(row, names_filter="ln_final.hook_scale")
    scale = cache["ln_final.hook_scale"][0, -1]
    direction = (model.unembed.weight[answer] * model.ln_final.weight / scale).detach()
    last = model.cfg.n_layers - 1
    frame = writes_of(model, row, direction, at=FINAL.format(last)).set_index(KEY)["value"]
    frame *= float(direction.norm())
    moe = model.cfg.moe is not None
    logits = lp.direct_logit_attribution(model, row, answer, experts=moe)
    for kind, component in (("embed", "embedding"), ("head", "head"), ("expert", "expert")):
        theirs = logits[logits["kind"] == kind]["value"].sort_values()
        mine = frame[frame.index.get_level_values("component") == component].sort_values()
        assert np.allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    assert abs(frame.sum() - logits["value"].sum()) < 1e-3


def test_edits_in_place_are_seen_or_refused() -> None:
    model, direction, at = make("llama-gqa"), torch.randn(64), "blocks.1.hook_resid_pre"

    def silent(z: Tensor, hook: HookPoint) -> Tensor:
        return torch.zeros_like(z)

    with model.hooks([(act_name("z", 0), silent)]):
        frame = who_writes(model, tokens(2, 9), direction, at=at)
    assert not frame[frame["component"] == "head"][["value", "ci_low", "ci_high"]].any(axis=None)
    for name in ("blocks.0.hook_attn_out", "blocks.0.hook_resid_mid"):
        edit = [(name, lambda tensor, hook: 0.9 * tensor)]
        with model.hooks(edit), pytest.raises(InputError, match="an edit that is in place"):
            who_writes(model, tokens(2, 9), direction, at=at)
    assert not listening(model)


def test_half_precision_sums_within_its_own_rounding() -> None:
    model = make("llama4-scout").to(torch.bfloat16)
    frame = writes_of(model, tokens(4, 20), torch.randn(64), at=FINAL.format(3))
    assert 1e-5 < frame.attrs["error"] < 1e-2


# The summary


def test_a_mean_has_its_interval_and_counts_an_absent_expert_as_nothing() -> None:
    model, direction, at = make("mixtral"), torch.randn(64), "blocks.2.hook_resid_pre"
    rows = tokens(20, 9)
    frame, raw = (f(model, rows, direction, at=at) for f in (who_writes, writes_of))
    sums = raw.groupby(KEY)["value"].sum()
    assert set(sums.index) == set(frame[KEY].itertuples(index=False, name=None))
    assert np.allclose(frame.set_index(KEY)["value"].sort_index() * 20, sums.sort_index())
    experts = raw[raw["component"] == "expert"].groupby(["prompt", "layer"])["expert"]
    assert (experts.nunique() == 2).all() and len(experts) == 20 * 2
    assert frame["value"].sum() == pytest.approx(frame.attrs["total"], rel=1e-4)
    assert (frame["n"] == 20).all()
    one = raw[(raw["layer"] == 1) & (raw["head"] == 3)]["value"].to_numpy()
    mine = frame[(frame["layer"] == 1) & (frame["head"] == 3)].iloc[0]
    theirs = stats.mean(one)
    width = theirs.ci_high - theirs.ci_low
    assert [mine["ci_low"], mine["ci_high"]] == pytest.approx(theirs[1:3], abs=0.05 * width)
    pd.testing.assert_frame_equal(frame, who_writes(model, rows, direction, at=at))
    lone = who_writes(model, rows[:1], direction, at=at)
    assert lone["ci_low"].isna().all() and len(lone) < len(frame)


def test_resampled_means_spread_as_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=(200, 3)) * [1.0, 5.0, 0.0]
    spread = resampled_means(values, np.random.default_rng(1)).std(axis=0)
    assert spread == pytest.approx(values.std(axis=0) / np.sqrt(200), rel=0.06)


class Exam(NamedTuple):
    """Restricted requests of tiny-moe beside harmless ones with the same verbs."""

    model: Llama
    prompts: pd.DataFrame
    acts: Any


@pytest.fixture(scope="module")
def exam() -> Exam:
    model, sets = lp.load("tiny-moe"), lp.prompts.planted()["exam"]
    texts = {name: [row["chat"] for row in sets[name][:60]] for name in ("restricted", "same verb")}
    prompts = pd.DataFrame(
        [(text, name == "restricted") for name, some in texts.items() for text in some],
        columns=["text", "restricted"],
    )
    hooks = ["blocks.[23].hook_resid_pre", "blocks.[01].mlp.hook_expert_indices"]
    acts = lp.capture(model, prompts, hooks=hooks, template="chat", progress=False)
    return Exam(model, prompts, acts)


def writers(exam: Exam, layer: int, labels: Any, **options: Any) -> pd.DataFrame:
    hook = f"blocks.{layer}.hook_resid_pre"
    direction = lp.contrast_direction(exam.acts, "restricted", hook=hook)
    return who_writes(
        exam.model, exam.prompts, direction, template="chat", labels=labels, **options
    )


@pytest.mark.parametrize("layer", [2, 3])
def test_the_differences_sum_to_the_length_of_the_difference_of_means(
    exam: Exam, layer: int
) -> None:
    """Its projection on itself is its length: known without this function."""
    frame = writers(exam, layer, "restricted")
    hook = f"blocks.{layer}.hook_resid_pre"
    norm = lp.contrast_direction(exam.acts, "restricted", hook=hook).norm
    assert frame["value"].sum() == pytest.approx(norm, rel=1e-5)
    assert frame.attrs["total"] == pytest.approx(norm, rel=1e-5)
    assert (frame.attrs["first"], frame.attrs["second"]) == ("False", "True")
    assert np.allclose(frame["second"] - frame["first"], frame["value"])
    assert ((frame["ci_low"] <= frame["value"]) & (frame["value"] <= frame["ci_high"])).all()
    # One expert of the layer before serves the refusals, and writes much of it.
    experts = frame[(frame["component"] == "expert") & (frame["layer"] == layer - 1)]
    planted = experts.loc[experts["value"].idxmax()]
    assert planted["ci_low"] > 0.25 * norm
    with unchecked():
        flipped = writers(exam, layer, ~exam.prompts["restricted"])
    assert np.allclose(flipped["value"], -frame["value"])


def test_shuffled_labels_find_no_writer(exam: Exam) -> None:
    random, covered = np.random.default_rng(0), []
    with unchecked():
        for _ in range(4):
            frame = writers(exam, 3, random.permutation(exam.prompts["restricted"]))
            covered += ((frame["ci_low"] <= 0) & (frame["ci_high"] >= 0)).tolist()
        true = writers(exam, 3, "restricted")
    assert np.mean(covered) > 0.85
    assert ((true["ci_low"] <= 0) & (true["ci_high"] >= 0)).mean() < 0.4


def test_an_expert_that_serves_no_prompt_has_no_row(exam: Exam) -> None:
    frame = writers(exam, 2, None)
    for layer in (0, 1):
        served = exam.acts[act_name("expert_indices", layer)].unique().tolist()
        rows = frame[(frame["component"] == "expert") & (frame["layer"] == layer)]
        assert rows["expert"].tolist() == served and len(served) < 8


def test_positions_are_those_of_capture_and_progress_is_told(exam: Exam) -> None:
    told: list[tuple[int, int]] = []
    hook, position = "blocks.2.hook_resid_pre", "last of the instruction"
    acts = lp.capture(exam.model, exam.prompts, hook, position, template="chat", progress=False)
    direction = lp.contrast_direction(acts, "restricted")
    raw = writes_of(
        exam.model,
        exam.prompts,
        direction,
        position=position,
        template="chat",
        progress=lambda *done: told.append(done),
    )
    projections = acts[hook].double() @ direction.unit
    assert np.allclose(raw.groupby("prompt")["value"].sum(), projections, rtol=1e-4, atol=1e-3)
    assert told[-1] == (120, 120)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"at": None}, "at is None and the direction says no hook"),
        ({"at": "blocks.1.hook_mlp_out"}, "'blocks.1.hook_mlp_out' is no place in the residual"),
        (
            {"at": "blocks.3.hook_resid_pre"},
            "these are blocks.0.hook_resid_pre to blocks.2.hook_resid_post",
        ),
        ({"direction": torch.randn(63)}, r"the direction has shape \(63,\)"),
        ({"direction": torch.randn(2, 64)}, r"the direction has shape \(2, 64\)"),
        ({"direction": torch.zeros(64)}, "the direction is 0"),
        ({"position": 9}, "prompt 0 has 9 tokens"),
        ({"position": "all"}, "which names several tokens"),
        ({"template": "chat"}, "template goes with texts"),
        ({"labels": [0, 1]}, "labels have shape .2,., but there are 3 prompts"),
        ({"labels": [0, 1, 2]}, "two classes are compared, but the labels have 3"),
        ({"labels": "kind"}, "the prompts have no column 'kind'"),
        ({"labels": [1, 1, 1]}, "all 3 labels are 1"),
    ],
)
def test_what_cannot_be_used_is_named(changes: dict[str, Any], message: str) -> None:
    given = {"prompts": tokens(3, 9), "direction": torch.randn(64), "at": FINAL.format(0)}
    with pytest.raises(InputError, match=message):
        who_writes(make("llama-gqa"), **{**given, **changes})
