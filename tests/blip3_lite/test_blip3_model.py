"""Invariants of the joined model: packing, no leaks, padding, order of images, accumulation."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from blip3_lite import Blip3, FeatureCache, collate, user_turn
from interleave_data import Sample, TextPart, Turn


def _token_losses(model, samples):
    """float[t]: each target's loss from full logits, apart from the chunked head."""
    batch = collate(samples)
    return F.cross_entropy(model.lang_model.logits(model(batch)), batch.targets, reduction="none", ignore_index=-100)


def test_packing_changes_no_tokens_loss(tiny_model, tiny_processor, conversations) -> None:
    samples = [tiny_processor.encode(sample) for sample in conversations]
    together = _token_losses(tiny_model, samples)
    alone = torch.cat([_token_losses(tiny_model, [sample]) for sample in samples])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (alone > 0).sum() == sum(sample.num_targets for sample in samples)


def test_loss_sum_equals_the_sum_over_full_logits(tiny_model, tiny_processor, conversations) -> None:
    samples = [tiny_processor.encode(sample) for sample in conversations]
    torch.testing.assert_close(tiny_model.loss_sum(collate(samples)), _token_losses(tiny_model, samples).sum())


def check_a_document_sees_nothing_of_its_neighbours(model, processor, conversations, collated=collate) -> None:
    one, none, two = (processor.encode(sample) for sample in conversations)
    changed = dataclasses.replace(one, tiles=255 - one.tiles, ids=one.ids.flip(0))
    before = model(collated([one, none, two]))[one.length :]
    after = model(collated([changed, none, two]))[one.length :]
    assert torch.equal(before, after)
    assert not torch.equal(model(collate([one]))[-1], model(collate([changed]))[-1])


def test_a_document_sees_nothing_of_its_neighbours(tiny_model, tiny_processor, conversations) -> None:
    """(T8)"""
    check_a_document_sees_nothing_of_its_neighbours(tiny_model, tiny_processor, conversations)


def test_a_pack_without_borders_shows(tiny_model, tiny_processor, conversations) -> None:
    """(T8): the control."""

    def as_one_document(samples):
        batch = collate(samples)
        return dataclasses.replace(batch, cu_seqlens=batch.cu_seqlens[[0, -1]])

    with pytest.raises(AssertionError):
        check_a_document_sees_nothing_of_its_neighbours(tiny_model, tiny_processor, conversations, as_one_document)


