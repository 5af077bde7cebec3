import inspect
import math

import pytest
import torch
from torch import Tensor

from perceiver_resampler import PerceiverResampler, ResamplerConfig

CFG = ResamplerConfig(dim=6, dim_out=5, depth=2, num_heads=3, head_dim=4, num_latents=3, ff_mult=2)


def randomised(cfg: ResamplerConfig, dtype: torch.dtype = torch.float64) -> PerceiverResampler:
    """A resampler whose every parameter is random, norms and biases too."""
    model = PerceiverResampler(cfg).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


# The oracle: the published equations, one number at a time.


def loop_layer_norm(x: list[float], weight: list[float], bias: list[float], eps: float) -> list[float]:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return [(v - mean) / math.sqrt(variance + eps) * w + b for v, w, b in zip(x, weight, bias, strict=True)]


def loop_linear(weight: list[list[float]], x: list[float]) -> list[float]:
    return [sum(w * value for w, value in zip(row, x, strict=True)) for row in weight]


def loop_resample(
    weights: dict[str, list], features: list[list[float]], visible: list[bool], cfg: ResamplerConfig
) -> list[list[float]]:
    """One set of features to tokens, by loops over layers, heads, queries and keys."""

    def norm(x: list[float], name: str) -> list[float]:
        return loop_layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], cfg.layer_norm_eps)

    latents = [list(row) for row in weights["latents"]]
    inner = cfg.num_heads * cfg.head_dim
    for i in range(cfg.depth):
        media = [norm(x, f"layers.{i}.0.norm_media") for x, is_seen in zip(features, visible, strict=True) if is_seen]
        normed = [norm(z, f"layers.{i}.0.norm_latents") for z in latents]
        keys_values = [loop_linear(weights[f"layers.{i}.0.to_kv.weight"], x) for x in media + normed]
        queries = [loop_linear(weights[f"layers.{i}.0.to_q.weight"], z) for z in normed]
        for r, query in enumerate(queries):
            mixed: list[float] = []
            for head in range(cfg.num_heads):
                span = slice(head * cfg.head_dim, (head + 1) * cfg.head_dim)
                scores = [
                    sum(a * b for a, b in zip(query[span], kv[:inner][span], strict=True)) / math.sqrt(cfg.head_dim)
                    for kv in keys_values
                ]
                powers = [math.exp(score - max(scores)) for score in scores]
                for channel in range(cfg.head_dim):
                    values = [kv[inner:][span][channel] for kv in keys_values]
                    mixed.append(sum(p * v for p, v in zip(powers, values, strict=True)) / sum(powers))
            out = loop_linear(weights[f"layers.{i}.0.to_out.weight"], mixed)
            latents[r] = [a + b for a, b in zip(latents[r], out, strict=True)]
        for r, z in enumerate(latents):
            hidden = loop_linear(weights[f"layers.{i}.1.1.weight"], norm(z, f"layers.{i}.1.0"))
            hidden = [0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in hidden]
            out = loop_linear(weights[f"layers.{i}.1.3.weight"], hidden)
            latents[r] = [a + b for a, b in zip(z, out, strict=True)]
    return [
        [
            a + b
            for a, b in zip(
                loop_linear(weights["projection.weight"], norm(z, "norm")), weights["projection.bias"], strict=True
            )
        ]
        for z in latents
    ]


@pytest.mark.parametrize(
    "cfg", [CFG, ResamplerConfig(dim=1, dim_out=1, depth=1, num_heads=1, head_dim=1, num_latents=1)]
)
@pytest.mark.parametrize("num_features", [1, 7])
@pytest.mark.parametrize("is_masked", [False, True])
def test_forward_equals_the_equations_in_loops(cfg: ResamplerConfig, num_features: int, is_masked: bool):
    model = randomised(cfg)
    features = torch.randn(2, num_features, cfg.dim, dtype=torch.float64)
    mask = torch.rand(2, num_features) < 0.6 if is_masked else torch.ones(2, num_features, dtype=torch.bool)
    weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    expected = [loop_resample(weights, x.tolist(), m.tolist(), cfg) for x, m in zip(features, mask, strict=True)]
    actual = model(features, mask if is_masked else None)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_output_has_one_token_a_latent_whatever_the_number_of_features():
    model = PerceiverResampler(CFG)
    for num_sets, num_features in ((1, 1), (5, 13), (2, 0), (0, 4)):
        assert model(torch.randn(num_sets, num_features, 6)).shape == (num_sets, 3, 5)


def test_order_of_features_changes_nothing():
    model, features, order = randomised(CFG), torch.randn(2, 11, 6, dtype=torch.float64), torch.randperm(11)
    mask = torch.rand(2, 11) < 0.7
    torch.testing.assert_close(model(features[:, order], mask[:, order]), model(features, mask))


def test_masking_equals_removing():
    model, features = randomised(CFG), torch.randn(2, 7, 6, dtype=torch.float64)
    mask = torch.tensor([1, 0, 0, 1, 1, 0, 1]).bool()
    torch.testing.assert_close(model(features, mask.expand(2, 7)), model(features[:, mask]))


