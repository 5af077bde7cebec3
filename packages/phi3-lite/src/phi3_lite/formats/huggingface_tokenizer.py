"""Tokenizer files of Hugging Face folders, in and out: tokenizer.json or tokenizer.model, tokenizer_config.json.

The chat template of a folder is a Jinja program. It is never run: what is read of it is whether it writes the BOS
token, and whose system turn. Phi-3's format follows from the markers that the tokenizer has.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from weight_files import WeightsError

from ..chat import SMOLLM2_SYSTEM, ChatTemplate
from ..tokenizer import Tokenizer
from ..tokenizer_hf import HFTokenizer
from ..tokenizer_sp import PHI3_STRIPS_RIGHT, SentencePieceTokenizer

_BOS, _PAD = "<s>", "<|endoftext|>"
_PHI3 = frozenset({"<|system|>", "<|user|>", "<|assistant|>", "<|end|>", _PAD})
_CHATML = frozenset({"<|im_start|>", "<|im_end|>", _PAD})


class _Added(msgspec.Struct):
    content: str
    rstrip: bool = False


class _TokenizerConfig(msgspec.Struct):
    added_tokens_decoder: dict[str, _Added] = {}
    add_bos_token: bool | None = None
    chat_template: str | list[Any] | None = None


def read_tokenizer(folder: Path) -> tuple[Tokenizer | None, ChatTemplate | None]:
    """Return a folder's tokenizer, and its chat format if it is one that is known; None where there is none.

    Raises:
        WeightsError: files that cannot be read, or only some of them.
    """
    try:
        return _read(folder)
    except (ValueError, OSError) as error:
        raise WeightsError(f"weights {folder}: tokenizer: {error}") from error


def _read(folder: Path) -> tuple[Tokenizer | None, ChatTemplate | None]:
    path = folder / "tokenizer_config.json"
    config = msgspec.json.decode(path.read_bytes(), type=_TokenizerConfig) if path.is_file() else _TokenizerConfig()
    if (folder / "tokenizer.json").is_file():
        tokenizer: Tokenizer = HFTokenizer.from_file(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        tokenizer = _read_sentencepiece(folder, config)
    elif path.is_file() or (folder / "vocab.json").is_file():
        raise ValueError("expected tokenizer.json or tokenizer.model, got neither; finish the download")
    else:
        return None, None
    return tokenizer, _chat(tokenizer, _template(folder, config), add_bos=config.add_bos_token is True)


def _read_sentencepiece(folder: Path, config: _TokenizerConfig) -> SentencePieceTokenizer:
    """Read tokenizer.model with the added tokens of tokenizer_config.json, or else of added_tokens.json."""
    added = {token.content: int(number) for number, token in config.added_tokens_decoder.items()}
    strips_right = {token.content for token in config.added_tokens_decoder.values() if token.rstrip}
    if not added and (folder / "added_tokens.json").is_file():
        added = msgspec.json.decode((folder / "added_tokens.json").read_bytes(), type=dict[str, int])
        # this file does not say who swallows white space
        strips_right = set(PHI3_STRIPS_RIGHT)
    return SentencePieceTokenizer.from_file(folder / "tokenizer.model", added, strips_right)


def _template(folder: Path, config: _TokenizerConfig) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return config.chat_template if isinstance(config.chat_template, str) else None


def _chat(tokenizer: Tokenizer, template: str | None, *, add_bos: bool) -> ChatTemplate | None:
    if tokenizer.control_ids.keys() >= _PHI3:
        has_bos = add_bos if template is None else "bos_token" in template
        return ChatTemplate(tokenizer, has_bos=has_bos and _BOS in tokenizer.control_ids)
    # other models' ChatML differs in the system turn, which the program would have to be run to learn
    if tokenizer.control_ids.keys() >= _CHATML and SMOLLM2_SYSTEM in (template or ""):
        return ChatTemplate(tokenizer, kind="chatml")
    return None


def tokenizer_writers(
    tokenizer: Tokenizer, chat: ChatTemplate | None, max_positions: int, stop_ids: tuple[int, ...]
) -> dict[str, Callable[[Path], object]]:
    """Return, by file name, what writes the tokenizer's files.

    Raises:
        ValueError: a tokenizer of a kind that has no file format.
    """
    names = {token: name for name, token in tokenizer.control_ids.items()}
    config: dict[str, Any] = {
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "bos_token": _BOS if _BOS in tokenizer.control_ids else None,
        "eos_token": next((names[token] for token in stop_ids if token in names), None),
        "pad_token": _PAD if _PAD in tokenizer.control_ids else None,
    }
    if chat is not None:
        config["chat_template"] = _jinja(chat)
    if isinstance(tokenizer, HFTokenizer):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_tokenizer, file = tokenizer.save, "tokenizer.json"
    elif isinstance(tokenizer, SentencePieceTokenizer):
        config["tokenizer_class"] = "LlamaTokenizer"
        config["legacy"] = False
        config["added_tokens_decoder"] = {
            str(token): _added_token(name, is_stripping=name in tokenizer.strips_right)
            for token, name in sorted(names.items())
        }
        write_tokenizer, file = tokenizer.save, "tokenizer.model"
    else:
        raise ValueError(f"tokenizer: expected one of a file, got {type(tokenizer).__name__}; save without it")
    return {file: write_tokenizer, "tokenizer_config.json": lambda path: write_json(path, config)}


def special_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Return what configs say of the tokens that begin and pad a text, as far as the tokenizer has Phi-3's."""
    held: Mapping[str, int] = {} if tokenizer is None else tokenizer.control_ids
    return {"bos_token_id": held.get(_BOS), "pad_token_id": held.get(_PAD)}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write it to be read by people too."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


def _added_token(name: str, *, is_stripping: bool) -> dict[str, Any]:
    flags = {"lstrip": False, "rstrip": is_stripping, "normalized": False, "single_word": False, "special": True}
    return {"content": name, **flags}


def _jinja(chat: ChatTemplate) -> str:
    """Return the format as the program that transformers runs, put together from what it renders."""
    turn = chat.render([("system", ["{content}"])])
    body = turn.removeprefix(_BOS)
    prompt = chat.render([("system", ["{content}"])], is_prompt=True).removeprefix(turn)
    before, after = body.split("{content}")
    around_role = [_quoted(part) for part in before.split("system")]
    opening = " + message['role'] + ".join(around_role)
    program = "{{ bos_token }}" if body != turn else ""
    if chat.system is not None:
        own = _quoted(body.replace("{content}", chat.system))
        program += "{% if messages[0]['role'] != 'system' %}{{ " + own + " }}{% endif %}"
    program += "{% for message in messages %}{{ "
    program += f"{opening} + message['content'] + {_quoted(after)}"
    program += " }}{% endfor %}{% if add_generation_prompt %}{{ " + _quoted(prompt) + " }}{% endif %}"
    return program


def _quoted(text: str) -> str:
    """Write a Jinja string; its escapes are Python's."""
    return repr(text)
