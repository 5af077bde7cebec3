"""Preference pairs, one JSON object a line: a prompt, the answer to prefer and the one to avoid.

`{"id", "image": path | [path, ...], "prompt": str, "chosen": str, "rejected": str}`; `images` is read for `image` and
`question` for `prompt`. `<image>` marks in the prompt are placed as in LLaVA's layout.
"""

from pathlib import Path

import msgspec

from .errors import SkipReason, SkipSample
from .llava import IMAGE_MARK, Speech, place_images
from .samples import PreferenceSample
from .sources import RecordFile, fingerprint, images_inside, unique_id


class _Record(msgspec.Struct, frozen=True):
    chosen: str
    rejected: str
    id: str | int | None = None
    image: str | list[str] | None = None
    images: str | list[str] | None = None
    prompt: str | None = None
    question: str | None = None


class PreferenceJsonl:
    """Prompts with a preferred and a rejected answer, from JSON lines or a JSON array."""

    def __init__(self, path: str | Path, *, image_root: str | Path | None = None, name: str = "preferences") -> None:
        self.name = name
        self._image_root = str(Path(path).parent if image_root is None else image_root)
        self._records = RecordFile(path)
        self.fingerprint = fingerprint("preference-jsonl", [str(path)])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> PreferenceSample:
        """Read one pair.

        Raises:
            SkipSample: if the prompt or an answer is absent, both answers are the same, or marks and images disagree.
        """
        record = self._records.decode(index, _Record)
        prompt = record.prompt if record.prompt is not None else record.question
        if prompt is None or not prompt.strip():
            raise SkipSample(SkipReason.EMPTY_TEXT, "expected a `prompt` or `question` with some text, got none")
        if not record.chosen.strip() or not record.rejected.strip():
            raise SkipSample(SkipReason.EMPTY_ANSWER, "expected `chosen` and `rejected` with some text, got none")
        if IMAGE_MARK in record.chosen or IMAGE_MARK in record.rejected:
            raise SkipSample(SkipReason.IMAGE_MARKS, f"expected no {IMAGE_MARK} in an answer, got one")
        if record.chosen == record.rejected:
            raise SkipSample(SkipReason.BAD_RECORD, "expected two different answers, got the same one twice")
        images = images_inside(self._image_root, record.image if record.image is not None else record.images)
        return PreferenceSample(
            id=unique_id(self.name, index, record.id),
            source=self.name,
            turns=place_images([Speech("user", prompt)], images),
            chosen=record.chosen,
            rejected=record.rejected,
        )
