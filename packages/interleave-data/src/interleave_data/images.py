"""The one way from bytes to pixels, used by training, evaluation and chat alike.

bytes → size → format by content → header → limits → decode → upright → RGB. People and models must see the same
picture: the camera's orientation is applied, transparency is laid on white, 16 bits are scaled and not clipped.
"""

import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .config import ImageLimits
from .errors import SkipReason, SkipSample

# What Pillow's decoders and tag readers are known to raise on damaged files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
    Warning,
)


def open_image(data: bytes, limits: ImageLimits | None = None, frame: int = 0) -> Image.Image:
    """Decode one picture: upright, RGB, 8 bits; the frame with this number if there are several.

    CMYK is converted without a colour profile. What Pillow merely warns of (broken metadata, a short file) counts as
    broken; for that the process's warning filter is set for Pillow's modules meanwhile, as `warnings.catch_warnings`
    does, so threads should not change filters at the same time.

    Raises:
        SkipSample: if the bytes are no picture, not of an allowed format, beyond a limit, or damaged.
    """
    limits = limits or ImageLimits()
    if not data:
        raise SkipSample(SkipReason.EMPTY_FILE, "expected an image, got 0 bytes")
    if len(data) > limits.max_bytes:
        detail = f"expected at most {limits.max_bytes} bytes, got {len(data)} or more"
        raise SkipSample(SkipReason.TOO_MANY_BYTES, detail)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"PIL\.")
        with _open_checked(data, limits) as image:
            _seek(image, frame, limits)
            try:
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image), image.format)
            except DECODE_ERRORS as error:
                raise SkipSample(SkipReason.BROKEN_IMAGE, f"{image.format}: {error}") from error


def _open_checked(data: bytes, limits: ImageLimits) -> Image.Image:
    """Read the header alone and hold it against the limits."""
    try:
        image = Image.open(BytesIO(data), formats=limits.formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SkipSample(SkipReason.TOO_MANY_PIXELS, f"expected at most {limits.max_pixels} pixels: {error}") from error
    except UnidentifiedImageError as error:
        expected = "/".join(limits.formats)
        raise SkipSample(SkipReason.NOT_AN_IMAGE, f"expected {expected}, got something else") from error
    except DECODE_ERRORS as error:
        raise SkipSample(SkipReason.BROKEN_IMAGE, f"header: {error}") from error
    _check_size(image, limits)
    return image


def _seek(image: Image.Image, frame: int, limits: ImageLimits) -> None:
    """Go to a frame, which may have a size of its own."""
    if frame == 0:
        return
    try:
        image.seek(frame)
    except DECODE_ERRORS as error:
        raise SkipSample(SkipReason.BROKEN_IMAGE, f"{image.format}: expected a frame {frame}, got {error}") from error
    _check_size(image, limits)


def _check_size(image: Image.Image, limits: ImageLimits) -> None:
    width, height = image.size
    if width * height > limits.max_pixels:
        detail = f"expected at most {limits.max_pixels} pixels, got {width} × {height}"
        raise SkipSample(SkipReason.TOO_MANY_PIXELS, detail)
    if min(width, height) < limits.min_side_px:
        detail = f"expected sides of at least {limits.min_side_px} px, got {width} × {height}"
        raise SkipSample(SkipReason.TOO_SMALL, detail)


def _to_rgb(image: Image.Image, stored_as: str | None) -> Image.Image:
    # A PNG has no more than 16 bits, in whichever mode Pillow gives them; a TIFF of mode I has 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and stored_as == "PNG"):
        return _from_16_bit(image)
    if image.mode in ("I", "F"):
        raise SkipSample(SkipReason.UNSUPPORTED_MODE, f"expected 8 or 16 bits a channel, got mode {image.mode}")
    if not image.has_transparency_data:
        return image.convert("RGB")
    colours = image.convert("RGBA")
    white = Image.new("RGBA", colours.size, "white")
    return Image.alpha_composite(white, colours).convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    # 65535 / 255 = 257 exactly, so black and white stay what they are; half a step more rounds to nearest.
    grey = ((values.clip(0, 65535) + 128) // 257).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey).convert("RGB")
