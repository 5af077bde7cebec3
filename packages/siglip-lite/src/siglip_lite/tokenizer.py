"""SigLIP's text tokenizer: canonical text, SentencePiece, an end token, padding to the tower's full length.

Source: the canonical form of text is that of big_vision, `evaluators/proj/image_text/prompt_engineering.py` at commit
3b8e5ab; ids and file names are those of transformers' SiglipTokenizer.
"""

import json
import re
import string
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from jaxtyping import Int
from sentencepiece import SentencePieceProcessor
from torch import Tensor

from weight_files import WeightsError

_MODEL = "spiece.model"
_CONFIG = "tokenizer_config.json"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WHITE_SPACE = re.compile(r"\s+")
_SURROGATES = re.compile("[\ud800-\udfff]")


class _AddedToken(msgspec.Struct):
    content: str


class _TokenizerFields(msgspec.Struct):
    tokenizer_class: str | None = None
    do_lower_case: bool = True
    model_max_length: int | float = 64
    pad_token: str | _AddedToken = "</s>"
    eos_token: str | _AddedToken = "</s>"


class _TextSizes(msgspec.Struct):
    vocab_size: int = 32000
    max_position_embeddings: int = 64


class _ModelFields(msgspec.Struct):
    model_type: str | None = None
    text_config: _TextSizes | None = None
    vocab_size: int = 32000
    max_position_embeddings: int = 64


def canonical_text(text: str, *, lower_case: bool = True) -> str:
    """Lower the case, drop ASCII punctuation, make each run of white space one space, and none at the ends."""
    text = text.lower() if lower_case else text
    return _WHITE_SPACE.sub(" ", text.translate(_NO_PUNCTUATION)).strip()


class SiglipTokenizer:
    """Texts to ids, all of one length, as the published text towers were trained.

    No text can spell the end token: `</s>` loses its punctuation like everything else. White space in front of a text
    counts for nothing, though transformers makes a token of it.
    """

    def __init__(
        self,
        model: bytes,
        *,
        max_tokens: int = 64,
        pad_token: str = "</s>",
        end_token: str = "</s>",
        lower_case: bool = True,
    ) -> None:
        """Read the bytes of a SentencePiece model.

        Args:
            model: content of `spiece.model`.
            max_tokens: length of every text, its end token included.
            pad_token: piece that fills up short texts.
            end_token: piece that ends every text, also a cut one.
            lower_case: whether texts are lower-cased first.

        Raises:
            ValueError: it is no such model, or lacks the pieces; or there is no room for a token.
        """
        self._model = model
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"SentencePiece model: expected a .model file, got: {error}; check the file") from error
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}; the published towers have 16 or 64")
        self.max_tokens = max_tokens
        self.lower_case = lower_case
        self.pad_id = self._id_of("pad_token", pad_token)
        self.end_id = self._id_of("end_token", end_token)

    @classmethod
    def from_folder(cls, path: Path | str) -> "SiglipTokenizer":
        """Read `spiece.model` and `tokenizer_config.json` of a Hugging Face folder.

        Texts get the length that the tokenizer's config says, and no more than the text tower in config.json has
        positions.

        Raises:
            WeightsError: no SentencePiece model, a tokenizer of another class, or one with more pieces than the text
                tower beside it has.
        """
        folder = Path(path)
        fields = _read_fields(folder / _CONFIG)
        if fields.tokenizer_class not in (None, "SiglipTokenizer"):
            raise WeightsError(
                f"{folder / _CONFIG}: expected tokenizer_class SiglipTokenizer, got {fields.tokenizer_class}; "
                "no other is implemented (SigLIP 2 has Gemma's)"
            )
        if not (folder / _MODEL).is_file():
            raise WeightsError(
                f"tokenizer {folder}: expected {_MODEL}, got none; finish the download "
                "(open_clip's folders have none: take it from the Hugging Face folder of the same model)"
            )
        sizes = _text_sizes(folder)
        positions = fields.model_max_length if sizes is None else sizes.max_position_embeddings
        try:
            tokenizer = cls(
                (folder / _MODEL).read_bytes(),
                max_tokens=int(min(fields.model_max_length, positions)),
                pad_token=_content(fields.pad_token),
                end_token=_content(fields.eos_token),
                lower_case=fields.do_lower_case,
            )
        except ValueError as error:
            raise WeightsError(f"tokenizer {folder}: {error}") from error
        if sizes is not None and tokenizer.vocab_size > sizes.vocab_size:
            raise WeightsError(
                f"tokenizer {folder}: expected at most {sizes.vocab_size} pieces, as the text tower has, "
                f"got {tokenizer.vocab_size}; it is another model's"
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of pieces; the text tower has at least as many rows."""
        return self._processor.GetPieceSize()

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text with the end token, not padded; long texts are cut. Lone surrogates: U+FFFD."""
        canonical = canonical_text(_SURROGATES.sub("\ufffd", text), lower_case=self.lower_case)
        return [*self._processor.EncodeAsIds(canonical)[: self.max_tokens - 1], self.end_id]

    def encode_batch(self, texts: Sequence[str]) -> Int[Tensor, "b t"]:
        """Return the ids of all texts, padded to `max_tokens`: what `SiglipText` was trained on."""
        rows = [self.encode(text) for text in texts]
        padded = [row + [self.pad_id] * (self.max_tokens - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).view(len(rows), self.max_tokens)

    def save(self, folder: Path | str) -> None:
        """Write `spiece.model` and `tokenizer_config.json`, which `from_folder` and transformers read."""
        folder = Path(folder)
        fields = {
            "tokenizer_class": "SiglipTokenizer",
            "do_lower_case": self.lower_case,
            "model_max_length": self.max_tokens,
            "pad_token": self._processor.IdToPiece(self.pad_id),
            "eos_token": self._processor.IdToPiece(self.end_id),
            "unk_token": self._processor.IdToPiece(self._processor.unk_id()),
        }
        (folder / _MODEL).write_bytes(self._model)
        (folder / _CONFIG).write_text(json.dumps(fields, indent=2) + "\n")

    def _id_of(self, what: str, piece: str) -> int:
        token = self._processor.PieceToId(piece)
        if self._processor.IdToPiece(token) != piece:
            raise ValueError(f"{what}: expected a piece of the SentencePiece model, got {piece!r}; name one")
        return token


def _read_fields(path: Path) -> _TokenizerFields:
    """Fields of the tokenizer's config; the published defaults where there is no such file."""
    if not path.is_file():
        return _TokenizerFields()
    try:
        return msgspec.json.decode(path.read_bytes(), type=_TokenizerFields)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: expected a tokenizer's config, got: {error}; fetch it again") from error


def _text_sizes(folder: Path) -> _TextSizes | None:
    """Sizes of the text tower in the same folder, if there is one."""
    try:
        model = msgspec.json.decode((folder / "config.json").read_bytes(), type=_ModelFields)
    except (FileNotFoundError, msgspec.DecodeError, UnicodeDecodeError):
        # The tokenizer is good without; a broken config is the model's loader's to refuse.
        return None
    if model.model_type == "siglip":
        return model.text_config or _TextSizes()
    if model.model_type == "siglip_text_model":
        return _TextSizes(model.vocab_size, model.max_position_embeddings)
    return None


def _content(token: str | _AddedToken) -> str:
    return token if isinstance(token, str) else token.content
