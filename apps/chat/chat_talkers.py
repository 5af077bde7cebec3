"""What a chat needs of a model, and the two kinds of models that have it: with pictures, and a language model alone."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from msgspec.structs import replace

from anyres_tiler import tile_image
from blip3_lite import ChatMemory, EncodedSample, LoadedModel, SamplingConfig, stream_answer
from interleave_data import ImagePart, Sample, TextPart, Turn, open_image
from phi3_lite import LoadedLM, Phi3, PromptMemory, stream_text

_MAX_NEW_TOKENS = 256


class ChatError(ValueError):
    """Something the user can mend, told in one line."""


class Prompt(Protocol):
    """A conversation as a model takes it."""

    @property
    def length(self) -> int:
        """Tokens, those of images included."""
        ...


PromptT = TypeVar("PromptT", bound=Prompt)


class Talker(Protocol[PromptT]):
    """A model that can be talked with."""

    @property
    def lm(self) -> Phi3:
        """The language model."""
        ...

    @property
    def kind(self) -> str:
        """What it can do, in words."""
        ...

    @property
    def sampling(self) -> SamplingConfig:
        """How it is meant to be sampled."""
        ...

    def look_at(self, picture: ImagePart) -> tuple[ImagePart, str]:
        """Return a picture that has passed the gate, read, and what becomes of it, in words.

        Raises:
            ChatError: the model sees no pictures.
            SkipSample: it cannot be read or used.
        """
        ...

    def encode(self, turns: Sequence[Turn]) -> PromptT:
        """Encode a conversation up to where the answer begins.

        Raises:
            SkipSample: a picture cannot be used.
        """
        ...

    def stream(
        self, prompt: PromptT, sampling: SamplingConfig, stop_texts: Sequence[str], generator: torch.Generator
    ) -> Iterator[str]:
        """Yield the answer as pieces of text."""
        ...


class PictureTalker:
    """A joined model."""

    kind = "text and pictures"

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.lm = loaded.model.lang_model
        self._memory = ChatMemory(loaded.model)
        self.sampling = loaded.config.sampling or SamplingConfig(max_new_tokens=_MAX_NEW_TOKENS)

    def look_at(self, picture: ImagePart) -> tuple[ImagePart, str]:
        """Return the picture, read, and into how many tokens it goes."""
        limits, cfg = self.loaded.processor.limits, self.loaded.config.model
        data = picture.read(limits.max_bytes)
        image = open_image(data, limits)
        tiles = tile_image(image, cfg.tiling)
        rows, columns = tiles.grid
        parts = f"{columns}×{rows} tiles + thumbnail" if tiles.thumbnail_first else "one view"
        words = (
            f"{image.width}×{image.height} px → {parts} of {tiles.tile_px} px "
            f"→ {cfg.num_image_tokens(tiles.num_tiles)} tokens"
        )
        return ImagePart(data), words

    def encode(self, turns: Sequence[Turn]) -> EncodedSample:
        """Encode a conversation up to where the answer begins."""
        return self.loaded.processor.encode_prompt(Sample(id="chat", source="chat", turns=tuple(turns)))

    def stream(
        self, prompt: EncodedSample, sampling: SamplingConfig, stop_texts: Sequence[str], generator: torch.Generator
    ) -> Iterator[str]:
        """Yield the answer as pieces of text."""
        model, processor = self.loaded.model, self.loaded.processor
        return stream_answer(
            model, processor, prompt, sampling, stop_texts=stop_texts, generator=generator, memory=self._memory
        )


class TextPrompt(NamedTuple):
    """A conversation without pictures."""

    ids: list[int]

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.ids)


class TextTalker:
    """A language model alone."""

    kind = "text alone"

    def __init__(self, loaded: LoadedLM) -> None:
        """Set up for a conversation.

        Raises:
            ChatError: nothing says how to lay one out.
        """
        if loaded.chat is None:
            held = "a tokenizer without one" if loaded.tokenizer is not None else "no tokenizer"
            raise ChatError(
                f"language model: expected a chat format that is known (Phi-3's, SmolLM2's), got {held}; "
                "put its tokenizer files beside the weights, or take an instruct model"
            )
        self.lm = loaded.model
        self._memory = PromptMemory(loaded.model)
        self._template = loaded.chat
        self._stop_ids = loaded.generation.stop_ids
        # Few publishers say how long an answer may be, and the reader fills in a length for none.
        is_silent = loaded.generation.sampling.max_new_tokens == SamplingConfig().max_new_tokens
        length = {"max_new_tokens": _MAX_NEW_TOKENS} if is_silent else {}
        self.sampling = replace(loaded.generation.sampling, **length)

    def look_at(self, picture: ImagePart) -> tuple[ImagePart, str]:
        """Refuse the picture."""
        raise ChatError("this model is a language model alone, without a vision tower; ask it without pictures")

    def encode(self, turns: Sequence[Turn]) -> TextPrompt:
        """Encode a conversation up to where the answer begins."""
        chat = [(turn.role, [part.text for part in turn.parts if isinstance(part, TextPart)]) for turn in turns]
        return TextPrompt(self._template.encode(chat, is_prompt=True).ids)

    @torch.inference_mode()
    def stream(
        self, prompt: TextPrompt, sampling: SamplingConfig, stop_texts: Sequence[str], generator: torch.Generator
    ) -> Iterator[str]:
        """Yield the answer as pieces of text."""
        num_known = self._memory.num_known(prompt.ids)
        inputs = self.lm.embed(torch.tensor(prompt.ids[num_known:], device=self.lm.model.norm.weight.device))
        steps = self._memory.generate(
            prompt.ids, num_known, inputs, sampling, self._stop_ids, generator, prompt_ids=prompt.ids
        )
        yield from stream_text(steps, self._template.tokenizer, self._stop_ids, stop_texts)
