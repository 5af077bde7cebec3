"""Preference pairs from questions with answers: the right answer against the right answer about another picture.

    uv run tools/make_pairs.py shared/data/daquar/train.json pairs.jsonl

Reads LLaVA's layout (conversations) or rows of question and answer; writes `preference-jsonl`, one question a line. The
answer to avoid is one to a question that begins with the same two words, about another picture: what a language model
without eyes would say too. Where no such question has another answer, any other picture's answer is taken. Such pairs
are constructed, and nobody's preferences.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any, NamedTuple


class Asked(NamedTuple):
    """A question about a picture, with the right answer."""

    image: str
    question: str
    answer: str

    @property
    def kind(self) -> str:
        """The first two words."""
        return " ".join(self.question.lower().split()[:2])


def read_questions(rows: list[dict[str, Any]]) -> list[Asked]:
    """All questions of the rows, in order."""
    found: list[Asked] = []
    for row in rows:
        if "conversations" not in row:
            found.append(Asked(row["image"], row["question"], row["answer"]))
            continue
        texts = [turn["value"].replace("<image>", "").strip() for turn in row["conversations"]]
        found += [Asked(row["image"], *texts[place : place + 2]) for place in range(0, len(texts) - 1, 2)]
    return found


def make_pairs(asked: list[Asked], rng: random.Random) -> list[dict[str, str]]:
    """One pair a question; a question for which no other answer is found has none."""
    by_kind: dict[str, list[Asked]] = {}
    for one in asked:
        by_kind.setdefault(one.kind, []).append(one)
    pairs: list[dict[str, str]] = []
    for one in asked:
        for others in (by_kind[one.kind], asked):
            rivals = [other for other in others if other.image != one.image and other.answer != one.answer]
            if rivals:
                rejected = rng.choice(rivals).answer
                pairs.append({"image": one.image, "prompt": one.question, "chosen": one.answer, "rejected": rejected})
                break
    return pairs


def main() -> None:
    """Read, pair, write."""
    parser = argparse.ArgumentParser(prog="make_pairs", description="Preference pairs from questions with answers.")
    parser.add_argument("questions", type=Path, help="JSON file of LLaVA's layout, or of questions and answers")
    parser.add_argument("pairs", type=Path, help="file to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pairs = make_pairs(read_questions(json.loads(args.questions.read_text())), random.Random(args.seed))
    args.pairs.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    print(f"{len(pairs)} pairs in {args.pairs}")


if __name__ == "__main__":
    main()
