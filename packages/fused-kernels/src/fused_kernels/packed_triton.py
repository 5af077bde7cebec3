"""Attention over packed documents in Triton: causal or not, sliding window, grouped queries.

Tiles are cut from the pack as it lies, without regard to documents: for each token the bounds of its document are
given, int32[t], and with them the interval of keys that a query sees (`attention_triton`),

    causal           start_i = bound_i                          stop_i = i + 1
    with a window    start_i = max(bound_i, i - window + 1)     stop_i = i + 1
    bidirectional    start_i = bound_i                          stop_i = end_i

A tile reads the keys from the first of its starts to the last of its stops. So there is one program for each tile and
head, however many documents and however long: no padding, no table of tiles, and nothing that the host must know.

Layout: q [t, h, k], k and v [t, g, k], any strides over tokens and heads; query head i uses key head i // (h / g). bf16
or fp16 (fp32 for tests), sums in fp32. The gradient of q is one kernel, those of k and v, summed over the heads of a
group in one program, another: nothing is added atomically, so a run repeats bit for bit.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_triton import (
    LOG2_E,
    add_key_gradients,
    add_query_gradient,
    attend,
    delta_of,
    load_rows,
    parts,
    rows_of_channels,
    scale_or_default,
    start_attending,
    store_attended,
    store_rows,
    tiles_for,
    zeros_of,
)
from .dispatch import apply, once
from .triton_parts import launch, num_blocks_of


@triton.jit
@no_type_check
def _query_interval(bound_ptr, end_ptr, query, window, is_causal: tl.constexpr, has_window: tl.constexpr):
    """Return the first key that each of these queries sees, and the one after the last."""
    start = tl.load(bound_ptr + query)
    if is_causal:
        stop = query + 1
        if has_window:
            start = tl.maximum(start, query - window + 1)
    else:
        stop = tl.load(end_ptr + query)
    return start, stop


@triton.jit
@no_type_check
def _key_interval(bound_ptr, end_ptr, key, window, is_causal: tl.constexpr, has_window: tl.constexpr):
    """Return the first query that sees each of these keys, and the one after the last."""
    stop = tl.load(end_ptr + key)
    if is_causal:
        start = key
        if has_window:
            stop = tl.minimum(stop, key + window)
    else:
        start = tl.load(bound_ptr + key)
    return start, stop


@triton.jit
@no_type_check
def _loops(start, start_of_last, stop_of_first, stop, block: tl.constexpr):
    """Part start … stop into the whole blocks that all of a tile see, and what is before and after them."""
    whole = start + tl.cdiv(start_of_last - start, block) * block
    after = whole + tl.maximum(stop_of_first - whole, 0) // block * block
    return tl.minimum(whole, stop), tl.minimum(after, stop)


@triton.jit
@no_type_check
def _keys_of_tile(
    bound_ptr, end_ptr, query, first, last, window,
    is_causal: tl.constexpr, has_window: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    """Return what each of these queries sees, and where the tile's masked, whole and masked blocks begin and end."""
    # Rows beyond the pack do as the last one; they are not stored.
    start, stop = _query_interval(bound_ptr, end_ptr, tl.minimum(query, last), window, is_causal, has_window)
    low, stop_of_first = _query_interval(bound_ptr, end_ptr, first, window, is_causal, has_window)
    start_of_last, high = _query_interval(bound_ptr, end_ptr, last, window, is_causal, has_window)
    whole, after = _loops(low, start_of_last, stop_of_first, high, block_k)
    return start, stop, low, whole, after, high


@triton.jit
@no_type_check
def _packed_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, log_total_ptr, bound_ptr, end_ptr, num_tokens, group, scale, window,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, out_stride,
    is_causal: tl.constexpr, has_window: tl.constexpr,
    head_dim: tl.constexpr, main: tl.constexpr, rest: tl.constexpr, block_q: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    # The last tiles first: of a long document they are the longest work.
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * block_q
    last = tl.minimum(first + block_q, num_tokens) - 1
    query = first + tl.arange(0, block_q)
    is_query = query <= last
    q_ptr += head * q_head_stride
    k_ptr += head // group * k_head_stride
    v_ptr += head // group * v_head_stride
    q, q_rest = load_rows(q_ptr, query, is_query, q_stride, head_dim, main, rest, True)
    start, stop, low, whole, after, high = _keys_of_tile(
        bound_ptr, end_ptr, query, first, last, window, is_causal, has_window, block_k
    )
    highest, total, out, out_rest = start_attending(block_q, main, rest)
    highest, total, out, out_rest = attend(
        q, q_rest, k_ptr, v_ptr, k_stride, v_stride, None, start, stop, low, whole, scale,
        highest, total, out, out_rest, head_dim, main, rest, block_k, True, False,
    )  # fmt: skip
    highest, total, out, out_rest = attend(
        q, q_rest, k_ptr, v_ptr, k_stride, v_stride, None, start, stop, whole, after, scale,
        highest, total, out, out_rest, head_dim, main, rest, block_k, False, False,
    )  # fmt: skip
    highest, total, out, out_rest = attend(
        q, q_rest, k_ptr, v_ptr, k_stride, v_stride, None, start, stop, after, high, scale,
        highest, total, out, out_rest, head_dim, main, rest, block_k, True, False,
    )  # fmt: skip
    store_attended(
        out_ptr + head * head_dim, log_total_ptr + head * num_tokens, query, is_query, out_stride,
        highest, total, out, out_rest, head_dim, main, rest,
    )  # fmt: skip


