"""The one way from bytes to pixels, used by training, evaluation and chat alike.

bytes → size → format by content → header → limits → decode → upright → RGB. `image_size` goes as far as the limits and
says what the size will be, upright. People and models must see the same
picture: the camera's orientation is applied, transparency is laid on white, 16 bits are scaled and not clipped.
"""

import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from .config import ImageLimits
from .errors import SkipReason, SkipSample

# Orientations that exchange width and height.
_SIDEWAYS = (5, 6, 7, 8)
_TURNED = (2, 3, 4, *_SIDEWAYS)
_MAX_FRAMES = 4096
_METADATA_CHUNKS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
# What Pillow's decoders and tag readers are known to raise on damaged files.
_DECODE_ERRORS = (
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
    _check_num_bytes(data, limits)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"PIL\.")
        with _open_checked(data, limits) as image:
            _seek(image, frame, limits)
            try:
                expected = _upright_size(image, data)
                image.load()
                decoded = _to_rgb(_upright(image), image.format)
            except _DECODE_ERRORS as error:
                raise SkipSample(SkipReason.BROKEN_IMAGE, f"{image.format}: {error}") from error
    if decoded.size != expected:
        # Tokens are planned from the header alone.
        detail = f"expected {expected} as the header says, got {decoded.size}"
        raise SkipSample(SkipReason.BROKEN_IMAGE, detail)
    return decoded


def image_size(data: bytes, limits: ImageLimits | None = None, frame: int = 0) -> tuple[int, int]:
    """(width, height) of the picture that `open_image` will give, from the header alone.

    Raises:
        SkipSample: as `open_image`, for all that the header tells.
    """
    limits = limits or ImageLimits()
    _check_num_bytes(data, limits)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"PIL\.")
        with _open_checked(data, limits) as image:
            _seek(image, frame, limits)
            try:
                return _upright_size(image, data)
            except _DECODE_ERRORS as error:
                raise SkipSample(SkipReason.BROKEN_IMAGE, f"{image.format}: {error}") from error


def frame_sizes(data: bytes, limits: ImageLimits) -> list[tuple[int, int] | None]:
    """`image_size` of each page of a TIFF, and of the one picture that anything else is; None where it is refused."""
    num_frames = 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"PIL\.")
        try:
            with _open_checked(data, limits) as image:
                if isinstance(image, TiffImageFile):
                    num_frames = min(image.n_frames, _MAX_FRAMES)
        except (SkipSample, *_DECODE_ERRORS):
            # Broken from the first page on, or behind it.
            num_frames = 1
    sizes: list[tuple[int, int] | None] = []
    for frame in range(num_frames):
        try:
            sizes.append(image_size(data, limits, frame))
        except SkipSample:
            sizes.append(None)
    return sizes


def check_size(size_px: tuple[int, int], limits: ImageLimits) -> None:
    """Hold (width, height) against the limits.

    Raises:
        SkipSample: too many pixels, or too small.
    """
    width, height = size_px
    if width * height > limits.max_pixels:
        detail = f"expected at most {limits.max_pixels} pixels, got {width} × {height}"
        raise SkipSample(SkipReason.TOO_MANY_PIXELS, detail)
    if min(width, height) < limits.min_side_px:
        detail = f"expected sides of at least {limits.min_side_px} px, got {width} × {height}"
        raise SkipSample(SkipReason.TOO_SMALL, detail)


def _check_num_bytes(data: bytes, limits: ImageLimits) -> None:
    if not data:
        raise SkipSample(SkipReason.EMPTY_FILE, "expected an image, got 0 bytes")
    if len(data) > limits.max_bytes:
        detail = f"expected at most {limits.max_bytes} bytes, got {len(data)} or more"
        raise SkipSample(SkipReason.TOO_MANY_BYTES, detail)


def _upright_size(image: Image.Image, data: bytes) -> tuple[int, int]:
    """The size once the camera's orientation is applied; no pixel is decoded."""
    width, height = image.size
    if isinstance(image, TiffImageFile) and image.tag_v2.get(ExifTags.Base.Orientation) in _SIDEWAYS:
        # Pillow has turned this one's size already.
        return width, height
    if image.format == "PNG":
        with Image.open(BytesIO(_late_chunks_first(data)), formats=("PNG",)) as again:
            # Not the PNG's own getexif, which decodes the pixels if it finds no orientation; and of another copy, as
            # what is found is kept, though there may be more once the pixels are decoded.
            exif = Image.Image.getexif(again)
    else:
        exif = image.getexif()
    is_sideways = exif.get(ExifTags.Base.Orientation, 1) in _SIDEWAYS
    return (height, width) if is_sideways else (width, height)


def _upright(image: Image.Image) -> Image.Image:
    """Turn the picture as the camera says; where it says nothing, `exif_transpose` would copy all pixels."""
    is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) in _TURNED
    return ImageOps.exif_transpose(image) if is_turned else image


def _late_chunks_first(data: bytes) -> bytes:
    """Put a PNG's metadata that stands behind its pixels, which is rare, in front of them.

    Pillow reads what is behind the pixels only when it has decoded them.
    """
    head, late, start, position = data[:8], b"", None, 8
    while position + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + size
        if kind == b"IDAT" and start is None:
            start = position
        elif start is not None and kind in _METADATA_CHUNKS:
            late += data[position:end]
        position = end
    return head + data[8:start] + late + data[start:] if late else data


def _open_checked(data: bytes, limits: ImageLimits) -> Image.Image:
    """Read the header alone and hold it against the limits."""
    try:
        image = Image.open(BytesIO(data), formats=limits.formats)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SkipSample(SkipReason.TOO_MANY_PIXELS, f"expected at most {limits.max_pixels} pixels: {error}") from error
    except UnidentifiedImageError as error:
        expected = "/".join(limits.formats)
        raise SkipSample(SkipReason.NOT_AN_IMAGE, f"expected {expected}, got something else") from error
    except _DECODE_ERRORS as error:
        raise SkipSample(SkipReason.BROKEN_IMAGE, f"header: {error}") from error
    check_size(image.size, limits)
    return image


def _seek(image: Image.Image, frame: int, limits: ImageLimits) -> None:
    """Go to a frame, which may have a size of its own."""
    if frame == 0:
        return
    try:
        image.seek(frame)
    except _DECODE_ERRORS as error:
        raise SkipSample(SkipReason.BROKEN_IMAGE, f"{image.format}: expected a frame {frame}, got {error}") from error
    check_size(image.size, limits)


def _to_rgb(image: Image.Image, stored_as: str | None) -> Image.Image:
    # A PNG has no more than 16 bits, in whichever mode Pillow gives them; a TIFF of mode I has 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and stored_as == "PNG"):
        return _from_16_bit(image)
    if image.mode in ("I", "F"):
        raise SkipSample(SkipReason.UNSUPPORTED_MODE, f"expected 8 or 16 bits a channel, got mode {image.mode}")
    if not image.has_transparency_data:
        # of RGB, `convert` would be another copy
        return image if image.mode == "RGB" else image.convert("RGB")
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
