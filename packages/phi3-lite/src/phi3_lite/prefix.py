"""Keys and values kept from one prompt to the next, so that a chat's turn costs its new tokens only."""

from collections.abc import Callable, Generator, Hashable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .cache import KVCache
from .config import SamplingConfig
from .model import Phi3
from .sampling import GenerationStep, generate


class PromptMemory:
    """What a model has read last: one prompt and its answer, as far as the next prompt begins alike.

    What stands at a position goes by a name: a token's id, or whatever else tells one embedding from another, such as
    an image's digest with the number of its token. Answers with the memory equal those without but for rounding.
    """

    def __init__(self, model: Phi3) -> None:
        self.model = model
        self._names: list[Hashable] = []
        self._cache: KVCache | None = None

    def num_known(self, names: Sequence[Hashable]) -> int:
        """Positions at the beginning of a prompt that were read already; its last one never counts."""
        if self._cache is None:
            return 0
        most = max(0, min(len(self._names), self._cache.longest, len(names) - 1))
        common = next((place for place in range(most) if names[place] != self._names[place]), most)
        return common if self._cache.can_shorten(common) else 0

    @torch.inference_mode()
    def generate(
        self,
        names: Sequence[Hashable],
        num_known: int,
        inputs: Float[Tensor, "t d"],
        sampling: SamplingConfig,
        stop_ids: Sequence[int] = (),
        generator: torch.Generator | None = None,
        *,
        prompt_ids: Sequence[int] = (),
        ends: Callable[[Int[Tensor, " 1"]], Bool[Tensor, " 1"]] | None = None,
    ) -> Generator[GenerationStep]:
        """Continue a prompt, as `phi3_lite.generate`, and remember it and its answer.

        names: of all its positions. num_known: from `num_known(names)`, or fewer. inputs: the embeddings from there on.

        Raises:
            ValueError: the embeddings are not as many as the names behind the known ones, or as `generate`.
        """
        if not 0 <= num_known <= self.num_known(names) or len(inputs) != len(names) - num_known:
            raise ValueError(
                f"inputs: expected {len(names)} − {num_known} rows, the positions that are not known (of at most "
                f"{self.num_known(names)}), got {len(inputs)}; embed the prompt from num_known(names) on"
            )
        if self._cache is None or num_known == 0:
            # before the new one is made
            self._cache = None
            self._cache = self.model.new_cache(1)
        self._cache.shorten(num_known)
        self._names = list(names)
        bounds = torch.tensor([0, len(inputs)], dtype=torch.int32, device=inputs.device)
        steps = generate(
            self.model,
            inputs,
            bounds,
            sampling,
            stop_ids,
            generator,
            prompt_ids=[list(prompt_ids)] if prompt_ids else (),
            ends=ends,
            cache=self._cache,
        )
        for step in steps:
            self._names.append(int(step.tokens[0]))
            yield step
