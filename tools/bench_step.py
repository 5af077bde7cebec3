"""Suites `step` and `memory`: a whole training step, its time and its memory."""

from collections.abc import Iterator
from functools import partial

import torch

from bench_kernels import head_footprints
from bench_models import (
    JoinedStep,
    LMStep,
    PictureBatch,
    TextBatch,
    demo_joined,
    joined_flops,
    lm_flops,
    picture_batch,
    same_joined,
    same_lm,
    small_lm,
    text_batch,
)
from bench_pairs import Footprint, Pair, clocked, peak_of
from trainer_lite import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TILES = (1, 3, 5, 3, 4, 3, 1, 3, 5, 3, 3, 1)
_WORDS = (40, 56, 33, 61, 45, 28, 70, 38, 52, 47, 64, 35)


def lm_batch() -> TextBatch:
    """16 samples of 60 to 200 tokens, the last 20 of each to be learnt."""
    return text_batch([round(float(x)) for x in torch.linspace(60, 200, 16)], 20, small_lm().vocab_size)


def joined_batch() -> PictureBatch:
    """12 questions about pictures of 1 to 5 tiles, as the demo's SFT has them."""
    return picture_batch(demo_joined(), _TILES, _WORDS, 8)


def padded(batch: TextBatch) -> list[int]:
    """Lengths as the peer has them."""
    return [batch.padded_ids.shape[1]] * len(batch.lengths)


def pairs() -> Iterator[Pair]:
    """Steps of the small language model and of the demo's joined model."""
    keep_freed_memory()
    cfg, batch = small_lm(), lm_batch()
    own = lm_flops(cfg, batch.lengths, int((batch.targets >= 0).sum()))
    limit = lm_flops(cfg, padded(batch), batch.padded_ids.numel()) / own
    for name, dtype in DTYPES.items():
        ours, theirs = (LMStep(cfg, dtype, batch, is_ours=is_ours) for is_ours in (True, False))
        yield Pair(
            suite="step",
            name=f"LM step {name} (counted limit {limit:.2f})",
            peer="transformers Phi3ForCausalLM, padded",
            unit="tokens/s",
            amount=batch.num_tokens,
            ours=clocked(ours.run),
            theirs=clocked(theirs.run),
            check=partial(same_lm, cfg, dtype, batch),
            least_s=lambda floors: own / floors.flops_per_s,
        )
    yield joined_pair()


def joined_pair() -> Pair:
    """The demo's model, the vision tower frozen, no features kept."""
    cfg, batch = demo_joined(), joined_batch()
    text = batch.text
    own = joined_flops(cfg, sum(_TILES), text.lengths, batch.packed.num_targets)
    limit = joined_flops(cfg, sum(_TILES), padded(text), text.padded_ids.numel()) / own
    return Pair(
        suite="step",
        name=f"demo step fp32 (counted limit {limit:.2f})",
        peer="transformers SigLIP + Idefics2 perceiver + Phi-3",
        unit="tokens/s",
        amount=text.num_tokens,
        ours=clocked(JoinedStep(cfg, batch, is_ours=True).run),
        theirs=clocked(JoinedStep(cfg, batch, is_ours=False).run),
        check=partial(same_joined, cfg, batch),
        least_s=lambda floors: own / floors.flops_per_s,
    )


def lm_peak(dtype_name: str, *, is_ours: bool) -> int:
    """Bytes that the language model, its optimiser and two steps take beyond a process at rest."""
    rest(is_ours)

    def work() -> None:
        step = LMStep(small_lm(), DTYPES[dtype_name], lm_batch(), is_ours=is_ours)
        step.run()
        step.run()

    return peak_of(work)


def joined_peak(*, is_ours: bool) -> int:
    """The same for the demo's joined model."""
    rest(is_ours)

    def work() -> None:
        step = JoinedStep(demo_joined(), joined_batch(), is_ours=is_ours)
        step.run()
        step.run()

    return peak_of(work)


def rest(is_ours: bool) -> None:
    """Import what is needed, and let libraries take their buffers."""
    cfg = demo_joined()
    JoinedStep(cfg, picture_batch(cfg, (1,), (9,), 2), is_ours=is_ours).run()


def footprints() -> Iterator[Footprint]:
    """Peaks of those steps, in a fresh process each."""
    for name, dtype in DTYPES.items():
        yield Footprint(
            suite="memory",
            name=f"LM step {name}, peak of weights, optimiser and step",
            peer="transformers Phi3ForCausalLM, padded",
            ours=partial(lm_peak, name, is_ours=True),
            theirs=partial(lm_peak, name, is_ours=False),
            check=partial(same_lm, small_lm(), dtype, lm_batch()),
        )
    yield Footprint(
        suite="memory",
        name="demo step fp32, peak of weights, optimiser and step",
        peer="transformers SigLIP + Idefics2 perceiver + Phi-3",
        ours=partial(joined_peak, is_ours=True),
        theirs=partial(joined_peak, is_ours=False),
        check=partial(same_joined, demo_joined(), joined_batch()),
    )
    yield from head_footprints()
