"""The reference cache: exact, strict about what it holds and fingerprint."""

import math

import pytest
import torch

from dpo_lite import ReferenceCache, ReferenceCacheError, answer_digest


def filled(fingerprint="model 1"):
    cache = ReferenceCache(fingerprint)
    cache.put(["a", "b"], torch.tensor([-1.1, -2.2]))
    return cache


def test_values_come_back_in_the_order_asked():
    found = filled().get(["b", "a", "b"])
    assert torch.equal(found, torch.tensor([-2.2, -1.1, -2.2]))
    assert found.dtype == torch.float32


def test_an_answer_that_is_there_keeps_its_value():
    # In another pack the same sequence may round otherwise.
    cache = filled()
    cache.put(["c", "a", "c"], torch.tensor([-5.0, -9.0, -6.0]))
    assert torch.equal(cache.get(["a", "c"]), torch.tensor([-1.1, -5.0]))


def test_digest_tells_tokens_targets_and_pictures_apart():
    ids, targets = torch.tensor([3, 4, 5]), torch.tensor([-100, 5, 1])
    other = torch.tensor([3, 4, 6])
    digests = [
        answer_digest(ids, targets),
        answer_digest(other, targets),
        answer_digest(ids, other),
        answer_digest(torch.tensor([3, 4]), torch.tensor([5, -100])),
        answer_digest(ids, targets, ["a", "b"]),
        answer_digest(ids, targets, ["ab"]),
        answer_digest(ids, targets, ["b", "a"]),
    ]
    assert len(set(digests)) == len(digests)
    assert answer_digest(ids.clone(), targets.clone(), iter(["a", "b"])) == digests[4]


def test_values_survive_the_file_bit_for_bit(tmp_path):
    cache = ReferenceCache("model 1")
    ids = [f"sample {i} é" for i in range(200)]
    values = torch.cat([-1000 * torch.rand(100), -1e-6 * torch.rand(100)])
    cache.put(ids, values)
    cache.save(tmp_path / "cache.json")
    back = ReferenceCache.load(tmp_path / "cache.json", fingerprint="model 1")
    assert len(back) == 200
    assert torch.equal(back.get(ids), values)
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
    (tmp_path / "cache.json").write_bytes(b'{"format": 1, "fingerprint": "model 1", "log_probs": {}}')
    with pytest.raises(ReferenceCacheError, match="expected 2, got 1"):
        ReferenceCache.load(tmp_path / "cache.json", fingerprint="model 1")


def test_values_that_are_not_finite_are_refused_and_nothing_is_kept():
    cache = filled()
    with pytest.raises(ReferenceCacheError, match="of 'd': expected a finite value"):
        cache.put(["c", "d"], torch.tensor([0.0, math.nan]))
    assert "c" not in cache


def test_counts_that_differ_are_refused():
    with pytest.raises(ReferenceCacheError, match="expected 3, one a digest, got 2"):
        filled().put(["c", "d", "e"], torch.zeros(2))


def test_no_ids_give_no_values():
    assert filled().get([]).shape == (0,)
