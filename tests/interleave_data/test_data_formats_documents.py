"""OBELICS, MINT-1T, MMC4 and plain text: records as published, and their turns written by hand."""

import json
import tarfile
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from itertools import islice

import pytest
from PIL import Image

from interleave_data import (
    DataFile,
    Encoder,
    ImageLimits,
    ImagePart,
    InMemory,
    PlanConfig,
    Sample,
    Size,
    SkipCounter,
    SkipLimits,
    SkipReason,
    SkipSample,
    SourceConfig,
    Stream,
    TextPart,
    Turn,
    open_sources,
)
from interleave_data.formats.documents import read_mint_html, read_mint_pdf, read_obelics
from interleave_data.formats.mmc4 import read_mmc4
from interleave_data.formats.plain_text import read_text
from interleave_data.records import Images

ADDRESS = "https://example.com/cat.jpg"
DIGEST = sha256(ADDRESS.encode()).hexdigest()


def tiff(*colours: str, side: int = 4) -> ImagePart:
    """A TIFF with a page of each colour, each larger than the one before."""
    pages = [Image.new("RGB", (side + page, side)) for page in range(len(colours))]
    for page, colour in zip(pages, colours, strict=True):
        page.paste(colour, (0, 0, *page.size))
    buffer = BytesIO()
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    return ImagePart(buffer.getvalue(), key="0.tar:k.tiff")


def obelics(**changes) -> dict:
    return {
        "images": [None, ADDRESS, None, "a.png"],
        "texts": ["A cat.\n\nIt sits.", None, "It left.", None],
        "metadata": json.dumps([None, {"src": ADDRESS}, None, {"src": "a"}]),
        "general_metadata": json.dumps({"url": "https://example.com/"}),
    } | changes


@pytest.mark.parametrize("read", [read_obelics, read_mint_html])
def test_obelics_and_mint_html_in_reading_order(read, made_record, pictures, outline):
    turns = read(made_record(obelics()), pictures)
    picture = f"<{DIGEST[:2]}/{DIGEST}.png>"
    assert outline(turns) == [("document", ["A cat.\n\nIt sits.", picture, "It left.", "<a.png>"])]
    assert Sample("x", "documents", turns).images()[0].decode().size == (3, 3)


def test_obelics_row_with_bytes(made_record, pictures, picture_root):
    data = (picture_root / "b.png").read_bytes()
    row = obelics(images=[None, {"bytes": data, "path": None}, None, {"bytes": None, "path": "a.png"}])
    (turn,) = read_obelics(made_record(row), pictures)
    assert [part.decode().size for part in turn.parts if isinstance(part, ImagePart)] == [(2, 2), (1, 1)]


def test_obelics_texts_side_by_side_are_set_apart(made_record, pictures, outline):
    texts = ["One.", "Two.\n", "Three.", "", "Four."]
    record = made_record({"images": [None] * 5, "texts": texts})
    assert outline(read_obelics(record, pictures)) == [("document", ["One.\n\nTwo.\nThree.\n\nFour."])]


@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"images": [None]}, "bad_record", "as many images as texts, got 1 and 4"),
        ({"texts": ["x", "both", "y", None]}, "bad_record", "at 1, got both"),
        ({"texts": ["x", None, None, None]}, "bad_record", "at 2, got neither"),
        ({"texts": None}, "bad_record", "texts"),
        ({"images": "a.png"}, "bad_record", "images"),
        ({"images": [None, 7, None, "a.png"]}, "bad_record", "path, address or bytes, got int"),
        ({"images": [None, "", None, "a.png"]}, "bad_record", "an empty one"),
        ({"images": [None, {"bytes": None, "path": None}, None, "a.png"]}, "bad_record", "got NoneType"),
        ({"texts": [" ", None, "\n", None]}, "empty_text", "some text"),
        ({"images": [None, "https://example.com/gone.jpg", None, "a.png"]}, "unreadable_file", "gone.jpg"),
        ({"images": [None, "../outside.png", None, "a.png"]}, "path_refused", "inside the image root"),
    ],
)
def test_obelics_bad_record(changes, reason, words, made_record, skip_of):
    skip = skip_of(read_obelics, made_record(obelics(**changes)))
    assert skip.reason == reason
    assert words in skip.detail


def test_obelics_without_texts(made_record, skip_of):
    assert skip_of(read_obelics, made_record({"images": [ADDRESS]})).reason is SkipReason.BAD_RECORD


