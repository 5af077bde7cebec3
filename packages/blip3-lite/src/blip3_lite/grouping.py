"""Which patch features the connector reads together.

The connector knows no positions: what it makes of an image depends only on how the features are grouped. Three ways:

- a group is a tile (`tile_grouping="tiles"`; the thumbnail is one too);
- a group is a band (`"bands"`). The released any-resolution xGen-MM models lay the features of a grid of R × Q tiles
  out as one canvas and cut each row of tiles again without undoing the interleaving, so that the g-th group holds the
  g-th run of n features in raster order: a horizontal band across all Q tiles. Their weights were trained that way. On
  2 × 1 tiles of 2 × 2 patches (letters are tiles):

      A A B B        tiles  A A A A | B B B B
      A A B B        bands  A A B B | A A B B

- a group is the whole image (`TilingConfig.kind="anyres_fixed"`): thumbnail and tiles give the tokens of one tile.

Source: xGen-MM, arXiv:2408.08872 §3; the bands are a property of its released code.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def band_order(grid: tuple[int, int], side: int) -> Int64[Tensor, " pn"]:
    """Return, for a thumbnail and `grid` (rows, columns) of tiles of side × side patches, each place's feature.

    Entry g·n + j is the index (tile·n + patch, the thumbnail being tile 0) of the j-th feature of group g.
    """
    rows, columns = grid
    patches = torch.arange(rows * columns * side * side)
    bands = rearrange(patches, "(row col r c) -> (row r col c)", row=rows, col=columns, r=side, c=side)
    thumbnail = torch.arange(side * side)
    return torch.cat([thumbnail, bands + side * side]) if rows * columns > 1 else thumbnail


def group_images(
    features: Float[Tensor, "p n d"], valid: Bool[Tensor, "p n"], tiles_per_image: Sequence[int]
) -> tuple[Float[Tensor, "i m d"], Bool[Tensor, "i m"]]:
    """Lay the features of all tiles of an image end to end; shorter images are filled up with masked features.

    Raises:
        ValueError: the counts do not add up to the tiles.
    """
    if sum(tiles_per_image) != len(features):
        raise ValueError(
            f"tiles_per_image: expected a sum of {len(features)}, the tiles, got {sum(tiles_per_image)}; "
            "collate the batch with its samples"
        )
    grouped = [
        torch.nn.utils.rnn.pad_sequence([rearrange(part, "p n ... -> (p n) ...") for part in parts], batch_first=True)
        for parts in (features.split(list(tiles_per_image)), valid.split(list(tiles_per_image)))
    ]
    return grouped[0], grouped[1]
