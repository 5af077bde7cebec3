"""From a data file to its sources."""

import glob
import logging
import os

from .config import DataFile, DataFileError, SourceConfig
from .containers import SUFFIXES, shard_kind
from .errors import ShardError
from .formats import FORMATS, Setting
from .record_source import OnIndex, RecordSource
from .sources import Source

_log = logging.getLogger(__name__)


def open_sources(data_file: DataFile, *, lengths: str | None = None, on_index: OnIndex | None = None) -> list[Source]:
    """Open every source, in the file's order; see `open_source`.

    Raises:
        DataFileError: as `open_source`.
        ShardError: as `open_source`.
    """
    return [open_source(source, lengths=lengths, on_index=on_index) for source in data_file.sources]


def open_source(cfg: SourceConfig, *, lengths: str | None = None, on_index: OnIndex | None = None) -> RecordSource:
    """Open one source. An index that is missing is made and written beside its shard, and `on_index` hears of that.

    `lengths` is the fingerprint under which `tools/index.py` has measured the samples.

    Raises:
        DataFileError: if a path matches nothing, an image root is no folder, a shard cannot hold the format, or the
            package that reads its kind is not installed.
        ShardError: if a shard is damaged, or has another size than was indexed (a smaller one: see `cut_shards`).
    """
    layout = FORMATS[cfg.format]
    settings: dict[str, Setting] = {name: getattr(cfg, name) for name in layout.settings}
    paths = shard_paths(cfg)
    if refused := [path for path in paths if shard_kind(path) not in layout.containers]:
        suffixes = ", ".join(suffix for suffix, kind in SUFFIXES.items() if kind in layout.containers)
        raise DataFileError(f"{cfg.name}: expected {suffixes} for {cfg.format}, got {refused[0]}; check `format`")
    if "caption" in layout.settings and cfg.caption == "txt" and {shard_kind(path) for path in paths} != {"tar"}:
        raise DataFileError(f'{cfg.name}: expected caption = "json:KEY" outside of tars, got "txt"; name the key')
    if cfg.image_root is not None and not os.path.isdir(cfg.image_root):
        raise DataFileError(f"{cfg.name}: expected a folder at {cfg.image_root}, got none; check `image_root`")
    try:
        source = RecordSource(
            paths,
            layout.reader(**settings),
            name=cfg.name,
            image_root=cfg.image_root,
            settings={"format": cfg.format, **settings},
            lengths=lengths,
            indexed_only=cfg.indexed_only,
            cut_shards=cfg.cut_shards,
            window=cfg.window,
            on_index=on_index,
        )
    except ShardError as error:
        raise ShardError(f"{cfg.name}: {error}") from error
    except (OSError, ImportError) as error:
        raise DataFileError(f"{cfg.name}: {error}") from error
    if source.num_left_out:
        _log.warning(
            "%s: %d of %d shards have no index yet and are left out (indexed_only)",
            cfg.name,
            source.num_left_out,
            len(paths),
        )
    if len(source) == 0:
        raise DataFileError(f"{cfg.name}: expected at least one sample in {cfg.path}, got none; check the file")
    return source


def shard_paths(cfg: SourceConfig) -> list[str]:
    """Find a source's shards, in the order of their names; what a pattern matches besides shards is passed over.

    Raises:
        DataFileError: if there is none.
    """
    if os.path.isfile(cfg.path):
        if shard_kind(cfg.path) is None:
            raise DataFileError(f"{cfg.name}: expected one of {', '.join(SUFFIXES)}, got {cfg.path}; rename the file")
        return [cfg.path]
    paths = sorted(path for path in glob.glob(cfg.path) if shard_kind(path) and os.path.isfile(path))
    if not paths:
        raise DataFileError(f"{cfg.name}: expected a file at {cfg.path}, got none; check `path`")
    return paths
