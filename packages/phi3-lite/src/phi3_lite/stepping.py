"""Tokens behind what a cache holds: prompts, steps of one token a row, and rows that are filled again.

On a CPU without gradients past the modules (`decoding`), few tokens by one call for all layers where a kernel can.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from fused_kernels import (
    DecoderStack,
    attention,
    cached_attention,
    decode_tokens,
    decoder_layers,
    packed_attention,
    plan_packing,
)

from .cache import KVCache
from .decoding import Attend, PlainLayers, pass_through
from .documents import document_lengths, document_positions
from .rope import kept_tables, rotary_tables

if TYPE_CHECKING:
    from .model import Phi3


def _as_bias(is_hidden: Tensor, like: Tensor) -> Tensor:
    """0 where a key is seen, -inf where not."""
    return torch.zeros(is_hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(is_hidden, -torch.inf)


def prefill(
    model: "Phi3", inputs: Float[Tensor, "t d"], cu_seqlens: Int32[Tensor, " bounds"], cache: KVCache
) -> Float[Tensor, "b d"]:
    """As `Phi3.prefill`."""
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
    if cache.shortest == cache.longest and min(lengths) == max(lengths) and model.cfg.long_rope is None:
        return _prefill_evenly(model, inputs, cu_seqlens, lengths[0], cache)
    counts = cu_seqlens.diff().long()
    rows = torch.repeat_interleave(cache.rows, counts)
    offsets = document_positions(cu_seqlens, inputs.shape[0])
    positions = cache.lengths[rows] + offsets
    totals = cache.lengths + counts
    outgrowing = cache.outgrowing(counts)
    longest = int(totals.max()) if cache.longest else max(lengths)
    cache.reserve(longest)
    cache.keep_inputs(rows, positions, inputs)
    if cache.longest == 0:
        attend = partial(_attend_fresh, model, rows, positions, cu_seqlens, cache)
    else:
        attend = partial(_attend_continued, model, rows, offsets, positions, max(lengths), longest, cache)
    last = cu_seqlens[1:].long() - 1
    hidden = _run(model, inputs, rows, positions, totals[rows], longest, cache, attend, last)
    cache.advance(counts)
    return _refill(model, outgrowing, cache, hidden)


def _prefill_evenly(model: "Phi3", inputs: Tensor, cu_seqlens: Tensor, num_new: int, cache: KVCache) -> Tensor:
    """Append as many tokens to each of rows of one length, as one prompt always is: by copies, without indices."""
    window, batch, start, end = model.cfg.sliding_window, cache.batch, cache.longest, cache.longest + num_new
    cache.reserve(end)
    places = torch.arange(start, end, device=inputs.device)
    rows = cache.rows.repeat_interleave(num_new)

    def make_attend() -> Attend:
        plan, bias = None, None
        if start == 0:
            plan = plan_packing(cu_seqlens)
        else:
            seen = torch.arange(end, device=inputs.device)
            is_hidden = seen > places[:, None]
            if window is not None:
                is_hidden |= seen <= places[:, None] - window
            bias = _as_bias(is_hidden, inputs).expand(batch, num_new, end)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.extend(layer, k.view(batch, num_new, *k.shape[1:]), v.view(batch, num_new, *v.shape[1:]))
            if plan is not None:
                return packed_attention(q, k, v, cu_seqlens, window=window, plan=plan)
            keys, values = cache.read(layer, 0, end)
            return cached_attention(q.view(batch, num_new, *q.shape[1:]), keys, values, bias=bias).flatten(0, 1)

        return attend

    last = cu_seqlens[1:].long() - 1
    hidden = _run(model, inputs, rows, places.repeat(batch), None, end, cache, make_attend, last)
    cache.advance(num_new)
    return hidden


def step(model: "Phi3", inputs: Float[Tensor, "b d"], cache: KVCache) -> Float[Tensor, "b d"]:
    """As `Phi3.step`."""
    positions = cache.lengths
    end = cache.longest + 1
    outgrowing = cache.outgrowing(1)
    cache.reserve(end)
    if cache.keeps_inputs:
        cache.keep_inputs(cache.rows, positions, inputs)
    extents = None if model.cfg.long_rope is None else positions + 1
    attend = partial(_attend_next, model, positions, end, cache)
    hidden = _run(model, inputs, cache.rows, positions, extents, end, cache, attend)
    cache.advance(1)
    return _refill(model, outgrowing, cache, hidden)


def next_logits(
    model: "Phi3", tokens: Int[Tensor, " b"], cache: KVCache
) -> tuple[Float[Tensor, "b v"], Int[Tensor, " b"] | None]:
    """As `Phi3.next_logits`."""
    layers = _plain_layers(model, tokens.device, cache)
    stack = _stack_for(layers, len(tokens), cache)
    if layers is None or layers.ends is None or stack is None or model.cfg.long_rope is not None:
        return model.logits(step(model, model.embed(tokens), cache)), None
    end = cache.longest + 1
    cache.reserve(end)
    tables = kept_tables(model.cfg, end, tokens.device)
    found = decode_tokens(tokens, stack, layers.ends, cache.held, *tables, cache.lengths)
    cache.count_up()
    return found


def _run(
    model: "Phi3",
    x: Tensor,
    rows: Tensor,
    positions: Tensor,
    extents: Tensor | None,
    end: int,
    cache: KVCache,
    make_attend: Callable[[], Attend],
    chosen: Tensor | None = None,
) -> Tensor:
    """Take tokens through the layers, on a CPU past the modules, and those `chosen` (None: all) through the norm.

    `extents` and `end` as in `rotary_tables`.
    """
    layers = _plain_layers(model, x.device, cache)
    if layers is None:
        x = model.model(x, positions, extents, make_attend(), end=end)
        return model.model.norm(x if chosen is None else x[chosen])
    stack = _stack_for(layers, len(x), cache)
    if stack is not None:
        if model.cfg.long_rope is None:
            tables, angles = kept_tables(model.cfg, end, x.device), positions
        else:
            tables, angles = rotary_tables(model.cfg, positions, extents), torch.arange(len(x))
        hidden = decoder_layers(x, stack, cache.held, *tables, angles, rows, positions)
        return hidden if chosen is None else hidden[chosen]
    turn = model.model.turn(*rotary_tables(model.cfg, positions, extents, end))
    x = pass_through(layers.one_by_one, x, turn, make_attend(), model.cfg.head_dim, model.cfg.norm_eps)
    return model.model.norm(x if chosen is None else x[chosen])


def _plain_layers(model: "Phi3", device: torch.device, cache: KVCache) -> PlainLayers | None:
    """Return what is called on a CPU in place of the modules; None where these are."""
    if device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    # a process that holds a part of each weight gathers them module by module; small ones, as norms, it may hold whole
    if cache.layers is None and all(weight.numel() for weight in model.model.layers[0].parameters()):
        cache.layers = model.plain_layers()
    return cache.layers


def _stack_for(layers: PlainLayers | None, num_tokens: int, cache: KVCache) -> DecoderStack | None:
    """Return the layers for one call; None where a kernel takes not so many tokens, or no cache of this dtype."""
    stack = None if layers is None else layers.stack
    if stack is None or num_tokens > stack.most_tokens or cache.held.kind != stack.kind:
        return None
    return stack


def _refill(model: "Phi3", outgrown: list[int], cache: KVCache, hidden: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Fill rows that have outgrown the original window again, all of their tokens; replace their hidden states."""
    if not outgrown:
        return hidden
    chosen = torch.tensor(outgrown, device=hidden.device)
    lengths: list[int] = cache.lengths[chosen].tolist()
    inputs = torch.cat([cache.kept_inputs(row, length) for row, length in zip(outgrown, lengths, strict=True)])
    cu_seqlens = torch.tensor([0, *lengths], device=hidden.device).cumsum(0).int()
    rows = torch.repeat_interleave(chosen, cache.lengths[chosen])
    positions = document_positions(cu_seqlens, len(inputs))
    attend = partial(_attend_fresh, model, rows, positions, cu_seqlens, cache)
    last = cu_seqlens[1:].long() - 1
    filled = _run(model, inputs, rows, positions, cache.lengths[rows], cache.longest, cache, attend, last)
    return hidden.index_copy(0, chosen, filled.to(hidden.dtype))


