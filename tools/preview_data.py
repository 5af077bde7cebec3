"""What a preview looks at: the first draws of a mixture, and a stretch of each source for skips and repeats."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path

import msgspec
from tqdm import tqdm

from anyres_tiler import TilingConfig, tile_image
from anyres_tiler.tiles import Tiles
from blip3_lite import EncodedSample, Processor, load_tokenizer
from blip3_lite.checkpoint import read_config
from blip3_lite.presets import xgen_mm_config
from interleave_data import (
    DataFile,
    ImageLimits,
    ImagePart,
    Mixture,
    PreferenceSample,
    Sample,
    Size,
    SkipSample,
    Source,
    TextPart,
)
from phi3_lite import HFTokenizer

AnySample = Sample | PreferenceSample
SHORT_WORDS = 3
"""A text of so few words says little by coming again."""


@dataclass(frozen=True)
class Place:
    """Where a sample was found."""

    source: int
    index: int
    id: str


@dataclass
class Scanned:
    """What a stretch of one source is like."""

    num_seen: int = 0
    skips: list[SkipSample] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)

    @property
    def num_good(self) -> int:
        """Samples that are not skipped."""
        return self.num_seen - len(self.skips)


@dataclass
class Repeat:
    """A text or picture, and the samples that have it."""

    places: list[Place] = field(default_factory=list)
    others: set[str] = field(default_factory=set)
    """Of a text: digests of the pictures that it stands on."""


@dataclass
class Scan:
    """What was found in the first draws of each source."""

    sources: list[Scanned]
    texts: dict[str, Repeat] = field(default_factory=dict)
    images: dict[str, Repeat] = field(default_factory=dict)

    def repeats(self, of: Mapping[str, Repeat]) -> list[tuple[str, Repeat]]:
        """Those that several samples have, the most frequent first."""
        found = [(name, repeat) for name, repeat in of.items() if len(repeat.places) > 1]
        return sorted(found, key=lambda pair: -len(pair[1].places))

    def shares(self, repeat: Repeat, names: Sequence[str]) -> str:
        """In words: how much of each source's good samples has it."""
        counts = Counter(place.source for place in repeat.places)
        return "; ".join(
            f"{names[number]} {count / self.sources[number].num_good:.1%} ({count} of {self.sources[number].num_good})"
            for number, count in counts.most_common()
        )


@dataclass(frozen=True)
class Shown:
    """One sample of the page."""

    number: int
    place: Place
    sample: AnySample
    encoded: tuple[EncodedSample, ...] = ()
    """One sequence; two of a preference pair; none without a tokenizer."""
    images: tuple[tuple[ImagePart, Tiles], ...] = ()


@dataclass(frozen=True)
class Reader:
    """How samples are looked at: with or without a tokenizer."""

    tiling: TilingConfig
    limits: ImageLimits
    processor: Processor | None

    def measure(self, sample: AnySample) -> Size | None:
        """Check all that can be told without decoding a picture; exact size, if there is a tokenizer.

        Raises:
            SkipSample: a bad sample.
        """
        if self.processor is not None:
            return self.processor.measure(sample)
        for image in sample.images():
            image.size(self.limits)
        return None

    def show(self, number: int, place: Place, sample: AnySample) -> Shown:
        """Decode, tile and encode.

        Raises:
            SkipSample: a bad sample.
        """
        tiles = [(image, tile_image(image.decode(self.limits), self.tiling)) for image in sample.images()]
        encoded: tuple[EncodedSample, ...] = ()
        if self.processor is not None and isinstance(sample, PreferenceSample):
            encoded = self.processor.encode_preference(sample)
        elif self.processor is not None:
            assert isinstance(sample, Sample)
            encoded = (self.processor.encode(sample),)
        return Shown(number, place, sample, encoded, tuple(tiles))


def make_reader(data_file: DataFile, checkpoint: Path | None, tokenizer: Path | None) -> Reader:
    """Read what says how samples are encoded.

    Raises:
        ValueError: the checkpoint or the tokenizer cannot be used.
    """
    limits = data_file.image_limits
    if checkpoint is not None:
        saved = read_config(checkpoint)
        cfg, found = saved.model, load_tokenizer(checkpoint / saved.tokenizer_file)
    elif tokenizer is not None:
        cfg, found = xgen_mm_config("interleave"), _tokenizer_of_file(tokenizer)
        rows = max(found.vocab_size, cfg.lm.vocab_size)
        cfg = msgspec.structs.replace(cfg, lm=msgspec.structs.replace(cfg.lm, vocab_size=rows))
    else:
        return Reader(TilingConfig(), limits, None)
    return Reader(cfg.tiling, limits, Processor(cfg, found, limits))


