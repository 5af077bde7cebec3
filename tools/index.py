"""Write the indexes of shards, once: where each record lies, its checksum, the sizes of its pictures.

    uv run tools/index.py PATH...                        # shards, folders of them, patterns, addresses, data files
    uv run tools/index.py DATA.toml --checkpoint DIR     # and how many tokens and tiles each sample comes to
    uv run tools/index.py DATA.toml --checkpoint DIR --views base    # in pre-training, one view a picture

A shard is a .tar, .json, .jsonl or .parquet; its index lies beside it as SHARD.index, that of one at an address
(s3://, gs://, https://) in the user's cache folder, through which the shard is copied for this once. What is up to
date is passed over, so the command can be given again when shards were added, and a run may start meanwhile
(`indexed_only = true` in its data file). Lengths are exact for the tokenizer and the tiling of the checkpoint, of
which only config.json and the tokenizer are read, and for the data file's limits on pictures; under others a run
measures anew. A damaged shard is named at the end and the others are done all the same.
"""

import argparse
import glob
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from interleave_data import DataFileError, ImageLimits, RecordSource, ShardError, SourceConfig, load_data_file
from interleave_data.containers import SUFFIXES, fresh_index, index_shard, shard_bytes, shard_kind
from interleave_data.formats import FORMATS
from interleave_data.index_file import read_header
from interleave_data.opening import shard_paths
from interleave_data.places import is_remote, shown

if TYPE_CHECKING:
    from blip3_lite import Processor


class Done(NamedTuple):
    """What became of one shard."""

    path: str
    num_bytes: int
    num_samples: int
    num_bad: int = 0
    error: str = ""


def find_shards(paths: Sequence[str]) -> list[str]:
    """Shards that the paths name: files, whatever is in folders at any depth, patterns, sources of data files.

    Raises:
        ValueError: a path names none.
    """
    found: dict[str, None] = {}
    for path in paths:
        if path.endswith(".toml"):
            listed = [shard for source in load_data_file(path).sources for shard in shard_paths(source)]
        elif os.path.isdir(path):
            listed = sorted(str(file) for file in Path(path).rglob("*") if file.is_file() and shard_kind(str(file)))
        elif is_remote(path):
            # As a data file would have it.
            listed = shard_paths(SourceConfig(name=shown(path), format="text", path=path))
        elif os.path.isfile(path):
            listed = [path] if shard_kind(path) else []
        else:
            listed = sorted(file for file in glob.glob(path) if os.path.isfile(file) and shard_kind(file))
        if not listed:
            raise ValueError(f"{path}: expected {', '.join(SUFFIXES)} there, got none; check the path")
        found.update(dict.fromkeys(listed))
    return list(found)


def is_up_to_date(path: str) -> bool:
    """Whether a shard has an index that fits it."""
    try:
        return fresh_index(path) is not None
    except ShardError:
        # Of another size, or a damaged index: to be indexed anew is what was asked for.
        return False


def size_of(path: str) -> int:
    """Size of a shard; none of one that cannot be read, which is said when it is indexed."""
    try:
        return shard_bytes(path)
    except (ShardError, OSError):
        return 0


def index_one(path: str, on_bytes: Callable[[int], object] | None = None) -> Done:
    """Index one shard; what is wrong with it is for the end."""
    num_bytes = 0
    try:
        num_bytes = shard_bytes(path)
        return Done(path, num_bytes, index_shard(path, on_bytes).num_samples)
    except (ShardError, OSError) as error:
        return Done(path, num_bytes, 0, error=str(error))


@cache
def _processor(checkpoint: Path, views: str, limits: ImageLimits) -> "Processor":
    """Load once in each process what measures: a tokenizer takes longer than many a shard."""
    from blip3_lite import Processor
    from blip3_lite.checkpoint import read_config
    from blip3_lite.processor import load_tokenizer

    config = read_config(checkpoint)
    model = config.model.with_base_views() if views == "base" else config.model
    return Processor(model, load_tokenizer(checkpoint / config.tokenizer_file), limits)


def measure_one(
    checkpoint: Path,
    views: str,
    limits: ImageLimits,
    cfg: SourceConfig,
    image_root: str | None,
    path: str,
    on_sample: Callable[[], object] = lambda: None,
) -> Done:
    """Measure the samples of one shard of a source."""
    processor = _processor(checkpoint, views, limits)
    layout = FORMATS[cfg.format]
    settings = {name: getattr(cfg, name) for name in layout.settings}
    try:
        source = RecordSource(
            [path],
            layout.reader(**settings),
            name=cfg.name,
            image_root=image_root,
            settings={"format": cfg.format, **settings},
        )
        num_bad = source.measure(processor.size_fingerprint, processor.measure, on_sample)
    except (ShardError, OSError) as error:
        return Done(path, 0, 0, error=str(error))
    return Done(path, 0, len(source), num_bad)


