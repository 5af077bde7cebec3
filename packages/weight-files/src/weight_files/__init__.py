"""Named tensors in files: strict, streaming loads into modules of another layout, and sharded saves."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import WeightsError as WeightsError
    from .pickled import open_pickled as open_pickled
    from .plan import Differences as Differences
    from .plan import Piece as Piece
    from .plan import Recipe as Recipe
    from .plan import Target as Target
    from .plan import compare_tensors as compare_tensors
    from .plan import load_tensors as load_tensors
    from .plan import same_names as same_names
    from .plan import unique_tensors as unique_tensors
    from .shards import SavedTensor as SavedTensor
    from .shards import as_they_are as as_they_are
    from .shards import plan_shards as plan_shards
    from .shards import shard_writers as shard_writers
    from .source import SafetensorsFiles as SafetensorsFiles
    from .source import TensorDict as TensorDict
    from .source import TensorInfo as TensorInfo
    from .source import TensorSource as TensorSource

__all__ = [
    "Differences",
    "Piece",
    "Recipe",
    "SafetensorsFiles",
    "SavedTensor",
    "Target",
    "TensorDict",
    "TensorInfo",
    "TensorSource",
    "WeightsError",
    "as_they_are",
    "compare_tensors",
    "load_tensors",
    "open_pickled",
    "plan_shards",
    "same_names",
    "shard_writers",
    "unique_tensors",
]
_HOMES = {
    "Differences": "plan",
    "Piece": "plan",
    "Recipe": "plan",
    "SafetensorsFiles": "source",
    "SavedTensor": "shards",
    "Target": "plan",
    "TensorDict": "source",
    "TensorInfo": "source",
    "TensorSource": "source",
    "WeightsError": "errors",
    "as_they_are": "shards",
    "compare_tensors": "plan",
    "load_tensors": "plan",
    "open_pickled": "pickled",
    "plan_shards": "shards",
    "same_names": "plan",
    "shard_writers": "shards",
    "unique_tensors": "plan",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
