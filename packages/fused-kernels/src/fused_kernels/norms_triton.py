"""RMSNorm and LayerNorm in Triton, alone or after a residual is added: one pass over memory each way.

    s = x + residual                                  rounded to x's dtype, as the plain addition
    RMSNorm      y = s r · weight                     r = 1 / sqrt(mean(s²) + eps); s r rounded before the product
    LayerNorm    y = (s - mean) r · weight + bias     r = 1 / sqrt(mean((s - mean)²) + eps)

Layout: rows of `width` contiguous numbers, bf16, fp16 or fp32; a program holds whole rows, computes in fp32 and keeps
mean and r, one fp32 each a row. With n = (s - mean) r, g the gradient at y and h = g · weight, the gradient at s is

    r (h - n mean(h n))               RMSNorm
    r (h - n mean(h n) - mean(h))     LayerNorm

plus, after a residual, the gradient that reaches s directly. n is computed again in the backward pass, from s.
∂weight = Σ_rows g n and ∂bias = Σ_rows g are summed by each program over its rows, and then over programs, in fp32:
the order is fixed, so a run repeats bit for bit.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import apply, apply_pair, once
from .triton_parts import launch, num_blocks_of, num_programs, num_warps, power_of_two

_TILE_ELEMENTS = 4096


@triton.jit
@no_type_check
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, out_ptr, mean_ptr, r_ptr,
    num_rows, width, eps,
    is_centred: tl.constexpr, has_residual: tl.constexpr, block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    column = tl.arange(0, block_width)
    is_row, is_column = row < num_rows, column < width
    offset, mask = row[:, None] * width + column[None, :], is_row[:, None] & is_column[None, :]
    x = tl.load(x_ptr + offset, mask=mask, other=0.0)
    if has_residual:
        residual = tl.load(residual_ptr + offset, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + offset, x, mask=mask)
    wide = x.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if is_centred:
        mean = tl.sum(wide, axis=1) / width
        wide = tl.where(mask, wide - mean[:, None], 0.0)
        tl.store(mean_ptr + row, mean, mask=is_row)
    r = 1 / tl.sqrt(tl.sum(wide * wide, axis=1) / width + eps)
    tl.store(r_ptr + row, r, mask=is_row)
    normalised = wide * r[:, None]
    if is_centred:
        bias = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        out = normalised * weight + bias
    else:
        out = normalised.to(x.dtype).to(tl.float32) * weight
    tl.store(out_ptr + offset, out.to(x.dtype), mask=mask)


@triton.jit
@no_type_check
def _norm_backward_kernel(
    sum_ptr, grad_ptr, grad_sum_ptr, weight_ptr, mean_ptr, r_ptr, grad_x_ptr, grad_weight_ptr, grad_bias_ptr,
    num_rows, width,
    is_centred: tl.constexpr, has_residual: tl.constexpr, has_weight_grad: tl.constexpr,
    block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, block_width)
    is_column = column < width
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    grad_weight = tl.zeros((block_rows, block_width), dtype=tl.float32)
    grad_bias = tl.zeros((block_rows, block_width), dtype=tl.float32)
    for start in range(program * block_rows, num_rows, tl.num_programs(0) * block_rows):
        row = (start + tl.arange(0, block_rows)).to(tl.int64)
        is_row = row < num_rows
        offset, mask = row[:, None] * width + column[None, :], is_row[:, None] & is_column[None, :]
        normalised = tl.load(sum_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row, mask=is_row, other=0.0)[:, None]
        if is_centred:
            mean = tl.load(mean_ptr + row, mask=is_row, other=0.0)
            normalised = tl.where(mask, normalised - mean[:, None], 0.0)
        normalised *= r
        if has_weight_grad:
            grad_weight += grad * normalised
            grad_bias += grad
        grad *= weight
        grad_x = grad - normalised * (tl.sum(grad * normalised, axis=1) / width)[:, None]
        if is_centred:
            grad_x -= (tl.sum(grad, axis=1) / width)[:, None]
        grad_x *= r
        if has_residual:
            grad_x += tl.load(grad_sum_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    if has_weight_grad:
        offset = program.to(tl.int64) * width + column
        tl.store(grad_weight_ptr + offset, tl.sum(grad_weight, axis=0), mask=is_column)
        if is_centred:
            tl.store(grad_bias_ptr + offset, tl.sum(grad_bias, axis=0), mask=is_column)


def _tile(width: int) -> dict[str, int]:
    block_width = power_of_two(width)
    block_rows = max(1, _TILE_ELEMENTS // block_width)
    return {
        "block_rows": block_rows,
        "block_width": block_width,
        # The backward pass holds five tiles: of the widest rows too much for the registers of fewer threads.
        "num_warps": 32 if block_width > _TILE_ELEMENTS else num_warps(block_rows * block_width),
    }


class _Norm(torch.autograd.Function):
    """Returns (sum, normalised), or, without a residual, what is normalised alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        width, has_residual = x.shape[-1], residual is not None
        rows = x.reshape(-1, width).contiguous()
        total = torch.empty_like(rows) if has_residual else rows
        out = torch.empty_like(rows)
        r = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
        mean = torch.empty_like(r) if bias is not None else None
        tile = _tile(width)
        launch(
            _norm_kernel, (num_blocks_of(rows.shape[0], tile["block_rows"]),),
            rows, None if residual is None else residual.contiguous(), weight, bias, total, out, mean, r,
            rows.shape[0], width, eps,
            is_centred=bias is not None, has_residual=has_residual, **tile,
        )  # fmt: skip
        ctx.save_for_backward(total, weight, bias, mean, r)
        ctx.has_residual = has_residual
        return (total.view_as(x), out.view_as(x)) if has_residual else out.view_as(x)

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, bias, mean, r = ctx.saved_tensors
        grad_sum = grad_outputs[0].contiguous() if ctx.has_residual else None
        grad = grad_outputs[-1].contiguous()
        num_rows, width = total.shape
        tile = _tile(width)
        programs = num_programs(total, num_blocks_of(num_rows, tile["block_rows"]))
        has_weight_grad = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        grad_x = torch.empty_like(total)
        grad_weight = grad_bias = None
        if has_weight_grad:
            grad_weight = torch.empty(programs, width, dtype=torch.float32, device=total.device)
            grad_bias = torch.empty_like(grad_weight) if bias is not None else None
        launch(
            _norm_backward_kernel, (programs,),
            total, grad, grad_sum, weight, mean, r, grad_x, grad_weight, grad_bias,
            num_rows, width,
            is_centred=bias is not None, has_residual=ctx.has_residual, has_weight_grad=has_weight_grad, **tile,
        )  # fmt: skip
        grad_x = grad_x.view_as(grad)
        return (
            grad_x,
            grad_x if ctx.has_residual else None,
            None if grad_weight is None else grad_weight.sum(0).to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.sum(0).to(bias.dtype),
            None,
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Run RMSNorm over the last axis."""
    return apply(_Norm, x, None, weight, None, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Run LayerNorm over the last axis."""
    return apply(_Norm, x, None, weight, bias, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + residual, and RMSNorm of that."""
    return apply_pair(_Norm, x, residual, weight, None, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + residual, and LayerNorm of that."""
    return apply_pair(_Norm, x, residual, weight, bias, eps)
