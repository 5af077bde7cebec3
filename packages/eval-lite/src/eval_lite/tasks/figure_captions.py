"""Figures with long descriptions, in tars: KEY.jpg (or .png) and KEY.txt, as WebDataset and the sample data have it."""

import tarfile
from pathlib import Path, PurePosixPath

from interleave_data import ImagePart
from interleave_data.samples import SliceBytes

from ..prediction import EvalItem
from . import captioning
from .files import TaskFileError, question
from .task import Task

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_LONGEST_TEXT = 1 << 22


def _read(folder: Path) -> list[EvalItem]:
    paths = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not paths:
        raise TaskFileError(f"{folder}: expected *.tar, got none; put shards of pictures with .txt there")
    return [item for path in paths for item in _shard(path)]


def _shard(path: Path) -> list[EvalItem]:
    pictures: dict[str, ImagePart] = {}
    texts: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                key = str(name.with_suffix(""))
                if not member.isfile():
                    continue
                if name.suffix.lower() in _PICTURES:
                    data = SliceBytes(str(path), member.offset_data, member.size)
                    pictures[key] = ImagePart(data, key=f"{path.name}/{member.name}")
                elif name.suffix == ".txt" and member.size <= _LONGEST_TEXT and (file := tar.extractfile(member)):
                    texts[key] = file.read().decode("utf-8").strip()
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise TaskFileError(
            f"{path}: expected an uncompressed tar with UTF-8 texts, got: {error}; get it again"
        ) from error
    return [
        EvalItem(
            group="captions",
            prompt=question(f"{path.stem}/{key}", [image], "", "captions"),
            answer=texts[key],
            references=(texts[key],),
        )
        for key, image in pictures.items()
        if texts.get(key)
    ]


TASKS = {
    "captions": Task(
        name="captions",
        files="*.tar with KEY.jpg and KEY.txt",
        read=_read,
        score=captioning.score,
        measure=captioning.measure,
        wording=captioning.WORDING,
        max_new_tokens=96,
    )
}
