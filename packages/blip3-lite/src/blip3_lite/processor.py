"""Samples → what the model takes: the one place where text, image slots and tiles are put together.

Images are bound to their slots by position: the chat template says where each image stands, the tiler how many tiles it
becomes, and every tile gets its run of slots there. A user's text cannot claim one.

What a sample takes up can be told without its pixels: `measure` tokenises the text and reads the pictures' headers. Cut
to a limit, a sample keeps what lies before it; if the limit falls into an image, or the tiles are used up before it,
that image goes with everything behind it.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import msgspec
import torch
from jaxtyping import Bool, UInt8

from anyres_tiler import num_tiles, tile_image
from interleave_data import (
    ImageLimits,
    ImagePart,
    PreferenceSample,
    Sample,
    Size,
    SkipReason,
    SkipSample,
    TextPart,
    Turn,
)
from phi3_lite import IMAGE, ChatTemplate, ChatTurn, EncodedChat, HFTokenizer, ImageSlot

from .batch import IGNORE_INDEX, EncodedSample
from .config import Blip3Config
from .grouping import band_order

IMAGE_TOKEN = "<image>"


def user_turn(images: Sequence[ImagePart], text: str) -> Turn:
    """Build a user's turn: the images, then the text. The data readers lay their records out in the same way."""
    return Turn(role="user", parts=(*images, TextPart(text)))


def load_tokenizer(path: Path) -> HFTokenizer:
    """Read a tokenizer.json."""
    return HFTokenizer.from_file(path)


_TEXTS_KEPT = 256


@dataclass(frozen=True)
class _Text:
    """A conversation in ids, each image one slot as yet."""

    encoded: EncodedChat
    images: tuple[ImagePart, ...]


@dataclass(frozen=True)
class _Views:
    """What one image becomes."""

    pixels: UInt8[torch.Tensor, "p 3 s s"]
    valid: Bool[torch.Tensor, "p n"]
    keys: tuple[str, ...]
    grid: tuple[int, int]


