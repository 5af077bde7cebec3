"""Phi-3: a decoder-only language model, for packed training and for ragged decoding.

Phi-3 technical report, arXiv:2404.14219; layers as in the published Phi-3-mini weights, whose tensor names and
layouts the state dict has: `qkv_proj` holds the rows of q, then k, then v; `gate_up_proj` those of the gate, then up.

Two layouts. Training and prefill take one flat sequence of tokens `[t, d]` that several documents share, with the
document bounds in `cu_seqlens` (0, end of the first, …, t): no batch axis, no padding, no attention across documents.
A decoding step takes `[b, d]`, one new token for each row of a `KVCache`.

With a sliding window w, the query at position i sees the keys j with i − w < j ≤ i (transformers' convention).

With long-context scaling each document, and each row of a cache, chooses its factors by its own length, so that it
computes the same whatever stands beside it (transformers goes by the longest of a batch; one by one the two agree). A
row that outgrows the original window is filled again by the very `step` or `prefill` that takes it there.
"""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import cast

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_kernels import (
    TokenEnds,
    add_rms_norm,
    linear,
    packed_attention,
    plan_packing,
    rms_norm,
    rotary_embedding,
    swiglu,
)

from . import stepping
from .cache import KVCache
from .config import Phi3Config
from .decoding import Attend, LayerParts, PlainLayers, Turn
from .documents import document_extents, document_lengths, document_positions
from .projection import Projection
from .rope import rotary_tables, rotation_matrices

# Numbers of a rotation's matrix for all tokens, up to which a product with it is ahead of the formula: a few tokens.
_MOST_MATRIX_ELEMENTS = 1 << 17


