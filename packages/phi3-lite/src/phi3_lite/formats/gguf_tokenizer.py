"""The tokenizer that a GGUF file describes in its metadata.

Two kinds. `gpt2`: byte-level BPE with a list of merges, whose cutting of text into words the file only names
(`smollm`). `llama`: SentencePiece's BPE with a score for each piece. Tokens of the types control and user-defined are
control tokens here, as are the added ones of a tokenizer.json: no text can spell them. Unused tokens at the end
(padding of the embedding) belong to no vocabulary.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from ..tokenizer import Tokenizer
from ..tokenizer_hf import HFTokenizer
from ..tokenizer_sp import PHI3_STRIPS_RIGHT, SentencePieceTokenizer
from .gguf_file import Value

T = TypeVar("T", str, int, float)
Json = dict[str, Any]

# numbers of gguf.TokenType, which are those of SentencePiece's own piece types
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_LETTERS_LOW, _LETTERS_UP = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SHORT_FORMS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS_UP}*{_LETTERS_LOW}+{_SHORT_FORMS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS_UP}+{_LETTERS_LOW}*{_SHORT_FORMS}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_LLAMA3 = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
_GPT2_WORDS: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_BYTES_ONLY: Json = {**_GPT2_WORDS, "use_regex": False}


def _split(pattern: str) -> Json:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_PRE_TOKENIZERS: Mapping[str, list[Json]] = {
    "gpt-2": [_GPT2_WORDS],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2_WORDS],
    "llama-bpe": [_split(_LLAMA3), _BYTES_ONLY],
    "gpt-4o": [_split(_GPT4O), _BYTES_ONLY],
}
"""How text is cut before merging, by the name in `tokenizer.ggml.pre`: GPT-2's words; the same after every digit was
set apart (SmolLM2's tokenizer.json); Llama 3's words; GPT-4o's (Phi-4-mini)."""
_WHOLE_WORDS_FIRST = ("llama-bpe",)
"""Those for which a word that is a token is taken whole, whatever its merges would give."""


def read_tokenizer(metadata: Mapping[str, Value]) -> Tokenizer:
    """Build the tokenizer.

    Raises:
        ValueError: no tokenizer, lists that do not fit each other, or a kind that is not handled.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _items(metadata, "tokenizer.ggml.tokens", str)
    types = _items(metadata, "tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type: expected {len(tokens)}, one a token, got {len(types)}")
    num_used = max((index + 1 for index, number in enumerate(types) if number != _UNUSED), default=0)
    if kind == "gpt2":
        return _byte_level(metadata, tokens[:num_used], types[:num_used])
    if kind == "llama":
        return _sentencepiece(metadata, tokens[:num_used], types[:num_used])
    raise ValueError(
        f"tokenizer.ggml.model: expected gpt2 or llama, got {kind!r}; take the Hugging Face folder with its "
        "tokenizer.json"
    )


def _items(metadata: Mapping[str, Value], key: str, kind: type[T]) -> list[T]:
    found = metadata.get(key)
    if not isinstance(found, list):
        raise ValueError(f"{key}: expected a list, got {'nothing' if found is None else repr(found)[:80]}")
    items = [item for item in found if isinstance(item, kind)]
    if len(items) != len(found):
        raise ValueError(f"{key}: expected a list of {kind.__name__}, got {repr(found[:3])[:80]} …")
    return items


def _byte_level(metadata: Mapping[str, Value], tokens: Sequence[str], types: Sequence[int]) -> HFTokenizer:
    words = metadata.get("tokenizer.ggml.pre")
    if not isinstance(words, str) or words not in _PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre: expected one of {', '.join(_PRE_TOKENIZERS)}, got {words!r}; take the Hugging Face "
            "folder with its tokenizer.json"
        )
    merges = [merge.split(" ") for merge in _items(metadata, "tokenizer.ggml.merges", str)]
    if strange := [merge for merge in merges if len(merge) != 2]:
        raise ValueError(f"tokenizer.ggml.merges: expected pairs, got {strange[:3]}")
    added = [
        {"id": index, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for index, (name, number) in enumerate(zip(tokens, types, strict=True))
        if number in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]  # fmt: skip
    spec: Json = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[words]},
        "post_processor": None,
        "decoder": _GPT2_WORDS,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": words in _WHOLE_WORDS_FIRST,
            "vocab": {name: index for index, name in enumerate(tokens)},
            "merges": merges,
        },
    }  # fmt: skip
    if len(spec["model"]["vocab"]) != len(tokens):
        raise ValueError(f"tokenizer.ggml.tokens: expected {len(tokens)} different ones, got repeated ones")
    return HFTokenizer(msgspec.json.encode(spec).decode())


def _sentencepiece(
    metadata: Mapping[str, Value], tokens: Sequence[str], types: Sequence[int]
) -> SentencePieceTokenizer:
    scores = _items(metadata, "tokenizer.ggml.scores", float)
    if len(scores) < len(tokens):
        raise ValueError(f"tokenizer.ggml.scores: expected {len(tokens)}, one a token, got {len(scores)}")
    numbers = [_CONTROL if number == _USER_DEFINED else number for number in types]
    if _UNKNOWN not in numbers:
        # converters mark the unknown token as control, because a Hugging Face folder lists it among its added tokens
        unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
        if not isinstance(unknown, int) or not 0 <= unknown < len(numbers):
            raise ValueError(f"tokenizer.ggml.unknown_token_id: expected a token, got {unknown!r}")
        numbers[unknown] = _UNKNOWN
    has_prefix_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    model = _model_file(
        zip(tokens, scores, numbers, strict=False),
        has_bytes=_BYTE in numbers,
        has_prefix_space=bool(has_prefix_space),
        merges_spaces=bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)),
        unknown_id=numbers.index(_UNKNOWN),
    )
    # Which tokens swallow white space is in no GGUF file; like llama.cpp, go by what the model is.
    is_phi3 = metadata.get("general.architecture") == "phi3"
    return SentencePieceTokenizer(model, {}, PHI3_STRIPS_RIGHT & set(tokens) if is_phi3 else ())


def _model_file(
    pieces: Iterable[tuple[str, float, int]],
    *,
    has_bytes: bool,
    has_prefix_space: bool,
    merges_spaces: bool,
    unknown_id: int,
) -> bytes:
    """Write a SentencePiece `.model`: the protocol buffer of google/sentencepiece v0.2.0, sentencepiece_model.proto."""
    bpe, none = 2, (1 << 64) - 1
    model = b"".join(
        # piece, score (field 2, four bytes), type (field 3)
        _bytes_field(1, _bytes_field(1, text.encode()) + struct.pack("<BfBB", 0x15, score, 0x18, number))
        for text, score, number in pieces
    )
    trainer = _int_field(3, bpe) + _int_field(35, has_bytes) + _int_field(40, unknown_id)
    # begin, end and padding are control tokens like any other; −1 says that none plays the part
    trainer += _int_field(41, none) + _int_field(42, none) + _int_field(43, none)
    normalizer = _bytes_field(1, b"identity") + _int_field(3, has_prefix_space) + _int_field(4, merges_spaces)
    return model + _bytes_field(2, trainer) + _bytes_field(3, normalizer + _int_field(5, True))


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _int_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes_field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data
