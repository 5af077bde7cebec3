"""Does a model look at its images? Data files and a paired comparison that answer it.

    uv run tools/image_reliance.py split train.json --image-root DIR --out DIR --num 32
    uv run apps/train sft --data DIR/right.toml …      # then the same command with DIR/shuffled.toml
    uv run tools/image_reliance.py compare CHECKPOINT eval.json --image-root DIR

`split` picks questions that are asked of several images with different answers, so that the text alone cannot give the
answer. In `right.json` each stands with its image; in `shuffled.json` each stands once with every image of the set, so
that the image says nothing. `compare` asks held-out questions with the right image and with a different one, and prints
the difference in accuracy, question by question, with its 95 % interval. Both leave out records that are bad or show no
image or several, and say how many.
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from tqdm import tqdm

from blip3_lite import load_model
from eval_lite import EvalItem, predict
from interleave_data import (
    ImageLimits,
    ImagePart,
    RecordSource,
    Sample,
    SkipSample,
    SourceConfig,
    TextPart,
    Turn,
    open_image,
    open_source,
)
from vlm_metrics import exact_match, paired_difference

Row = tuple[str, str, str]
"""(image, question, answer)"""


def questions(file: Path, image_root: Path) -> RecordSource:
    """The records of a file in LLaVA's layout."""
    return open_source(SourceConfig(name="questions", format="llava-json", path=str(file), image_root=str(image_root)))


def usable_samples(
    source: RecordSource, name_image: Callable[[ImagePart], str]
) -> tuple[list[tuple[Sample, str]], Counter[str]]:
    """Each sample that shows exactly one image, with the image's name; and how many were left out, by reason.

    `name_image` may raise `SkipSample`.
    """
    found: list[tuple[Sample, str]] = []
    left_out: Counter[str] = Counter()
    for index in range(len(source)):
        try:
            sample = source[index]
            images = sample.images()
            if len(images) == 1 and isinstance(sample, Sample):
                found.append((sample, name_image(images[0])))
            else:
                left_out["several images" if images else "no image"] += 1
        except SkipSample as skip:
            left_out[skip.reason.value] += 1
    return found, left_out


def image_digest(image: ImagePart, limits: ImageLimits) -> str:
    """Digest of the image's bytes.

    Raises:
        SkipSample: it cannot be read or decoded.
    """
    data = image.read(limits.max_bytes)
    open_image(data, limits)
    return sha256(data).hexdigest()


def _print_left_out(left_out: Counter[str], num_records: int) -> None:
    if left_out:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(left_out.items()))
        print(f"left out  {left_out.total()} of {num_records} records: {reasons}")


def _text(turn: Turn) -> str:
    return "".join(part.text for part in turn.parts if isinstance(part, TextPart))


def question_rows(samples: Sequence[tuple[Sample, str]]) -> list[Row]:
    """Every question with its image and answer."""
    rows: list[Row] = []
    for sample, image in samples:
        talk = [turn for turn in sample.turns if turn.role != "system"]
        for asked, answered in zip(talk[::2], talk[1::2], strict=True):
            rows.append((image, _text(asked).strip(), _text(answered)))
    return rows