def mint(**changes) -> dict:
    return {
        "images": ["page_0_image_85", None, "page_2_image_9", "page_0_image_85", None],
        "texts": [None, "A title.", None, None, "An end."],
        "image_metadata": [
            {"height": 4, "width": 4, "page": 0, "sha256": "00", "xref": 3},
            {"height": 4, "width": 5, "page": 2, "sha256": "01", "xref": 9},
            {"height": 4, "width": 6, "page": 0, "sha256": "02", "xref": 85},
        ],
        "bff_contained_ngram_count_before_dedupe": 29,
    } | changes


def test_mint_pdf_takes_frames_by_their_metadata(made_record, pictures, outline):
    turns = read_mint_pdf(made_record(mint(), tiff("red", "green", "blue")), pictures)
    name = "<0.tar:k.tiff#{}>".format
    assert outline(turns) == [("document", [name(2), "A title.", name(1), name(2), "An end."])]
    shown = [part.decode() for part in turns[0].parts if isinstance(part, ImagePart)]
    assert [(page.size, page.getpixel((0, 0))) for page in shown] == [
        ((6, 4), (0, 0, 255)),
        ((5, 4), (0, 128, 0)),
        ((6, 4), (0, 0, 255)),
    ]


@pytest.mark.parametrize("metadata", [None, []])
def test_mint_pdf_without_metadata_takes_frames_in_order_of_mention(metadata, made_record, pictures):
    turns = read_mint_pdf(made_record(mint(image_metadata=metadata), tiff("red", "green")), pictures)
    assert [part.frame for part in turns[0].parts if isinstance(part, ImagePart)] == [0, 1, 0]


def test_mint_pdf_of_text_alone_needs_no_tiff(made_record, pictures, outline):
    record = made_record({"images": [None], "texts": ["Words."]})
    assert outline(read_mint_pdf(record, pictures)) == [("document", ["Words."])]


@pytest.mark.parametrize(
    ("changes", "member", "reason"),
    [
        ({}, None, "missing_member"),
        ({"image_metadata": [{"page": 0, "xref": 85}]}, tiff("red"), "bad_record"),
        ({"image_metadata": [{"page": "0"}]}, tiff("red"), "bad_record"),
        ({"images": [3, None, None, None, None]}, tiff("red"), "bad_record"),
        ({"images": ["page_0_image_85"], "texts": [None]}, tiff("red"), "empty_text"),
    ],
)
def test_mint_pdf_bad_record(changes, member, reason, made_record, skip_of):
    assert skip_of(read_mint_pdf, made_record(mint(**changes), member)).reason == reason


def test_frame_that_is_not_there_is_a_broken_image(made_record, pictures):
    (turn,) = read_mint_pdf(made_record(mint(), tiff("red", "green")), pictures)
    (missing, *_) = Sample("x", "scans", (turn,)).images()
    with pytest.raises(SkipSample, match="expected a frame 2") as caught:
        missing.decode()
    assert caught.value.reason is SkipReason.BROKEN_IMAGE


def test_limits_hold_for_every_frame():
    scans = tiff("red", "green", "blue")
    limits = ImageLimits(max_pixels=20)
    assert ImagePart(scans.open, frame=1).decode(limits).size == (5, 4)
    with pytest.raises(SkipSample) as caught:
        ImagePart(scans.open, frame=2).decode(limits)
    assert caught.value.reason is SkipReason.TOO_MANY_PIXELS


def mmc4(*matches: int, **changes) -> dict:
    return {
        "url": "https://example.com/page",
        "text_list": ["One.", "Two.", " Three. "],
        "image_info": [
            {
                "image_name": "ab"[number % 2] + ".png",
                "raw_url": f"https://example.com/{number}.png",
                "matched_text_index": match,
                "matched_sim": 0.3,
            }
            for number, match in enumerate(matches)
        ],
        "similarity_matrix": [[0.3, 0.2, 0.1]] * len(matches),
    } | changes


@pytest.mark.parametrize(
    ("matches", "parts"),
    [
        ((), ["One. Two. Three."]),
        ((1,), ["One.", "<a.png>", "Two. Three."]),
        ((2, 0), ["<b.png>", "One. Two.", "<a.png>", "Three."]),
        ((1, 1, 1), ["One.", "<a.png>", "<b.png>", "<a.png>", "Two. Three."]),
    ],
)
def test_mmc4_pictures_before_their_sentences(matches, parts, made_record, pictures, outline):
    assert outline(read_mmc4(made_record(mmc4(*matches)), pictures)) == [("document", parts)]


