"""Reward accuracy of a preference-tuned checkpoint on pairs that it was not trained on.

    uv run apps/train/train_reward_accuracy.py POLICY --reference START --data pairs.toml [--json FILE]
    uv run apps/train/train_reward_accuracy.py POLICY --reference START --world 2000 [--own-errors]

A pair counts as right if log π(chosen) - log r(chosen) is above log π(rejected) - log r(rejected), π being the policy
and r the checkpoint that it was trained from. The interval is Wilson's, 95 %. `--world`: presence questions of the
embedded world's held-out split, the other of yes and no being rejected; with `--own-errors` only those that r answers
wrongly, its answer, drawn as for the training, being rejected. Accuracy with the pictures exchanged among the pairs
stands beside: what the text alone decides.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from blip3_lite import Blip3, LoadedModel, Processor, collate
from blip3_lite.opening import open_model
from dpo_lite import split_pairs
from interleave_data import (
    ImagePart,
    PreferenceSample,
    SkipCounter,
    SkipReason,
    SkipSample,
    load_data_file,
    open_sources,
)
from scene_world import World
from train_objectives import answer_log_probs
from train_stages import merge_adapters
from train_stream import StageData, base_view_processor
from train_world import Drawers, WorldSource
from vlm_metrics import bootstrap_interval, wilson_interval

_PAIRS_AT_A_TIME = 16


def load_merged(path: Path) -> tuple[Blip3, Processor]:
    """A checkpoint's model with its adapters merged; exits if it is not a whole model."""
    loaded = open_model(path, dtype=torch.float32)
    if not isinstance(loaded, LoadedModel):
        sys.exit(f"{path}: expected a whole model, got a language model alone; name a checkpoint of apps/train")
    if loaded.config.lora is not None:
        merge_adapters(loaded.model)
    return loaded.model.eval().requires_grad_(False), loaded.processor


def read_pairs(path: str) -> list[PreferenceSample]:
    """All pairs of a data file that can be read; says how many samples cannot, and stops at the file's limits."""
    file = load_data_file(path)
    skips, found = SkipCounter(file.skip_limits), list[PreferenceSample]()
    for source in open_sources(file):
        for index in range(len(source)):
            try:
                sample = source[index]
                if not isinstance(sample, PreferenceSample):
                    raise SkipSample(SkipReason.BAD_RECORD, "expected a preference pair, got another kind")
            except SkipSample as skip:
                skips.skip(source.name, SkipSample(skip.reason, skip.detail, skip.where or f"{source.name}:{index}"))
                continue
            skips.keep(source.name)
            found.append(sample)
    if skips.by_reason():
        left_out = ", ".join(f"{reason} {count}" for reason, count in skips.by_reason().items())
        print(f"left out: {left_out}", file=sys.stderr)
    return found


def world_pairs(
    count: int, seed: int, reference: Blip3, processor: Processor, *, are_own_errors: bool
) -> list[PreferenceSample]:
    """Held-out presence questions; of own errors, those that the reference answers wrongly."""
    drawers = Drawers(World(seed, "heldout"))
    if not are_own_errors:
        source = WorldSource("preferences", count, drawers.preference, f"seed {seed}")
        return [sample for sample in (source[index] for index in range(count)) if isinstance(sample, PreferenceSample)]
    from tempfile import TemporaryDirectory

    from train_pairs import own_errors
    from trainer_lite import QuietProgress

    with TemporaryDirectory() as folder:
        path = Path(folder) / "errors.jsonl"
        source = WorldSource("presence", count, drawers.presence, f"seed {seed}")
        made = own_errors(StageData([source]), count, reference, processor, None, path, QuietProgress(), seed=seed)
    errors = made.sources[0]
    return [sample for sample in (errors[i] for i in range(len(errors))) if isinstance(sample, PreferenceSample)]


def exchanged(pairs: Sequence[PreferenceSample]) -> list[PreferenceSample]:
    """The same texts, each with the pictures of the pair that stands half of them further on."""
    found: list[PreferenceSample] = []
    for place, pair in enumerate(pairs):
        pictures = pairs[(place + len(pairs) // 2) % len(pairs)].images()
        turns = tuple(
            replace(turn, parts=(*pictures, *(part for part in turn.parts if not isinstance(part, ImagePart))))
            if any(isinstance(part, ImagePart) for part in turn.parts)
            else turn
            for turn in pair.turns
        )
        found.append(replace(pair, turns=turns))
    return found


@torch.no_grad()
def margins(policy: Blip3, reference: Blip3, processor: Processor, pairs: Sequence[PreferenceSample]) -> list[float]:
    """Log-ratio of the chosen answer less that of the rejected one, pair by pair."""
    found: list[float] = []
    for start in range(0, len(pairs), _PAIRS_AT_A_TIME):
        samples = [
            part for pair in pairs[start : start + _PAIRS_AT_A_TIME] for part in processor.encode_preference(pair)
        ]
        pack = collate(samples)
        ratios = answer_log_probs(policy, pack) - answer_log_probs(reference, pack)
        chosen, rejected = split_pairs(ratios)
        found += (chosen - rejected).tolist()
    return found


def accuracy(found: Sequence[float], pairs: Sequence[PreferenceSample]) -> dict[str, float]:
    """Share of margins above 0. Where several pairs are about one picture, the interval takes pictures as drawn."""
    by_picture: dict[tuple[str, ...], list[bool]] = {}
    for margin, pair in zip(found, pairs, strict=True):
        by_picture.setdefault(tuple(image.key for image in pair.images()), []).append(margin > 0)
    right = sum(margin > 0 for margin in found)
    low, high = wilson_interval(right, len(found))
    if len(by_picture) < len(found):
        groups = list(by_picture.values())
        _, low, high, _ = bootstrap_interval(
            groups, random.Random(0), statistic=lambda drawn: sum(map(sum, drawn)) / sum(map(len, drawn))
        )
    return {"value": right / len(found), "low": low, "high": high, "n": len(found), "pictures": len(by_picture)}


def main() -> None:
    """Load both, compare, print."""
    parser = argparse.ArgumentParser(prog="train_reward_accuracy", description="Reward accuracy on held-out pairs.")
    parser.add_argument("policy", help="checkpoint")
    parser.add_argument("--reference", required=True, help="checkpoint that the policy was trained from")
    pairs_from = parser.add_mutually_exclusive_group(required=True)
    pairs_from.add_argument("--data", help="data file of pairs")
    pairs_from.add_argument("--world", type=int, help="so many held-out questions of the embedded world")
    parser.add_argument("--own-errors", action="store_true", help="of the world, those that the reference gets wrong")
    parser.add_argument("--views", choices=["tiles", "base"], default="tiles", help="as in the training")
    parser.add_argument("--seed", type=int, default=99, help="of the world")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    (policy, processor), (reference, _) = load_merged(Path(args.policy)), load_merged(Path(args.reference))
    if args.views == "base":
        processor = base_view_processor(processor)
    if args.data is not None:
        pairs = read_pairs(args.data)
    else:
        pairs = world_pairs(args.world, args.seed, reference, processor, are_own_errors=args.own_errors)
    if not pairs:
        sys.exit("pairs: expected at least one, got none; check the data file")
    result = {
        "reward_accuracy": accuracy(margins(policy, reference, processor, pairs), pairs),
        "with_exchanged_pictures": accuracy(margins(policy, reference, processor, exchanged(pairs)), pairs),
    }
    for name, figures in result.items():
        print(f"{name}: {figures['value']:.1%} [{figures['low']:.1%}, {figures['high']:.1%}], n = {figures['n']}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
