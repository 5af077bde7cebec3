"""One task put to one model, from items to answers, in a file that a killed run goes on with.

Items are asked in windows of a few batches. A window's answers are appended to the file together, in the items' order,
and what a killed run has left of a window is asked again: so batches, answers and the file's bytes are those of a run
that was never interrupted.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import msgspec

from blip3_lite import Blip3, EncodedSample, FeatureCache, Processor
from interleave_data import FileBytes, ImagePart, Sample, Size, SkipReason, SkipSample, TextPart
from interleave_data.samples import SliceBytes

from .answers import Answer, behind_prompt, likeliest, say, sequence_nats
from .demonstrations import Demonstrations
from .prediction import EvalItem
from .tasks.task import Task
from .wording import LETTERS, Manner, put, with_answer

Mode = Literal["say", "likelihood"]
"""What a choice question is decided by: what the model says, or which choice it finds likeliest."""

_WINDOW_BATCHES = 4
_CACHED_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How a task is put to a model."""

    model: Blip3
    processor: Processor
    task: Task
    manner: Manner
    mode: Mode = "say"
    shots: int = 0
    text_only_shots: int = 0
    """Worked examples without pictures, where there are no others: Flamingo's way of asking without any."""
    demonstrations: Demonstrations | None = None
    batch_size: int = 16

    def prompt(self, item: EvalItem) -> Sample:
        """The prompt of an item, its worked examples in front."""
        wanted = self.shots or self.text_only_shots
        examples = self.demonstrations.choose(item, wanted) if self.demonstrations and wanted else []
        return put(
            item,
            self.task.wording,
            self.manner,
            is_plain=self._is_plain,
            shots=examples,
            lists_choices=self.mode == "say",
            shows_pictures=self.shots > 0,
        )

    @property
    def _is_plain(self) -> bool:
        return self.processor.cfg.chat == "plain"

    @property
    def window(self) -> int:
        """Items that are asked together."""
        return _WINDOW_BATCHES * self.batch_size

    def ask(
        self, items: Sequence[EvalItem], file: Path, on_progress: Callable[[int], object] | None = None
    ) -> list[Answer]:
        """Answers in the items' order; those that stand in `file` are taken from there, the others are added to it.

        The file must be of the same items, asked in the same way of the same model: name it by `fingerprint`.

        Raises:
            ValueError: the file holds something else than answers.
            OSError: it cannot be written.
        """
        answers = read_answers(file)[: len(items)]
        if len(answers) < len(items):
            answers = answers[: len(answers) // self.window * self.window]
        if on_progress is not None and answers:
            on_progress(len(answers))
        if len(answers) == len(items):
            return answers
        features = FeatureCache(self.model, _CACHED_BYTES)
        encoder = msgspec.json.Encoder()
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab") as lines:
            lines.truncate(sum(len(encoder.encode(answer)) + 1 for answer in answers))
            for start in range(len(answers), len(items), self.window):
                found = self._ask_window(items[start : start + self.window], features)
                lines.write(b"".join(encoder.encode(answer) + b"\n" for answer in found))
                lines.flush()
                os.fsync(lines.fileno())
                answers += found
                if on_progress is not None:
                    on_progress(len(found))
        return answers

    def _ask_window(self, items: Sequence[EvalItem], features: FeatureCache) -> list[Answer]:
        if self.task.kind == "document":
            return self._read_documents(items, features)
        if self.mode == "likelihood":
            return self._choose(items, features)
        prompts = [self._encoded(self.prompt(item)) for item in items]
        askable = [prompt for prompt in prompts if isinstance(prompt, EncodedSample)]
        said = iter(
            say(
                self.model,
                self.processor,
                askable,
                max_new_tokens=self.task.max_new_tokens,
                stop_texts=self.task.wording.stops if self.manner == "base" else (),
                batch_size=self.batch_size,
                collate_prompts=features.collate,
            )
        )
        return [next(said) if isinstance(prompt, EncodedSample) else _not_asked(prompt) for prompt in prompts]

    def _encoded(self, prompt: Sample, *, room: int | None = None) -> EncodedSample | SkipSample:
        """The prompt's sequence, if the model's window has room for it and the answer."""
        try:
            encoded = self.processor.encode_prompt(prompt)
        except SkipSample as skip:
            return skip
        longest = self.model.cfg.lm.max_positions - (self.task.max_new_tokens if room is None else room)
        if encoded.length > longest:
            return SkipSample(SkipReason.TOO_LONG, f"expected at most {longest} tokens, got {encoded.length}")
        return encoded

    def _choose(self, items: Sequence[EvalItem], features: FeatureCache) -> list[Answer]:
        """Compare each item's candidates, each as the answer to its prompt; all of a window's are batched together."""
        rows: list[list[EncodedSample] | SkipSample] = []
        for item in items:
            sample = self.prompt(item)
            prompt = self._encoded(sample, room=0)
            rows.append(prompt if isinstance(prompt, SkipSample) else self._candidates(item, sample, prompt))
        flat = [one for row in rows if not isinstance(row, SkipSample) for one in row]
        nats = iter(sequence_nats(self.model, flat, batch_size=self.batch_size, collate_prompts=features.collate))
        answers: list[Answer] = []
        for item, row in zip(items, rows, strict=True):
            if isinstance(row, SkipSample):
                answers.append(_not_asked(row))
                continue
            costs, lengths = [next(nats) for _ in row], [one.num_targets for one in row]
            best = likeliest(costs)
            text = LETTERS[best] if item.choices else item.candidates[best]
            answers.append(Answer(text=text, nats=tuple(costs), num_tokens=tuple(lengths)))
        return answers

    def _candidates(self, item: EvalItem, sample: Sample, prompt: EncodedSample) -> list[EncodedSample] | SkipSample:
        texts = item.choices or item.candidates
        is_document = sample.turns[-1].role == "document"
        wholes: list[EncodedSample] = []
        for text in texts:
            try:
                whole = self.processor.encode(with_answer(sample, text))
            except SkipSample as skip:
                return skip
            if whole.length > self.model.cfg.lm.max_positions:
                return SkipSample(SkipReason.TOO_LONG, f"{whole.length} tokens")
            wholes.append(behind_prompt(prompt, whole, ends_with_mark=not is_document))
        return wholes

    def _read_documents(self, items: Sequence[EvalItem], features: FeatureCache) -> list[Answer]:
        """What each document's text costs, up to the model's window."""
        window = self.model.cfg.lm.max_positions
        rows: list[EncodedSample | SkipSample] = []
        for item in items:
            try:
                rows.append(self.processor.encode(item.prompt, Size(window, window)))
            except SkipSample as skip:
                rows.append(skip)
        flat = [row for row in rows if isinstance(row, EncodedSample)]
        nats = iter(sequence_nats(self.model, flat, batch_size=1, collate_prompts=features.collate))
        return [
            Answer(nats=(next(nats),), num_tokens=(row.num_targets,))
            if isinstance(row, EncodedSample)
            else _not_asked(row)
            for row in rows
        ]

    def fingerprint(self, items: Sequence[EvalItem], model: str) -> str:
        """Name what is asked, how, and of which model (`model`: the digest of its weights)."""
        digest = sha256()
        settings = [model, self.task.name, self.manner, self.mode, self.shots, self.text_only_shots, self.batch_size]
        digest.update(msgspec.json.encode([*settings, self.task.max_new_tokens]))
        for item in items:
            digest.update(sha256(_described(self.prompt(item), item)).digest())
        return digest.hexdigest()[:16]


def _described(prompt: Sample, item: EvalItem) -> bytes:
    """All that an answer follows from but the pictures' bytes, for which names, and sizes and times of files, stand."""
    turns = [(turn.role, [_part(part) for part in turn.parts]) for turn in prompt.turns]
    return msgspec.json.encode([prompt.id, turns, item.choices, item.candidates])


def _part(part: TextPart | ImagePart) -> str:
    if isinstance(part, TextPart):
        return f"text {part.text}"
    return f"picture {part.key} {_file_state(part)}" if part.key else f"picture {sha256(part.read()).hexdigest()}"


def _file_state(picture: ImagePart) -> str:
    """Size and time of the file that a picture is read from: another one of the same name is another picture."""
    if not isinstance(picture.open, FileBytes | SliceBytes):
        return ""
    try:
        status = os.stat(picture.open.path)
    except OSError:
        # It is left out now, and asked once it is there.
        return "absent"
    return f"{status.st_size} {status.st_mtime_ns}"


def _not_asked(skip: SkipSample) -> Answer:
    return Answer(skip_reason=skip.reason.value)


def read_answers(file: Path) -> list[Answer]:
    """Whole lines of a file of answers, a torn last one left out; none where there is no file.

    Raises:
        ValueError: a line that is no answer.
    """
    if not file.exists():
        return []
    *lines, _ = file.read_bytes().split(b"\n")
    try:
        return [msgspec.json.decode(line, type=Answer) for line in lines]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected answers, a JSON object a line, got: {error}; remove the file") from error
