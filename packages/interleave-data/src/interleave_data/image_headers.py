"""What a picture's header says, without a pixel being decoded."""

import warnings
from io import BytesIO

from PIL import Image

from .images import DECODE_ERRORS

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)
_MAX_PAGES = 4096


def page_sizes(data: bytes) -> list[tuple[int, int]]:
    """Size of each page as the image gate would give it, (width, height); 0, 0 for a page that cannot be read.

    Only a TIFF has several; what moves counts by its first frame.
    """
    sizes: list[tuple[int, int]] = []
    if not data:
        return [(0, 0)]
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
