"""Long-context scaling: which factors apply, and decoding across the original window."""

import math
from typing import Any

import msgspec
import pytest
import torch

from phi3_lite import LongRope, Phi3, Phi3Config, SamplingConfig, collect, generate, mini_128k, phi4_mini, phi35_mini
from phi3_lite.rope import rotary_tables

pytestmark = pytest.mark.usefixtures("each_way")

BORDER = 8
FACTORS = LongRope(short_factors=(1.0, 1.5, 2.0), long_factors=(1.0, 4.0, 9.0), original_max_positions=BORDER)
TINY = Phi3Config(
    vocab_size=37, width=24, num_layers=2, num_heads=3, num_kv_heads=1, mlp_width=20, init_std=0.3,
    rotary_fraction=0.75, max_positions=64, long_rope=FACTORS,
)  # fmt: skip


def _model(**changes: Any) -> Phi3:
    return Phi3(msgspec.structs.replace(TINY, **changes), generator=torch.Generator().manual_seed(3))


def _bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _rows(lengths: list[int]) -> list[torch.Tensor]:
    return [torch.randn(length, TINY.width) for length in lengths]


def test_angles_use_short_factors_up_to_the_window_and_long_ones_beyond() -> None:
    cfg = Phi3Config(
        vocab_size=3, width=8, num_layers=1, num_heads=2, num_kv_heads=2, mlp_width=4, rope_theta=100.0,
        max_positions=32,
        long_rope=LongRope(short_factors=(1.0, 2.0), long_factors=(4.0, 5.0), original_max_positions=8),
    )  # fmt: skip
    cos, sin = rotary_tables(cfg, torch.tensor([3, 3]), torch.tensor([8, 9]))
    scale = math.sqrt(1 + math.log(32 / 8) / math.log(8))
    # frequencies 1 and 0.1, divided by the factors
    angles = torch.tensor([[3.0, 0.3 / 2], [3.0 / 4, 0.3 / 5]])
    torch.testing.assert_close(cos, angles.cos() * scale)
    torch.testing.assert_close(sin, angles.sin() * scale)


def test_scale_is_the_given_one_or_follows_from_the_stretch() -> None:
    stretched = msgspec.structs.replace(TINY, max_positions=BORDER**3)
    assert stretched.rotary_scale == pytest.approx(math.sqrt(1 + 2))
    assert msgspec.structs.replace(TINY, max_positions=BORDER - 1).rotary_scale == 1
    given = msgspec.structs.replace(FACTORS, attention_factor=1.25)
    assert msgspec.structs.replace(TINY, long_rope=given).rotary_scale == 1.25
    assert msgspec.structs.replace(TINY, long_rope=None).rotary_scale == 1


def test_packed_documents_choose_their_factors_one_by_one() -> None:
    model, lengths = _model(), [BORDER + 5, BORDER, 1, BORDER + 1]
    rows = _rows(lengths)
    packed = model(torch.cat(rows), cu_seqlens=_bounds(lengths))
    torch.testing.assert_close(packed, torch.cat([model(row) for row in rows]), rtol=0, atol=1e-5)
    plain = _model(long_rope=msgspec.structs.replace(FACTORS, long_factors=FACTORS.short_factors))
    always_short = plain(torch.cat(rows), cu_seqlens=_bounds(lengths))
    changed = (packed - always_short).abs().amax(dim=-1).split(lengths)
    assert [bool(part.max() > 1e-3) for part in changed] == [True, False, False, True]


