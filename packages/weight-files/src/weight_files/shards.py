"""Save named tensors as safetensors: one file, or shards with the index that other libraries read."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .source import INDEX_SUFFIX


@dataclass(frozen=True)
class SavedTensor:
    """A tensor to be saved, made when its shard is written, so that a changed layout is never held twice as a whole."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count * self.dtype.itemsize


def as_they_are(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> list[SavedTensor]:
    """Tensors under their own names, in `dtype` if given."""
    return [
        SavedTensor(name, tuple(tensor.shape), dtype or tensor.dtype, lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]


def plan_shards(tensors: Sequence[SavedTensor], max_shard_bytes: int) -> list[list[SavedTensor]]:
    """Cut the list, in order, into shards of at most `max_shard_bytes` (one tensor may exceed it alone)."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected at least 1, got {max_shard_bytes}; 5e9 is usual")
    shards: list[list[SavedTensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.num_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.num_bytes
    return shards


def shard_writers(
    tensors: Sequence[SavedTensor], *, stem: str = "model", max_shard_bytes: int = 5_000_000_000
) -> dict[str, Callable[[Path], object]]:
    """File name → function that writes it: `model.safetensors`, or `model-00001-of-0000N.safetensors` … and the index.

    A shard is held in memory, converted, while it is written; tensors that are saved as they are stay shared.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    if len(shards) == 1:
        return {f"{stem}.safetensors": lambda path: _write(path, shards[0])}
    names = [shard_name(stem, number, len(shards)) for number in range(1, len(shards) + 1)]
    total_bytes = sum(tensor.num_bytes for tensor in tensors)
    index = index_text(
        total_bytes, {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    )
    writers: dict[str, Callable[[Path], object]] = {
        name: lambda path, shard=shard: _write(path, shard) for name, shard in zip(names, shards, strict=True)
    }
    writers[stem + INDEX_SUFFIX] = lambda path: path.write_text(index)
    return writers


def shard_name(stem: str, number: int, count: int) -> str:
    """The file of one shard of a set; numbered from 1 on."""
    return f"{stem}-{number:05}-of-{count:05}.safetensors"


def index_text(total_bytes: int, places: Mapping[str, str]) -> str:
    """The index of a sharded set; `places`: the file of each tensor by its name."""
    return json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": dict(places)}, indent=2) + "\n"


def _write(path: Path, shard: Sequence[SavedTensor]) -> None:
    made = {tensor.name: tensor.make().detach().to("cpu", tensor.dtype).contiguous() for tensor in shard}
    for tensor in shard:
        if tuple(made[tensor.name].shape) != tensor.shape:
            raise ValueError(
                f"{tensor.name}: expected shape {list(tensor.shape)}, got {list(made[tensor.name].shape)}; "
                "its maker and its plan differ"
            )
    save_file(made, path, metadata={"format": "pt"})
