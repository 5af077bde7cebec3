"""The layers on a CPU without gradients, past the modules: their calls would cost a small model more than its products.

What `model.DecoderLayer` computes: few tokens by one call for all layers, where each is plain matrices and a kernel for
that can run; else layer by layer, where what is no plain matrix, an adapter or integers, is called as it is.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_kernels import DecoderStack, LayerWeights, TokenEnds, linear
from fused_kernels.activations import SWIGLU
from fused_kernels.norms import RMS_NORM

from .projection import Projection

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q[t, h, k], k[t, g, k], v[t, g, k]) → [t, h, k]: where keys come from and who sees whom."""
Turn = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Heads of a layer's product [t, h + 2g, k] → queries and keys, turned by their positions, and values."""
Product = Callable[[Tensor], Tensor]
"""x[t, d] → [t, n]"""
Addition = Callable[[Tensor, Tensor], Tensor]
"""(residual[t, n], x[t, d]) → residual and product, [t, n]"""


class PlainLayer(NamedTuple):
    """A layer as operations that are ready to be called."""

    input_norm: Tensor
    qkv: Product
    add_o: Addition
    post_norm: Tensor
    gate_up: Product
    add_down: Addition


class LayerParts(NamedTuple):
    """What a layer is made of."""

    input_norm: Tensor
    qkv: nn.Module
    o: nn.Module
    post_norm: Tensor
    gate_up: nn.Module
    down: nn.Module

    def weights(self) -> LayerWeights | None:
        """Return the weights of a layer whose matrices are plain ones."""
        found = [module.weight for module in self if type(module) is Projection]
        if len(found) != 4:
            return None
        qkv, o, gate_up, down = found
        return LayerWeights(self.input_norm, qkv, o, self.post_norm, gate_up, down)


class PlainLayers:
    """All layers, made once for all steps of an answer."""

    def __init__(
        self, layers: Sequence[LayerParts], norm: Tensor, *, eps: float, window: int | None, ends: TokenEnds | None
    ) -> None:
        """norm: behind the last layer. ends: embedding and head, None where they are no plain matrices."""
        self.layers = layers
        self.stack: DecoderStack | None = None
        """For one call, with the norm behind; None where not all matrices are plain ones, or no kernel takes them."""
        weights = [layer.weights() for layer in layers]
        plain = [layer for layer in weights if layer is not None]
        if 0 < len(plain) == len(layers):
            stack = DecoderStack(plain, norm, eps=eps, window=window)
            self.stack = stack if stack.most_tokens else None
        is_like_layers = self.stack is not None and ends is not None and ends.kind == self.stack.kind
        self.ends = ends if is_like_layers else None
        """Embedding and head, for a call from token to token; None where they are not such as the layers are."""

    @functools.cached_property
    def one_by_one(self) -> list[PlainLayer]:
        """For a call each."""
        return [
            PlainLayer(
                *(layer.input_norm, _product(layer.qkv), _addition(layer.o)),
                *(layer.post_norm, _product(layer.gate_up), _addition(layer.down)),
            )
            for layer in self.layers
        ]


def _product(module: nn.Module) -> Product:
    if type(module) is not Projection:
        return module
    if module.weight.dtype.itemsize < 4:
        # how half precision is multiplied depends on the machine
        return partial(linear, weight=module.weight)
    return partial(torch.mm, mat2=module.weight.t())


def _addition(module: nn.Module) -> Addition:
    if type(module) is Projection and module.weight.dtype.itemsize >= 4:
        matrix = module.weight.t()
        return lambda residual, x: torch.addmm(residual, x, matrix)
    product = _product(module)
    return lambda residual, x: residual + product(x)


def pass_through(
    layers: Sequence[PlainLayer], x: Tensor, turn: Turn, attend: Attend, head_dim: int, eps: float
) -> Tensor:
    """Take tokens [t, d] through the layers; return the residual after the last."""
    num_tokens = x.shape[0]
    norm = RMS_NORM.choose("auto", x.device, x.dtype)
    activate = SWIGLU.choose("auto", x.device, x.dtype)
    for index, layer in enumerate(layers):
        heads = layer.qkv(norm(x, layer.input_norm, eps)).view(num_tokens, -1, head_dim)
        x = layer.add_o(x, attend(index, *turn(heads)).reshape(num_tokens, -1))
        x = layer.add_down(x, activate(layer.gate_up(norm(x, layer.post_norm, eps))))
    return x
