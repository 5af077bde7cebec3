"""The command line of `apps/chat`. Imports no torch."""

import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
import tyro

from blip3_lite.config import DeviceChoice
from phi3_lite.config import SamplingConfig


class ChatConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Chat with a model about text and pictures, or ask it the same about every picture of a folder.

    In the chat, /image PATH adds a picture to the next message, /clear starts over, /help lists the commands.
    """

    model: str | None = None
    """What to talk with: a checkpoint, a folder of published weights (xGen-MM, or a language model alone), a GGUF file,
    or the hub's id of such a folder (org/name), which is fetched; without it, the newest checkpoint under runs/."""
    quantize: Literal["int8", "int4"] | None = None
    """Hold the language model's matrices as integers: less memory, faster answers, the rest in bf16."""
    device: DeviceChoice = "auto"
    """Where to compute: on the GPU where there is one (`auto`), or as said."""
    image: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Picture file for the first message; may be given several times, in reading order."""
    prompt: str | None = None
    """Answer this once on standard output and exit; with --images, ask it about each picture."""
    images: str | None = None
    """Folder of pictures to ask --prompt about, one by one in the order of their names; answers go to --out."""
    out: str | None = None
    """File to be written for --images: a JSON object a line, with `image` and either `answer` or `skipped`."""
    temperature: float | None = None
    """Randomness of the answers; 0 always takes the likeliest token. This and the next three: None is as the model was
    published, or else greedy without penalty, up to 256 tokens."""
    top_p: float | None = None
    """Sample among the likeliest tokens that together hold this probability."""
    repetition_penalty: float | None = None
    """Divides the logits of tokens already seen; 1 leaves them."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Text that ends an answer and is cut from it; may be given several times."""
    seed: int = 0
    """Seed of the sampling."""

    def __post_init__(self) -> None:
        """Check ranges, and that flags that need each other are together."""
        self.sampling(SamplingConfig())
        if not all(self.stop):
            raise ValueError("--stop: expected a text, got an empty one; leave it out")
        asks_folder = self.images is not None
        if asks_folder != (self.out is not None):
            given, lacking = ("--images", "--out FILE") if asks_folder else ("--out", "--images FOLDER")
            raise ValueError(f"{given}: expected {lacking} beside it, got none; give both or neither")
        if asks_folder and self.prompt is None:
            raise ValueError("--images: expected --prompt TEXT beside it, got none; say what to ask of each picture")
        if asks_folder and self.image:
            raise ValueError("--images: expected no --image beside it, got some; each picture is asked about alone")

    def sampling(self, defaults: SamplingConfig) -> SamplingConfig:
        """Return the model's own way of sampling, but for what was said on the command line.

        Raises:
            ValueError: a value out of range.
        """
        said = {name: getattr(self, name) for name in SamplingConfig.__struct_fields__}
        return msgspec.structs.replace(defaults, **{name: value for name, value in said.items() if value is not None})


def parse_command_line(arguments: Sequence[str]) -> ChatConfig:
    """Return the config, or exit with status 2 and a reason."""
    try:
        return tyro.cli(ChatConfig, prog="chat", args=arguments, config=(tyro.conf.FlagConversionOff,))
    except ValueError as error:
        print(f"chat: {error}", file=sys.stderr)
        sys.exit(2)
