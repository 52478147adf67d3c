"""What changed between two checkpoints: the mark of directional editing, and what lacks it."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import llama_probe as lp
from llama_probe.errors import InputError
from llama_probe.model.llama import Llama
from llama_probe.probing.direction import contrast_direction
from llama_probe.refusal.changes import mark_of_editing, weight_changes
from llama_probe.refusal.direction_change import direction_change
from tests.tiny import make, randomise, tiny_config

WRITERS = ("embedding", "attention", "mlp", "expert", "shared expert")


def edited(model: Llama, change: Callable[[str, Tensor], Tensor], only: str = "") -> Llama:
    """A copy, untied, whose matrices and biases are changed where the name has `only`."""
    twin = copy.deepcopy(model)
    twin.unembed.weight = nn.Parameter(twin.unembed.weight.detach().clone())
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            if only in name:
                weight.copy_(change(name, weight))
    return twin


def without(direction: Tensor) -> Callable[[str, Tensor], Tensor]:
    """Orthogonalisation by hand, of what writes into the stream."""
    r = direction / direction.norm()

    def change(name: str, weight: Tensor) -> Tensor:
        if "embed.weight" in name and "unembed" not in name:
            return weight - (weight @ r)[:, None] * r
        if "experts_out" in name:
            return weight - r[:, None] * (r @ weight)[:, None]
        if any(f"{part}.weight" in name for part in ("attn.o", "down")):
            return weight - r[:, None] * (r @ weight)
        if any(f"{part}.bias" in name for part in ("attn.o", "down")):
            return weight - r * (r @ weight)
        return weight

    return change


def low_rank(name: str, weight: Tensor) -> Tensor:
    """What an adapter of rank 8 on all linears does."""
    if weight.ndim < 2 or "embed" in name:
        return weight
    up = torch.randn(*weight.shape[:-1], 8)
    return weight + 0.02 * up @ torch.randn(*weight.shape[:-2], 8, weight.shape[-1])


def noise(name: str, weight: Tensor) -> Tensor:
    return weight + 0.01 * torch.randn(weight.shape)


@pytest.fixture(scope="module")
def tiny_moe() -> Llama:
    return lp.load("tiny-moe", device="cpu", progress=False)


@pytest.fixture(scope="module")
def biased() -> Llama:
    model = Llama(tiny_config(d_model=32, o_bias=True, mlp_bias=True))
    randomise(model)
    return model


@pytest.mark.parametrize("name", ["tiny_moe", "biased"])
def test_an_orthogonalised_copy_is_recognised_with_and_without_the_direction(
    name: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    r = torch.randn(model.cfg.d_model)
    twin = edited(model, without(r))
    frame = weight_changes(twin, model, r)
    writers, others = frame[frame.site.isin(WRITERS)], frame[~frame.site.isin(WRITERS)]
    assert (writers.share > 1 - 1e-6).all() and (writers.rank1_share > 1 - 1e-6).all()
    assert (writers.writes < 1e-6).all() and (writers.writes_against > 1e-2).all()
    assert np.allclose(writers.change, writers.writes_against, rtol=1e-4)
    assert (others.change == 0).all() and others.share.isna().all()
    mark = mark_of_editing(twin, model)
    assert mark.verdict == "a single direction was removed from all writers"
    assert mark.removed == mark.changed == mark.writers == len(writers)
    assert mark.share > 1 - 1e-6 and mark.expected < 0.9
    assert mark.direction is not None
    assert abs(mark.direction @ (r / r.norm()).double()) == pytest.approx(1, abs=1e-6)
    # By another direction than the right one little is to be seen.
    assert weight_changes(twin, model, torch.randn(len(r))).share.max() < 0.5


@pytest.mark.parametrize("change", [low_rank, noise])
def test_adapters_and_training_do_not_carry_the_mark(
    tiny_moe: Llama, change: Callable[[str, Tensor], Tensor]
) -> None:
    twin, d = edited(tiny_moe, change), tiny_moe.cfg.d_model
    mark = mark_of_editing(twin, tiny_moe)
    assert (mark.verdict, mark.removed) == ("no common direction", 0)
    assert mark.share < 0.1
    assert mark.expected == pytest.approx(mark.share, rel=0.5)
    frame = weight_changes(twin, tiny_moe, torch.randn(d))
    writers = frame[frame.site.isin(WRITERS) & (frame.change > 0)]
    assert writers.share.mean() == pytest.approx(1 / d, rel=0.5)
    assert np.allclose(writers.writes, writers.writes_against, atol=0.08)
    rank1 = writers.rank1_share
    assert (rank1.between(1 / 8, 0.4) if change is low_rank else rank1 < 0.1).all()


def test_an_edit_that_leaves_the_embedding_out_and_one_that_removes_nothing(
    tiny_moe: Llama,
) -> None:
    r = torch.randn(tiny_moe.cfg.d_model)
    mark = mark_of_editing(edited(tiny_moe, without(r), only="blocks"), tiny_moe)
    assert mark.verdict == "a single direction was removed from 40 of 41 writers"
    assert (mark.removed, mark.changed, mark.writers) == (40, 40, 41)

    def half(name: str, weight: Tensor) -> Tensor:
        return (weight + without(r)(name, weight)) / 2

    mark = mark_of_editing(edited(tiny_moe, half), tiny_moe)
    assert mark.verdict == "the changes share one direction, but no writer lost it"
    assert mark_of_editing(edited(tiny_moe, noise, only="attn.q"), tiny_moe).verdict == (
        "no writer was changed"
    )


def test_the_mark_survives_rounding_to_bfloat16(tiny_moe: Llama) -> None:
    base = edited(tiny_moe, lambda _, weight: weight.bfloat16())
    twin = edited(edited(base, without(torch.randn(128))), lambda _, weight: weight.bfloat16())
    assert mark_of_editing(twin, base).verdict == "a single direction was removed from all writers"


def test_a_subspace_and_two_directions_of_layers_of_their_own(biased: Llama) -> None:
    first, second = torch.eye(32)[0], torch.eye(32)[5]
    twin = edited(edited(biased, without(first)), without(second))
    frame = weight_changes(twin, biased, torch.stack([first, 3 * first + second]))
    assert (frame.share[frame.site.isin(WRITERS)] > 1 - 1e-6).all()
    apart = edited(edited(biased, without(first), only="blocks.0"), without(second), "blocks.1")
    assert mark_of_editing(apart, biased).verdict == "no common direction"
    frame = weight_changes(apart, biased, first)
    assert (frame.rank1_share.dropna() > 1 - 1e-6).all()


def test_one_touched_matrix_is_the_only_one_reported(tiny_moe: Llama) -> None:
    frame = weight_changes(
        edited(tiny_moe, lambda _, w: 1.5 * w, "2.attn.v"), tiny_moe, [1.0] * 128
    )
    touched = frame[frame.change > 0]
    assert touched[["weight", "layer", "site"]].values.tolist() == [["blocks.2.attn.v", 2, "value"]]
    assert touched.change.item() == pytest.approx(0.5)
    assert set(frame.note) == {"", "unchanged"}


@pytest.mark.parametrize(
    "family", ["llama-tied", "llama-biased", "qwen2", "qwen2-moe", "qwen3-moe", "llama4-maverick"]
)
def test_every_parameter_of_every_family_is_looked_at(family: str) -> None:
    model = make(family)
    twin = edited(model, lambda _, weight: weight * 2)
    frame = weight_changes(twin, model, torch.ones(64))
    assert np.allclose(frame.change, 1)
    experts = frame[frame.site == "expert"]
    moe = model.cfg.moe
    assert len(experts) == (sum(model.cfg.moe_layers) * moe.n_experts if moe else 0)


def test_other_shapes_and_directions_are_refused(biased: Llama, tiny_moe: Llama) -> None:
    with pytest.raises(InputError, match="compared weight by weight"):
        weight_changes(biased, tiny_moe, torch.ones(128))
    with pytest.raises(InputError, match="compared weight by weight"):
        mark_of_editing(Llama(tiny_config(d_model=32, n_layers=3)), biased)
    with pytest.raises(InputError, match="16 dimensions"):
        weight_changes(biased, biased, torch.ones(16))
    with pytest.raises(InputError, match="is 0"):
        weight_changes(biased, biased, torch.zeros(32))
    broken = edited(biased, lambda _, weight: weight * float("nan"), only="blocks.1.attn.o")
    with pytest.raises(InputError, match="blocks.1.attn.o has a value that is not finite"):
        mark_of_editing(broken, biased)


# Directions of activations


def shifted(seed: int, n: int = 200, d: int = 40, axis: int = 0, by: float = 2.0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, d))
    x[:, axis] += by * (np.arange(n) % 2)
    return x


def test_a_model_has_not_turned_from_itself_nor_from_a_scaled_copy() -> None:
    x, y = shifted(0), np.arange(200) % 2
    frame = direction_change({"blocks.1.hook_resid_pre": x}, {"blocks.1.hook_resid_pre": 3 * x}, y)
    row = frame.iloc[0]
    assert np.allclose([row.cosine, row.ci_low, row.ci_high], 1)
    direction = contrast_direction(x, y)
    assert row.norm_a == pytest.approx(direction.norm)
    assert row.norm_b == pytest.approx(3 * direction.norm)
    assert (row.hook, row.layer, row.n) == ("blocks.1.hook_resid_pre", 1, 200)
    assert row.halves == pytest.approx(row.halves_a) == pytest.approx(row.halves_b)
    # What noise allows: half the prompts each leave an error of 4 d / (n / 2) in the square.
    assert row.halves_a == pytest.approx(4 / (4 + 4 * 39 / 100), abs=0.1)


def test_one_direction_with_noise_of_its_own_and_two_directions() -> None:
    y = np.arange(200) % 2
    same = direction_change(shifted(0), shifted(1), y).iloc[0]
    assert same.ci_low < same.cosine < same.ci_high < 1
    assert same.cosine == pytest.approx(4 / (4 + 4 * 39 / 200), abs=0.1)
    assert same.halves == pytest.approx((same.halves_a * same.halves_b) ** 0.5, abs=0.1)
    apart = direction_change(shifted(0), shifted(1, axis=7), y).iloc[0]
    assert abs(apart.cosine) < 0.3 and abs(apart.halves) < 0.3 < apart.halves_a
    assert apart.ci_low < 0 < apart.ci_high


def test_the_interval_covers_what_other_prompts_give() -> None:
    y = np.arange(200) % 2
    cosines = [direction_change(shifted(2 * i), shifted(2 * i + 1), y).iloc[0] for i in range(30)]
    middle = np.mean([one.cosine for one in cosines])
    assert sum(one.ci_low <= middle <= one.ci_high for one in cosines) >= 25


def test_groups_are_drawn_together_and_seeds_repeat() -> None:
    y, pair = np.arange(200) % 2, np.repeat(np.arange(100), 2)
    frames = [
        direction_change(shifted(0), shifted(1), y, groups=groups, seed=seed)
        for groups, seed in ((None, 0), (None, 0), (pair, 0), (None, 1))
    ]
    assert frames[0].equals(frames[1])
    assert not frames[0].equals(frames[2]) and not frames[0].equals(frames[3])


def test_activations_that_do_not_belong_together_are_refused() -> None:
    x, y = shifted(0), np.arange(200) % 2
    with pytest.raises(InputError, match="same prompts"):
        direction_change(x, x[:100], y)
    with pytest.raises(InputError, match="differ in shape"):
        direction_change(x, x[:, :10], y)
    with pytest.raises(InputError, match="hooks differ"):
        direction_change({"a": x}, {"b": x}, y)
    with pytest.raises(InputError, match="two classes"):
        direction_change(x, x, np.arange(200) % 3)
