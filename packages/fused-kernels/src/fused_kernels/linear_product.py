"""x Wᵀ + b: few rows by C++, and by fp32 where a CPU has half-precision numbers but no units that multiply them."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .dispatch import Backend, Op, apply, once
from .native import call_native, refuse_native

# One row is read at 0.9 to 1.1 of a copy's rate where PyTorch's product reaches 0.7 to 1.0 (fp32; bf16 0.7 to 0.9 where
# it reaches 0.4 to 0.5); up to 16 rows take half to a third less time, on two AVX-512 cores.
_MOST_NATIVE_ROWS = 16
# Below so many numbers the call costs as much as the product.
_FEWEST_NATIVE_NUMBERS = 1 << 16

# Below so many rows the product is bound by reading the weight, which is shorter as it is. 2,080 × 384 → 2,048 on two
# AVX-512 cores without bf16 units: 37 GFLOP/s as bf16, 103 by fp32, casts included.
_FEWEST_ROWS = 32
# One row and so many inputs: PyTorch's own product of matrix and vector in half precision is ahead of oneDNN's there.
# 3,072 → 9,216 on the same two cores: 12 GB/s of weights by the one, 18 by the other; 1,024 → 384: 10 and 8.
_LONG_ROW = 2048


@functools.cache
def _lacks_half_units() -> bool:
    """Whether this is an x86 CPU without bf16 instructions, where oneDNN takes them apart in software."""
    cpu: Any = torch.cpu
    return cpu._is_avx2_supported() and not (cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def is_multiplied_by_fp32(x: Tensor) -> bool:
    """Whether products of x with many rows go by fp32."""
    return _refuse_by_fp32(x.device, x.dtype) is None


def _refuse_by_fp32(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu" or dtype.itemsize != 2:
        return "it is for half precision on a CPU"
    return None if _lacks_half_units() else "this CPU multiplies bf16 itself"


class _ByFp32(torch.autograd.Function):
    """Casts are made anew in the backward pass: nothing wider than the inputs is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            out = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return out.to(x.dtype)

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            grad = grad_outputs[0].float()
            rows = grad.reshape(-1, grad.shape[-1])
            grad_x = (grad @ weight.float()).to(x.dtype) if needs_x else None
            grad_weight = (rows.t() @ x.float().reshape(-1, x.shape[-1])).to(weight.dtype) if needs_weight else None
            grad_bias = rows.sum(0).to(weight.dtype) if needs_bias else None
        return grad_x, grad_weight, grad_bias


def _linear_by_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.numel() == x.shape[-1] >= _LONG_ROW and weight.is_contiguous():
        out = torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
        return out if bias is None else out + bias
    if x.numel() < _FEWEST_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    return apply(_ByFp32, x, weight, bias)


def _linear_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    num_rows, (num_out, num_in) = x.numel() // x.shape[-1], weight.shape
    x, out = x.contiguous(), x.new_empty(*x.shape[:-1], num_out)
    bias_address = None if bias is None else bias.data_ptr()
    sizes = torch.get_num_threads(), num_rows, num_out, num_in
    call_native("linear", x.dtype, *sizes, x.data_ptr(), weight.data_ptr(), bias_address, out.data_ptr())
    return out


def _refuse_native_call(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "it has no backward pass"
    if any(tensor.dtype != x.dtype or tensor.device != x.device for tensor in tensors):
        return "it needs one dtype and one device"
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        return "the shapes do not fit"
    if not weight.is_contiguous() or not (bias is None or bias.is_contiguous()):
        return "it needs a weight that lies row by row"
    if weight.numel() < _FEWEST_NATIVE_NUMBERS or not 0 < x.numel() <= _MOST_NATIVE_ROWS * x.shape[-1]:
        return f"it is for 1 to {_MOST_NATIVE_ROWS} rows and matrices of {_FEWEST_NATIVE_NUMBERS} numbers or more"
    return None


def _linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


LINEAR = Op(
    "linear",
    Backend("native", _linear_native, "few rows by C++", refuse_native, _refuse_native_call),
    Backend("by_fp32", _linear_by_fp32, "many rows multiplied in fp32", _refuse_by_fp32),
    Backend("reference", _linear_reference, "F.linear"),
)


def linear(
    x: Float[Tensor, "... d"],
    weight: Float[Tensor, "n d"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "... n"]:
    """Multiply x with a matrix and add a bias, in x's dtype, sums in fp32; under autocast in autocast's.

    Raises:
        BackendError: if `backend` is unknown or cannot run.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return LINEAR.run(backend, x.device, x.dtype, x, weight, bias)
