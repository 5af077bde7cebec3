"""Decoding with a cache equals the model without one."""

import msgspec
import pytest
import torch

from phi3_lite import KVCache, Phi3, Phi3Config, stepping

pytestmark = pytest.mark.usefixtures("each_way")

TINY = Phi3Config(
    vocab_size=37, width=24, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=20, sliding_window=5, init_std=0.2
)
LENGTHS = [7, 1, 13, 4]
STEPS = 9


def _model(window: int | None = 5) -> Phi3:
    return Phi3(msgspec.structs.replace(TINY, sliding_window=window), generator=torch.Generator().manual_seed(3))


def _bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _rows(lengths: list[int]) -> list[torch.Tensor]:
    return [torch.randn(length, TINY.width) for length in lengths]


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("lengths", [LENGTHS, [6, 6, 6], [1]], ids=str)
def test_prefill_and_steps_equal_the_whole_sequence(block: int, window: int | None, lengths: list[int]) -> None:
    model = _model(window)
    full = _rows([length + STEPS for length in lengths])
    cache = model.new_cache(len(lengths), block=block)
    with torch.inference_mode():
        whole = [model(row) for row in full]
        hidden = model.prefill(
            torch.cat([row[:length] for row, length in zip(full, lengths, strict=True)]), _bounds(lengths), cache
        )
        for step in range(STEPS + 1):
            expected = torch.stack([row[length + step - 1] for row, length in zip(whole, lengths, strict=True)])
            torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
            assert cache.lengths.tolist() == [length + step for length in lengths]
            if step < STEPS:
                new = torch.stack([row[length + step] for row, length in zip(full, lengths, strict=True)])
                hidden = model.step(new, cache)
    assert cache.capacity % block == 0
    assert cache.longest <= cache.capacity < cache.longest + block


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(
    ("held", "new"),
    [([3, 9, 1], [5, 1, 7]), ([4, 4, 4], [5, 1, 7]), ([3, 9, 1], [6, 6, 6]), ([4, 4], [7, 7]), ([3], [1])],
    ids=str,
)
def test_prefill_onto_held_rows_equals_one_prefill(window: int | None, held: list[int], new: list[int]) -> None:
    model = _model(window)
    first, second = _rows(held), _rows(new)
    whole, parts = model.new_cache(len(held)), model.new_cache(len(held), block=4)
    totals = [old + more for old, more in zip(held, new, strict=True)]
    with torch.inference_mode():
        joined = [torch.cat(pair) for pair in zip(first, second, strict=True)]
        expected = model.prefill(torch.cat(joined), _bounds(totals), whole)
        model.prefill(torch.cat(first), _bounds(held), parts)
        hidden = model.prefill(torch.cat(second), _bounds(new), parts)
        torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
        token = torch.randn(len(held), TINY.width)
        torch.testing.assert_close(model.step(token, parts), model.step(token, whole), rtol=0, atol=1e-5)
    assert (parts.longest, parts.shortest) == (whole.longest, whole.shortest) == (max(totals) + 1, min(totals) + 1)


def test_a_row_does_not_see_the_others() -> None:
    model = _model()
    rows, token = _rows(LENGTHS), torch.randn(len(LENGTHS), TINY.width)
    changed = [rows[0], *(row + 3 for row in rows[1:])]
    hidden = []
    with torch.inference_mode():
        for batch in (rows, changed):
            cache = model.new_cache(len(LENGTHS))
            first = model.prefill(torch.cat(batch), _bounds(LENGTHS), cache)
            hidden.append(torch.stack([first, model.step(token, cache)]))
    assert torch.equal(hidden[0][:, 0], hidden[1][:, 0])
    assert (hidden[0][:, 1:] != hidden[1][:, 1:]).any(dim=-1).all()


def test_select_keeps_rows_in_the_given_order_and_gives_blocks_back() -> None:
    model = _model()
    rows, token = _rows(LENGTHS), torch.randn(len(LENGTHS), TINY.width)
    cache, kept = (model.new_cache(len(LENGTHS), block=4) for _ in range(2))
    with torch.inference_mode():
        for each in (cache, kept):
            model.prefill(torch.cat(rows), _bounds(LENGTHS), each)
        order = torch.tensor([3, 0])
        expected = model.step(token, cache)[order]
        assert kept.capacity == 16
        kept.select(order)
        assert (kept.batch, kept.longest, kept.shortest, kept.capacity) == (2, 7, 4, 8)
        torch.testing.assert_close(model.step(token[order], kept), expected, rtol=0, atol=1e-6)


