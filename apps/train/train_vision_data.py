"""Drawn pictures as batches for the vision warm-up: tiles with what lies under each patch, or captioned pictures."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from anyres_tiler import tile_image
from blip3_lite import Blip3Config
from phi3_lite import HFTokenizer
from scene_world import DenseLabels, Picture, PictureKind, World, dense_labels
from train_config import WarmupConfig

MAX_CAPTION_TOKENS = 96
WARMUP_KINDS: tuple[PictureKind, ...] = ("scene", "crowd", "word", "page", "chart", "card", "word", "page", "page")
"""Pictures in turn; those with print more often."""


@dataclass(frozen=True)
class TileBatch:
    """Tiles with what is under each patch."""

    sample_ids: list[str]
    pixels: UInt8[Tensor, "b 3 s s"]
    labels: Int64[Tensor, "b 3 n"]
    """Colour, form and symbol ids; 0 for nothing."""
    edges: Float[Tensor, "b n 4"]
    """Left, top, right, bottom of what is there, in sides of the tile; zeros where nothing is."""

    @property
    def num_targets(self) -> int:
        """Tiles; the loss is a mean over them."""
        return len(self.sample_ids)

    @property
    def num_tokens(self) -> int:
        """Patches computed."""
        return self.labels.shape[0] * self.labels.shape[-1]

    def to(self, device: torch.device) -> "TileBatch":
        """The same batch on `device`."""
        return TileBatch(self.sample_ids, self.pixels.to(device), self.labels.to(device), self.edges.to(device))


@dataclass(frozen=True)
class PairBatch:
    """Pictures with their captions."""

    sample_ids: list[str]
    pixels: UInt8[Tensor, "b 3 s s"]
    captions: Int64[Tensor, "b t"]

    @property
    def num_targets(self) -> int:
        """Pairs."""
        return len(self.sample_ids)

    @property
    def num_tokens(self) -> int:
        """Caption tokens computed."""
        return self.captions.numel()

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on `device`."""
        return PairBatch(self.sample_ids, self.pixels.to(device), self.captions.to(device))


class DrawnStream(ABC):
    """Batches drawn by index, without end; after `count` pictures the same ones come again, in the same order."""

    skipped: Mapping[str, int] = {}

    def __init__(self, count: int, batch_size: int) -> None:
        self.count, self.batch_size = count, batch_size
        self.position = 0
        self._kept: dict[int, Any] = {}

    @abstractmethod
    def draw(self, index: int) -> Any:
        """One training example."""

    @abstractmethod
    def collate(self, ids: list[str], examples: list[Any]) -> Any:
        """A batch of examples."""

    def __iter__(self) -> Iterator[Any]:
        """Go on from the current position."""
        while True:
            indices = [(self.position + offset) % self.count for offset in range(self.batch_size)]
            for index in indices:
                if index not in self._kept:
                    self._kept[index] = self.draw(index)
            self.position += self.batch_size
            yield self.collate([f"warmup/{index}" for index in indices], [self._kept[index] for index in indices])

    def state_dict(self) -> dict[str, Any]:
        """The number of pictures handed out."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind that many pictures."""
        self.position = int(state["position"])


def labelled_view(picture: Picture, model: Blip3Config, choice: int) -> tuple[Tensor, DenseLabels]:
    """One view of a picture as the model will see it, with what is under each patch.

    A picture of one tile is that tile. Of a larger one, mostly the tile that holds its print, else the thumbnail or any
    tile, by `choice`.
    """
    side, tile_px = model.vision.grid_side, model.tiling.tile_px
    tiles = tile_image(picture.image, model.tiling)
    rows, columns = tiles.grid
    if rows * columns == 1 or choice % 5 == 4:
        return tiles.pixels[0], dense_labels(picture, side, stroke_px=tile_px / picture.image.width)
    printed = next(item for item in picture.items if item.kind == "symbol")
    row, column = printed.box[1] // tile_px, printed.box[0] // tile_px
    if choice % 5 == 3:
        row, column = choice // 5 % rows, choice // 10 % columns
    window = (column * tile_px, row * tile_px, (column + 1) * tile_px, (row + 1) * tile_px)
    return tiles.pixels[1 + row * columns + column], dense_labels(picture, side, window=window)


class DenseStream(DrawnStream):
    """Labelled views of pictures of these kinds, in turn."""

    def __init__(self, config: WarmupConfig, model: Blip3Config, kinds: Sequence[PictureKind] = WARMUP_KINDS) -> None:
        super().__init__(config.world_samples, config.batch_size)
        self.world, self.model, self.kinds = World(config.train.seed, "train"), model, kinds

    def draw(self, index: int) -> Any:
        """Pixels and labels of one view."""
        choice, kind = divmod(index, len(self.kinds))
        return labelled_view(self.world.picture(index, self.kinds[kind]), self.model, choice)

    def collate(self, ids: list[str], examples: list[Any]) -> TileBatch:
        """Stack them."""
        pixels, labels = zip(*examples, strict=True)
        return TileBatch(
            ids,
            torch.stack(pixels),
            torch.tensor([[label.colours, label.forms, label.symbols] for label in labels]),
            torch.tensor([label.edges for label in labels]),
        )


class PairStream(DrawnStream):
    """Thumbnails with captions, padded to one length."""

    def __init__(self, config: WarmupConfig, model: Blip3Config, tokenizer: HFTokenizer) -> None:
        super().__init__(config.world_samples, config.batch_size)
        self.world, self.model, self.tokenizer = World(config.train.seed, "train"), model, tokenizer

    def draw(self, index: int) -> Any:
        """A thumbnail and its caption's ids."""
        picture, caption = self.world.caption(index).parts
        assert isinstance(picture, Picture)
        assert isinstance(caption, str)
        ids = self.tokenizer.encode(caption)[:MAX_CAPTION_TOKENS]
        padded = ids + [self.tokenizer.token_id("<pad>")] * (MAX_CAPTION_TOKENS - len(ids))
        return tile_image(picture.image, self.model.tiling).pixels[0], torch.tensor(padded)

    def collate(self, ids: list[str], examples: list[Any]) -> PairBatch:
        """Stack them."""
        pixels, captions = zip(*examples, strict=True)
        return PairBatch(ids, torch.stack(pixels), torch.stack(captions))
