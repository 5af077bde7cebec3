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

from collections.abc import Callable, Collection
from functools import partial
from itertools import pairwise
from typing import cast

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fused_kernels import (
    add_rms_norm,
    attention,
    cached_attention,
    packed_attention,
    plan_packing,
    rms_norm,
    rotary_embedding,
    swiglu,
)

from .cache import KVCache
from .config import Phi3Config
from .decoding import Attend, PlainLayer, Turn, pass_through, plain_layer
from .projection import Projection
from .rope import rotary_tables, rotation_matrices

# Numbers of a rotation's matrix for all tokens, up to which a product with it is ahead of the formula: a few tokens.
_MOST_MATRIX_ELEMENTS = 1 << 17


def document_lengths(cu_seqlens: Int32[Tensor, " bounds"], num_tokens: int) -> list[int]:
    """Return each document's length, after checking that the bounds cover the `num_tokens` tokens in order.

    Raises:
        ValueError: the bounds do not begin at 0, do not end at num_tokens or decrease.
    """
    bounds: list[int] = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if not lengths or bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths) < 0:
        raise ValueError(
            f"cu_seqlens: expected document bounds rising from 0 to the number of tokens {num_tokens}, "
            f"got {bounds[:8]}{'…' if len(bounds) > 8 else ''} ending at {bounds[-1] if bounds else None}; "
            "build it as the cumulative sum of the documents' lengths, with a 0 in front"
        )
    return lengths


def document_positions(cu_seqlens: Int32[Tensor, " bounds"], num_tokens: int) -> Int[Tensor, " t"]:
    """Return every token's position in its own document: counting restarts at each bound."""
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), cu_seqlens.diff().long(), output_size=num_tokens)
    return torch.arange(num_tokens, device=cu_seqlens.device) - starts


def document_extents(positions: Int[Tensor, " t"], cu_seqlens: Int32[Tensor, " bounds"]) -> Int[Tensor, " t"]:
    """Return for every token the length of its document: one more than the largest position in it."""
    counts = cu_seqlens.diff().long()
    documents = torch.repeat_interleave(
        torch.arange(len(counts), device=positions.device), counts, output_size=len(positions)
    )
    largest = positions.new_zeros(len(counts)).scatter_reduce(0, documents, positions, "amax")
    return largest[documents] + 1


