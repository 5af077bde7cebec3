"""Samples → what the model takes: the one place where text, image slots and tiles are put together.

Images are bound to their slots by position: the chat template says where each image stands, the tiler how many tiles it
becomes, and every tile gets its run of slots there. A user's text cannot claim one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from jaxtyping import Bool, UInt8

from anyres_tiler import tile_image
from interleave_data import (
    ImageLimits,
    ImagePart,
    PreferenceSample,
    Sample,
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

    def encode(self, sample: Sample) -> EncodedSample:
        """Encode a training sample: a document, a caption or a whole conversation.

        Raises:
            SkipSample: an image that the gate refuses, an answer without tokens, or nothing to learn.
        """
        return self._encode(sample.id, sample.source, sample.turns, is_prompt=False)

    def encode_prompt(self, sample: Sample) -> EncodedSample:
        """Encode a conversation up to where the assistant's answer begins.

        Raises:
            SkipSample: an image that the gate refuses.
        """
        return self._encode(sample.id, sample.source, sample.turns, is_prompt=True)

    def encode_preference(self, sample: PreferenceSample) -> tuple[EncodedSample, EncodedSample]:
        """Encode (chosen, rejected): the same prompt and tiles, two answers.

        Raises:
            SkipSample: as `encode`.
        """
        views = self._views(sample.source, sample.turns)
        chosen, rejected = (
            self._assemble(
                sample.id,
                sample.source,
                (*sample.turns, Turn(role="assistant", parts=(TextPart(answer),))),
                views,
                is_prompt=False,
            )
            for answer in (sample.chosen, sample.rejected)
        )
        return chosen, rejected

    def _encode(self, sample_id: str, source: str, turns: Sequence[Turn], *, is_prompt: bool) -> EncodedSample:
        return self._assemble(sample_id, source, turns, self._views(source, turns), is_prompt=is_prompt)

    def _views(self, source: str, turns: Sequence[Turn]) -> list[_Views]:
        images = [part for turn in turns for part in turn.parts if isinstance(part, ImagePart)]
        return [self._view(source, image) for image in images]

    def _view(self, source: str, image: ImagePart) -> _Views:
        name = (source, image.key)
        if image.key and name in self._kept:
            return self._kept[name]
        tiles = tile_image(image.decode(self.limits), self.cfg.tiling)
        valid = tiles.valid_patches(self.cfg.vision.grid_side)
        keys = tuple(_tile_key(tile, mask) for tile, mask in zip(tiles.pixels, valid, strict=True))
        views = _Views(tiles.pixels, valid, keys, tiles.grid)
        if image.key and views.pixels.nbytes <= self._cache_bytes_left:
            self._cache_bytes_left -= views.pixels.nbytes
            self._kept[name] = views
        return views

    def _assemble(
        self, sample_id: str, source: str, turns: Sequence[Turn], views: Sequence[_Views], *, is_prompt: bool
    ) -> EncodedSample:
        chat = [ChatTurn(turn.role, self.chat_parts(turn)) for turn in turns]
        _refuse_empty_answers(chat)
        encoded = self.template.encode(chat, is_prompt=is_prompt)
        counts = [self.cfg.num_image_tokens(len(item.pixels)) for item in views]
        ids, is_target, slots = _expand_slots(encoded, counts)
        targets = torch.full((len(ids),), IGNORE_INDEX)
        flat = torch.tensor(ids)
        learnt = torch.tensor(is_target)
        # The target of a position is the token behind it.
        targets[:-1] = torch.where(learnt[1:], flat[1:], IGNORE_INDEX)
        if not is_prompt and not bool(learnt[1:].any()):
            raise SkipSample(SkipReason.NO_TARGETS, "expected at least one token to learn, got none")
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


def _joined(tensors: Sequence[torch.Tensor], nothing: torch.Tensor) -> torch.Tensor:
    """End to end; a single one is not copied."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(list(tensors)) if tensors else nothing


def _refuse_empty_answers(chat: Sequence[ChatTurn]) -> None:
    for turn in chat:
        is_empty = not any(isinstance(part, str) and part.strip() for part in turn.parts)
        if turn.role == "assistant" and is_empty:
            raise SkipSample(SkipReason.EMPTY_ANSWER, "expected an answer with text, got none")
        if turn.role == "document" and is_empty:
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


def _tile_key(tile: torch.Tensor, valid: torch.Tensor) -> str:
    """Digest of shape, pixels and mask: equal keys mean equal features."""
    digest = sha256(repr((tuple(tile.shape), tuple(valid.shape))).encode())
    digest.update(tile.contiguous().numpy().tobytes())
    digest.update(valid.numpy().tobytes())
    return digest.hexdigest()
