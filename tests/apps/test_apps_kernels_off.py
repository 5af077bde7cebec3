"""The demo's model learns the same whichever backends run: same checkpoint, same data, same losses.

uv run pytest -n 0 -m nightly tests/apps/test_apps_kernels_off.py --figures benchmarks/results/kernels_off.jsonl
"""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

import fused_kernels.dispatch
from blip3_lite import Blip3, Blip3Config, Processor, collate


@pytest.fixture
def app(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """The modules of the training app, which stand outside every package."""
    monkeypatch.syspath_prepend(str(repo_root / "apps" / "train"))
    import train_recipes
    import train_world

    return train_recipes, train_world


def _packs(cfg: Blip3Config, world, count: int, samples_per_pack: int) -> list:
    processor = Processor(cfg, world.world_tokenizer(cfg.lm.vocab_size))
    (source,) = world.stage_data("sft", count * samples_per_pack, 0).sources
    encoded = [processor.encode(source[index]) for index in range(count * samples_per_pack)]
    return [collate(encoded[start::count]) for start in range(count)]


def _losses(cfg: Blip3Config, packs: Sequence, weights: dict[str, torch.Tensor], num_steps: int) -> list[float]:
    model = Blip3(cfg)
    model.load_state_dict(weights)
    model.vision_encoder.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    losses: list[float] = []
    for step in range(num_steps):
        pack = packs[step % len(packs)]
        loss = model.loss_sum(pack) / pack.num_targets
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _check(cfg: Blip3Config, packs: Sequence, num_steps: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    weights = Blip3(cfg, generator=torch.Generator().manual_seed(0)).state_dict()
    fast = _losses(cfg, packs, weights, num_steps)
    asked: list[str] = []

    def reference(self, *asked_for):
        asked.append(self.name)
        return [self.backends["reference"]]

    monkeypatch.setattr(fused_kernels.dispatch.Op, "_all_able", reference)
    plain = _losses(cfg, packs, weights, num_steps)
    assert {"rms_norm", "packed_attention", "rotary_embedding", "linear_cross_entropy", "attention"} <= set(asked)
    # fp32: rounding grows from step to step, to 6e-6 at 50; a wrong gradient shows in the first few
    torch.testing.assert_close(torch.tensor(fast), torch.tensor(plain), rtol=1e-4, atol=0.0)
    assert fast[-1] < 0.8 * fast[0]
    apart = [abs(own - other) / other for own, other in zip(fast, plain, strict=True)]
    return {
        "steps": num_steps,
        "first_loss": fast[0],
        "last_loss": fast[-1],
        "largest_relative_difference_of_10_steps": max(apart[:10]),
        "largest_relative_difference": max(apart),
    }


def test_losses_of_12_steps_are_the_same_with_kernels_on_and_off(app, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes, world = app
    demo = recipes.demo_model()
    cfg = msgspec.structs.replace(
        demo,
        vision=msgspec.structs.replace(demo.vision, num_layers=1),
        lm=msgspec.structs.replace(demo.lm, num_layers=1),
    )
    _check(cfg, _packs(cfg, world, 3, 1), 12, monkeypatch)


@pytest.mark.nightly
def test_the_demos_losses_of_50_steps_are_the_same_with_kernels_on_and_off(app, figures, monkeypatch) -> None:
    recipes, world = app
    figures(**_check(recipes.demo_model(), _packs(recipes.demo_model(), world, 10, 12), 50, monkeypatch))
