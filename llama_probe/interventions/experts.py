"""Edits of a mixture of experts: which experts a token is sent to, and what they contribute."""

import operator
from collections.abc import Iterable, Mapping
from functools import partial
from math import isfinite
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llama_probe.errors import InputError
from llama_probe.hooks import ActivationCache, HookPoint, act_name, reads_only
from llama_probe.interventions.edit import Edit, Pair
from llama_probe.interventions.positions import Places, places_of, where

Logits = Float[Tensor, "batch pos expert"]
Indices = Int[Tensor, "batch pos k"]
Weights = Float[Tensor, "batch pos k"]


def ablate_experts(
    experts: Any,
    how: str = "refill",
    *,
    renormalise: bool = False,
    positions: Any = None,
) -> Edit:
    """Take experts out, as in SAFEx (arXiv 2506.17368) and many after it.

    Args:
        experts: For each layer the experts: {layer: [expert, …]}.
        how: "refill": the router's logits of these experts become -inf, so that each token's next
            best experts take their places, and all weights are as if these experts did not exist.
            "zero": an expert stays chosen, but its weight becomes 0 and it adds nothing (nor does
            it in Llama 4, where the weight multiplies an expert's input: without biases, an expert
            of nothing is nothing).
        renormalise: With "zero", scale the weights of a token's other experts up so that their sum
            stays what it was: 1 in families that divide by the sum (Mixtral, Qwen 3). Where no
            other expert is left, nothing is scaled.
        positions: The tokens for which the experts are taken out; see the module.

    Raises:
        InputError: The experts or the positions are not as described; when run, a layer has no such
            expert, fewer than k are left, or another edit chooses an expert that is taken out.
        HookNameError: When run, a layer is no mixture of experts.

    >>> from llama_probe.model.config import LlamaConfig, MoeConfig
    >>> from llama_probe.model.llama import Llama
    >>> moe = MoeConfig(n_experts=4, top_k=2, d_expert=8, rule="softmax", renormalise=True)
    >>> cfg = LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50, moe=moe)
    >>> model, tokens = Llama(cfg), torch.tensor([[1, 2, 3]])
    >>> with model.hooks(ablate_experts({1: [0, 3]})):
    ...     _, run = model.run_with_cache(tokens, names_filter="*.hook_expert_indices")
    >>> run["expert_indices", 1].unique().tolist()
    [1, 2]
    """
    if how not in ("refill", "zero"):
        raise InputError(f"how is {how!r}, but should be 'refill' or 'zero'")
    if renormalise and how == "refill":
        raise InputError("renormalise goes with how='zero': with 'refill' the family's rule acts")
    named, places = _experts_of(experts), places_of(positions)
    pairs: list[Pair] = []
    for layer, gone in named.items():
        pairs.append(_check(layer, gone))
        if how == "refill":
            about = {"experts": gone, "places": places}
            refuse = reads_only(partial(_refuse_chosen, **about))
            pairs.append((act_name("router_logits", layer), partial(_remove, **about)))
            pairs.append((act_name("expert_weights", layer), refuse))
        else:
            silence = partial(_silence, experts=gone, places=places, renormalise=renormalise)
            pairs.append((act_name("expert_weights", layer), silence))
    options = {"how": how, **({"renormalise": True} if renormalise else {})}
    return Edit(pairs, [_said("ablate_experts", named, positions, **options)])


def force_experts(experts: Any, *, positions: Any = None) -> Edit:
    """Send tokens to experts of your choice.

    Each token takes the experts named; if they are fewer than its k, the router's best among the
    others fill the rest. The family's rule makes the weights of the router's own logits: an expert
    which the router does not want is chosen, but with little weight (where the rule divides by the
    sum: little beside the token's other experts). Join it with `bias_router` to raise the weight.

    Args:
        experts: For each layer the experts: {layer: [expert, …]}.
        positions: The tokens that are sent there; see the module.

    Raises:
        InputError: The experts or the positions are not as described; when run, a layer has no such
            expert, or a token takes fewer than are named.
        HookNameError: When run, a layer is no mixture of experts.

    >>> force_experts({0: [3], 2: [1, 5]}, positions=-1)
    force_experts({0: [3], 2: [1, 5]}, positions=-1)
    """
    named, places = _experts_of(experts), places_of(positions)
    pairs: list[Pair] = []
    for layer, chosen in named.items():
        force = partial(_force, experts=chosen, places=places)
        pairs += [_check(layer, chosen), (act_name("expert_indices", layer), force)]
    return Edit(pairs, [_said("force_experts", named, positions)])


