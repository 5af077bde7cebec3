"""An encoded sample for people to read: what is learnt, what is only read, where the images stand.

Control tokens are written by name. A character whose bytes are spread over several tokens stands at the last of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Literal, NamedTuple

from phi3_lite import StreamDecoder

from .batch import IGNORE_INDEX, EncodedSample
from .processor import Processor


class Token(NamedTuple):
    """One token and what it adds to the text."""

    id: int
    text: str


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one kind.

    `learnt`: the loss is taken of predicting them. `read`: it is not. `image`: the slots of one image.
    """

    kind: Literal["learnt", "read", "image"]
    tokens: tuple[Token, ...] = ()
    """Of an image there are none: what stands in its slots means nothing."""
    num_tokens: int = 0
    num_tiles: int = 0
    """Of an image, thumbnail included."""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(token.text for token in self.tokens)


def spans_of(sample: EncodedSample, processor: Processor) -> list[Span]:
    """Cut a sample that `processor` has encoded into spans; their tokens, slots included, are the whole sequence."""
    ids: list[int] = sample.ids.tolist()
    # The target of a position is the token behind it.
    is_learnt = [False, *(target != IGNORE_INDEX for target in sample.targets[:-1].tolist())]
    labels: list[Literal["learnt", "read"] | int] = ["learnt" if learnt else "read" for learnt in is_learnt]
    slots = iter(sample.image_index.tolist())
    for image, num_tiles in enumerate(sample.tiles_per_image):
        for slot in islice(slots, processor.cfg.num_image_tokens(num_tiles)):
            labels[slot] = image
    spans: list[Span] = []
    start = 0
    for label, run in groupby(labels):
        end = start + len(list(run))
        if isinstance(label, int):
            spans.append(Span("image", num_tokens=end - start, num_tiles=sample.tiles_per_image[label]))
        else:
            spans.append(Span(label, _tokens(ids[start:end], processor), end - start))
        start = end
    return spans


def _tokens(ids: Sequence[int], processor: Processor) -> tuple[Token, ...]:
    decoder = StreamDecoder(processor.tokenizer, keep_control=True)
    texts = [decoder.push(token) for token in ids]
    texts[-1] += decoder.finish()
    return tuple(map(Token, ids, texts))
