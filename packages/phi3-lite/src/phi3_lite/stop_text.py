"""Stop sequences: strings that end an answer and are cut from it, however the tokens fall.

The strings are looked for in the text, not in the ids: the same characters can come as many different tokens, and begin
in the middle of one.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .sampling import GenerationStep
from .tokenizer import StreamDecoder, Tokenizer


class StopCutter:
    """Passes a stream of text on up to the first stop sequence.

    What could still become one is held back; `push` and `finish` together return the text before it, or all of it.
    """

    def __init__(self, stop_texts: Sequence[str]) -> None:
        """Set up for one answer.

        Raises:
            ValueError: a single string, or an empty one among them.
        """
        if isinstance(stop_texts, str) or not all(stop_texts):
            raise ValueError(f"stop_texts: expected strings of one character or more, got {stop_texts!r}; list them")
        self._stop_texts = tuple(stop_texts)
        self._held = ""
        self.is_stopped = False
        """Whether a stop sequence has come up; everything behind it is dropped."""

    def push(self, text: str) -> str:
        """Return the text that has become certain with this piece."""
        if self.is_stopped:
            return ""
        self._held += text
        # the one that is complete first counts, which is the same however the text was cut into pieces
        found = [(start + len(stop), start) for stop in self._stop_texts if (start := self._held.find(stop)) >= 0]
        self.is_stopped = bool(found)
        num_certain = min(found)[1] if found else len(self._held) - self._num_uncertain()
        certain, self._held = self._held[:num_certain], "" if found else self._held[num_certain:]
        return certain

    def finish(self) -> str:
        """Return what was held back and has not become a stop sequence."""
        rest, self._held = self._held, ""
        return rest

    def _num_uncertain(self) -> int:
        """Return the length of the longest end of the text that some stop sequence begins with."""
        longest = max((len(stop) - 1 for stop in self._stop_texts), default=0)
        for start in range(max(0, len(self._held) - longest), len(self._held)):
            if any(stop.startswith(self._held[start:]) for stop in self._stop_texts):
                return len(self._held) - start
        return 0


def stream_text(
    steps: Iterator[GenerationStep], tokenizer: Tokenizer, stop_ids: Sequence[int], stop_texts: Sequence[str] = ()
) -> Iterator[str]:
    """Yield what a generation of one row says, as pieces of text, up to the first of `stop_texts` in it.

    A character whose bytes are not all there yet is held back, and so is what may still become a stop text.
    """
    decoder, cutter = StreamDecoder(tokenizer), StopCutter(stop_texts)
    for step in steps:
        token = int(step.tokens[0])
        if token not in stop_ids and (piece := cutter.push(decoder.push(token))):
            yield piece
        if cutter.is_stopped:
            return
    if rest := cutter.push(decoder.finish()) + cutter.finish():
        yield rest


def cut_at_stop(text: str, stop_texts: Sequence[str]) -> str:
    """Return the text up to the first stop sequence in it."""
    cutter = StopCutter(stop_texts)
    return cutter.push(text) + cutter.finish()


class StopTexts:
    """Tells `generate` which rows have come to a stop sequence; the text itself is then `cut_at_stop`.

    Make one for each generation: it holds what the rows have said.
    """

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str], batch: int) -> None:
        """Set up for `batch` rows."""
        self._decoders = [StreamDecoder(tokenizer) for _ in range(batch)]
        self._cutters = [StopCutter(stop_texts) for _ in range(batch)]

    def __call__(self, tokens: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
        """Take each row's next token, FINISHED where there is none; True = the row has come to a stop sequence."""
        for row, token in enumerate(tokens.tolist()):
            if token >= 0:
                self._cutters[row].push(self._decoders[row].push(token))
        return torch.tensor([cutter.is_stopped for cutter in self._cutters])
