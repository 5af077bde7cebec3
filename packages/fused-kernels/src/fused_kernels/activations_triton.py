"""SwiGLU and tanh-GELU in Triton, one pass over memory each way; only the inputs are kept for the backward pass.

With σ the logistic function, in fp32,

    SwiGLU       y = up · gate σ(gate)                     [gate | up] contiguous rows of 2m
    tanh-GELU    y = z σ(2u)    z = x + bias               u = √(2/π) (z + 0.044715 z³)

since ½ (1 + tanh u) = σ(2u). Derivatives, with s the σ above:

    ∂gate = g up s (1 + gate (1 - s))      ∂up = g gate s
    ∂z    = g (s + z s (1 - s) 2u')        u' = √(2/π) (1 + 3 · 0.044715 z²)

∂bias = Σ_rows ∂z: each program sums its own rows in fp32, and the partial sums are added in a fixed order.
"""

import math
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import apply, once
from .triton_parts import launch, num_blocks_of, num_programs, num_warps, power_of_two

_BLOCK = 2048
_BLOCK_ROWS, _BLOCK_WIDTH = 16, 128
# Of the second axis of a grid.
_MOST_PROGRAMS = 65535
# Written behind what they multiply: a constant before a tensor confuses Triton's interpreter.
_TWICE_ROOT = tl.constexpr(2 * math.sqrt(2 / math.pi))
_CUBE = tl.constexpr(0.044715)


@triton.jit
@no_type_check
def _swiglu_kernel(gate_up_ptr, out_ptr, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = column < width
    gate = tl.load(gate_up_ptr + row * 2 * width + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + column, mask=mask, other=0.0).to(tl.float32)
    out = up * gate * tl.sigmoid(gate)
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _swiglu_backward_kernel(gate_up_ptr, grad_ptr, grad_gate_up_ptr, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = column < width
    offset = row * 2 * width + column
    gate = tl.load(gate_up_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + offset + width, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dtype = grad_gate_up_ptr.dtype.element_ty
    tl.store(grad_gate_up_ptr + offset, (grad * up * s * (1 + gate * (1 - s))).to(dtype), mask=mask)
    tl.store(grad_gate_up_ptr + offset + width, (grad * gate * s).to(dtype), mask=mask)


@triton.jit
@no_type_check
def _gelu_kernel(x_ptr, bias_ptr, out_ptr, width, has_bias: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = column < width
    z = tl.load(x_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
    if has_bias:
        z += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
    out = z * tl.sigmoid((z + z * z * z * _CUBE) * _TWICE_ROOT)
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def _gelu_backward_kernel(
    x_ptr, bias_ptr, grad_ptr, grad_x_ptr, grad_bias_ptr, num_rows, width,
    has_bias: tl.constexpr, has_bias_grad: tl.constexpr, block_rows: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(1)
    column = tl.program_id(0) * block_width + tl.arange(0, block_width)
    is_column = column < width
    grad_bias = tl.zeros((block_rows, block_width), dtype=tl.float32)
    for start in range(program * block_rows, num_rows, tl.num_programs(1) * block_rows):
        row = (start + tl.arange(0, block_rows)).to(tl.int64)
        offset, mask = row[:, None] * width + column[None, :], (row < num_rows)[:, None] & is_column[None, :]
        z = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if has_bias:
            z += tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        s = tl.sigmoid((z + z * z * z * _CUBE) * _TWICE_ROOT)
        slope = s + z * s * (1 - s) * (1 + z * z * (3 * _CUBE)) * _TWICE_ROOT
        grad = tl.load(grad_ptr + offset, mask=mask, other=0.0).to(tl.float32) * slope
        tl.store(grad_x_ptr + offset, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if has_bias_grad:
            grad_bias += grad
    if has_bias_grad:
        tl.store(grad_bias_ptr + program.to(tl.int64) * width + column, tl.sum(grad_bias, axis=0), mask=is_column)


def _by_row(width: int) -> dict[str, int]:
    block = min(_BLOCK, power_of_two(width))
    return {"block": block, "num_warps": num_warps(block)}


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        width = gate_up.shape[-1] // 2
        rows = gate_up.reshape(-1, 2 * width).contiguous()
        ctx.save_for_backward(rows)
        out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
        tile = _by_row(width)
        launch(_swiglu_kernel, (rows.shape[0], num_blocks_of(width, tile["block"])), rows, out, width, **tile)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        width = grad.shape[-1]
        out = torch.empty_like(rows)
        tile = _by_row(width)
        grid = (rows.shape[0], num_blocks_of(width, tile["block"]))
        launch(_swiglu_backward_kernel, grid, rows, grad, out, width, **tile)
        return out.view(*grad.shape[:-1], 2 * width)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        width = x.shape[-1]
        rows = x.reshape(-1, width).contiguous()
        ctx.save_for_backward(rows, bias)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tile = _by_row(width)
        grid = (rows.shape[0], num_blocks_of(width, tile["block"]))
        launch(_gelu_kernel, grid, rows, bias, out, width, has_bias=bias is not None, **tile)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None]:
        rows, bias = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        num_rows, width = rows.shape
        num_columns = num_blocks_of(width, _BLOCK_WIDTH)
        num_tiles = num_blocks_of(num_rows, _BLOCK_ROWS)
        # Without a bias each tile has a program of its own; with one there are enough to fill the device.
        has_bias_grad = ctx.needs_input_grad[1]
        programs = num_blocks_of(4 * num_programs(rows, num_tiles), num_columns) if has_bias_grad else num_tiles
        programs = min(programs, num_tiles, _MOST_PROGRAMS)
        out = torch.empty_like(rows)
        partial = torch.empty(programs, width, dtype=torch.float32, device=rows.device) if has_bias_grad else None
        launch(
            _gelu_backward_kernel, (num_columns, programs),
            rows, bias, grad, out, partial, num_rows, width,
            has_bias=bias is not None, has_bias_grad=has_bias_grad, block_rows=_BLOCK_ROWS, block_width=_BLOCK_WIDTH,
            num_warps=num_warps(_BLOCK_ROWS * _BLOCK_WIDTH),
        )  # fmt: skip
        return out.view_as(grad), None if partial is None else partial.sum(0).to(bias.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """Gate one half of the channels by the other."""
    return apply(_SwiGlu, gate_up)


def gelu_tanh(x: Tensor, bias: Tensor | None) -> Tensor:
    """Apply tanh-GELU to x (+ bias)."""
    return apply(_Gelu, x, bias)
