"""Text ↔ token ids, with control tokens that no text can spell.

A control token (`<|end|>`, `<image>`, …) steers the model. Text of a user or of a data set is encoded by `encode`, for
which control tokens do not exist: `<|end|>` spelt out becomes the tokens of six or so characters. Control ids come from
`token_id`, or from `encode_with_control` for text that the program itself wrote.
"""

import codecs
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

_SURROGATES = re.compile("[\ud800-\udfff]")


@runtime_checkable
class Tokenizer(Protocol):
    """What the chat template and the decoding loop need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One above the largest id."""
        ...

    @property
    def control_ids(self) -> Mapping[str, int]:
        """Control tokens by name."""
        ...

    @property
    def strips_right(self) -> frozenset[str]:
        """Names of the control tokens that swallow the white space behind them."""
        ...

    def encode(self, text: str, *, is_continued: bool = False) -> list[int]:
        """Encode untrusted text: never a control id, whatever it spells."""
        ...

    def encode_with_control(self, text: str) -> list[int]:
        """Encode trusted text in which control tokens are written by name."""
        ...

    def decode(self, ids: Iterable[int], *, keep_control: bool = False) -> str:
        """Turn ids into text; control tokens as their names, or dropped."""
        ...

    def token_id(self, name: str) -> int:
        """Return the id of the control token of this name."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes a token stands for; empty for control tokens and ids beyond the vocabulary."""
        ...

    @property
    def has_prefix_space(self) -> bool:
        """Whether `encode` puts a space in front of the text, which decoding takes away again."""
        ...


class PieceTokenizer(ABC):
    """Shared half of the tokenizers: everything that follows from a table of pieces and of control tokens."""

    def __init__(
        self,
        pieces: Mapping[int, bytes],
        control_ids: Mapping[str, int],
        strips_right: Iterable[str],
        *,
        has_prefix_space: bool,
        unknown_id: int | None,
    ) -> None:
        self._pieces = dict(pieces)
        self._control_ids = dict(control_ids)
        self._control_names = {token: name for name, token in control_ids.items()}
        self._strips_right = frozenset(strips_right)
        self._has_prefix_space = has_prefix_space
        self._vocab_size = 1 + max((*self._pieces, *self._control_names), default=-1)
        # a tokenizer without byte pieces may give its unknown token for a character that it never saw
        self._forbidden = frozenset(control_ids.values()) - {unknown_id}
        for name in control_ids:
            self.encode(name)

    @property
    def vocab_size(self) -> int:
        """One above the largest id, control tokens included; the least number of rows a model needs."""
        return self._vocab_size

    @property
    def control_ids(self) -> Mapping[str, int]:
        """Control tokens by name."""
        return self._control_ids

    @property
    def strips_right(self) -> frozenset[str]:
        """Names of the control tokens that swallow the white space behind them."""
        return self._strips_right

    @property
    def has_prefix_space(self) -> bool:
        """Whether `encode` puts a space in front of the text, which decoding takes away again."""
        return self._has_prefix_space

    @abstractmethod
    def _encode_plain(self, text: str) -> list[int]:
        """Encode with control tokens unknown."""

    @abstractmethod
    def encode_with_control(self, text: str) -> list[int]:
        """Encode trusted text in which control tokens are written by name."""

    def encode(self, text: str, *, is_continued: bool = False) -> list[int]:
        """Encode untrusted text: never a control id, whatever it spells. Lone surrogates become U+FFFD.

        `is_continued` puts no space in front, as for text that goes on behind something else.

        Raises:
            ValueError: the vocabulary lets ordinary text reach a control id (found for its own names on construction),
                or has pieces across a line's end, so that `is_continued` cannot be had.
        """
        text = _SURROGATES.sub("\ufffd", text)
        ids = self._encode_behind_newline(text) if is_continued and self.has_prefix_space else self._encode_plain(text)
        if not self._forbidden.isdisjoint(ids):
            names = sorted({self._control_names[x] for x in ids if x in self._forbidden})
            raise ValueError(
                f"tokenizer: expected no control token from plain text, got {names}; "
                "the vocabulary merges characters into them, train or export it without"
            )
        return ids

    def _encode_behind_newline(self, text: str) -> list[int]:
        """Encode without the leading space: behind a line's end, whose own tokens are then taken away."""
        newline = self._encode_plain("\n")
        ids = self._encode_plain("\n" + text)
        if ids[: len(newline)] != newline:
            raise ValueError(
                f"tokenizer: expected no piece across a line's end, got one in {text[:20]!r}; encode it whole"
            )
        return ids[len(newline) :]

    def token_id(self, name: str) -> int:
        """Return the id of the control token of this name.

        Raises:
            ValueError: there is none.
        """
        if name not in self._control_ids:
            raise ValueError(
                f"control token: expected one of {sorted(self._control_ids)}, got {name!r}; add it to the tokenizer"
            )
        return self._control_ids[name]

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes a token stands for; empty for control tokens and ids beyond the vocabulary."""
        return self._pieces.get(token, b"")

    def decode(self, ids: Iterable[int], *, keep_control: bool = False) -> str:
        """Turn ids into text; control tokens as their names, or dropped.

        Each run between control tokens is decoded on its own, as it was encoded. Bytes that are not UTF-8 become
        U+FFFD; ids beyond the vocabulary give nothing (a model may have more rows than its tokenizer has tokens).
        """
        stream = StreamDecoder(self, keep_control=keep_control)
        return "".join([stream.push(token) for token in ids]) + stream.finish()


class StreamDecoder:
    """Decode one token at a time; a character whose bytes are spread over tokens comes out when it is whole.

    The concatenation of all that `push` and `finish` return equals `decode` of the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, keep_control: bool = False) -> None:
        self._tokenizer = tokenizer
        self._names = {token: name if keep_control else "" for name, token in tokenizer.control_ids.items()}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_at_start = tokenizer.has_prefix_space

    def push(self, token: int) -> str:
        """Return the text that has become certain with this token."""
        name = self._names.get(token)
        if name is not None:
            return self.finish() + name
        data = self._tokenizer.token_bytes(token)
        if self._is_at_start and data:
            self._is_at_start = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Return what is left, an unfinished character as U+FFFD, and be ready for the next text."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._is_at_start = self._tokenizer.has_prefix_space
        return rest


def piece_bytes(piece: str) -> bytes:
    """Return the bytes of a SentencePiece-style piece: `▁` is a space, `<0x0A>` the byte 10."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def split_at_control(text: str, names: Sequence[str], strips_right: frozenset[str]) -> list[tuple[str, bool]]:
    """Cut text at control tokens written by name; True marks a name. White space that a name swallows is left out."""
    if not names:
        return [(text, False)]
    by_length = sorted(names, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, by_length)) + ")", text)
    cut: list[tuple[str, bool]] = []
    for index, part in enumerate(parts):
        is_name = index % 2 == 1
        if not is_name and index > 0 and parts[index - 1] in strips_right:
            part = part.lstrip(WHITE_SPACE)
        if part:
            cut.append((part, is_name))
    return cut


WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""Unicode's White_Space, which published tokenizers strip; Python's own `str.strip` also takes U+001C … U+001F."""
