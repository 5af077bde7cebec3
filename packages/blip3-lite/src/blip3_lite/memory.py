"""A conversation as the model has read it: the next turn costs its new tokens and pictures only."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

import torch

from phi3_lite import GenerationStep, PromptMemory, SamplingConfig

from .batch import EncodedSample, collate
from .config import Blip3Config
from .model import Blip3


class ChatMemory:
    """Keys and values of the last prompt and its answer, pictures included.

    A prompt that begins alike is read from where it differs; a picture that was seen there does not meet the vision
    tower again. Pictures are told apart by their tiles' names (`EncodedSample.tile_keys`).
    """

    def __init__(self, model: Blip3) -> None:
        self.model = model
        self._memory = PromptMemory(model.lang_model)

    @torch.inference_mode()
    def generate_steps(
        self,
        prompt: EncodedSample,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        *,
        generator: torch.Generator | None = None,
    ) -> Iterator[GenerationStep]:
        """Yield the next token, step by step, as `blip3_lite.generate_steps` for one prompt."""
        names = position_names(prompt, self.model.cfg)
        rest = unread_part(prompt, self._memory.num_known(names), self.model.cfg)
        if rest.tiles_per_image:
            inputs = self.model.embed(collate([rest]).to(self.model.device))
        else:
            inputs = self.model.lang_model.embed(rest.ids.to(self.model.device))
        yield from self._memory.generate(names, len(names) - rest.length, inputs, sampling, stop_ids, generator)


def position_names(prompt: EncodedSample, cfg: Blip3Config) -> list[Hashable]:
    """What stands at each position: a token's id; for an image token its image's tiles and its number among theirs."""
    names: list[Hashable] = list(prompt.ids.tolist())
    places: list[int] = prompt.image_index.tolist()
    first_tile = first_token = 0
    for count in prompt.tiles_per_image:
        keys = prompt.tile_keys[first_tile : first_tile + count]
        # an image without names is like no other
        image: Hashable = keys if len(keys) == count else object()
        num_tokens = cfg.num_image_tokens(count)
        for number, place in enumerate(places[first_token : first_token + num_tokens]):
            names[place] = (image, number)
        first_tile, first_token = first_tile + count, first_token + num_tokens
    return names


def unread_part(prompt: EncodedSample, num_known: int, cfg: Blip3Config) -> EncodedSample:
    """Return a prompt without its first `num_known` positions, or fewer where those would end inside an image."""
    places: list[int] = prompt.image_index.tolist()
    num_images = num_tiles = num_tokens = 0
    for count in prompt.tiles_per_image:
        behind = num_tokens + cfg.num_image_tokens(count)
        if places[behind - 1] >= num_known:
            num_known = min(num_known, places[num_tokens])
            break
        num_images, num_tiles, num_tokens = num_images + 1, num_tiles + count, behind
    num_features = num_tiles * prompt.valid.shape[1]
    order = prompt.feature_order
    if order is not None:
        order = order[num_features:] - num_features if num_tiles < len(prompt.valid) else None
    return replace(
        prompt,
        ids=prompt.ids[num_known:],
        targets=prompt.targets[num_known:],
        image_index=prompt.image_index[num_tokens:] - num_known,
        tiles=prompt.tiles[num_tiles:],
        valid=prompt.valid[num_tiles:],
        tiles_per_image=prompt.tiles_per_image[num_images:],
        feature_order=order,
        tile_keys=prompt.tile_keys[num_tiles:],
    )