def test_mmc4_without_a_name_takes_the_address(made_record, pictures, outline):
    row = mmc4(image_info=[{"image_name": None, "raw_url": ADDRESS, "matched_text_index": 2}])
    picture = f"<{DIGEST[:2]}/{DIGEST}.png>"
    assert outline(read_mmc4(made_record(row), pictures)) == [("document", ["One. Two.", picture, "Three."])]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (mmc4(3), "bad_record"),
        (mmc4(-1), "bad_record"),
        (mmc4(image_info=[{"matched_text_index": 0}]), "bad_record"),
        (mmc4(image_info=[{"image_name": "a.png"}]), "bad_record"),
        (mmc4(text_list="One."), "bad_record"),
        (mmc4(0, text_list=[" ", ""]), "empty_text"),
        ({"text_list": ["One."]}, "bad_record"),
    ],
)
def test_mmc4_bad_record(row, reason, made_record, skip_of):
    assert skip_of(read_mmc4, made_record(row)).reason == reason


def test_plain_text_as_it_stands(made_record, pictures, outline):
    text = " Text with <image> and <|end|> in it.\n"
    assert outline(read_text(made_record({"text": text, "source": "x"}), pictures)) == [("document", [text])]


@pytest.mark.parametrize(
    ("row", "reason"),
    [({}, "bad_record"), ({"text": 3}, "bad_record"), ({"text": None}, "bad_record"), ({"text": " \n"}, "empty_text")],
)
def test_plain_text_bad_record(row, reason, made_record, skip_of):
    assert skip_of(read_text, made_record(row)).reason == reason


@dataclass(frozen=True)
class Length:
    length: int


class Counted(Encoder[Length, list[int]]):
    """Eight tokens a picture and one for the text."""

    def measure(self, sample, limit=None) -> Size:
        return Size(8 * len(sample.images()) + 1, len(sample.images()))

    def encode(self, sample, limit=None) -> Length:
        return Length(self.measure(sample, limit).tokens)

    def collate(self, items, ids) -> list[int]:
        return [item.length for item in items]


def test_two_hundred_pictures_are_all_there_unopened_and_the_cut_is_counted(made_record, pictures):
    """(T16)"""
    # Not one of the files exists, so none can have been opened.
    names = [f"{number:03}.png" for number in range(200)]
    row = {
        "images": [value for name in names for value in (name, None)],
        "texts": [value for name in names for value in (None, f"This is {name}.")],
    }
    (turn,) = read_obelics(made_record(row), pictures)
    assert [part.key for part in turn.parts[::2] if isinstance(part, ImagePart)] == names
    assert turn.parts[1::2] == tuple(TextPart(f"This is {name}.") for name in names)

    short = Sample("short", "documents", (Turn("document", (TextPart("Words."),)),))
    source = InMemory("documents", [Sample("long", "documents", (turn,)), short])
    skips = SkipCounter(SkipLimits(max_share=1.0))
    batches = list(islice(Stream([source], Counted(), PlanConfig(max_tokens=1600, max_samples=5), skips=skips), 3))
    assert {length for batch in batches for length in batch.data} == {1}
    assert set(skips.by_reason()) == {"too_long"}


def test_openstax_documents_are_all_read_in_their_order(shared_data, made_record, outline):
    folder = shared_data / "openstax-physics"
    rows = [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]
    bodies = [outline(read_obelics(made_record(row), Images(str(folder)))) for row in rows]
    assert bodies == [
        [("document", [text or f"<{image}>" for image, text in zip(row["images"], row["texts"], strict=True)])]
        for row in rows
    ]
    parts = [part for ((_, parts),) in bodies for part in parts]
    assert (len(bodies), sum(part.startswith("<images/") for part in parts)) == (70, 365)


def test_mint_pdf_from_a_tar(tmp_path):
    scans = tiff("red", "green", "blue").open
    assert isinstance(scans, bytes)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in [("k.json", json.dumps(mint()).encode()), ("k.tiff", scans)]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, BytesIO(data))
    cfg = SourceConfig(name="mint", format="mint-pdf", path=str(tmp_path / "0.tar"))
    (source,) = open_sources(DataFile(sources=(cfg,)))
    images = source[0].images()
    assert [image.decode().getpixel((0, 0)) for image in images] == [(0, 0, 255), (0, 128, 0), (0, 0, 255)]
    assert len({image.key for image in images}) == 2
