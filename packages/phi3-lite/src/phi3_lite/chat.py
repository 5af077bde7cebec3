"""Chat formats, built span by span: Phi-3's, and ChatML as SmolLM2 has it.

    <|system|>                   <|im_start|>system
    {system}<|end|>              {system}<|im_end|>
    <|user|>                     <|im_start|>user
    {text}<|end|>                {text}<|im_end|>
    <|assistant|>                <|im_start|>assistant
    {text}<|end|>                {text}<|im_end|>

Markers become ids by table; each stretch of text between markers and image slots is encoded on its own by
`Tokenizer.encode`, so that no text can open a turn, end one, or claim an image's place.

Phi-3's markers swallow white space to their right: the newline behind one has no id, nor has white space at the start
of a turn's text. ChatML's swallow none: role, newline and the text behind them are one stretch, and the newline behind
`<|im_end|>` is another.

The third format, plain, is for base models: turns follow each other without marker or system text, and `<|endofchunk|>`
(`<|endoftext|>`, where there is none) stands behind each answer, so that earlier turns are worked examples.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Final, Literal, NamedTuple

from .tokenizer import WHITE_SPACE, Tokenizer


class ImageSlot(Enum):
    """Type of the sentinel IMAGE."""

    IMAGE = "<image>"


IMAGE: Final = ImageSlot.IMAGE
"""Stands among a turn's parts where an image goes."""

Part = str | ImageSlot

ChatKind = Literal["phi3", "chatml", "plain"]
"""A chat format, by name."""

SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""What SmolLM2's own template says where a conversation has no system turn."""

_ROLES = ("system", "user", "assistant")
_MARKERS: dict[ChatKind, str] = {"phi3": "<|{role}|>", "chatml": "<|im_start|>", "plain": ""}
_ENDS: dict[ChatKind, tuple[str, ...]] = {
    "phi3": ("<|end|>",), "chatml": ("<|im_end|>",), "plain": ("<|endofchunk|>", "<|endoftext|>"),
}  # fmt: skip


class ChatTurn(NamedTuple):
    """One turn; a plain tuple of the two serves as well."""

    role: str
    """system, user or assistant; document for plain text with images, all of it to be learnt."""
    parts: Sequence[Part]
    """Text and images in order."""


class EncodedChat(NamedTuple):
    """A conversation or document as the model sees it; image slots are known by place, not by id."""

    ids: list[int]
    is_target: list[bool]
    """True = the token is to be learnt: the assistant's text and its end marker, a document's text and its end."""
    image_positions: list[int]
    """Index into ids of each image's slot, in the order of the images."""


