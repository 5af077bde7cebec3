"""The transformer that both towers share: pre-norm blocks, bidirectional attention, tanh-GELU MLP, biases throughout.

Parameter names are those of the published checkpoints. Source: SigLIP, arXiv:2303.15343 §4, a ViT as in
arXiv:2010.11929 without a class token.
"""

from typing import cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_kernels import add_layer_norm, attention, gelu_tanh, layer_norm, linear


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis, computed by `fused_kernels.layer_norm`."""

    def forward(self, input: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Normalise the last axis."""
        return layer_norm(input, self.weight, self.bias, self.eps)


class LayerNormOfSum(LayerNorm):
    """The sum of a residual and what is added to it, and the norm of that sum: one pass over memory where it can be."""

    def forward(
        self, input: Float[Tensor, "*shape d"], residual: Float[Tensor, "*shape d"]
    ) -> tuple[Float[Tensor, "*shape d"], Float[Tensor, "*shape d"]]:
        """Return the new residual, and it normalised over the last axis."""
        return add_layer_norm(input, residual, self.weight, self.bias, self.eps)


class Linear(nn.Linear):
    """`nn.Linear`, computed by `fused_kernels.linear`."""

    def forward(self, input: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch n"]:
        """Multiply with the matrix and add the bias."""
        return linear(input, self.weight, self.bias)


class SelfAttention(nn.Module):
    """Multi-head attention of every token to every token."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        """Attend within each row of the batch, to keys marked True."""
        query, key, value = (
            rearrange(projection(x), "b n (h k) -> b n h k", h=self.num_heads)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = attention(query, key, value, mask=mask)
        return self.out_proj(rearrange(mixed, "b n h k -> b n (h k)"))


class Mlp(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden_width)
        self.fc2 = Linear(hidden_width, width)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Apply to each token alone."""
        return self.fc2(gelu_tanh(self.fc1(x)))


class EncoderLayer(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(width, eps=layer_norm_eps)
        self.self_attn = SelfAttention(width, num_heads)
        self.layer_norm2 = LayerNormOfSum(width, eps=layer_norm_eps)
        self.mlp = Mlp(width, mlp_width)

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        """Apply the block."""
        x, normed = self.layer_norm2(self.self_attn(self.layer_norm1(x), mask), x)
        return x + self.mlp(normed)


class Encoder(nn.Module):
    """The blocks in order; the norm after the last one belongs to the tower."""

    def __init__(self, num_layers: int, width: int, num_heads: int, mlp_width: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(width, num_heads, mlp_width, layer_norm_eps) for _ in range(num_layers)
        )
        self.recomputes = False
        """Keep no activations of the blocks in training: the backward pass computes them again (checkpointing)."""

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n d"]:
        """Apply all blocks."""
        for layer in self.layers:
            if self.recomputes and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(layer, x, mask, use_reentrant=False))
            else:
                x = layer(x, mask)
        return x


@torch.no_grad()
def init_encoder(encoder: nn.Module, generator: torch.Generator | None) -> None:
    """Draw the weights of all attention, MLP and norm modules below as SigLIP does: Xavier uniform, biases about 0."""
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, SelfAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
                nn.init.xavier_uniform_(projection.weight, generator=generator)
                nn.init.zeros_(projection.bias)
        elif isinstance(module, Mlp):
            for linear in (module.fc1, module.fc2):
                nn.init.xavier_uniform_(linear.weight, generator=generator)
                nn.init.normal_(linear.bias, std=1e-6, generator=generator)


@torch.no_grad()
def init_cut_normal(weight: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill with a normal cut at two standard deviations, widened so that what remains has the wanted `std`."""
    # Standard deviation of a standard normal cut at ±2.
    uncut = std / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=uncut, a=-2 * uncut, b=2 * uncut, generator=generator)