def _as_bias(is_hidden: Tensor, like: Tensor) -> Tensor:
    """0 where a key is seen, -inf where not."""
    return torch.zeros(is_hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(is_hidden, -torch.inf)


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
        return F.linear(hidden, self.weight, bias)


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

    def plain(self) -> PlainLayer:
        """Return the layer as operations without modules."""
        attn, mlp = self.self_attn, self.mlp
        norms = self.input_layernorm.weight, self.post_attention_layernorm.weight
        return plain_layer(norms[0], attn.qkv_proj, attn.o_proj, norms[1], mlp.gate_up_proj, mlp.down_proj)


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
        return F.linear(hidden, self.weight, bias)


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
        lengths = document_lengths(cu_seqlens, inputs.shape[0])
        cache.layers = None
        if len(lengths) != cache.batch:
            raise ValueError(
                f"prefill: expected one document for each of the cache's {cache.batch} rows, got {len(lengths)}; "
                "make the cache with as many rows as there are prompts"
            )
        if min(lengths) < 1:
            raise ValueError(
                f"prefill: expected at least one token for each row, got none for row {lengths.index(min(lengths))}; "
                "drop the row or give it a first token"
            )
        if cache.shortest == cache.longest and min(lengths) == max(lengths) and self.cfg.long_rope is None:
            x = self._prefill_evenly(inputs, cu_seqlens, lengths[0], cache)
            return self.model.norm(x[cu_seqlens[1:].long() - 1])
        counts = cu_seqlens.diff().long()
        rows = torch.repeat_interleave(torch.arange(cache.batch, device=inputs.device), counts)
        offsets = document_positions(cu_seqlens, inputs.shape[0])
        positions = cache.lengths[rows] + offsets
        totals = cache.lengths + counts
        outgrowing = cache.outgrowing(counts)
        longest = int(totals.max()) if cache.longest else max(lengths)
        cache.reserve(longest)
        cache.keep_inputs(rows, positions, inputs)
        if cache.longest == 0:
            attend = self._attend_fresh(rows, positions, cu_seqlens, cache)
        else:
            attend = self._attend_continued(rows, offsets, positions, max(lengths), longest, cache)
        x = self._run(inputs, positions, totals[rows], attend, longest, cache)
        cache.advance(counts)
        return self._refill(outgrowing, cache, self.model.norm(x[cu_seqlens[1:].long() - 1]))

    def _prefill_evenly(self, inputs: Tensor, cu_seqlens: Tensor, num_new: int, cache: KVCache) -> Tensor:
        """Append as many tokens to each of rows of one length, as one prompt always is: by copies, without indices."""
        window, batch, start, end = self.cfg.sliding_window, cache.batch, cache.longest, cache.longest + num_new
        cache.reserve(end)
        positions = torch.arange(start, end, device=inputs.device)
        plan, bias = None, None
        if start == 0:
            plan = plan_packing(cu_seqlens)
        else:
            seen = torch.arange(end, device=inputs.device)
            is_hidden = seen > positions[:, None]
            if window is not None:
                is_hidden |= seen <= positions[:, None] - window
            bias = _as_bias(is_hidden, inputs).expand(batch, num_new, end)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.extend(layer, k.view(batch, num_new, *k.shape[1:]), v.view(batch, num_new, *v.shape[1:]))
            if plan is not None:
                return packed_attention(q, k, v, cu_seqlens, window=window, plan=plan)
            keys, values = cache.read(layer, 0, end)
            return cached_attention(q.view(batch, num_new, *q.shape[1:]), keys, values, bias=bias).flatten(0, 1)

        x = self._run(inputs, positions.repeat(batch), None, attend, end, cache)
        cache.advance(num_new)
        return x

    def step(self, inputs: Float[Tensor, "b d"], cache: KVCache) -> Float[Tensor, "b d"]:
        """Append one token to each row of the cache; return the hidden states, after the final norm.

        Rows that thereby outgrow the original window of long-context scaling are filled again: for them this one step
        costs a prefill.
        """
        positions = cache.lengths
        end = cache.longest + 1
        outgrowing = cache.outgrowing(1)
        cache.reserve(end)
        window = self.cfg.sliding_window
        first = 0 if window is None else max(0, cache.shortest + 1 - window)
        bias = None
        # rows of one length all see first … end − 1, window or not
        if cache.shortest != cache.longest:
            seen = torch.arange(first, end, device=inputs.device)
            is_hidden = seen > positions[:, None]
            if window is not None:
                is_hidden |= seen <= positions[:, None] - window
            bias = _as_bias(is_hidden, inputs)[:, None]
        if cache.keeps_inputs:
            cache.keep_inputs(torch.arange(cache.batch, device=inputs.device), positions, inputs)
        extents = None if self.cfg.long_rope is None else positions + 1

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.append(layer, k, v)
            keys, values = cache.read(layer, first, end)
            return cached_attention(q[:, None], keys, values, bias=bias)[:, 0]

        x = self._run(inputs, positions, extents, attend, end, cache)
        cache.advance(1)
        return self._refill(outgrowing, cache, self.model.norm(x))

    def _run(
        self, x: Tensor, positions: Tensor, extents: Tensor | None, attend: Attend, end: int, cache: KVCache
    ) -> Tensor:
        """Take tokens through the layers, on a CPU past the modules; `extents` and `end` as in `rotary_tables`."""
        has_gradient = torch.is_grad_enabled()
        # a process that holds a part of each weight gathers them module by module
        is_whole = len(self.model.norm.weight) == self.cfg.width
        if x.device.type != "cpu" or has_gradient or torch.is_autocast_enabled("cpu") or not is_whole:
            return self.model(x, positions, extents, attend, end=end)
        if cache.layers is None:
            cache.layers = [cast(DecoderLayer, layer).plain() for layer in self.model.layers]
        turn = self.model.turn(*rotary_tables(self.cfg, positions, extents, end))
        return pass_through(cache.layers, x, turn, attend, self.cfg.head_dim, self.cfg.norm_eps)

    def _refill(self, outgrown: list[int], cache: KVCache, hidden: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Fill rows that have outgrown the original window again, all of their tokens; replace their hidden states."""
        if not outgrown:
            return hidden
        chosen = torch.tensor(outgrown, device=hidden.device)
        lengths: list[int] = cache.lengths[chosen].tolist()
        inputs = torch.cat([cache.kept_inputs(row, length) for row, length in zip(outgrown, lengths, strict=True)])
        cu_seqlens = torch.tensor([0, *lengths], device=hidden.device).cumsum(0).int()
        rows = torch.repeat_interleave(chosen, cache.lengths[chosen])
        positions = document_positions(cu_seqlens, len(inputs))
        attend = self._attend_fresh(rows, positions, cu_seqlens, cache)
        x = self._run(inputs, positions, cache.lengths[rows], attend, cache.longest, cache)
        return hidden.index_copy(0, chosen, self.model.norm(x[cu_seqlens[1:].long() - 1]).to(hidden.dtype))

    def _attend_fresh(self, rows: Tensor, positions: Tensor, cu_seqlens: Tensor, cache: KVCache) -> Attend:
        """Write from position 0 on, over whatever is there; the new tokens see only each other."""
        plan = plan_packing(cu_seqlens)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer, rows, positions, k, v)
            return packed_attention(q, k, v, cu_seqlens, window=self.cfg.sliding_window, plan=plan)

        return attend

    def _attend_continued(
        self, rows: Tensor, offsets: Tensor, positions: Tensor, longest_new: int, end: int, cache: KVCache
    ) -> Attend:
        """Write behind what the rows hold; the new tokens see both. Queries are padded to [b, longest_new]."""
        padded_positions = torch.full((cache.batch, longest_new), -1, device=rows.device)
        padded_positions[rows, offsets] = positions
        seen = torch.arange(end, device=rows.device)
        # a padded query sees key 0, for a row without any key would come out as NaN
        mask = seen <= padded_positions.clamp(min=0)[:, :, None]
        if self.cfg.sliding_window is not None:
            mask &= seen > padded_positions[:, :, None] - self.cfg.sliding_window

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.write(layer, rows, positions, k, v)
            keys, values = cache.read(layer, 0, end)
            padded = q.new_zeros((cache.batch, longest_new, *q.shape[1:]))
            padded[rows, offsets] = q
            mixed = attention(padded, keys.transpose(1, 2), values.transpose(1, 2), mask=mask)
            return mixed[rows, offsets]

        return attend
