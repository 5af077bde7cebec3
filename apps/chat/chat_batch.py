"""The same question about every picture of a folder, with the answers in a file of JSON lines."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from msgspec.structs import replace
from tqdm import tqdm

from blip3_lite import EncodedSample, SamplingConfig, answer_batch, user_turn
from chat_talkers import ChatError, PictureTalker
from interleave_data import FileBytes, ImagePart, SkipReason, SkipSample

_BATCH = 8
"""Pictures whose tiles are in memory at a time: the vision tower takes them in one call."""


def unfinished(out: Path) -> Path:
    """Return where the lines stand until all of them do."""
    return out.with_name(f"{out.name}.part")


def find_pictures(folder: Path, out: Path) -> list[Path]:
    """List the files of a folder by name, whatever is in them; hidden ones and our own are left out.

    Raises:
        ChatError: there are none, or `out` cannot be written.
    """
    if out.exists():
        raise ChatError(f"--out {out}: expected a new file, got one that is there; move it or name another")
    if not out.parent.is_dir():
        raise ChatError(f"--out {out}: expected a file in a folder, got no folder {out.parent}; make it")
    try:
        entries = sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())
    except OSError as error:
        raise ChatError(f"--images {folder}: expected a folder of pictures, got: {error.strerror}") from error
    own = unfinished(out).absolute()
    found = [folder / name for name in entries if not name.startswith(".") and (folder / name).absolute() != own]
    if not found:
        raise ChatError(f"--images {folder}: expected pictures, got no file; folders within are not looked into")
    return found


def answer_pictures(
    talker: PictureTalker,
    pictures: Sequence[Path],
    question: str,
    out: Path,
    sampling: SamplingConfig,
    stop_texts: Sequence[str],
    generator: torch.Generator,
) -> Counter[str]:
    """Ask about each picture and write a line for it; return how many were answered, or skipped for which reason.

    The lines lie in `unfinished(out)` until the last one is on disk.

    Raises:
        OSError: the file cannot be written.
    """
    counts: Counter[str] = Counter()
    with (
        unfinished(out).open("wb") as file,
        tqdm(total=len(pictures), desc=out.name, unit="picture", disable=None) as bar,
    ):
        for start in range(0, len(pictures), _BATCH):
            rows = [_encoded(talker, path, question) for path in pictures[start : start + _BATCH]]
            prompts = [row for row in rows if isinstance(row, EncodedSample)]
            bar.update(len(rows) - len(prompts))
            answers = iter(_answers(talker, prompts, sampling, stop_texts, generator, bar.update))
            for path, row in zip(pictures[start : start + _BATCH], rows, strict=True):
                counts["answered" if isinstance(row, EncodedSample) else row.reason.value] += 1
                said = (
                    {"answer": next(answers)}
                    if isinstance(row, EncodedSample)
                    else {"skipped": f"{row.reason.value}: {row.detail}"}
                )
                line = json.dumps({"image": path.name, **said}, ensure_ascii=False)
                # a file's name may hold bytes that are no UTF-8
                file.write(line.encode(errors="replace") + b"\n")
            file.flush()
        os.fsync(file.fileno())
    unfinished(out).rename(out)
    return counts


def _encoded(talker: PictureTalker, path: Path, question: str) -> EncodedSample | SkipSample:
    try:
        prompt = talker.encode([user_turn([ImagePart(FileBytes(str(path)))], question)])
    except SkipSample as error:
        return error
    window = talker.lm.cfg.max_positions
    if prompt.length >= window:
        return SkipSample(SkipReason.TOO_LONG, f"expected less than {window} tokens, got {prompt.length}")
    return prompt


def _answers(
    talker: PictureTalker,
    prompts: Sequence[EncodedSample],
    sampling: SamplingConfig,
    stop_texts: Sequence[str],
    generator: torch.Generator,
    on_progress: Callable[[int], object],
) -> list[str]:
    if not prompts:
        return []
    space = talker.lm.cfg.max_positions - max(prompt.length for prompt in prompts)
    return answer_batch(
        talker.loaded.model,
        talker.loaded.processor,
        prompts,
        replace(sampling, max_new_tokens=min(sampling.max_new_tokens, space)),
        batch_size=_BATCH,
        stop_texts=stop_texts,
        generator=generator,
        on_progress=on_progress,
    )