@triton.jit
@no_type_check
def _packed_query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, log_total_ptr, delta_ptr, grad_q_ptr, bound_ptr, end_ptr,
    num_tokens, group, scale, log2_scale, window,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, out_stride,
    is_causal: tl.constexpr, has_window: tl.constexpr,
    head_dim: tl.constexpr, main: tl.constexpr, rest: tl.constexpr, block_q: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    # The last tiles first: of a long document they are the longest work.
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * block_q
    last = tl.minimum(first + block_q, num_tokens) - 1
    query = first + tl.arange(0, block_q)
    is_query = query <= last
    q_ptr += head * q_head_stride
    k_ptr += head // group * k_head_stride
    v_ptr += head // group * v_head_stride
    q, q_rest = load_rows(q_ptr, query, is_query, q_stride, head_dim, main, rest, True)
    grad, grad_rest = load_rows(grad_ptr + head * head_dim, query, is_query, out_stride, head_dim, main, rest, True)
    log_total = tl.load(log_total_ptr + head * num_tokens + query, mask=is_query, other=0.0)
    delta = delta_of(out_ptr + head * head_dim, grad, grad_rest, query, is_query, out_stride, head_dim, main, rest)
    tl.store(delta_ptr + head * num_tokens + query, delta, mask=is_query)
    start, stop, low, whole, after, high = _keys_of_tile(
        bound_ptr, end_ptr, query, first, last, window, is_causal, has_window, block_k
    )
    grad_q, grad_q_rest = zeros_of(block_q, main, rest)
    grad_q, grad_q_rest = add_query_gradient(
        q, q_rest, grad, grad_rest, log_total, delta, k_ptr, v_ptr, k_stride, v_stride, None, start, stop, low, whole,
        log2_scale, grad_q, grad_q_rest, head_dim, main, rest, block_k, True, False,
    )  # fmt: skip
    grad_q, grad_q_rest = add_query_gradient(
        q, q_rest, grad, grad_rest, log_total, delta, k_ptr, v_ptr, k_stride, v_stride, None, start, stop, whole, after,
        log2_scale, grad_q, grad_q_rest, head_dim, main, rest, block_k, False, False,
    )  # fmt: skip
    grad_q, grad_q_rest = add_query_gradient(
        q, q_rest, grad, grad_rest, log_total, delta, k_ptr, v_ptr, k_stride, v_stride, None, start, stop, after, high,
        log2_scale, grad_q, grad_q_rest, head_dim, main, rest, block_k, True, False,
    )  # fmt: skip
    grad_q_ptr += head * head_dim
    store_rows(grad_q_ptr, query, is_query, out_stride, grad_q * scale, grad_q_rest * scale, head_dim, main, rest)


