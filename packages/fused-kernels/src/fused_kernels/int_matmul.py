"""Products with weights that are kept as int8 or int4 (`integers.py`), for inference and for adapters beside them.

Weights are constants: the gradient reaches x only. Reading a byte or less a weight instead of two or four is what
makes decoding faster; it is bound by memory.

PyTorch's own CPU operations are fast for few rows and bf16 only: they convert to fp32 in registers there, while other
dtypes run through scalar code and many rows cost as much as each of them alone. On a GPU a Triton kernel does the same
for few rows. Everything else turns a slab of the matrix at a time into floating point, so that the slab stays in the
cache, and multiplies with that.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

from .dispatch import Backend, Op, apply, on_cuda_with_triton, once
from .integers import INT4_GROUP, dequantise_int4, dequantise_int8, torch_int4_block, unpack_int4

# Weights that are floating point at a time: 1 MiB of fp32, about what a core's own cache holds.
_SLAB_ELEMENTS = 1 << 18
# Rows of x up to which PyTorch's operations are ahead of slabs. In ms for 1, 64 and 256 rows of bf16 and 8192 × 3072
# weights on one AVX-512 core: int4 takes 2, 79 and 338, by slabs 60, 94 and 262; int8 3, 67 and 380, by slabs 20, 100
# and 250.
_MOST_ROWS = 64
# PyTorch's int8 operation for bf16 reads past the end of rows that are no multiple of this (v2.10.0, AVX-512: a
# segmentation fault at 3 × 17).
_INT8_STEP = 16


class _Slab(NamedTuple):
    rows: slice
    """Rows of the weight."""
    weight: Tensor
    """[r, d], in floating point, before `factor`."""
    factor: Tensor | None
    """[r]"""


Slabs = Callable[[Tensor, Tensor, torch.dtype], Iterator[_Slab]]
"""(codes, scales, dtype) → the matrix in slabs of that dtype."""


def _int8_slabs(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Iterator[_Slab]:
    num_rows = max(1, _SLAB_ELEMENTS // max(1, codes.shape[1]))
    for start in range(0, codes.shape[0], num_rows):
        rows = slice(start, start + num_rows)
        yield _Slab(rows, codes[rows].to(dtype), scales[rows].to(dtype))


def _int4_slabs(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Iterator[_Slab]:
    num_blocks, width, half = packed.shape
    at_a_time = max(1, _SLAB_ELEMENTS // (2 * half * width))
    for start in range(0, num_blocks, at_a_time):
        blocks = packed[start : start + at_a_time].transpose(0, 1)
        rows = slice(start * 2 * half, (start + blocks.shape[1]) * 2 * half)
        transposed = torch.empty(width, blocks.shape[1], 2, half, dtype=dtype, device=packed.device)
        transposed[:, :, 0] = blocks & 15
        transposed[:, :, 1] = blocks >> 4
        groups = transposed.view(-1, INT4_GROUP, rows.stop - rows.start)
        scale, zero = (part.contiguous() for part in scales[:, None, rows].to(dtype).unbind(-1))
        # (code - 8) · scale + zero in one pass
        torch.addcmul(zero - 8 * scale, groups, scale, out=groups)
        yield _Slab(rows, groups.view(width, -1).t(), None)


def _compute_dtype(x: Tensor) -> torch.dtype:
    # CPUs without bf16 units multiply in fp32 six times as fast.
    return torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype


def _product(slabs: Slabs, x: Tensor, codes: Tensor, scales: Tensor, num_rows: int) -> Tensor:
    dtype = _compute_dtype(x)
    wide = x.to(dtype)
    out = torch.empty(x.shape[0], num_rows, dtype=x.dtype, device=x.device)
    for slab in slabs(codes, scales, dtype):
        part = F.linear(wide, slab.weight)
        out[:, slab.rows] = part if slab.factor is None else part.mul_(slab.factor)
    return out


def _product_transposed(slabs: Slabs, grad: Tensor, codes: Tensor, scales: Tensor, width: int) -> Tensor:
    dtype = _compute_dtype(grad)
    out = torch.zeros(grad.shape[0], width, dtype=dtype, device=grad.device)
    for slab in slabs(codes, scales, dtype):
        part = grad[:, slab.rows].to(dtype)
        out.addmm_(part if slab.factor is None else part * slab.factor, slab.weight)
    return out.to(grad.dtype)


Multiply = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x[t, d], codes, scales) → [t, n]"""


