"""Documents of text and images in reading order: read, mix, plan, pack, encode ahead."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .changes import shard_changes as shard_changes
    from .config import DataFile as DataFile
    from .config import DataFileError as DataFileError
    from .config import ImageLimits as ImageLimits
    from .config import PlanConfig as PlanConfig
    from .config import SkipLimits as SkipLimits
    from .config import SourceConfig as SourceConfig
    from .config import load_data_file as load_data_file
    from .errors import DataError as DataError
    from .errors import ShardError as ShardError
    from .errors import SkipCounter as SkipCounter
    from .errors import SkipReason as SkipReason
    from .errors import SkipSample as SkipSample
    from .errors import StoppedWaiting as StoppedWaiting
    from .errors import TooManySkips as TooManySkips
    from .errors import WorkerError as WorkerError
    from .images import open_image as open_image
    from .making import Encoder as Encoder
    from .opening import open_source as open_source
    from .opening import open_sources as open_sources
    from .order import EpochOrder as EpochOrder
    from .order import Mixture as Mixture
    from .order import WindowOrder as WindowOrder
    from .packing import Packer as Packer
    from .packing import pack as pack
    from .plan import Plan as Plan
    from .plan import PlannedPack as PlannedPack
    from .record_source import RecordSource as RecordSource
    from .samples import FileBytes as FileBytes
    from .samples import ImagePart as ImagePart
    from .samples import Part as Part
    from .samples import PreferenceSample as PreferenceSample
    from .samples import Role as Role
    from .samples import Sample as Sample
    from .samples import Size as Size
    from .samples import TextPart as TextPart
    from .samples import Turn as Turn
    from .samples import samples_digest as samples_digest
    from .sources import HasSizes as HasSizes
    from .sources import InMemory as InMemory
    from .sources import Source as Source
    from .stream import Batch as Batch
    from .stream import Stream as Stream

__all__ = [
    "Batch",
    "DataError",
    "DataFile",
    "DataFileError",
    "Encoder",
    "EpochOrder",
    "FileBytes",
    "HasSizes",
    "ImageLimits",
    "ImagePart",
    "InMemory",
    "Mixture",
    "Packer",
    "Part",
    "Plan",
    "PlanConfig",
    "PlannedPack",
    "PreferenceSample",
    "RecordSource",
    "Role",
    "Sample",
    "ShardError",
    "Size",
    "SkipCounter",
    "SkipLimits",
    "SkipReason",
    "SkipSample",
    "Source",
    "SourceConfig",
    "StoppedWaiting",
    "Stream",
    "TextPart",
    "TooManySkips",
    "Turn",
    "WindowOrder",
    "WorkerError",
    "load_data_file",
    "open_image",
    "open_source",
    "open_sources",
    "pack",
    "samples_digest",
    "shard_changes",
]
_HOMES = {
    "Batch": "stream",
    "DataError": "errors",
    "DataFile": "config",
    "DataFileError": "config",
    "Encoder": "making",
    "EpochOrder": "order",
    "FileBytes": "samples",
    "HasSizes": "sources",
    "ImageLimits": "config",
    "ImagePart": "samples",
    "InMemory": "sources",
    "Mixture": "order",
    "Packer": "packing",
    "Part": "samples",
    "Plan": "plan",
    "PlanConfig": "config",
    "PlannedPack": "plan",
    "PreferenceSample": "samples",
    "RecordSource": "record_source",
    "Role": "samples",
    "Sample": "samples",
    "ShardError": "errors",
    "Size": "samples",
    "SkipCounter": "errors",
    "SkipLimits": "config",
    "SkipReason": "errors",
    "SkipSample": "errors",
    "Source": "sources",
    "SourceConfig": "config",
    "StoppedWaiting": "errors",
    "Stream": "stream",
    "TextPart": "samples",
    "TooManySkips": "errors",
    "Turn": "samples",
    "WindowOrder": "order",
    "WorkerError": "errors",
    "load_data_file": "config",
    "open_image": "images",
    "open_source": "opening",
    "open_sources": "opening",
    "pack": "packing",
    "samples_digest": "samples",
    "shard_changes": "changes",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
