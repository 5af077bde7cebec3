"""SigLIP's vision tower: pixels to one feature a patch, and a head that pools them to one vector an image.

Source: SigLIP, arXiv:2303.15343; the pooling head is "MAP" of arXiv:2106.04560 §3.2. Parameter names equal those of
the vision transformer in the published checkpoints: with the prefix `vision_model.` removed they load key for key.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from fused_kernels import attention, linear, normalised_patches

from .config import SiglipVisionConfig
from .encoder import Encoder, LayerNorm, Mlp, init_cut_normal, init_encoder

Pixels = Float[Tensor, "p 3 height width"] | UInt8[Tensor, "p 3 height width"]


def normalise(pixels: UInt8[Tensor, "*batch"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "*batch"]:
    """Scale bytes to [-1, 1]: mean and standard deviation 0.5 of values in [0, 1], for every channel."""
    return (pixels.to(torch.float32) / 127.5 - 1.0).to(dtype)


def interpolate_positions(table: Float[Tensor, "n d"], grid: tuple[int, int]) -> Float[Tensor, "n_new d"]:
    """Stretch a square position table to another grid, by bicubic interpolation without antialiasing.

    Args:
        table: one row a position of a square grid, row-major.
        grid: (rows, cols) wanted; the table itself is returned where that is its own grid.

    Raises:
        ValueError: a table that is not of a square grid, or an empty grid.
    """
    side = math.isqrt(len(table))
    if side * side != len(table):
        raise ValueError(f"position table: expected a square number of rows, got {len(table)}; give a square grid's")
    if min(grid) < 1:
        raise ValueError(f"grid: expected at least one row and column, got {grid}; use an image of a patch or more")
    if grid == (side, side):
        return table
    channels_first = rearrange(table, "(rows cols) d -> 1 d rows cols", rows=side)
    stretched = F.interpolate(channels_first, size=grid, mode="bicubic", align_corners=False)
    return rearrange(stretched, "1 d rows cols -> (rows cols) d")


def conv_stem(width: int, strides: Sequence[int]) -> nn.Sequential:
    """Build one 3×3 convolution a stride (2 or 3), channels doubling to the width, ReLU between.

    Patch i's feature sees its own pixels and, through the stride-2 convolutions, a few beyond its border.
    """
    channels = [3, *(width // 2 ** (len(strides) - 1 - i) for i in range(len(strides)))]
    stem = nn.Sequential()
    for i, (c_in, c_out) in enumerate(itertools.pairwise(channels)):
        if i > 0:
            stem.append(nn.ReLU())
        # At stride 3 the windows lie side by side; at stride 2 they overlap by a pixel, the first one over the border.
        stem.append(nn.Conv2d(c_in, c_out, kernel_size=3, stride=strides[i], padding=1 if strides[i] == 2 else 0))
    return stem


class PatchEmbeddings(nn.Module):
    """Patches as vectors, with learned positions added."""

    def __init__(self, cfg: SiglipVisionConfig) -> None:
        super().__init__()
        self.patch_px = cfg.patch_px
        self.native_grid = (cfg.grid_side, cfg.grid_side)
        self.patch_embedding = (
            conv_stem(cfg.width, cfg.stem_strides)
            if cfg.stem == "conv"
            else nn.Conv2d(3, cfg.width, kernel_size=cfg.patch_px, stride=cfg.patch_px)
        )
        # An Embedding only for its parameter's published name.
        self.position_embedding = nn.Embedding(cfg.num_patches, cfg.width)

    def forward(self, pixels: Pixels, interpolate: bool) -> Float[Tensor, "p n d"]:
        """Embed all whole patches, row-major."""
        rows, cols = (pixels.shape[-2] // self.patch_px, pixels.shape[-1] // self.patch_px)
        if (rows, cols) != self.native_grid and not interpolate:
            raise ValueError(
                f"pixels: expected {self.native_grid[0]}×{self.native_grid[1]} patches of {self.patch_px} px, "
                f"got {rows}×{cols} from {pixels.shape[-2]}×{pixels.shape[-1]} px; resize, or pass interpolate=True"
            )
        positions = interpolate_positions(self.position_embedding.weight, (rows, cols))
        return self._embed_patches(pixels, rows, cols) + positions

    def _embed_patches(self, pixels: Pixels, rows: int, cols: int) -> Float[Tensor, "p n d"]:
        if pixels.dtype == torch.uint8:
            weight = next(self.patch_embedding.parameters())
            if isinstance(self.patch_embedding, nn.Conv2d):
                # A convolution whose windows lie side by side is a product. From bytes, one CPU thread: 1.25 to 1.5
                # times as fast as scaling and the convolution (1 and 5 tiles of 384 px to 1152, 8 of 64 px to 128).
                patches = normalised_patches(pixels, self.patch_px, weight.dtype)
                return linear(patches, weight.flatten(1), self.patch_embedding.bias)
            pixels = normalise(pixels, weight.dtype)
        # Cropped to whole patches, so that both stems see the same pixels.
        pixels = pixels[..., : rows * self.patch_px, : cols * self.patch_px]
        # The layout that small convolutions run fastest in, and in which the patches lie as they are wanted.
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        return rearrange(self.patch_embedding(pixels), "p d rows cols -> p (rows cols) d")


class PoolingAttention(nn.Module):
    """Attention of one query to all features, with the packed parameters of `nn.MultiheadAttention`."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Float[Tensor, "1 1 d"], features: Float[Tensor, "p n d"]) -> Float[Tensor, "p d"]:
        """Pool each image's features by the same query."""
        width = features.shape[-1]
        q = F.linear(query, self.in_proj_weight[:width], self.in_proj_bias[:width])
        kv = F.linear(features, self.in_proj_weight[width:], self.in_proj_bias[width:])
        k, v = rearrange(kv, "p n (two h k) -> two p n h k", two=2, h=self.num_heads)
        q = repeat(q, "1 1 (h k) -> p 1 h k", p=len(features), h=self.num_heads)
        mixed = attention(q, k, v)
        return self.out_proj(rearrange(mixed, "p 1 h k -> p (h k)"))


