"""Answers: with cache as without, batched as alone, streamed as whole."""

import torch

from blip3_lite import EncodedSample, SamplingConfig, answer_batch, collate, generate_steps, stream_answer, user_turn
from interleave_data import Sample
from phi3_lite import collect


def _prompts(processor, picture) -> list[EncodedSample]:
    talks = [
        ([picture(1, (40, 16))], "what?"),
        ([], "is it a square, red green blue?"),
        ([picture(2, (9, 30))] * 2, "a"),
    ]
    return [
        processor.encode_prompt(Sample(id=f"{i}", source="t", turns=(user_turn(images, text),)))
        for i, (images, text) in enumerate(talks)
    ]


def test_greedy_tokens_equal_those_of_whole_forward_passes(tiny_model, tiny_processor, picture) -> None:
    prompts = _prompts(tiny_processor, picture)
    found = collect(generate_steps(tiny_model, prompts, SamplingConfig(max_new_tokens=8), tiny_processor.stop_ids))
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = prompt.ids
        for token in tokens:
            grown = EncodedSample(
                id="x", source="t", ids=ids, targets=torch.full_like(ids, -100), image_index=prompt.image_index,
                tiles=prompt.tiles, valid=prompt.valid,
            )  # fmt: skip
            with torch.no_grad():
                logits = tiny_model.lang_model.logits(tiny_model(collate([grown]))[-1])
            assert int(logits.argmax()) == token
            ids = torch.cat([ids, torch.tensor([token])])


def test_streamed_answer_equals_the_batched_one(tiny_model, tiny_processor, picture) -> None:
    prompts = _prompts(tiny_processor, picture)
    sampling = SamplingConfig(max_new_tokens=12)
    together = answer_batch(tiny_model, tiny_processor, prompts, sampling, batch_size=2)
    alone = ["".join(stream_answer(tiny_model, tiny_processor, prompt, sampling)).strip() for prompt in prompts]
    assert together == alone
    assert len(set(alone)) > 1


def test_stop_text_cuts_the_streamed_and_the_batched_answer_alike(tiny_model, tiny_processor, picture) -> None:
    prompts = _prompts(tiny_processor, picture)
    sampling = SamplingConfig(max_new_tokens=12)
    free = answer_batch(tiny_model, tiny_processor, prompts, sampling)
    middle = len(free[1]) // 2
    stop = free[1][middle : middle + 3]
    batched = answer_batch(tiny_model, tiny_processor, prompts, sampling, stop_texts=[stop])
    assert batched[1] == free[1][: free[1].index(stop)].strip() != free[1]
    for prompt, answer, whole in zip(prompts, batched, free, strict=True):
        pieces = list(stream_answer(tiny_model, tiny_processor, prompt, sampling, stop_texts=[stop]))
        assert "".join(pieces).strip() == answer
        assert stop not in answer
        assert answer == whole.split(stop)[0].strip()


def test_repetition_penalty_counts_the_prompts_text_but_no_image_slot(tiny_model, tiny_processor, picture) -> None:
    prompts = _prompts(tiny_processor, picture)[:1]
    sampling = SamplingConfig(max_new_tokens=1, repetition_penalty=3.0)
    with torch.no_grad():
        logits = tiny_model.lang_model.logits(tiny_model(collate(prompts))[-1])
    is_text = torch.ones(len(prompts[0].ids), dtype=torch.bool)
    is_text[prompts[0].image_index] = False
    slot = int(prompts[0].ids[prompts[0].image_index[0]])
    seen = set(prompts[0].ids[is_text].tolist())
    assert slot not in seen
    # make the slot's own token the best, and everything else worth nothing
    with torch.no_grad():
        weight = tiny_model.lang_model.head_weight
        weight[slot] = weight[int(logits.argmax())] * 1.5
        logits = tiny_model.lang_model.logits(tiny_model(collate(prompts))[-1])
    expected = torch.tensor([(x / 3 if x > 0 else x * 3) if i in seen else x for i, x in enumerate(logits.tolist())])
    found = collect(generate_steps(tiny_model, prompts, sampling, ()))
    assert found == [[int(expected.argmax())]] == [[slot]]
