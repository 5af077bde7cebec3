"""RMSNorm (arXiv:1910.07467) and LayerNorm (arXiv:1607.06450) over the last axis, statistics in fp32.

Each also as one operation with the addition before it, since a block of a transformer adds, then normalises.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .dispatch import Backend, Op, apply, on_cuda_with_triton, once

# A Triton program holds a whole row in registers.
_TRITON_WIDTH = 8192


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(_statistics_dtype(x))
    normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normalised.to(x.dtype) * weight).to(x.dtype)


def _layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = x.to(_statistics_dtype(x))
    centred = wide - wide.mean(-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normalised * weight + bias).to(x.dtype)


def _layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


@functools.lru_cache(maxsize=32)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # may be made while decoding and used while training: it must not be an inference tensor
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)


def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and one over the root mean square of each row."""
    dtype = _statistics_dtype(x)
    wide = x if x.dtype == dtype else x.to(dtype)
    # Five operations where the formula has nine: for one token each costs its call.
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    r = torch.addcmul(_constant(eps, dtype, x.device), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    normalised = wide * r
    return (normalised if wide is x else normalised.to(x.dtype)).mul_(weight), r


class _RmsNorm(torch.autograd.Function):
    """RMSNorm with its backward pass by hand: half the passes over memory, and only x is kept.

    With r = 1 / sqrt(mean(x²) + eps) and g the gradient at the result,

        ∂weight = Σ_rows g x r        ∂x = r (g weight - x r² Σ_d(g weight x) / d).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, r = _normalised(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        wide, grad, scale = (tensor.to(r.dtype) for tensor in (x, grad_outputs[0], weight))
        product = (grad * wide).reshape(-1, x.shape[-1])
        grad_weight = r.reshape(-1) @ product
        inner = (product @ scale).view_as(r)
        grad_x = (grad * scale).addcmul_(wide, inner * r.square() / x.shape[-1], value=-1).mul_(r)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def _rms_norm_by_hand(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    # A function of autograd's costs a decoding step as much as what it does.
    return apply(_RmsNorm, x, weight, eps) if torch.is_grad_enabled() else _normalised(x, weight, eps)[0]


def _rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from .norms_triton import rms_norm

    return rms_norm(x, weight, eps)


def _layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from .norms_triton import layer_norm

    return layer_norm(x, weight, bias, eps)


def _add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return total, _rms_norm_reference(total, weight, eps)


def _add_rms_norm_by_hand(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return total, _rms_norm_by_hand(total, weight, eps)


def _add_rms_norm_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from .norms_triton import add_rms_norm

    return add_rms_norm(x, residual, weight, eps)


def _add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = residual + x
    return total, _layer_norm_reference(total, weight, bias, eps)


def _add_layer_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = residual + x
    return total, _layer_norm_torch(total, weight, bias, eps)


def _add_layer_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from .norms_triton import add_layer_norm

    return add_layer_norm(x, residual, weight, bias, eps)


def _refuse_width(x: Tensor) -> str | None:
    width = x.shape[-1]
    return None if 0 < width <= _TRITON_WIDTH else f"it holds rows of 1 to {_TRITON_WIDTH} numbers, got {width}"


def _refuse_norm(x: Tensor, *_: object) -> str | None:
    return _refuse_width(x)


def _refuse_sum(x: Tensor, residual: Tensor, *_: object) -> str | None:
    if residual.dtype != x.dtype:
        return f"x and residual must be of one dtype, got {x.dtype} and {residual.dtype}"
    return _refuse_width(x)


_TRITON_NOTE = "Triton, one pass each way"
RMS_NORM = Op(
    "rms_norm",
    Backend("triton", _rms_norm_triton, _TRITON_NOTE, on_cuda_with_triton, _refuse_norm),
    Backend("by_hand", _rms_norm_by_hand, "backward pass by hand"),
    Backend("reference", _rms_norm_reference, "plain PyTorch"),
)
LAYER_NORM = Op(
    "layer_norm",
    Backend("triton", _layer_norm_triton, _TRITON_NOTE, on_cuda_with_triton, _refuse_norm),
    Backend("torch", _layer_norm_torch, "PyTorch's fused operation"),
    Backend("reference", _layer_norm_reference, "plain PyTorch"),
)
ADD_RMS_NORM = Op(
    "add_rms_norm",
    Backend("triton", _add_rms_norm_triton, _TRITON_NOTE, on_cuda_with_triton, _refuse_sum),
    Backend("by_hand", _add_rms_norm_by_hand, "a sum, then a backward pass by hand"),
    Backend("reference", _add_rms_norm_reference, "plain PyTorch"),
)
ADD_LAYER_NORM = Op(
    "add_layer_norm",
    Backend("triton", _add_layer_norm_triton, _TRITON_NOTE, on_cuda_with_triton, _refuse_sum),
    Backend("torch", _add_layer_norm_torch, "a sum, then PyTorch's fused operation"),
    Backend("reference", _add_layer_norm_reference, "plain PyTorch"),
)


def rms_norm(
    x: Float[Tensor, "... d"], weight: Float[Tensor, " d"], eps: float, *, backend: str = "auto"
) -> Float[Tensor, "... d"]:
    """Divide x by its root mean square over d and scale it: x / sqrt(mean(x²) + eps) · weight.

    The order is that of Llama and Phi-3: normalise in fp32, cast to x's dtype, then multiply by weight. Result in x's
    dtype.

    Raises:
        BackendError: if `backend` is unknown or cannot run.
    """
    return RMS_NORM.run(backend, x.device, x.dtype, x, weight, eps)


def layer_norm(
    x: Float[Tensor, "... d"],
    weight: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    eps: float,
    *,
    backend: str = "auto",
) -> Float[Tensor, "... d"]:
    """Standardise x over d and apply an affine map: (x - mean) / sqrt(variance + eps) · weight + bias.

    Biased variance, statistics in fp32, result in x's dtype.

    Raises:
        BackendError: if `backend` is unknown or cannot run.
    """
    return LAYER_NORM.run(backend, x.device, x.dtype, x, weight, bias, eps)


def add_rms_norm(
    x: Float[Tensor, "*shape d"],
    residual: Float[Tensor, "*shape d"],
    weight: Float[Tensor, " d"],
    eps: float,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "*shape d"], Float[Tensor, "*shape d"]]:
    """Return residual + x, and `rms_norm` of that sum.

    Raises:
        BackendError: if `backend` is unknown or cannot run.
    """
    return ADD_RMS_NORM.run(backend, x.device, x.dtype, x, residual, weight, eps)


def add_layer_norm(
    x: Float[Tensor, "*shape d"],
    residual: Float[Tensor, "*shape d"],
    weight: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    eps: float,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "*shape d"], Float[Tensor, "*shape d"]]:
    """Return residual + x, and `layer_norm` of that sum.

    Raises:
        BackendError: if `backend` is unknown or cannot run.
    """
    return ADD_LAYER_NORM.run(backend, x.device, x.dtype, x, residual, weight, bias, eps)
