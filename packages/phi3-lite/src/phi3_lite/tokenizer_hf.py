"""A tokenizer from a `tokenizer.json`, the file format of the `tokenizers` library."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from .tokenizer import PieceTokenizer, piece_bytes

Json = dict[str, Any]


class _AddedToken(msgspec.Struct, frozen=True):
    content: str
    id: int
    rstrip: bool = False


class _Model(msgspec.Struct, frozen=True):
    vocab: dict[str, int]
    merges: list[str | list[str]]
    unk_token: str | None = None


class _DecoderStep(msgspec.Struct, frozen=True):
    type: str
    content: str | None = None
    start: int | None = None
    stop: int | None = None
    # None where the step is no sequence of others
    decoders: list["_DecoderStep"] | None = None


class _Description(msgspec.Struct, frozen=True):
    """What is read here of a tokenizer.json; the library reads the rest."""

    model: _Model
    added_tokens: list[_AddedToken] | None = None
    decoder: _DecoderStep | None = None


class HFTokenizer(PieceTokenizer):
    """BPE as in the file, in two copies: one with the file's added tokens for trusted text, one without for all other.

    Taking the added tokens away is what makes `encode` safe: the library's own switch, `encode_special_tokens`, leaves
    those in that are added but not marked special, such as Phi-3's `</s>`. Truncation and padding that the file may ask
    for are switched off: text is encoded whole, and as it is.
    """

    def __init__(self, json: str) -> None:
        """Read the text of a tokenizer.json.

        Raises:
            ValueError: it is not one, or its model or decoder is of a kind that is not handled.
        """
        spec, known = _read(json)
        added = known.added_tokens or []
        control = {token.content: token.id for token in added}
        is_byte_level, has_prefix_space = _decoder_kind(known.decoder)
        to_bytes = _byte_level_bytes if is_byte_level else piece_bytes
        vocab = known.model.vocab
        self._trusted = _backend(json)
        self._plain = _backend(_without_control(spec, known.model, control).decode())
        super().__init__(
            {token: to_bytes(piece) for piece, token in vocab.items() if piece not in control},
            control,
            [token.content for token in added if token.rstrip],
            has_prefix_space=has_prefix_space,
            unknown_id=vocab.get(known.model.unk_token or ""),
        )

    @classmethod
    def from_file(cls, path: str | Path) -> "HFTokenizer":
        """Read a tokenizer.json."""
        return cls(Path(path).read_text(encoding="utf-8"))

    def with_control_tokens(self, names: Sequence[str]) -> "HFTokenizer":
        """Return a copy that knows these control tokens too; new ones take the next free ids, in this order."""
        backend = Backend.from_str(self._trusted.to_str())
        backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
        return HFTokenizer(backend.to_str())

    def to_json(self) -> str:
        """Return the text of the tokenizer.json."""
        return self._trusted.to_str()

    def save(self, path: str | Path) -> None:
        """Write the tokenizer.json."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def _encode_plain(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_with_control(self, text: str) -> list[int]:
        """Encode trusted text in which control tokens are written by name."""
        return self._trusted.encode(text, add_special_tokens=False).ids


def _read(json: str) -> tuple[Json, _Description]:
    """Return the whole description, and typed what is read of it here."""
    try:
        spec = msgspec.json.decode(json, type=dict[str, Any])
        kind = spec["model"]["type"]
        if kind != "BPE":
            raise ValueError(f"tokenizer.json: expected a BPE model, got {kind}; use another tokenizer file")
        return spec, msgspec.convert(spec, _Description)
    except (msgspec.MsgspecError, KeyError, TypeError, RecursionError) as error:
        raise _no_description(error) from error


def _backend(json: str) -> Backend:
    """Make the library's tokenizer, which cuts and pads nothing."""
    try:
        backend = Backend.from_str(json)
    # The library raises nothing narrower.
    except Exception as error:
        raise _no_description(error) from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _no_description(error: Exception) -> ValueError:
    return ValueError(f"tokenizer.json: expected a tokenizer description, got {error!r}; check the file")


def _without_control(spec: Json, model: _Model, control: dict[str, int]) -> bytes:
    """Return the description without added tokens, and without merges that would put one together from its letters.

    Such merges come up when the names stood in the training text: the trainer reuses the id that the name has already.
    """
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.merges]
    kept = [pair for pair in merges if not {*pair, "".join(pair)} & control.keys()]
    return msgspec.json.encode({**spec, "added_tokens": [], "model": {**spec["model"], "merges": kept}})


def _decoder_kind(decoder: _DecoderStep | None) -> tuple[bool, bool]:
    """Return whether pieces are byte-level and whether decoding takes a leading space away."""
    steps = [] if decoder is None else [decoder] if decoder.decoders is None else decoder.decoders
    kinds = [step.type for step in steps]
    strips = [step for step in steps if step.type == "Strip"]
    is_known = set(kinds) <= {"Replace", "ByteFallback", "Fuse", "ByteLevel", "Strip"}
    is_plain_strip = all((s.content, s.start, s.stop) == (" ", 1, 0) for s in strips)
    if not is_known or not is_plain_strip or ("ByteLevel" in kinds) == ("ByteFallback" in kinds):
        raise ValueError(
            f"tokenizer.json: expected a ByteLevel or a ByteFallback decoder, at most one leading space stripped, "
            f"got {kinds}; use another tokenizer file"
        )
    return "ByteLevel" in kinds, bool(strips)


def _byte_level_table() -> dict[str, int]:
    """Return the byte behind each character of byte-level BPE: printable ones stand for themselves (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_level_table()


def _byte_level_bytes(piece: str) -> bytes:
    if strange := sorted(set(piece) - _BYTE_OF.keys()):
        raise ValueError(
            f"tokenizer.json: expected byte-level pieces, got {piece!r} with {strange}; use another tokenizer file"
        )
    return bytes(_BYTE_OF[char] for char in piece)