def test_given_positions_decide_by_the_largest_of_a_document() -> None:
    model, rows = _model(), _rows([4, 4])
    positions = torch.tensor([0, 1, 2, BORDER, 0, 1, 2, BORDER - 1])
    together = model(torch.cat(rows), positions, _bounds([4, 4]))
    long_only = _model(long_rope=msgspec.structs.replace(FACTORS, short_factors=FACTORS.long_factors))
    short_only = _model(long_rope=msgspec.structs.replace(FACTORS, long_factors=FACTORS.short_factors))
    torch.testing.assert_close(together[:4], long_only(rows[0], positions[:4]), rtol=0, atol=1e-5)
    torch.testing.assert_close(together[4:], short_only(rows[1], positions[4:]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("lengths", [[BORDER - 3], [BORDER - 2, 1, BORDER + 3, BORDER, BORDER - 2]], ids=str)
def test_steps_across_the_window_equal_no_cache(lengths: list[int], window: int | None) -> None:
    model, num_steps = _model(sliding_window=window), BORDER + 2
    full = _rows([length + num_steps for length in lengths])
    cache = model.new_cache(len(lengths), block=3)
    with torch.inference_mode():
        starts = [row[:length] for row, length in zip(full, lengths, strict=True)]
        hidden = model.prefill(torch.cat(starts), _bounds(lengths), cache)
        for step in range(num_steps + 1):
            # without a cache the whole sequence is computed anew: no earlier result may serve, as the factors change
            ends = [length + step for length in lengths]
            expected = torch.stack([model(row[:end])[-1] for row, end in zip(full, ends, strict=True)])
            torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)
            assert cache.lengths.tolist() == ends
            if step < num_steps:
                new = torch.stack([row[end] for row, end in zip(full, ends, strict=True)])
                hidden = model.step(new, cache)


def test_a_prefill_onto_held_rows_crosses_the_window_too() -> None:
    model = _model()
    first, second = _rows([3, BORDER, BORDER + 2, 2]), _rows([BORDER, 1, 4, 3])
    cache = model.new_cache(4, block=4)
    with torch.inference_mode():
        model.prefill(torch.cat(first), _bounds([3, BORDER, BORDER + 2, 2]), cache)
        hidden = model.prefill(torch.cat(second), _bounds([BORDER, 1, 4, 3]), cache)
        joined = [torch.cat(pair) for pair in zip(first, second, strict=True)]
        torch.testing.assert_close(hidden, torch.stack([model(row)[-1] for row in joined]), rtol=0, atol=1e-5)
        token = torch.randn(4, TINY.width)
        expected = torch.stack([model(torch.cat([row, new[None]]))[-1] for row, new in zip(joined, token, strict=True)])
        torch.testing.assert_close(model.step(token, cache), expected, rtol=0, atol=1e-5)


def test_selected_rows_still_cross_the_window() -> None:
    model, lengths = _model(), [BORDER, 2, BORDER - 1]
    rows, token = _rows(lengths), torch.randn(2, 2, TINY.width)
    cache = model.new_cache(3, block=4)
    with torch.inference_mode():
        model.prefill(torch.cat(rows), _bounds(lengths), cache)
        cache.select(torch.tensor([2, 0]))
        model.step(token[0], cache)
        hidden = model.step(token[1], cache)
        expected = torch.stack([model(torch.cat([rows[row], token[:, at]]))[-1] for at, row in enumerate((2, 0))])
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-5)


def test_inputs_are_kept_until_every_row_is_past_the_window() -> None:
    model, cache = _model(), _model().new_cache(2, block=4)
    with torch.inference_mode():
        model.prefill(torch.randn(BORDER + 3, TINY.width), _bounds([BORDER + 1, 2]), cache)
        held = []
        for _ in range(BORDER):
            model.step(torch.randn(2, TINY.width), cache)
            held.append(cache.keeps_inputs)
    # the second row's length before each step is 2, 3, …: past the window from the seventh step on
    assert held == [True] * (BORDER - 1) + [False]
    assert not _model(long_rope=None).new_cache(1).keeps_inputs


@pytest.mark.parametrize("max_new_tokens", [1, 20])
def test_generate_crosses_the_window_row_by_row_as_without_a_cache(max_new_tokens: int) -> None:
    model, lengths = _model(), [BORDER - 4, BORDER + 2, 1, BORDER]
    prompts = [torch.randint(0, TINY.vocab_size, (length,)) for length in lengths]
    packed = model.embed(torch.cat(prompts))
    tokens = collect(generate(model, packed, _bounds(lengths), SamplingConfig(max_new_tokens=max_new_tokens)))
    for prompt, row in zip(prompts, tokens, strict=True):
        ids = prompt
        with torch.inference_mode():
            for _ in range(max_new_tokens):
                ids = torch.cat([ids, model.logits(model(model.embed(ids))[-1:]).argmax(dim=-1)])
        assert row == ids[len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"short_factors": (1.0, 1.0)}, "long_rope.short_factors: expected 3 numbers, half the rotated"),
        ({"long_factors": ()}, "long_rope.long_factors: expected 3 numbers"),
        ({"long_factors": (1.0, 0.0, 1.0)}, "LongRope factors"),
        ({"long_factors": (1.0, math.nan, 1.0)}, "LongRope factors"),
        ({"original_max_positions": 1}, "LongRope.original_max_positions"),
        ({"attention_factor": 0.0}, "LongRope.attention_factor"),
    ],
    ids=str,
)  # fmt: skip
def test_factors_that_do_not_fit_raise(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=field):
        msgspec.convert({**msgspec.to_builtins(TINY), "long_rope": msgspec.to_builtins(FACTORS) | changes}, Phi3Config)


def test_published_long_models_have_the_published_parameters() -> None:
    def factors(count: int) -> LongRope:
        return LongRope(short_factors=(1.0,) * count, long_factors=(2.0,) * count)

    for cfg, num_parameters in (
        (mini_128k(factors(48)), 3_821_079_552),
        (phi35_mini(factors(48)), 3_821_079_552),
        (phi4_mini(factors(48)), 3_836_021_760),
    ):
        with torch.device("meta"):
            model = Phi3(cfg)
        assert sum(weight.numel() for weight in model.state_dict().values()) == num_parameters
        assert cfg.rotary_scale == pytest.approx(math.sqrt(1 + 5 / 12))
    assert cfg.head_dim == 128
    assert cfg.rotary_dim == 96
