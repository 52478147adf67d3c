"""The mixture of experts: each token is sent to a few feed-forwards out of many.

1. The router gives every expert a logit; each token takes its `top_k` highest.
2. The family's rule turns the logits of the chosen ones into weights.
3. Only the chosen experts run. Their (token, choice) pairs are sorted by expert, so that each
   expert is one dense product over its own rows.
4. A shared expert, where there is one, sees every token.

Where the weight acts differs: Mixtral and Qwen write `weight * expert(x)`, Llama 4 writes
`expert(weight * x)`.

Shape suffixes below: R rows = batch * pos * k (token, choice) pairs sorted by expert, F = d_expert,
D = d_model.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from llama_probe.errors import InputError
from llama_probe.hooks import HookPoint
from llama_probe.model.config import LlamaConfig
from llama_probe.model.mlp import SwiGLU


class MoE(nn.Module):
    """The feed-forward of a mixture-of-experts layer.

    Hooks, in the order in which they act; `k` runs over a token's chosen experts:
        `hook_router_logits` [batch pos expert]: editing them changes the routing.
        `hook_expert_indices` [batch pos k]: editing them re-routes, with weights from the logits.
        `hook_expert_weights` [batch pos k]: what multiplies each chosen expert.
        `hook_expert_pre`, `hook_expert_pre_linear`, `hook_expert_post` [batch pos k d_expert].
        `hook_expert_out` [batch pos k d_model]: what each chosen expert adds to the stream.
        `hook_shared_pre`, `hook_shared_pre_linear`, `hook_shared_post` [batch pos d_shared],
        `hook_shared_gate` [batch pos 1] (after the sigmoid), `hook_shared_out` [batch pos d_model].
    """

    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__()
        assert cfg.moe is not None
        self.cfg = moe = cfg.moe
        self.router = nn.Linear(cfg.d_model, moe.n_experts, bias=False)
        # Gate and up projection of each expert, one above the other.
        self.experts_in = nn.Parameter(torch.empty(moe.n_experts, 2 * moe.d_expert, cfg.d_model))
        self.experts_out = nn.Parameter(torch.empty(moe.n_experts, cfg.d_model, moe.d_expert))
        self.shared = SwiGLU(cfg.d_model, moe.d_shared) if moe.d_shared else None
        self.shared_gate = nn.Linear(cfg.d_model, 1, bias=False) if moe.shared_gate else None

        self.hook_router_logits = HookPoint()
        self.hook_expert_indices = HookPoint()
        self.hook_expert_weights = HookPoint()
        self.hook_expert_pre = HookPoint()
        self.hook_expert_pre_linear = HookPoint()
        self.hook_expert_post = HookPoint()
        self.hook_expert_out = HookPoint()
        if moe.d_shared:
            self.hook_shared_pre = HookPoint()
            self.hook_shared_pre_linear = HookPoint()
            self.hook_shared_post = HookPoint()
            self.hook_shared_out = HookPoint()
        if moe.shared_gate:
            self.hook_shared_gate = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the layer adds to the residual stream.

        Raises:
            InputError: A hook chose an expert that does not exist, or one of them twice.
        """
        indices, weights = self.route(x)
        routed = self.hook_expert_out(self._run(x, indices, weights)).sum(dim=2)
        return routed if self.shared is None else routed + self._run_shared(self.shared, x)

    def route(
        self, x: Float[Tensor, "batch pos d_model"]
    ) -> tuple[Int[Tensor, "batch pos k"], Float[Tensor, "batch pos k"]]:
        """Each token's experts and their weights."""
        logits = self.hook_router_logits(self.router(x))
        indices = self.hook_expert_indices(logits.topk(self.cfg.top_k, dim=-1).indices)
        if self.hook_expert_indices.editing:
            self._check(indices)
        # A hook at the weights may ask which experts they are of.
        self.hook_expert_weights.ctx["indices"] = indices
        return indices, self.hook_expert_weights(self._weights(logits, indices))

    def _check(self, indices: Int[Tensor, "batch pos k"]) -> None:
        name, n_experts = self.hook_expert_indices.name, self.cfg.n_experts
        if indices.min() < 0 or indices.max() >= n_experts:
            raise InputError(
                f"a hook at {name} chose expert {int(indices.min())} to {int(indices.max())}, "
                f"but there are experts 0 to {n_experts - 1}"
            )
        ordered = indices.sort(dim=-1).values
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise InputError(f"a hook at {name} chose an expert twice for one token")

    def _weights(
        self, logits: Float[Tensor, "batch pos expert"], indices: Int[Tensor, "batch pos k"]
    ) -> Float[Tensor, "batch pos k"]:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.cfg.rule == "sigmoid_input":
            weights = wide.gather(-1, indices).sigmoid()
        else:
            weights = wide.softmax(dim=-1).gather(-1, indices)
            if self.cfg.renormalise:
                weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(logits.dtype)

    def _run(
        self,
        x: Float[Tensor, "batch pos d_model"],
        indices: Int[Tensor, "batch pos k"],
        weights: Float[Tensor, "batch pos k"],
    ) -> Float[Tensor, "batch pos k d_model"]:
        """What each chosen expert adds to the stream, computed for the chosen ones only."""
        experts_R, order = indices.flatten().sort(stable=True)
        rows_per_expert = torch.bincount(experts_R, minlength=self.cfg.n_experts).tolist()
        weights_R1 = weights.flatten()[order, None]
        x_RD = x.flatten(0, 1)[order // self.cfg.top_k]
        if self.cfg.rule == "sigmoid_input":
            x_RD = x_RD * weights_R1
        pre_RF, linear_RF = _grouped(x_RD, rows_per_expert, self.experts_in).chunk(2, dim=-1)
        pre_RF = _hooked(self.hook_expert_pre, pre_RF, order, indices)
        linear_RF = _hooked(self.hook_expert_pre_linear, linear_RF, order, indices)
        post_RF = _hooked(self.hook_expert_post, silu(pre_RF) * linear_RF, order, indices)
        out_RD = _grouped(post_RF, rows_per_expert, self.experts_out)
        if self.cfg.rule == "softmax":
            out_RD = out_RD * weights_R1
        return _by_token(out_RD, order, indices)

    def _run_shared(
        self, shared: SwiGLU, x: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        post = shared.neurons(
            x, self.hook_shared_pre, self.hook_shared_pre_linear, self.hook_shared_post
        )
        out = shared.down(post)
        if self.shared_gate is not None:
            out = self.hook_shared_gate(self.shared_gate(x).sigmoid()) * out
        return self.hook_shared_out(out)


def _grouped(
    rows: Float[Tensor, "row wide"],
    rows_per_expert: list[int],
    weight: Float[Tensor, "expert out wide"],
) -> Float[Tensor, "row out"]:
    """Each expert's product with its own rows, which lie together."""
    products = [
        linear(part, weight[expert])
        for expert, part in enumerate(rows.split(rows_per_expert))
        if part.shape[0]
    ]
    return torch.cat(products) if len(products) != 1 else products[0]


def _by_token(
    rows: Float[Tensor, "row width"],
    order: Int[Tensor, " row"],
    indices: Int[Tensor, "batch pos k"],
) -> Float[Tensor, "batch pos k width"]:
    """Undo the sorting by expert."""
    return rows[order.argsort()].unflatten(0, indices.shape)


def _hooked(
    hook: HookPoint,
    rows: Float[Tensor, "row width"],
    order: Int[Tensor, " row"],
    indices: Int[Tensor, "batch pos k"],
) -> Float[Tensor, "row width"]:
    """Show sorted rows to a hook by token, if anything listens."""
    if not hook.listening:
        return rows
    return hook(_by_token(rows, order, indices)).flatten(0, 2)[order]
