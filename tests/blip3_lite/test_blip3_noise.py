"""NEFTune's noise: its size in each document of a pack, and only where it belongs."""

import io

import pytest
import torch
from PIL import Image

from blip3_lite import collate
from blip3_lite.noise import with_embedding_noise
from interleave_data import ImagePart, Sample, TextPart, Turn


def test_noise_is_uniform_and_as_large_in_each_document_as_it_would_be_alone():
    # (L, d) of 100 × 16 and 25 × 16, alpha 8: up to 0.2 and 0.4.
    embeds = torch.randn(125, 16)
    noise = with_embedding_noise(embeds, torch.tensor([0, 100, 125], dtype=torch.int32), 8.0) - embeds
    for part, most in ((noise[:100], 0.2), (noise[100:], 0.4)):
        assert part.abs().max().item() == pytest.approx(most, rel=0.02)
        assert part.abs().max().item() <= most * (1 + 1e-5)
        assert part.abs().mean().item() == pytest.approx(most / 2, rel=0.1)
        assert abs(part.mean().item()) < 0.1 * most


def test_noise_follows_its_generator_and_empty_documents_have_none():
    embeds, cu_seqlens = torch.zeros(3, 4), torch.tensor([0, 0, 3, 3], dtype=torch.int32)
    one, two = (with_embedding_noise(embeds, cu_seqlens, 1.0, torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.equal(two)
    assert one.isfinite().all()


def test_noise_is_on_the_text_in_training_alone(tiny_model, tiny_processor):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 90, 200)).save(buffer, format="PNG")
    turns = (
        Turn("user", (ImagePart(buffer.getvalue()), TextPart("what colour?"))),
        Turn("assistant", (TextPart("blue"),)),
    )
    batch = collate([tiny_processor.encode(Sample("a", "toy", turns))])
    plain = tiny_model.embed(batch)
    tiny_model.neftune_alpha = 5.0
    assert tiny_model.embed(batch).equal(plain)
    tiny_model.train()
    noised = tiny_model.embed(batch)
    is_image = torch.zeros(batch.num_tokens, dtype=torch.bool)
    is_image[batch.image_index] = True
    assert is_image.any()
    assert noised[is_image].equal(plain[is_image])
    assert (noised[~is_image] != plain[~is_image]).any(dim=1).all()
