"""Weights and directions of the whole model, by TransformerLens' names."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from llama_probe.model.config import LlamaConfig
from llama_probe.model.mlp import MLP


class ModelWeights:
    """Methods of `Llama` that give its weights as TransformerLens' analyses ask for them."""

    cfg: LlamaConfig
    blocks: Any
    embed: nn.Embedding
    unembed: nn.Linear
    ln_final: Any
    to_single_token: Any

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding."""
        return self.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding."""
        return self.unembed.weight.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias: zeros."""
        return self.unembed.weight.new_zeros(self.cfg.d_vocab)

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query weights of every layer (a copy)."""
        return torch.stack([block.attn.W_Q for block in self.blocks])

    @property
    def W_K(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Key weights of every layer (a copy)."""
        return torch.stack([block.attn.W_K for block in self.blocks])

    @property
    def W_V(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Value weights of every layer (a copy)."""
        return torch.stack([block.attn.W_V for block in self.blocks])

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Output weights of every layer (a copy)."""
        return torch.stack([block.attn.W_O for block in self.blocks])

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of output biases that layers before `layer` add to the stream.

        Args:
            layer: The first layer left out.
            mlp_input: Include the attention bias of `layer` itself.
            include_mlp_biases: Include those of the feed-forwards.
        """
        total = self.W_E.new_zeros(self.cfg.d_model)
        for index, block in enumerate(self.blocks):
            if index < layer or (index == layer and mlp_input):
                total = total + block.attn.b_O
            if index < layer and include_mlp_biases and isinstance(block.mlp, MLP):
                total = total + block.mlp.b_out
        return total

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "..."]
    ) -> Float[Tensor, "... d_model"]:
        """What to project the stream on, once divided by the last norm's scale, for tokens' logits.

        The unembedding's columns times the last norm's weight, as TransformerLens' own models have
        them once that weight is folded into the unembedding.
        """
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        index = torch.as_tensor(tokens, device=self.W_U.device)
        index = index.squeeze() if index.ndim and index.numel() == 1 else index
        return self.unembed.weight[index] * self.ln_final.weight

    # TransformerLens' functions turn these on; here a hook is computed when it is listened to.

    def set_use_attn_result(self, use: bool) -> None:
        """Nothing to do."""

    def set_use_split_qkv_input(self, use: bool) -> None:
        """Nothing to do."""

    def set_use_hook_mlp_in(self, use: bool) -> None:
        """Nothing to do."""
