"""Write tar shards, with their indexes, from pictures and records that lie in other forms.

    uv run tools/pack_shards.py FOLDER OUT                      # pictures, each beside a .txt and perhaps a .json
    uv run tools/pack_shards.py RECORDS OUT --image-root DIR    # .json, .jsonl or .parquet; or a pattern

FOLDER becomes caption pairs (format `captions`), with KEY.jpg and KEY.txt as they are. RECORDS of any format become
KEY.json with KEY.0.jpg, KEY.1.jpg … for the pictures that they name under `image`, `images`, `img_path`, `url` or
`image_url`, or, as MMC4 does, in each `image_info` (paths under --image-root, bytes, or addresses whose pictures lie
there); the members' names take their places. They are read by the format that they were read by before. Nothing is
fetched.

The same input gives the same bytes. Each shard is written under a temporary name, synced and renamed. A record whose
pictures cannot be had, or that is larger than what is ever read (4 MiB of text, 64 MiB a picture), is left out, counted
and named.
"""

import argparse
import glob
import io
import os
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import cast

import msgspec
from PIL import Image
from tqdm import tqdm

from interleave_data import SkipCounter, SkipLimits, SkipSample
from interleave_data.containers import make_index, open_shard, shard_kind, write_index
from interleave_data.formats.pictures import picture_part
from interleave_data.records import Images
from interleave_data.tar_shards import check_members

Members = list[tuple[str, bytes]]
"""(suffix, content) of one sample's members."""

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_FIELDS = ("image", "images", "img_path", "url", "image_url")
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}


def folder_samples(folder: Path, skips: SkipCounter) -> Iterator[tuple[str, Members]]:
    """Yield each picture of a folder, at any depth, with the texts beside it.

    Raises:
        ValueError: two pictures have one name but for the suffix.
    """
    seen: set[Path] = set()
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES and path.is_file()):
        if path.with_suffix("") in seen:
            raise ValueError(f"{path}: expected one picture of that name, got another; rename one")
        seen.add(path.with_suffix(""))
        texts = [(suffix, path.with_suffix(f".{suffix}")) for suffix in ("txt", "json")]
        files = [(path.suffix.lower()[1:], path)] + [(suffix, text) for suffix, text in texts if text.is_file()]
        try:
            check_members((suffix, file.stat().st_size) for suffix, file in files)
        except SkipSample as skip:
            _leave_out(skip, str(folder), str(path), skips)
            continue
        skips.keep(str(folder))
        yield str(path), [(suffix, file.read_bytes()) for suffix, file in files]


def record_samples(paths: Sequence[str], images: Images, skips: SkipCounter) -> Iterator[tuple[str, Members]]:
    """Yield each record as its JSON and its pictures; the JSON names them as members of the sample that it becomes."""
    number = 0
    for path in paths:
        shard = open_shard(path, os.path.basename(path), make_index(path))
        for row in range(len(shard)):
            record = shard.record(row)
            try:
                members = _record_members(cast("dict[str, object]", record.decode(dict)), images, _key(number))
                check_members((suffix, len(data)) for suffix, data in members)
            except SkipSample as skip:
                _leave_out(skip, path, record.where, skips)
                continue
            skips.keep(path)
            number += 1
            yield record.where, members


def _leave_out(skip: SkipSample, source: str, where: str, skips: SkipCounter) -> None:
    skip.where = where
    skips.skip(source, skip)
    print(f"left out  {skip}", file=sys.stderr)


def _key(number: int) -> str:
    return f"{number:09}"


