"""The preference objective on a whole model: order of answers, repeated pairs, settings."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lora_lite
from blip3_lite import collate
from dpo_lite import DpoConfig
from interleave_data import PreferenceSample, TextPart, Turn

ADAPTERS = lora_lite.LoraConfig(rank=2, alpha=4, targets=("qkv_proj", "o_proj"))
ANSWERS = [("red", "green"), ("a blue square", "no"), ("green", "what is red?")]


@pytest.fixture
def objectives(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """The app's module, which stands outside every package."""
    monkeypatch.syspath_prepend(str(repo_root / "apps" / "train"))
    import train_objectives

    return train_objectives


@pytest.fixture
def pairs(objectives, tiny_processor):
    """Encoded pairs without images."""
    turns = (Turn("user", (TextPart("what colour?"),)),)
    samples = [PreferenceSample(str(i), "toy", turns, *answers) for i, answers in enumerate(ANSWERS)]
    return [objectives.SamplePair(*tiny_processor.encode_preference(sample)) for sample in samples]


def log_prob(model, sample) -> float:
    """Of one answer alone, from all logits."""
    pack = collate([sample])
    logits = F.linear(model(pack), model.lang_model.head_weight, model.lang_model.head_bias)
    return -F.cross_entropy(logits, pack.targets, ignore_index=-100, reduction="sum").item()


@torch.no_grad()
def test_preference_loss_is_the_formula_over_answers_one_by_one(objectives, pairs, tiny_model) -> None:
    lora_lite.attach(tiny_model.lang_model, ADAPTERS)
    objective = objectives.Preference(tiny_model, DpoConfig(beta=0.7, label_smoothing=0.2))
    # The first pair comes twice, as it does where a source is smaller than a pack.
    order = [0, 1, 2, 0]
    documents = [document for i in order for document in pairs[i].documents]
    digests = [objectives.sample_digest(document) for document in documents]
    batch = objectives.PairPack([f"toy/{i}" for i in order], collate(documents), digests)
    before = [(log_prob(tiny_model, pair.chosen), log_prob(tiny_model, pair.rejected)) for pair in pairs]
    first = objective.loss(batch)
    assert first.total.item() == pytest.approx(4 * math.log(2), rel=1e-5)
    for parameter in lora_lite.lora_parameters(tiny_model.lang_model):
        parameter.normal_(std=0.3)
    after = [(log_prob(tiny_model, pair.chosen), log_prob(tiny_model, pair.rejected)) for pair in pairs]
    margins = [0.7 * ((new[0] - old[0]) - (new[1] - old[1])) for new, old in zip(after, before, strict=True)]
    losses = [0.8 * math.log1p(math.exp(-m)) + 0.2 * math.log1p(math.exp(m)) for m in margins]
    second = objective.loss(batch)
    assert max(map(abs, margins)) > 0.01
    assert second.total.item() == pytest.approx(sum(losses[i] for i in order), rel=1e-4)
    assert second.parts["reward_margin"] == pytest.approx(sum(margins[i] for i in order), rel=1e-3, abs=1e-4)
    assert second.parts["reward_accuracy"] == sum(margins[i] > 0 for i in order)
    ratios = [[new[side] - old[side] for new, old in zip(after, before, strict=True)] for side in (0, 1)]
    assert second.parts["log_ratio_chosen"] == pytest.approx(sum(ratios[0][i] for i in order), abs=1e-4)
    assert second.parts["log_ratio_rejected"] == pytest.approx(sum(ratios[1][i] for i in order), abs=1e-4)
    squares = sum(ratios[side][i] ** 2 for i in order for side in (0, 1))
    # The mean over 8 answers of half a square, times 4 pairs.
    assert second.parts["kl"] == pytest.approx(squares / 4, rel=1e-3)
