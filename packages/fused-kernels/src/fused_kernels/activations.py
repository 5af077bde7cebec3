"""The gated and ungated activations of the decoder and of the vision tower."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .dispatch import Backend, Op, apply, on_cuda_with_triton, once


def _swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * F.silu(gate)


class _SwiGlu(torch.autograd.Function):
    """Keeps the projection alone, not silu(gate) beside it, and writes both gradients into one tensor."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        (grad,) = grad_outputs
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out


def _swiglu_by_hand(gate_up: Tensor) -> Tensor:
    return apply(_SwiGlu, gate_up) if torch.is_grad_enabled() else _swiglu_reference(gate_up)


def _gelu_tanh_reference(x: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        x = x + bias
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inner = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide.pow(3))
    return (0.5 * wide * (1 + torch.tanh(inner))).to(x.dtype)


def _gelu_tanh_torch(x: Tensor, bias: Tensor | None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def _swiglu_triton(gate_up: Tensor) -> Tensor:
    from .activations_triton import swiglu

    return swiglu(gate_up)


def _gelu_tanh_triton(x: Tensor, bias: Tensor | None) -> Tensor:
    from .activations_triton import gelu_tanh

    return gelu_tanh(x, bias)


_TRITON_NOTE = "Triton, one pass each way"
SWIGLU = Op(
    "swiglu",
    Backend("triton", _swiglu_triton, _TRITON_NOTE, on_cuda_with_triton),
    Backend("by_hand", _swiglu_by_hand, "backward pass by hand"),
    Backend("reference", _swiglu_reference, "plain PyTorch"),
)
GELU_TANH = Op(
    "gelu_tanh",
    Backend("triton", _gelu_tanh_triton, _TRITON_NOTE, on_cuda_with_triton),
    Backend("torch", _gelu_tanh_torch, "PyTorch's fused operation"),
    Backend("reference", _gelu_tanh_reference, "plain PyTorch"),
)


def swiglu(gate_up: Float[Tensor, "... two_m"], *, backend: str = "auto") -> Float[Tensor, "... m"]:
    """Gate one half of the channels by the other: up · silu(gate), gate the first half (SwiGLU, arXiv:2002.05202 §2).

    Raises:
        ValueError: if the number of channels is odd.
        BackendError: if `backend` is unknown or cannot run.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(
            f"channels of swiglu: expected an even number (gate, then up), got {gate_up.shape[-1]}; "
            "check the projection before it"
        )
    return SWIGLU.run(backend, gate_up.device, gate_up.dtype, gate_up)


def gelu_tanh(
    x: Float[Tensor, "... d"], bias: Float[Tensor, " d"] | None = None, *, backend: str = "auto"
) -> Float[Tensor, "... d"]:
    """Apply the tanh form of GELU to x (+ bias): ½ x (1 + tanh(√(2/π) (x + 0.044715 x³))) (arXiv:1606.08415 §2).

    Raises:
        BackendError: if `backend` is unknown or cannot run.
    """
    return GELU_TANH.run(backend, x.device, x.dtype, x, bias)
