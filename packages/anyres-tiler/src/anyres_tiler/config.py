"""How images are cut up: the tagged choice that a checkpoint keeps. Imports no torch."""

from typing import Literal

import msgspec

XGEN_MM_GRIDS: tuple[tuple[int, int], ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
"""The five (columns, rows) of the released xGen-MM v1.5 models. The order decides ties; there is no (1, 1)."""


class TilingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way of turning an image into square tiles; the defaults are those of xGen-MM v1.5 fine-tuning."""

    kind: Literal["base", "anyres", "anyres_fixed"] = "anyres"
    """`base`: one view of the whole image. `anyres`: a thumbnail, then the tiles of the best-fitting grid, each with
    image tokens of its own (xGen-MM's patch sampling). `anyres_fixed`: the same views, read together into the tokens of
    one (fixed sampling)."""
    tile_px: int = 384
    """Side of a tile in pixels: the input size of the vision tower."""
    grids: tuple[tuple[int, int], ...] = XGEN_MM_GRIDS
    """Allowed (columns, rows), in order of preference among equals; not used by `base`.

    (1, 1) is the thumbnail alone."""
    base_fit: Literal["squash", "pad"] = "squash"
    """How `base` makes the image square: `squash` ignores the aspect ratio, `pad` keeps it and fills with grey."""

    def __post_init__(self) -> None:
        """Refuse values that name no tiling.

        Raises:
            ValueError: on a tile of no pixels, or on grids that are absent, empty or repeated.
        """
        if self.tile_px < 1:
            raise ValueError(
                f"tile_px: expected at least 1, got {self.tile_px}; use the vision tower's input size in pixels"
            )
        if not self.grids:
            raise ValueError("grids: expected at least one (columns, rows), got none; see XGEN_MM_GRIDS")
        for columns, rows in self.grids:
            if columns < 1 or rows < 1:
                raise ValueError(f"grids: expected columns and rows of at least 1, got {(columns, rows)}; remove it")
        if len(set(self.grids)) != len(self.grids):
            raise ValueError(f"grids: expected no repeats, got {self.grids}; remove the second of each pair")

    @property
    def max_tiles(self) -> int:
        """Most tiles that one image can become, thumbnail included."""
        if self.kind == "base":
            return 1
        largest = max(columns * rows for columns, rows in self.grids)
        return 1 + largest if largest > 1 else 1
