"""Documents of text and images in reading order: read, mix, plan, pack, encode ahead."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .captions import CaptionTars as CaptionTars
    from .config import DataFile as DataFile
    from .config import DataFileError as DataFileError
    from .config import ImageLimits as ImageLimits
    from .config import PlanConfig as PlanConfig
    from .config import SkipLimits as SkipLimits
    from .config import SourceConfig as SourceConfig
    from .config import load_data_file as load_data_file
    from .errors import ShardError as ShardError
    from .errors import SkipCounter as SkipCounter
    from .errors import SkipReason as SkipReason
    from .errors import SkipSample as SkipSample
    from .errors import TooManySkips as TooManySkips
    from .errors import WorkerError as WorkerError
    from .images import open_image as open_image
    from .llava import LlavaJson as LlavaJson
    from .making import Encoder as Encoder
    from .obelics import ObelicsJsonl as ObelicsJsonl
    from .opening import open_sources as open_sources
    from .order import EpochOrder as EpochOrder
    from .order import Mixture as Mixture
    from .order import WindowOrder as WindowOrder
    from .packing import Packer as Packer
    from .packing import pack as pack
    from .plan import Plan as Plan
    from .plan import PlannedPack as PlannedPack
    from .preferences import PreferenceJsonl as PreferenceJsonl
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
    "CaptionTars",
    "DataFile",
    "DataFileError",
    "Encoder",
    "EpochOrder",
    "FileBytes",
    "HasSizes",
    "ImageLimits",
    "ImagePart",
    "InMemory",
    "LlavaJson",
    "Mixture",
    "ObelicsJsonl",
    "Packer",
    "Part",
    "Plan",
    "PlanConfig",
    "PlannedPack",
    "PreferenceJsonl",
    "PreferenceSample",
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
    "Stream",
    "TextPart",
    "TooManySkips",
    "Turn",
    "WindowOrder",
    "WorkerError",
    "load_data_file",
    "open_image",
    "open_sources",
    "pack",
    "samples_digest",
]
_HOMES = {
    "Batch": "stream",
    "CaptionTars": "captions",
    "DataFile": "config",
    "DataFileError": "config",
    "Encoder": "making",
    "EpochOrder": "order",
    "FileBytes": "samples",
    "HasSizes": "sources",
    "ImageLimits": "config",
    "ImagePart": "samples",
    "InMemory": "sources",
    "LlavaJson": "llava",
    "Mixture": "order",
    "ObelicsJsonl": "obelics",
    "Packer": "packing",
    "Part": "samples",
    "Plan": "plan",
    "PlanConfig": "config",
    "PlannedPack": "plan",
    "PreferenceJsonl": "preferences",
    "PreferenceSample": "samples",
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
    "Stream": "stream",
    "TextPart": "samples",
    "TooManySkips": "errors",
    "Turn": "samples",
    "WindowOrder": "order",
    "WorkerError": "errors",
    "load_data_file": "config",
    "open_image": "images",
    "open_sources": "opening",
    "pack": "packing",
    "samples_digest": "samples",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
