"""Perplexity of a text, against a loop over its tokens."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from phi3_lite import Phi3, Phi3Config


@pytest.fixture
def tool(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repo_root / "tools"))
    return importlib.import_module("perplexity")


def test_mean_nats_equal_a_loop_over_windows(tool: ModuleType) -> None:
    cfg = Phi3Config(vocab_size=40, width=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_width=16, init_std=0.3)
    model = Phi3(cfg).eval()
    ids = torch.randint(0, 40, (11,))
    expected: list[float] = []
    with torch.no_grad():
        for window in (ids[:5], ids[5:10]):
            for place in range(1, len(window)):
                before = window[:place]
                bounds = torch.tensor([0, place], dtype=torch.int32)
                last = model(model.embed(before), torch.arange(place), bounds)[-1]
                expected.append(-torch.log_softmax(model.head_weight @ last, -1)[window[place]].item())
    assert len(expected) == 8
    assert tool.mean_nats(model, ids, 5) == pytest.approx(sum(expected) / 8, abs=1e-5)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        tool.mean_nats(model, ids[:1], 5)
