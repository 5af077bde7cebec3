"""How patch features are grouped for the connector: tiles, the released models' bands, or whole images."""

import msgspec
import pytest
import torch

from anyres_tiler import TilingConfig
from blip3_lite import Blip3, Blip3Config, Processor, collate, user_turn
from blip3_lite.grouping import band_order, group_images
from interleave_data import Sample
from perceiver_resampler import ResamplerConfig
from phi3_lite import Phi3Config, train_tokenizer
from siglip_lite import SiglipVisionConfig


def config(**changes: object) -> Blip3Config:
    cfg = Blip3Config(
        vision=SiglipVisionConfig(
            image_px=8, patch_px=4, width=8, num_layers=1, num_heads=2, mlp_width=8, use_head=False
        ),
        connector=ResamplerConfig(dim=8, dim_out=8, depth=1, num_heads=2, head_dim=4, num_latents=3),
        lm=Phi3Config(vocab_size=300, width=8, num_layers=1, num_heads=2, num_kv_heads=2, mlp_width=8),
        tiling=TilingConfig(tile_px=8),
        masks_padding_in_vision=False,
    )
    return msgspec.structs.replace(cfg, **changes)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["what is it?"], 290).with_control_tokens(["<image>"])


def encode(cfg, tokenizer, images):
    prompt = Sample(id="s", source="test", turns=(user_turn(images, "what is it?"),))
    return Processor(cfg, tokenizer).encode_prompt(prompt)


def published_groups(canvas, rows, columns):
    """The released code's regrouping, from the facts: the canvas [C, R·s, Q·s] is `.view`ed as [C, R, Q, s²]."""
    channels, side = canvas.shape[0], canvas.shape[1] // rows
    return canvas.contiguous().view(channels, rows, columns, side * side).permute(1, 2, 3, 0).flatten(0, 1)


@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 3)])
def test_bands_are_the_published_view_of_the_canvas(grid):
    rows, columns, side = *grid, 3
    features = torch.randn(1 + rows * columns, side * side, 5)
    tiles = features[1:].view(rows, columns, side, side, 5)
    canvas = tiles.permute(4, 0, 2, 1, 3).reshape(5, rows * side, columns * side)
    grouped = features.flatten(0, 1)[band_order(grid, side)].view_as(features)
    assert grouped[0].equal(features[0])
    assert grouped[1:].equal(published_groups(canvas, rows, columns))


def test_bands_of_one_column_are_tiles():
    assert band_order((3, 1), 4).equal(torch.arange(4 * 16))


def test_bands_change_tokens_of_wide_grids_only(tokenizer, picture):
    torch.manual_seed(0)
    tiles, bands = Blip3(config()).eval(), Blip3(config(tile_grouping="bands")).eval()
    bands.load_state_dict(tiles.state_dict())
    for size, is_wide in (((30, 14), True), ((8, 24), False)):
        outputs = [
            model.image_tokens(collate([encode(model.cfg, tokenizer, [picture(1, size)])])) for model in (tiles, bands)
        ]
        # The thumbnail's tokens come first and never change.
        torch.testing.assert_close(outputs[0][:3], outputs[1][:3])
        assert torch.allclose(outputs[0], outputs[1], atol=1e-6) != is_wide


def test_bands_of_a_pack_equal_those_of_its_samples(tokenizer, picture):
    model = Blip3(config(tile_grouping="bands")).eval()
    samples = [
        encode(model.cfg, tokenizer, [picture(1, (30, 14)), picture(2, (8, 24))]),
        encode(model.cfg, tokenizer, []),
        encode(model.cfg, tokenizer, [picture(3, (20, 20))]),
    ]
    one_by_one = torch.cat([model.image_tokens(collate([sample])) for sample in (samples[0], samples[2])])
    torch.testing.assert_close(model.image_tokens(collate(samples)), one_by_one)


def test_fixed_sampling_reads_all_views_in_one_call(tokenizer, picture):
    cfg = config(tiling=TilingConfig(tile_px=8, kind="anyres_fixed"))
    model = Blip3(cfg).eval()
    samples = [
        encode(cfg, tokenizer, [picture(1, (30, 14)), picture(2, (24, 8))]),
        encode(cfg, tokenizer, [picture(3, (9, 30))]),
    ]
    batch = collate(samples)
    tokens = model.image_tokens(batch)
    assert len(tokens) == 3 * 3 == len(batch.image_index)
    assert batch.tiles is not None
    features = model.patch_features(batch.tiles, batch.valid)
    starts = [0, *torch.tensor(batch.tiles_per_image).cumsum(0).tolist()]
    for image in range(3):
        # One call on just the features that show the image, without any mask.
        part = slice(starts[image], starts[image + 1])
        shown = features[part][batch.valid[part]]
        torch.testing.assert_close(
            tokens[3 * image : 3 * image + 3], model.vision_tokenizer(shown[None])[0], atol=1e-5, rtol=0
        )


def test_counts_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="expected a sum of 2"):
        group_images(torch.zeros(2, 4, 8), torch.ones(2, 4, dtype=torch.bool), (1, 2))
    with pytest.raises(ValueError, match="bands are of anyres tiles"):
        config(tile_grouping="bands", tiling=TilingConfig(tile_px=8, kind="base"))
