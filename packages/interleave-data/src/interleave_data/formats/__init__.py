"""The layouts that records can have, by the names that data files call them. Importing this imports no reader."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from ..records import Body, Format

_ALL = ("tar", "json", "parquet")


class Layout(NamedTuple):
    """One format: where its reader is, and what it can be read from."""

    module: str
    """In this package."""
    function: str
    containers: tuple[str, ...] = _ALL
    """Kinds of shards that can hold it."""
    settings: tuple[str, ...] = ()
    """Fields of `SourceConfig` that the function takes by name."""

    def reader(self, **settings: str | int) -> "Format":
        """Import the reader and give it its settings."""
        function = getattr(import_module(f".{self.module}", __name__), self.function)
        return partial(cast("Callable[..., Body]", function), **settings)


FORMATS = {
    "llava-json": Layout("llava", "read_llava"),
    "obelics-jsonl": Layout("obelics", "read_obelics"),
    "preference-jsonl": Layout("preferences", "read_preferences"),
    "caption-tars": Layout("captions", "read_captions", ("tar",), ("caption",)),
    "captions": Layout("captions", "read_captions", settings=("caption",)),
}
"""A new format is one line here: a module with `read_NAME(record, images) -> Body`."""
