"""A checkpoint that all ranks write and any number of them reads: whole tensors, shared out by size, and an index.

    model-00001-of-00002.safetensors … + model.safetensors.index.json          as other libraries shard a model
    optimizer-00001-of-00002.safetensors … + optimizer.safetensors.index.json  `<parameter>/<key>`

Each tensor is brought together by itself and kept by the rank that writes it, so no rank holds more than its share. The
ranks write into one folder: it lies on a disk that all of them see.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from blip3_lite.folder import as_os_error
from weight_files.shards import index_text, shard_name
from weight_files.source import INDEX_SUFFIX

from .contract import ShardedModelFiles
from .engine import Engine
from .optimizer import Optimizers


@dataclass(frozen=True)
class OneTensor:
    """A tensor of a checkpoint and where it comes from."""

    name: str
    """As in the file."""
    tensor: Tensor
    """The live one; under ZeRO-3 a part of it."""
    parameter: str | None
    """The trainable parameter that it is, or is kept for."""
    key: str | None = None
    """What the optimiser keeps of it; None for itself."""

    @property
    def numel(self) -> int:
        """Numbers in it as a whole."""
        if self.key == "step":
            return 1
        return int(getattr(self.tensor, "ds_numel", self.tensor.numel()))


def model_tensors(tensors: Mapping[str, Tensor], optimizers: Optimizers) -> list[OneTensor]:
    """The model's, by their names in its checkpoint."""
    names = {id(parameter): name for name, parameter in optimizers.parameters.items()}
    return [OneTensor(name, tensor, names.get(id(tensor))) for name, tensor in tensors.items()]


def state_tensors(keys: Mapping[str, list[str]], optimizers: Optimizers) -> list[OneTensor]:
    """The optimiser's."""
    return [
        OneTensor(f"{name}/{key}", optimizers.parameters[name], name, key)
        for name, found in keys.items()
        for key in found
    ]


def owners(tensors: list[OneTensor], count: int) -> list[int]:
    """The rank that writes each: the largest first, each to whoever has least."""
    loads = [0] * count
    owner = [0] * len(tensors)
    for place in sorted(range(len(tensors)), key=lambda place: (-tensors[place].numel, place)):
        owner[place] = min(range(count), key=lambda rank: (loads[rank], rank))
        loads[owner[place]] += tensors[place].numel
    return owner


@torch.no_grad()
def write_shard(folder: Path, stem: str, tensors: list[OneTensor], engine: Engine[Any]) -> list[str]:
    """Bring every tensor together on all ranks and write this rank's share; rank 0 also writes the index.

    Return the names of the files.

    Raises:
        OSError: this rank's disk is full or read-only; every tensor has been brought together all the same.
    """
    rank, count = engine.processes.rank, engine.processes.count
    owner = owners(tensors, count)
    mine: dict[str, Tensor] = {}
    total = 0
    for one, owned_by in zip(tensors, owner, strict=True):
        whole = engine.whole(one.tensor, one.parameter, one.key)
        total += whole.nbytes
        if owned_by == rank:
            # A copy: parts of one memory, as DeepSpeed keeps parameters, cannot be written apart.
            mine[one.name] = whole.detach().to("cpu", copy=True).contiguous()
    names = [shard_name(stem, number, count) for number in range(1, count + 1)]
    try:
        save_file(mine, folder / names[rank], metadata={"format": "pt"})
    except SafetensorError as error:
        raise as_os_error(error) from error
    if rank > 0:
        return [names[rank]]
    places = {one.name: names[owned_by] for one, owned_by in zip(tensors, owner, strict=True)}
    (folder / f"{stem}{INDEX_SUFFIX}").write_text(index_text(total, places))
    return [names[rank], f"{stem}{INDEX_SUFFIX}"]


def checkpoint_shards(
    files: ShardedModelFiles, keys: Mapping[str, list[str]], optimizers: Optimizers, engine: Engine[Any]
) -> list[Callable[[Path], list[str]]]:
    """Writers of this rank's share of the model's weights and of the optimiser's state, to be called in this order."""
    parts = {
        files.weights.removesuffix(".safetensors"): model_tensors(files.tensors(), optimizers),
        "optimizer": state_tensors(keys, optimizers),
    }

    def write(folder: Path, stem: str) -> list[str]:
        return write_shard(folder, stem, parts[stem], engine)

    return [partial(write, stem=stem) for stem in parts]