@triton.jit
@no_type_check
def _packed_key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, log_total_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, bound_ptr, end_ptr,
    num_tokens, group, scale, log2_scale, window,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, grad_stride, out_stride,
    is_causal: tl.constexpr, has_window: tl.constexpr,
    head_dim: tl.constexpr, main: tl.constexpr, rest: tl.constexpr, block_q: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * block_k
    last = tl.minimum(first + block_k, num_tokens) - 1
    key = first + tl.arange(0, block_k)
    is_key = key <= last
    k_ptr += kv_head * k_head_stride
    v_ptr += kv_head * v_head_stride
    k, k_rest = load_rows(k_ptr, key, is_key, k_stride, head_dim, main, rest, True)
    v, v_rest = load_rows(v_ptr, key, is_key, v_stride, head_dim, main, rest, True)
    start, stop = _key_interval(bound_ptr, end_ptr, tl.minimum(key, last), window, is_causal, has_window)
    low, stop_of_first = _key_interval(bound_ptr, end_ptr, first, window, is_causal, has_window)
    start_of_last, high = _key_interval(bound_ptr, end_ptr, last, window, is_causal, has_window)
    whole, after = _loops(low, start_of_last, stop_of_first, high, block_q)
    grad_k, grad_k_rest = zeros_of(block_k, main, rest)
    grad_v, grad_v_rest = zeros_of(block_k, main, rest)
    for head in range(kv_head * group, (kv_head + 1) * group):
        q_head_ptr = q_ptr + head * q_head_stride
        grad_head_ptr = grad_ptr + head * head_dim
        log_total_head_ptr = log_total_ptr + head * num_tokens
        delta_head_ptr = delta_ptr + head * num_tokens
        grad_k, grad_k_rest, grad_v, grad_v_rest = add_key_gradients(
            k, k_rest, v, v_rest, q_head_ptr, grad_head_ptr, log_total_head_ptr, delta_head_ptr, q_stride, grad_stride,
            start, stop, low, whole, log2_scale, grad_k, grad_k_rest, grad_v, grad_v_rest,
            head_dim, main, rest, block_q, True,
        )  # fmt: skip
        grad_k, grad_k_rest, grad_v, grad_v_rest = add_key_gradients(
            k, k_rest, v, v_rest, q_head_ptr, grad_head_ptr, log_total_head_ptr, delta_head_ptr, q_stride, grad_stride,
            start, stop, whole, after, log2_scale, grad_k, grad_k_rest, grad_v, grad_v_rest,
            head_dim, main, rest, block_q, False,
        )  # fmt: skip
        grad_k, grad_k_rest, grad_v, grad_v_rest = add_key_gradients(
            k, k_rest, v, v_rest, q_head_ptr, grad_head_ptr, log_total_head_ptr, delta_head_ptr, q_stride, grad_stride,
            start, stop, after, high, log2_scale, grad_k, grad_k_rest, grad_v, grad_v_rest,
            head_dim, main, rest, block_q, True,
        )  # fmt: skip
    grad_k_ptr += kv_head * head_dim
    grad_v_ptr += kv_head * head_dim
    store_rows(grad_k_ptr, key, is_key, out_stride, grad_k * scale, grad_k_rest * scale, head_dim, main, rest)
    store_rows(grad_v_ptr, key, is_key, out_stride, grad_v, grad_v_rest, head_dim, main, rest)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bounds: Tensor,
        ends: Tensor,
        is_causal: bool,
        window: int | None,
        scale: float,
    ) -> Tensor:
        q, k, v = rows_of_channels(q, k, v)
        num_tokens, num_heads, head_dim = q.shape
        tile = tiles_for(q).forward
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        log_total = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q.device)
        launch(
            _packed_forward_kernel, (num_heads, num_blocks_of(num_tokens, tile.block_q)),
            q, k, v, out, log_total, bounds, ends, num_tokens, num_heads // k.shape[1], scale * LOG2_E, window or 0,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], out.stride(0),
            is_causal=is_causal, has_window=window is not None, **parts(head_dim), **tile._asdict(),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, log_total, bounds, ends)
        ctx.is_causal, ctx.window, ctx.scale = is_causal, window, scale
        return out

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_total, bounds, ends = ctx.saved_tensors
        _, query_tile, key_tile = tiles_for(q)
        grad = grad_outputs[0].contiguous()
        num_tokens, num_heads, head_dim = q.shape
        delta = torch.empty_like(log_total)
        grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        scalars = num_tokens, num_heads // k.shape[1], ctx.scale, ctx.scale * LOG2_E, ctx.window or 0
        strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2]
        rules = {"is_causal": ctx.is_causal, "has_window": ctx.window is not None, **parts(head_dim)}
        launch(
            _packed_query_gradient_kernel, (num_heads, num_blocks_of(num_tokens, query_tile.block_q)),
            q, k, v, out, grad, log_total, delta, grad_q, bounds, ends, *scalars, *strides, out.stride(0),
            **rules, **query_tile._asdict(),
        )  # fmt: skip
        launch(
            _packed_key_gradient_kernel, (k.shape[1], num_blocks_of(num_tokens, key_tile.block_k)),
            q, k, v, grad, log_total, delta, grad_k, grad_v, bounds, ends, *scalars, *strides,
            grad.stride(0), grad_k.stride(0), **rules, **key_tile._asdict(),
        )  # fmt: skip
        return grad_q, grad_k, grad_v, None, None, None, None, None


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    ends: Tensor,
    *,
    is_causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """Attend inside documents; `bounds` and `ends`, int32[t]: for each token where its document starts and ends."""
    return apply(_PackedAttention, q, k, v, bounds, ends, is_causal, window, scale_or_default(q, scale))
