"""Bidirectional attention over a batch in Triton, to one set of keys or to two that are not joined in memory.

The vision tower attends within an image; the resampler's latents attend to an image's features and to themselves,

    out = softmax(q [K ; K']ᵀ scale) [V ; V']

with a mask on the first set, True = attend. A program goes through one set, then through the other, with the same
running maximum and sum; ∂k and ∂v of the sets are two launches of the same kernel.

Layout: q [b, t, h, k], sets [b, s, g, k] and [b, s', g, k], any strides over all but channels; query head i uses key
head i // (h / g); mask bytes [b, s]. bf16 or fp16 (fp32 for tests), sums in fp32. A query that sees no key gives zeros.
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
def _attend_to_all(
    q, q_rest, k_ptr, v_ptr, k_stride, v_stride, mask_ptr, num_keys, scale, highest, total, out, out_rest,
    head_dim: tl.constexpr, main: tl.constexpr, rest: tl.constexpr, block_k: tl.constexpr, has_mask: tl.constexpr,
):  # fmt: skip
    """Let a tile of queries attend to one set of keys."""
    start = tl.zeros((q.shape[0],), dtype=tl.int32)
    stop = start + num_keys
    whole = 0 if has_mask else num_keys // block_k * block_k
    highest, total, out, out_rest = attend(
        q, q_rest, k_ptr, v_ptr, k_stride, v_stride, None, start, stop, 0, whole, scale,
        highest, total, out, out_rest, head_dim, main, rest, block_k, False, False,
    )  # fmt: skip
    return attend(
        q, q_rest, k_ptr, v_ptr, k_stride, v_stride, mask_ptr, start, stop, whole, num_keys, scale,
        highest, total, out, out_rest, head_dim, main, rest, block_k, True, has_mask,
    )  # fmt: skip


@triton.jit
@no_type_check
def _add_gradient_of_all(
    q, q_rest, grad, grad_rest, log_total, delta, k_ptr, v_ptr, k_stride, v_stride, mask_ptr, num_keys, scale,
    grad_q, grad_q_rest,
    head_dim: tl.constexpr, main: tl.constexpr, rest: tl.constexpr, block_k: tl.constexpr, has_mask: tl.constexpr,
):  # fmt: skip
    """Add to ∂q / scale of a tile what comes from one set of keys."""
    start = tl.zeros((q.shape[0],), dtype=tl.int32)
    stop = start + num_keys
    whole = 0 if has_mask else num_keys // block_k * block_k
    grad_q, grad_q_rest = add_query_gradient(
        q, q_rest, grad, grad_rest, log_total, delta, k_ptr, v_ptr, k_stride, v_stride, None, start, stop, 0, whole,
        scale, grad_q, grad_q_rest, head_dim, main, rest, block_k, False, False,
    )  # fmt: skip
    return add_query_gradient(
        q, q_rest, grad, grad_rest, log_total, delta, k_ptr, v_ptr, k_stride, v_stride, mask_ptr, start, stop,
        whole, num_keys, scale, grad_q, grad_q_rest, head_dim, main, rest, block_k, True, has_mask,
    )  # fmt: skip


@triton.jit
@no_type_check
def _dense_forward_kernel(
    q_ptr, k_ptr, v_ptr, more_k_ptr, more_v_ptr, mask_ptr, out_ptr, log_total_ptr,
    num_heads, group, num_queries, num_keys, num_more, scale,
    q_batch_stride, q_stride, q_head_stride, k_batch_stride, k_stride, k_head_stride,
    v_batch_stride, v_stride, v_head_stride, more_k_batch_stride, more_k_stride, more_k_head_stride,
    more_v_batch_stride, more_v_stride, more_v_head_stride, out_stride,
    has_more: tl.constexpr, has_mask: tl.constexpr,
    head_dim: tl.constexpr, main: tl.constexpr, rest: tl.constexpr, block_q: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // num_heads, batch_head % num_heads
    kv_head = head // group
    query = tl.program_id(0) * block_q + tl.arange(0, block_q)
    is_query = query < num_queries
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + kv_head * k_head_stride
    v_ptr += batch * v_batch_stride + kv_head * v_head_stride
    out_ptr += batch * num_queries * out_stride + head * head_dim
    if has_mask:
        mask_ptr += batch * num_keys
    q, q_rest = load_rows(q_ptr, query, is_query, q_stride, head_dim, main, rest, True)
    highest, total, out, out_rest = start_attending(block_q, main, rest)
    highest, total, out, out_rest = _attend_to_all(
        q, q_rest, k_ptr, v_ptr, k_stride, v_stride, mask_ptr, num_keys, scale, highest, total, out, out_rest,
        head_dim, main, rest, block_k, has_mask,
    )  # fmt: skip
    if has_more:
        more_k_ptr += batch * more_k_batch_stride + kv_head * more_k_head_stride
        more_v_ptr += batch * more_v_batch_stride + kv_head * more_v_head_stride
        highest, total, out, out_rest = _attend_to_all(
            q, q_rest, more_k_ptr, more_v_ptr, more_k_stride, more_v_stride, None, num_more, scale,
            highest, total, out, out_rest, head_dim, main, rest, block_k, False,
        )  # fmt: skip
    store_attended(
        out_ptr, log_total_ptr + batch_head * num_queries, query, is_query, out_stride,
        highest, total, out, out_rest, head_dim, main, rest,
    )  # fmt: skip


@triton.jit
@no_type_check
def _dense_query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, more_k_ptr, more_v_ptr, mask_ptr, out_ptr, grad_ptr, log_total_ptr, delta_ptr, grad_q_ptr,
    num_heads, group, num_queries, num_keys, num_more, scale, log2_scale,
    q_batch_stride, q_stride, q_head_stride, k_batch_stride, k_stride, k_head_stride,
    v_batch_stride, v_stride, v_head_stride, more_k_batch_stride, more_k_stride, more_k_head_stride,
    more_v_batch_stride, more_v_stride, more_v_head_stride, out_stride,
    has_more: tl.constexpr, has_mask: tl.constexpr,
    head_dim: tl.constexpr, main: tl.constexpr, rest: tl.constexpr, block_q: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    batch_head = tl.program_id(1).to(tl.int64)
    batch, head = batch_head // num_heads, batch_head % num_heads
    kv_head = head // group
    query = tl.program_id(0) * block_q + tl.arange(0, block_q)
    is_query = query < num_queries
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + kv_head * k_head_stride
    v_ptr += batch * v_batch_stride + kv_head * v_head_stride
    # The result, its gradient and that of the queries lie alike.
    place = batch * num_queries * out_stride + head * head_dim
    if has_mask:
        mask_ptr += batch * num_keys
    q, q_rest = load_rows(q_ptr, query, is_query, q_stride, head_dim, main, rest, True)
    grad, grad_rest = load_rows(grad_ptr + place, query, is_query, out_stride, head_dim, main, rest, True)
    log_total = tl.load(log_total_ptr + batch_head * num_queries + query, mask=is_query, other=0.0)
    delta = delta_of(out_ptr + place, grad, grad_rest, query, is_query, out_stride, head_dim, main, rest)
    tl.store(delta_ptr + batch_head * num_queries + query, delta, mask=is_query)
    grad_q, grad_q_rest = zeros_of(block_q, main, rest)
    grad_q, grad_q_rest = _add_gradient_of_all(
        q, q_rest, grad, grad_rest, log_total, delta, k_ptr, v_ptr, k_stride, v_stride, mask_ptr, num_keys, log2_scale,
        grad_q, grad_q_rest, head_dim, main, rest, block_k, has_mask,
    )  # fmt: skip
    if has_more:
        more_k_ptr += batch * more_k_batch_stride + kv_head * more_k_head_stride
        more_v_ptr += batch * more_v_batch_stride + kv_head * more_v_head_stride
        grad_q, grad_q_rest = _add_gradient_of_all(
            q, q_rest, grad, grad_rest, log_total, delta, more_k_ptr, more_v_ptr, more_k_stride, more_v_stride, None,
            num_more, log2_scale, grad_q, grad_q_rest, head_dim, main, rest, block_k, False,
        )  # fmt: skip
    grad_q_ptr += place
    store_rows(grad_q_ptr, query, is_query, out_stride, grad_q * scale, grad_q_rest * scale, head_dim, main, rest)


@triton.jit
@no_type_check
def _dense_key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, grad_ptr, log_total_ptr, delta_ptr, grad_k_ptr, grad_v_ptr,
    num_heads, group, num_queries, num_keys, scale, log2_scale,
    q_batch_stride, q_stride, q_head_stride, k_batch_stride, k_stride, k_head_stride,
    v_batch_stride, v_stride, v_head_stride, grad_stride, out_stride,
    has_mask: tl.constexpr,
    head_dim: tl.constexpr, main: tl.constexpr, rest: tl.constexpr, block_q: tl.constexpr, block_k: tl.constexpr,
):  # fmt: skip
    num_kv_heads = num_heads // group
    batch_head = tl.program_id(1).to(tl.int64)
    batch, kv_head = batch_head // num_kv_heads, batch_head % num_kv_heads
    key = tl.program_id(0) * block_k + tl.arange(0, block_k)
    is_key = key < num_keys
    q_ptr += batch * q_batch_stride
    k_ptr += batch * k_batch_stride + kv_head * k_head_stride
    v_ptr += batch * v_batch_stride + kv_head * v_head_stride
    grad_ptr += batch * num_queries * grad_stride
    k, k_rest = load_rows(k_ptr, key, is_key, k_stride, head_dim, main, rest, True)
    v, v_rest = load_rows(v_ptr, key, is_key, v_stride, head_dim, main, rest, True)
    start = tl.zeros((block_k,), dtype=tl.int32)
    stop = start + num_queries
    whole = num_queries // block_q * block_q
    if has_mask:
        # A masked key is seen by an empty interval of queries.
        is_seen = tl.load(mask_ptr + batch * num_keys + key, mask=is_key, other=0) != 0
        stop = tl.where(is_seen, stop, 0)
        whole = 0
    grad_k, grad_k_rest = zeros_of(block_k, main, rest)
    grad_v, grad_v_rest = zeros_of(block_k, main, rest)
    for head in range(kv_head * group, (kv_head + 1) * group):
        q_head_ptr = q_ptr + head * q_head_stride
        grad_head_ptr = grad_ptr + head * head_dim
        log_total_head_ptr = log_total_ptr + (batch * num_heads + head) * num_queries
        delta_head_ptr = delta_ptr + (batch * num_heads + head) * num_queries
        grad_k, grad_k_rest, grad_v, grad_v_rest = add_key_gradients(
            k, k_rest, v, v_rest, q_head_ptr, grad_head_ptr, log_total_head_ptr, delta_head_ptr, q_stride, grad_stride,
            start, stop, 0, whole, log2_scale, grad_k, grad_k_rest, grad_v, grad_v_rest,
            head_dim, main, rest, block_q, False,
        )  # fmt: skip
        grad_k, grad_k_rest, grad_v, grad_v_rest = add_key_gradients(
            k, k_rest, v, v_rest, q_head_ptr, grad_head_ptr, log_total_head_ptr, delta_head_ptr, q_stride, grad_stride,
            start, stop, whole, num_queries, log2_scale, grad_k, grad_k_rest, grad_v, grad_v_rest,
            head_dim, main, rest, block_q, True,
        )  # fmt: skip
    grad_k_ptr += batch * num_keys * out_stride + kv_head * head_dim
    grad_v_ptr += batch * num_keys * out_stride + kv_head * head_dim
    store_rows(grad_k_ptr, key, is_key, out_stride, grad_k * scale, grad_k_rest * scale, head_dim, main, rest)
    store_rows(grad_v_ptr, key, is_key, out_stride, grad_v, grad_v_rest, head_dim, main, rest)


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in ((0, 0, 0) if x is None else x.stride()[:3]))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        more_k: Tensor | None,
        more_v: Tensor | None,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor:
        q, k, v = rows_of_channels(q, k, v)
        num_more = 0
        if more_k is not None and more_v is not None:
            more_k, more_v = rows_of_channels(more_k, more_v)
            num_more = more_k.shape[1]
        mask = None if mask is None else mask.contiguous().view(torch.uint8)
        batch, num_queries, num_heads, head_dim = q.shape
        tile = tiles_for(q).forward
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        log_total = torch.empty(batch, num_heads, num_queries, dtype=torch.float32, device=q.device)
        launch(
            _dense_forward_kernel, (num_blocks_of(num_queries, tile.block_q), batch * num_heads),
            q, k, v, more_k, more_v, mask, out, log_total,
            num_heads, num_heads // k.shape[2], num_queries, k.shape[1], num_more, scale * LOG2_E,
            *_strides(q, k, v, more_k, more_v), num_heads * head_dim,
            has_more=more_k is not None, has_mask=mask is not None, **parts(head_dim), **tile._asdict(),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, more_k, more_v, mask, out, log_total)
        ctx.scale = scale
        return out

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, more_k, more_v, mask, out, log_total = ctx.saved_tensors
        _, query_tile, key_tile = tiles_for(q)
        grad = grad_outputs[0].contiguous()
        batch, num_queries, num_heads, head_dim = q.shape
        num_kv_heads = k.shape[2]
        delta = torch.empty_like(log_total)
        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        num_more = 0 if more_k is None else more_k.shape[1]
        launch(
            _dense_query_gradient_kernel, (num_blocks_of(num_queries, query_tile.block_q), batch * num_heads),
            q, k, v, more_k, more_v, mask, out, grad, log_total, delta, grad_q,
            num_heads, num_heads // num_kv_heads, num_queries, k.shape[1], num_more, ctx.scale, ctx.scale * LOG2_E,
            *_strides(q, k, v, more_k, more_v), num_heads * head_dim,
            has_more=more_k is not None, has_mask=mask is not None, **parts(head_dim), **query_tile._asdict(),
        )  # fmt: skip
        grads: list[Tensor | None] = [grad_q]
        for keys, values, set_mask in ((k, v, mask), (more_k, more_v, None)):
            if keys is None:
                grads += [None, None]
                continue
            grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (keys, values))
            launch(
                _dense_key_gradient_kernel, (num_blocks_of(keys.shape[1], key_tile.block_k), batch * num_kv_heads),
                q, keys, values, set_mask, grad, log_total, delta, grad_k, grad_v,
                num_heads, num_heads // num_kv_heads, num_queries, keys.shape[1], ctx.scale, ctx.scale * LOG2_E,
                *_strides(q, keys, values), num_heads * head_dim, num_kv_heads * head_dim,
                has_mask=set_mask is not None, **parts(head_dim), **key_tile._asdict(),
            )  # fmt: skip
            grads += [grad_k, grad_v]
        return (*grads, None, None)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attend to all keys, or those of a mask bool[b, s]."""
    return apply(_Attention, q, k, v, None, None, mask, scale_or_default(q, scale))


def joint_attention(
    q: Tensor, k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attend to two sets of keys, the first with a mask bool[b, s]."""
    return apply(_Attention, q, k, v, more_k, more_v, mask, scale_or_default(q, scale))
