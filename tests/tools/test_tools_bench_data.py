"""The data benchmark: what it counts, and that it compares pixels."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def bench(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repo_root / "tools"))
    return importlib.import_module("bench_data")


def test_first_batch_is_not_counted(bench: ModuleType) -> None:
    assert bench.timed(iter([1000, 3, 4])).tokens == 7
    with pytest.raises(SystemExit, match="two batches"):
        bench.timed(iter([1000]))


@pytest.mark.parametrize("way", ["torchvision", "pil"])
def test_other_pixels_are_refused(bench: ModuleType, tmp_path: Path, monkeypatch, way: str) -> None:
    pytest.importorskip("torchvision")
    bench.write_tars(tmp_path, num_shards=1, samples_per_shard=2)
    monkeypatch.setattr(bench, "write_tars", lambda *_, **__: None)
    settings = bench.prepare([], None, tmp_path)
    assert bench.unlike_pixels(way, settings)["largest"] <= (1 if way == "torchvision" else 2)
    peers = bench.image_processor(way, settings.model)

    def brighter(images, **options):
        return {"pixel_values": torch.as_tensor(peers(images, **options)["pixel_values"]) + 3 / 127.5}

    monkeypatch.setattr(bench, "image_processor", lambda *_: brighter)
    with pytest.raises(SystemExit, match="expected the same pixels within 1/255"):
        bench.unlike_pixels(way, settings)


def test_a_peer_that_is_missing_is_named(bench: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"expected no_such_peer to be installed.*pip install --target FOLDER"):
        bench.imported("no_such_peer")
