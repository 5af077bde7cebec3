"""The layouts that records can have, by the names that data files call them. Importing this imports no reader."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:
    from ..records import Body, Format, Images, Record

Setting = str | int | float


class Layout(NamedTuple):
    """One format: where its reader is, and what it can be read from."""

    module: str
    """In this package."""
    function: str
    """The reader, or where there are settings what makes it from them."""
    containers: tuple[str, ...] = ("tar", "json", "parquet")
    """Kinds of shards that can hold it."""
    settings: tuple[str, ...] = ()
    """Fields of `SourceConfig` that it depends on."""

    def reader(self, **settings: Setting) -> "Reader":
        """Import the reader and give it its settings."""
        return Reader(self, settings)


class Reader:
    """A format with its settings; it goes to other processes by these, as a function made on the way could not."""

    def __init__(self, layout: Layout, settings: Mapping[str, Setting]) -> None:
        self._from = layout, settings
        function = getattr(import_module(f".{layout.module}", __name__), layout.function)
        made = cast("Callable[..., Format]", function)(**settings) if layout.settings else cast("Format", function)
        self._read = made

    def __call__(self, record: "Record", images: "Images") -> "Body":
        """Read a record.

        Raises:
            SkipSample: as the format says.
        """
        return self._read(record, images)

    def __reduce__(self) -> tuple[object, ...]:
        return Reader, self._from


FORMATS = {
    "llava-json": Layout("llava", "read_llava"),
    "mantis": Layout("llava", "read_llava"),
    "vlguard": Layout("vlguard", "vlguard", settings=("subset",)),
    "obelics": Layout("documents", "read_obelics"),
    "obelics-jsonl": Layout("documents", "read_obelics", ("json",)),
    "mint-html": Layout("documents", "read_mint_html"),
    "mint-pdf": Layout("documents", "read_mint_pdf", ("tar",)),
    "mmc4": Layout("mmc4", "read_mmc4"),
    "text": Layout("plain_text", "read_text"),
    "captions": Layout("captions", "captions", settings=("caption",)),
    "caption-tars": Layout("captions", "captions", ("tar",), ("caption",)),
    "kale": Layout("pairs", "read_kale"),
    "ocr-captions": Layout("pairs", "ocr_captions", settings=("granularity",)),
    "grounding-captions": Layout("pairs", "grounding_captions", settings=("granularity",)),
    "preference-jsonl": Layout("preferences", "read_preferences"),
    "vlfeedback": Layout("vlfeedback", "vlfeedback", settings=("floor", "pairs")),
}
"""A new format is one line here, and a module with `read_NAME(record, images) -> Body`."""

SETTINGS = frozenset(name for layout in FORMATS.values() for name in layout.settings)
"""Fields of `SourceConfig` that mean something for some formats only."""
