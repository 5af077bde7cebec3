"""The layers on a CPU without gradients, past the modules: their calls would cost a small model more than its products.

What `model.DecoderLayer` computes: few tokens by one call for all layers, where each is plain matrices and a kernel for
that can run; else layer by layer, where what is no plain matrix, an adapter or integers, is called as it is.
"""

from collections.abc import Callable, Iterable, Sequence
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


class PlainLayers(NamedTuple):
    """All layers, made once for all steps of an answer."""

    one_by_one: list[PlainLayer]
    stack: DecoderStack | None
    """For one call, with the norm behind them; None where not all are plain matrices, or no kernel takes these."""
    ends: TokenEnds | None
    """Embedding and head, for a call from token to token; None where they are not such as the layers are."""


def plain_layers(
    weights: Iterable[tuple[Tensor, nn.Module, nn.Module, Tensor, nn.Module, nn.Module]],
    norm: Tensor,
    eps: float,
    window: int | None,
    ends: TokenEnds | None,
) -> PlainLayers:
    """Gather layers, each as weight of a norm, qkv, o, weight of a norm, gate_up and down; `norm` is the last one's."""
    one_by_one: list[PlainLayer] = []
    stacked: list[LayerWeights] = []
    for input_norm, qkv, o, post_norm, gate_up, down in weights:
        one_by_one.append(
            PlainLayer(input_norm, _product(qkv), _addition(o), post_norm, _product(gate_up), _addition(down))
        )
        matrices = [module.weight for module in (qkv, o, gate_up, down) if type(module) is Projection]
        if len(matrices) == 4:
            stacked.append(LayerWeights(input_norm, matrices[0], matrices[1], post_norm, matrices[2], matrices[3]))
    stack = None
    if 0 < len(stacked) == len(one_by_one):
        stack = DecoderStack(stacked, norm, eps=eps, window=window)
    if stack is None or not stack.most_tokens:
        return PlainLayers(one_by_one, None, None)
    # the one call from token to token takes ends that are as the layers are
    return PlainLayers(one_by_one, stack, ends if ends is not None and ends.kind == stack.kind else None)


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