class PoolingHead(nn.Module):
    """A learned probe attends to the features; a residual MLP follows."""

    def __init__(self, cfg: SiglipVisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, cfg.width))
        self.attention = PoolingAttention(cfg.width, cfg.num_heads)
        self.layernorm = LayerNorm(cfg.width, eps=cfg.layer_norm_eps)
        self.mlp = Mlp(cfg.width, cfg.mlp_width)

    def forward(self, features: Float[Tensor, "p n d"]) -> Float[Tensor, "p d"]:
        """Pool each image's features to one vector."""
        pooled = self.attention(self.probe, features)
        return pooled + self.mlp(self.layernorm(pooled))


class SiglipVision(nn.Module):
    """The vision tower: images to features after the last layer norm."""

    def __init__(self, cfg: SiglipVisionConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embeddings = PatchEmbeddings(cfg)
        self.encoder = Encoder(cfg.num_layers, cfg.width, cfg.num_heads, cfg.mlp_width, cfg.layer_norm_eps)
        self.post_layernorm = LayerNorm(cfg.width, eps=cfg.layer_norm_eps)
        self.head = PoolingHead(cfg) if cfg.use_head else None
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, distributed as for SigLIP's own training."""
        init_encoder(self, generator)
        convs = [module for module in self.embeddings.modules() if isinstance(module, nn.Conv2d)]
        for i, conv in enumerate(convs):
            # LeCun's 1 / fan_in; in a conv stem, ReLU before all but the first halves the power of what comes in.
            gain = 1.0 if i == 0 else 2.0
            init_cut_normal(conv.weight, math.sqrt(gain / conv.weight[0].numel()), generator)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        positions = self.embeddings.position_embedding.weight
        nn.init.normal_(positions, std=positions.shape[-1] ** -0.5, generator=generator)
        if self.head is not None:
            nn.init.xavier_uniform_(self.head.probe, generator=generator)
            nn.init.xavier_uniform_(self.head.attention.in_proj_weight, generator=generator)
            nn.init.zeros_(self.head.attention.in_proj_bias)
            nn.init.xavier_uniform_(self.head.attention.out_proj.weight, generator=generator)
            nn.init.zeros_(self.head.attention.out_proj.bias)

    def forward(
        self,
        pixels: Pixels,
        *,
        valid: Bool[Tensor, "p n"] | None = None,
        interpolate: bool = False,
    ) -> Float[Tensor, "p n d"]:
        """Return one feature a patch, row-major, after the last layer norm.

        Args:
            pixels: bytes; or what `normalise` made of them, in the dtype of the parameters, or in any under autocast.
            valid: True = attend. Patches of padding, marked False, change no feature of the others (their own features
                mean nothing); an image without any True attends to all of its own. Published towers see padding: None.
                With the conv stem, pixels at a patch's border still reach the patch right of or below it.
            interpolate: stretch the position table to the images' grid, which need not be square; changes nothing
                at the native size.

        Raises:
            ValueError: images of another grid than the config's, without `interpolate`.
        """
        mask = None if valid is None else valid | ~valid.any(dim=1, keepdim=True)
        return self.post_layernorm(self.encoder(self.embeddings(pixels, interpolate), mask))

    def pool(self, features: Float[Tensor, "p n d"]) -> Float[Tensor, "p d"]:
        """Pool what `forward` gave to one vector an image (not of unit length).

        Raises:
            ValueError: a tower made without its head.
        """
        if self.head is None:
            raise ValueError("pool: expected a tower with use_head=True, got one without; make it with the head")
        return self.head(features)