def bias_router(amounts: Any, *, positions: Any = None) -> Edit:
    """Make a router like experts more, or less: add to its logits before anything is chosen.

    Args:
        amounts: For each layer what is added to which expert's logit: {layer: {expert: amount}}. A
            difference of d between two experts multiplies the ratio of their softmax probabilities
            by exp(d).
        positions: The tokens whose logits change; see the module.

    Raises:
        InputError: The amounts or the positions are not as described; when run, a layer has no such
            expert.
        HookNameError: When run, a layer is no mixture of experts.

    >>> bias_router({0: {3: 1.5, 4: -1.5}}, positions="new")
    bias_router({0: {3: 1.5, 4: -1.5}}, positions='new')
    """
    mapped = isinstance(amounts, Mapping)
    if not mapped or not all(isinstance(of_layer, Mapping) for of_layer in amounts.values()):
        raise InputError(f"amounts should be {{layer: {{expert: amount}}}}, not {amounts!r}")
    named, places = _experts_of(amounts), places_of(positions)
    finite = {
        layer: dict(zip(named[layer], map(_finite, of_layer.values()), strict=True))
        for layer, of_layer in zip(named, amounts.values(), strict=True)
    }
    pairs: list[Pair] = []
    for layer, of_layer in finite.items():
        bias = partial(_bias, amounts=of_layer, places=places)
        pairs += [_check(layer, of_layer), (act_name("router_logits", layer), bias)]
    return Edit(pairs, [_said("bias_router", finite, positions)])


def freeze_routes(
    run: ActivationCache | Mapping[str, Tensor],
    weights: str = "live",
    *,
    positions: Any = None,
) -> Edit:
    """Send tokens where they went in an earlier run, whatever else is edited.

    What another edit does with frozen routes is its own effect; what it does more without them is
    the effect of sending tokens to other experts.

    Args:
        run: The earlier run: a cache that has `hook_expert_indices` of the layers to freeze. (An
            unfiltered cache has them too, but comes from a run with eager attention, whose logits
            differ in their last digits.)
        weights: "live": the weights are made of this run's logits. "frozen": they are the earlier
            run's too (`hook_expert_weights`).
        positions: The tokens to send there; see the module. "prompt" freezes the reading of a
            prompt in `generate`; what is new has no earlier routes.

    Raises:
        InputError: The cache lacks what is needed; when run, the pass has another shape than the
            earlier run, or with frozen weights another edit changes the experts that they are of.

    >>> from llama_probe.model.config import LlamaConfig, MoeConfig
    >>> from llama_probe.model.llama import Llama
    >>> moe = MoeConfig(n_experts=4, top_k=2, d_expert=8, rule="softmax")
    >>> cfg = LlamaConfig(n_layers=2, d_model=16, n_heads=4, d_mlp=32, d_vocab=50, moe=moe)
    >>> model, tokens = Llama(cfg), torch.tensor([[1, 2, 3]])
    >>> logits, run = model.run_with_cache(tokens, names_filter="*.hook_expert_indices")
    >>> torch.equal(model.run_with_hooks(tokens, fwd_hooks=freeze_routes(run)), logits)
    True
    """
    if weights not in ("live", "frozen"):
        raise InputError(f"weights is {weights!r}, but should be 'live' or 'frozen'")
    places = places_of(positions)
    # Copies: what happens to the cache later is not to change the edit.
    kept = {name: tensor.detach().clone() for name, tensor in run.items() if _is_route(name)}
    names = [name for name in kept if name.endswith("hook_expert_indices")]
    if not names:
        raise InputError(
            "the run has no hook_expert_indices: run_with_cache(…, names_filter='*.hook_expert_*') "
            "of a mixture of experts keeps them"
        )
    pairs: list[Pair] = []
    for name in names:
        pairs.append((name, partial(_replay, values=kept[name], places=places)))
        if weights == "frozen":
            pairs += _frozen_weights(name, kept, places)
    first = f"<run of {len(names)} layers>"
    return Edit(pairs, [_said("freeze_routes", first, positions, weights=weights)])


def _is_route(name: str) -> bool:
    return name.endswith(("hook_expert_indices", "hook_expert_weights"))


def _frozen_weights(name: str, kept: dict[str, Tensor], places: Places) -> list[Pair]:
    of_weights = name.replace("hook_expert_indices", "hook_expert_weights")
    if of_weights not in kept:
        raise InputError(f"weights is 'frozen', but the run has no {of_weights}")
    values = {"values": kept[of_weights], "indices": kept[name]}
    replay = partial(_replay_weights, **values, places=places)
    return [(of_weights, replay)]


# Which layers, experts and positions are meant


def _experts_of(experts: Any) -> dict[int, tuple[int, ...]]:
    """The experts of each layer, whatever kinds of number and sequence they were."""
    if not isinstance(experts, Mapping) or not experts:
        raise InputError(f"experts should be {{layer: [expert, …]}}, not {experts!r}")
    named: dict[int, tuple[int, ...]] = {}
    for key, value in experts.items():
        layer = _number(key, "a layer")
        ids = [value] if not isinstance(value, Iterable) else value
        named[layer] = chosen = tuple(_number(expert, "an expert") for expert in ids)
        if not chosen:
            raise InputError(f"no experts are named at layer {layer}: leave the layer out")
        if len(set(chosen)) < len(chosen):
            raise InputError(f"experts {list(chosen)} at layer {layer} name one twice")
    return named


