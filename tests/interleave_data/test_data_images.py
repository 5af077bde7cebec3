import random
import resource
import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFile

from interleave_data import FileBytes, ImageLimits, ImagePart, SkipReason, SkipSample, open_image
from interleave_data.images import image_size

COLOURS = [[(200, 30, 40), (20, 180, 60)], [(10, 40, 220), (240, 230, 20)], [(0, 0, 0), (255, 255, 255)]]


def blocks() -> Image.Image:
    """Two columns and three rows of flat 16 × 16 blocks: lossy formats keep their middles."""
    return Image.fromarray(np.asarray(COLOURS, dtype=np.uint8).repeat(16, axis=0).repeat(16, axis=1))


def encode(image: Image.Image, fmt: str, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def assert_shows_blocks(image: Image.Image, within: int = 2) -> None:
    assert (image.mode, image.size) == ("RGB", (32, 48))
    middles = np.asarray(image)[8::16, 8::16].astype(int)
    assert np.abs(middles - np.asarray(COLOURS)).max() <= within


def reason_of(data: bytes, limits: ImageLimits | None = None) -> SkipReason:
    with pytest.raises(SkipSample) as caught:
        open_image(data, limits)
    return caught.value.reason


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises a size and whose pixels end after a few."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("PNG", {}),
        ("JPEG", {"quality": 100, "subsampling": 0}),
        ("JPEG", {"quality": 100, "subsampling": 0, "progressive": True}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_every_allowed_format_is_read(fmt, options):
    assert_shows_blocks(open_image(encode(blocks(), fmt, **options)))


@pytest.mark.parametrize("mode", ["P", "L", "1", "CMYK", "YCbCr", "RGBA", "LA"])
def test_opaque_modes_come_out_as_rgb(mode):
    """(T11)"""
    image = blocks()
    if mode in ("L", "1", "LA"):
        image = Image.merge("RGB", [image.convert("1" if mode == "1" else "L").convert("L")] * 3)
    source = image.quantize(16) if mode == "P" else image.convert(mode)
    fmt = {"CMYK": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
    options = {"quality": 100, "subsampling": 0} if fmt == "JPEG" else {}
    decoded = open_image(encode(source, fmt, **options))
    assert decoded.mode == "RGB"
    difference = np.asarray(decoded)[8::16, 8::16].astype(int) - np.asarray(image)[8::16, 8::16]
    assert np.abs(difference).max() <= 3


def test_cmyk_jpeg_is_not_inverted():
    """(T11)"""
    decoded = open_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(np.asarray(decoded)[8, 8].astype(int) - [255, 0, 0]).max() <= 3


def test_transparency_lies_on_white():
    """(T11)"""
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 51)])
    assert np.asarray(open_image(encode(image, "PNG")))[0].tolist() == [[255, 0, 0], [255, 255, 255], [204, 204, 204]]
    decoded = np.asarray(open_image(encode(image.convert("LA"), "PNG")))[0]
    assert decoded.tolist() == [[76, 76, 76], [255, 255, 255], [204, 204, 204]]