def test_mask_of_all_true_equals_no_mask():
    model, features = randomised(CFG), torch.randn(2, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(model(features, torch.ones(2, 7, dtype=torch.bool)), model(features))


@pytest.mark.parametrize("rubbish", [1e30, math.inf, math.nan])
def test_what_a_masked_feature_holds_changes_no_bit(rubbish: float):
    model, features = randomised(CFG, torch.float32), torch.randn(2, 7, 6)
    mask = torch.rand(2, 7) < 0.5
    poisoned = features.masked_fill(~mask[..., None], rubbish)
    assert torch.equal(model(poisoned, mask), model(features, mask))


def test_masked_features_get_no_gradient_and_poison_none():
    model = randomised(CFG)
    mask = torch.tensor([[True, False, True, False]])
    features = torch.randn(1, 4, 6, dtype=torch.float64)
    features[0, 1] = math.nan
    features.requires_grad_()
    model(features, mask).square().sum().backward()
    assert features.grad is not None
    assert torch.equal(features.grad[~mask], torch.zeros(2, 6, dtype=torch.float64))
    assert (features.grad[mask] != 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_set_masked_whole_equals_no_features():
    """(T14): a tile that is all padding"""
    model, features = randomised(CFG), torch.randn(1, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(model(features, torch.zeros(1, 4, dtype=torch.bool)), model(features[:, :0]))


def test_batch_equals_one_by_one():
    model, features, mask = randomised(CFG), torch.randn(5, 7, 6, dtype=torch.float64), torch.rand(5, 7) < 0.6
    alone = torch.cat([model(features[i : i + 1], mask[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(model(features, mask), alone)


def test_arguments_are_left_as_they_were():
    model, features, mask = randomised(CFG), torch.randn(2, 5, 6, dtype=torch.float64), torch.rand(2, 5) < 0.5
    features_before, mask_before = features.clone(), mask.clone()
    model(features, mask)
    assert torch.equal(features, features_before)
    assert torch.equal(mask, mask_before)


def test_gradients_equal_finite_differences():
    cfg = ResamplerConfig(dim=3, dim_out=2, depth=1, num_heads=2, head_dim=2, num_latents=2, ff_mult=1)
    model = randomised(cfg)
    names, parameters = zip(*model.named_parameters(), strict=True)
    mask = torch.tensor([[True, False, True]])

    def run(features: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (features, mask))

    features = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    # Fast mode: along random directions, instead of number by number.
    assert torch.autograd.gradcheck(run, (features, *parameters), fast_mode=True)


def rms_error_ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


def test_bfloat16_is_near_float64():
    cfg = ResamplerConfig(dim=64, dim_out=48, depth=3, num_heads=4, head_dim=16, num_latents=8)
    model, features = PerceiverResampler(cfg).bfloat16(), torch.randn(3, 37, 64).bfloat16()
    mask = torch.rand(3, 37) < 0.7
    low = model(features, mask)
    assert low.dtype == torch.bfloat16
    assert rms_error_ratio(low, model.double()(features.double(), mask)) < 1e-2


def test_autocast_takes_bfloat16_features_into_float32_weights():
    cfg = ResamplerConfig(dim=64, dim_out=48, depth=2, num_heads=4, head_dim=16, num_latents=8)
    model, features = PerceiverResampler(cfg), torch.randn(3, 37, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(features)
    assert rms_error_ratio(low, model.double()(features.double())) < 1e-2


def test_same_generator_draws_the_same_weights():
    model, other = PerceiverResampler(CFG), PerceiverResampler(CFG)
    model.init_weights(torch.Generator().manual_seed(3))
    other.init_weights(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    other.init_weights(torch.Generator().manual_seed(4))
    assert not torch.equal(model.latents, other.latents)


def test_latents_start_standard_normal_and_linear_maps_within_their_bound():
    model = PerceiverResampler(ResamplerConfig(dim=64, dim_out=8, depth=1, num_heads=2, head_dim=8, num_latents=64))
    assert model.latents.std().item() == pytest.approx(1.0, abs=0.05)
    assert model.projection.weight.abs().max().item() == pytest.approx(1 / 8, rel=0.05)
    assert torch.equal(model.norm.weight, torch.ones(64))


# The shape annotations, which tests check at run time, would refuse these calls first; users have only the messages.
unchecked_forward = inspect.unwrap(PerceiverResampler.forward)


def test_features_of_another_width_are_refused_with_both_widths():
    with pytest.raises(ValueError, match=r"features: expected width 6 .* got 7"):
        unchecked_forward(PerceiverResampler(CFG), torch.randn(1, 2, 7))


def test_mask_of_another_shape_is_refused_with_both_shapes():
    with pytest.raises(ValueError, match=r"mask: .*\(1, 2\), got \(1, 3\)"):
        unchecked_forward(PerceiverResampler(CFG), torch.randn(1, 2, 6), torch.ones(1, 3, dtype=torch.bool))
