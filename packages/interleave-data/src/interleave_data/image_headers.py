"""What a picture's header says, without a pixel being decoded; and the pages of a TIFF, each as a picture."""

import warnings
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

from .images import DECODE_ERRORS
from .samples import SliceBytes

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)
_MAX_PAGES = 4096


def page_sizes(data: bytes) -> list[tuple[int, int]]:
    """Size of each page as the image gate would give it, (width, height); 0, 0 for a page that cannot be read.

    Only a TIFF has several; what moves counts by its first frame.
    """
    sizes: list[tuple[int, int]] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"PIL\.")
        try:
            with Image.open(BytesIO(data), formats=_FORMATS) as image:
                num_pages = min(getattr(image, "n_frames", 1), _MAX_PAGES) if image.format == "TIFF" else 1
                for page in range(num_pages):
                    if page:
                        image.seek(page)
                    # Pillow turns the size of a lying TIFF by itself.
                    is_lying = image.format != "TIFF" and image.getexif().get(_ORIENTATION) in _LYING
                    sizes.append((image.height, image.width) if is_lying else image.size)
        except (Image.DecompressionBombError, *DECODE_ERRORS):
            return sizes or [(0, 0)]
    return sizes


@dataclass(frozen=True)
class TiffPage(SliceBytes):
    """Read a TIFF with one of its pages in front, which is the one that is decoded."""

    page: int = 0

    def __call__(self) -> bytes:
        """Read the file and let its head point to the page.

        Raises:
            OSError: as `SliceBytes`, or there is no such page.
            SkipSample: as `SliceBytes`.
        """
        data = super().__call__()
        order = "little" if data[:2] == b"II" else "big"
        # Of the two kinds of TIFF the later one has offsets of 8 bytes.
        is_big = int.from_bytes(data[2:4], order) == 43
        head, word, count, entry = (8, 8, 8, 20) if is_big else (4, 4, 2, 12)
        place = head
        for _ in range(self.page + 1):
            offset = int.from_bytes(data[place : place + word], order)
            if not 0 < offset <= len(data) - count:
                raise OSError(f"expected page {self.page} of a TIFF, got fewer")
            place = offset + count + entry * int.from_bytes(data[offset : offset + count], order)
        return data[:head] + offset.to_bytes(word, order) + data[head + word :]
