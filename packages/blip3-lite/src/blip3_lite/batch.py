"""Encoded samples, and many of them as one flat sequence without padding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64, UInt8
from torch import Tensor

IGNORE_INDEX = -100
_TUPLES = ("tiles_per_image", "tile_keys")


@dataclass(frozen=True, kw_only=True)
class EncodedSample:
    """One sample as the model takes it."""

    id: str
    source: str
    ids: Int64[Tensor, " t"]
    """Token ids; an image slot holds the `<image>` id, whose embedding an image token replaces."""
    targets: Int64[Tensor, " t"]
    """The token that follows each position where it is to be learnt, else -100."""
    image_index: Int64[Tensor, " m"]
    """Position of each image token: images in reading order, tiles of an image in order, latents in order."""
    tiles: UInt8[Tensor, "p 3 s s"]
    """Tiles of all images."""
    valid: Bool[Tensor, "p n"]
    """True = a patch of picture, False = padding that the connector must not see."""
    tiles_per_image: tuple[int, ...] = ()
    """Tiles of each image; they add up to p."""
    feature_order: Int64[Tensor, " pn"] | None = None
    """Order in which the connector takes the patch features, n to a group; None as they come (see `grouping`)."""
    tile_keys: tuple[str, ...] = ()
    """Name of each tile by its file's digest, the key of cached features: equal names, equal tiles."""

    @property
    def length(self) -> int:
        """Positions in the sequence, image tokens included."""
        return self.ids.shape[0]

    @property
    def num_targets(self) -> int:
        """Positions that have a loss."""
        return int((self.targets != IGNORE_INDEX).sum())

    def to_arrays(self) -> dict[str, object]:
        """The fields as plain data, tensors as numpy arrays of the same memory: to be sent to another process."""
        return _to_arrays(self)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, object]) -> "EncodedSample":
        """Undo `to_arrays`; the tensors use the arrays' memory."""
        return cls(**_from_arrays(arrays))


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Documents end to end in one sequence; no token attends across `cu_seqlens`."""

    sample_ids: list[str]
    ids: Int64[Tensor, " t"]
    targets: Int64[Tensor, " t"]
    positions: Int64[Tensor, " t"]
    """Restart at 0 in each document."""
    cu_seqlens: Int32[Tensor, " docs_plus_1"]
    """Document borders: document j is [cu_seqlens[j], cu_seqlens[j+1])."""
    image_index: Int64[Tensor, " m"]
    tiles: UInt8[Tensor, "p 3 s s"] | None
    """None where `features` stand in for them."""
    valid: Bool[Tensor, "p n"]
    features: Float[Tensor, "p n d"] | None = None
    """The frozen tower's output for the tiles, where it was kept."""
    tiles_per_image: tuple[int, ...] = ()
    """Tiles of each image; they add up to p."""
    feature_order: Int64[Tensor, " pn"] | None = None
    """Order in which the connector takes the patch features, n to a group; None as they come (see `grouping`)."""

    @property
    def num_tokens(self) -> int:
        """Positions in the sequence."""
        return self.ids.shape[0]

    @property
    def num_targets(self) -> int:
        """Positions that have a loss."""
        return int((self.targets != IGNORE_INDEX).sum())

    @property
    def num_documents(self) -> int:
        """Documents in the pack."""
        return self.cu_seqlens.shape[0] - 1

    def to_arrays(self) -> dict[str, object]:
        """The fields as plain data, tensors as numpy arrays of the same memory: to be sent to another process."""
        return _to_arrays(self)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, object]) -> "PackedBatch":
        """Undo `to_arrays`; the tensors use the arrays' memory."""
        return cls(**_from_arrays(arrays))

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on `device`."""
        held = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: part.to(device) for name, part in held.items() if isinstance(part, Tensor)})


def collate(samples: Sequence[EncodedSample], features: Float[Tensor, "p n d"] | None = None) -> PackedBatch:
    """Lay samples end to end. With `features` (one row per tile, in order), the pixels stay behind.

    Raises:
        ValueError: no samples, or another number of feature rows than of tiles.
    """
    if not samples:
        raise ValueError("batch: expected at least one sample, got none; the pack planner must not make empty packs")
    num_tiles = sum(sample.tiles.shape[0] for sample in samples)
    if features is not None and features.shape[0] != num_tiles:
        raise ValueError(
            f"features: expected {num_tiles} rows, one per tile, got {features.shape[0]}; gather them per sample"
        )
    lengths = torch.tensor([sample.length for sample in samples])
    ends = lengths.cumsum(0)
    starts = (ends - lengths).tolist()
    return PackedBatch(
        sample_ids=[sample.id for sample in samples],
        ids=torch.cat([sample.ids for sample in samples]),
        targets=torch.cat([sample.targets for sample in samples]),
        positions=torch.cat([torch.arange(sample.length) for sample in samples]),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32),
        image_index=torch.cat([sample.image_index + start for sample, start in zip(samples, starts, strict=True)]),
        tiles=torch.cat([sample.tiles for sample in samples]) if features is None else None,
        valid=torch.cat([sample.valid for sample in samples]),
        features=features,
        tiles_per_image=tuple(count for sample in samples for count in sample.tiles_per_image),
        feature_order=_joined_order(samples),
    )


def _to_arrays(value: EncodedSample | PackedBatch) -> dict[str, object]:
    found = {item.name: getattr(value, item.name) for item in fields(value)}
    return {name: part.numpy() if isinstance(part, Tensor) else part for name, part in found.items()}


def _from_arrays(arrays: Mapping[str, object]) -> dict[str, Any]:
    """Arrays as tensors; what came through a pipe has lists for tuples."""
    values: dict[str, Any] = {}
    for name, value in arrays.items():
        if isinstance(value, np.ndarray):
            values[name] = torch.from_numpy(value)  # pyright: ignore[reportUnknownMemberType]
        else:
            values[name] = tuple(cast(Sequence[object], value)) if name in _TUPLES else value
    return values


def _joined_order(samples: Sequence[EncodedSample]) -> Int64[Tensor, " pn"] | None:
    """The samples' feature orders as one over all their tiles."""
    if all(sample.feature_order is None for sample in samples):
        return None
    orders: list[Tensor] = []
    start = 0
    for sample in samples:
        count = sample.valid.numel()
        order = torch.arange(count) if sample.feature_order is None else sample.feature_order
        orders.append(order + start)
        start += count
    return torch.cat(orders)