def ambiguous_rows(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """`count` rows, each with an image of its own, whose question occurs with at least two answers among them.

    Raises:
        ValueError: there are too few, or `count` is below 2.
    """
    if count < 2:
        raise ValueError(f"questions: expected at least 2, as one alone has one answer, got {count}; ask for more")
    by_question: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_question[row[1]].append(row)
    groups = [group for group in by_question.values() if len({row[2] for row in group}) > 1]
    random.Random(seed).shuffle(groups)
    chosen: list[Row] = []
    taken: set[str] = set()
    for group in groups:
        by_answer = {row[2]: row for row in group if row[0] not in taken}
        if len({row[0] for row in by_answer.values()}) < len(by_answer):
            continue
        room = count - len(chosen)
        fitting = list(by_answer.values())[:room]
        if room - len(fitting) == 1:
            # Leaves room for two: a place for one is a place for none.
            fitting.pop()
        # The text of a question that stands once gives its answer away.
        if len(fitting) > 1:
            chosen += fitting
            taken |= {row[0] for row in fitting}
        if len(chosen) == count:
            return chosen
    raise ValueError(f"questions: expected {count} with several answers, got {len(chosen)}; ask for fewer")


def llava_record(name: str, row: Row, image: str) -> dict[str, object]:
    """One single-question conversation."""
    talk = [{"from": "human", "value": f"<image>\n{row[1]}"}, {"from": "gpt", "value": row[2]}]
    return {"id": name, "image": image, "conversations": talk}


def split(args: argparse.Namespace) -> None:
    """Write right.json, shuffled.json and their data files."""
    source = questions(args.file, args.image_root)
    samples, left_out = usable_samples(source, lambda image: image.key)
    _print_left_out(left_out, len(source))
    rows = ambiguous_rows(question_rows(samples), args.num, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    records = {
        "right": [llava_record(f"{index}", row, row[0]) for index, row in enumerate(rows)],
        "shuffled": [
            llava_record(f"{index}-{other}", row, image)
            for index, row in enumerate(rows)
            for other, (image, _, _) in enumerate(rows)
        ],
    }
    for name, content in records.items():
        (args.out / f"{name}.json").write_text(json.dumps(content))
        (args.out / f"{name}.toml").write_text(
            f'[[sources]]\nname = "{name}"\nformat = "llava-json"\npath = "{name}.json"\n'
            f'image_root = "{args.image_root.resolve()}"\n'
        )
    print(f"{len(rows)} questions, {len({row[1] for row in rows})} different ones, in {args.out}")


def _item(sample: Sample, image: ImagePart) -> EvalItem:
    turns: list[Turn] = []
    for turn in sample.turns[:-1]:
        parts = tuple(image if isinstance(part, ImagePart) else part for part in turn.parts)
        turns.append(Turn(role=turn.role, parts=parts))
    return EvalItem(group="all", prompt=replace(sample, turns=tuple(turns)), answer=_text(sample.turns[-1]))


def other_images(samples: Sequence[tuple[Sample, str]], seed: int) -> list[ImagePart]:
    """For each sample an image of another name: the different ones stand in a circle, and each takes the next.

    Raises:
        ValueError: all samples show the same image.
    """
    images = {name: sample.images()[0] for sample, name in samples}
    circle = sorted(images)
    if len(circle) < 2:
        raise ValueError(f"images: expected at least two different ones, got {len(circle)}; give a larger file")
    random.Random(seed).shuffle(circle)
    after = dict(zip(circle, [*circle[1:], circle[0]], strict=True))
    return [images[after[name]] for _, name in samples]


def compare(args: argparse.Namespace) -> None:
    """Print accuracy with right and with shuffled images, and their paired difference."""
    loaded = load_model(args.checkpoint)
    source = questions(args.file, args.image_root)
    samples, left_out = usable_samples(source, lambda image: image_digest(image, loaded.processor.limits))
    _print_left_out(left_out, len(source))
    others = other_images(samples, args.seed)
    correct: dict[str, list[bool]] = {}
    for name, pictures in (("right", [sample.images()[0] for sample, _ in samples]), ("shuffled", others)):
        items = [_item(sample, picture) for (sample, _), picture in zip(samples, pictures, strict=True)]
        with tqdm(total=len(items), desc=name, unit="question", disable=None) as bar:
            predictions = predict(
                loaded.model,
                loaded.processor,
                items,
                lambda item, said: exact_match(said, item.answer),
                on_progress=bar.update,
            )
        correct[name] = [prediction.is_correct for prediction in predictions]
        print(f"{name:<9} {sum(correct[name]) / len(items):.1%} of {len(items)}")
    difference = paired_difference(correct["right"], correct["shuffled"])
    print(f"difference {difference.difference:+.1%}, 95 % interval [{difference.low:+.1%}, {difference.high:+.1%}]")


def main() -> None:
    """Parse the command line and run one of the two."""
    parser = argparse.ArgumentParser(prog="image_reliance", description="Does a model look at its images?")
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("split", help="write right.toml and shuffled.toml")
    make.add_argument("file", type=Path, help="LLaVA JSON")
    make.add_argument("--out", type=Path, required=True)
    make.add_argument("--num", type=int, default=32, help="questions")
    make.set_defaults(run=split)
    ask = commands.add_parser("compare", help="ask with right and with shuffled images")
    ask.add_argument("checkpoint", type=Path)
    ask.add_argument("file", type=Path, help="LLaVA JSON, or one question with its answer a record")
    ask.set_defaults(run=compare)
    for command in (make, ask):
        command.add_argument("--image-root", type=Path, required=True)
        command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
