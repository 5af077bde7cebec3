"""Caption pairs in rows, and the three caption sets of BLIP-3: rows as published, turns written by hand."""

import json
from hashlib import sha256

import pytest
from PIL import Image

from interleave_data import ImagePart, SkipReason, TextPart
from interleave_data.formats.pairs import caption_rows, grounding_captions, ocr_captions, read_kale
from interleave_data.records import Images

ADDRESS = "https://example.com/cat.jpg"
DIGEST = sha256(ADDRESS.encode()).hexdigest()
FOUND = f"<{DIGEST[:2]}/{DIGEST}.png>"


def pair(caption: str, picture: str = FOUND) -> list:
    return [("document", [picture, caption])]


def halves(turns) -> tuple[ImagePart, str]:
    """The picture and the caption of a pair."""
    ((picture, text),) = (turn.parts for turn in turns)
    assert isinstance(picture, ImagePart)
    assert isinstance(text, TextPart)
    return picture, text.text


@pytest.mark.parametrize(
    ("row", "read", "expected"),
    [
        ({"caption": " A cat. ", "url": ADDRESS}, caption_rows(), pair("A cat.")),
        ({"caption": "A cat.", "image": "a.png", "url": ADDRESS}, caption_rows(), pair("A cat.", "<a.png>")),
        ({"caption": "A cat.", "image": None, "url": ADDRESS}, caption_rows(), pair("A cat.")),
        ({"text": "A cat.", "image_url": ADDRESS}, caption_rows("text"), pair("A cat.")),
        ({"text": "<image> A cat.", "image": "a.png"}, caption_rows("text"), pair("<image> A cat.", "<a.png>")),
        (
            {"alt": "A cat.", "photo": "b.png", "image": "a.png"},
            caption_rows("alt", picture="photo"),
            pair("A cat.", "<b.png>"),
        ),
        ({"caption": "A tabby.", "cogvlm_caption": "A cat.", "url": ADDRESS}, read_kale, pair("A tabby.")),
        ({"caption": "A tabby.", "cogvlm_caption": None, "url": ADDRESS}, read_kale, pair("A tabby.")),
        ({"caption": "A tabby.", "url": ADDRESS}, read_kale, pair("A tabby.")),
        (
            {"caption": "A tabby.", "cogvlm_caption": "A cat.", "url": ADDRESS},
            caption_rows("cogvlm_caption"),
            pair("A cat."),
        ),
    ],
)
def test_pair_as_published(row, read, expected, made_record, pictures, outline):
    assert outline(read(made_record(row), pictures)) == expected


def test_pair_with_the_picture_in_the_row(made_record, pictures, picture_root):
    data = (picture_root / "b.png").read_bytes()
    for value in (data, {"bytes": data, "path": "b.png"}):
        picture, _ = halves(caption_rows()(made_record({"caption": "A cat.", "jpg": value}), pictures))
        assert picture.decode().size == (2, 2)


def test_member_of_the_tar_comes_before_an_address(made_record, pictures, outline):
    member = ImagePart(b"", key="0.tar:k.jpg")
    record = made_record({"caption": "A cat.", "url": "https://example.com/gone.jpg"}, member)
    assert outline(read_kale(record, pictures)) == pair("A cat.", "<0.tar:k.jpg>")


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "tiff"])
def test_picture_of_an_address_may_have_any_suffix(suffix, pictures, picture_root):
    address = f"http://example.com/a picture?as={suffix}&of=[x]"
    digest = sha256(address.encode()).hexdigest()
    (picture_root / digest[:2]).mkdir(exist_ok=True)
    Image.new("RGB", (4, 5)).save(picture_root / digest[:2] / f"{digest}.{suffix}")
    assert pictures.part(address).decode().size == (4, 5)


@pytest.mark.parametrize("read", [caption_rows(), read_kale])
@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ({"url": ADDRESS}, "bad_record", "caption"),
        ({"caption": 3, "url": ADDRESS}, "bad_record", "got"),
        ({"caption": None, "url": ADDRESS}, "bad_record", "got"),
        ({"caption": " \n", "url": ADDRESS}, "empty_text", "caption with some text"),
        ({"caption": "A cat."}, "missing_member", "a picture or its address"),
        ({"caption": "A cat.", "url": "https://example.com/gone.jpg"}, "unreadable_file", "gone.jpg"),
        ({"caption": "A cat.", "url": "/etc/cat.jpg"}, "path_refused", "relative to the image root"),
        ({"caption": "A cat.", "image": 3}, "bad_record", "path, address or bytes, got int"),
    ],
)
def test_pair_bad_record(read, row, reason, words, made_record, skip_of):
    skip = skip_of(read, made_record(row))
    assert skip.reason == reason
    assert words in skip.detail


