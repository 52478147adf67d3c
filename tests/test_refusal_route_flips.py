"""How many routes an edit flips: counts, and intervals whose unit is the prompt."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llama_probe import stats
from llama_probe.errors import HookNameError, InputError
from llama_probe.hooks import HookPoint, act_name
from llama_probe.interventions import Edit, force_experts
from llama_probe.model.llama import Llama
from llama_probe.refusal.route_flips import route_flips
from tests.tiny import make, tokens

TEXTS = ["When Mary and John went out", "Mary", "12+30=42;"]


def reader(family: str, tokenizer: Any) -> Llama:
    """A tiny model that reads texts, which it pads on the left."""
    model = make(family, vocab_size=tokenizer.vocab_size)
    model.tokenizer = tokenizer
    return model


def listening(model: Llama) -> list[str]:
    return [name for name, point in model.hook_dict.items() if point.listening]


def sets_of(model: Llama, row: Tensor, edit: Any, layer: int) -> list[set[int]]:
    """The experts of each token of one prompt, by the plain hook."""
    with torch.no_grad(), model.hooks(edit):
        _, cache = model.run_with_cache(row[None], names_filter="*.hook_expert_indices")
    return [set(experts) for experts in cache["expert_indices", layer][0].tolist()]


@pytest.mark.parametrize("family", ["mixtral", "llama4-top2", "qwen2-moe"])
def test_flips_are_counted_over_the_tokens_of_the_prompts(family: str, tiny_tokenizer: Any) -> None:
    model = reader(family, tiny_tokenizer)
    edit = force_experts({0: [2]}, positions=[-1, 0])
    frame = route_flips(model, TEXTS, edit).set_index("layer")
    alone = [model.to_tokens(text)[0] for text in TEXTS]
    n = sum(map(len, alone))
    assert frame.index.tolist() == [i for i, is_moe in enumerate(model.cfg.moe_layers) if is_moe]
    for layer, found in frame.iterrows():
        changed = [
            sum(
                before != after
                for before, after in zip(
                    sets_of(model, row, [], int(str(layer))),
                    sets_of(model, row, edit, int(str(layer))),
                    strict=True,
                )
            )
            for row in alone
        ]
        assert found["changed"] == sum(changed)
        assert found["n"] == n
        assert found["value"] == pytest.approx(sum(changed) / n)
    assert 0 < frame["changed"][0] <= 6  # at two tokens of three prompts
    assert frame.attrs["value"] == pytest.approx(frame["value"].mean())
    assert frame.attrs["prompts"] == 3


def test_what_leaves_the_sets_alone_flips_nothing(tiny_tokenizer: Any) -> None:
    model = reader("mixtral", tiny_tokenizer)
    same = Edit([("blocks.0.hook_resid_pre", lambda tensor, hook: tensor)])
    turned = Edit([("*.hook_expert_indices", lambda indices, hook: indices.flip(-1))])
    for edit in ([], same, turned):
        frame = route_flips(model, TEXTS, edit)
        assert not frame[["changed", "value", "ci_low", "ci_high"]].any(axis=None)
    assert not listening(model)


def test_the_interval_is_of_prompts_and_not_of_tokens() -> None:
    """All tokens of a prompt flip, or none: a few prompts say little, however long they are."""
    model = make("mixtral")
    flips = torch.zeros(8, 1, 1, dtype=torch.bool)
    flips[:4] = True

    def turn(indices: Tensor, hook: HookPoint) -> Tensor:
        others = (indices.amax(dim=-1, keepdim=True) + torch.tensor([1, 2])) % 6
        return torch.where(flips, others, indices)

    frame = route_flips(model, tokens(8, 40), [(act_name("expert_indices", 0), turn)]).iloc[0]
    assert frame["value"] == 0.5
    wilson = stats.share(160, 320)
    width = frame["ci_high"] - frame["ci_low"]
    assert width > 4 * (wilson.ci_high - wilson.ci_low)
    one = route_flips(model, tokens(1, 40), force_experts({0: [2]}))
    assert one[["ci_low", "ci_high"]].isna().all(axis=None)


def test_routes_need_experts_and_an_edit_that_runs() -> None:
    with pytest.raises(InputError, match="no layer of this model is a mixture of experts"):
        route_flips(make("llama-gqa"), tokens(1, 9), [])
    model = make("mixtral")
    with pytest.raises(HookNameError):
        route_flips(model, tokens(1, 9), [("nowhere", lambda tensor, hook: tensor)])
    with pytest.raises(InputError, match="names expert 9"):
        route_flips(model, tokens(1, 9), force_experts({0: [9]}))
    assert not listening(model)
