"""A tokenizer from a SentencePiece `.model`, with control tokens beside it."""

from collections.abc import Collection, Mapping
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from .tokenizer import PieceTokenizer, piece_bytes, split_at_control

PHI3_CONTROL_IDS: Mapping[str, int] = {
    "<|endoftext|>": 32_000,
    "<|assistant|>": 32_001,
    "<|placeholder1|>": 32_002,
    "<|placeholder2|>": 32_003,
    "<|placeholder3|>": 32_004,
    "<|placeholder4|>": 32_005,
    "<|system|>": 32_006,
    "<|end|>": 32_007,
    "<|placeholder5|>": 32_008,
    "<|placeholder6|>": 32_009,
    "<|user|>": 32_010,
}
"""The tokens that Phi-3-mini adds to the 32,000 pieces of Llama's SentencePiece model."""

PHI3_STRIPS_RIGHT: frozenset[str] = frozenset(PHI3_CONTROL_IDS) - {"<|endoftext|>"} | {"</s>"}
"""Those of Phi-3-mini's control tokens that swallow the white space behind them."""


class SentencePieceTokenizer(PieceTokenizer):
    """SentencePiece for text; control tokens by table, as a SentencePiece file has no place for added ones.

    The file's own control and unknown pieces (`<unk>`, `<s>`, `</s>`) are control tokens too.
    """

    def __init__(
        self,
        model: bytes,
        control_ids: Mapping[str, int] = PHI3_CONTROL_IDS,
        strips_right: Collection[str] = PHI3_STRIPS_RIGHT,
    ) -> None:
        """Read the bytes of a `.model` file.

        Raises:
            ValueError: it is not one, or a control id is taken by another piece.
        """
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"SentencePiece model: expected a .model file, got {error}; check the file") from error
        pieces: dict[int, bytes] = {}
        own: dict[str, int] = {}
        for token in range(self._processor.GetPieceSize()):
            name = self._processor.IdToPiece(token)
            if self._processor.IsControl(token) or self._processor.IsUnknown(token):
                own[name] = token
            elif control_ids.get(name) != token:
                pieces[token] = piece_bytes(name)
        taken = sorted(name for name, token in control_ids.items() if token in pieces)
        if taken:
            raise ValueError(f"control_ids: expected ids that are no piece of the model, got {taken}; give free ids")
        super().__init__(
            pieces,
            own | dict(control_ids),
            strips_right,
            # the space is in front of every text, or it is not: ask for the shortest one
            has_prefix_space=piece_bytes(self._processor.EncodeAsPieces("a")[0]).startswith(b" "),
            unknown_id=self._processor.unk_id(),
        )

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        control_ids: Mapping[str, int] = PHI3_CONTROL_IDS,
        strips_right: Collection[str] = PHI3_STRIPS_RIGHT,
    ) -> "SentencePieceTokenizer":
        """Read a `.model` file."""
        return cls(Path(path).read_bytes(), control_ids, strips_right)

    def save(self, path: str | Path) -> None:
        """Write the `.model` file; the control tokens beside it have no place in there."""
        Path(path).write_bytes(self._processor.serialized_model_proto())

    def _encode_plain(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def encode_with_control(self, text: str) -> list[int]:
        """Encode trusted text in which control tokens are written by name."""
        ids: list[int] = []
        for part, is_name in split_at_control(text, list(self.control_ids), self.strips_right):
            ids += [self.token_id(part)] if is_name else self._encode_plain(part)
        return ids
