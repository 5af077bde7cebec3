"""Scaled dot-product attention over a batch (arXiv:1706.03762 §3.2.1), keys and values grouped (arXiv:2305.13245)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from .dispatch import Backend, Op, on_cuda_in_half_precision


def _visible(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """Join the mask and the causal rule into bool[b or 1, 1, t or 1, s] (True = attend), or None if all is visible."""
    if mask is not None:
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
    if not is_causal or q.shape[1] == 1:
        return mask
    t, s = q.shape[1], k.shape[1]
    causal = torch.ones(t, s, dtype=torch.bool, device=q.device).tril(s - t)
    return causal[None, None] if mask is None else mask & causal


def _attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bthk,bshk->bhts", q.to(wide), k.to(wide)) * scale
    visible = _visible(q, k, mask, is_causal)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
        # A query that sees no key at all has only -inf: its softmax is NaN, and is defined here as no attention.
        probs = torch.softmax(scores, dim=-1).masked_fill(~visible, 0.0)
    else:
        probs = torch.softmax(scores, dim=-1)
    return torch.einsum("bhts,bshk->bthk", probs, v.to(wide)).to(q.dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """Call PyTorch's attention on q [b, t, h, k] and k, v [b, s, g, k]; its is_causal counts from the first key.

    On a CPU half-precision input is computed in fp32. Without bf16 instructions, forward and backward of 24 documents
    of 40 to 160 tokens, 4 heads of 32, one thread, take 22 ms that way and 80 ms directly; one query at 768 keys, 32
    heads of 96, two threads, takes 2.6 ms and 6.9 ms.
    """
    dtype = q.dtype
    if q.device.type == "cpu" and dtype.itemsize < 4:
        q, k, v = q.float(), k.float(), v.float()
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2).to(dtype)


def _attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    # PyTorch's is_causal counts from the first key; ours from the last, so it only serves where both are the same.
    is_square = mask is None and is_causal and q.shape[1] == k.shape[1]
    visible = None if is_square else _visible(q, k, mask, is_causal)
    return sdpa(q, k, v, mask=visible, is_causal=is_square, scale=scale)


# What a Triton kernel of attention holds of a head, and the queries below which it has too little to do at a time.
MAX_TRITON_HEAD_DIM = 128
_FEWEST_TRITON_QUERIES = 16


def _attention_triton(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    from .dense_triton import attention

    del is_causal
    return attention(q, k, v, mask, scale)


def _refuse_heads(q: Tensor, *others: Tensor) -> str | None:
    if q.shape[-1] > MAX_TRITON_HEAD_DIM:
        return f"it holds heads of up to {MAX_TRITON_HEAD_DIM} channels, got {q.shape[-1]}"
    if any(x.dtype != q.dtype for x in others):
        return f"queries, keys and values must be of one dtype, got {[str(x.dtype) for x in (q, *others)]}"
    if q.shape[1] < _FEWEST_TRITON_QUERIES:
        return f"it is for {_FEWEST_TRITON_QUERIES} queries or more, got {q.shape[1]}"
    return None


def _refuse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> str | None:
    del scale
    if is_causal:
        return "it is bidirectional"
    if mask is not None and mask.ndim != 2:
        return "its mask is over keys, not over pairs"
    return _refuse_heads(q, k, v)


ATTENTION = Op(
    "attention",
    Backend("triton", _attention_triton, "Triton, bidirectional", on_cuda_in_half_precision, _refuse_attention),
    Backend("sdpa", _attention_sdpa, "PyTorch's scaled_dot_product_attention"),
    Backend("reference", _attention_reference, "plain PyTorch"),
)


def _joined(
    more: tuple[Tensor, Tensor], k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    more_k, more_v = more
    if mask is not None:
        mask = torch.cat((mask, mask.new_ones(more_k.shape[:2])), dim=1)
    return torch.cat((k, more_k), dim=1), torch.cat((v, more_v), dim=1), mask


def _joint_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, more: tuple[Tensor, Tensor], mask: Tensor | None, scale: float | None
) -> Tensor:
    k, v, mask = _joined(more, k, v, mask)
    return _attention_reference(q, k, v, mask, False, scale)


def _joint_attention_sdpa(
    q: Tensor, k: Tensor, v: Tensor, more: tuple[Tensor, Tensor], mask: Tensor | None, scale: float | None
) -> Tensor:
    k, v, mask = _joined(more, k, v, mask)
    return _attention_sdpa(q, k, v, mask, False, scale)


def _joint_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, more: tuple[Tensor, Tensor], mask: Tensor | None, scale: float | None
) -> Tensor:
    from .dense_triton import joint_attention

    return joint_attention(q, k, v, *more, mask, scale)


def _refuse_joint_attention(q: Tensor, k: Tensor, v: Tensor, more: tuple[Tensor, Tensor], *_: object) -> str | None:
    return _refuse_heads(q, k, v, *more)


JOINT_ATTENTION = Op(
    "joint_attention",
    Backend(
        "triton",
        _joint_attention_triton,
        "Triton, one set of keys after the other",
        on_cuda_in_half_precision,
        _refuse_joint_attention,
    ),
    Backend("sdpa", _joint_attention_sdpa, "keys joined, PyTorch's scaled_dot_product_attention"),
    Backend("reference", _joint_attention_reference, "keys joined, plain PyTorch"),
)


def _cached_attention_reference(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    group = q.shape[2] // keys.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys, values = (x.to(wide).repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("bthk,bhsk->bhts", q.to(wide), keys) / math.sqrt(q.shape[-1])
    if bias is not None:
        scores = scores + bias[:, None]
    return torch.einsum("bhts,bhsk->bthk", torch.softmax(scores, dim=-1), values).to(q.dtype)


def _cached_attention_sdpa(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    dtype, shape, num_groups = q.dtype, q.shape, keys.shape[1]
    if q.device.type == "cpu" and dtype.itemsize < 4:
        # as in `sdpa`
        q, keys, values = q.float(), keys.float(), values.float()
    if bias is not None:
        bias = bias[:, None].to(q.dtype)
    if shape[1] == 1:
        # the query heads that share a key head stand as its queries
        out = F.scaled_dot_product_attention(q.reshape(shape[0], num_groups, -1, shape[3]), keys, values, bias)
        return out.reshape(shape).to(dtype)
    is_grouped = num_groups != shape[2]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, bias, enable_gqa=is_grouped)
    return out.transpose(1, 2).to(dtype)


CACHED_ATTENTION = Op(
    "cached_attention",
    Backend("sdpa", _cached_attention_sdpa, "PyTorch's scaled_dot_product_attention"),
    Backend("reference", _cached_attention_reference, "plain PyTorch"),
)


def check_groups(op: str, num_heads: int, num_kv_heads: int) -> None:
    """Raise ValueError unless the key heads divide the query heads."""
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"heads of {op}: expected key heads that divide the {num_heads} query heads, got {num_kv_heads}; "
            "repeat or drop key heads"
        )


def attention(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b s g k"],
    v: Float[Tensor, "b s g k"],
    *,
    mask: Bool[Tensor, "b s"] | Bool[Tensor, "b t s"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b t h k"]:
    """Attend: softmax(q kᵀ · scale) v, for each head; query head i uses key head i // (h / g).

    mask: True = attend; over keys, or over queries and keys.
    is_causal: the queries are the last t of the s positions, so query i sees keys j ≤ i + s - t. t = 2, s = 4:

        1 1 1 0
        1 1 1 1

    scale: 1/√k if None. A query that sees no key gives zeros.

    Raises:
        ValueError: if g does not divide h, or is_causal with more queries than keys.
        BackendError: if `backend` is unknown or cannot run.
    """
    check_groups("attention", q.shape[2], k.shape[2])
    if is_causal and q.shape[1] > k.shape[1]:
        raise ValueError(
            f"queries of causal attention: expected at most as many as keys ({k.shape[1]}), got {q.shape[1]}; "
            "the queries are the last positions of the keys"
        )
    return ATTENTION.run(backend, q.device, q.dtype, q, k, v, mask, is_causal, scale)


def joint_attention(
    q: Float[Tensor, "b t h k"],
    k: Float[Tensor, "b s g k"],
    v: Float[Tensor, "b s g k"],
    more_k: Float[Tensor, "b r g k"],
    more_v: Float[Tensor, "b r g k"],
    *,
    mask: Bool[Tensor, "b s"] | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b t h k"]:
    """Attend to two sets of keys as if they were one: softmax(q [k ; more_k]ᵀ · scale) [v ; more_v], for each head.

    mask: over the first set, True = attend; the second is seen whole. scale: 1/√k if None. A resampler's latents read
    features and themselves so (Flamingo, arXiv:2204.14198 §2.1), without a copy of both.

    Raises:
        ValueError: if g does not divide h.
        BackendError: if `backend` is unknown or cannot run.
    """
    check_groups("joint_attention", q.shape[2], k.shape[2])
    return JOINT_ATTENTION.run(backend, q.device, q.dtype, q, k, v, (more_k, more_v), mask, scale)


def cached_attention(
    q: Float[Tensor, "b t h k"],
    keys: Float[Tensor, "b g s k"],
    values: Float[Tensor, "b g s k"],
    *,
    bias: Float[Tensor, "b t s"] | Float[Tensor, "b 1 s"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "b t h k"]:
    """Attend to what a cache holds head by head: softmax(q kᵀ / √k + bias) v, for each head.

    As `attention`, on the cache's own layout and with a mask that is a number already, 0 or -inf, made once for all
    layers: for a few new tokens of a small model each axis that is moved costs as much as a product. Each query must
    see a key.

    Raises:
        ValueError: if g does not divide h.
        BackendError: if `backend` is unknown or cannot run.
    """
    check_groups("cached_attention", q.shape[2], keys.shape[1])
    return CACHED_ATTENTION.run(backend, q.device, q.dtype, q, keys, values, bias)