OCR_TEXTS = [
    'The image contains the text "OPEN", the text "read the text "now"" and the text "24 h"',
    'The image contains the text "OPEN" located above the center',
    'The image contains the text "OPEN" located at 2/17 of the image from top to bottom',
    'The image contains the text "OPEN" approximately starts at [0.2, 0.0] and extends upto [0.8, 0.2]',
    'The image contains the text "OPEN" starts at [0.192, 0.037] and extends upto [0.817, 0.203]',
    "The image contains the <ocr>OPEN</ocr><bbox>[0.192, 0.037][0.817, 0.203]</bbox>",
]


def ocr_row(captions: object = None, **changes) -> dict:
    if captions is None:
        captions = [
            {"text": f"{start}{text}", "granularity": level, "include_datacomp_raw_cap": is_raw}
            for is_raw, start in [(True, "Shop sign. "), (False, "")]
            for level, text in enumerate(OCR_TEXTS)
        ]
    return {
        "uid": "00",
        "url": ADDRESS,
        "captions": captions if isinstance(captions, str) else json.dumps(captions),
        "metadata": json.dumps({"length": 1, "entries": []}),
        "face_bboxes": "[]",
    } | changes


@pytest.mark.parametrize(
    ("granularity", "caption"),
    [
        (0, 'The image contains "OPEN", "read the text "now"" and "24 h"'),
        (1, 'The image contains "OPEN" located above the center'),
        (2, 'The image contains "OPEN" located at 2/17 of the image from top to bottom'),
        (3, 'The image contains "OPEN" approximately starts at [0.2, 0.0] and extends upto [0.8, 0.2]'),
        (4, 'The image contains "OPEN" starts at [0.192, 0.037] and extends upto [0.817, 0.203]'),
        (5, "The image contains the <ocr>OPEN</ocr><bbox>[0.192, 0.037][0.817, 0.203]</bbox>"),
    ],
)
def test_ocr_caption_of_each_granularity_without_filler(granularity, caption, made_record, pictures, outline):
    assert outline(ocr_captions(granularity)(made_record(ocr_row()), pictures)) == pair(caption)


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        (ocr_row([{"text": "x", "granularity": 1, "include_datacomp_raw_cap": False}]), "bad_record", "0, got 1"),
        (ocr_row([{"text": "x", "granularity": 0, "include_datacomp_raw_cap": True}]), "bad_record", "0, got none"),
        (ocr_row([]), "bad_record", "got none"),
        (ocr_row([{"granularity": 0}]), "bad_record", "text"),
        (ocr_row([{"text": None, "granularity": 0}]), "bad_record", "text"),
        (ocr_row({"text": "x", "granularity": 0}), "bad_record", "array"),
        (ocr_row("[{"), "bad_record", "captions"),
        (ocr_row("[" * 100_000), "bad_record", "captions"),
        (ocr_row([{"text": "  ", "granularity": 0}]), "empty_text", "some text"),
        (ocr_row(captions=None) | {"captions": None}, "bad_record", "captions"),
        (ocr_row(url=None), "missing_member", "a picture"),
        ({"uid": "00", "url": ADDRESS}, "bad_record", "captions"),
    ],
)
def test_ocr_bad_record(row, reason, words, made_record, skip_of):
    skip = skip_of(ocr_captions(), made_record(row))
    assert skip.reason == reason
    assert words in skip.detail


GROUNDING_TEXTS = [
    'A dog (in the center) and it\'s "old"',
    "A dog (starts at (0.1, 0.2) and extends up to (0.5, 0.6))",
    "A <object>dog</object><bbox>[0.1, 0.2][0.5, 0.6]</bbox>",
]


