"""The decoder on packed documents."""

import msgspec
import pytest
import torch
from torch.nn import functional as F

from phi3_lite import Phi3, Phi3Config

TINY = Phi3Config(
    vocab_size=37, width=24, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=20, sliding_window=5, init_std=0.2
)
LENGTHS = [7, 1, 13, 4]


def _model(**changes: object) -> Phi3:
    return Phi3(msgspec.structs.replace(TINY, **changes), generator=torch.Generator().manual_seed(3))


def _bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _ids(num_tokens: int) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(4))


def test_packed_equals_one_by_one_in_hidden_states_and_gradients() -> None:
    model, ids = _model(), _ids(sum(LENGTHS))
    packed = model(model.embed(ids), cu_seqlens=_bounds(LENGTHS))
    weights = torch.randn(packed.shape)
    (packed * weights).sum().backward()
    packed_grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    alone = torch.cat([model(model.embed(document)) for document in ids.split(LENGTHS)])
    (alone * weights).sum().backward()
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    assert len(packed_grads) == len(list(model.parameters())) - 1  # all but the head, which was not used
    for name, weight in model.named_parameters():
        if name in packed_grads:
            torch.testing.assert_close(packed_grads[name], weight.grad, rtol=1e-4, atol=1e-4)


def test_packing_changes_no_tokens_loss() -> None:
    model, ids = _model(), _ids(sum(LENGTHS))
    logits = model.logits(model(model.embed(ids), cu_seqlens=_bounds(LENGTHS)))
    packed = F.cross_entropy(logits, ids.roll(-1), reduction="none")
    alone = [
        F.cross_entropy(model.logits(model(model.embed(document))), labels, reduction="none")
        for document, labels in zip(ids.split(LENGTHS), ids.roll(-1).split(LENGTHS), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_a_changed_document_leaves_the_others_bit_equal(changed: int) -> None:
    model, ids = _model(), _ids(sum(LENGTHS))
    inputs = model.embed(ids).detach()
    bounds = _bounds(LENGTHS)
    start, end = int(bounds[changed]), int(bounds[changed + 1])
    perturbed = inputs.clone()
    perturbed[start:end] += 10
    before, after = (model(x, cu_seqlens=bounds) for x in (inputs, perturbed))
    is_changed = torch.zeros(len(ids), dtype=torch.bool)
    is_changed[start:end] = True
    assert torch.equal(before[~is_changed], after[~is_changed])
    assert (before[is_changed] != after[is_changed]).any(dim=-1).all()


@pytest.mark.parametrize("window", [None, 1, 5])
def test_a_token_sees_its_window_of_the_past_and_nothing_else(window: int | None) -> None:
    model = _model(sliding_window=window, num_layers=1)
    inputs = model.embed(_ids(11)).detach().requires_grad_()
    hidden = model(inputs)
    for position in range(11):
        (gradient,) = torch.autograd.grad(hidden[position].sum(), inputs, retain_graph=True)
        seen = gradient.abs().amax(dim=-1) > 0
        first = 0 if window is None else max(0, position - window + 1)
        assert seen.nonzero().flatten().tolist() == list(range(first, position + 1))


def test_positions_restart_in_each_document_unless_given() -> None:
    model, ids = _model(sliding_window=None), _ids(6)
    bounds = _bounds([2, 4])
    default = model(model.embed(ids), cu_seqlens=bounds)
    given = model(model.embed(ids), torch.tensor([0, 1, 0, 1, 2, 3]), bounds)
    assert torch.equal(default, given)
    # rotary attention depends on distances only, so a shift changes nothing and a stretch does
    shifted = model(model.embed(ids), torch.tensor([5, 6, 9, 10, 11, 12]), bounds)
    torch.testing.assert_close(default, shifted, rtol=0, atol=1e-5)
    stretched = model(model.embed(ids), torch.tensor([0, 3, 0, 5, 6, 7]), bounds)
    assert (default - stretched).abs().max() > 1e-3


def test_rotary_angles_equal_the_formula() -> None:
    from phi3_lite.rope import rotary_tables

    cfg = Phi3Config(
        vocab_size=3, width=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_width=4, rotary_fraction=0.5,
        rope_theta=100.0,
    )  # fmt: skip
    cos, sin = rotary_tables(cfg, torch.tensor([0, 3]))
    # 4 rotated channels of 8: frequencies 1 and 100 ** -0.5 = 0.1
    torch.testing.assert_close(cos, torch.tensor([[0.0, 0.0], [3.0, 0.3]]).cos())
    torch.testing.assert_close(sin, torch.tensor([[0.0, 0.0], [3.0, 0.3]]).sin())


def test_rotation_matrices_turn_as_the_formula() -> None:
    from phi3_lite.rope import rotation_matrices

    x, angles = torch.randn(5, 3, 7), torch.randn(5, 2)
    turned = torch.bmm(x, rotation_matrices(angles.cos(), angles.sin(), 7))
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = x[..., :2], x[..., 2:4]
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., 4:]], dim=-1)
    torch.testing.assert_close(turned, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_few_tokens_without_gradients_give_what_training_gives(dtype: torch.dtype) -> None:
    model = _model(num_heads=2, num_kv_heads=1, rotary_fraction=0.5).to(dtype)
    inputs = model.embed(_ids(9)).detach()
    trained = model(inputs)
    with torch.no_grad():
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(model(inputs), trained.detach(), rtol=0, atol=tolerance)


def test_empty_documents_are_allowed_in_training() -> None:
    model, ids = _model(), _ids(5)
    with_empty = model(model.embed(ids), cu_seqlens=torch.tensor([0, 0, 2, 2, 5, 5], dtype=torch.int32))
    without = model(model.embed(ids), cu_seqlens=_bounds([2, 3]))
    assert torch.equal(with_empty, without)


@pytest.mark.parametrize("bounds", [[0, 4], [1, 5], [0, 3, 2, 5], [0, 6], [0]], ids=str)
def test_bounds_that_do_not_fit_raise(bounds: list[int]) -> None:
    model = _model()
    with pytest.raises(
        ValueError, match="cu_seqlens: expected document bounds rising from 0 to the number of tokens 5"
    ):
        model(model.embed(_ids(5)), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def test_tied_head_has_no_weight_of_its_own_and_trains_the_embedding() -> None:
    model = _model(is_head_tied=True, has_head_bias=True)
    assert "lm_head.weight" not in model.state_dict()
    assert model.head_weight is model.model.embed_tokens.weight
    model.logits(torch.ones(1, TINY.width)).sum().backward()
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, torch.ones(TINY.vocab_size, TINY.width))


def test_head_bias_is_added() -> None:
    model = _model(has_head_bias=True)
    assert model.head_bias is not None
    hidden = torch.randn(3, TINY.width)
    plain = model.logits(hidden)
    bias = torch.arange(float(TINY.vocab_size))
    model.load_state_dict({**model.state_dict(), "lm_head.bias": bias})
    torch.testing.assert_close(model.logits(hidden), plain + bias)
    assert _model().head_bias is None


def test_weights_are_drawn_by_the_generator_with_the_asked_spread() -> None:
    cfg = Phi3Config(
        vocab_size=200, width=64, num_layers=2, num_heads=2, num_kv_heads=2, mlp_width=128, init_std=0.1,
        residual_init_std=0.025, has_head_bias=True,
    )  # fmt: skip
    model = Phi3(cfg, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    again = Phi3(cfg, generator=torch.Generator().manual_seed(0))
    for (name, weight), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, other), name
        if weight.ndim == 2:
            expected = 0.025 if "o_proj" in name or "down_proj" in name else 0.1
            assert weight.std().item() == pytest.approx(expected, rel=0.05), name
        else:
            assert torch.equal(weight, torch.full_like(weight, 0.0 if "bias" in name else 1.0)), name


def test_bfloat16_model_stays_near_float32() -> None:
    model, ids = _model(), _ids(sum(LENGTHS))
    exact = model.logits(model(model.embed(ids), cu_seqlens=_bounds(LENGTHS)))
    model.to(torch.bfloat16)
    rounded = model.logits(model(model.embed(ids), cu_seqlens=_bounds(LENGTHS)))
    assert rounded.dtype == torch.bfloat16
    # every one of the few matrices here rounds to 8 bits
    assert ((rounded - exact).square().mean() / exact.square().mean()).sqrt() < 2e-2


def test_autocast_trains_a_float32_model_in_bfloat16() -> None:
    model, ids = _model(), _ids(sum(LENGTHS))
    exact = model(model.embed(ids), cu_seqlens=_bounds(LENGTHS))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(model.embed(ids), cu_seqlens=_bounds(LENGTHS))
    rounded.square().sum().backward()
    assert ((rounded - exact).square().mean() / exact.square().mean()).sqrt() < 2e-2
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert len(grads) == len(list(model.parameters())) - 1
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)
