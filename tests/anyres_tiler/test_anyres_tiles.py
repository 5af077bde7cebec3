import json
import subprocess
import sys
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import anyres_tiler.tiles
from anyres_tiler import Tiles, TilingConfig, contact_sheet, fit_size, num_tiles, tile_image, untile


def numbered(width: int, height: int) -> Image.Image:
    """An image whose pixels are all different: red = column, green = row."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_is_resized(pixels: np.ndarray, image: Image.Image, size_px: tuple[int, int]) -> None:
    """Hold [height, width, 3] against Pillow, columns first: ±1 but for two or three values, which may be ±2."""
    columns = image.resize((size_px[0], image.height), Image.Resampling.BICUBIC)
    expected = np.asarray(columns.resize(size_px, Image.Resampling.BICUBIC)).astype(int)
    difference = np.abs(pixels.astype(int) - expected)
    assert pixels.shape == expected.shape
    assert difference.max() <= 2
    assert (difference > 1).sum() <= 3
    assert (difference > 0).sum() <= 3 + difference.size / 50


def columns_and_rows(tile: torch.Tensor) -> tuple[list[int], list[int]]:
    return tile[0, 0].tolist(), tile[1, :, 0].tolist()


def test_tiles_are_row_major_after_the_thumbnail():
    tiles = tile_image(numbered(6, 6), TilingConfig(tile_px=3, grids=((2, 2),)))
    assert tiles.pixels.shape == (5, 3, 3, 3)
    assert [columns_and_rows(tile) for tile in tiles.pixels[1:]] == [
        ([0, 1, 2], [0, 1, 2]),
        ([3, 4, 5], [0, 1, 2]),
        ([0, 1, 2], [3, 4, 5]),
        ([3, 4, 5], [3, 4, 5]),
    ]


def test_thumbnail_is_the_whole_image_squashed():
    image = noise(20, 10)
    tiles = tile_image(image, TilingConfig(tile_px=5))
    assert_is_resized(tiles.pixels[0].permute(1, 2, 0).numpy(), image, (5, 5))


def test_padding_is_black_and_centred_by_hand():
    # 2 × 4 (w × h) on one canvas of 4 × 4: no resizing, one black column on each side.
    white = Image.new("RGB", (2, 4), "white")
    tiles = tile_image(white, TilingConfig(tile_px=2, grids=((2, 2),)))
    left, right = [0, 255], [255, 0]
    assert tiles.box_px == (1, 0, 3, 4)
    for tile, row in zip(tiles.pixels[1:], [left, right, left, right], strict=True):
        assert tile.tolist() == [[row, row]] * 3


def test_odd_margin_is_smaller_before_than_after():
    tiles = tile_image(Image.new("RGB", (1, 4), "white"), TilingConfig(tile_px=2, grids=((1, 2),)))
    assert tiles.box_px == (0, 0, 1, 4)
    assert tiles.pixels[1, 0].tolist() == [[255, 0], [255, 0]]


def test_base_squash_is_one_view():
    image = noise(9, 4)
    tiles = tile_image(image, TilingConfig(kind="base", tile_px=6))
    assert tiles.pixels.shape == (1, 3, 6, 6)
    assert_is_resized(tiles.pixels[0].permute(1, 2, 0).numpy(), image, (6, 6))
    assert not tiles.thumbnail_first
    assert tiles.grid == (1, 1)


def test_base_pad_keeps_the_aspect_on_grey():
    tiles = tile_image(Image.new("RGB", (4, 2), "white"), TilingConfig(kind="base", base_fit="pad", tile_px=4))
    assert tiles.pixels[0, 1].tolist() == [[127] * 4, [255] * 4, [255] * 4, [127] * 4]


def test_base_pad_needs_no_square_canvas_of_a_long_image():
    tiles = tile_image(Image.new("RGB", (100_000, 1), "white"), TilingConfig(kind="base", base_fit="pad", tile_px=7))
    assert (tiles.pixels[0, 0] == 255).sum() == 7


def check_a_pixel_is_kept(size_px: tuple[int, int], kind: Literal["base", "anyres"]) -> None:
    cfg = TilingConfig(kind=kind, tile_px=24)
    tiles = tile_image(Image.new("RGB", size_px, "white"), cfg)
    assert tiles.num_tiles == num_tiles(size_px, cfg) == tiles.pixels.shape[0]
    assert tiles.grid[::-1] in cfg.grids or kind == "base"
    grid = tiles.pixels[int(tiles.thumbnail_first) :, 0]
    left, top, right, bottom = tiles.box_px
    assert (grid == 255).sum() == (right - left) * (bottom - top) >= 1
    valid = tiles.valid_patches(3)
    assert valid.shape == (tiles.num_tiles, 9)
    assert valid[int(tiles.thumbnail_first) :].any()


@pytest.mark.parametrize("size_px", [(1, 1), (1, 100_000), (100_000, 1), (3000, 2), (2, 3000), (7, 7), (384, 385)])
@pytest.mark.parametrize("kind", ["base", "anyres"])
def test_any_size_keeps_a_pixel_a_side(size_px, kind):
    """(T14)"""
    check_a_pixel_is_kept(size_px, kind)


@pytest.mark.parametrize("size_px", [(1, 100_000), (100_000, 1), (3000, 2)])
def test_a_fit_that_rounds_a_side_to_nothing_shows(size_px, monkeypatch):
    """(T14): the control."""

    def rounded_down(size_px, box_px):
        scale = min(box / size for box, size in zip(box_px, size_px, strict=True))
        return int(size_px[0] * scale), int(size_px[1] * scale)

    monkeypatch.setattr(anyres_tiler.tiles, "fit_size", rounded_down)
    with pytest.raises((AssertionError, ValueError, RuntimeError, ZeroDivisionError)):
        check_a_pixel_is_kept(size_px, "anyres")


@given(st.integers(1, 80), st.integers(1, 80), st.sampled_from(["base", "anyres"]), st.sampled_from(["squash", "pad"]))
@settings(max_examples=60, deadline=None)
def test_untile_gives_the_resized_image_back(width, height, kind, base_fit):
    cfg = TilingConfig(kind=kind, base_fit=base_fit, tile_px=11)
    image = noise(width, height)
    tiles = tile_image(image, cfg)
    canvas = (tiles.grid[1] * 11, tiles.grid[0] * 11)
    fitted = canvas if (kind, base_fit) == ("base", "squash") else fit_size(image.size, canvas)
    assert_is_resized(np.asarray(untile(tiles)), image, fitted)


@pytest.mark.parametrize("size_px", [(301, 97), (97, 301), (2000, 1999), (5, 3)])
def test_resizing_is_that_of_pillow(size_px):
    image = noise(*size_px)
    tiles = tile_image(image, TilingConfig(kind="base", tile_px=61))
    assert_is_resized(tiles.pixels[0].permute(1, 2, 0).numpy(), image, (61, 61))
    bilinear = image.resize((61, 61), Image.Resampling.BILINEAR)
    with pytest.raises(AssertionError):
        assert_is_resized(np.asarray(bilinear), image, (61, 61))


def test_untile_gives_an_image_that_needs_no_resizing_back_exactly():
    image = noise(13, 26)
    assert np.array_equal(np.asarray(untile(tile_image(image, TilingConfig(tile_px=13)))), np.asarray(image))


def test_valid_patches_by_hand():
    # 480 × 640 on 2 × 2 tiles, side 3: canvas columns 1 to 4 of 6.
    tiles = tile_image(Image.new("RGB", (480, 640)), TilingConfig(tile_px=24))
    valid = tiles.valid_patches(3)
    left, right = [False, True, True] * 3, [True, True, False] * 3
    assert valid.tolist() == [[True] * 9, left, right, left, right]


def test_valid_patches_of_a_tile_in_the_padding_are_all_false():
    """(T14)"""
    # 1 × 300 on a canvas of 3 × 1 tiles: the image is one column in the middle tile.
    tiles = tile_image(Image.new("RGB", (1, 300)), TilingConfig(tile_px=9, grids=((3, 1),)))
    assert tiles.valid_patches(3).any(dim=1).tolist() == [True, False, True, False]


def test_valid_patches_of_base_mode_are_all_true():
    for base_fit in ("squash", "pad"):
        tiles = tile_image(noise(4, 9), TilingConfig(kind="base", base_fit=base_fit, tile_px=8))
        assert tiles.valid_patches(2).tolist() == [[True] * 4]


@given(st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_valid_patches_of_one_pixel_each_are_the_image_itself(width, height):
    tiles = tile_image(Image.new("RGB", (width, height), "white"), TilingConfig(tile_px=12))
    shown = tiles.pixels[1:, 0] == 255
    valid = tiles.valid_patches(12).unflatten(1, (12, 12))[1:]
    # Both are centred; the mask rounds down and the pixels up, so one line may differ on one side or the other.
    assert (shown != valid).sum() <= 2 * 12 * max(tiles.grid)


def test_valid_patches_side_must_be_positive():
    with pytest.raises(ValueError, match="side"):
        tile_image(noise(4, 4), TilingConfig(tile_px=4)).valid_patches(0)


def test_contact_sheet_shows_every_tile_at_its_place():
    tiles = tile_image(noise(10, 10), TilingConfig(tile_px=5, grids=((2, 2),)))
    sheet = np.asarray(contact_sheet(tiles, gap_px=1, fill=(1, 2, 3)))
    assert sheet.shape == (13, 19, 3)
    places = [(1, 1), (1, 7), (1, 13), (7, 7), (7, 13)]
    for tile, (row, column) in zip(tiles.pixels, places, strict=True):
        assert np.array_equal(sheet[row : row + 5, column : column + 5], tile.permute(1, 2, 0).numpy())
    assert sheet[0].tolist() == [[1, 2, 3]] * 19


def test_tile_image_refuses_other_modes():
    with pytest.raises(ValueError, match='"RGB", got "L"'):
        tile_image(Image.new("L", (4, 4)), TilingConfig(tile_px=4))


def test_photos_of_every_shape(shared_data):
    cfg = TilingConfig(tile_px=48)
    sizes = {}
    for line in (shared_data / "photos" / "photos.jsonl").read_text().splitlines():
        record = json.loads(line)
        sizes[record["image"]] = (record["width"], record["height"])
    grids = {}
    for name in ("road-aerial-tall.jpg", "sea-horizon-strip.jpg", "yoga-roof.jpg"):
        with Image.open(shared_data / "photos" / name) as image:
            image.draft("RGB", (1200, 1200))
            tiles = tile_image(image.convert("RGB"), cfg)
        grids[name] = tiles.grid
        assert tiles.num_tiles == num_tiles(sizes[name], cfg)
        assert np.asarray(untile(tiles)).std() > 10
    assert grids["road-aerial-tall.jpg"] == (3, 1)
    assert grids["sea-horizon-strip.jpg"] == (1, 3)


def test_tiles_are_immutable_and_typed():
    with pytest.raises(Exception, match="pixels"):
        Tiles(pixels=torch.zeros(1, 3, 4, 5), grid=(1, 1), size_px=(1, 1), box_px=(0, 0, 1, 1), thumbnail_first=False)


def test_config_imports_without_torch():
    code = "import sys, anyres_tiler as a; a.TilingConfig(); a.num_tiles; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_grid_of_one_is_the_thumbnail_alone():
    cfg = TilingConfig(tile_px=8, grids=((1, 1), (2, 1)))
    image = Image.effect_noise((7, 9), 80).convert("RGB")
    tiles = tile_image(image, cfg)
    assert (tiles.num_tiles, tiles.grid, num_tiles(image.size, cfg)) == (1, (1, 1), 1)
    assert tiles.valid_patches(2).all()
    assert torch.equal(tiles.pixels, tile_image(image, TilingConfig(tile_px=8, kind="base")).pixels)
    assert tile_image(image.resize((16, 8)), cfg).num_tiles == num_tiles((16, 8), cfg) == 3
