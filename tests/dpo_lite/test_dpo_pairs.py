"""Pairs as packed documents: order, sums."""

import pytest
import torch

from dpo_lite import sequence_log_probs, side_by_side, split_pairs


def test_pairs_stand_side_by_side():
    assert side_by_side([("a+", "a-"), ("b+", "b-"), ("c+", "c-")]) == ["a+", "a-", "b+", "b-", "c+", "c-"]
    assert side_by_side([]) == []


@pytest.mark.parametrize("num_pairs", [0, 1, 3])
def test_split_undoes_the_order(num_pairs):
    documents = side_by_side([(10.0 * pair, -10.0 * pair) for pair in range(num_pairs)])
    chosen, rejected = split_pairs(torch.tensor(documents))
    assert chosen.tolist() == [10 * pair for pair in range(num_pairs)]
    assert rejected.tolist() == [-10 * pair for pair in range(num_pairs)]


def test_half_a_pair_is_refused():
    with pytest.raises(ValueError, match="expected an even number, two for each pair, got 3"):
        split_pairs(torch.zeros(3))


def test_sequence_log_probs_sum_each_document():
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    sums = sequence_log_probs(values, torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    assert sums.tolist() == [3, 0, 28]
    (grad,) = torch.autograd.grad(sums, values, torch.tensor([1.0, 10.0, 100.0]))
    assert grad.tolist() == [1, 1, 100, 100, 100]


def test_sequence_log_probs_refuses_other_boundaries():
    with pytest.raises(ValueError, match="expected 4, the last boundary, got 5"):
        sequence_log_probs(torch.zeros(5), torch.tensor([0, 2, 4], dtype=torch.int32))


def test_packed_log_probs_are_those_of_each_answer_alone():
    from fused_kernels import linear_log_probs

    # (ids, labels) of each answer; -100 where nothing is to be predicted
    pairs = [
        (([5, 6, 7], [-100, 6, 7]), ([5, 8], [-100, 8])),
        (([9, 1], [-100, 1]), ([9, 2, 3, 4], [-100, 2, 3, 4])),
    ]
    documents = side_by_side(pairs)
    ids, labels = (torch.tensor([token for document in documents for token in document[part]]) for part in (0, 1))
    cu_seqlens = torch.tensor([0, 3, 5, 7, 11], dtype=torch.int32)
    embedding, head = torch.randn(10, 6), torch.randn(10, 6)
    packed = linear_log_probs(embedding[ids], head, labels)
    found = torch.stack(split_pairs(sequence_log_probs(packed, cu_seqlens)), dim=1)
    for pair, row in zip(pairs, found, strict=True):
        for (answer, targets), got in zip(pair, row, strict=True):
            log_probs = torch.log_softmax(embedding[answer] @ head.t(), dim=-1)
            expected = sum(log_probs[i, target] for i, target in enumerate(targets) if target != -100)
            torch.testing.assert_close(got, expected)
