"""Weights as small integers: symmetric int8 with one scale a row, int4 with a scale and a zero for each 32 inputs.

    int8   w[n, d] ≈ codes[n, d] · scales[n]                                     codes -127 … 127
    int4   w[n, d] ≈ (codes[n, d] - 8) · scales[g, n, 0] + scales[g, n, 1]       codes 0 … 15, g = d div 32

Scales are rounded to the dtype that they are kept in first, outwards, and codes are then the nearest to w on that very
grid: no weight is further from its value than half a scale, also where scales are bf16. Four bits with bf16 scales take
5 bits a weight in memory.

Codes of int4 are packed two to a byte, in the layout that PyTorch's CPU operation reads: blocks of rows, and in a block
column after column,

    packed[i, d, j] = codes[i · block + j, d] + 16 · codes[i · block + block/2 + j, d]

with blocks of 64 rows for AVX-512 and of 32 for AVX2 (aten/src/ATen/native/cpu/int4mm_kernel.cpp at v2.10.0). A block
is also the transpose of a slab of the matrix, which is what a product with many rows wants.
"""

import functools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

INT4_GROUP = 32
"""Inputs that share a scale and a zero."""
_DEFAULT_BLOCK = 64


def _rounded_up(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest number of `dtype` that is not below x."""
    rounded = x.to(dtype)
    above = torch.nextafter(rounded, torch.full_like(rounded, torch.inf))
    return torch.where(rounded.to(x.dtype) < x, above, rounded)


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _require_finite(extremes: Tensor) -> None:
    if not bool(torch.isfinite(extremes).all()):
        raise ValueError("weights to quantise: expected finite numbers, got NaN or infinity; the file may be damaged")


def quantise_int8(
    weight: Float[Tensor, "n d"], dtype: torch.dtype = torch.float32
) -> tuple[Int8[Tensor, "n d"], Float[Tensor, " n"]]:
    """Return codes and scales in `dtype`: a row's scale is its greatest magnitude / 127.

    Raises:
        ValueError: if a weight is not finite.
    """
    wide = _wide(weight)
    greatest = wide.abs().amax(dim=1)
    _require_finite(greatest)
    scales = _rounded_up(greatest / 127, dtype)
    divisor = scales.to(wide.dtype).masked_fill(scales == 0, 1.0)
    codes = (wide / divisor[:, None]).round_().clamp_(-127, 127)
    return codes.to(torch.int8), scales


def dequantise_int8(codes: Int8[Tensor, "n d"], scales: Float[Tensor, " n"]) -> Float[Tensor, "n d"]:
    """Return the weights in the dtype of the scales."""
    return codes.to(scales.dtype) * scales[:, None]


def quantise_int4(
    weight: Float[Tensor, "n d"], dtype: torch.dtype = torch.float32
) -> tuple[UInt8[Tensor, "n padded"], Float[Tensor, "g n 2"]]:
    """Return codes, one a byte, and (scale, zero) in `dtype`; columns are padded to whole groups.

    The grid of a group spans its least to its greatest weight in 15 steps; the zero is the value of code 8.

    Raises:
        ValueError: if a weight is not finite.
    """
    wide = _wide(weight)
    # Repeating the last column, unlike zeros, does not widen its group.
    padding = -wide.shape[1] % INT4_GROUP
    if padding:
        wide = torch.cat([wide, wide[:, -1:].expand(-1, padding)], dim=1)
    groups = wide.unflatten(1, (-1, INT4_GROUP))
    low, high = groups.aminmax(dim=-1)
    _require_finite(low)
    _require_finite(high)
    zeros = (low + (high - low) * (8 / 15)).to(dtype)
    centre = zeros.to(wide.dtype)
    # Once the zero is rounded the two ends no longer lie 8 and 7 steps away: a step must reach the further one.
    scales = _rounded_up(torch.maximum((high - centre) / 7, (centre - low) / 8), dtype)
    divisor = scales.to(wide.dtype).masked_fill(scales == 0, 1.0)
    codes = ((groups - centre[..., None]) / divisor[..., None]).round_().clamp_(-8, 7).add_(8)
    return codes.to(torch.uint8).flatten(1), torch.stack([scales, zeros], dim=-1).transpose(0, 1).contiguous()


def dequantise_int4(codes: UInt8[Tensor, "n padded"], scales: Float[Tensor, "g n 2"]) -> Float[Tensor, "n padded"]:
    """Return the weights, padding columns included, in the dtype of the scales."""
    groups = codes.unflatten(1, (-1, INT4_GROUP)).to(scales.dtype)
    scale, zero = scales.transpose(0, 1).unsqueeze(-2).unbind(-1)
    return ((groups - 8) * scale + zero).flatten(1)


def pack_int4(codes: UInt8[Tensor, "n padded"], block: int) -> UInt8[Tensor, "blocks padded half_block"]:
    """Lay codes out two to a byte in blocks of `block` rows; missing rows of the last block are zeros."""
    codes = F.pad(codes, (0, 0, 0, -codes.shape[0] % block))
    low, high = codes.unflatten(0, (-1, 2, block // 2)).transpose(2, 3).unbind(1)
    return (low | (high << 4)).contiguous()


def unpack_int4(packed: UInt8[Tensor, "blocks padded half_block"]) -> UInt8[Tensor, "n padded"]:
    """Undo `pack_int4`; rows come in whole blocks."""
    return torch.stack([packed & 15, packed >> 4], dim=1).transpose(2, 3).flatten(0, 2)


@functools.cache
def torch_int4_block() -> int | None:
    """Rows of a block as PyTorch's CPU operation lays them out on this machine, or None if in neither way."""
    pack = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
    if pack is None:
        return None
    # Each row its own pattern along the columns, so that no exchange of rows or nibbles goes unseen.
    with torch.inference_mode(False):
        codes = (torch.arange(64)[:, None] * (torch.arange(INT4_GROUP)[None] % 7 + 1)) // 3 % 16
        theirs = pack(codes.int(), 1).flatten()
    for block in (64, 32):
        if torch.equal(theirs, pack_int4(codes.to(torch.uint8), block).flatten()):
            return block
    return None


def int4_block() -> int:
    """Rows of a block in which weights are best packed on this machine."""
    return torch_int4_block() or _DEFAULT_BLOCK
