"""Tiles of attention in Triton, forward and backward; `packed_triton` and `dense_triton` say which keys a query sees.

Flash attention (arXiv:2307.08691): scores exist for one tile of queries and one of keys at a time. For each query i a
program keeps the highest score m, the sum l = Σ_j 2^(s_ij - m) and o = Σ_j 2^(s_ij - m) v_j, and corrects l and o where
m grows. Scores are in units of log2(e), s = q kᵀ scale log2(e), since the device has 2^x only. Of the forward pass
L = m + log2(l) is kept, one number a query and head; the backward pass computes the scores again:

    p_ij = 2^(s_ij - L_i)      D_i = Σ_c o_ic ∂o_ic      ∂s_ij = p_ij (∂o_i · v_j - D_i)
    ∂q_i = scale Σ_j ∂s_ij k_j      ∂k_j = scale Σ_i ∂s_ij q_i      ∂v_j = Σ_i p_ij ∂o_i

Every rule of visibility here is an interval: query i sees the keys start_i ≤ j < stop_i, both growing with i, and key j
is seen by an interval of queries. What all of a tile see needs no mask, which is most of a long document.

A head of 72 or 96 channels is two parts, 64 + 16 or 64 + 32, since tiles are powers of two wide: 128 would make the
products of a head of 72 channels 1.6 times as many.
"""

from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import capability
from .triton_parts import dot, power_of_two

LOG2_E = 1.4426950408889634
# Below every score, and finite: the difference of two infinities is not a number.
_LOWEST = tl.constexpr(-1e30)


class Tile(NamedTuple):
    """How a kernel is cut."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """How the three kernels of an attention are cut."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile


def generation(device: torch.device) -> int:
    """8 for an A100, 9 for an H100, 10 for a B200; without a device as for an H100."""
    return capability(device)[0] if device.type == "cuda" else 9


def tiles_for(q: Tensor) -> Tiles:
    """Choose by device and width of head: as large as leaves no register to spill (tools/kernel_report.py)."""
    head_dim = q.shape[-1]
    forward = Tile(block_q=128, block_k=64, num_warps=8, num_stages=3)
    query_gradient = Tile(block_q=128, block_k=64, num_warps=8, num_stages=2)
    key_gradient = Tile(block_q=64, block_k=128, num_warps=8, num_stages=2)
    match generation(q.device):
        case 9:
            if head_dim > 96:
                key_gradient = key_gradient._replace(block_q=32)
        case 10:
            # With loads ahead, the key gradient of a head of 96 spills 2,568 bytes.
            query_gradient = query_gradient._replace(block_k=32)
            key_gradient = key_gradient._replace(num_stages=1)
        case _:
            # Both operands of a product are in registers.
            query_gradient = query_gradient._replace(block_k=32)
            key_gradient = key_gradient._replace(block_q=32 if head_dim <= 64 else 16)
            if head_dim > 64:
                forward = forward._replace(block_k=32)
            if head_dim > 96:
                query_gradient = query_gradient._replace(block_q=64, num_warps=4)
    return Tiles(forward, query_gradient, key_gradient)


def scale_or_default(q: Tensor, scale: float | None) -> float:
    """Return 1/√k where None is given; a scale is divided by, so for 0 a number that does as 0."""
    return q.shape[-1] ** -0.5 if scale is None else scale or 1e-30


def parts(head_dim: int) -> dict[str, int]:
    """Return the widths of the two parts of a head, powers of two from 16; the second is 0 where one part is enough."""
    main = max(16, 1 << (head_dim.bit_length() - 1))
    rest = 0 if head_dim <= main else max(16, power_of_two(head_dim - main))
    return {"head_dim": head_dim, "main": main, "rest": rest}


