"""Operations of one pack, counted from the matrices that it meets: forward, backward, and what checkpointing repeats.

A multiplication with its addition is two operations, as in a device's peak. Counted are the products with weights, the
convolutions and attention's two products; whatever goes element by element is left out. Attention's square is counted
whole, as PaLM (arXiv:2204.02311 appendix B) and `torch.utils.flop_counter` do, though a causal kernel skips half of it.

A product's backward is one more product for the gradient of its input, where anything before it is trained, and one for
that of its weight, where that is trained: a frozen tower in front has none, a frozen language model half.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import nn

from blip3_lite import Blip3
from lora_lite import LoraLinear


@dataclass(frozen=True)
class Operations:
    """Numbers of operations; sums add part by part."""

    forward: int = 0
    backward: int = 0
    repeated: int = 0
    """Of the forward pass, what is done again where layers are checkpointed."""

    @property
    def total(self) -> int:
        """Without what checkpointing repeats."""
        return self.forward + self.backward

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(self.forward + other.forward, self.backward + other.backward, self.repeated + other.repeated)


@dataclass(frozen=True)
class PackShape:
    """What operations depend on of a pack."""

    documents: tuple[int, ...]
    """Length of each in tokens, image tokens included; the two of a pair are two documents."""
    num_tiles: int
    num_groups: int
    """Sets of features that the connector reads: as many as tiles, or as images where it reads those whole."""
    num_targets: int

    @property
    def num_tokens(self) -> int:
        """Length of the pack."""
        return sum(self.documents)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _each(layers: nn.ModuleList) -> Iterable[Any]:
    """The layers, whose own types torch does not tell."""
    return layers


def _linear(rows: int, layer: nn.Linear, passes: bool) -> Operations:
    """`passes`: whether the gradient of the input is wanted."""
    width_out, width_in = layer.weight.shape
    product = 2 * rows * width_out * width_in
    found = Operations(product, product * (passes + layer.weight.requires_grad))
    if not isinstance(layer, LoraLinear) or not layer.is_enabled:
        return found
    rank = layer.lora_a.shape[0]
    down, up = 2 * rows * rank * width_in, 2 * rows * rank * width_out
    # DoRA takes the norms of W + BA.
    norms = 0 if layer.lora_magnitude is None else 2 * rank * width_in * width_out
    return found + Operations(down + up + norms, down * (passes + layer.lora_a.requires_grad) + 2 * up)


def _attention(pairs: int, width: int, passes: bool) -> Operations:
    """`pairs`: queries times keys; `width`: of all heads together. Two products, each with two in backward."""
    return Operations(4 * pairs * width, 8 * pairs * width * passes)


def tower_operations(model: Blip3, num_tiles: int) -> Operations:
    """The vision tower on so many tiles; its pooling head is not asked."""
    tower, cfg = model.vision_encoder, model.cfg.vision
    stem = tower.embeddings.patch_embedding
    convolutions = [module for module in stem.modules() if isinstance(module, nn.Conv2d)]
    rows, side = num_tiles * cfg.num_patches, cfg.grid_side * cfg.patch_px
    total = Operations()
    has_gradient = False
    for convolution in convolutions:
        side //= convolution.stride[0]
        product = 2 * num_tiles * side**2 * prod(convolution.weight.shape)
        total += Operations(product, product * (has_gradient + convolution.weight.requires_grad))
        has_gradient = has_gradient or _is_trained(convolution)
    has_gradient = has_gradient or _is_trained(tower.embeddings)
    for layer in _each(tower.encoder.layers):
        has_gradient = has_gradient or _is_trained(layer)
        found = _attention(rows * cfg.num_patches, cfg.width, has_gradient)
        for linear in _linears(layer):
            found += _linear(rows, linear, has_gradient)
        total += _checkpointed(found, has_gradient)
    return total


def connector_operations(model: Blip3, shape: PackShape) -> Operations:
    """The resampler on the features of a pack's tiles."""
    connector, cfg = model.vision_tokenizer, model.cfg.connector
    has_gradient = _is_trained(model.vision_encoder) or _is_trained(connector)
    # The first layer's queries are the latents themselves.
    has_latent_gradient = _is_trained(connector)
    features = shape.num_tiles * model.cfg.vision.num_patches
    queries = shape.num_groups * cfg.num_latents
    keys = features + queries
    total = Operations()
    for attn, mlp in _each(connector.layers):
        found = _linear(queries, attn.to_q, has_latent_gradient) + _linear(keys, attn.to_kv, has_gradient)
        found += _attention(cfg.num_latents * keys, cfg.inner_dim, has_gradient)
        for linear in (attn.to_out, *_linears(mlp)):
            found += _linear(queries, linear, has_gradient)
        total += _checkpointed(found, has_gradient)
        has_latent_gradient = has_gradient
    return total + _linear(queries, connector.projection, has_gradient)


def lm_operations(model: Blip3, shape: PackShape) -> Operations:
    """The decoder's layers, without the head."""
    lm, cfg = model.lang_model, model.cfg.lm
    tokens = shape.num_tokens
    window = cfg.sliding_window or tokens
    pairs = sum(length * min(length, window) for length in shape.documents)
    has_gradient = _is_trained(lm.model.embed_tokens)
    has_gradient = has_gradient or _is_trained(model.vision_encoder) or _is_trained(model.vision_tokenizer)
    total = Operations()
    for layer in _each(lm.model.layers):
        attn, mlp = layer.self_attn, layer.mlp
        found = _linear(tokens, attn.qkv_proj, has_gradient)
        has_gradient = has_gradient or _is_trained(attn.qkv_proj)
        found += _attention(pairs, cfg.num_heads * cfg.head_dim, has_gradient)
        for linear in (attn.o_proj, mlp.gate_up_proj, mlp.down_proj):
            found += _linear(tokens, linear, has_gradient)
            has_gradient = has_gradient or _is_trained(linear)
        total += _checkpointed(found, has_gradient)
    return total


def head_operations(model: Blip3, shape: PackShape, *, is_preference: bool) -> Operations:
    """Head and loss on the target positions (see `fused_kernels.linear_loss`): gradients come with the loss, but for
    pairs, where the backward pass makes the logits again."""
    weight = model.lang_model.head_weight
    product = 2 * shape.num_targets * prod(weight.shape)
    gradients = product * (_is_trained(model) + weight.requires_grad)
    return Operations(product, gradients + product) if is_preference else Operations(product + gradients, 0)


def pack_operations(model: Blip3, shape: PackShape, *, is_preference: bool) -> dict[str, Operations]:
    """All of a pack's, by part. Of pairs also the reference's, which is asked once a pair: the model without adapters.

    `model` may be on the meta device; its freeze plan and adapters must be applied.
    """
    found = {
        "vision tower": tower_operations(model, shape.num_tiles),
        "connector": connector_operations(model, shape),
        "language model": lm_operations(model, shape),
        "head and loss": head_operations(model, shape, is_preference=is_preference),
    }
    if is_preference:
        # The tower and the connector see the tiles again; without adapters the products with the base weights are left.
        linears = [linear for layer in _each(model.lang_model.model.layers) for linear in _linears(layer)]
        adapters = sum(
            (_linear(shape.num_tokens, linear, False).forward - 2 * shape.num_tokens * prod(linear.weight.shape))
            for linear in linears
        )
        forward = sum(part.forward for part in found.values()) - adapters
        found["reference"] = Operations(forward, 0)
    return found


def _linears(module: nn.Module) -> Iterable[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _checkpointed(layer: Operations, has_gradient: bool) -> Operations:
    return Operations(layer.forward, layer.backward, layer.forward if has_gradient else 0)
