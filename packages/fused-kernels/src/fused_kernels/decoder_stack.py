"""All layers of a decoder in one call, for the few tokens of a decoding step or of a turn's new text.

Pre-norm layers with fused matrices, as Phi-3's: RMSNorm, q, k and v by one product, rotary positions, keys and values
into a cache, grouped causal attention over it, the residual; RMSNorm, SwiGLU, the residual. A last RMSNorm.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .activations import swiglu
from .dense import cached_attention
from .dispatch import Backend, Op
from .native import call_native, refuse_native
from .norms import rms_norm
from .rotary import rotary_embedding

# Beyond, oneDNN's blocks, which make use of a cache, are ahead: 384 → 2,048 in fp32 on two AVX-512 cores takes them
# half as long again for 32 tokens, and half the time for 64.
_MOST_TOKENS = 32


class LayerWeights(NamedTuple):
    """A layer's weights."""

    input_norm: Float[Tensor, " d"]
    qkv: Float[Tensor, "n d"]
    """The rows of q, then k, then v: n = (h + 2g) · k."""
    o: Float[Tensor, "d m"]
    """m = h · k"""
    post_norm: Float[Tensor, " d"]
    gate_up: Float[Tensor, "f d"]
    """The rows of the gate, then up."""
    down: Float[Tensor, "d e"]
    """e = f / 2"""


def kind_of(tensors: Sequence[Tensor]) -> tuple[torch.device, torch.dtype] | None:
    """Return device and dtype of tensors that all have these and lie row by row in memory, else None."""
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
    return kinds.pop() if len(kinds) == 1 and all(tensor.is_contiguous() for tensor in tensors) else None