def _record_members(fields: dict[str, object], images: Images, sample: str) -> Members:
    """Read a record's pictures and put the members' names in their places.

    Raises:
        SkipSample: one of them is not there.
    """
    fields = dict(fields)
    pictures: Members = []
    known: dict[object, str] = {}

    def stored(value: object) -> object:
        if value is None:
            return None
        same = value if isinstance(value, str | bytes) else id(value)
        if same not in known:
            data = picture_part(value, images).read(1 << 26)
            suffix = f"{len(pictures)}.{_suffix(data)}"
            pictures.append((suffix, data))
            known[same] = f"{sample}.{suffix}"
        return known[same]

    if isinstance(fields.get("image_info"), list):
        # MMC4's: `image_name`, or where that is not set the picture of `raw_url`.
        infos = [dict(cast("dict[str, object]", info)) for info in cast("list[object]", fields["image_info"])]
        for info in infos:
            info["image_name"] = stored(info.get("image_name") or info.get("raw_url"))
        fields["image_info"] = infos
    for name in _FIELDS:
        value = fields.get(name)
        if name in ("url", "image_url") and pictures:
            # Only where the picture came from, as it is there by another name.
            continue
        if value is not None:
            fields[name] = (
                [stored(one) for one in cast("list[object]", value)] if isinstance(value, list) else stored(value)
            )
    return [("json", msgspec.json.encode(fields, order="sorted")), *pictures]


def _suffix(data: bytes) -> str:
    """The suffix of a picture by its content; what is none keeps one that will be refused on decoding."""
    try:
        with Image.open(io.BytesIO(data), formats=list(_SUFFIXES)) as image:
            return _SUFFIXES[str(image.format)]
    except OSError:
        return "jpg"


def write_shard(path: Path, samples: Iterable[Members], first: int) -> int:
    """Write one shard whole, sample by sample, and its index; return how many samples there were.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    number = first
    try:
        with temporary.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for members in samples:
                    for suffix, data in members:
                        info = tarfile.TarInfo(f"{_key(number)}.{suffix}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
                    # `tarfile` keeps every member it has written.
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  (absent from the stubs only)
                    number += 1
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    write_index(str(path))
    return number - first


def pack(samples: Iterator[tuple[str, Members]], out: Path, samples_per_shard: int) -> int:
    """Write all shards; return how many samples there were.

    Raises:
        OSError: as `write_shard`.
    """
    first = number = 0
    with tqdm(desc="pack", unit="sample", disable=None) as bar:
        for one in samples:
            rest = islice(samples, samples_per_shard - 1)
            num_written = write_shard(out / f"{number:06}.tar", (members for _, members in chain([one], rest)), first)
            bar.update(num_written)
            first += num_written
            number += 1
    print(f"{first} samples in {number} shards, in {out}")
    return first


def main() -> None:
    """Parse the command line and pack."""
    parser = argparse.ArgumentParser(prog="pack_shards", description="Write tar shards with their indexes.")
    parser.add_argument(
        "source", help="a folder of pictures, or records: .json, .jsonl, .parquet, or a pattern of them"
    )
    parser.add_argument("out", type=Path, help="a folder that is empty or not there")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument("--image-root", type=Path, help="folder of the records' pictures; by default that of the file")
    args = parser.parse_args()
    if args.samples_per_shard < 1:
        parser.error(f"--samples-per-shard: expected at least 1, got {args.samples_per_shard}")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"{args.out}: expected an empty folder or none, got something; choose another")
    skips = SkipCounter(SkipLimits(max_share=1, max_consecutive=sys.maxsize))
    if os.path.isdir(args.source):
        samples = folder_samples(Path(args.source), skips)
    else:
        paths = sorted(path for path in glob.glob(args.source) if shard_kind(path) in ("json", "parquet"))
        if not paths:
            parser.error(f"{args.source}: expected a folder, .json, .jsonl or .parquet, got none; check the path")
        samples = record_samples(paths, Images(str(args.image_root or Path(paths[0]).parent)), skips)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        num_samples = pack(samples, args.out, args.samples_per_shard)
    except (ValueError, OSError) as error:
        sys.exit(f"pack_shards: {error}")
    if left_out := skips.by_reason():
        print("left out: " + ", ".join(f"{reason} {count}" for reason, count in left_out.items()))
    if not num_samples:
        sys.exit(f"{args.source}: expected at least one sample, got none")


if __name__ == "__main__":
    main()
