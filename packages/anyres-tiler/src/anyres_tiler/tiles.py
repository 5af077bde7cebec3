"""Pixels: an image to its tiles, the mask of features that show it, and back.

The thumbnail comes first, then the tiles row by row from the top left, as in xGen-MM (BLIP-3, arXiv:2408.08872).
Pixels stay uint8 here; scaling to floats belongs on the device, with the vision tower.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from .config import TilingConfig
from .geometry import choose_grid, fit_size, valid_extent

_ANYRES_FILL = (0, 0, 0)
# int(0.5 · 255): the mean colour of SigLIP's normalisation, which it maps to nearly zero.
_BASE_FILL = (127, 127, 127)


@dataclass(frozen=True)
class Tiles:
    """The tiles of one image.

    `pixels` holds the thumbnail, if there is one, and then the grid in row-major order. `box_px` is where the image
    lies on the canvas of the grid: (left, top, right, bottom), right and bottom excluded; the rest is padding.
    """

    pixels: UInt8[Tensor, "p 3 s s"]
    grid: tuple[int, int]
    """(rows, columns) of the grid, without the thumbnail."""
    size_px: tuple[int, int]
    """(width, height) of the image before it was resized."""
    box_px: tuple[int, int, int, int]
    thumbnail_first: bool

    @property
    def num_tiles(self) -> int:
        """Tiles, thumbnail included."""
        return self.pixels.shape[0]

    @property
    def tile_px(self) -> int:
        """Side of a tile in pixels."""
        return self.pixels.shape[-1]

    def valid_patches(self, side: int) -> Bool[Tensor, "p n"]:
        """Mark which of the `side` × `side` features of each tile show the image. True = valid, row-major.

        The grid's part follows `geometry.valid_extent` on the whole canvas of features, then is cut like the pixels.
        The thumbnail, and the single tile of base mode, are valid throughout. A tile that lies wholly in the padding
        has a row without any True: a reader of the mask needs something else to attend to, as the perceiver
        resampler has its latents. The canvas as a whole always keeps at least one valid row and column.

            480 × 640 (w × h) on 2 × 2 tiles, side 3: all 6 rows of the canvas are
            011|110, so each left tile is 011 in its 3 rows and each right one 110.
        """
        if side < 1:
            raise ValueError(f"side: expected at least 1 feature, got {side}; use the vision tower's grid side")
        if not self.thumbnail_first:
            return torch.ones(self.num_tiles, side * side, dtype=torch.bool)
        rows, columns = self.grid
        canvas = torch.zeros(rows * side, columns * side, dtype=torch.bool)
        left, top, right, bottom = valid_extent(self.size_px, (columns * side, rows * side))
        canvas[top:bottom, left:right] = True
        views = [torch.ones(side, side, dtype=torch.bool), *_cut(canvas, side)]
        return torch.stack(views).flatten(1)


def tile_image(image: Image.Image, cfg: TilingConfig) -> Tiles:
    """Resize an RGB image onto its best grid and cut it up; any size from 1 × 1 on. Bicubic throughout.

    Padding is black around the centred image (grey in base mode with `base_fit="pad"`, where the image is resized
    before it is padded, so that a long image needs no square canvas of its own length). The thumbnail is the whole
    image squashed into one tile; where the grid is 1 × 1 it is the only view, since its tile would show the same.

    Raises:
        ValueError: if the image is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f'image: expected mode "RGB", got "{image.mode}"; convert it where it is opened')
    columns, rows = (1, 1) if cfg.kind == "base" else choose_grid(image.size, cfg.grids, cfg.tile_px)
    has_thumbnail = columns * rows > 1
    canvas_px = (columns * cfg.tile_px, rows * cfg.tile_px)
    is_squashed = not has_thumbnail and (cfg.kind != "base" or cfg.base_fit == "squash")
    fitted_px = canvas_px if is_squashed else fit_size(image.size, canvas_px)
    fill = _BASE_FILL if cfg.kind == "base" else _ANYRES_FILL

    left, top = (canvas_px[0] - fitted_px[0]) // 2, (canvas_px[1] - fitted_px[1]) // 2
    pixels = _to_tensor(image)
    canvas = torch.empty(3, canvas_px[1], canvas_px[0], dtype=torch.uint8)
    canvas[:] = torch.tensor(fill, dtype=torch.uint8)[:, None, None]
    canvas[:, top : top + fitted_px[1], left : left + fitted_px[0]] = _resize(pixels, fitted_px)

    views = _cut(canvas, cfg.tile_px)
    if has_thumbnail:
        views.insert(0, _resize(pixels, (cfg.tile_px, cfg.tile_px)))
    return Tiles(
        pixels=torch.stack(views),
        grid=(rows, columns),
        size_px=image.size,
        box_px=(left, top, left + fitted_px[0], top + fitted_px[1]),
        thumbnail_first=has_thumbnail,
    )


def untile(tiles: Tiles) -> Image.Image:
    """Put the grid together again and crop the padding: exactly the image as it was resized."""
    rows, columns = tiles.grid
    canvas = Image.new("RGB", (columns * tiles.tile_px, rows * tiles.tile_px))
    for index, tile in enumerate(tiles.pixels[int(tiles.thumbnail_first) :]):
        canvas.paste(_to_image(tile), (index % columns * tiles.tile_px, index // columns * tiles.tile_px))
    return canvas.crop(tiles.box_px)


def contact_sheet(tiles: Tiles, *, gap_px: int = 4, fill: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Lay the tiles out for a reader: the thumbnail at the left, the grid beside it, gaps between and around."""
    rows, columns = tiles.grid
    step = tiles.tile_px + gap_px
    shift = int(tiles.thumbnail_first)
    sheet = Image.new("RGB", (gap_px + (columns + shift) * step, gap_px + rows * step), fill)
    for index, tile in enumerate(tiles.pixels):
        place = index - shift
        column, row = (0, 0) if place < 0 else (shift + place % columns, place // columns)
        sheet.paste(_to_image(tile), (gap_px + column * step, gap_px + row * step))
    return sheet


def _resize(
    pixels: UInt8[Tensor, "3 height width"], size_px: tuple[int, int]
) -> UInt8[Tensor, "3 new_height new_width"]:
    """Bicubic with antialiasing to (width, height): columns first, then rows, in integers.

    That is what torchvision gives, and Pillow in this order but for ±1 in one value of 200 and ±2 in one of a million;
    it takes 0.4 times as long. Pillow 13 does the rows first for some shapes, which differs by up to 14 at sharp edges.
    """
    width, height = size_px
    return F.interpolate(pixels[None], size=(height, width), mode="bicubic", antialias=True)[0]


def _cut(canvas: Tensor, side: int) -> list[Tensor]:
    """Split [..., rows · side, columns · side] into squares, row by row from the top left."""
    height, width = canvas.shape[-2:]
    return [
        canvas[..., top : top + side, left : left + side]
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def _to_tensor(image: Image.Image) -> UInt8[Tensor, "3 height width"]:
    return torch.tensor(np.asarray(image)).permute(2, 0, 1)


def _to_image(pixels: UInt8[Tensor, "3 height width"]) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
