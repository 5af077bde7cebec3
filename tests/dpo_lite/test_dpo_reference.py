"""The reference cache: exact, strict about ids and fingerprint."""

import math

import pytest
import torch

from dpo_lite import ReferenceCache, ReferenceCacheError


def filled(fingerprint="model 1"):
    cache = ReferenceCache(fingerprint)
    cache.put(["a", "b"], torch.tensor([-1.1, -2.2]), torch.tensor([-3.3, -4.4]))
    return cache


def test_values_come_back_in_the_order_asked():
    chosen, rejected = filled().get(["b", "a", "b"])
    assert torch.equal(chosen, torch.tensor([-2.2, -1.1, -2.2]))
    assert torch.equal(rejected, torch.tensor([-4.4, -3.3, -4.4]))
    assert chosen.dtype == torch.float32


def test_values_survive_the_file_bit_for_bit(tmp_path):
    cache = ReferenceCache("model 1")
    ids = [f"sample {i} é" for i in range(200)]
    chosen, rejected = -1000 * torch.rand(200), -1e-6 * torch.rand(200)
    cache.put(ids, chosen, rejected)
    cache.save(tmp_path / "cache.json")
    back = ReferenceCache.load(tmp_path / "cache.json", fingerprint="model 1")
    assert len(back) == 200
    assert torch.equal(torch.stack(back.get(ids)), torch.stack([chosen, rejected]))
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]


def test_missing_ids_are_named():
    cache = filled()
    assert cache.missing(["a", "z", "y"]) == ["z", "y"]
    assert "a" in cache
    with pytest.raises(ReferenceCacheError, match=r"got 2 without, the first \['z', 'y'\]"):
        cache.get(["a", "z", "y"])


def test_other_fingerprint_is_refused(tmp_path):
    filled().save(tmp_path / "cache.json")
    with pytest.raises(ReferenceCacheError, match=r"expected 'model 2', got 'model 1'"):
        ReferenceCache.load(tmp_path / "cache.json", fingerprint="model 2")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"format": 1}',
        b"\xff\xfe",
        b'{"format":1,"fingerprint":"","x":1}',
        b'{"format":1,"fingerprint":"\xff","log_probs":{}}',
    ],
)
def test_file_that_is_no_cache_is_refused(tmp_path, content):
    (tmp_path / "cache.json").write_bytes(content)
    with pytest.raises(ReferenceCacheError, match=r"cache\.json: expected a file written by"):
        ReferenceCache.load(tmp_path / "cache.json", fingerprint="model 1")


def test_other_format_is_refused(tmp_path):
    (tmp_path / "cache.json").write_bytes(b'{"format": 2, "fingerprint": "model 1", "log_probs": {}}')
    with pytest.raises(ReferenceCacheError, match="expected 1, got 2"):
        ReferenceCache.load(tmp_path / "cache.json", fingerprint="model 1")


def test_values_that_are_not_finite_are_refused_and_nothing_is_kept():
    cache = filled()
    with pytest.raises(ReferenceCacheError, match="of 'd': expected finite values"):
        cache.put(["c", "d"], torch.tensor([0.0, math.nan]), torch.zeros(2))
    assert "c" not in cache


def test_an_id_given_twice_is_refused_and_nothing_is_kept():
    cache = filled()
    with pytest.raises(ReferenceCacheError, match=r"expected each once, got 1 again, the first \['c'\]"):
        cache.put(["c", "d", "c"], torch.zeros(3), torch.zeros(3))
    assert "d" not in cache


def test_counts_that_differ_are_refused():
    with pytest.raises(ReferenceCacheError, match="expected 3 of each answer"):
        filled().put(["c", "d", "e"], torch.zeros(2), torch.zeros(2))


def test_no_ids_give_no_values():
    chosen, rejected = filled().get([])
    assert chosen.shape == rejected.shape == (0,)
