"""The full model's benchmark: what it counts, and that both ways to weights give the same model."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from anyres_tiler import TilingConfig
from blip3_lite import Blip3Config
from perceiver_resampler import ResamplerConfig
from phi3_lite import Phi3Config
from siglip_lite import SiglipVisionConfig

TINY = Blip3Config(
    vision=SiglipVisionConfig(
        image_px=16, patch_px=8, width=16, num_layers=1, num_heads=2, mlp_width=24, use_head=False
    ),
    connector=ResamplerConfig(dim=16, dim_out=32, depth=1, num_heads=2, head_dim=8, num_latents=3, ff_mult=2),
    lm=Phi3Config(vocab_size=64, width=32, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=32, sliding_window=8),
    tiling=TilingConfig(tile_px=16),
)


@pytest.fixture
def bench(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repo_root / "tools"))
    module = importlib.import_module("bench_release")
    monkeypatch.setattr(module, "_COPY_BYTES", 1 << 20)
    return module


def settings(bench: ModuleType, kind: str, folder: Path | None = None):
    return bench.Settings(kind=kind, cfg=TINY, folder=folder, tiles=2, new=4, threads=1)


def test_bytes_a_token_are_those_of_the_weights_and_of_the_window(bench: ModuleType) -> None:
    # numbers in the matrices of a layer: qkv 64 × 32, o 32 × 32, gate and up 64 × 32, down 32 × 32
    matrices, norms, head = 2 * (192 * 32), 5 * 32, 64 * 32
    cache = 2 * 2 * 16 * 8
    model = bench.load(settings(bench, "bf16")).lang_model
    assert bench.bytes_per_token(model, 100) == 2 * (matrices + norms + head + cache)
    # int8: a byte a weight, a bf16 scale a row; int4: half a byte, and 4 bytes a group of 32, in whole blocks of rows
    model = bench.load(settings(bench, "int8")).lang_model
    assert bench.bytes_per_token(model, 100) == matrices + 2 * 2 * 192 + head + 2 * 64 + 2 * (norms + cache)


def test_measurement_agrees_with_itself(bench: ModuleType) -> None:
    found = bench.measure(settings(bench, "int4"))
    assert found.share == pytest.approx(found.bytes_per_token * found.tokens_per_s / found.copy_bytes_per_s)
    assert 0 < found.image_s < found.first_token_s
    assert min(found.load_s, found.tokens_per_s, found.peak_bytes) > 0


def test_weights_from_files_are_those_made_up(bench: ModuleType, tmp_path: Path) -> None:
    bench.write_checkpoint(TINY, tmp_path / "weights")
    models = [bench.load(settings(bench, "int4", folder)) for folder in (None, tmp_path / "weights")]
    for first, second in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(first, second)