class Processor:
    """Encodes samples for one model config and tokenizer.

    `image_cache_bytes`: tiles of images that have a key (`ImagePart.key`) are kept up to this much, so that an image
    that occurs again is not decoded and cut again. Samples then share the kept tensors.

    Raises:
        ValueError: if the tokenizer has more tokens than the model has rows.
    """

    tokenizer_file = "tokenizer.json"

    def __init__(
        self,
        cfg: Blip3Config,
        tokenizer: HFTokenizer,
        limits: ImageLimits | None = None,
        image_cache_bytes: int = 0,
    ) -> None:
        if tokenizer.vocab_size > cfg.lm.vocab_size:
            raise ValueError(
                f"tokenizer: expected at most {cfg.lm.vocab_size} tokens (rows of the language model), got "
                f"{tokenizer.vocab_size}; use the tokenizer that belongs to this model"
            )
        self.cfg = cfg
        self.tokenizer = tokenizer
        self.limits = limits or ImageLimits()
        # An image's slot is known by its place, so any id can stand in it where the tokenizer has none for it.
        image_id = tokenizer.control_ids.get(IMAGE_TOKEN, tokenizer.control_ids.get("<|endoftext|>"))
        self.template = ChatTemplate(
            tokenizer,
            kind=cfg.chat,
            system=cfg.system_prompt,
            has_leading_space=cfg.has_leading_space,
            image_id=image_id,
        )
        size = cfg.tiling.tile_px
        self._no_tiles = torch.empty(0, 3, size, size, dtype=torch.uint8)
        self._no_patches = torch.empty(0, cfg.vision.num_patches, dtype=torch.bool)
        self._cache_bytes_left = image_cache_bytes
        self._kept: dict[tuple[str, str], _Views] = {}
        # Of samples that were measured and wait to be encoded: the same object is not tokenised twice.
        self._texts: dict[int, tuple[weakref.ref[Sample], _Text]] = {}

    def __reduce__(self) -> tuple[object, ...]:
        """A copy for another process starts without kept tiles, and keeps none: each would hold its own."""
        return Processor, (self.cfg, self.tokenizer, self.limits)

    @property
    def size_fingerprint(self) -> str:
        """Digest of all that `measure` depends on but the samples: sizes kept under another one are of no use."""
        digest = sha256(msgspec.json.encode([self.cfg.tiling, self.limits, self.cfg.has_leading_space]))
        chat = [self.cfg.chat, self.cfg.system_prompt, self.cfg.image_separator, self.cfg.connector.num_latents]
        digest.update(msgspec.json.encode(chat) + self.tokenizer.to_json().encode())
        return digest.hexdigest()[:16]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.template.stop_ids

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text, control tokens left out."""
        return self.tokenizer.decode(ids).strip()

    def save_tokenizer(self, path: Path) -> None:
        """Write the tokenizer's file."""
        self.tokenizer.save(path)

    def measure(self, sample: Sample | PreferenceSample, limit: Size | None = None) -> Size:
        """Exactly what `encode` or `encode_preference` (both sequences together) takes up; no pixel is decoded.

        Raises:
            SkipSample: as they do, for all that text and the pictures' headers tell; a preference pair beyond the
                limit, as there is nothing to be cut that both answers could spare.
        """
        if isinstance(sample, PreferenceSample):
            sizes = [self._size(self._text(turns), sample.source) for turns in _with_answers(sample)]
            size = Size(sum(one.tokens for one in sizes), sum(one.tiles for one in sizes))
            if limit is not None and (size.tokens > limit.tokens or size.tiles > limit.tiles):
                detail = f"expected at most {limit.tokens} tokens and {limit.tiles} tiles, got {size}"
                raise SkipSample(SkipReason.TOO_LONG, f"{detail}; a preference pair is not cut")
            return size
        text = self._text(sample.turns)
        size = self._size(text, sample.source, limit)
        while len(self._texts) >= _TEXTS_KEPT:
            del self._texts[next(iter(self._texts))]
        self._texts[id(sample)] = (weakref.ref(sample), text)
        return size

    def encode(self, sample: Sample, limit: Size | None = None) -> EncodedSample:
        """Encode a training sample: a document, a caption or a whole conversation; cut to a limit if there is one.

        Raises:
            SkipSample: an image that the gate refuses, an answer without tokens, or nothing to learn (too_long where
                the limit is why).
        """
        kept, text = self._texts.pop(id(sample), (None, None))
        # Another sample may stand where one that is gone stood.
        if text is None or kept is None or kept() is not sample:
            text = self._text(sample.turns)
        images = text.images
        if limit is None:
            return self._assemble(sample.id, sample.source, text, self._views(sample.source, images))
        counts = self._tile_counts(sample.source, images)
        num_tokens, num_images = self._cut(text.encoded, counts, limit)
        views = self._views(sample.source, images[:num_images])
        return self._assemble(sample.id, sample.source, text, views, num_tokens)

    def encode_prompt(self, sample: Sample) -> EncodedSample:
        """Encode a conversation up to where the assistant's answer begins.

        Raises:
            SkipSample: an image that the gate refuses.
        """
        text = self._text(sample.turns, is_prompt=True)
        return self._assemble(sample.id, sample.source, text, self._views(sample.source, text.images))

    def encode_preference(self, sample: PreferenceSample) -> tuple[EncodedSample, EncodedSample]:
        """Encode (chosen, rejected): the same prompt and tiles, two answers.

        Raises:
            SkipSample: as `encode`.
        """
        texts = [self._text(turns) for turns in _with_answers(sample)]
        views = self._views(sample.source, texts[0].images)
        chosen, rejected = (self._assemble(sample.id, sample.source, text, views) for text in texts)
        return chosen, rejected

    def _text(self, turns: Sequence[Turn], *, is_prompt: bool = False) -> _Text:
        """Tokenise.

        Raises:
            SkipSample: an empty answer or document, or nothing to learn.
        """
        chat = [ChatTurn(turn.role, self.chat_parts(turn)) for turn in turns]
        _refuse_empty_answers(chat, is_prompt)
        encoded = self.template.encode(chat, is_prompt=is_prompt)
        if not is_prompt and not any(encoded.is_target[1:]):
            raise SkipSample(SkipReason.NO_TARGETS, "expected at least one token to learn, got none")
        return _Text(encoded, tuple(part for turn in turns for part in turn.parts if isinstance(part, ImagePart)))

    def _size(self, text: _Text, source: str, limit: Size | None = None) -> Size:
        counts = self._tile_counts(source, text.images)
        if limit is None:
            widened = sum(self.cfg.num_image_tokens(count) - 1 for count in counts)
            return Size(len(text.encoded.ids) + widened, sum(counts))
        num_tokens, num_images = self._cut(text.encoded, counts, limit)
        return Size(num_tokens, sum(counts[:num_images]))

    def _tile_counts(self, source: str, images: Sequence[ImagePart]) -> list[int]:
        """Tiles of each image, from what was kept or from its header."""
        kept = [self._kept.get((source, image.key)) if image.key else None for image in images]
        return [
            num_tiles(image.size(self.limits), self.cfg.tiling) if views is None else len(views.pixels)
            for image, views in zip(images, kept, strict=True)
        ]

    def _cut(self, encoded: EncodedChat, counts: Sequence[int], limit: Size) -> tuple[int, int]:
        """Tokens and images that are kept of a sample whose images have so many tiles.

        Raises:
            SkipSample: nothing to learn is left (too_long).
        """
        total = len(encoded.ids) + sum(self.cfg.num_image_tokens(count) - 1 for count in counts)
        num_tokens, num_images = min(total, limit.tokens), len(counts)
        widened = tiles = 0
        for place, (position, count) in enumerate(zip(encoded.image_positions, counts, strict=True)):
            start = position + widened
            end = start + self.cfg.num_image_tokens(count)
            tiles += count
            if end > limit.tokens or tiles > limit.tiles:
                num_tokens, num_images = min(start, limit.tokens), place
                break
            widened += end - start - 1
        # Images have no targets, so what is before the cut is found where they are one slot still.
        num_kept_ids = num_tokens - sum(self.cfg.num_image_tokens(count) - 1 for count in counts[:num_images])
        if num_tokens < total and not any(encoded.is_target[1:num_kept_ids]):
            detail = f"expected something to learn in the first {num_tokens} tokens, where it is cut, got none"
            raise SkipSample(SkipReason.TOO_LONG, detail)
        return num_tokens, num_images

    def _views(self, source: str, images: Sequence[ImagePart]) -> list[_Views]:
        return [self._view(source, image) for image in images]

    def _view(self, source: str, image: ImagePart) -> _Views:
        name = (source, image.key)
        if image.key and name in self._kept:
            return self._kept[name]
        data = image.read(self.limits.max_bytes)
        tiles = tile_image(replace(image, open=data).decode(self.limits), self.cfg.tiling)
        valid = tiles.valid_patches(self.cfg.vision.grid_side)
        # All that pixels and masks follow from. The pixels themselves are forty times as many bytes.
        digest = sha256(msgspec.json.encode([self.cfg.tiling, self.cfg.vision.grid_side, image.frame]))
        digest.update(data)
        keys = tuple(f"{digest.hexdigest()}/{number}" for number in range(tiles.num_tiles))
        views = _Views(tiles.pixels, valid, keys, tiles.grid)
        if image.key and views.pixels.nbytes <= self._cache_bytes_left:
            self._cache_bytes_left -= views.pixels.nbytes
            self._kept[name] = views
        return views

    def _assemble(
        self, sample_id: str, source: str, text: _Text, views: Sequence[_Views], num_tokens: int | None = None
    ) -> EncodedSample:
        """Put ids, targets and tiles together; of a sample that is cut, its first images and tokens."""
        encoded = text.encoded
        if num_tokens is not None:
            encoded = encoded._replace(image_positions=encoded.image_positions[: len(views)])
        counts = [self.cfg.num_image_tokens(len(item.pixels)) for item in views]
        ids, is_target, slots = _expand_slots(encoded, counts)
        ids, is_target = ids[:num_tokens], is_target[:num_tokens]
        targets = torch.full((len(ids),), IGNORE_INDEX)
        flat = torch.tensor(ids)
        learnt = torch.tensor(is_target)
        # The target of a position is the token behind it.
        targets[:-1] = torch.where(learnt[1:], flat[1:], IGNORE_INDEX)
        return EncodedSample(
            id=sample_id,
            source=source,
            ids=flat,
            targets=targets,
            image_index=torch.tensor(slots, dtype=torch.int64),
            tiles=_joined([item.pixels for item in views], self._no_tiles),
            valid=_joined([item.valid for item in views], self._no_patches),
            tiles_per_image=tuple(len(item.pixels) for item in views),
            feature_order=self._feature_order(views),
            tile_keys=tuple(key for item in views for key in item.keys),
        )

    def chat_parts(self, turn: Turn) -> list[str | ImageSlot]:
        """Return a turn as the chat template takes it, images as slots with the model's separator behind them."""
        parts: list[str | ImageSlot] = []
        for part in turn.parts:
            if isinstance(part, TextPart):
                parts.append(part.text)
            else:
                parts.append(IMAGE)
                if turn.role == "user" and self.cfg.image_separator:
                    parts.append(self.cfg.image_separator)
        return parts

    def _feature_order(self, views: Sequence[_Views]) -> torch.Tensor | None:
        if self.cfg.tile_grouping == "tiles" or not views:
            return None
        side = self.cfg.vision.grid_side
        orders: list[torch.Tensor] = []
        start = 0
        for item in views:
            orders.append(band_order(item.grid, side) + start)
            start += item.valid.numel()
        return torch.cat(orders)