def _tokenizer_of_file(path: Path) -> HFTokenizer:
    try:
        return load_tokenizer(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def first_draws(sources: Sequence[Source], data_file: DataFile, seed: int, reader: Reader) -> Iterator[Place]:
    """Draw as training does; of a mixture in tokens each draw is read, and without a tokenizer a character counts."""
    ratios, epochs = zip(*((source.ratio, source.epochs) for source in data_file.sources), strict=True)
    mixture = Mixture(sources, ratios, seed=seed, unit=data_file.ratio_unit, epochs=epochs)
    for draw in mixture:
        index = mixture.index(draw)
        if data_file.ratio_unit == "tokens":
            try:
                sample = sources[draw.source][index]
                size = reader.measure(sample)
                mixture.count_tokens(draw, len("".join(texts_of(sample))) if size is None else size.tokens)
            except SkipSample:
                pass
        yield Place(draw.source, index, "")


def scan(sources: Sequence[Source], data_file: DataFile, seed: int, reader: Reader, most: int) -> Scan:
    """Read about `most` samples, each source's share of them, in the order in which training meets them."""
    found = Scan([Scanned() for _ in sources])
    total = sum(source.ratio for source in data_file.sources)
    ratios = [source.ratio / total for source in data_file.sources]
    counts = [min(len(source), math.ceil(most * ratio)) for source, ratio in zip(sources, ratios, strict=True)]
    with tqdm(total=sum(counts), desc="scan", unit="sample", disable=None) as bar:
        for number, (source, count) in enumerate(zip(sources, counts, strict=True)):
            mixture = Mixture([source], seed=seed)
            for draw in islice(mixture, count):
                _scan_one(found, Place(number, mixture.index(draw), ""), source, reader)
                bar.update()
    return found


def _scan_one(found: Scan, place: Place, source: Source, reader: Reader) -> None:
    about = found.sources[place.source]
    about.num_seen += 1
    sample = None
    try:
        sample = source[place.index]
        size = reader.measure(sample)
        digests = {
            f"{sha256(image.read(reader.limits.max_bytes)).hexdigest()}/{image.frame}" for image in sample.images()
        }
    except SkipSample as skip:
        about.skips.append(_located(skip, source, place, sample))
        return
    if size is not None:
        about.sizes.append(size)
    place = replace(place, id=sample.id)
    for digest in digests:
        found.images.setdefault(digest, Repeat()).places.append(place)
    for text in {" ".join(text.casefold().split()) for text in _answers(sample)} - {""}:
        repeat = found.texts.setdefault(text, Repeat())
        repeat.places.append(place)
        repeat.others |= digests


def _located(skip: SkipSample, source: Source, place: Place, sample: AnySample | None) -> SkipSample:
    """The skip with the source and the place in it."""
    where = skip.where or str(place.index) if sample is None else sample.id
    return SkipSample(skip.reason, skip.detail, f"{source.name}/{where}")


def texts_of(sample: AnySample) -> list[str]:
    """All text of a sample, both answers of a pair."""
    texts = [part.text for turn in sample.turns for part in turn.parts if isinstance(part, TextPart)]
    return [*texts, sample.chosen, sample.rejected] if isinstance(sample, PreferenceSample) else texts


def _answers(sample: AnySample) -> list[str]:
    """What a model would learn to say: answers, captions, whole documents."""
    said = [
        " ".join(part.text for part in turn.parts if isinstance(part, TextPart))
        for turn in sample.turns
        if turn.role in ("assistant", "document")
    ]
    return [*said, sample.chosen, sample.rejected] if isinstance(sample, PreferenceSample) else said


def is_short(text: str) -> bool:
    """Whether a text is so short that its repeats say little."""
    return len(text.split()) <= SHORT_WORDS


def read_samples(
    places: Sequence[Place], sources: Sequence[Source], reader: Reader
) -> list[Shown | tuple[int, SkipSample]]:
    """Each sample of the draws once, in their order; a number and the reason for one that is left out."""
    found: list[Shown | tuple[int, SkipSample]] = []
    for number, place in enumerate(dict.fromkeys(places), start=1):
        source = sources[place.source]
        sample = None
        try:
            sample = source[place.index]
            found.append(reader.show(number, replace(place, id=sample.id), sample))
        except SkipSample as skip:
            found.append((number, _located(skip, source, place, sample)))
    return found
