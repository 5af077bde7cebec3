import math

import msgspec
import pytest
import torch
from torch import Tensor

from siglip_lite import SiglipVision, SiglipVisionConfig, interpolate_positions, normalise

# 35 px: four patches a side and three pixels over.
CFG = SiglipVisionConfig(image_px=35, patch_px=8, width=24, num_layers=2, num_heads=3, mlp_width=37)
CONV = msgspec.structs.replace(CFG, stem="conv")
STEMS = pytest.mark.parametrize("cfg", [CFG, CONV], ids=["patch", "conv"])


def randomised(cfg: SiglipVisionConfig, dtype: torch.dtype = torch.float64) -> SiglipVision:
    """A tower whose every parameter is random, norms and biases too."""
    model = SiglipVision(cfg).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def test_normalise_maps_bytes_to_minus_one_to_one():
    pixels = torch.tensor([[[0, 51, 255]]], dtype=torch.uint8)
    torch.testing.assert_close(normalise(pixels), torch.tensor([[[-1.0, -0.6, 1.0]]]))
    assert normalise(pixels, torch.bfloat16).dtype == torch.bfloat16


def test_normalise_keeps_all_bytes_apart_in_float32_and_leaves_its_input():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert (normalise(pixels).diff() > 0).all()
    assert torch.equal(pixels, torch.arange(256, dtype=torch.uint8))


@STEMS
def test_forward_gives_one_feature_a_whole_patch(cfg: SiglipVisionConfig):
    model = SiglipVision(cfg)
    assert model(torch.randn(1, 3, 35, 35)).shape == (1, 16, 24)
    assert model(torch.randn(2, 3, 23, 41), interpolate=True).shape == (2, 2 * 5, 24)
    assert model(torch.randn(0, 3, 35, 35)).shape == (0, 16, 24)


@STEMS
@pytest.mark.parametrize("size", [(35, 35), (23, 41)])
def test_bytes_give_what_normalised_pixels_give(cfg: SiglipVisionConfig, size: tuple[int, int]):
    model, pixels = randomised(cfg), torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    features = [model(x, interpolate=True) for x in (pixels, normalise(pixels, torch.float64))]
    torch.testing.assert_close(*features, rtol=1e-12, atol=1e-12)
    leaves, upstream = tuple(model.embeddings.patch_embedding.parameters()), torch.randn_like(features[0])
    grads = [torch.autograd.grad(found, leaves, upstream) for found in features]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)


@STEMS
def test_pixels_beyond_the_last_whole_patch_are_not_seen(cfg: SiglipVisionConfig):
    model, pixels = randomised(cfg), torch.randn(1, 3, 35, 35, dtype=torch.float64)
    changed = pixels.clone()
    changed[..., 32:, :], changed[..., :, 32:] = math.nan, math.nan
    assert torch.equal(model(changed), model(pixels))


def test_patch_embeddings_are_row_major_and_see_their_patch_alone():
    model, pixels = randomised(CFG), torch.zeros(1, 3, 35, 35, dtype=torch.float64)
    changed = pixels.clone()
    changed[0, 1, 2 * 8 + 5, 3 * 8 + 1] = 1.0
    is_different = (model.embeddings(changed, False) != model.embeddings(pixels, False)).any(-1)[0]
    assert is_different.nonzero().flatten().tolist() == [2 * 4 + 3]


def test_conv_stem_features_lie_where_their_pixels_are():
    model, pixels = randomised(CONV), torch.zeros(1, 3, 35, 35, dtype=torch.float64)
    changed = pixels.clone()
    changed[0, :, 2 * 8 + 4, 3 * 8 + 4] = 1.0
    change = (model.embeddings(changed, False) - model.embeddings(pixels, False)).abs().sum(-1)[0]
    # The pixel reaches its own patch and none farther than the next.
    rows, cols = change.view(4, 4).nonzero(as_tuple=True)
    assert change[2 * 4 + 3] > 0
    assert ((rows - 2).abs() <= 1).all()
    assert ((cols - 3).abs() <= 1).all()