def _with_answers(sample: PreferenceSample) -> list[tuple[Turn, ...]]:
    """The prompt with the preferred answer, and with the other."""
    return [
        (*sample.turns, Turn(role="assistant", parts=(TextPart(answer),)))
        for answer in (sample.chosen, sample.rejected)
    ]


def _joined(tensors: Sequence[torch.Tensor], nothing: torch.Tensor) -> torch.Tensor:
    """End to end; a single one is not copied."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(list(tensors)) if tensors else nothing


def _refuse_empty_answers(chat: Sequence[ChatTurn], is_prompt: bool) -> None:
    for turn in chat:
        is_empty = not any(isinstance(part, str) and part.strip() for part in turn.parts)
        if turn.role == "assistant" and is_empty:
            raise SkipSample(SkipReason.EMPTY_ANSWER, "expected an answer with text, got none")
        # A picture alone can be gone on from.
        if turn.role == "document" and is_empty and not is_prompt:
            raise SkipSample(SkipReason.EMPTY_TEXT, "expected a document with text, got none")


def _expand_slots(encoded: EncodedChat, counts: Sequence[int]) -> tuple[list[int], list[bool], list[int]]:
    """Widen each image's one slot to its number of tokens; return ids, targets and the widened slots' positions."""
    if len(encoded.image_positions) != len(counts):
        raise ValueError(
            f"image slots: expected {len(counts)}, one per image, got {len(encoded.image_positions)}; "
            "this is a fault of the template"
        )
    ids: list[int] = []
    is_target: list[bool] = []
    slots: list[int] = []
    start = 0
    for position, count in zip(encoded.image_positions, counts, strict=True):
        ids += encoded.ids[start:position]
        is_target += encoded.is_target[start:position]
        slots += range(len(ids), len(ids) + count)
        ids += [encoded.ids[position]] * count
        is_target += [False] * count
        start = position + 1
    return ids + encoded.ids[start:], is_target + encoded.is_target[start:], slots
