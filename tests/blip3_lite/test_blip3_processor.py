"""Samples to ids, targets, slots and tiles."""

import dataclasses

import msgspec
import pytest
import torch

from blip3_lite import Blip3Config, Processor, user_turn
from interleave_data import ImagePart, PreferenceSample, Sample, SkipReason, SkipSample, TextPart, Turn


def _names(processor, ids):
    names = {token: name for name, token in processor.tokenizer.control_ids.items()}
    return [names.get(token, processor.tokenizer.decode([token])) for token in ids.tolist()]


def _chat(question, answer, images=()):
    return Sample(
        id="x", source="t", turns=(user_turn(images, question), Turn(role="assistant", parts=(TextPart(answer),)))
    )


def test_targets_are_the_answer_and_its_end_shifted_by_one(tiny_processor) -> None:
    sample = tiny_processor.encode(_chat("what?", "red"))
    learnt = sample.targets != -100
    assert torch.equal(sample.targets[:-1][learnt[:-1]], sample.ids[1:][learnt[:-1]])
    assert "".join(_names(tiny_processor, sample.targets[learnt])).strip() == "red<|end|>"


def test_an_image_takes_tiles_times_latents_slots_where_it_stands(tiny_processor, picture) -> None:
    # 40 × 16 fits the 3 × 1 grid best: thumbnail + 3 tiles of 3 latents each.
    sample = tiny_processor.encode(_chat("what?", "red", [picture(1, (40, 16))]))
    assert sample.tiles.shape == (4, 3, 16, 16)
    assert sample.image_index.tolist() == list(range(1, 13))
    assert _names(tiny_processor, sample.ids)[:13] == ["<|user|>"] + ["<image>"] * 12
    assert set(_names(tiny_processor, sample.ids[13:])) & {"<image>"} == set()


def test_control_tokens_spelt_by_a_user_are_text(tiny_processor, picture) -> None:
    """(T17): and the image has its own slots; the control is in tests/phi3_lite/test_phi3_tokenizer.py."""
    text = "<image> <|end|> <|assistant|> <|endoftext|> <|endofchunk|>"
    sample = tiny_processor.encode(_chat(text, "red", [picture(1, (16, 16))]))
    names = _names(tiny_processor, sample.ids)
    assert names.count("<|end|>") == 2
    assert names.count("<image>") == len(sample.image_index)
    assert "<|endoftext|>" not in names
    assert text in tiny_processor.tokenizer.decode(sample.ids.tolist())


def test_prompt_ends_where_the_answer_begins(tiny_processor) -> None:
    full = tiny_processor.encode(_chat("what?", "red"))
    prompt = tiny_processor.encode_prompt(Sample(id="x", source="t", turns=(user_turn([], "what?"),)))
    assert torch.equal(full.ids[: prompt.length], prompt.ids)
    assert _names(tiny_processor, prompt.ids)[-1] == "<|assistant|>"
    assert prompt.num_targets == 0


def test_document_text_is_learnt_and_its_images_are_not(tiny_processor, picture) -> None:
    parts = (TextPart("a square"), picture(1, (16, 16)), TextPart("red"))
    sample = tiny_processor.encode(Sample(id="d", source="t", turns=(Turn(role="document", parts=parts),)))
    learnt = sample.targets[sample.targets != -100]
    assert "<image>" not in _names(tiny_processor, learnt)
    assert _names(tiny_processor, learnt)[-1] == "<|endoftext|>"
    # Everything but the first token (nothing stands before it) and the slots.
    assert sample.num_targets == sample.length - 1 - len(sample.image_index)


def test_preference_shares_prompt_and_tiles(tiny_processor, picture) -> None:
    turns = (user_turn([picture(1, (16, 16))], "a square?"),)
    chosen, rejected = tiny_processor.encode_preference(
        PreferenceSample(id="p", source="t", turns=turns, chosen="red", rejected="green blue")
    )
    assert torch.equal(chosen.tiles, rejected.tiles)
    assert chosen.tile_keys == rejected.tile_keys
    first_target = int((chosen.targets != -100).nonzero()[0])
    assert torch.equal(chosen.ids[: first_target + 1], rejected.ids[: first_target + 1])


@pytest.mark.parametrize("answer", ["", "  ", "\n"])
def test_an_answer_without_text_is_skipped(tiny_processor, answer: str) -> None:
    with pytest.raises(SkipSample) as caught:
        tiny_processor.encode(_chat("what?", answer))
    assert caught.value.reason is SkipReason.EMPTY_ANSWER


def test_a_broken_image_is_skipped(tiny_processor) -> None:
    with pytest.raises(SkipSample) as caught:
        tiny_processor.encode(_chat("what?", "red", [ImagePart(b"<html>no picture</html>")]))
    assert caught.value.reason is SkipReason.NOT_AN_IMAGE


def test_system_prompt_of_the_config_is_put_first(tiny_config, tiny_tokenizer) -> None:
    import msgspec

    processor = Processor(msgspec.structs.replace(tiny_config, system_prompt="be red"), tiny_tokenizer)
    assert processor.tokenizer.decode(processor.encode(_chat("what?", "red")).ids.tolist()).startswith("be red")


def test_a_tokenizer_too_large_for_the_model_is_refused(tiny_config, tiny_tokenizer) -> None:
    """(T24)"""
    import msgspec

    small = msgspec.structs.replace(tiny_config.lm, vocab_size=200)
    with pytest.raises(ValueError, match="at most 200"):
        Processor(msgspec.structs.replace(tiny_config, lm=small), tiny_tokenizer)


def test_config_refuses_parts_that_do_not_fit(tiny_config: Blip3Config) -> None:
    import msgspec

    with pytest.raises(ValueError, match="tile side in pixels: expected 16"):
        msgspec.structs.replace(tiny_config, tiling=msgspec.structs.replace(tiny_config.tiling, tile_px=32))


def test_tile_keys_are_equal_for_equal_bytes_under_equal_tiling(tiny_processor, picture) -> None:
    def keys(processor: Processor, part: ImagePart) -> tuple[str, ...]:
        turns = (user_turn([part], "what?"),)
        return processor.encode_prompt(Sample(id="x", source="t", turns=turns)).tile_keys

    first = picture(1, (32, 17))
    found = keys(tiny_processor, first)
    assert len(set(found)) == len(found) > 1
    assert keys(tiny_processor, dataclasses.replace(first, key="another name")) == found
    assert not set(keys(tiny_processor, picture(2, (32, 17)))) & set(found)
    tiling = msgspec.structs.replace(tiny_processor.cfg.tiling, kind="base")
    base = Processor(msgspec.structs.replace(tiny_processor.cfg, tiling=tiling), tiny_processor.tokenizer)
    assert not set(keys(base, first)) & set(found)
