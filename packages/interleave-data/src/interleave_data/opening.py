"""From a data file to its sources."""

import glob
import logging
import os
from collections import Counter

from .config import DataFile, DataFileError, RemoteLimits, SourceConfig
from .containers import SUFFIXES, shard_kind
from .errors import ShardError
from .formats import FORMATS, Setting
from .places import is_remote, local_place, shown
from .record_source import OnIndex, RecordSource
from .sources import Source

_log = logging.getLogger(__name__)


def open_sources(data_file: DataFile, *, lengths: str | None = None, on_index: OnIndex | None = None) -> list[Source]:
    """Open every source, in the file's order; see `open_source`.

    Raises:
        DataFileError: as `open_source`.
        ShardError: as `open_source`.
    """
    remote = data_file.remote
    return [open_source(source, lengths=lengths, on_index=on_index, remote=remote) for source in data_file.sources]


def open_source(
    cfg: SourceConfig,
    *,
    lengths: str | None = None,
    on_index: OnIndex | None = None,
    remote: RemoteLimits | None = None,
) -> RecordSource:
    """Open one source. An index that is missing is made and written beside its shard, and `on_index` hears of that.

    Of a shard that is not on this disk, the index lies in the user's cache folder (see `places`).
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
        raise DataFileError(
            f"{cfg.name}: expected {suffixes} for {cfg.format}, got {shown(refused[0])}; check `format`"
        )
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
            remote=remote,
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
        named = ", ".join(map(shown, cfg.paths))
        raise DataFileError(f"{cfg.name}: expected at least one sample in {named}, got none; check the file")
    return source


def shard_paths(cfg: SourceConfig) -> list[str]:
    """Find a source's shards, of each entry of `path` in the order of their names; other files are passed over.

    Raises:
        DataFileError: if there is none.
        ShardError: if a store of objects cannot be asked.
    """
    paths = [found for path in cfg.paths for found in _find_shards(cfg.name, path)]
    # Addresses that differ in their query alone are one place: their indexes would replace each other.
    places = Counter(map(local_place, paths))
    if repeated := [path for path in paths if places[local_place(path)] > 1]:
        raise DataFileError(f"{cfg.name}: expected each shard once, got {shown(repeated[0])} again; check `path`")
    return paths


def _find_shards(name: str, path: str) -> list[str]:
    if is_remote(path):
        from .stores import find_objects

        try:
            found = find_objects(path)
        except ShardError as error:
            raise ShardError(f"{name}: {error}") from error
        except ValueError as error:
            raise DataFileError(f"{name}: {error}") from error
        if found == [path] and shard_kind(path) is None:
            raise DataFileError(f"{name}: expected one of {', '.join(SUFFIXES)}, got {shown(path)}; rename the file")
        paths = [one for one in found if shard_kind(one)]
    elif os.path.isfile(path):
        if shard_kind(path) is None:
            raise DataFileError(f"{name}: expected one of {', '.join(SUFFIXES)}, got {path}; rename the file")
        paths = [path]
    else:
        paths = sorted(one for one in glob.glob(path) if shard_kind(one) and os.path.isfile(one))
    if not paths:
        raise DataFileError(f"{name}: expected a file at {shown(path)}, got none; check `path`")
    return paths
