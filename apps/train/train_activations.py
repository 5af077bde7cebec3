"""What a pack leaves in memory for the backward pass, estimated from the layers' code. Imports no torch."""

from msgspec.structs import replace

from blip3_lite.config import Blip3Config

CHUNK_ELEMENTS = 1 << 22
"""Logits that `fused_kernels` holds at a time."""
FORMULAS = {
    "vision tower": "tiles × (patches × (layers × (8 width + 2 mlp) + width) + pixels and what the stem makes of them)",
    "connector": "layers × ((patches + latents) × (width + 2 inner) + latents × (4 width + 2 inner + 2 mlp)) "
    "+ patches × width, a tile",
    "language model": "tokens × (layers × (4 width + qkv + rotated q and k + attended + 4 mlp) + 2 width)",
}


def kept_numbers(cfg: Blip3Config, tokens: int, tiles: int) -> dict[str, int]:
    """Estimate how many numbers each part keeps for the backward pass of one pack, if it is trained whole.

    Counted from the layers' code with fused attention, which keeps no matrix of weights: what a linear map reads, what
    a norm reads, q, k, v and what they were made from, and both sides of each activation function.
    """
    vision, connector, lm = cfg.vision, cfg.connector, cfg.lm
    patches, latents = vision.num_patches, connector.num_latents
    inner, wide = connector.inner_dim, connector.ff_mult * connector.dim
    groups = num_groups(cfg, tiles)
    qkv = (lm.num_heads + 2 * lm.num_kv_heads) * lm.head_dim
    rotated = (2 * lm.num_heads + lm.num_kv_heads) * lm.head_dim
    return {
        "vision tower": tiles
        * (patches * (vision.num_layers * (8 * vision.width + 2 * vision.mlp_width) + vision.width) + _stem(cfg)),
        "connector": connector.depth
        * ((tiles * patches + groups * latents) * (connector.dim + 2 * inner)
           + groups * latents * (4 * connector.dim + 2 * inner + 2 * wide))
        + tiles * patches * connector.dim,
        "language model": tokens * (lm.num_layers * (4 * lm.width + qkv + rotated + 3 * lm.mlp_width) + 2 * lm.width),
    }  # fmt: skip


def checkpointed_numbers(cfg: Blip3Config, tokens: int, tiles: int) -> dict[str, int]:
    """Estimate the same where each layer keeps its input alone, and one layer at a time is computed again."""
    vision, connector, lm = cfg.vision, cfg.connector, cfg.lm
    patches = vision.num_patches
    one = replace(
        cfg,
        vision=replace(vision, num_layers=1),
        connector=replace(connector, depth=1),
        lm=replace(lm, num_layers=1),
    )
    inputs = {
        "vision tower": (vision.num_layers - 1) * tiles * patches * vision.width,
        "connector": (connector.depth - 1) * num_groups(cfg, tiles) * connector.num_latents * connector.dim,
        "language model": (lm.num_layers - 1) * tokens * lm.width,
    }
    return {part: numbers + inputs[part] for part, numbers in kept_numbers(one, tokens, tiles).items()}


def passing_numbers(cfg: Blip3Config, tiles: int) -> int:
    """Numbers in use at a time where a frozen tower in front looks at so many tiles; it keeps nothing."""
    width, mlp = cfg.vision.width, cfg.vision.mlp_width
    return tiles * cfg.vision.num_patches * max(6 * width, 2 * width + 2 * mlp)


def loss_bytes(cfg: Blip3Config, num_targets: int, number_bytes: int, *, trains_head: bool) -> int:
    """Bytes of head and loss at their most: a chunk's logits, the targets' rows, the gradient of the head's weight.

    Of logits there are the product, its log-softmax in fp32 and, in bf16, the gradient in that (see
    `fused_kernels.linear_loss`); of the weight's gradient the fp32 sum over chunks, the same scaled, and, in bf16, what
    autograd gets of it.
    """
    lm = cfg.lm
    has_copies = number_bytes < 4
    rows = min(max(1, CHUNK_ELEMENTS // lm.vocab_size), num_targets)
    chunk = rows * lm.vocab_size * (4 + number_bytes * (1 + has_copies))
    weight = lm.vocab_size * lm.width * (8 + number_bytes * has_copies) if trains_head else 0
    return chunk + 2 * number_bytes * num_targets * lm.width + weight


def num_groups(cfg: Blip3Config, tiles: int) -> int:
    """Sets of features that the connector reads of so many tiles: at least as many, where it reads images whole."""
    return tiles if cfg.tiling.kind != "anyres_fixed" else max(1, tiles // cfg.tiling.max_tiles)


def _stem(cfg: Blip3Config) -> int:
    """Numbers that the first convolutions keep of a tile."""
    side = cfg.vision.image_px
    kept = 3 * side**2
    if cfg.vision.stem == "conv":
        strides = cfg.vision.stem_strides
        for place, stride in enumerate(strides[:-1]):
            side //= stride
            kept += side**2 * (cfg.vision.width // 2 ** (len(strides) - 1 - place))
    return kept
