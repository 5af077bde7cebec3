"""Rotary position embedding (arXiv:2104.09864 §3.2), rotate-half layout, on all or the first channels of each head."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .dispatch import Backend, Op, apply, on_cuda_with_triton, once


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    r = cos.shape[-1]
    first, second, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated.to(x.dtype), rest], dim=-1)


def _rotary_embedding_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.detach().unsqueeze(-2), sin.detach().unsqueeze(-2)
    return _rotate_reference(q, cos, sin), _rotate_reference(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """cos and sin have an axis for the heads."""
    r = cos.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    turning = wide if 2 * r == x.shape[-1] else wide[..., : 2 * r]
    # both halves by one operation where it can be: for one token each costs its call
    halves = turning.view(*x.shape[:-1], 2, r)
    out = halves * cos.unsqueeze(-2)
    first, second = out.unbind(-2)
    old_first, old_second = halves.unbind(-2)
    first.addcmul_(old_second, sin, value=-1)
    second.addcmul_(old_first, sin)
    out = out.flatten(-2)
    if 2 * r < x.shape[-1]:
        out = torch.cat((out, wide[..., 2 * r :]), dim=-1)
    return out.to(x.dtype)


class _Rotation(torch.autograd.Function):
    """A rotation is linear, and its transpose is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_outputs[0], cos, -sin), None, None


def _rotary_embedding_by_hand(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if not torch.is_grad_enabled():
        return _rotate(q, cos, sin), _rotate(k, cos, sin)
    return apply(_Rotation, q, cos, sin), apply(_Rotation, k, cos, sin)


def _rotary_embedding_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from .rotary_triton import rotary_embedding

    return rotary_embedding(q, k, cos, sin)


def _refuse_two_dtypes(q: Tensor, k: Tensor, *_: object) -> str | None:
    return None if q.dtype == k.dtype else f"q and k must be of one dtype, got {q.dtype} and {k.dtype}"


ROTARY_EMBEDDING = Op(
    "rotary_embedding",
    Backend(
        "triton", _rotary_embedding_triton, "Triton, q and k in one launch", on_cuda_with_triton, _refuse_two_dtypes
    ),
    Backend("by_hand", _rotary_embedding_by_hand, "backward pass by hand"),
    Backend("reference", _rotary_embedding_reference, "plain PyTorch"),
)


def rotary_embedding(
    q: Float[Tensor, "... t h k"],
    k: Float[Tensor, "... t g k"],
    cos: Float[Tensor, "... t r"],
    sin: Float[Tensor, "... t r"],
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "... t h k"], Float[Tensor, "... t g k"]]:
    """Rotate queries and keys by the angle of their position; fresh tensors in the dtypes of q and k.

    With r angles per position, channel c < r is paired with channel c + r ("rotate half"):

        out[c]     = x[c] · cos[c] - x[c + r] · sin[c]
        out[c + r] = x[c + r] · cos[c] + x[c] · sin[c]

    Channels from 2r on pass through unchanged. Computed in the wider of the two dtypes: with fp32 tables a bf16 model
    rotates in fp32. The tables may hold a scale (long-context variants do); they are constants and get no gradient.

    Raises:
        ValueError: if there are more than k/2 angles.
        BackendError: if `backend` is unknown or cannot run.
    """
    if 2 * cos.shape[-1] > q.shape[-1]:
        raise ValueError(
            f"angles of rotary_embedding: expected at most {q.shape[-1] // 2} for heads of {q.shape[-1]} channels, "
            f"got {cos.shape[-1]}; give cos and sin for half of the channels"
        )
    return ROTARY_EMBEDDING.run(backend, q.device, q.dtype, q, k, cos, sin)
