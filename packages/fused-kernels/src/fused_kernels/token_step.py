"""A decoding step in one call: a token for each row of a cache, from its id to the logits behind it."""

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .decoder_stack import (
    DecoderStack,
    HeldKeys,
    check_held,
    decoder_layers_reference,
    native_sizes,
    refuse_native_layers,
)
from .dispatch import Backend, Op
from .native import call_native, refuse_native


class TokenEnds(NamedTuple):
    """What stands before the layers and behind them."""

    embedding: Float[Tensor, "v d"]
    head: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None


class _Ends(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("embedding", "head", "bias")), ("vocab_size", ctypes.c_int64)]


def _decode_tokens_native(
    ids: Tensor, stack: DecoderStack, ends: TokenEnds, held: HeldKeys, cos: Tensor, sin: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    embedding, head, bias = ends
    sizes = native_sizes(len(ids), stack, held, cos)
    addresses = _Ends(embedding.data_ptr(), head.data_ptr(), None if bias is None else bias.data_ptr(), len(head))
    cos, sin, ids = cos.contiguous(), sin.contiguous(), ids.contiguous()
    logits, likeliest = head.new_empty(len(ids), len(head)), torch.empty_like(ids)
    is_outside = call_native(
        "decode_tokens",
        head.dtype,
        ctypes.addressof(sizes),
        ctypes.addressof(stack.addresses),
        stack.norm.data_ptr(),
        ctypes.addressof(held.key_addresses),
        ctypes.addressof(held.value_addresses),
        cos.data_ptr(),
        sin.data_ptr(),
        ctypes.addressof(addresses),
        ids.data_ptr(),
        lengths.data_ptr(),
        logits.data_ptr(),
        likeliest.data_ptr(),
    )
    if is_outside:
        raise _outside_tokens(ids, ends, held, cos, lengths)
    return logits, likeliest


def _outside_tokens(ids: Tensor, ends: TokenEnds, held: HeldKeys, cos: Tensor, lengths: Tensor) -> ValueError:
    found = [f"{int(numbers.min())} to {int(numbers.max())}" for numbers in (ids, lengths)]
    most = min(len(cos), held.capacity)
    return ValueError(
        f"ids and lengths: expected them in 0 to {len(ends.head) - 1} and 0 to {most - 1}, got {' and '.join(found)}; "
        "reserve room in the cache first"
    )


def _refuse_native_tokens(
    ids: Tensor, stack: DecoderStack, ends: TokenEnds, held: HeldKeys, cos: Tensor, sin: Tensor, lengths: Tensor
) -> str | None:
    tensors = [weight for weight in ends if weight is not None]
    if any((weight.device, weight.dtype) != stack.kind or not weight.is_contiguous() for weight in tensors):
        return "it needs an embedding and a head that lie row by row, of the layers' device and dtype"
    if not lengths.is_contiguous():
        return "it needs lengths that lie one by one"
    return refuse_native_layers(ends.embedding[: len(ids)], stack, held, cos, sin)


def _decode_tokens_reference(
    ids: Tensor, stack: DecoderStack, ends: TokenEnds, held: HeldKeys, cos: Tensor, sin: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    is_id, most = (ids >= 0) & (ids < len(ends.embedding)), min(len(cos), held.capacity)
    if not (is_id & (lengths >= 0) & (lengths < most)).all():
        raise _outside_tokens(ids, ends, held, cos, lengths)
    rows = torch.arange(len(ids), device=ids.device)
    hidden = decoder_layers_reference(ends.embedding[ids], stack, held, cos, sin, lengths, rows, lengths)
    logits = F.linear(hidden, ends.head, ends.bias)
    lengths += 1
    return logits, logits.argmax(dim=-1)


DECODE_TOKENS = Op(
    "decode_tokens",
    Backend("native", _decode_tokens_native, "C++, few rows, one call", refuse_native, _refuse_native_tokens),
    Backend("reference", _decode_tokens_reference, "layer by layer in plain PyTorch"),
)


def decode_tokens(
    ids: Int[Tensor, " b"],
    stack: DecoderStack,
    ends: TokenEnds,
    held: HeldKeys,
    cos: Float[Tensor, "p r"],
    sin: Float[Tensor, "p r"],
    lengths: Int[Tensor, " b"],
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "b v"], Int[Tensor, " b"]]:
    """Append a token to each row of the keys; return the logits behind it, and which is the largest.

    As `decoder_layers` between embedding and head: token i stands at `lengths[i]` of row i, which are its angles too.
    `lengths` are then counted up, in place.

    Raises:
        ValueError: if shapes do not fit each other, or a token or a position is not there; nothing is changed.
        BackendError: if `backend` is unknown or cannot run.
    """
    check_held(stack, held, cos, sin)
    shape, bias = ends.embedding.shape, ends.bias
    fits_ends = ends.head.shape == shape == (shape[0], stack.width) and (bias is None or bias.shape == shape[:1])
    if not fits_ends or ids.shape != (held.batch,) or lengths.shape != (held.batch,):
        raise ValueError(
            f"tokens of decode_tokens: expected ids and lengths for each of {held.batch} rows, embedding and head [v, "
            f"{stack.width}], bias [v] or None, got {tuple(ids.shape)}, {tuple(lengths.shape)}, {tuple(shape)}, "
            f"{tuple(ends.head.shape)} and {None if bias is None else tuple(bias.shape)}; give those of one model"
        )
    if not ids.dtype == lengths.dtype == torch.int64:
        raise ValueError(f"ids and lengths: expected int64, got {ids.dtype} and {lengths.dtype}; convert them")
    return DECODE_TOKENS.run(backend, ids.device, ends.head.dtype, ids, stack, ends, held, cos, sin, lengths)
