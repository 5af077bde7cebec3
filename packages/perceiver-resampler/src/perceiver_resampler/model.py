"""The perceiver resampler: learned latents read a set of features, layer by layer, and become the image's tokens.

In every layer, with own weights, the latents z attend to the features and to themselves, then pass a feed-forward
block:

    m = LN_media(x)   l = LN_latents(z)   [K | V] = W_kv [m ; l]   Q = W_q l
    z <- z + W_out softmax(Q K^T / sqrt(k)) V
    z <- z + FF(z)                              FF = LN, Linear, GELU (erf), Linear
    tokens = W_p LN(z) + b_p                    after the last layer

Only `W_p` has a bias. There is no position code: the features are a set, and their order changes nothing.

Source: Flamingo, arXiv:2204.14198 §2.1 and appendix A.1.1. The details, the sizes of the preset and the parameter
names are those of xGen-MM (arXiv:2408.08872): `vision_tokenizer.*` of its checkpoints loads with that prefix removed.
"""

import math

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fused_kernels import attention, layer_norm, linear

from .config import InstructedResamplerConfig, ResamplerConfig


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last axis, computed by `fused_kernels.layer_norm`."""

    def forward(self, input: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Normalise the last axis."""
        return layer_norm(input, self.weight, self.bias, self.eps)


