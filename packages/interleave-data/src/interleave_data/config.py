"""What a run reads: limits on images and on skips, and the data file that lists the sources. Imports no torch."""

import glob
import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import msgspec

from .formats import FORMATS, SETTINGS
from .places import SCHEMES, is_remote, scheme_of, shown

# Above this Pillow warns by itself on opening, before our own limit is looked at.
_PILLOW_WARNS_ABOVE_PX = 89_478_485

ImageFormat = Literal["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]
RatioUnit = Literal["samples", "tokens"]
"""What ratios are counted in."""

CutShards = Literal["error", "skip"]
"""What becomes of a shard that is shorter than its index says."""


class ImageLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the image gate lets in. All limits but the formats' own errors are checked before any pixel is decoded."""

    max_pixels: int = 50_000_000
    """Most pixels (width × height, from the header)."""
    max_bytes: int = 64 * 1024 * 1024
    """Most bytes of the file as stored."""
    min_side_px: int = 1
    """Fewest pixels of the shorter side."""
    formats: tuple[ImageFormat, ...] = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
    """Formats that may be decoded; told by content, never by a file's name."""

    def __post_init__(self) -> None:
        """Refuse limits that would let nothing in, or more than Pillow does.

        Raises:
            ValueError: naming the limit.
        """
        if not 1 <= self.max_pixels <= _PILLOW_WARNS_ABOVE_PX:
            raise ValueError(
                f"max_pixels: expected 1 to {_PILLOW_WARNS_ABOVE_PX} (Pillow's own limit), got {self.max_pixels}; "
                "scale larger images down beforehand"
            )
        if self.max_bytes < 1:
            raise ValueError(f"max_bytes: expected at least 1, got {self.max_bytes}; leave it out for the default")
        if self.min_side_px < 1:
            raise ValueError(f"min_side_px: expected at least 1, got {self.min_side_px}; leave it out for the default")
        if not self.formats:
            raise ValueError("formats: expected at least one, got none; leave it out for the default")


class SkipLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many bad samples a run puts up with, judged for each source by itself."""

    max_share: float = 0.01
    """Largest share of a source's samples that may be skipped."""
    max_consecutive: int = 100
    """Skips in a row that end the run."""
    min_seen: int = 1000
    """The share is taken of at least this many samples, so that one early skip does not end a run."""

    def __post_init__(self) -> None:
        """Refuse limits without meaning.

        Raises:
            ValueError: naming the limit.
        """
        if not 0 <= self.max_share <= 1:
            raise ValueError(f"max_share: expected 0 to 1, got {self.max_share}; 0.01 stands for one in a hundred")
        if self.max_consecutive < 1:
            raise ValueError(f"max_consecutive: expected at least 1, got {self.max_consecutive}; 1 allows no skip")
        if self.min_seen < 1:
            raise ValueError(f"min_seen: expected at least 1, got {self.min_seen}; 1 judges the share at once")


class RemoteLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long is waited for shards that are not on this disk."""

    connect_s: float = 10.0
    """Longest wait for a connection."""
    stall_s: float = 30.0
    """Longest silence; an answer may take this long in all, and a second more for every 64 KiB."""
    total_s: float = 300.0
    """Longest time for one read with all its retries; then the run ends. Less than a run waits for its workers."""

    def __post_init__(self) -> None:
        """Refuse times that are none.

        Raises:
            ValueError: naming the limit.
        """
        for name in self.__struct_fields__:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected above 0 and finite, got {getattr(self, name)}; use some seconds")


class PlanConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What, beside the sources, decides which samples come when and share a pack (see `plan`)."""

    max_tokens: int
    """Most tokens of a pack, image tokens included."""
    max_tiles: int | None = None
    """Most tiles of a pack; None for as many as its tokens allow."""
    max_samples: int | None = None
    """Most samples of a pack; None for as many as fit."""
    look_ahead: int = 64
    """Samples that wait to be packed."""
    group_by_length: bool = False
    """Whether samples of like length share a pack, in place of those that fill it best."""
    too_long: Literal["drop", "truncate-text", "error"] = "drop"
    """What becomes of a sample that is larger than a pack. `drop`: left out and counted as too_long. `truncate-text`:
    cut at the budget, never inside an image, and counted as truncated. `error`: the run ends."""
    ratios: tuple[float, ...] | None = None
    """Shares of the sources relative to each other; None for equal ones."""
    ratio_unit: RatioUnit = "samples"
    """What ratios are counted in."""
    epochs: tuple[float | None, ...] | None = None
    """How many times over each source is drawn at most; None for without end."""
    seed: int = 0
    """Orders the samples within each source."""


class SourceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[sources]]` table of a data file. Paths are relative to the data file's folder."""

    name: str
    """What the source is called in logs, counters and sample ids; unique in the file."""
    format: str
    """How the records are laid out, one of `formats.FORMATS`."""
    path: str | tuple[str, ...]
    """The file to read, or a glob pattern of shards: .tar, .json, .jsonl or .parquet; or a list of such. Or an address:
    `s3://BUCKET/a-*.tar`, `gs://…`, `https://HOST/a-{000..099}.tar`."""
    image_root: str | None = None
    """Folder that image paths are relative to and may not leave; by default the folder that holds all shards. Always on
    this disk, and without a default where no shard is."""
    ratio: float = 1.0
    """Share of samples drawn from this source, relative to the other sources'."""
    epochs: float | None = None
    """How many times over the source is drawn at most; then the others go on without it. None for without end."""
    window: int | None = None
    """Samples that are shuffled together, for files that are read in blocks (parquet); None to shuffle them all."""
    caption: str = "txt"
    """For captions: where the caption stands, `txt` for the .txt member or `json:KEY` for a key of the record."""
    granularity: int = 0
    """For OCR and grounding captions: how exactly places are told, 0 for the least."""
    floor: float = 4.0
    """For VLFeedback: the lowest mean rating, of 1 to 5, that a preferred answer may have."""
    indexed_only: bool = False
    """Whether shards that have no index yet are left out, so that a run may start while they are being indexed."""
    cut_shards: CutShards = "error"
    """What becomes of a shard that is shorter than its index says. `error`: it is not opened. `skip`: each sample that
    was cut off is skipped in its place and counted, and all others keep theirs."""

    def __post_init__(self) -> None:
        """Refuse an unusable source.

        Raises:
            ValueError: naming the field.
        """
        if not self.name:
            raise ValueError("name: expected some text, got none; name the source for logs and counters")
        for path in self.paths:
            scheme, colon, _ = path.partition(":")
            if colon and scheme.lower() in SCHEMES and not is_remote(path):
                # Not shown whole: it may hold a password.
                raise ValueError(f"path: expected {scheme}://…, got {scheme}:…; an address has two slashes there")
            if is_remote(path) and scheme_of(path) not in SCHEMES:
                schemes = ", ".join(f"{scheme}://" for scheme in SCHEMES)
                raise ValueError(
                    f"path: expected a path, or an address with {schemes}, got {shown(path)}; copy it here"
                )
        if not self.paths:
            raise ValueError("path: expected at least one, got an empty list; name a shard")
        if self.image_root is not None and is_remote(self.image_root):
            raise ValueError(
                f"image_root: expected a folder on this disk, got {shown(self.image_root)}; copy the pictures here, or "
                "pack them into the shards (tools/pack_shards.py)"
            )
        if self.cut_shards != "error" and any(map(is_remote, self.paths)):
            raise ValueError(
                f'cut_shards: expected "error" for shards that are not on this disk, got "{self.cut_shards}"; leave it '
                "out, an object is there whole or not at all"
            )
        if self.format not in FORMATS:
            nearest = get_close_matches(self.format, FORMATS, n=1, cutoff=0.4)
            advice = f"did you mean `{nearest[0]}`?" if nearest else "check its spelling"
            raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {self.format!r}; {advice}")
        defaults = dict(zip(reversed(self.__struct_fields__), reversed(self.__struct_defaults__), strict=False))
        for name in sorted(SETTINGS - set(FORMATS[self.format].settings)):
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}: expected none for {self.format}, got {getattr(self, name)}; leave it out")
        if self.epochs is not None and not 0 < self.epochs < float("inf"):
            raise ValueError(f"epochs: expected above 0 and finite, got {self.epochs}; leave it out for without end")
        if self.window is not None and self.window < 8:
            raise ValueError(f"window: expected at least 8 samples, got {self.window}; use several thousand")
        if not 0 < self.ratio < float("inf"):
            raise ValueError(f"ratio: expected above 0 and finite, got {self.ratio}; leave the source out instead")
        if self.caption != "txt" and not re.fullmatch(r"json:.+", self.caption):
            raise ValueError(f'caption: expected "txt" or "json:KEY", got "{self.caption}"; for example "json:caption"')

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a list."""
        return (self.path,) if isinstance(self.path, str) else self.path


class DataFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole data file: sources to be mixed, and what is refused."""

    sources: tuple[SourceConfig, ...]
    """The sources, each a `[[sources]]` table."""
    ratio_unit: RatioUnit = "samples"
    """Whether the sources' ratios are shares of samples or of tokens."""
    group_by_length: bool = False
    """Whether samples of like length share a pack, in place of those that fill it best."""
    image_limits: ImageLimits = ImageLimits()
    """The `[image_limits]` table: what the image gate lets in."""
    skip_limits: SkipLimits = SkipLimits()
    """The `[skip_limits]` table: how many bad samples end the run."""
    remote: RemoteLimits = RemoteLimits()
    """The `[remote]` table: how long is waited for shards that are not on this disk."""

    def __post_init__(self) -> None:
        """Refuse an empty list and repeated names.

        Raises:
            ValueError: naming what is wrong.
        """
        if not self.sources:
            raise ValueError("sources: expected at least one [[sources]] table, got none; add one")
        names = [source.name for source in self.sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sources: expected each name once, got {', '.join(repeated)} again; rename one")


class DataFileError(ValueError):
    """A data file that is missing, no TOML, or not as `DataFile` says."""


def load_data_file(path: str | Path) -> DataFile:
    """Read and check a TOML data file; its relative paths come back joined to the file's own folder.

    An unknown key is an error that names the nearest known one.

    Raises:
        DataFileError: with the file's name and the place in it.
    """
    try:
        data_file = msgspec.toml.decode(Path(path).read_bytes(), type=DataFile)
    except OSError as error:
        raise DataFileError(f"{path}: expected a readable data file, got {error.strerror}; check the path") from error
    except msgspec.DecodeError as error:
        raise DataFileError(f"{path}: {error}{_nearest_key(str(error))}") from error
    except UnicodeDecodeError as error:
        raise DataFileError(f"{path}: expected UTF-8 text, got {error.reason}; save it as UTF-8") from error
    folder = Path(path).absolute().parent
    sources = tuple(
        msgspec.structs.replace(
            source,
            path=_joined(folder, source.path)
            if isinstance(source.path, str)
            else tuple(_joined(folder, path) for path in source.path),
            image_root=None if source.image_root is None else str(folder / source.image_root),
        )
        for source in data_file.sources
    )
    return msgspec.structs.replace(data_file, sources=sources)


def _joined(folder: Path, path: str) -> str:
    """The path from there; in front of a pattern, the folder's own name is none. An address stands as it is."""
    if is_remote(path):
        return path
    plain = folder / path
    return str(plain if plain.is_file() or os.path.isabs(path) else Path(glob.escape(str(folder))) / path)


def _nearest_key(message: str) -> str:
    """Turn "unknown field" into a suggestion, from the keys that the table at the named place may have."""
    unknown = re.search(r"unknown field `(.*?)`(?: - at `\$\.(\w+))?", message)
    if unknown is None:
        return ""
    tables = {"sources": SourceConfig, "image_limits": ImageLimits, "skip_limits": SkipLimits, "remote": RemoteLimits}
    known = tables.get(unknown[2], DataFile).__struct_fields__
    nearest = get_close_matches(unknown[1], known, n=1)
    return f"; did you mean `{nearest[0]}`?" if nearest else f"; known keys are {', '.join(known)}"