@STEMS
def test_batch_equals_one_by_one(cfg: SiglipVisionConfig):
    model, pixels = randomised(cfg), torch.randn(3, 3, 35, 35, dtype=torch.float64)
    alone = torch.cat([model(pixels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(pixels), alone)
    torch.testing.assert_close(model.pool(model(pixels)), torch.cat([model.pool(x[None]) for x in alone]))


def test_pooling_does_not_depend_on_the_order_of_features():
    model, features = randomised(CFG), torch.randn(2, 7, 24, dtype=torch.float64)
    torch.testing.assert_close(model.pool(features[:, torch.randperm(7)]), model.pool(features))


def test_pooling_equals_torch_multihead_attention():
    model, features = randomised(CFG), torch.randn(2, 7, 24, dtype=torch.float64)
    head = model.head
    assert head is not None
    oracle = torch.nn.MultiheadAttention(24, 3, batch_first=True, dtype=torch.float64)
    oracle.load_state_dict(head.attention.state_dict())
    expected = oracle(head.probe.expand(2, 1, 24), features, features, need_weights=False)[0][:, 0]
    torch.testing.assert_close(head.attention(head.probe, features), expected)


def test_every_gradient_equals_finite_differences():
    cfg = SiglipVisionConfig(image_px=5, patch_px=2, width=4, num_layers=1, num_heads=2, mlp_width=3, stem="conv")
    model = randomised(cfg)
    names, parameters = zip(*model.named_parameters(), strict=True)

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower = model

        def forward(self, pixels: Tensor) -> Tensor:
            return self.tower.pool(self.tower(pixels))

    pooled, pixels = Pooled(), torch.randn(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)

    def run(pixels: Tensor, *values: Tensor) -> Tensor:
        state = {f"tower.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(pooled, state, (pixels,))

    # Fast mode: along random directions, instead of number by number.
    assert torch.autograd.gradcheck(run, (pixels, *parameters), fast_mode=True)


def rms_error_ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).square().mean() / expected.square().mean()).sqrt().item()


@STEMS
def test_bfloat16_is_near_float64(cfg: SiglipVisionConfig):
    wide = msgspec.structs.replace(cfg, width=64, num_heads=4, mlp_width=128)
    model, pixels = SiglipVision(wide).bfloat16(), torch.rand(2, 3, 35, 35).bfloat16()
    low = model(pixels)
    assert low.dtype == torch.bfloat16
    assert rms_error_ratio(low, model.double()(pixels.double())) < 1e-2


def test_another_size_is_refused_without_interpolation():
    with pytest.raises(ValueError, match=r"expected 4×4 patches of 8 px, got 4×5 from 35×40 px"):
        SiglipVision(CFG)(torch.zeros(1, 3, 35, 40))


def test_image_smaller_than_a_patch_is_refused():
    with pytest.raises(ValueError, match=r"grid: expected at least one row and column, got \(0, 4\)"):
        SiglipVision(CFG)(torch.zeros(1, 3, 7, 35), interpolate=True)


def test_interpolation_changes_no_bit_at_the_native_size():
    model, pixels = SiglipVision(CFG), torch.randn(1, 3, 35, 35)
    assert torch.equal(model(pixels, interpolate=True), model(pixels))
    table = torch.randn(9, 4)
    assert interpolate_positions(table, (3, 3)) is table


def test_interpolation_keeps_rows_and_columns_apart():
    rows = torch.arange(4.0).repeat_interleave(4)
    cols = torch.arange(4.0).repeat(4)
    stretched = interpolate_positions(torch.stack((rows, cols), dim=1), (8, 3)).view(8, 3, 2)
    torch.testing.assert_close(stretched[..., 0], stretched[:, :1, 0].expand(8, 3))
    torch.testing.assert_close(stretched[..., 1], stretched[:1, :, 1].expand(8, 3))
    assert (stretched[:, 0, 0].diff() > 0).all()
    assert (stretched[0, :, 1].diff() > 0).all()


def test_interpolation_of_a_table_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match="expected a square number of rows, got 12"):
        interpolate_positions(torch.zeros(12, 2), (3, 4))


def test_tower_without_head_has_no_head_weights_and_does_not_pool():
    model = SiglipVision(msgspec.structs.replace(CFG, use_head=False))
    assert not any(name.startswith("head") for name in model.state_dict())
    with pytest.raises(ValueError, match="use_head=True"):
        model.pool(torch.zeros(1, 16, 24))


def test_same_generator_draws_the_same_weights():
    model, other = SiglipVision(CONV), SiglipVision(CONV)
    model.init_weights(torch.Generator().manual_seed(3))
    other.init_weights(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_fresh_patch_weights_have_lecun_spread():
    weight = SiglipVision(msgspec.structs.replace(CFG, width=96)).embeddings.patch_embedding.weight
    assert isinstance(weight, Tensor)
    assert weight.std().item() == pytest.approx((3 * 8 * 8) ** -0.5, rel=0.03)


def test_padding_patches_change_no_feature_of_the_others():
    tower = SiglipVision(CFG).eval()
    side = CFG.grid_side
    valid = torch.ones(2, side, side, dtype=torch.bool)
    valid[0, :, -1] = False
    valid[1] = False
    valid = valid.flatten(1)
    pixels = torch.randn(2, 3, CFG.image_px, CFG.image_px)
    painted = pixels.clone()
    painted[0, :, :, (side - 1) * CFG.patch_px :] = 7.0
    before, after = tower(pixels, valid=valid), tower(painted, valid=valid)
    assert torch.equal(before[0][valid[0]], after[0][valid[0]])
    assert not torch.equal(tower(pixels)[0][valid[0]], tower(painted)[0][valid[0]])
    # No patch of the second image is valid: it attends to itself as if nothing were masked.
    torch.testing.assert_close(before[1], tower(pixels)[1])


def test_conv_stem_of_a_patch_with_a_three_keeps_the_grid():
    cfg = msgspec.structs.replace(CONV, image_px=24, patch_px=12, width=16, num_heads=2)
    assert cfg.stem_strides == (2, 2, 3)
    assert SiglipVision(cfg)(torch.randn(1, 3, 24, 24)).shape == (1, 4, 16)