class Linear(nn.Linear):
    """`nn.Linear`, computed by `fused_kernels.linear`."""

    def forward(self, input: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch n"]:
        """Multiply with the matrix and add the bias."""
        return linear(input, self.weight, self.bias)


class LatentAttention(nn.Module):
    """Cross attention from the latents to the features and the latents."""

    def __init__(self, cfg: ResamplerConfig) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.norm_media = LayerNorm(cfg.dim, eps=cfg.layer_norm_eps)
        self.norm_latents = LayerNorm(cfg.dim, eps=cfg.layer_norm_eps)
        self.to_q = Linear(cfg.dim, cfg.inner_dim, bias=False)
        self.to_kv = Linear(cfg.dim, 2 * cfg.inner_dim, bias=False)
        self.to_out = nn.Linear(cfg.inner_dim, cfg.dim, bias=False)

    def forward(
        self,
        features: Float[Tensor, "p n d"],
        latents: Float[Tensor, "p q d"],
        mask: Bool[Tensor, "p n_plus_q"] | None,
    ) -> Float[Tensor, "p q d"]:
        """Return what is to be added to the latents.

        Args:
            features: the features to read.
            latents: the latents as they stand.
            mask: True = attend, over features then latents (and text behind them); None = attend to all.
        """
        media, normed = self.norm_media(features), self.norm_latents(latents)
        query = rearrange(self.to_q(normed), "p q (h k) -> p q h k", h=self.num_heads)
        # Joined before the projection, at width d, because keys and values are wider; both are views of one product.
        # Two products and `fused_kernels.joint_attention` were tried: forward 0.87 to 0.93 times as fast on a CPU, and
        # on a GPU the copy that is saved (8 µs a layer and step for five tiles at 4.8 TB/s) is less than what the
        # second product costs, whose gradient of the weight must be added to the first's.
        key_value = self.to_kv(torch.cat((media, normed), dim=1))
        key, value = rearrange(key_value, "p s (two h k) -> two p s h k", two=2, h=self.num_heads)
        mixed = attention(query, key, value, mask=mask)
        return self.to_out(rearrange(mixed, "p q h k -> p q (h k)"))


def feed_forward(cfg: ResamplerConfig) -> nn.Sequential:
    """Build the feed-forward block; a `Sequential`, since the published parameter names count its members."""
    hidden_dim = cfg.ff_mult * cfg.dim
    return nn.Sequential(
        LayerNorm(cfg.dim, eps=cfg.layer_norm_eps),
        Linear(cfg.dim, hidden_dim, bias=False),
        nn.GELU(),
        Linear(hidden_dim, cfg.dim, bias=False),
    )


class ResamplerLayer(nn.ModuleList):
    """Attention, then feed-forward, each added to the latents; a list, since the published names count its members."""

    def __init__(self, cfg: ResamplerConfig) -> None:
        super().__init__((LatentAttention(cfg), feed_forward(cfg)))

    def forward(
        self,
        features: Float[Tensor, "p n d"],
        latents: Float[Tensor, "p q d"],
        mask: Bool[Tensor, "p n_plus_q"] | None,
    ) -> Float[Tensor, "p q d"]:
        """Return the latents after this layer; arguments as of `LatentAttention.forward`."""
        attn, mlp = self
        latents = latents + attn(features, latents, mask)
        return latents + mlp(latents)


class PerceiverResampler(nn.Module):
    """Turn any number of features into `num_latents` tokens.

    Features come in the dtype of the parameters, or in any under autocast. Of an `InstructedResamplerConfig`, projected
    text features are further queries: the latents see them and they see all that latents see; they become no tokens.
    """

    def __init__(self, cfg: ResamplerConfig) -> None:
        super().__init__()
        self.dim = cfg.dim
        self.latents = nn.Parameter(torch.empty(cfg.num_latents, cfg.dim))
        self.layers = nn.ModuleList(ResamplerLayer(cfg) for _ in range(cfg.depth))
        self.norm = LayerNorm(cfg.dim, eps=cfg.layer_norm_eps)
        self.projection = Linear(cfg.dim, cfg.dim_out)
        is_instructed = isinstance(cfg, InstructedResamplerConfig)
        self.text_projection = Linear(cfg.dim_text, cfg.dim) if is_instructed else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew: latents N(0, 1), linear maps uniform within ±1/√fan_in, norms at identity."""
        nn.init.normal_(self.latents, generator=generator)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, nn.Linear):
                bound = 1.0 / math.sqrt(module.in_features)
                for parameter in module.parameters():
                    nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def forward(
        self,
        features: Float[Tensor, "p n d"],
        mask: Bool[Tensor, "p n"] | None = None,
        text: Float[Tensor, "p t dt"] | None = None,
        text_mask: Bool[Tensor, "p t"] | None = None,
    ) -> Float[Tensor, "p q d_out"]:
        """Resample each set of features on its own.

        Args:
            features: p sets of n features each; n may differ from call to call, and be 0.
            mask: True = attend. A masked feature has no effect and gets no gradient, whatever it holds (NaN included).
                The latents always see each other, so a set may be masked whole. Three features, the last one padding,
                and two latents; rows are latents, columns features then latents:

                    1 1 0 | 1 1
                    1 1 0 | 1 1

            text: what is asked about each set, where the config has a place for it; None for nothing.
            text_mask: True = text; what is masked is not seen.

        Raises:
            ValueError: features of another width, a mask of another shape, or text for a resampler that reads none.
        """
        if features.shape[-1] != self.dim:
            raise ValueError(
                f"features: expected width {self.dim} (the config's dim), got {features.shape[-1]}; "
                "give features of the tower that the resampler was made for"
            )
        num_sets = features.shape[0]
        if mask is not None:
            if mask.shape != features.shape[:2]:
                raise ValueError(
                    f"mask: expected one entry a feature, {tuple(features.shape[:2])}, got {tuple(mask.shape)}; "
                    "make it with the features"
                )
            # Weight zero is not enough: 0 * NaN is NaN.
            features = features.masked_fill(~mask[..., None], 0.0)
            mask = torch.cat((mask, mask.new_ones(num_sets, len(self.latents))), dim=1)
        latents = repeat(self.latents, "q d -> p q d", p=num_sets)
        if text is not None:
            latents, mask = self._with_text(latents, mask, text, text_mask, features.shape[1])
        for layer in self.layers:
            latents = layer(features, latents, mask)
        return self.projection(self.norm(latents[:, : len(self.latents)]))

    def _with_text(
        self,
        latents: Float[Tensor, "p q d"],
        mask: Bool[Tensor, "p n_plus_q"] | None,
        text: Float[Tensor, "p t dt"],
        text_mask: Bool[Tensor, "p t"] | None,
        num_features: int,
    ) -> tuple[Float[Tensor, "p q_plus_t d"], Bool[Tensor, "p n_plus_q_plus_t"] | None]:
        """Latents and projected text as queries, and what all of them may see."""
        if self.text_projection is None:
            raise ValueError(
                "text: expected none for a resampler that reads none, got some; make it of an InstructedResamplerConfig"
            )
        queries = torch.cat((latents, self.text_projection(text)), dim=1)
        if mask is None and text_mask is None:
            return queries, None
        num_sets, num_latents = latents.shape[:2]
        if mask is None:
            mask = torch.ones(num_sets, num_features + num_latents, dtype=torch.bool, device=latents.device)
        if text_mask is None:
            text_mask = mask.new_ones(text.shape[:2])
        return queries, torch.cat((mask, text_mask), dim=1)
