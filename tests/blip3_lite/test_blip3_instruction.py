"""A connector that reads the question."""

import msgspec
import pytest
import torch

from blip3_lite import Blip3, PackedBatch, Processor, collate, user_turn
from blip3_lite.instruction import instructions
from interleave_data import Sample, TextPart, Turn
from perceiver_resampler import InstructedResamplerConfig


@pytest.fixture
def instructed(tiny_model: Blip3, tiny_processor: Processor) -> tuple[Blip3, Processor]:
    """A model like the tiny one whose connector reads the question."""
    cfg, connector = tiny_model.cfg, msgspec.structs.asdict(tiny_model.cfg.connector)
    cfg = msgspec.structs.replace(cfg, connector=InstructedResamplerConfig(**connector, dim_text=cfg.lm.width))
    torch.manual_seed(0)
    return Blip3(cfg).eval(), Processor(cfg, tiny_processor.tokenizer)


def test_instructions_end_where_answers_begin() -> None:
    """By hand: a conversation with two questions and two images in front of the first; a caption; a prompt."""
    no = -100
    batch = PackedBatch(
        sample_ids=["talk", "caption", "prompt"],
        ids=torch.tensor([90, 90, 11, 12, 13, 14, 15, 16, 90, 21, 22, 31, 90, 32]),
        targets=torch.tensor([no, no, no, 13, no, no, 16, no, 21, 22, no, no, no, no]),
        positions=torch.arange(14),
        cu_seqlens=torch.tensor([0, 8, 11, 14], dtype=torch.int32),
        image_index=torch.tensor([0, 1, 8, 12]),
        tiles=None,
        valid=torch.ones(4, 1, dtype=torch.bool),
    )
    ids, is_text = instructions(batch, 4)
    assert [row[told].tolist() for row, told in zip(ids, is_text, strict=True)] == [[11, 12], [11, 12], [], [31, 32]]
    with pytest.raises(ValueError, match="groups: expected a divisor of the 4 image slots, got 3"):
        instructions(batch, 3)


def test_packing_changes_nothing_where_the_question_is_read(instructed, conversations) -> None:
    model, processor = instructed
    samples = [processor.encode(sample) for sample in conversations]
    together = model(collate(samples))
    alone = torch.cat([model(collate([sample])) for sample in samples])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_image_tokens_follow_the_question_and_not_the_answer(instructed, picture) -> None:
    model, processor = instructed
    image = picture(1, (16, 16))

    def tokens(question: str, answer: str | None) -> torch.Tensor:
        turns = [user_turn([image], question)]
        if answer is not None:
            turns.append(Turn(role="assistant", parts=(TextPart(answer),)))
        sample = Sample(id="x", source="t", turns=tuple(turns))
        encoded = processor.encode_prompt(sample) if answer is None else processor.encode(sample)
        return model.image_tokens(collate([encoded]))

    asked = tokens("what colour?", None)
    torch.testing.assert_close(tokens("what colour?", "red"), asked)
    torch.testing.assert_close(tokens("what colour?", "the blue square"), asked)
    assert not torch.allclose(tokens("which?", None), asked, atol=1e-4)


def test_a_batch_without_pictures_calls_the_same_modules(instructed, conversations) -> None:
    model, processor = instructed
    _, none, _ = (processor.encode(sample) for sample in conversations)
    model.always_sees = True
    model.requires_grad_(True)
    model.loss_sum(collate([none])).backward()
    assert all(parameter.grad is not None for parameter in model.vision_tokenizer.parameters())


def test_a_connector_of_another_text_width_is_refused(instructed) -> None:
    cfg = instructed[0].cfg
    with pytest.raises(ValueError, match="connector text width: expected"):
        msgspec.structs.replace(cfg, connector=msgspec.structs.replace(cfg.connector, dim_text=cfg.lm.width + 1))
