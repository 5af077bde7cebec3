"""The second DPO step of an iteration: rejected answers that the model itself gives to noised pictures.

xGen-MM (arXiv:2408.08872v1) takes, in each iteration, a second DPO step with an additional rejected answer: the model's
own output for a noised picture and the original question. What it says there comes from the language model's habits, as
the picture says little, and is held against the answer that was preferred. How much noise is not published [ours:
`--noise`].
"""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import islice
from typing import Any

import torch

from blip3_lite import Blip3, Processor
from dpo_lite import side_by_side
from train_answers import noised_rivals
from train_objectives import PairPack, sample_digest
from train_stream import PackStream

_MADE = "noised_steps_made"


class NoisedStream(PackStream):
    """After the batches of each step, as many with the same prompts and chosen answers and new rejected ones.

    Where the model answers as it should in spite of the noise there is no pair. A state that is saved between the two
    steps holds the first one's place, and how many batches came since.
    """

    def __init__(
        self,
        stream: PackStream,
        model: Blip3,
        processor: Processor,
        *,
        noise: float,
        batches_a_step: int,
        seed: int,
    ) -> None:
        super().__init__(stream.stream, "preference", stream.features, stream.skips, stream.idle)
        self._model, self._processor = model, processor
        self._noise, self._batches_a_step, self._seed = noise, batches_a_step, seed
        self._within: dict[str, Any] | None = None
        self._num_made = 0

    def __iter__(self) -> Iterator[PairPack]:
        """Go on from the current state."""
        batches = super().__iter__()
        num_made, self._num_made = self._num_made, 0
        while True:
            before = super().state_dict()
            group: Sequence[PairPack] = list(islice(batches, self._batches_a_step))
            if not group:
                return
            for place in range(num_made, 2 * len(group)):
                is_last = place + 1 == 2 * len(group)
                batch = group[place] if place < len(group) else self._rival(group[place - len(group)])
                self._within = None if is_last else {**before, _MADE: place + 1}
                yield batch
            num_made = 0

    def state_dict(self) -> dict[str, Any]:
        """What has been consumed."""
        return super().state_dict() if self._within is None else dict(self._within)

    def load_state_dict(self, state: dict[str, Any], *, accept_data_change: bool = False) -> None:
        """Continue from a saved state; see `PackStream.load_state_dict`."""
        self._num_made = int(state.get(_MADE, 0))
        self._within = dict(state) if self._num_made else None
        super().load_state_dict(_without_place(state), accept_data_change=accept_data_change)

    def changes(self, state: dict[str, Any]) -> list[str]:
        """How the data differ from those that a state was saved with."""
        return super().changes(_without_place(state))

    def _rival(self, batch: PairPack) -> PairPack:
        """The same pairs with other rejected answers; those without another one are left out."""
        # Of the batch, so that a run that goes on draws the same noise.
        seed = sha256("/".join([str(self._seed), *batch.digests]).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
        chosen = batch.documents[0::2]
        rivals = noised_rivals(self._model, self._processor, chosen, self._noise, generator)
        if not rivals:
            return PairPack([], self.idle, [])
        documents = side_by_side([(chosen[place], rival) for place, rival in rivals.items()])
        ids = [batch.sample_ids[place] for place in rivals]
        return PairPack(ids, self.collate(documents), [sample_digest(part) for part in documents], documents)


def _without_place(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name != _MADE}