def grounding_row(captions: object = None, **changes) -> dict:
    if captions is None:
        captions = [[text, level, False] for level, text in enumerate(GROUNDING_TEXTS)]
        captions += [[f"{text} raw", level, True] for level, text in enumerate(GROUNDING_TEXTS)]
    text = captions if isinstance(captions, str) else repr(captions)
    return {"uid": "00", "url": ADDRESS, "captions": text, "metadata": "{}"} | changes


@pytest.mark.parametrize("granularity", [0, 1, 2])
def test_grounding_caption_of_each_granularity(granularity, made_record, pictures, outline):
    read = grounding_captions(granularity)
    assert outline(read(made_record(grounding_row()), pictures)) == pair(GROUNDING_TEXTS[granularity])


def test_grounding_caption_with_a_stray_backslash(made_record, pictures, outline):
    row = grounding_row(r"[('A dog \d', 0, False)]")
    assert outline(grounding_captions(0)(made_record(row), pictures)) == pair(r"A dog \d")


@pytest.mark.parametrize(
    "captions",
    [
        "(" * 60_000,
        "-" * 60_000 + "1",
        "1+" * 30_000 + "1",
        "9" * 60_000,
        "{[]: 1}",
        "[1][0]",
        "__import__('os').getcwd()",
        "[('A dog', 0, False)",
        "\0",
        "[('\ud800', 0, False)]",
        "'A dog'",
        "7",
        "[('A dog', 0)]",
        "[('A dog', '0', False)]",
        "[(None, 0, False)]",
        "[{'text': 'A dog'}]",
        "[('A dog', 1, False)]",
        "[('A dog', 0, True)]",
        "[]",
        "",
    ],
)
def test_grounding_literal_that_is_none_or_a_bomb(captions, made_record, skip_of):
    assert skip_of(grounding_captions(0), made_record(grounding_row(captions))).reason is SkipReason.BAD_RECORD


def test_grounding_literal_too_long_is_not_parsed(made_record, skip_of, monkeypatch):
    monkeypatch.setattr("ast.literal_eval", lambda text: pytest.fail("parsed"))
    skip = skip_of(grounding_captions(0), made_record(grounding_row("[" + " " * 65_535 + "]")))
    assert skip.reason is SkipReason.TOO_MANY_BYTES


@pytest.mark.parametrize(("factory", "granularity"), [(ocr_captions, 6), (ocr_captions, -1), (grounding_captions, 3)])
def test_granularity_that_does_not_exist(factory, granularity):
    with pytest.raises(ValueError, match=f"expected 0 to ., got {granularity}"):
        factory(granularity)


@pytest.mark.parametrize("granularity", range(6))
def test_receipts_are_all_read(granularity, shared_data, made_record):
    folder = shared_data / "sroie"
    rows = [json.loads(line) for line in (folder / "ocr_captions.jsonl").read_text().splitlines()]
    pairs = [halves(ocr_captions(granularity)(made_record(row), Images(str(folder)))) for row in rows]
    texts = [text for _, text in pairs]
    lines = [json.loads(row["metadata"])["entries"] for row in rows]
    assert (len(texts), sum(map(len, lines))) == (60, 3291)
    # Every line of every receipt is in its caption, and what stood before each is gone.
    opening, closing = ("<ocr>", "</ocr>") if granularity == 5 else ('"', '"')
    for text, entries in zip(texts, lines, strict=True):
        assert all(f"{opening}{entry['text']}{closing}" in text for entry in entries)
        assert 'the text "' not in text
    assert pairs[0][0].decode().mode == "RGB"


@pytest.mark.parametrize("granularity", range(3))
def test_photographs_with_objects_are_all_read(granularity, shared_data, made_record):
    folder = shared_data / "coco128"
    rows = [json.loads(line) for line in (folder / "grounding_captions.jsonl").read_text().splitlines()]
    pairs = [halves(grounding_captions(granularity)(made_record(row), Images(str(folder)))) for row in rows]
    texts = [text for _, text in pairs]
    assert len(texts) == 128
    marks = ["(", "(starts at (", "<object>"]
    num_boxes = [json.loads(row["metadata"])["length"] for row in rows]
    assert [text.count(marks[granularity]) for text in texts] == num_boxes
    assert all(text.startswith("This image contains a") for text in texts)
    assert pairs[0][0].decode().size == (640, 426)
