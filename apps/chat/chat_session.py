"""The chat itself: attach pictures, ask, stream the answer. Bad input costs one line, never the session."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path

import torch

from anyres_tiler import tile_image
from blip3_lite import (
    LoadedModel,
    SamplingConfig,
    load_model,
    newest_checkpoint,
    stream_answer,
    user_turn,
)
from chat_config import ChatConfig
from fused_kernels import backend_report
from interleave_data import FileBytes, ImagePart, Sample, SkipReason, SkipSample, TextPart, Turn, open_image

HELP = """  /image PATH   add a picture to your next message (again for several, in order)
  /clear        forget the conversation and its pictures
  /help         this list
  /quit         leave (or Ctrl-D)"""


class ChatError(ValueError):
    """Something the user can mend, told in one line."""


@dataclass
class Session:
    """A conversation with a loaded model."""

    loaded: LoadedModel
    sampling: SamplingConfig
    generator: torch.Generator
    turns: list[Turn] = field(default_factory=list)
    pending: list[ImagePart] = field(default_factory=list)

    def attach(self, path: str) -> str:
        """Add a picture to the next message; return what becomes of it, in words.

        Raises:
            ChatError: the file cannot be read or is no picture that the image gate lets through.
        """
        limits = self.loaded.processor.limits
        try:
            data = ImagePart(_file(path)).read(limits.max_bytes)
            image = open_image(data, limits)
        except SkipSample as error:
            what = "cannot be read" if error.reason is SkipReason.UNREADABLE_FILE else "not a usable picture"
            raise ChatError(f"{path}: {what} ({error.detail})") from error
        tiles = tile_image(image, self.loaded.config.model.tiling)
        self.pending.append(ImagePart(data))
        rows, columns = tiles.grid
        parts = f"{columns}×{rows} tiles + thumbnail" if tiles.thumbnail_first else "one view"
        return (
            f"{Path(path).name}: {image.width}×{image.height} px → {parts} of {tiles.tile_px} px "
            f"→ {self.loaded.config.model.num_image_tokens(tiles.num_tiles)} tokens"
        )

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
            prompt = self.loaded.processor.encode_prompt(Sample(id="chat", source="chat", turns=tuple(turns)))
        except SkipSample as error:
            raise ChatError(f"the conversation cannot be used ({error.detail}); use /clear") from error
        window = self.loaded.config.model.lm.max_positions
        if prompt.length >= window:
            raise ChatError(
                f"the conversation is {prompt.length} tokens long, the model's window is {window}; use /clear"
            )
        sampling = SamplingConfig(
            max_new_tokens=min(self.sampling.max_new_tokens, window - prompt.length),
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
        )
        pieces: list[str] = []
        for piece in stream_answer(
            self.loaded.model, self.loaded.processor, prompt, sampling, generator=self.generator
        ):
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


def _interact(session: Session) -> int:
    if isinstance(sys.stdin, TextIOWrapper):
        # A stray byte must not end the session, and a file's name may hold any.
        sys.stdin.reconfigure(errors="surrogateescape")
    _say("Type a message; /image PATH adds a picture; /help lists the commands; Ctrl-D leaves.")
    while True:
        try:
            print("you> ", end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
            if not line or not _handle_line(session, line):
                return 0
        except ChatError as error:
            _say(f"  {error}")
        except KeyboardInterrupt:
            _say("\n  stopped; Ctrl-D leaves")


def _open(config: ChatConfig) -> Session:
    path = Path(config.checkpoint) if config.checkpoint else newest_checkpoint(Path("runs"))
    loaded = load_model(path)
    sampling = SamplingConfig(max_new_tokens=config.max_new_tokens, temperature=config.temperature, top_p=config.top_p)
    _say(f"checkpoint {path}")
    rows = backend_report(loaded.model.device, torch.float32)
    _say("kernels: " + ", ".join(f"{row.op}={row.backend}" for row in rows))
    session = Session(loaded, sampling, torch.Generator().manual_seed(config.seed))
    for image in config.image:
        _say(session.attach(image))
    return session


def run(config: ChatConfig) -> int:
    """Run the chat; return the exit status (2 for input that cannot be used, 130 if it was interrupted)."""
    try:
        try:
            session = _open(config)
        except (ValueError, OSError) as error:
            _say(f"chat: {error}")
            return 2
        if config.prompt is None:
            return _interact(session)
        _answer(session, config.prompt)
    except ChatError as error:
        _say(f"chat: {error}")
        return 2
    except KeyboardInterrupt:
        _say("\nchat: interrupted")
        return 130
    return 0
