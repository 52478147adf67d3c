"""RMS norm (Zhang and Sennrich 2019, arXiv 1910.07467), with its scale and its result named."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llama_probe.hooks import HookPoint


def rms(x: Float[Tensor, "*axes width"], eps: float) -> Float[Tensor, "*axes 1"]:
    """Root of the mean square, in float32 or in x's own precision where that is higher."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()


class RMSNorm(nn.Module):
    """`weight * x / rms(x)`; the quotient takes x's precision before it meets the weight.

    Hooks: `hook_scale` [batch pos 1], what x is divided by; `hook_normalized` [batch pos d_model],
    the quotient. Editing either changes what follows.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    @property
    def w(self) -> Float[Tensor, " width"]:
        """TransformerLens' name of the weight."""
        return self.weight

    def forward(self, x: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes width"]:
        """Normalise the last axis."""
        scale = self.hook_scale(rms(x, self.eps))
        return self.weight * self.hook_normalized((x / scale).to(x.dtype))

    def unhooked(self, x: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes width"]:
        """The same by the same formula, past the hooks."""
        return self.weight * (x / rms(x, self.eps)).to(x.dtype)


class HeadNorm(nn.Module):
    """RMS norm of each query or key head, with a weight (Qwen 3) or without (Llama 4)."""

    def __init__(self, width: int, eps: float, *, learned: bool) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if learned else None

    def forward(
        self, x: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Normalise each head."""
        normalized = (x / rms(x, self.eps)).to(x.dtype)
        return normalized if self.weight is None else self.weight * normalized
