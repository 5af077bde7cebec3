"""The pictures of a record, in the few ways in which published rows hold them."""

from collections.abc import Sequence
from typing import Any, cast

from ..errors import SkipReason, SkipSample
from ..records import Images, Record
from ..samples import ImagePart


def picture_part(value: object, images: Images) -> ImagePart:
    """A path, an address, encoded bytes, or `{"bytes", "path"}` as the hub's image columns have it.

    Raises:
        SkipSample: if it is none of these, or `Images.part` refuses it.
    """
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        value = fields.get("bytes") or fields.get("path")
    if not isinstance(value, str | bytes) or not value:
        got = "an empty one" if isinstance(value, str | bytes) else type(value).__name__
        raise SkipSample(SkipReason.BAD_RECORD, f"expected a picture as path, address or bytes, got {got}")
    return images.part(value)


def picture_parts(values: object, images: Images) -> list[ImagePart]:
    """One picture, a list of them, or None for no picture.

    Raises:
        SkipSample: as `picture_part`.
    """
    if values is None:
        return []
    listed = cast("Sequence[object]", values) if isinstance(values, list | tuple) else [values]
    return [picture_part(value, images) for value in listed]


def lone_picture(record: Record, images: Images, fields: Sequence[object]) -> ImagePart:
    """The member of a tar that is a picture, else the first of the fields that is set.

    A member comes first, since an address beside it only says where the picture was.

    Raises:
        SkipSample: if there is no picture at all, or as `picture_part`.
    """
    member = record.picture()
    if member is not None:
        return member
    value = next((value for value in fields if value is not None), None)
    if value is None:
        raise SkipSample(SkipReason.MISSING_MEMBER, "expected a picture or its address, got none")
    return picture_part(value, images)