class _WithInputGradient(torch.autograd.Function):
    """A product whose gradient at x is grad · W, with W by slabs: nothing of it is kept in floating point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor, multiply: Multiply, slabs: Slabs) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.slabs, ctx.width = slabs, x.shape[1]
        return multiply(x, codes, scales)

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        codes, scales = ctx.saved_tensors
        return _product_transposed(ctx.slabs, grad_outputs[0], codes, scales, ctx.width), None, None, None, None


def _int8_by_slab(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return _product(_int8_slabs, x, codes, scales, codes.shape[0])


def _int8_torch(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    if x.shape[0] > _MOST_ROWS or x.shape[1] % _INT8_STEP or scales.dtype != x.dtype:
        return _int8_by_slab(x, codes, scales)
    return torch.ops.aten._weight_int8pack_mm(x.contiguous(), codes, scales)


def _int8_triton(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    from .int_matmul_triton import MOST_ROWS, int8_matmul

    return (_int8_by_slab if x.shape[0] > MOST_ROWS else int8_matmul)(x, codes, scales)


def _int8_reference(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), dequantise_int8(codes, scales.to(wide))).to(x.dtype)


def _int4_by_slab(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    return _product(_int4_slabs, x, packed, scales, scales.shape[1])


def _int4_torch(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    if x.shape[0] > _MOST_ROWS or 2 * packed.shape[2] != torch_int4_block() or scales.dtype != x.dtype:
        return _int4_by_slab(x, packed, scales)
    # The operation wants the bytes as a matrix with a row for each row of the weight.
    rows = packed.view(scales.shape[1], -1)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), rows, INT4_GROUP, scales)


def _int4_triton(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    from .int_matmul_triton import MOST_ROWS, int4_matmul

    return (_int4_by_slab if x.shape[0] > MOST_ROWS else int4_matmul)(x, packed, scales)


def _int4_reference(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), dequantise_int4(unpack_int4(packed), scales.to(wide))).to(x.dtype)


def _refuse_torch(operation: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu" or dtype != torch.bfloat16:
        return f"it is fast for bf16 on a CPU only, got {dtype} on {device}"
    return None if hasattr(torch.ops.aten, operation) else f"this PyTorch has no {operation}"


def _refuse_torch_int8(device: torch.device, dtype: torch.dtype) -> str | None:
    return _refuse_torch("_weight_int8pack_mm", device, dtype)


def _refuse_torch_int4(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = _refuse_torch("_weight_int4pack_mm_for_cpu", device, dtype)
    if reason is None and torch_int4_block() is None:
        reason = "it has no vector code for this CPU"
    return reason


def _differentiable(multiply: Multiply, slabs: Slabs) -> Multiply:
    def run(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        return apply(_WithInputGradient, x, codes, scales, multiply, slabs)

    return run


_TORCH_NOTE = f"PyTorch's CPU operation up to {_MOST_ROWS} rows of x, slabs above"
_TRITON_NOTE = "Triton kernel for few rows of x, slabs above"
_SLAB_NOTE = "a slab of the weight in floating point at a time"
INT8_MATMUL = Op(
    "int8_matmul",
    Backend("torch", _differentiable(_int8_torch, _int8_slabs), _TORCH_NOTE, _refuse_torch_int8),
    Backend("triton", _differentiable(_int8_triton, _int8_slabs), _TRITON_NOTE, on_cuda_with_triton),
    Backend("by_slab", _differentiable(_int8_by_slab, _int8_slabs), _SLAB_NOTE),
    Backend("reference", _int8_reference, "all weights in floating point at once"),
)
INT4_MATMUL = Op(
    "int4_matmul",
    Backend("torch", _differentiable(_int4_torch, _int4_slabs), _TORCH_NOTE, _refuse_torch_int4),
    Backend("triton", _differentiable(_int4_triton, _int4_slabs), _TRITON_NOTE, on_cuda_with_triton),
    Backend("by_slab", _differentiable(_int4_by_slab, _int4_slabs), _SLAB_NOTE),
    Backend("reference", _int4_reference, "all weights in floating point at once"),
)


def int8_matmul(
    x: Float[Tensor, "... d"], codes: Int8[Tensor, "n columns"], scales: Float[Tensor, " n"], *, backend: str = "auto"
) -> Float[Tensor, "... n"]:
    """Multiply x with weights of `quantise_int8`: x · (codes · scales)ᵀ, in x's dtype, sums in fp32.

    Differentiable once, with respect to x only. Fastest where x and scales are bf16.

    Raises:
        ValueError: if x has not as many channels as codes has columns.
        BackendError: if `backend` is unknown or cannot run.
    """
    if x.shape[-1] != codes.shape[1]:
        raise ValueError(
            f"channels of int8_matmul: expected {codes.shape[1]}, got {x.shape[-1]}; check the layer before it"
        )
    run = INT8_MATMUL.choose(backend, x.device, x.dtype)
    return run(x.reshape(-1, codes.shape[1]), codes, scales).view(*x.shape[:-1], codes.shape[0])


def int4_matmul(
    x: Float[Tensor, "... d"],
    packed: UInt8[Tensor, "blocks padded half_block"],
    scales: Float[Tensor, "g n 2"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "... n"]:
    """Multiply x with weights of `quantise_int4` and `pack_int4`, in x's dtype, sums in fp32.

    n is the number of rows in whole blocks, for which there must be scales; results beyond the weight's own rows mean
    nothing. x may be narrower than the packed weight by the padding of its last group.

    Differentiable once, with respect to x only. Fastest where x and scales are bf16.

    Raises:
        ValueError: if x, packed and scales do not fit each other.
        BackendError: if `backend` is unknown or cannot run.
    """
    num_blocks, width, half = packed.shape
    if scales.shape[:2] != (width // INT4_GROUP, num_blocks * 2 * half):
        raise ValueError(
            f"scales of int4_matmul: expected {(width // INT4_GROUP, num_blocks * 2 * half, 2)} for these blocks, "
            f"got {tuple(scales.shape)}; pad the rows to whole blocks"
        )
    if not 0 <= width - x.shape[-1] < INT4_GROUP:
        raise ValueError(
            f"channels of int4_matmul: expected {width}, or fewer by less than a group of {INT4_GROUP}, "
            f"got {x.shape[-1]}; check the layer before it"
        )
    run = INT4_MATMUL.choose(backend, x.device, x.dtype)
    padded = x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))
    return run(padded.reshape(-1, width), packed, scales).view(*x.shape[:-1], scales.shape[1])