def test_rows_that_are_selected_twice_go_on_by_themselves() -> None:
    model, rows = _model(), _rows([3, 9])
    cache = model.new_cache(2)
    new = torch.randn(3, TINY.width)
    with torch.inference_mode():
        model.prefill(torch.cat(rows), _bounds([3, 9]), cache)
        cache.select(torch.tensor([1, 0, 1]))
        hidden = model.step(new, cache)
        expected = [model(torch.cat([rows[row], new[None, i]]))[-1] for i, row in enumerate([1, 0, 1])]
    torch.testing.assert_close(hidden, torch.stack(expected), rtol=0, atol=1e-5)


def test_a_bf16_model_writes_into_an_fp32_cache_as_into_its_own() -> None:
    model = _model().bfloat16()
    tokens, steps = torch.tensor([3, 5, 7, 9, 2, 8]), []
    for dtype in (torch.bfloat16, torch.float32):
        cache = KVCache(model.cfg, 2, dtype=dtype)
        with torch.inference_mode():
            model.prefill(model.embed(tokens), _bounds([2, 4]), cache)
            steps.append(model.next_logits(tokens[:2], cache)[0].float())
    torch.testing.assert_close(*steps, rtol=0, atol=2e-2)


def test_a_head_that_lies_by_columns_gives_the_same_logits() -> None:
    model, tokens, steps = _model(), torch.tensor([3, 5, 7, 9, 2, 8]), []
    for _ in range(2):
        cache = model.new_cache(2)
        with torch.inference_mode():
            model.prefill(model.embed(tokens), _bounds([2, 4]), cache)
            logits, likeliest = model.next_logits(tokens[:2], cache)
        steps.append(logits)
        weight = model.head_weight
        weight.data = weight.data.t().contiguous().t()
    assert likeliest is None, "layers by one call, the head by PyTorch"
    torch.testing.assert_close(*steps, rtol=0, atol=1e-5)


def test_a_model_whose_matrices_lie_elsewhere_is_called_by_its_modules() -> None:
    # as at ZeRO's stage 3, where the norms may stay
    model = _model()
    model.get_parameter("model.layers.0.self_attn.o_proj.weight").data = torch.empty(0)
    with torch.no_grad():
        assert stepping._plain_layers(model, torch.device("cpu"), model.new_cache(1)) is None


def test_memory_grows_by_blocks_and_keeps_what_it_held() -> None:
    cache = KVCache(TINY, 2, block=4)
    assert cache.capacity == 0
    cache.reserve(1)
    assert cache.capacity == 4
    rows, positions = torch.tensor([0, 1]), torch.tensor([0, 0])
    keys, values = torch.randn(2, 2, 6), torch.randn(2, 2, 6)
    for layer in range(TINY.num_layers):
        cache.write(layer, rows, positions, keys + layer, values - layer)
    cache.advance(1)
    cache.reserve(9)
    assert cache.capacity == 12
    for layer in range(TINY.num_layers):
        held_keys, held_values = cache.read(layer, 0, 1)
        assert torch.equal(held_keys[:, :, 0], keys + layer)
        assert torch.equal(held_values[:, :, 0], values - layer)


def test_prefill_with_wrong_number_of_documents_raises() -> None:
    model = _model()
    with pytest.raises(ValueError, match="expected one document for each of the cache's 3 rows, got 2"):
        model.prefill(torch.randn(5, TINY.width), _bounds([2, 3]), model.new_cache(3))


def test_prefill_with_an_empty_prompt_raises() -> None:
    model = _model()
    with pytest.raises(ValueError, match="at least one token for each row, got none for row 1"):
        model.prefill(torch.randn(5, TINY.width), _bounds([2, 0, 3]), model.new_cache(3))


def test_empty_cache_sizes_raise() -> None:
    with pytest.raises(ValueError, match="KVCache"):
        KVCache(TINY, 0)
    with pytest.raises(ValueError, match="KVCache"):
        KVCache(TINY, 1, block=0)


def test_decoding_under_autocast_stays_near_float32() -> None:
    model, rows, token = _model(), _rows(LENGTHS), torch.randn(len(LENGTHS), TINY.width)
    hidden = []
    with torch.inference_mode():
        for is_enabled in (False, True):
            cache = model.new_cache(len(LENGTHS))
            with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
                model.prefill(torch.cat(rows), _bounds(LENGTHS), cache)
                hidden.append(model.step(token, cache))
    exact, rounded = hidden
    assert ((rounded - exact).square().mean() / exact.square().mean()).sqrt() < 2e-2