def rows_of_channels(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors with neighbouring channels next to each other in memory; copies only where they are not."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


@triton.jit
@no_type_check
def load_part(
    ptr, row, is_row, stride, head_dim: tl.constexpr, first: tl.constexpr, width: tl.constexpr, is_masked: tl.constexpr
):
    """Load channels first … first + width of these rows; zeros beyond the head and, where masked, where not is_row."""
    channel = first + tl.arange(0, width)
    ptrs = ptr + row.to(tl.int64)[:, None] * stride + channel[None, :]
    if first + width > head_dim:
        mask = (channel < head_dim)[None, :]
        if is_masked:
            mask = mask & is_row[:, None]
        values = tl.load(ptrs, mask=mask, other=0.0)
    elif is_masked:
        values = tl.load(ptrs, mask=is_row[:, None], other=0.0)
    else:
        values = tl.load(ptrs)
    return values


@triton.jit
@no_type_check
def store_part(ptr, row, is_row, stride, value, head_dim: tl.constexpr, first: tl.constexpr, width: tl.constexpr):
    """Store channels first … first + width of the rows where is_row."""
    channel = first + tl.arange(0, width)
    mask = is_row[:, None] & (channel < head_dim)[None, :]
    ptrs = ptr + row.to(tl.int64)[:, None] * stride + channel[None, :]
    tl.store(ptrs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def load_rows(
    ptr, row, is_row, stride,
    head_dim: tl.constexpr, main: tl.constexpr, rest: tl.constexpr, is_masked: tl.constexpr,
):  # fmt: skip
    """Load both parts of a head of these rows; where there is one only, it stands for the other."""
    value = load_part(ptr, row, is_row, stride, head_dim, 0, main, is_masked)
    value_rest = value
    if rest > 0:
        value_rest = load_part(ptr, row, is_row, stride, head_dim, main, rest, is_masked)
    return value, value_rest


@triton.jit
@no_type_check
def store_rows(
    ptr, row, is_row, stride, value, value_rest, head_dim: tl.constexpr, main: tl.constexpr, rest: tl.constexpr
):
    """Store both parts of a head of the rows where is_row."""
    store_part(ptr, row, is_row, stride, value, head_dim, 0, main)
    if rest > 0:
        store_part(ptr, row, is_row, stride, value_rest, head_dim, main, rest)


@triton.jit
@no_type_check
def zeros_of(rows: tl.constexpr, main: tl.constexpr, rest: tl.constexpr):
    """Both parts of a sum over heads of so many rows, at zero."""
    return (
        tl.zeros((rows, main), dtype=tl.float32),
        tl.zeros((rows, rest if rest > 0 else 1), dtype=tl.float32),
    )


@triton.jit
@no_type_check
def products(a, a_rest, b, b_rest, total, rest: tl.constexpr):
    """total + a bᵀ over both parts of a head; total is broadcast."""
    total = dot(a, tl.trans(b), total + tl.zeros((a.shape[0], b.shape[0]), dtype=tl.float32))
    if rest > 0:
        total = dot(a_rest, tl.trans(b_rest), total)
    return total


@triton.jit
@no_type_check
def attend(
    q, q_rest, k_ptr, v_ptr, k_stride, v_stride, mask_ptr, start, stop, low, high, scale, highest, total, out, out_rest,
    head_dim: tl.constexpr, main: tl.constexpr, rest: tl.constexpr, block_k: tl.constexpr,
    is_masked: tl.constexpr, has_mask: tl.constexpr,
):  # fmt: skip
    """Let a tile of queries attend to the keys from low to high; return highest, total, out and out_rest, corrected."""
    for first in range(low, high, block_k):
        key = first + tl.arange(0, block_k)
        is_key = key < high
        k, k_rest = load_rows(k_ptr, key, is_key, k_stride, head_dim, main, rest, is_masked)
        scores = products(q, q_rest, k, k_rest, 0.0, rest) * scale
        if is_masked:
            visible = (key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None])
            if has_mask:
                visible = visible & (tl.load(mask_ptr + key, mask=is_key, other=0) != 0)[None, :]
            scores = tl.where(visible, scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        correction = tl.exp2(highest - higher)
        probs = tl.exp2(scores - higher[:, None])
        highest = higher
        total = total * correction + tl.sum(probs, axis=1)
        v = load_part(v_ptr, key, is_key, v_stride, head_dim, 0, main, is_masked)
        out = dot(probs.to(v.dtype), v, out * correction[:, None])
        if rest > 0:
            v_rest = load_part(v_ptr, key, is_key, v_stride, head_dim, main, rest, is_masked)
            out_rest = dot(probs.to(v.dtype), v_rest, out_rest * correction[:, None])
    return highest, total, out, out_rest


@triton.jit
@no_type_check
def start_attending(block_q: tl.constexpr, main: tl.constexpr, rest: tl.constexpr):
    """Return highest, total, out and out_rest of queries that have seen nothing."""
    highest = tl.full((block_q,), _LOWEST, dtype=tl.float32)
    total = tl.zeros((block_q,), dtype=tl.float32)
    out, out_rest = zeros_of(block_q, main, rest)
    return highest, total, out, out_rest


@triton.jit
@no_type_check
def store_attended(
    out_ptr, log_total_ptr, query, is_query, out_stride, highest, total, out, out_rest,
    head_dim: tl.constexpr, main: tl.constexpr, rest: tl.constexpr,
):  # fmt: skip
    """Store what was attended to, zeros where a query saw no key, and log2 of the sum over its keys."""
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(log_total_ptr + query, highest + tl.log2(divisor), mask=is_query)
    out, out_rest = out / divisor[:, None], out_rest / divisor[:, None]
    store_rows(out_ptr, query, is_query, out_stride, out, out_rest, head_dim, main, rest)


@triton.jit
@no_type_check
def add_query_gradient(
    q, q_rest, grad, grad_rest, log_total, delta, k_ptr, v_ptr, k_stride, v_stride, mask_ptr, start, stop, low, high,
    scale, grad_q, grad_q_rest,
    head_dim: tl.constexpr, main: tl.constexpr, rest: tl.constexpr, block_k: tl.constexpr,
    is_masked: tl.constexpr, has_mask: tl.constexpr,
):  # fmt: skip
    """Add to ∂q / scale of a tile what comes from the keys from low to high; return both parts."""
    for first in range(low, high, block_k):
        key = first + tl.arange(0, block_k)
        is_key = key < high
        k, k_rest = load_rows(k_ptr, key, is_key, k_stride, head_dim, main, rest, is_masked)
        v, v_rest = load_rows(v_ptr, key, is_key, v_stride, head_dim, main, rest, is_masked)
        exponents = products(q, q_rest, k, k_rest, 0.0, rest) * scale - log_total[:, None]
        if is_masked:
            visible = (key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None])
            if has_mask:
                visible = visible & (tl.load(mask_ptr + key, mask=is_key, other=0) != 0)[None, :]
            # Before the power: that of a key which the query does not see may be out of range.
            exponents = tl.where(visible, exponents, -float("inf"))
        probs = tl.exp2(exponents)
        grad_scores = probs * (products(grad, grad_rest, v, v_rest, 0.0, rest) - delta[:, None])
        grad_q = dot(grad_scores.to(k.dtype), k, grad_q)
        if rest > 0:
            grad_q_rest = dot(grad_scores.to(k.dtype), k_rest, grad_q_rest)
    return grad_q, grad_q_rest


@triton.jit
@no_type_check
def add_key_gradients(
    k, k_rest, v, v_rest, q_ptr, grad_ptr, log_total_ptr, delta_ptr, q_stride, grad_stride, start, stop, low, high,
    scale, grad_k, grad_k_rest, grad_v, grad_v_rest,
    head_dim: tl.constexpr, main: tl.constexpr, rest: tl.constexpr, block_q: tl.constexpr, is_masked: tl.constexpr,
):  # fmt: skip
    """Add to ∂k / scale and ∂v of a tile what comes from the queries from low to high; return all parts.

    start and stop are the interval of queries that see each key.
    """
    for first in range(low, high, block_q):
        query = first + tl.arange(0, block_q)
        is_query = query < high
        q, q_rest = load_rows(q_ptr, query, is_query, q_stride, head_dim, main, rest, is_masked)
        grad, grad_rest = load_rows(grad_ptr, query, is_query, grad_stride, head_dim, main, rest, is_masked)
        log_total = tl.load(log_total_ptr + query, mask=is_query, other=0.0)
        delta = tl.load(delta_ptr + query, mask=is_query, other=0.0)
        # Keys by queries: the transposes of the tiles in the other direction. L and D are where the sums begin: beside
        # them they would hold registers until the end, 32 a thread.
        exponents = products(k, k_rest, q, q_rest, -log_total[None, :] / scale, rest) * scale
        if is_masked:
            visible = (query[None, :] >= start[:, None]) & (query[None, :] < stop[:, None])
            exponents = tl.where(visible, exponents, -float("inf"))
        probs = tl.exp2(exponents)
        grad_v = dot(probs.to(grad.dtype), grad, grad_v)
        if rest > 0:
            grad_v_rest = dot(probs.to(grad.dtype), grad_rest, grad_v_rest)
        grad_scores = probs * products(v, v_rest, grad, grad_rest, -delta[None, :], rest)
        grad_k = dot(grad_scores.to(q.dtype), q, grad_k)
        if rest > 0:
            grad_k_rest = dot(grad_scores.to(q.dtype), q_rest, grad_k_rest)
    return grad_k, grad_k_rest, grad_v, grad_v_rest


@triton.jit
@no_type_check
def delta_of(
    out_ptr, grad, grad_rest, query, is_query, out_stride,
    head_dim: tl.constexpr, main: tl.constexpr, rest: tl.constexpr,
):  # fmt: skip
    """D of a tile of queries."""
    out, out_rest = load_rows(out_ptr, query, is_query, out_stride, head_dim, main, rest, True)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)
    if rest > 0:
        delta += tl.sum(out_rest.to(tl.float32) * grad_rest.to(tl.float32), axis=1)
    return delta
