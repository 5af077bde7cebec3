"""A decoding step in one call: a token for each row of a cache, from its id to the logits behind it."""

import ctypes

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .decoder_stack import (
    DecoderStack,
    HeldKeys,
    check_held,
    decoder_layers_reference,
    kind_of,
    native_sizes,
    refuse_native_layers,
)
from .dispatch import Backend, Op
from .native import call_native, refuse_native


class _Addresses(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("embedding", "head", "bias")), ("vocab_size", ctypes.c_int64)]


class TokenEnds:
    """What stands before the layers and behind them, gathered once for many calls."""

    def __init__(self, embedding: Float[Tensor, "v d"], head: Float[Tensor, "v d"], bias: Tensor | None) -> None:
        """Gather it; bias: [v].

        Raises:
            ValueError: the shapes do not fit each other.
        """
        if embedding.shape != head.shape or (bias is not None and bias.shape != head.shape[:1]):
            raise ValueError(
                f"embedding, head and bias: expected [v, d], [v, d] and [v] or None, got {tuple(embedding.shape)}, "
                f"{tuple(head.shape)} and {None if bias is None else tuple(bias.shape)}; give those of one model"
            )
        self.embedding, self.head, self.bias = embedding, head, bias
        weights = [embedding, head] if bias is None else [embedding, head, bias]
        # as in `DecoderStack`
        self._views = [weight.detach() for weight in weights]
        self.kind = kind_of(weights)
        """Device and dtype that all have, row by row in memory; None where they differ."""
        bias_address = None if bias is None else bias.data_ptr()
        self.addresses = _Addresses(embedding.data_ptr(), head.data_ptr(), bias_address, len(head))


def _decode_tokens_native(
    ids: Tensor, stack: DecoderStack, ends: TokenEnds, held: HeldKeys, cos: Tensor, sin: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    assert ends.kind is not None
    dtype = ends.kind[1]
    sizes = native_sizes(len(ids), stack, held, cos)
    cos, sin, ids = cos.contiguous(), sin.contiguous(), ids.contiguous()
    logits, likeliest = cos.new_empty(len(ids), ends.addresses.vocab_size, dtype=dtype), torch.empty_like(ids)
    is_outside = call_native(
        "decode_tokens",
        dtype,
        ctypes.addressof(sizes),
        ctypes.addressof(stack.addresses),
        stack.norm_address,
        ctypes.addressof(held.key_addresses),
        ctypes.addressof(held.value_addresses),
        cos.data_ptr(),
        sin.data_ptr(),
        ctypes.addressof(ends.addresses),
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
    if ends.kind is None or not lengths.is_contiguous():
        return "it needs embedding and head of one device and dtype, and lengths, that lie row by row"
    return refuse_native_layers(len(ids), ends.kind, stack, held, cos, sin, ids, lengths)


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
    if ends.head.shape[1] != stack.width or ids.shape != (held.batch,) or lengths.shape != (held.batch,):
        raise ValueError(
            f"ids, lengths and head: expected one for each of {held.batch} rows and [v, {stack.width}], got "
            f"{tuple(ids.shape)}, {tuple(lengths.shape)} and {tuple(ends.head.shape)}; give those of one model"
        )
    if not ids.dtype == lengths.dtype == torch.int64:
        raise ValueError(f"ids and lengths: expected int64, got {ids.dtype} and {lengths.dtype}; convert them")
    return DECODE_TOKENS.run(backend, ids.device, ends.head.dtype, ids, stack, ends, held, cos, sin, lengths)
