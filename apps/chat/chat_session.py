"""The chat itself: attach pictures, ask, stream the answer. Bad input costs one line, never the session."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from blip3_lite import SamplingConfig, user_turn
from blip3_lite.device import choose_device, device_words
from chat_batch import answer_pictures, find_pictures, unfinished
from chat_config import ChatConfig
from chat_opening import find_model, open_talker
from chat_talkers import ChatError, PictureTalker, Talker, TextTalker
from fused_kernels import backend_report
from interleave_data import FileBytes, ImagePart, SkipReason, SkipSample, TextPart, Turn

HELP = """  /image PATH   add a picture to your next message (again for several, in order)
  /clear        forget the conversation and its pictures
  /help         this list
  /quit         leave (or Ctrl-D)"""


@dataclass
class Session:
    """A conversation with a loaded model."""

    talker: Talker[Any]
    sampling: SamplingConfig
    generator: torch.Generator
    stop_texts: Sequence[str] = ()
    turns: list[Turn] = field(default_factory=list)
    pending: list[ImagePart] = field(default_factory=list)

    def attach(self, path: str) -> str:
        """Add a picture to the next message; return what becomes of it, in words.

        Raises:
            ChatError: the model sees no pictures, the file cannot be read, or the image gate does not let it through.
        """
        try:
            picture, words = self.talker.look_at(ImagePart(_file(path)))
        except SkipSample as error:
            what = "cannot be read" if error.reason is SkipReason.UNREADABLE_FILE else "not a usable picture"
            raise ChatError(f"{path}: {what} ({error.detail})") from error
        self.pending.append(picture)
        return f"{Path(path).name}: {words}"

    def ask(self, text: str) -> Iterator[str]:
        """Stream the answer to `text` with the pictures attached so far.

        Once the answer is complete the turn is kept and the pictures are part of it; without an answer nothing changes,
        so that the pictures still wait for the next message.

        Raises:
            ChatError: nothing was asked, a picture cannot be used, or the conversation no longer fits the window.
        """
        if not text.strip():
            raise ChatError("the message is empty")
        # Bytes of a terminal that are no UTF-8 come as lone surrogates, which no tokenizer takes.
        turns = [*self.turns, user_turn(self.pending, text.encode(errors="replace").decode())]
        try:
            prompt = self.talker.encode(turns)
        except SkipSample as error:
            raise ChatError(f"the conversation cannot be used ({error.detail}); use /clear") from error
        window = self.talker.lm.cfg.max_positions
        if prompt.length >= window:
            raise ChatError(
                f"the conversation is {prompt.length} tokens long, the model's window is {window}; use /clear"
            )
        sampling = replace(self.sampling, max_new_tokens=min(self.sampling.max_new_tokens, window - prompt.length))
        pieces: list[str] = []
        for piece in self.talker.stream(prompt, sampling, self.stop_texts, self.generator):
            pieces.append(piece)
            yield piece
        answer = "".join(pieces)
        if answer.strip():
            self.turns = [*turns, Turn(role="assistant", parts=(TextPart(answer),))]
            self.pending = []

    def clear(self) -> None:
        """Forget turns and pictures."""
        self.turns, self.pending = [], []


def _file(path: str) -> FileBytes:
    """The file that a user means by a path."""
    if not path:
        raise ChatError("picture: expected a path, got none; type /image PATH")
    if "\0" in path:
        raise ChatError(f"picture: expected a path, got {path!r} with a zero byte; retype it")
    try:
        return FileBytes(str(Path(path).expanduser()))
    except RuntimeError as error:
        raise ChatError(f"{path}: cannot be read ({error})") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _answer(session: Session, text: str) -> None:
    answer = ""
    for piece in session.ask(text):
        print(piece, end="", flush=True)
        answer += piece
    print()
    if not answer.strip():
        _say("  (no answer)")


def _handle_line(session: Session, line: str) -> bool:
    """Do what one line asks; return False to leave."""
    command, _, argument = line.strip().partition(" ")
    if command in ("/quit", "/exit"):
        return False
    if command == "/help":
        _say(HELP)
    elif command == "/clear":
        session.clear()
        _say("  forgotten")
    elif command == "/image":
        _say("  " + session.attach(argument.strip().strip("'\"")))
    elif command.startswith("/"):
        raise ChatError(f"no command {command}; /help lists them")
    elif line.strip():
        _answer(session, line.strip())
    return True


def _interact(session: Session) -> None:
    if isinstance(sys.stdin, TextIOWrapper):
        # A stray byte must not end the session, and a file's name may hold any.
        sys.stdin.reconfigure(errors="surrogateescape")
    _say("Type a message; /image PATH adds a picture; /help lists the commands; Ctrl-D leaves.")
    while True:
        try:
            print("you> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line or not _handle_line(session, line):
                return
        except ChatError as error:
            _say(f"  {error}")
        except KeyboardInterrupt:
            _say("\n  stopped; Ctrl-D leaves")


def _open(config: ChatConfig) -> PictureTalker | TextTalker:
    try:
        device = choose_device(config.device)
        path = find_model(config.model)
        talker = open_talker(path, config.quantize, device)
    except (ValueError, OSError) as error:
        raise ChatError(str(error)) from error
    dtype = talker.lm.model.norm.weight.dtype
    held = f"{config.quantize} and {dtype}" if config.quantize else str(dtype)
    _say(f"model {path}: {talker.kind}, {held.replace('torch.', '')}; {device_words(device)}")
    rows = backend_report(device, dtype)
    _say("kernels: " + ", ".join(f"{row.op}={row.backend}" for row in rows))
    return talker


def _chat(config: ChatConfig) -> None:
    talker = _open(config)
    generator = torch.Generator().manual_seed(config.seed)
    session = Session(talker, config.sampling(talker.sampling), generator, config.stop)
    for image in config.image:
        _say(session.attach(image))
    if config.prompt is None:
        _interact(session)
    else:
        _answer(session, config.prompt)


def _ask_folder(config: ChatConfig, folder: Path, question: str, out: Path) -> None:
    # before the model is loaded, which takes longer
    pictures = find_pictures(folder, out)
    talker = _open(config)
    if not isinstance(talker, PictureTalker):
        raise ChatError(f"--images: expected a model that sees pictures, got one of {talker.kind}; name another")
    generator = torch.Generator().manual_seed(config.seed)
    sampling = config.sampling(talker.sampling)
    try:
        counts = answer_pictures(talker, pictures, question, out, sampling, config.stop, generator)
    except OSError as error:
        raise ChatError(f"--out {out}: cannot be written ({error.strerror})") from error
    num_answered = counts.pop("answered", 0)
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    _say(f"{out}: {num_answered} answered, {counts.total()} skipped" + (f" ({reasons})" if reasons else ""))


def run(config: ChatConfig) -> int:
    """Run the chat; return the exit status (2 for input that cannot be used, 130 if it was interrupted)."""
    try:
        if config.images is None or config.out is None or config.prompt is None:
            _chat(config)
        else:
            _ask_folder(config, Path(config.images), config.prompt, Path(config.out))
    except ChatError as error:
        _say(f"chat: {error}")
        return 2
    except KeyboardInterrupt:
        kept = unfinished(Path(config.out)) if config.out else None
        _say("\nchat: interrupted" + (f"; what was answered is in {kept}" if kept and kept.exists() else ""))
        return 130
    return 0
