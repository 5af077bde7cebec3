"""Worked examples for a question: drawn at random, or those with the most similar pictures.

Which ones a question gets depends on it, the pool and the seed alone, not on what was asked before.
Similar: cosine of the mean patch features of the model's own vision tower, the most similar one last, next to the
question (RICES, arXiv:2109.05014 §4, as OpenFlamingo orders it).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from anyres_tiler import tile_image
from blip3_lite import Blip3, Processor
from interleave_data import ImagePart, SkipSample

from .prediction import EvalItem

Selection = Literal["random", "similar"]


@runtime_checkable
class Demonstrations(Protocol):
    """Chooses worked examples."""

    def choose(self, item: EvalItem, count: int) -> list[EvalItem]:
        """The examples in the order in which they are shown; none shares a picture with the question."""
        ...


def picture_names(item: EvalItem) -> frozenset[str]:
    """What tells an item's pictures from others: their keys, or its own id where they have none."""
    return frozenset(image.key or item.id for image in item.prompt.images()) or frozenset([item.id])


@dataclass(frozen=True)
class RandomDemonstrations:
    """Drawn anew for each question, from its id and the seed."""

    pool: Sequence[EvalItem]
    seed: int

    def choose(self, item: EvalItem, count: int) -> list[EvalItem]:
        """`count` different items of the pool, fewer where it has no more."""
        chosen: list[EvalItem] = []
        shown = picture_names(item)
        rng = Random(f"{self.seed}/{item.id}")
        order = rng.sample(range(len(self.pool)), len(self.pool)) if len(self.pool) < 64 else None
        tried: set[int] = set()
        while len(chosen) < count and len(tried) < len(self.pool):
            place = order[len(tried)] if order else rng.randrange(len(self.pool))
            if place in tried:
                continue
            tried.add(place)
            other = self.pool[place]
            if other.id != item.id and not shown & picture_names(other):
                chosen.append(other)
        return chosen


class SimilarDemonstrations:
    """Those of the pool whose pictures look most like the question's, to the model's own vision tower."""

    def __init__(self, pool: Sequence[EvalItem], model: Blip3, processor: Processor) -> None:
        """Look at every picture of the pool once; items whose picture cannot be read are left out.

        Raises:
            ValueError: none is left.
        """
        self._model, self._processor = model, processor
        looked = [(item, self._features(item)) for item in pool if item.prompt.images()]
        self.pool = [item for item, features in looked if features is not None]
        if not self.pool:
            raise ValueError(
                "demonstrations: expected pictures to compare, got none that can be read; choose them at random"
            )
        self._rows = torch.stack([features for _, features in looked if features is not None])

    def choose(self, item: EvalItem, count: int) -> list[EvalItem]:
        """`count` items of the pool, the most similar one last; those before it in the pool where they tie."""
        features = self._features(item)
        if features is None:
            return []
        order = (self._rows @ features).sort(descending=True, stable=True).indices.tolist()
        shown = picture_names(item)
        fitting = (self.pool[place] for place in order)
        chosen = [other for other in fitting if other.id != item.id and not shown & picture_names(other)]
        return chosen[:count][::-1]

    @torch.inference_mode()
    def _features(self, item: EvalItem) -> Float[Tensor, " d"] | None:
        """Mean of an item's pictures, of length 1; None where there is none or one cannot be read."""
        try:
            rows = [self._picture(image) for image in item.prompt.images()]
        except SkipSample:
            return None
        if not rows:
            return None
        return torch.nn.functional.normalize(torch.stack(rows).mean(dim=0), dim=0)

    def _picture(self, image: ImagePart) -> Float[Tensor, " d"]:
        cfg = self._processor.cfg.with_base_views()
        tiles = tile_image(image.decode(self._processor.limits), cfg.tiling)
        valid = tiles.valid_patches(cfg.vision.grid_side).to(self._model.device)
        features = self._model.patch_features(tiles.pixels.to(self._model.device), valid)[0].float().cpu()
        return torch.nn.functional.normalize(features[valid[0].cpu()].mean(dim=0), dim=0)