class ChatTemplate:
    """Turns → ids, targets and image slots, for training, evaluation and chat alike."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        kind: ChatKind = "phi3",
        system: str | None = None,
        has_bos: bool = False,
        has_leading_space: bool = True,
        image_id: int | None = None,
    ) -> None:
        """Set the template up.

        `system` is said before every conversation that has no system turn of its own; None says what the format has by
        itself, which is nothing for phi3 and SMOLLM2_SYSTEM for chatml. `has_bos` puts `<s>` in front of everything.
        `has_leading_space`: whether text behind a marker or image gets the tokenizer's leading space, as each text does
        with a tokenizer.json of Llama's kind; transformers' Llama tokenizer with legacy=False gives it to the very
        first text only. `image_id` fills image slots; None takes the tokenizer's `<image>`, if it has one.

        Raises:
            ValueError: an unknown format, or the tokenizer lacks a marker.
        """
        if kind not in ("phi3", "chatml", "plain"):
            raise ValueError(f"kind: expected phi3, chatml or plain, got {kind!r}; name a format that is known")
        self.tokenizer = tokenizer
        self.kind: ChatKind = kind
        self._is_chatml = kind == "chatml"
        self.system = SMOLLM2_SYSTEM if system is None and self._is_chatml else system
        self._bos = [tokenizer.token_id("<s>")] if has_bos else []
        self._has_leading_space = has_leading_space
        self._marker_names = {role: _MARKERS[kind].format(role=role) for role in _ROLES}
        self._markers = {role: [tokenizer.token_id(name)] if name else [] for role, name in self._marker_names.items()}
        ends = [name for name in _ENDS[kind] if name in tokenizer.control_ids]
        self._end_name = (ends or _ENDS[kind])[0]
        self.end_id = tokenizer.token_id(self._end_name)
        self.end_of_text_id = tokenizer.token_id("<|endoftext|>")
        self.image_id = tokenizer.control_ids.get("<image>") if image_id is None else image_id

    @property
    def stop_ids(self) -> tuple[int, int]:
        """Ids that end an answer or a document."""
        return self.end_id, self.end_of_text_id

    def encode(self, turns: Sequence[tuple[str, Sequence[Part]]], *, is_prompt: bool = False) -> EncodedChat:
        """Encode a conversation, or one document.

        `is_prompt` leaves the end open: a conversation gets the marker that opens the assistant's next turn, a document
        no end-of-text; its text is to be continued.

        Raises:
            ValueError: no turn, an unknown role, a document beside other turns, an assistant turn or a document without
                text, or an image where the tokenizer has no `<image>` and no image_id was given.
        """
        checked = [ChatTurn(*turn) for turn in turns]
        roles = [turn.role for turn in checked]
        if not roles:
            raise ValueError("chat: expected at least one turn, got none; give a turn")
        built = EncodedChat(list(self._bos), [False] * len(self._bos), [])
        if "document" in roles:
            if len(roles) > 1:
                raise ValueError(f"chat: expected a document alone, got the turns {roles}; encode them one by one")
            self._append_document(built, checked[0], is_prompt)
            return built
        if self.system is not None and roles[0] != "system":
            checked.insert(0, ChatTurn("system", [self.system]))
        for turn in checked:
            self._append_turn(built, turn)
        if is_prompt:
            _append(built, self._markers["assistant"], is_target=False)
            if self._is_chatml:
                _append(built, self._encode(built, self._role_line("assistant")), is_target=False)
        return built

    def _append_turn(self, built: EncodedChat, turn: ChatTurn) -> None:
        if turn.role not in self._markers:
            raise ValueError(f"role: expected one of {list(self._markers)} or document, got {turn.role!r}; rename it")
        is_target = turn.role == "assistant"
        _append(built, self._markers[turn.role], is_target=False)
        start = len(built.ids)
        num_text = self._append_parts(built, turn.parts, is_target=is_target, role=turn.role)
        if is_target and num_text == 0:
            raise ValueError(
                f"assistant turn: expected some text, got {built.ids[start:]} as its ids; leave the turn out"
            )
        if is_target or self.kind != "plain":
            _append(built, [self.end_id], is_target=is_target)
        if self._is_chatml:
            _append(built, self._encode(built, "\n"), is_target=False)

    def _append_document(self, built: EncodedChat, turn: ChatTurn, is_prompt: bool) -> None:
        num_text = self._append_parts(built, turn.parts, is_target=True, role=None)
        if is_prompt:
            return
        if num_text == 0:
            raise ValueError("document: expected some text, got none; leave it out")
        _append(built, [self.end_of_text_id], is_target=True)

    def _append_parts(self, built: EncodedChat, parts: Sequence[Part], *, is_target: bool, role: str | None) -> int:
        """Append text and image slots, behind the marker of `role` if there is one; return the number of text tokens.

        ChatML's "role, newline" is encoded together with the text behind it, as the two make tokens together, and is no
        target.
        """
        num_text = 0
        opening = "" if role is None else self._role_line(role)
        is_behind_marker = role is not None and self.kind == "phi3"
        joined = _joined(parts)
        if opening and (not joined or isinstance(joined[0], ImageSlot)):
            _append(built, self._encode(built, opening), is_target=False)
            opening = ""
        for part in joined:
            if isinstance(part, ImageSlot):
                if self.image_id is None:
                    raise ValueError(
                        "image: expected a tokenizer with an <image> token, got none; add it or give image_id"
                    )
                built.image_positions.append(len(built.ids))
                _append(built, [self.image_id], is_target=False)
            else:
                ids = self._encode(built, opening + (part.lstrip(WHITE_SPACE) if is_behind_marker else part))
                num_opening = _num_common(ids, self._encode(built, opening)) if opening else 0
                _append(built, ids[:num_opening], is_target=False)
                _append(built, ids[num_opening:], is_target=is_target)
                num_text += len(ids) - num_opening
                opening = ""
            is_behind_marker = is_behind_marker and isinstance(part, str) and not part.strip(WHITE_SPACE)
        return num_text

    def _encode(self, built: EncodedChat, text: str) -> list[int]:
        """Encode text that goes behind what is built so far."""
        return self.tokenizer.encode(text, is_continued=bool(built.ids) and not self._has_leading_space)

    def _role_line(self, role: str) -> str:
        """Return what is encoded between a marker and the text of its turn."""
        return f"{role}\n" if self._is_chatml else ""

    def _render_marker(self, role: str) -> str:
        return self._marker_names[role] + (self._role_line(role) or "\n") if self.kind != "plain" else ""

    def render(self, turns: Sequence[tuple[str, Sequence[Part]]], *, is_prompt: bool = False) -> str:
        """Return the conversation as text, for people to read; the model's input is `encode`'s."""
        checked = [ChatTurn(*turn) for turn in turns]
        text = "<s>" if self._bos else ""
        if checked and checked[0].role == "document":
            return text + _render_parts(checked[0].parts) + ("" if is_prompt else "<|endoftext|>")
        if self.system is not None and (not checked or checked[0].role != "system"):
            checked.insert(0, ChatTurn("system", [self.system]))
        for turn in checked:
            end = f"{self._end_name}\n" if turn.role == "assistant" or self.kind != "plain" else ""
            text += f"{self._render_marker(turn.role)}{_render_parts(turn.parts)}{end}"
        return text + (self._render_marker("assistant") if is_prompt else "")


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Join texts that stand side by side: where a text was cut must not change its tokens."""
    joined: list[Part] = []
    for part in parts:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _num_common(ids: list[int], others: list[int]) -> int:
    """Return how many ids the two have in common from the front."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(ids), len(others)))


def _append(built: EncodedChat, ids: list[int], *, is_target: bool) -> None:
    built.ids.extend(ids)
    built.is_target.extend([is_target] * len(ids))


def _render_parts(parts: Sequence[Part]) -> str:
    return "".join(part.value if isinstance(part, ImageSlot) else part for part in parts)