class RMSNorm(nn.Module):
    """x / rms(x) · weight, statistics in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        """Normalise the last axis."""
        return rms_norm(x, self.weight, self.eps)


class RMSNormOfSum(RMSNorm):
    """The sum of a residual and what is added to it, and the norm of that sum: one pass over memory where it can be."""

    def forward(
        self, x: Float[Tensor, "*shape d"], residual: Float[Tensor, "*shape d"]
    ) -> tuple[Float[Tensor, "*shape d"], Float[Tensor, "*shape d"]]:
        """Return the new residual, and it normalised over the last axis."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class TokenEmbedding(nn.Embedding):
    """One row a token, left undrawn."""

    def reset_parameters(self) -> None:
        """Draw nothing."""

    def project(self, hidden: Float[Tensor, "... d"], bias: Float[Tensor, " v"] | None) -> Float[Tensor, "... v"]:
        """Give the logits of a tied head."""
        return linear(hidden, self.weight, bias)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; one matrix makes q, k and v."""

    def __init__(self, cfg: Phi3Config) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.num_kv_heads = cfg.num_kv_heads
        self.head_dim = cfg.head_dim
        self.qkv_proj = Projection(cfg.width, (cfg.num_heads + 2 * cfg.num_kv_heads) * cfg.head_dim)
        self.o_proj = Projection(cfg.num_heads * cfg.head_dim, cfg.width)

    def forward(
        self,
        x: Float[Tensor, "t d"],
        turn: Turn,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Float[Tensor, "t d"]:
        """Mix tokens as `attend` lets them see each other."""
        heads = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        # not einops: parsing its pattern costs a decoding step as much as a projection
        return self.o_proj(attend(*turn(heads)).flatten(1))


class GatedMLP(nn.Module):
    """down(up(x) · silu(gate(x))); one matrix makes gate and up."""

    def __init__(self, cfg: Phi3Config) -> None:
        super().__init__()
        self.gate_up_proj = Projection(cfg.width, 2 * cfg.mlp_width)
        self.down_proj = Projection(cfg.mlp_width, cfg.width)

    def forward(self, x: Float[Tensor, "t d"]) -> Float[Tensor, "t d"]:
        """Transform every token by itself."""
        return self.down_proj(swiglu(self.gate_up_proj(x)))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual."""

    def __init__(self, cfg: Phi3Config) -> None:
        super().__init__()
        self.self_attn = Attention(cfg)
        self.mlp = GatedMLP(cfg)
        self.input_layernorm = RMSNorm(cfg.width, cfg.norm_eps)
        self.post_attention_layernorm = RMSNormOfSum(cfg.width, cfg.norm_eps)

    def forward(
        self,
        x: Float[Tensor, "t d"],
        turn: Turn,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Float[Tensor, "t d"]:
        """Return the new residual."""
        mixed = self.self_attn(self.input_layernorm(x), turn, attend)
        x, normed = self.post_attention_layernorm(mixed, x)
        return x + self.mlp(normed)


class Decoder(nn.Module):
    """Embedding table, layers and final norm: the part of the published model named `model`."""

    def __init__(self, cfg: Phi3Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = TokenEmbedding(cfg.vocab_size, cfg.width)
        self.layers = nn.ModuleList(DecoderLayer(cfg) for _ in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.recomputes = False
        """Keep no activations of the layers in training: the backward pass computes them again (checkpointing)."""

    def forward(
        self,
        x: Float[Tensor, "t d"],
        positions: Int[Tensor, " t"],
        extents: Int[Tensor, " t"] | None,
        attend: Attend,
        *,
        end: int | None = None,
    ) -> Float[Tensor, "t d"]:
        """Return the residual after the last layer, before the final norm; `extents`, `end` as in `rotary_tables`."""
        turn = self.turn(*rotary_tables(self.cfg, positions, extents, end))
        for index, layer in enumerate(self.layers):
            if self.recomputes and x.requires_grad and torch.is_grad_enabled():
                x = cast(Tensor, checkpoint(layer, x, turn, partial(attend, index), use_reentrant=False))
            else:
                x = layer(x, turn, partial(attend, index))
        return x

    def turn(self, cos: Float[Tensor, "t r"], sin: Float[Tensor, "t r"]) -> Turn:
        """Return how queries and keys are turned in each layer, for these positions."""
        h, g, head_dim = self.cfg.num_heads, self.cfg.num_kv_heads, self.cfg.head_dim

        def by_formula(heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = heads.split((h, g, g), dim=1)
            return *rotary_embedding(q, k, cos, sin), v

        # autocast would round the angles
        is_plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if cos.device.type != "cpu" or not is_plain or len(cos) * head_dim**2 > _MOST_MATRIX_ELEMENTS:
            return by_formula
        dtype = torch.promote_types(self.norm.weight.dtype, cos.dtype)
        matrices = rotation_matrices(cos, sin, head_dim).to(dtype)

        def by_product(heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            turned = torch.bmm(heads.narrow(1, 0, h + g).to(dtype), matrices).to(heads.dtype)
            return turned.narrow(1, 0, h), turned.narrow(1, h, g), heads.narrow(1, h + g, g)

        return by_product


class Head(nn.Module):
    """Weight and bias of the output layer; holds no weight of its own where it is tied to the embedding."""

    def __init__(self, cfg: Phi3Config) -> None:
        super().__init__()
        self.weight = None if cfg.is_head_tied else nn.Parameter(torch.empty(cfg.vocab_size, cfg.width))
        self.bias = nn.Parameter(torch.zeros(cfg.vocab_size)) if cfg.has_head_bias else None

    def project(self, hidden: Float[Tensor, "... d"], bias: Float[Tensor, " v"] | None) -> Float[Tensor, "... v"]:
        """Give the logits; for a head with a weight of its own."""
        assert self.weight is not None
        return linear(hidden, self.weight, bias)


class Phi3(nn.Module):
    """The language model. Hidden states come out; the head is applied only where the caller wants it."""

    def __init__(self, cfg: Phi3Config, *, generator: torch.Generator | None = None) -> None:
        """Make the model with fresh weights, drawn with `generator` (None: torch's global one)."""
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg)
        self.lm_head = Head(cfg)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(
        self, generator: torch.Generator | None = None, *, names: Collection[str] | None = None
    ) -> None:
        """Draw all weights anew, or those of these names: normal matrices, norms at 1, bias at 0. Meta tensors stay."""
        residual_std = self.cfg.init_std if self.cfg.residual_init_std is None else self.cfg.residual_init_std
        for name, weight in self.named_parameters():
            if weight.is_meta or (names is not None and name not in names):
                continue
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else self.cfg.init_std
                weight.normal_(0.0, std, generator=generator)

    @property
    def head_weight(self) -> Float[Tensor, "v d"]:
        """The output layer's weight, the embedding's where tied; a quantised one in floating point, made anew."""
        weight = (self.model.embed_tokens if self.cfg.is_head_tied else self.lm_head).weight
        assert weight is not None
        return weight

    @property
    def head_bias(self) -> Float[Tensor, " v"] | None:
        """The output layer's bias, if it has one."""
        return self.lm_head.bias

    def embed(self, ids: Int[Tensor, "... t"]) -> Float[Tensor, "... t d"]:
        """Look the tokens up."""
        return self.model.embed_tokens(ids)

    def logits(self, hidden: Float[Tensor, "... d"]) -> Float[Tensor, "... v"]:
        """Apply the head. For a loss over many tokens use `linear_cross_entropy` with the head's weight instead."""
        head = self.model.embed_tokens if self.cfg.is_head_tied else self.lm_head
        return head.project(hidden, self.head_bias)

    def forward(
        self,
        inputs: Float[Tensor, "t d"],
        positions: Int[Tensor, " t"] | None = None,
        cu_seqlens: Int32[Tensor, " bounds"] | None = None,
    ) -> Float[Tensor, "t d"]:
        """Return the hidden states of packed documents, after the final norm.

        Without `cu_seqlens` the tokens are one document; without `positions` they count up from 0 in each document.
        A document may be empty.

        Raises:
            ValueError: the bounds do not fit the tokens.
        """
        num_tokens = inputs.shape[0]
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, num_tokens], dtype=torch.int32, device=inputs.device)
        else:
            document_lengths(cu_seqlens, num_tokens)
        if positions is None:
            positions = document_positions(cu_seqlens, num_tokens)

        plan = plan_packing(cu_seqlens)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return packed_attention(q, k, v, cu_seqlens, window=self.cfg.sliding_window, plan=plan)

        extents = None if self.cfg.long_rope is None else document_extents(positions, cu_seqlens)
        return self.model.norm(self.model(inputs, positions, extents, attend))

    def new_cache(self, batch: int, *, block: int = 64) -> KVCache:
        """Return an empty cache for `batch` rows that fits this model's device and dtype."""
        weight = self.model.norm.weight
        return KVCache(self.cfg, batch, block=block, dtype=weight.dtype, device=weight.device)

    def prefill(
        self, inputs: Float[Tensor, "t d"], cu_seqlens: Int32[Tensor, " bounds"], cache: KVCache
    ) -> Float[Tensor, "b d"]:
        """Append one packed document to each row of the cache; return each row's last hidden state.

        Rows that hold something already are continued: their new tokens see the old ones and count on from them. Those
        that thereby outgrow the original window of long-context scaling are filled again.

        Raises:
            ValueError: the bounds do not fit the tokens, the number of documents is not that of the rows, or a
                document is empty.
        """
        return stepping.prefill(self, inputs, cu_seqlens, cache)

    def step(self, inputs: Float[Tensor, "b d"], cache: KVCache) -> Float[Tensor, "b d"]:
        """Append one token to each row of the cache; return the hidden states, after the final norm.

        Rows that thereby outgrow the original window of long-context scaling are filled again: for them this one step
        costs a prefill.
        """
        return stepping.step(self, inputs, cache)

    def next_logits(
        self, tokens: Int[Tensor, " b"], cache: KVCache
    ) -> tuple[Float[Tensor, "b v"], Int[Tensor, " b"] | None]:
        """Append a token to each row, as `logits(step(embed(tokens), cache))`.

        With the logits come the likeliest tokens, where they are known already: on a CPU one call may do it all.
        """
        return stepping.next_logits(self, tokens, cache)

    def plain_layers(self) -> PlainLayers:
        """Return layers, norm, embedding and head as operations without modules."""
        cfg, embedding, head = self.cfg, self.model.embed_tokens, self.lm_head
        layers = [
            LayerParts(
                *(layer.input_layernorm.weight, layer.self_attn.qkv_proj, layer.self_attn.o_proj),
                *(layer.post_attention_layernorm.weight, layer.mlp.gate_up_proj, layer.mlp.down_proj),
            )
            for layer in cast(Iterable[DecoderLayer], self.model.layers)
        ]
        ends = None
        if type(embedding) is TokenEmbedding and type(head) is Head:
            ends = TokenEnds(embedding.weight, self.head_weight, head.bias)
        norm = self.model.norm.weight
        return PlainLayers(layers, norm, eps=cfg.norm_eps, window=cfg.sliding_window, ends=ends)
