"""Reading a benchmark's own files: found by pattern, checked by type, complained of by file and row.

Nothing is downloaded and no address is opened: pictures lie below the task's folder.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from interleave_data import ImagePart, Sample, SkipSample, TextPart, Turn
from interleave_data.sources import image_inside

_Row = TypeVar("_Row")
# Rows are decoded one by one, so that a bad one can be named.
_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_LIST = msgspec.json.Decoder(list[msgspec.Raw])


class TaskFileError(ValueError):
    """A benchmark's file that is missing or is not what it should be."""


def find_file(folder: Path, *patterns: str) -> Path:
    """The one file of the folder (or below it) that fits the first pattern that any fits.

    Raises:
        TaskFileError: none, or several.
    """
    if not folder.is_dir():
        raise TaskFileError(
            f"{folder}: expected a folder with {patterns[0]}, got none; put the files there, or name it"
        )
    for pattern in patterns:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:4])
            raise TaskFileError(f"{folder}: expected one file {pattern}, got {names}; leave one there")
        if found:
            return found[0]
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
    raise TaskFileError(f"{folder}: expected {' or '.join(patterns)}, got {held}; put the benchmark's file there")


def read_json(path: Path, kind: type[_Row]) -> _Row:
    """A JSON file of a type; keys that the type does not name are passed over.

    Raises:
        TaskFileError: it cannot be read, is no JSON or not of the type.
    """
    return _decoded(msgspec.json.Decoder(kind).decode, _bytes(path), str(path))


def read_rows(path: Path, kind: type[_Row], key: str = "") -> list[_Row]:
    """The rows of a JSON file that is a list, or an object with the list under `key`.

    Raises:
        TaskFileError: as `read_json`; the row is named, counted from 1.
    """
    data: bytes | msgspec.Raw = _bytes(path)
    if key:
        table = _decoded(_OBJECT.decode, data, str(path))
        if key not in table:
            raise TaskFileError(
                f"{path}: expected a list under {key!r}, got the keys {', '.join(table) or 'none'}; "
                "is it the benchmark's own file?"
            )
        data = table[key]
    rows = _decoded(_LIST.decode, data, str(path))
    if not rows:
        raise TaskFileError(f"{path}: expected at least one row, got an empty list; get the file again")
    decode = msgspec.json.Decoder(kind).decode
    return [_decoded(decode, row, f"{path}: row {number}") for number, row in enumerate(rows, 1)]


def read_named(path: Path, kind: type[_Row]) -> dict[str, _Row]:
    """The rows of a JSON file that is an object, by their names.

    Raises:
        TaskFileError: as `read_json`; the row is named.
    """
    decode = msgspec.json.Decoder(kind).decode
    rows = _decoded(_OBJECT.decode, _bytes(path), str(path))
    return {name: _decoded(decode, row, f"{path}: row {name!r}") for name, row in rows.items()}


def read_lines(path: Path, kind: type[_Row]) -> list[_Row]:
    """A JSON object a line; empty lines are passed over.

    Raises:
        TaskFileError: as `read_json`, the line is named; there is none.
    """
    decode = msgspec.json.Decoder(kind).decode
    lines = enumerate(_bytes(path).split(b"\n"), 1)
    rows = [_decoded(decode, line, f"{path}: line {number}") for number, line in lines if line.strip()]
    if not rows:
        raise TaskFileError(f"{path}: expected a JSON object a line, got an empty file; get the file again")
    return rows


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a TSV file with a header, which may be quoted and hold pictures in base64.

    Raises:
        TaskFileError: it cannot be read, is no UTF-8, or a row has another number of cells than the header.
    """
    import csv
    import io

    try:
        text = _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskFileError(f"{path}: expected UTF-8, got: {error}; convert it") from error
    kept = csv.field_size_limit(1 << 30)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t"))
    except csv.Error as error:
        raise TaskFileError(f"{path}: expected tab-separated rows, got: {error}; get the file again") from error
    finally:
        csv.field_size_limit(kept)
    if not rows:
        raise TaskFileError(f"{path}: expected a header and rows, got an empty file; get the file again")
    header, *body = rows
    for number, row in enumerate(body, 2):
        if len(row) != len(header):
            raise TaskFileError(
                f"{path}: row {number}: expected {len(header)} cells, as in the header, got {len(row)}; repair the row"
            )
    return [dict(zip(header, row, strict=True)) for row in body]


def need(row: dict[str, str], name: str, path: Path, number: int) -> str:
    """A cell of a table.

    Raises:
        TaskFileError: there is no such column.
    """
    if name not in row:
        raise TaskFileError(f"{path}: row {number}: expected a column {name}, got {', '.join(row)}; check the file")
    return row[name]


def refuse(path: Path, row: object, expected: str, got: object, advice: str) -> TaskFileError:
    """The error for a row that cannot be used."""
    return TaskFileError(f"{path}: row {row}: expected {expected}, got {got!r}; {advice}")


def picture(folder: Path, names: Sequence[str], path: Path, row: object) -> ImagePart:
    """The first of these files below the folder that is there; the first of all where none is, to be skipped later.

    Raises:
        TaskFileError: an address, or a path that leads out of the folder.
    """
    for name in names:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name):
            raise refuse(path, row, "a picture's file", name, "download it; no address is opened here")
    found = next((name for name in names if os.path.isfile(folder / name)), names[0])
    try:
        return image_inside(str(folder), found)
    except SkipSample as skip:
        raise TaskFileError(f"{path}: row {row}: {skip.detail}; correct the path, or move the picture") from skip


def question(item_id: str, images: Sequence[ImagePart], text: str, source: str) -> Sample:
    """A user's turn: pictures, then the question, if there is one."""
    asked = (TextPart(text),) if text else ()
    return Sample(id=item_id, source=source, turns=(Turn(role="user", parts=(*images, *asked)),))


def check_pairs(path: Path, other: Path, missing: Sequence[object]) -> None:
    """Refuse rows of a file that lack their row in another.

    Raises:
        TaskFileError: naming the first.
    """
    if missing:
        raise TaskFileError(
            f"{path}: expected each id in {other.name} too, got {len(missing)} without, the first {missing[0]!r}; "
            "take both files of the same split"
        )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TaskFileError(f"{path}: expected a readable file, got: {error.strerror}; check it") from error


def _decoded(decode: Callable[[bytes | msgspec.Raw], _Row], data: bytes | msgspec.Raw, where: str) -> _Row:
    try:
        return decode(data)
    except msgspec.ValidationError as error:
        reason = str(error)
        raise TaskFileError(f"{where}: {reason[0].lower()}{reason[1:]}; is it the benchmark's own file?") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TaskFileError(f"{where}: expected JSON, got: {error}; get the file again") from error