def test_palette_transparency_lies_on_white():
    """(T11)"""
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    by_index = open_image(encode(image, "PNG", transparency=1))
    assert np.asarray(by_index)[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    by_table = open_image(encode(image, "PNG", transparency=bytes([255, 0, 51])))
    assert np.asarray(by_table)[0].tolist() == [[255, 0, 0], [255, 255, 255], [204, 204, 255]]


def test_colour_key_transparency_lies_on_white():
    image = Image.new("RGB", (2, 1))
    image.putdata([(9, 8, 7), (1, 2, 3)])
    assert np.asarray(open_image(encode(image, "PNG", transparency=(9, 8, 7))))[0].tolist() == [[255] * 3, [1, 2, 3]]


def test_16_bit_grey_is_scaled():
    """(T11)"""
    values = np.array([[0, 128, 129, 257, 32896, 65534, 65535]], dtype=np.uint16)
    for fmt in ("PNG", "TIFF"):
        decoded = np.asarray(open_image(encode(Image.fromarray(values), fmt)))
        assert decoded[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]
        assert (decoded == decoded[..., :1]).all()


def test_32_bit_values_have_no_known_white():
    assert reason_of(encode(Image.new("F", (3, 3)), "TIFF")) == SkipReason.UNSUPPORTED_MODE
    assert reason_of(encode(Image.new("I", (3, 3)), "TIFF")) == SkipReason.UNSUPPORTED_MODE


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(fmt):
    """(T11)"""
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encode(first, fmt, save_all=True, append_images=[second], **options)
    assert np.asarray(open_image(data)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 64


STORED_FROM_UPRIGHT = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "TIFF"])
def test_camera_orientation_is_applied(orientation, fmt):
    """(T11)"""
    method = STORED_FROM_UPRIGHT[orientation]
    stored = blocks() if method is None else blocks().transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if fmt == "JPEG" else {}
    assert_shows_blocks(open_image(encode(stored, fmt, exif=exif, **options)))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_decoder_without_the_gates_care_shows(orientation):
    """(T11): the controls, Pillow's plain reading of the same files."""
    method = STORED_FROM_UPRIGHT[orientation]
    assert method is not None
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(blocks().transpose(method), "PNG", exif=exif)
    with pytest.raises(AssertionError):
        assert_shows_blocks(Image.open(BytesIO(data)).convert("RGB"))
    # Transparent and 16-bit pixels.
    clear = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    assert Image.open(BytesIO(encode(clear, "PNG"))).convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    assert open_image(encode(clear, "PNG")).getpixel((0, 0)) == (255, 255, 255)
    grey = Image.fromarray(np.array([[32896]], dtype=np.uint16))
    assert Image.open(BytesIO(encode(grey, "PNG"))).convert("L").getpixel((0, 0)) != 128


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_cut_file_is_skipped(fmt, share):
    """(T11)"""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, fmt)
    expected = {SkipReason.BROKEN_IMAGE, SkipReason.NOT_AN_IMAGE}
    assert reason_of(data[: int(len(data) * share)]) in expected


def test_no_bytes_and_other_bytes():
    """(T11)"""
    assert reason_of(b"") == SkipReason.EMPTY_FILE
    assert reason_of(b"<!DOCTYPE html><html>404</html>") == SkipReason.NOT_AN_IMAGE
    assert reason_of(b"\xff\xd8") == SkipReason.NOT_AN_IMAGE


def test_formats_outside_the_list_are_not_decoded():
    data = encode(blocks(), "PPM")
    assert reason_of(data) == SkipReason.NOT_AN_IMAGE
    assert reason_of(encode(blocks(), "PNG"), ImageLimits(formats=("JPEG",))) == SkipReason.NOT_AN_IMAGE


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (13_000, 13_000), (8_000, 8_000), (50_000_001, 1)])
def test_bomb_is_refused_on_its_header(width, height, monkeypatch):
    """(T15): the control is the trap"""
    data = png(width, height)
    open_image(encode(blocks(), "PNG"))

    def refuse(_image):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    # The trap is where decoding passes.
    with pytest.raises(AssertionError, match="pixels were decoded"):
        open_image(encode(blocks(), "PNG"))
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason_of(data) == SkipReason.TOO_MANY_PIXELS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < 20_000


def test_limits_are_inclusive():
    data = encode(blocks(), "PNG")
    assert open_image(data, ImageLimits(max_pixels=32 * 48, max_bytes=len(data), min_side_px=32)).size == (32, 48)
    assert reason_of(data, ImageLimits(max_pixels=32 * 48 - 1)) == SkipReason.TOO_MANY_PIXELS
    assert reason_of(data, ImageLimits(max_bytes=len(data) - 1)) == SkipReason.TOO_MANY_BYTES
    assert reason_of(data, ImageLimits(min_side_px=33)) == SkipReason.TOO_SMALL


def test_header_larger_than_its_pixels_is_broken():
    """(T15)"""
    assert reason_of(png(2000, 2000)) == SkipReason.BROKEN_IMAGE


@pytest.mark.parametrize("size", [(1, 1), (1, 100_000), (60_000, 1)])
def test_slivers_pass(size):
    assert open_image(encode(Image.new("RGB", size, (1, 2, 3)), "PNG")).size == size


