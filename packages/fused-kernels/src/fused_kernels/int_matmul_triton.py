"""Products of few rows with int8 or int4 weights in Triton: decoding, where reading the weights is all the time.

Weights are laid out as `integers.py` says. Each is read once, as its byte or half byte, and never stored as anything
else; products are summed in fp32. For int4 the scale and zero of a group leave the sum,

    y[n] = Σ_g ( scale[g, n] Σ_{d in g} x[d] (code[n, d] - 8) + zero[g, n] Σ_{d in g} x[d] ).

One program for each row of x, these next to each other: what one has fetched, the others find in the cache. To fill a
GPU with a matrix of few rows the columns are parted, too; the parts are added in a fixed order, so a run repeats bit
for bit.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from .integers import INT4_GROUP
from .triton_parts import launch, num_blocks_of, power_of_two

MOST_ROWS = 16
"""Rows of x for which this is meant; above, the products themselves cost, and matrix units are faster."""
_GROUP = tl.constexpr(INT4_GROUP)
_INT8_ROWS, _INT8_COLUMNS = 4, 1024
_INT4_GROUPS = 4
# Columns of a part: 1024 give an int4 matrix of 3072 × 3072 (a block of 64 rows) 144 programs.
_PART_COLUMNS = 1024


@triton.jit
@no_type_check
def _int8_kernel(
    x_ptr, codes_ptr, scales_ptr, out_ptr, num_rows, width, block_rows: tl.constexpr, block_columns: tl.constexpr
):
    x_row = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * block_rows + tl.arange(0, block_rows)
    is_row = row < num_rows
    total = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for start in range(0, width, block_columns):
        column = start + tl.arange(0, block_columns)
        is_column = column < width
        x = tl.load(x_ptr + x_row * width + column, mask=is_column, other=0.0).to(tl.float32)
        offset = row.to(tl.int64)[:, None] * width + column[None, :]
        codes = tl.load(codes_ptr + offset, mask=is_row[:, None] & is_column[None, :], other=0)
        total += codes.to(tl.float32) * x[None, :]
    scale = tl.load(scales_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    out = tl.sum(total, axis=1) * scale
    tl.store(out_ptr + x_row * num_rows + row, out.to(out_ptr.dtype.element_ty), mask=is_row)


@triton.jit
@no_type_check
def _int4_kernel(
    x_ptr, packed_ptr, scales_ptr, partial_ptr, num_rows, width, num_groups,
    half: tl.constexpr, part_groups: tl.constexpr, block_groups: tl.constexpr,
):  # fmt: skip
    x_row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    lane = tl.arange(0, half)
    low_total = tl.zeros((block_groups, half), dtype=tl.float32)
    high_total = tl.zeros((block_groups, half), dtype=tl.float32)
    for start in range(0, part_groups, block_groups):
        group = part * part_groups + start + tl.arange(0, block_groups)
        is_group = group < num_groups
        column = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
        x = tl.load(x_ptr + x_row * width + column, mask=is_group[:, None], other=0.0).to(tl.float32)
        offset = (block * width + column)[:, :, None] * half + lane[None, None, :]
        packed = tl.load(packed_ptr + offset, mask=is_group[:, None, None], other=0)
        low = tl.sum(((packed & 15).to(tl.float32) - 8) * x[:, :, None], axis=1)
        high = tl.sum(((packed >> 4).to(tl.float32) - 8) * x[:, :, None], axis=1)
        x_sum = tl.sum(x, axis=1)[:, None]
        scale_ptr = scales_ptr + 2 * (group.to(tl.int64)[:, None] * num_rows + block * 2 * half + lane[None, :])
        mask = is_group[:, None]
        low_total += low * tl.load(scale_ptr, mask=mask, other=0.0).to(tl.float32)
        low_total += x_sum * tl.load(scale_ptr + 1, mask=mask, other=0.0).to(tl.float32)
        high_total += high * tl.load(scale_ptr + 2 * half, mask=mask, other=0.0).to(tl.float32)
        high_total += x_sum * tl.load(scale_ptr + 2 * half + 1, mask=mask, other=0.0).to(tl.float32)
    out_ptr = partial_ptr + (part * tl.num_programs(0) + x_row) * num_rows + block * 2 * half + lane
    tl.store(out_ptr, tl.sum(low_total, axis=0))
    tl.store(out_ptr + half, tl.sum(high_total, axis=0))


def int8_matmul(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Multiply x [t, d] with codes int8 [n, d] and a scale a row."""
    (num_x, width), num_rows = x.shape, codes.shape[0]
    out = torch.empty(num_x, num_rows, dtype=x.dtype, device=x.device)
    launch(
        _int8_kernel, (num_x, num_blocks_of(num_rows, _INT8_ROWS)),
        x.contiguous(), codes.contiguous(), scales.contiguous(), out, num_rows, width,
        block_rows=_INT8_ROWS, block_columns=min(_INT8_COLUMNS, power_of_two(width)), num_warps=4,
    )  # fmt: skip
    return out


def int4_matmul(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """Multiply x [t, d] with packed uint8 [blocks, d, half] and scales [d / 32, n, 2]."""
    (num_x, width), (num_blocks, _, half), num_rows = x.shape, packed.shape, scales.shape[1]
    num_parts = num_blocks_of(width, _PART_COLUMNS)
    partial = torch.empty(num_parts, num_x, num_rows, dtype=torch.float32, device=x.device)
    launch(
        _int4_kernel, (num_x, num_blocks, num_parts),
        x.contiguous(), packed.contiguous(), scales.contiguous(), partial, num_rows, width, width // INT4_GROUP,
        half=half, part_groups=_PART_COLUMNS // INT4_GROUP, block_groups=_INT4_GROUPS, num_warps=4,
    )  # fmt: skip
    return partial.sum(0).to(x.dtype)
