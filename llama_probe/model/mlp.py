"""The dense feed-forward: SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu

from llama_probe.hooks import HookPoint
from llama_probe.model.config import LlamaConfig


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, its three inner quantities passed through hook points."""

    def __init__(self, d_model: int, d_mlp: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_mlp, bias=bias)
        self.up = nn.Linear(d_model, d_mlp, bias=bias)
        self.down = nn.Linear(d_mlp, d_model, bias=bias)

    def neurons(
        self,
        x: Float[Tensor, "batch pos d_model"],
        pre: HookPoint,
        linear: HookPoint,
        post: HookPoint,
    ) -> Float[Tensor, "batch pos d_mlp"]:
        """What `down` reads."""
        return post(silu(pre(self.gate(x))) * linear(self.up(x)))


class MLP(SwiGLU):
    """The feed-forward of a dense layer.

    Hooks [batch pos d_mlp]: `hook_pre` (gate), `hook_pre_linear` (up), `hook_post` (product).
    """

    def __init__(self, cfg: LlamaConfig) -> None:
        super().__init__(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias)
        self.hook_pre = HookPoint()
        self.hook_pre_linear = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the layer adds to the residual stream."""
        return self.down(self.neurons(x, self.hook_pre, self.hook_pre_linear, self.hook_post))

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """Weights of the gate."""
        return self.gate.weight.T

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Weights of the linear branch."""
        return self.up.weight.T

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """What each neuron writes."""
        return self.down.weight.T

    @property
    def b_out(self) -> Float[Tensor, " d_model"]:
        """Output bias; zeros where the family has none."""
        bias = self.down.bias
        return self.down.weight.new_zeros(self.down.weight.shape[0]) if bias is None else bias