class DecoderStack:
    """The weights of all layers, gathered once for many calls.

    What is written into a weight later is seen; one that is moved (`.to()`, `.data =`) is held and used as it was.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        norm: Float[Tensor, " d"],
        *,
        eps: float,
        window: int | None = None,
    ) -> None:
        """Gather them.

        norm: of the last layer's residual. eps: of all norms. window: a token sees itself and the window − 1 before it.

        Raises:
            ValueError: there is no layer, shapes do not fit each other, or the window has no token.
        """
        if window is not None and window < 1:
            raise ValueError(f"window: expected at least 1 token, or None, got {window}; use None for no window")
        self.layers, self.norm, self.eps, self.window = tuple(layers), norm, eps, window
        found = [tuple(weight.shape for weight in layer) for layer in layers]
        if not layers or set(found) != {_expected_shapes(layers[0])} or norm.shape != layers[0].input_norm.shape:
            raise ValueError(
                "layers: expected one or more of [d], [n, d], [d, m], [d], [2e, d] and [d, e], all of the same shapes, "
                f"and a norm [d], got a norm {tuple(norm.shape)} and {len(found)} layers, the first with "
                f"{[tuple(shape) for shape in found[0]] if found else None}; give the fused matrices as they are stored"
            )
        weights = [*(weight for layer in layers for weight in layer), norm]
        self.kind = kind_of(weights)
        """Device and dtype that all weights have, row by row in memory; None where they differ."""
        # views: the numbers stay where the addresses say, whatever becomes of the parameters
        self._views = [weight.detach() for weight in weights]
        self.addresses = (ctypes.c_void_p * len(weights))(*(view.data_ptr() for view in self._views))
        self.norm_address = norm.data_ptr()
        self.width, self.width_qkv, self.width_o, self.width_mlp = (
            *(len(layers[0].input_norm), len(layers[0].qkv)),
            *(layers[0].o.shape[1], layers[0].down.shape[1]),
        )

    @functools.cached_property
    def most_tokens(self) -> int:
        """Up to so many tokens `decoder_layers` runs a kernel; 0: it has but its reference for these weights."""
        if self.kind is None or DECODER_LAYERS.choose("auto", *self.kind) is decoder_layers_reference:
            return 0
        return _MOST_TOKENS


def _expected_shapes(layer: LayerWeights) -> tuple[torch.Size, ...]:
    width, inner = len(layer.input_norm), layer.down.shape[1]
    shapes = (width,), (len(layer.qkv), width), (width, layer.o.shape[1]), (width,), (2 * inner, width), (width, inner)
    return tuple(map(torch.Size, shapes))


class HeldKeys:
    """Keys and values of all layers, gathered once for as long as they stay where they are."""

    def __init__(self, keys: Sequence[Float[Tensor, "b g s k"]], values: Sequence[Float[Tensor, "b g s k"]]) -> None:
        """Gather them.

        Raises:
            ValueError: not as many keys as values, or not all of one shape.
        """
        self.keys, self.values = tuple(keys), tuple(values)
        shapes = {layer.shape for layer in (*keys, *values)}
        if len(keys) != len(values) or len(shapes) != 1:
            raise ValueError(
                f"keys and values: expected [b, g, s, k], the same for each layer, got {len(keys)} and {len(values)} "
                f"of {sorted(map(tuple, shapes))}; give both for each layer"
            )
        self.batch, self.num_groups, self.capacity, self.head_dim = shapes.pop()
        self.kind = kind_of([*keys, *values])
        """Device and dtype that all have, head by head in memory; None where they differ."""
        addresses = ctypes.c_void_p * len(keys)
        self.key_addresses = addresses(*(layer.data_ptr() for layer in keys))
        self.value_addresses = addresses(*(layer.data_ptr() for layer in values))


class _Sizes(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_threads", "num_layers", "num_tokens", "width", "num_heads")),
        *((name, ctypes.c_int64) for name in ("num_kv_heads", "head_dim", "mlp_width", "num_positions", "num_angles")),
        *((name, ctypes.c_int64) for name in ("batch", "capacity", "window")),
        ("eps", ctypes.c_float),
    ]


def native_sizes(num_tokens: int, stack: DecoderStack, held: HeldKeys, cos: Tensor) -> ctypes.Structure:
    """Return what the kernels are told of sizes."""
    head_dim = held.head_dim
    return _Sizes(
        torch.get_num_threads(), len(stack.layers), num_tokens, stack.width, stack.width_o // head_dim,
        held.num_groups, head_dim, stack.width_mlp, *cos.shape,
        held.batch, held.capacity, stack.window or 0, stack.eps,
    )  # fmt: skip


def _decoder_layers_native(
    x: Tensor,
    stack: DecoderStack,
    held: HeldKeys,
    cos: Tensor,
    sin: Tensor,
    angles: Tensor,
    rows: Tensor,
    positions: Tensor,
) -> Tensor:
    sizes = native_sizes(len(x), stack, held, cos)
    tensors = [tensor.contiguous() for tensor in (cos, sin, angles, rows, positions, x)]
    out = torch.empty_like(tensors[-1])
    is_outside = call_native(
        "decoder_layers",
        x.dtype,
        ctypes.addressof(sizes),
        ctypes.addressof(stack.addresses),
        stack.norm_address,
        ctypes.addressof(held.key_addresses),
        ctypes.addressof(held.value_addresses),
        *(tensor.data_ptr() for tensor in tensors),
        out.data_ptr(),
    )
    if is_outside:
        raise _outside(held, cos, angles, rows, positions)
    return out


def _outside(held: HeldKeys, cos: Tensor, angles: Tensor, rows: Tensor, positions: Tensor) -> ValueError:
    found = [f"{int(numbers.min())} to {int(numbers.max())}" for numbers in (angles, rows, positions)]
    return ValueError(
        f"angles, rows and positions: expected them in 0 to {len(cos) - 1}, {held.batch - 1} and {held.capacity - 1}, "
        f"got {', '.join(found)}; reserve room in the cache first"
    )


def _refuse_native_call(
    x: Tensor, stack: DecoderStack, held: HeldKeys, cos: Tensor, sin: Tensor, *places: Tensor
) -> str | None:
    return refuse_native_layers(len(x), (x.device, x.dtype), stack, held, cos, sin, *places)


def refuse_native_layers(
    num_tokens: int,
    kind: tuple[torch.device, torch.dtype],
    stack: DecoderStack,
    held: HeldKeys,
    cos: Tensor,
    sin: Tensor,
    *places: Tensor,
) -> str | None:
    """Refuse what the kernel is not written for, or is no gain for."""
    if torch.is_grad_enabled():
        return "it has no backward pass; call it within torch.no_grad()"
    if not 0 < num_tokens <= _MOST_TOKENS:
        return f"it is for 1 to {_MOST_TOKENS} tokens, got {num_tokens}"
    if not kind == stack.kind == held.kind:
        return "it needs weights, keys and values that lie row by row, all of x's device and dtype"
    if not cos.dtype == sin.dtype == torch.float32:
        return "it needs cosine and sine in fp32"
    device = kind[0]
    if any(tensor.device != device for tensor in (cos, sin, *places)):
        return f"it needs angles, rows and positions where the weights are, on {device}"
    return None


def decoder_layers_reference(
    x: Tensor,
    stack: DecoderStack,
    held: HeldKeys,
    cos: Tensor,
    sin: Tensor,
    angles: Tensor,
    rows: Tensor,
    positions: Tensor,
) -> Tensor:
    """As `decoder_layers`, by the formulas."""
    ends = (angles, len(cos)), (rows, held.batch), (positions, held.capacity)
    if any(((numbers < 0) | (numbers >= end)).any() for numbers, end in ends):
        raise _outside(held, cos, angles, rows, positions)
    seen = torch.arange(held.capacity, device=x.device)
    is_hidden = seen > positions[:, None]
    if stack.window is not None:
        is_hidden |= seen <= positions[:, None] - stack.window
    bias = torch.zeros_like(is_hidden, dtype=torch.promote_types(x.dtype, torch.float32))
    bias = bias.masked_fill(is_hidden, -torch.inf)[:, None]
    num_groups = held.num_groups
    for layer, keys, values in zip(stack.layers, held.keys, held.values, strict=True):
        normed = rms_norm(x, layer.input_norm, stack.eps, backend="reference")
        heads = F.linear(normed, layer.qkv).view(len(x), -1, held.head_dim)
        q, k, v = heads.split((heads.shape[1] - 2 * num_groups, num_groups, num_groups), dim=1)
        q, k = rotary_embedding(q, k, cos[angles], sin[angles], backend="reference")
        keys[rows, :, positions] = k
        values[rows, :, positions] = v
        mixed = cached_attention(q[:, None], keys[rows], values[rows], bias=bias, backend="reference")
        x = x + F.linear(mixed.flatten(1), layer.o)
        normed = rms_norm(x, layer.post_norm, stack.eps, backend="reference")
        x = x + F.linear(swiglu(F.linear(normed, layer.gate_up), backend="reference"), layer.down)
    return rms_norm(x, stack.norm, stack.eps, backend="reference")


DECODER_LAYERS = Op(
    "decoder_layers",
    Backend(
        "native",
        _decoder_layers_native,
        "C++, all layers in one call",
        refuse_native,
        _refuse_native_call,
    ),
    Backend("reference", decoder_layers_reference, "layer by layer in plain PyTorch"),
)


def decoder_layers(
    x: Float[Tensor, "t d"],
    stack: DecoderStack,
    held: HeldKeys,
    cos: Float[Tensor, "p r"],
    sin: Float[Tensor, "p r"],
    angles: Int[Tensor, " t"],
    rows: Int[Tensor, " t"],
    positions: Int[Tensor, " t"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "t d"]:
    """Take tokens through all layers and the last norm.

    Token i is turned by `cos[angles[i]]` and `sin[angles[i]]`, 2r ≤ k. It stands at `positions[i]` of row `rows[i]` of
    the keys, one (row, position) at most once: its key and value are written there, in place, for each layer; then it
    sees what the row holds up to its own position, or the last `window` of that.

    Raises:
        ValueError: if shapes do not fit each other, or an angle, row or position is not there.
        BackendError: if `backend` is unknown or cannot run.
    """
    check_held(stack, held, cos, sin)
    t = len(x)
    shapes = [tuple(tensor.shape) for tensor in (x, angles, rows, positions)]
    if shapes != [(t, stack.width), (t,), (t,), (t,)]:
        raise ValueError(
            f"tokens of decoder_layers: expected x [t, {stack.width}], angles, rows and positions [t], got "
            f"{', '.join(map(str, shapes))}; give one of each for each token"
        )
    if not angles.dtype == rows.dtype == positions.dtype == torch.int64:
        raise ValueError(
            f"angles, rows and positions: expected int64, got {angles.dtype}, {rows.dtype} and {positions.dtype}; "
            "convert them"
        )
    return DECODER_LAYERS.run(backend, x.device, x.dtype, x, stack, held, cos, sin, angles, rows, positions)


def check_held(stack: DecoderStack, held: HeldKeys, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError unless keys and angles are such as these layers have."""
    width_kv = held.num_groups * held.head_dim
    fits_held = (
        len(held.keys) == len(stack.layers)
        and stack.width_qkv == stack.width_o + 2 * width_kv
        and width_kv > 0
        and stack.width_o % width_kv == 0
    )
    if not fits_held:
        raise ValueError(
            f"held keys: expected {len(stack.layers)} layers of g heads with 2gk = {stack.width_qkv - stack.width_o}, "
            f"gk a part of {stack.width_o}, got {len(held.keys)} with g, k = {(held.num_groups, held.head_dim)}; "
            "make the cache for these layers"
        )
    if cos.shape != sin.shape or 2 * cos.shape[1] > held.head_dim:
        raise ValueError(
            f"cos and sin: expected [p, r] with 2r of at most {held.head_dim}, got {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}; give both for the channels that turn"
        )