def is_alone(paths: Sequence[str], num_jobs: int) -> bool:
    """Whether the work is done in this process, the only one where progress within a shard can be told."""
    return num_jobs == 1 or len(paths) <= 1


def in_parallel(work: Callable[[str], Done], paths: Sequence[str], num_jobs: int) -> Iterable[Done]:
    """Do the shards, as many at a time as there are jobs."""
    if is_alone(paths, num_jobs):
        yield from map(work, paths)
        return
    # Spawned: the processes of a fork would inherit the threads of torch, or rather not.
    with ProcessPoolExecutor(min(num_jobs, len(paths)), get_context("spawn")) as pool:
        for future in as_completed([pool.submit(work, path) for path in paths]):
            yield future.result()


def index_all(paths: Sequence[str], num_jobs: int) -> list[Done]:
    """Index what is not up to date, with rate and time left."""
    # For shards behind an address each of these is a request.
    with ThreadPoolExecutor(16) as threads:
        waiting = [path for path, is_done in zip(paths, threads.map(is_up_to_date, paths), strict=True) if not is_done]
        total = sum(threads.map(size_of, waiting))
    done: list[Done] = []
    with tqdm(total=total, desc="index", unit="B", unit_scale=True, disable=None) as bar:
        work = partial(index_one, on_bytes=bar.update) if is_alone(waiting, num_jobs) else index_one
        for shard in in_parallel(work, waiting, num_jobs):
            done.append(shard)
            bar.update(sum(one.num_bytes for one in done) - bar.n)
    num_good = sum(not shard.error for shard in done)
    num_samples = sum(shard.num_samples for shard in done)
    print(
        f"indexed {num_good} of {len(paths)} shards, {num_samples} samples; {len(paths) - len(waiting)} were up to date"
    )
    return done


def measure_all(data_files: Sequence[str], checkpoint: Path, views: str, num_jobs: int) -> list[Done]:
    """Measure every source of the data files."""
    done: list[Done] = []
    found = [load_data_file(path) for path in data_files]
    for limits, cfg in ((data_file.image_limits, source) for data_file in found for source in data_file.sources):
        paths = [path for path in shard_paths(cfg) if is_up_to_date(path)]
        if not paths:
            continue
        folders = [os.path.dirname(os.path.abspath(path)) for path in shard_paths(cfg) if not is_remote(path)]
        image_root = cfg.image_root or (os.path.commonpath(folders) if folders else None)
        work = partial(measure_one, checkpoint, views, limits, cfg, image_root)
        total = sum(header.num_samples for path in paths if (header := read_header(path)) is not None)
        shards: list[Done] = []
        with tqdm(total=total, desc=f"measure {cfg.name}", unit="sample", disable=None) as bar:
            if is_alone(paths, num_jobs):
                work = partial(work, on_sample=bar.update)
            for shard in in_parallel(work, paths, num_jobs):
                shards.append(shard)
                bar.update(sum(one.num_samples for one in shards) - bar.n)
        num_samples, num_bad = (
            sum(counts) for counts in zip(*((s.num_samples, s.num_bad) for s in shards), strict=True)
        )
        print(f"measured {cfg.name}: {num_samples} samples, {num_bad} newly found that cannot be encoded")
        done += shards
    return done


def main() -> None:
    """Parse the command line, index, measure."""
    parser = argparse.ArgumentParser(prog="index", description="Write the indexes of shards.")
    parser.add_argument("path", nargs="+", help="a shard, a folder, a pattern, an address, or a data file")
    parser.add_argument("--checkpoint", type=Path, help="measure the samples of data files for this model too")
    parser.add_argument(
        "--views", choices=["tiles", "base"], default="tiles", help="pictures as the stage takes them; base: one view"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs: expected at least 1, got {args.jobs}")
    data_files = [path for path in args.path if path.endswith(".toml")]
    if args.checkpoint and len(data_files) < len(args.path):
        parser.error("--checkpoint: expected data files, got other paths; what a shard's samples are, a data file says")
    try:
        done = index_all(find_shards(args.path), args.jobs)
        if args.checkpoint:
            done += measure_all(data_files, args.checkpoint, args.views, args.jobs)
    except (DataFileError, ValueError) as error:
        parser.error(str(error))
    failed = {shard.path: shard.error for shard in done if shard.error}
    for error in failed.values():
        print(error, file=sys.stderr)
    if failed:
        sys.exit(f"{len(failed)} shards have no index")


if __name__ == "__main__":
    main()