def test_image_order_follows_the_text(tiny_model, tiny_processor, picture) -> None:
    a, b = picture(1, (16, 16)), picture(2, (16, 16))

    def encode(images):
        return tiny_processor.encode_prompt(Sample(id="x", source="t", turns=(user_turn(images, "which?"),)))

    first, second = encode([a, b]), encode([b, a])
    assert torch.equal(first.tiles[: len(first.tiles) // 2], second.tiles[len(second.tiles) // 2 :])
    assert torch.equal(first.ids, second.ids)
    embeds = [tiny_model.embed(collate([sample])) for sample in (first, second)]
    slots = first.image_index.view(2, -1)
    assert torch.equal(embeds[0][slots[0]], embeds[1][slots[1]])
    assert not torch.equal(embeds[0][slots[0]], embeds[1][slots[0]])


def test_features_of_padding_patches_are_never_seen(tiny_model, tiny_processor, picture) -> None:
    turns = (user_turn([picture(1, (32, 17))], "what?"),)
    sample = tiny_processor.encode_prompt(Sample(id="x", source="t", turns=turns))
    assert not sample.valid.all()
    features = torch.randn(*sample.valid.shape, 16)
    poisoned = torch.where(sample.valid[..., None], features, 1e6 * torch.randn_like(features))
    assert torch.equal(tiny_model(collate([sample], features)), tiny_model(collate([sample], poisoned)))


def test_padded_pixels_and_padding_tiles_change_nothing(tiny_model, tiny_processor, picture) -> None:
    turns = (user_turn([picture(1, (32, 17))], "what?"),)
    sample = tiny_processor.encode_prompt(Sample(id="x", source="t", turns=turns))
    # float[p, n] → pixels: each patch is 8 × 8 of a 16 × 16 tile.
    shown = sample.valid.view(-1, 1, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert not shown.all()
    painted = dataclasses.replace(sample, tiles=torch.where(shown, sample.tiles, 255 - sample.tiles))
    assert torch.equal(tiny_model(collate([sample])), tiny_model(collate([painted])))
    redrawn = dataclasses.replace(sample, tiles=torch.where(shown, 255 - sample.tiles, sample.tiles))
    assert not torch.equal(tiny_model(collate([sample])), tiny_model(collate([redrawn])))


def test_kept_features_give_the_same_hidden_states_as_pixels(tiny_model, tiny_processor, conversations) -> None:
    samples = [tiny_processor.encode(sample) for sample in conversations]
    tiny_model.requires_grad_(False)
    cache = FeatureCache(tiny_model, max_bytes=10**6, tiles_per_call=3)
    expected = tiny_model(collate(samples))
    torch.testing.assert_close(tiny_model(cache.collate(samples)), expected)
    assert len(cache) == len({key for sample in samples for key in sample.tile_keys})
    torch.testing.assert_close(
        tiny_model(cache.collate(samples[::-1]))[-samples[0].length :], expected[: samples[0].length]
    )


def test_the_tower_sees_as_many_tiles_however_many_are_missing(
    tiny_model, tiny_processor, picture, monkeypatch
) -> None:
    """Products round by their shape; a resumed run begins with an empty cache, and its losses must not show it.

    `tests/apps/test_apps_train_kills.py` compares the losses, on sizes that round differently.
    """
    tiny_model.requires_grad_(False)
    turns = [(user_turn([picture(index, (16, 16))], "what?"),) for index in range(11)]
    samples = [tiny_processor.encode_prompt(Sample(id="x", source="t", turns=turn)) for turn in turns]
    compute, seen = tiny_model.patch_features, []
    monkeypatch.setattr(
        tiny_model, "patch_features", lambda tiles, valid: (seen.append(len(tiles)), compute(tiles, valid))[1]
    )
    together = FeatureCache(tiny_model, max_bytes=10**6).features(samples)
    cache = FeatureCache(tiny_model, max_bytes=10**6)
    one_by_one = torch.cat([cache.features([sample]) for sample in samples[::-1]][::-1])
    assert len(cache) >= 11
    assert set(seen) == {cache.tiles_per_call}
    assert torch.equal(together, one_by_one)


def test_feature_cache_refuses_a_trainable_tower(tiny_model) -> None:
    with pytest.raises(ValueError, match="frozen vision tower"):
        FeatureCache(tiny_model, max_bytes=1)


def test_feature_cache_brings_tiles_to_the_model(tiny_model, tiny_processor, conversations, monkeypatch) -> None:
    """The meta device stands for any device that is not the tiles'."""
    sample = tiny_processor.encode(conversations[2])
    model = tiny_model.requires_grad_(False).to("meta")
    seen: list[str] = []

    def features(tiles, valid):
        seen.extend((tiles.device.type, valid.device.type))
        return torch.zeros(*valid.shape, 16, device=tiles.device)

    monkeypatch.setattr(model, "patch_features", features)
    assert FeatureCache(model, max_bytes=10**6).features([sample]).device.type == "meta"
    assert set(seen) == {"meta"}


def test_full_feature_cache_computes_again_and_answers_the_same(tiny_model, tiny_processor, conversations) -> None:
    tiny_model.requires_grad_(False)
    sample = tiny_processor.encode(conversations[2])
    cache = FeatureCache(tiny_model, max_bytes=300)
    first, second = cache.features([sample]), cache.features([sample])
    assert len(cache) == 1
    torch.testing.assert_close(first, second)


def test_gradients_of_one_pack_equal_those_of_its_documents_summed(tiny_config, tiny_processor, conversations) -> None:
    torch.manual_seed(1)
    model = Blip3(tiny_config)
    model.vision_encoder.requires_grad_(False)
    samples = [tiny_processor.encode(sample) for sample in conversations]
    model.loss_sum(collate(samples)).backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for sample in samples:
        model.loss_sum(collate([sample])).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, together[name], atol=1e-5, rtol=1e-5)
        else:
            assert parameter.grad is None


def test_a_generator_alone_decides_the_weights(tiny_config) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed)
        before = torch.get_rng_state()
        state = Blip3(tiny_config, generator=torch.Generator().manual_seed(seed % 2)).state_dict()
        assert torch.equal(torch.get_rng_state(), before)
        return state

    first, other, again = weights(1), weights(2), weights(3)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    drawn = [name for name, tensor in first.items() if not torch.equal(tensor, other[name])]
    fixed = {name for name, tensor in first.items() if tensor.unique().numel() == 1}
    assert set(drawn) == first.keys() - fixed


def test_a_generator_draws_every_part_as_the_global_one(tiny_config) -> None:
    """Same rules: mean and spread of each tensor agree with those of a model drawn without a generator."""
    drawn = Blip3(tiny_config, generator=torch.Generator().manual_seed(0)).state_dict()
    for name, tensor in Blip3(tiny_config).state_dict().items():
        assert drawn[name].std(unbiased=False).item() == pytest.approx(tensor.std(unbiased=False).item(), rel=0.5), name


def test_text_alone_needs_no_image(tiny_model, tiny_processor) -> None:
    turns = (Turn(role="user", parts=(TextPart("what?"),)), Turn(role="assistant", parts=(TextPart("red"),)))
    sample = tiny_processor.encode(Sample(id="t", source="t", turns=turns))
    assert sample.tiles.shape == (0, 3, 16, 16)
    assert torch.isfinite(tiny_model.loss_sum(collate([sample])))
