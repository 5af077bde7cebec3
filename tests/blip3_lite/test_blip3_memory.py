"""A conversation read turn by turn: answers as of whole prompts, pictures seen once."""

import msgspec
import pytest
import torch

from blip3_lite import Blip3, ChatMemory, Processor, SamplingConfig, generate_steps, user_turn
from interleave_data import Sample, TextPart, Turn
from phi3_lite import collect

SAMPLING = SamplingConfig(max_new_tokens=5)


@pytest.fixture
def tiles_seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tiles of each call of the vision tower."""
    seen: list[int] = []
    plain = Blip3.patch_features

    def counting(self, tiles, valid):
        seen.append(len(tiles))
        return plain(self, tiles, valid)

    monkeypatch.setattr(Blip3, "patch_features", counting)
    return seen


@pytest.mark.parametrize("grouping", ["tiles", "bands"])
def test_turns_equal_whole_prompts_and_see_each_picture_once(
    tiny_model, tiny_processor, picture, tiles_seen: list[int], grouping: str
) -> None:
    cfg = msgspec.structs.replace(tiny_model.cfg, tile_grouping=grouping)
    tiny_model.cfg = cfg
    processor = Processor(cfg, tiny_processor.tokenizer)
    memory = ChatMemory(tiny_model)
    turns: list[Turn] = []
    news = [
        user_turn([picture(1, (40, 16))], "what?"),
        user_turn([], "which one is it?"),
        user_turn([picture(2, (9, 30)), picture(3, (16, 16))], "and these"),
        user_turn([picture(4, (30, 9))], "and this?"),
    ]
    for number, new in enumerate(news):
        turns.append(new)
        prompt = processor.encode_prompt(Sample(id="c", source="t", turns=tuple(turns)))
        expected = collect(generate_steps(tiny_model, [prompt], SAMPLING, processor.stop_ids))
        del tiles_seen[:]
        assert collect(memory.generate_steps(prompt, SAMPLING, processor.stop_ids)) == expected
        own = processor.encode_prompt(Sample(id="n", source="t", turns=(new,)))
        assert sum(tiles_seen) == len(own.tiles), number
        turns.append(Turn(role="assistant", parts=(TextPart(processor.decode(expected[0]) or "a"),)))


def test_another_picture_in_its_place_is_seen(tiny_model, tiny_processor, picture, tiles_seen: list[int]) -> None:
    memory = ChatMemory(tiny_model)
    prompts = [
        tiny_processor.encode_prompt(
            Sample(id="c", source="t", turns=(user_turn([picture(1, (16, 16)), picture(seed, (40, 16))], "what?"),))
        )
        for seed in (2, 3)
    ]
    collect(memory.generate_steps(prompts[0], SAMPLING, ()))
    expected = collect(generate_steps(tiny_model, prompts[1:], SAMPLING, ()))
    del tiles_seen[:]
    assert collect(memory.generate_steps(prompts[1], SAMPLING, ())) == expected
    assert tiles_seen == [prompts[1].tiles_per_image[1]]


def test_a_sample_without_names_of_its_tiles_is_read_anew(tiny_model, tiny_processor, picture, tiles_seen) -> None:
    memory = ChatMemory(tiny_model)
    prompt = tiny_processor.encode_prompt(
        Sample(id="c", source="t", turns=(user_turn([picture(1, (16, 16))], "what?"),))
    )
    nameless = type(prompt)(**{**vars(prompt), "tile_keys": ()})
    found = [collect(memory.generate_steps(nameless, SAMPLING, ())) for _ in range(2)]
    assert found[0] == found[1] == collect(generate_steps(tiny_model, [prompt], SAMPLING, ()))
    assert torch.tensor(tiles_seen).eq(tiles_seen[0]).all()
    assert len(tiles_seen) == 3
