"""What the person who waits is told, on standard error."""

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from blip3_lite import Blip3
from blip3_lite.device import device_words
from fused_kernels import backend_report


def num_parameters(parameters: Iterable[nn.Parameter]) -> int:
    """Numbers in all of them; of those that DeepSpeed has cut in parts, the whole."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def announce(model: Blip3, path: Path) -> None:
    """Say what is about to be trained, where it goes, and which kernels compute it."""
    parts = {"vision": model.vision_encoder, "connector": model.vision_tokenizer, "language model": model.lang_model}
    counts = {name: num_parameters(part.parameters()) for name, part in parts.items()}
    listed = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in counts.items())
    total = sum(counts.values()) / 1e6
    say(
        f"run folder {path}; {total:.2f} M parameters ({listed}); {torch.get_num_threads()} threads, "
        f"{device_words(model.device)}"
    )
    rows = backend_report(model.device, torch.float32)
    say("kernels: " + ", ".join(f"{row.op}={row.backend}" for row in rows))


def say(text: str) -> None:
    """One line for the person who waits; standard output is for results."""
    print(text, file=sys.stderr, flush=True)
