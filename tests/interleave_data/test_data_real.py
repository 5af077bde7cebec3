"""The readers on real files: whole sets are read, and pictures spot-checked."""

import json
from dataclasses import dataclass
from itertools import islice

import pytest

from interleave_data import (
    Encoder,
    ImagePart,
    PlanConfig,
    RecordSource,
    Size,
    SkipCounter,
    SkipLimits,
    SourceConfig,
    Stream,
    TextPart,
    open_source,
)


@pytest.fixture
def real(shared_data, tmp_path):
    """(pattern, format) → a source of the sample data; its indexes lie elsewhere, as the data are not ours."""

    def of(pattern: str, fmt: str, caption: str = "txt") -> RecordSource:
        folder = shared_data / pattern.split("/")[0]
        for path in shared_data.glob(pattern):
            link = tmp_path / path.name
            link.unlink(missing_ok=True)
            link.symlink_to(path.resolve())
        where = str(tmp_path / pattern.split("/")[1])
        cfg = SourceConfig(name=folder.name, format=fmt, path=where, image_root=str(folder), caption=caption)
        return open_source(cfg)

    return of


def num_images(source) -> int:
    return sum(len(source[index].images()) for index in range(len(source)))


def test_daquar(real):
    source = real("daquar/train.json", "llava-json")
    samples = [source[index] for index in range(len(source))]
    assert (len(samples), sum(len(sample.images()) for sample in samples)) == (500, 500)
    assert sum(turn.role == "assistant" for sample in samples for turn in sample.turns) == 3406
    assert all(isinstance(sample.turns[0].parts[0], ImagePart) for sample in samples)
    assert len({sample.id for sample in samples}) == 500
    assert samples[0].turns[0].parts[1] == TextPart("what is under the stove")
    held_out = real("daquar/eval.json", "llava-json")
    assert len(held_out) == 258
    assert held_out[0].turns[1].parts == (TextPart("5"),)
    assert held_out[0].images()[0].decode().mode == "RGB"


def test_mantis(real):
    source = real("mantis-chat/train.json", "llava-json")
    assert (len(source), num_images(source)) == (100, 377)
    assert sum(len(source[index].turns) for index in range(100)) == 1964
    assert {part.decode().mode for part in source[7].images()} == {"RGB"}


def test_openstax(real):
    source = real("openstax-physics/documents.jsonl", "obelics-jsonl")
    assert (len(source), num_images(source)) == (70, 365)
    document = source[0].turns[0]
    assert document.role == "document"
    text, image, *_ = document.parts
    assert isinstance(text, TextPart)
    assert text.text.startswith("Physics: Definitions and Applications\n\n")
    assert isinstance(image, ImagePart)
    assert max(image.decode().size) <= 800


@pytest.mark.parametrize("caption", ["txt", "json:alt"])
def test_captions(real, caption):
    source = real("captions/*.tar", "caption-tars", caption)
    assert (len(source), num_images(source)) == (450, 450)
    assert {source[index].images()[0].decode().mode for index in (0, 149, 150, 449)} == {"RGB"}
    assert len({source[index].id for index in range(450)}) == 450


def test_photos_pass_the_gate_upright_and_opaque(shared_data):
    for line in (shared_data / "photos" / "photos.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["width"] * record["height"] > 2_600_000:
            continue
        image = ImagePart((shared_data / "photos" / record["image"]).read_bytes()).decode()
        assert (image.mode, image.size) == ("RGB", (record["width"], record["height"])), record["image"]
        if record["mode"] == "RGBA":
            # The sky of this one is cut out: white, and not the black that lies under it.
            assert image.getpixel((0, 0)) == (255, 255, 255)


@dataclass(frozen=True)
class Length:
    length: int


class Counted(Encoder[Length, int]):
    """Only lengths, about those of a model."""

    def measure(self, sample, limit=None) -> Size:
        texts = [part.text for turn in sample.turns for part in turn.parts if isinstance(part, TextPart)]
        return Size(sum(len(text) // 4 + 1 for text in texts) + 8 * len(sample.images()), len(sample.images()))

    def encode(self, sample, limit=None) -> Length:
        return Length(self.measure(sample, limit).tokens)

    def collate(self, items, ids) -> int:
        return sum(item.length for item in items)


def test_real_sources_mixed_packed_and_continued(real):
    def stream():
        sources = [
            real("daquar/train.json", "llava-json"),
            real("openstax-physics/documents.jsonl", "obelics-jsonl"),
            real("captions/*.tar", "caption-tars"),
        ]
        skips = SkipCounter(SkipLimits(max_share=0.5))
        cfg = PlanConfig(max_tokens=4096, look_ahead=12, ratios=(2, 1, 3))
        return Stream(sources, Counted(), cfg, skips=skips)

    whole = stream()
    expected = [batch.digest for batch in islice(whole, 6)]
    before, after = stream(), stream()
    list(islice(before, 3))
    after.load_state_dict(before.state_dict())
    assert [batch.digest for batch in islice(after, 3)] == expected[3:]
    assert after.skips.by_reason() == whole.skips.by_reason()
    assert set(whole.skips.by_reason()) == {"too_long"}
