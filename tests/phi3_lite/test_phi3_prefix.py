"""A prompt read on from what the last one left gives the tokens of one read whole, and computes only what is new."""

import msgspec
import pytest
import torch

from phi3_lite import LongRope, Phi3, Phi3Config, PromptMemory, SamplingConfig, collect, generate

pytestmark = pytest.mark.usefixtures("each_way")

TINY = Phi3Config(
    vocab_size=37, width=24, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=20, sliding_window=5, init_std=0.2
)
SAMPLING = SamplingConfig(max_new_tokens=6)


def _model(cfg: Phi3Config = TINY) -> Phi3:
    return Phi3(cfg, generator=torch.Generator().manual_seed(3))


def _alone(model: Phi3, ids: list[int]) -> list[int]:
    inputs = model.embed(torch.tensor(ids)).detach()
    return collect(generate(model, inputs, torch.tensor([0, len(ids)], dtype=torch.int32), SAMPLING))[0]


def _asked(memory: PromptMemory, ids: list[int]) -> tuple[list[int], int]:
    num_known = memory.num_known(ids)
    inputs = memory.model.embed(torch.tensor(ids[num_known:])).detach()
    return collect(memory.generate(ids, num_known, inputs, SAMPLING))[0], num_known


def test_turns_equal_whole_prompts_and_read_only_what_is_new() -> None:
    model = _model()
    memory = PromptMemory(model)
    first = [5, 6, 7, 8, 9]
    answer, num_known = _asked(memory, first)
    assert (answer, num_known) == (_alone(model, first), 0)
    # the next turn: the answer's last token was given out but never read
    second = [*first, *answer, 11, 12]
    assert _asked(memory, second) == (_alone(model, second), len(first) + len(answer) - 1)
    # an answer that the tokenizer cuts otherwise, and a new conversation
    changed = [*first, answer[0], (answer[1] + 1) % 37, 3]
    assert _asked(memory, changed) == (_alone(model, changed), len(first) + 1)
    assert _asked(memory, [1, 2]) == (_alone(model, [1, 2]), 0)


def test_the_same_prompt_again_reads_its_last_token() -> None:
    memory = PromptMemory(_model())
    assert _asked(memory, [4, 5, 6])[0] == _asked(memory, [4, 5, 6])[0]
    assert memory.num_known([4, 5, 6]) == 2


def test_an_answer_that_was_broken_off_is_remembered_as_far_as_it_was_read() -> None:
    memory = PromptMemory(_model())
    ids = [4, 5, 6]
    inputs = memory.model.embed(torch.tensor(ids)).detach()
    steps = memory.generate(ids, 0, inputs, SAMPLING)
    given = [int(next(steps).tokens[0]) for _ in range(3)]
    steps.close()
    assert memory.num_known([*ids, *given, 1]) == 5
    assert _asked(memory, [*ids, *given, 1])[0] == _alone(memory.model, [*ids, *given, 1])


@pytest.mark.parametrize("kept", [4, 9])
def test_a_conversation_back_within_the_original_window_begins_anew(kept: int) -> None:
    rope = LongRope(short_factors=(1.0, 1.1, 1.2), long_factors=(2.0, 3.0, 4.0), original_max_positions=8)
    model = _model(msgspec.structs.replace(TINY, long_rope=rope, max_positions=32))
    memory = PromptMemory(model)
    long = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    _asked(memory, long)
    prompt = [*long[:kept], 20, 21]
    assert _asked(memory, prompt) == (_alone(model, prompt), 9 if kept == 9 else 0)


def test_embeddings_that_do_not_fit_the_names_raise() -> None:
    memory = PromptMemory(_model())
    with pytest.raises(ValueError, match="inputs: expected 3 − 0 rows"):
        next(memory.generate([1, 2, 3], 0, torch.zeros(2, 24), SAMPLING))
    with pytest.raises(ValueError, match="of at most 0"):
        next(memory.generate([1, 2, 3], 1, torch.zeros(2, 24), SAMPLING))