def test_damaged_bytes_give_a_picture_or_a_skip_and_nothing_else():
    """(T11)"""
    rng = random.Random(0)
    files = [encode(blocks(), fmt) for fmt in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")]
    files.append(encode(blocks().convert("P"), "PNG", transparency=1))
    outcomes = {"picture": 0, "skip": 0}
    for number in range(600):
        data = bytearray(files[number % len(files)])
        for _ in range(rng.randint(1, 8)):
            # Damage to headers and tables does more than damage to pixels.
            data[rng.randrange(min(len(data), 400) if rng.random() < 0.7 else len(data))] = rng.randrange(256)
        try:
            assert open_image(bytes(data), ImageLimits(max_pixels=1_000_000)).mode == "RGB"
            outcomes["picture"] += 1
        except SkipSample:
            outcomes["skip"] += 1
    assert min(outcomes.values()) > 50


def test_gate_leaves_the_warning_filters_alone():
    before = list(warnings.filters)
    open_image(encode(blocks(), "PNG"))
    reason_of(png(13_000, 13_000))
    assert list(warnings.filters) == before


def test_part_reads_bytes_calls_and_missing_files(tmp_path):
    data = encode(blocks(), "PNG")
    assert_shows_blocks(ImagePart(data).decode())
    assert_shows_blocks(ImagePart(lambda: data).decode())
    with pytest.raises(SkipSample, match=r"unreadable_file.*photo 7"):
        ImagePart(FileBytes(str(tmp_path / "absent.jpg")), key="photo 7").decode()
    with pytest.raises(SkipSample, match="unreadable_file"):
        ImagePart(FileBytes(str(tmp_path))).decode()


def test_part_refuses_a_large_file_before_reading_it(tmp_path):
    """(T15)"""
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(SkipSample, match="too_many_bytes"):
        ImagePart(FileBytes(str(path))).decode()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"max_pixels": 0}, "max_pixels"),
        ({"max_pixels": 100_000_000}, "max_pixels"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"min_side_px": 0}, "min_side_px"),
        ({"formats": ()}, "formats"),
    ],
)
def test_limits_refuse(change, match):
    with pytest.raises(ValueError, match=match):
        ImageLimits(**change)


def png_with(image: Image.Image, chunk: bytes, *, is_behind: bool) -> bytes:
    """A PNG with a chunk of metadata before or behind its pixels."""
    data = encode(image, "PNG")
    at = data.index(b"IEND" if is_behind else b"IDAT") - 4
    return data[:at] + chunk + data[at:]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_told_upright_without_a_pixel(orientation, monkeypatch):
    image = Image.new("RGB", (7, 3), "teal")
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = exif.tobytes().removeprefix(b"Exif\0\0")
    xmp = f'<x:xmpmeta tiff:Orientation="{orientation}"/>'.encode()
    text = png_chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + xmp)
    stored = [encode(image, fmt, exif=exif) for fmt in ("JPEG", "WEBP", "TIFF", "PNG")]
    stored += [encode(image, "TIFF", exif=exif, compression="tiff_lzw"), encode(image, "WEBP", xmp=xmp)]
    stored += [
        png_with(image, chunk, is_behind=late) for chunk in (png_chunk(b"eXIf", raw), text) for late in (False, True)
    ]
    decoded = [open_image(data).size for data in stored]
    expected = (3, 7) if orientation > 4 else (7, 3)
    assert set(decoded) == {expected}

    def refuse(*_arguments):
        raise AssertionError("decoded a pixel")

    # What every decoder goes through, and what lies between opening a file and its pixels.
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert [image_size(data) for data in stored] == decoded


@pytest.mark.parametrize(
    ("data", "limits"),
    [
        (b"", None),
        (b"<html>", None),
        (png(30_000, 30_000), None),
        (png(13_000, 13_000), None),
        (png(40, 40), ImageLimits(max_pixels=1000)),
        (png(40, 40), ImageLimits(max_bytes=50)),
        (png(40, 4), ImageLimits(min_side_px=5)),
        (png(4, 4), ImageLimits(formats=("JPEG",))),
    ],
    ids=["nothing", "html", "bomb", "large", "pixels", "bytes", "small", "format"],
)
def test_size_is_refused_as_the_picture_would_be(data, limits):
    with pytest.raises(SkipSample) as caught:
        image_size(data, limits)
    assert caught.value.reason is reason_of(data, limits)


def test_a_size_that_was_known_is_held_against_the_picture():
    data = encode(blocks(), "PNG")
    assert ImagePart(data, size_px=(32, 48)).decode().size == ImagePart(data).size() == (32, 48)
    # Nothing is read for a size that is known, but the limits hold for it.
    absent = ImagePart(FileBytes("nowhere"), size_px=(32, 48))
    assert absent.size() == (32, 48)
    with pytest.raises(SkipSample, match="at most 1000 pixels"):
        absent.size(ImageLimits(max_pixels=1000))
    with pytest.raises(SkipSample, match=r"expected 48 × 32 px as indexed, got 32 × 48") as caught:
        ImagePart(data, size_px=(48, 32)).decode()
    assert caught.value.reason is SkipReason.BROKEN_IMAGE
