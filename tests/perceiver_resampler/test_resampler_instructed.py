"""A resampler that reads what is asked as well."""

import msgspec
import pytest
import torch

from perceiver_resampler import InstructedResamplerConfig, PerceiverResampler, ResamplerConfig

TINY = InstructedResamplerConfig(dim=6, dim_out=5, depth=2, num_heads=3, head_dim=2, num_latents=4, dim_text=7)


@pytest.fixture
def resampler() -> PerceiverResampler:
    torch.manual_seed(0)
    return PerceiverResampler(TINY)


def test_json_tells_the_two_kinds_apart() -> None:
    either = ResamplerConfig | InstructedResamplerConfig
    plain = ResamplerConfig(dim=6, dim_out=5, depth=2, num_heads=3, head_dim=2, num_latents=4)
    for cfg in (TINY, plain):
        assert msgspec.json.decode(msgspec.json.encode(cfg), type=either) == cfg
    assert msgspec.json.decode(msgspec.json.encode(TINY))["kind"] == "instructed_perceiver"
    with pytest.raises(ValueError, match="dim_text: expected at least 1, got 0"):
        msgspec.structs.replace(TINY, dim_text=0)


def test_text_changes_the_tokens_and_not_their_number(resampler: PerceiverResampler) -> None:
    features, text = torch.randn(3, 5, 6), torch.randn(3, 2, 7)
    plain, told = resampler(features), resampler(features, None, text)
    assert plain.shape == told.shape == (3, 4, 5)
    assert not torch.allclose(plain, told, atol=1e-3)


def test_masked_text_is_no_text(resampler: PerceiverResampler) -> None:
    features, text = torch.randn(3, 5, 6), torch.randn(3, 2, 7)
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    told = resampler(features, None, text, mask)
    torch.testing.assert_close(told[:1], resampler(features[:1], None, text[:1]))
    torch.testing.assert_close(told[1:2], resampler(features[1:2], None, text[1:2, :1]))
    torch.testing.assert_close(told[2:], resampler(features[2:]))


def test_masks_of_features_and_text_go_together(resampler: PerceiverResampler) -> None:
    features, text = torch.randn(1, 5, 6), torch.randn(1, 2, 7)
    mask = torch.tensor([[True, True, True, False, False]])
    told = resampler(features, mask, text, torch.tensor([[True, False]]))
    torch.testing.assert_close(told, resampler(features[:, :3], None, text[:, :1]))


def test_text_for_a_resampler_that_reads_none_is_refused() -> None:
    plain = PerceiverResampler(ResamplerConfig(dim=6, dim_out=5, depth=1, num_heads=3, head_dim=2, num_latents=4))
    with pytest.raises(ValueError, match="text: expected none for a resampler that reads none"):
        plain(torch.randn(1, 5, 6), None, torch.randn(1, 2, 7))