def _number(value: Any, what: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{value!r} is not {what}: both are numbers from 0") from None
    if number < 0:
        raise InputError(f"{number} is not {what}: an edit counts them from 0, never from the end")
    return number


def _finite(amount: Any) -> float:
    try:
        number = float(amount)
    except (TypeError, ValueError):
        raise InputError(f"{amount!r} is no amount to add to a router's logit") from None
    if not isfinite(number):
        raise InputError(f"the amount {number} is not finite; ablate_experts takes experts out")
    return number


def _said(name: str, first: Any, positions: Any, **options: Any) -> str:
    """The call that makes an edit."""
    if isinstance(first, dict):
        first = {
            layer: list(named) if isinstance(named, tuple) else named
            for layer, named in first.items()
        }
    if positions is not None:
        shape = getattr(positions, "shape", ())
        options["positions"] = f"<{tuple(shape)}>" if shape else repr(positions)
    given = [
        f"{option}={value if option == 'positions' else repr(value)}"
        for option, value in options.items()
    ]
    return f"{name}({', '.join([str(first), *given])})"


# What happens at the hooks


def _check(layer: int, experts: Iterable[int]) -> Pair:
    """The pair that sees whether a layer has these experts."""
    return act_name("router_logits", layer), reads_only(partial(_check_exist, most=max(experts)))


def _check_exist(logits: Logits, hook: HookPoint, *, most: int) -> None:
    if most >= logits.shape[-1]:
        raise InputError(
            f"an edit names expert {most} at {hook.name}, "
            f"but there are experts 0 to {logits.shape[-1] - 1}"
        )


def _is_any(
    indices: Int[Tensor, "batch pos n"], experts: tuple[int, ...]
) -> Bool[Tensor, "batch pos n"]:
    return torch.isin(indices, indices.new_tensor(experts))


def _remove(logits: Logits, hook: HookPoint, *, experts: tuple[int, ...], places: Places) -> Logits:
    ids = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
    return logits.masked_fill(_is_any(ids, experts) & where(places, logits), -torch.inf)


def _refuse_chosen(
    weights: Weights, hook: HookPoint, *, experts: tuple[int, ...], places: Places
) -> None:
    indices = hook.ctx["indices"]
    if (_is_any(indices, experts) & where(places, indices)).any():
        raise InputError(
            f"experts {list(experts)} are taken out, but {hook.name} still has some of them: fewer "
            f"than the {indices.shape[-1]} that a token takes are left, or another edit chooses one"
        )


def _silence(
    weights: Weights,
    hook: HookPoint,
    *,
    experts: tuple[int, ...],
    places: Places,
    renormalise: bool,
) -> Weights:
    gone = _is_any(hook.ctx["indices"], experts) & where(places, weights)
    rest = weights.masked_fill(gone, 0)
    if not renormalise:
        return rest
    wide = torch.promote_types(weights.dtype, torch.float32)
    before, after = (w.to(wide).sum(dim=-1, keepdim=True) for w in (weights, rest))
    # Where nothing is gone, the ratio is exactly 1; where nothing is left, there is none.
    return (rest * (before / after.masked_fill(after == 0, 1))).to(weights.dtype)


def _force(
    indices: Indices, hook: HookPoint, *, experts: tuple[int, ...], places: Places
) -> Indices:
    k = indices.shape[-1]
    if len(experts) > k:
        raise InputError(f"{len(experts)} experts are forced at {hook.name}, but a token takes {k}")
    # Those named to the end; the others stay in the router's order, best first.
    order = _is_any(indices, experts).int().argsort(dim=-1, stable=True)
    others = indices.gather(-1, order)[..., : k - len(experts)]
    named = indices.new_tensor(experts).expand(*indices.shape[:2], len(experts))
    return torch.where(where(places, indices), torch.cat((named, others), dim=-1), indices)


def _bias(logits: Logits, hook: HookPoint, *, amounts: dict[int, float], places: Places) -> Logits:
    bias = logits.new_zeros(logits.shape[-1])
    bias[list(amounts)] = logits.new_tensor(list(amounts.values()))
    return torch.where(where(places, logits), logits + bias, logits)


def _replay(tensor: Tensor, hook: HookPoint, *, values: Tensor, places: Places) -> Tensor:
    here = where(places, tensor)
    if not here.any():
        return tensor
    if values.shape != tensor.shape:
        raise InputError(
            f"the frozen run has [batch pos k] = {tuple(values.shape)} at {hook.name}, "
            f"but this pass has {tuple(tensor.shape)}"
        )
    return torch.where(here, values.to(tensor), tensor)


def _replay_weights(
    weights: Weights,
    hook: HookPoint,
    *,
    values: Tensor,
    indices: Tensor,
    places: Places,
) -> Weights:
    frozen = _replay(weights, hook, values=values, places=places)
    here = where(places, weights)
    if here.any() and ((hook.ctx["indices"] != indices.to(weights.device)) & here).any():
        raise InputError(
            f"weights are frozen at {hook.name}, but another edit changes the experts that they "
            "are of: freeze the routes alone (weights='live'), or drop that edit"
        )
    return frozen
