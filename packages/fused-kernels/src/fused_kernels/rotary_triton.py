"""Rotary position embedding in Triton: all heads of q and k of a token in one launch, angles given per token.

    out[c]     = x[c] · cos[c] - x[c + r] · sin[c]           c < r
    out[c + r] = x[c + r] · cos[c] + x[c] · sin[c]
    out[c]     = x[c]                                        c ≥ 2r

Layout: q [t, h, k] and k [t, g, k] with any strides over tokens and heads, so that they may be views of one packed
product; cos and sin [t, r]; results contiguous, in the dtype of q and k; computed in fp32. A rotation is linear, its
transpose the rotation by the opposite angle: the backward pass is the same kernel with the sign of sin turned.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import apply_pair, once
from .triton_parts import launch, num_blocks_of, num_warps, power_of_two

_TILE_ELEMENTS = 2048


@triton.jit
@no_type_check
def _rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    num_heads, num_kv_heads, q_token_stride, q_head_stride, k_token_stride, k_head_stride, angle_stride,
    head_dim: tl.constexpr, num_angles: tl.constexpr, is_inverse: tl.constexpr,
    block_heads: tl.constexpr, block_angles: tl.constexpr, block_rest: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    num_q_blocks = tl.cdiv(num_heads, block_heads)
    if block < num_q_blocks:
        head = block * block_heads + tl.arange(0, block_heads)
        is_head = head < num_heads
        x_ptr = q_ptr + token * q_token_stride + head * q_head_stride
        out_ptr = q_out_ptr + (token * num_heads + head) * head_dim
    else:
        head = (block - num_q_blocks) * block_heads + tl.arange(0, block_heads)
        is_head = head < num_kv_heads
        x_ptr = k_ptr + token * k_token_stride + head * k_head_stride
        out_ptr = k_out_ptr + (token * num_kv_heads + head) * head_dim
    x_ptr, out_ptr, is_head = x_ptr[:, None], out_ptr[:, None], is_head[:, None]
    angle = tl.arange(0, block_angles)
    cos = tl.load(cos_ptr + token * angle_stride + angle, mask=angle < num_angles, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * angle_stride + angle, mask=angle < num_angles, other=0.0).to(tl.float32)[None, :]
    if is_inverse:
        sin = -sin
    mask = is_head & (angle < num_angles)[None, :]
    first = tl.load(x_ptr + angle[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + num_angles + angle[None, :], mask=mask, other=0.0).to(tl.float32)
    dtype = q_out_ptr.dtype.element_ty
    tl.store(out_ptr + angle[None, :], (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(out_ptr + num_angles + angle[None, :], (second * cos + first * sin).to(dtype), mask=mask)
    if 2 * num_angles < head_dim:
        channel = 2 * num_angles + tl.arange(0, block_rest)
        mask = is_head & (channel < head_dim)[None, :]
        tl.store(out_ptr + channel[None, :], tl.load(x_ptr + channel[None, :], mask=mask), mask=mask)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, is_inverse: bool) -> tuple[Tensor, Tensor]:
    (num_heads, head_dim), num_kv_heads, num_angles = q.shape[-2:], k.shape[-2], cos.shape[-1]
    q_rows, k_rows = q.reshape(-1, num_heads, head_dim), k.reshape(-1, num_kv_heads, head_dim)
    q_rows, k_rows = (rows if rows.stride(2) == 1 else rows.contiguous() for rows in (q_rows, k_rows))
    cos, sin = (table.expand(*q.shape[:-2], num_angles).reshape(-1, num_angles).contiguous() for table in (cos, sin))
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    block_angles = power_of_two(num_angles)
    block_heads = max(1, min(power_of_two(max(num_heads, num_kv_heads)), _TILE_ELEMENTS // block_angles))
    num_blocks = num_blocks_of(num_heads, block_heads) + num_blocks_of(num_kv_heads, block_heads)
    launch(
        _rotate_kernel, (q_rows.shape[0], num_blocks),
        q_rows, k_rows, cos, sin, q_out, k_out,
        num_heads, num_kv_heads, *q_rows.stride()[:2], *k_rows.stride()[:2], cos.stride(0),
        head_dim=head_dim, num_angles=num_angles, is_inverse=is_inverse, block_heads=block_heads,
        block_angles=block_angles, block_rest=power_of_two(max(1, head_dim - 2 * num_angles)),
        num_warps=num_warps(block_heads * block_angles),
    )  # fmt: skip
    return q_out, k_out


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotate(q, k, cos, sin, is_inverse=False)

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return (*_rotate(*grad_outputs, *ctx.saved_tensors, is_inverse=True), None, None)


def rotary_embedding(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate q [..., t, h, k] and k [..., t, g, k] by cos and sin [..., t, r]."""
    return apply_pair(_Rotation, q, k, cos, sin)
