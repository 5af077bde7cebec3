"""Records as a container gives them, made by hand, and turns in a form that is easy to write down."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from interleave_data import ImagePart, SkipReason, SkipSample
from interleave_data.records import Images


@dataclass(frozen=True)
class MadeRecord:
    """A row, a JSON object, or the members of a tar: fields, and perhaps a picture."""

    fields: Mapping[str, Any]
    member: ImagePart | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    where: str = "made:0"

    def decode(self, fields: type) -> Any:
        try:
            return msgspec.convert(dict(self.fields), type=fields)
        except msgspec.ValidationError as error:
            raise SkipSample(SkipReason.BAD_RECORD, str(error), self.where) from error

    def text(self, suffix: str) -> str:
        if suffix not in self.texts:
            raise SkipSample(SkipReason.MISSING_MEMBER, f"expected .{suffix}, got none", self.where)
        return self.texts[suffix]

    def picture(self) -> ImagePart | None:
        return self.member


@pytest.fixture
def made_record():
    """(fields, member) → a record."""
    return MadeRecord


@pytest.fixture
def outline():
    """Turns as (role, parts), a picture written as its key in angle brackets."""

    def outline(turns) -> list[tuple[str, list[str]]]:
        return [
            (turn.role, [f"<{part.key}>" if isinstance(part, ImagePart) else part.text for part in turn.parts])
            for turn in turns
        ]

    return outline


@pytest.fixture
def picture_root(tmp_path: Path) -> Path:
    """A folder with a.png, b.png, and the picture that was found at an address."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    digest = sha256(b"https://example.com/cat.jpg").hexdigest()
    (folder / digest[:2]).mkdir()
    for name, side in [("a.png", 1), ("b.png", 2), (f"{digest[:2]}/{digest}.png", 3)]:
        Image.new("RGB", (side, side)).save(folder / name)
    return folder


@pytest.fixture
def pictures(picture_root: Path) -> Images:
    """The pictures of `picture_root`."""
    return Images(str(picture_root))


@pytest.fixture
def skip_of(pictures: Images):
    """(format, record) → the skip that reading ends in."""

    def skip_of(read, record) -> SkipSample:
        with pytest.raises(SkipSample) as caught:
            read(record, pictures)
        return caught.value

    return skip_of