def _attend_next(model: "Phi3", positions: Tensor, end: int, cache: KVCache) -> Attend:
    """Write one token behind what each row holds; it sees both."""
    window = model.cfg.sliding_window
    first = 0 if window is None else max(0, cache.shortest + 1 - window)
    bias = None
    # rows of one length all see first … end − 1, window or not
    if cache.shortest != cache.longest:
        seen = torch.arange(first, end, device=positions.device)
        is_hidden = seen > positions[:, None]
        if window is not None:
            is_hidden |= seen <= positions[:, None] - window
        bias = _as_bias(is_hidden, model.model.norm.weight)[:, None]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.append(layer, k, v)
        keys, values = cache.read(layer, first, end)
        return cached_attention(q[:, None], keys, values, bias=bias)[:, 0]

    return attend


def _attend_fresh(model: "Phi3", rows: Tensor, positions: Tensor, cu_seqlens: Tensor, cache: KVCache) -> Attend:
    """Write from position 0 on, over whatever is there; the new tokens see only each other."""
    plan = plan_packing(cu_seqlens)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer, rows, positions, k, v)
        return packed_attention(q, k, v, cu_seqlens, window=model.cfg.sliding_window, plan=plan)

    return attend


def _attend_continued(
    model: "Phi3", rows: Tensor, offsets: Tensor, positions: Tensor, longest_new: int, end: int, cache: KVCache
) -> Attend:
    """Write behind what the rows hold; the new tokens see both. Queries are padded to [b, longest_new]."""
    padded_positions = torch.full((cache.batch, longest_new), -1, device=rows.device)
    padded_positions[rows, offsets] = positions
    seen = torch.arange(end, device=rows.device)
    # a padded query sees key 0, for a row without any key would come out as NaN
    mask = seen <= padded_positions.clamp(min=0)[:, :, None]
    if model.cfg.sliding_window is not None:
        mask &= seen > padded_positions[:, :, None] - model.cfg.sliding_window

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.write(layer, rows, positions, k, v)
        keys, values = cache.read(layer, 0, end)
        padded = q.new_zeros((cache.batch, longest_new, *q.shape[1:]))
        padded[rows, offsets] = q
        mixed = attention(padded, keys.transpose(1, 2), values.transpose(1, 2), mask=mask)
        return mixed[rows, offsets]

    return attend
