"""MANTIS: conversations over several pictures.

`{"id", "images": [picture, …], "conversation": [{"role": "user" | "assistant", "content"}, …], "source"}`, a picture
being a path, or `{"bytes", "path"}` in parquet rows. `<image>` marks are placed, and held against the number of
pictures, as in LLaVA's layout.

Source: arXiv:2405.01483.
"""

from typing import Any

import msgspec

from ..errors import SkipReason, SkipSample
from ..records import Images, Record
from ..samples import Role, Turn
from .llava import Speech, place_images
from .pictures import picture_parts

_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant", "system": "system"}


class _Message(msgspec.Struct, frozen=True):
    role: str
    content: str


class _Conversation(msgspec.Struct, frozen=True):
    conversation: list[_Message]
    images: Any = None


def read_mantis(record: Record, images: Images) -> tuple[Turn, ...]:
    """Read one conversation.

    Raises:
        SkipSample: if turns are empty or out of order, or marks and pictures disagree.
    """
    row = record.decode(_Conversation)
    speeches = [_speech(message) for message in row.conversation]
    roles = [speech.role for speech in speeches]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk or talk != ["user", "assistant"] * (len(talk) // 2):
        detail = f"expected user and assistant by turns, got {', '.join(roles) or 'no turns'}"
        raise SkipSample(SkipReason.BAD_RECORD, detail)
    return place_images(speeches, picture_parts(row.images, images))


def _speech(message: _Message) -> Speech:
    if message.role not in _ROLES:
        raise SkipSample(SkipReason.BAD_RECORD, f"expected a role of {', '.join(_ROLES)}, got {message.role!r}")
    role = _ROLES[message.role]
    if not message.content.strip():
        reason = SkipReason.EMPTY_ANSWER if role == "assistant" else SkipReason.EMPTY_TEXT
        raise SkipSample(reason, f"expected some text of the {role}, got none")
    return Speech(role, message.content)
