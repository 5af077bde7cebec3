"""What worker processes of the tests import: they start afresh and know nothing of the test's own module."""

import os
import signal
import time
from dataclasses import dataclass

import numpy as np

from interleave_data import Encoder, ImagePart, InMemory, Sample, Size, SkipReason, SkipSample, TextPart, Turn
from interleave_data.samples import SliceBytes
from interleave_data.sources import AnySample


@dataclass(frozen=True)
class Encoded:
    text: str
    length: int


class Letters(Encoder[Encoded, dict]):
    """One token a letter, packs as an array of letters; of seven samples one cannot be measured and one not encoded."""

    def measure(self, sample, limit=None, /) -> Size:
        number = int(sample.id)
        if number % 7 == 3:
            raise SkipSample(SkipReason.BAD_RECORD, "made up")
        return Size(len(text_of(sample)), len(sample.images()))

    def encode(self, sample, limit=None, /) -> Encoded:
        if int(sample.id) % 7 == 5:
            raise SkipSample(SkipReason.BROKEN_IMAGE, "made up \udc80")
        for image in sample.images():
            image.read()
        text = text_of(sample)
        return Encoded(text, len(text))

    def collate(self, items, ids, /) -> dict:
        letters = np.frombuffer("".join(item.text for item in items).encode(), dtype=np.uint8)
        lengths = np.array([item.length for item in items], dtype=np.int64)
        return {"letters": letters, "ends": lengths.cumsum(), "nested": [{"none": None, "empty": letters[:0]}]}


class Dying(Letters):
    """Kills its process at the sample of this number."""

    def encode(self, sample, limit=None, /) -> Encoded:
        if int(sample.id) == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(sample, limit)


class Faulty(Letters):
    """Has a fault."""

    def encode(self, sample, limit=None, /) -> Encoded:
        if int(sample.id) == 11:
            raise KeyError("oops")
        return super().encode(sample, limit)


class Unsendable(Letters):
    """Makes batches that cannot be sent."""

    def collate(self, items, ids, /) -> dict:
        return {"items": object()}


class Counting(Letters):
    """Writes a file for each pack it has made."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def collate(self, items, ids, /) -> dict:
        with open(os.path.join(self.folder, f"{os.getpid()}-{time.monotonic_ns()}"), "w"):
            return super().collate(items, ids)


class Whole(Encoder[Encoded, dict]):
    """One token a sample; packs as all texts and all bytes of pictures."""

    def measure(self, sample, limit=None, /) -> Size:
        return Size(1, len(sample.images()))

    def encode(self, sample, limit=None, /) -> Encoded:
        read = [part.read().hex() if isinstance(part, ImagePart) else part.text for part in sample.turns[0].parts]
        return Encoded(" ".join(read), 1)

    def collate(self, items, ids, /) -> dict:
        return {"texts": [item.text for item in items]}


def text_of(sample: AnySample) -> str:
    (part,) = (part for part in sample.turns[0].parts if isinstance(part, TextPart))
    return part.text


def source(name: str, size: int, fifo: str | None = None) -> InMemory:
    """Samples of different lengths; number 11 has a picture that lies in a shard, of which nothing ever comes."""
    samples = []
    for number in range(size):
        text = TextPart(f"{name} {number} " + "x" * (number * 37 % 23))
        has_picture = fifo is not None and number == 11
        parts = (ImagePart(SliceBytes(fifo, 0, 10)), text) if has_picture and fifo else (text,)
        samples.append(Sample(str(number), name, (Turn("document", parts),)))
    return InMemory(name, samples)
