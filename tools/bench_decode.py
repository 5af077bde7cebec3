"""Suites `decode` and `prefill`: tokens a second behind a prompt, and the time to the first of them."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from msgspec.structs import replace
from torch import Tensor

from bench_models import demo_joined, random_lm, small_lm, their_lm, their_tower
from bench_pairs import FloorGauge, Floors, GateError, Pair, agree, clocked
from blip3_lite import Blip3, ChatMemory, EncodedSample, generate_steps
from fused_kernels import linear
from phi3_lite import GenerationStep, Phi3, Phi3Config, SamplingConfig, collect, generate, lay_out_for_decoding
from siglip_lite import SiglipVision, so400m_patch14_384

_PROMPT, _NEW = 64, 128
_RAGGED = (12, 64, 33, 47, 25, 58, 19, 40)


def bytes_per_token(model: Phi3, positions: int) -> int:
    """What a step of one row reads: all weights but the embedding's, and keys and values of so many positions."""
    cfg = model.cfg
    weights = sum(value.nbytes for name, value in model.state_dict().items() if "embed_tokens" not in name)
    itemsize = model.model.norm.weight.element_size()
    return weights + 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * positions * itemsize


def our_steps(model: Phi3, prompts: Sequence[Tensor], num_new: int) -> Iterator[GenerationStep]:
    """Greedy, a ragged batch without padding."""
    bounds = torch.tensor([0, *map(len, prompts)]).cumsum(0).int()
    with torch.inference_mode():
        inputs = model.embed(torch.cat(list(prompts)))
    return generate(model, inputs, bounds, SamplingConfig(max_new_tokens=num_new))


def our_answers(model: Phi3, prompts: Sequence[Tensor], num_new: int) -> list[list[int]]:
    """The tokens of all steps."""
    return collect(our_steps(model, prompts, num_new))


def their_answers(theirs: torch.nn.Module, prompts: Sequence[Tensor], num_new: int) -> list[list[int]]:
    """Greedy, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    attention = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        attention[row, longest - len(prompt) :] = 1
    run: Callable[..., Tensor] = theirs.generate  # pyright: ignore[reportAssignmentType]
    out = run(input_ids=ids, attention_mask=attention, do_sample=False, max_new_tokens=num_new, min_new_tokens=num_new)
    return out[:, longest:].tolist()


def same_decoding(model: Phi3, theirs: torch.nn.Module, prompts: Sequence[Tensor], num_new: int) -> str:
    """Check the tokens where they are fp32's; else the logits, for bf16 rounds ties away.

    Raises:
        GateError: they differ.
    """
    if model.model.norm.weight.dtype == torch.float32:
        ours, others = our_answers(model, prompts, num_new), their_answers(theirs, prompts, num_new)
        if ours != others:
            raise GateError(f"tokens: expected the same {num_new}, got {ours[0][:8]}… and {others[0][:8]}…")
        return "tokens equal"
    with torch.inference_mode():
        own = model.logits(model(model.embed(prompts[0])))
        return agree("logits", own, theirs(input_ids=prompts[0][None]).logits[0], 2e-2)


def products_alone(model: Phi3) -> str:
    """How near a step's products come to the bandwidth of a copy, with nothing between them: the most a step can."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed_tokens" not in name]
    rows = {width: torch.randn(1, width).to(matrices[0].dtype) for width in {weight.shape[1] for weight in matrices}}

    @torch.inference_mode()
    def run() -> None:
        for weight in matrices:
            linear(rows[weight.shape[1]], weight)

    gauge = FloorGauge()
    read = sum(weight.nbytes for weight in matrices)
    shares = [read / gauge.measure().copy_bytes_per_s / clocked(run)() for _ in range(9)]
    return f"its products alone reach {statistics.median(shares):.0%}"


def decode_pair(name: str, cfg: Phi3Config, dtype: torch.dtype, lengths: Sequence[int], num_new: int) -> Pair:
    """Answers of a fixed length to random prompts."""
    model = random_lm(cfg, dtype).eval().requires_grad_(False)
    theirs = their_lm(model).eval()
    # as a chat does with a model that it has loaded
    lay_out_for_decoding(model)
    # a stop token would end the peer early; it is held off by min_new_tokens, which must not hide a likely token
    theirs.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, cfg.vocab_size, (length,), generator=generator) for length in lengths]
    per_token = bytes_per_token(model, max(lengths) + num_new // 2)
    is_bound_by_memory = len(lengths) == 1 and per_token > 3e7

    behind_first = [0.0]

    def ours() -> float:
        start = time.perf_counter()
        steps = our_steps(model, prompts, num_new)
        next(steps)
        first = time.perf_counter()
        collect(steps)
        end = time.perf_counter()
        behind_first[0] = end - first
        return end - start

    def least_s(floors: Floors) -> float:
        return (num_new - 1) * per_token / floors.copy_bytes_per_s

    def check() -> str:
        gate = same_decoding(model, theirs, prompts, num_new)
        floors = [products_alone(model)] if is_bound_by_memory else []
        return "; ".join([gate, *floors])

    return Pair(
        suite="decode",
        name=name,
        peer="transformers generate",
        unit="tokens/s",
        amount=num_new * len(lengths),
        ours=ours,
        theirs=clocked(partial(their_answers, theirs, prompts, num_new)),
        check=check,
        least_s=least_s if is_bound_by_memory else None,
        # the first token comes with the prompt, which is bound by its products
        held_s=lambda: behind_first[0],
    )


def decode_pairs() -> Iterator[Pair]:
    """The small language model, the demo's, and a ragged batch."""
    small, demo = small_lm(), demo_joined().lm
    yield decode_pair("LM decode fp32, 64 in, 128 out", small, torch.float32, [_PROMPT], _NEW)
    yield decode_pair("LM decode bf16, 64 in, 128 out", small, torch.bfloat16, [_PROMPT], _NEW)
    yield decode_pair("demo-size decode fp32, 64 in, 128 out", demo, torch.float32, [_PROMPT], _NEW)
    yield decode_pair("demo-size decode bf16, 64 in, 128 out", demo, torch.bfloat16, [_PROMPT], _NEW)
    yield decode_pair("LM decode fp32, 8 ragged prompts of 12 to 64, 32 out", small, torch.float32, _RAGGED, 32)
    yield decode_pair("LM decode bf16, 8 ragged prompts of 12 to 64, 32 out", small, torch.bfloat16, _RAGGED, 32)


_ANSWER = SamplingConfig(max_new_tokens=30)
_ONE = SamplingConfig(max_new_tokens=1)


def conversation(model: Blip3, num_tiles: int) -> tuple[EncodedSample, EncodedSample]:
    """A first turn about a picture with 40 tokens of text, and a second of 20 behind the answer's 30."""
    cfg, generator = model.cfg, torch.Generator().manual_seed(5)
    num_image, side = num_tiles * cfg.connector.num_latents, cfg.tiling.tile_px
    ids = torch.randint(3, cfg.lm.vocab_size, (num_image + 40,), generator=generator)
    tiles = torch.randint(0, 256, (num_tiles, 3, side, side), generator=generator, dtype=torch.uint8)

    def turn(ids: Tensor) -> EncodedSample:
        return EncodedSample(
            id="turn",
            source="bench",
            ids=ids,
            targets=torch.full_like(ids, -100),
            image_index=torch.arange(5, 5 + num_image),
            tiles=tiles,
            valid=torch.ones(num_tiles, cfg.vision.num_patches, dtype=torch.bool),
            tiles_per_image=(num_tiles,),
            tile_keys=tuple(f"tile {number}" for number in range(num_tiles)),
        )

    first = turn(ids)
    (answer,) = collect(generate_steps(model, [first], _ANSWER, ()))
    new = torch.randint(3, cfg.lm.vocab_size, (20,), generator=generator)
    return first, turn(torch.cat([ids, torch.tensor(answer), new]))


def first_token_of_second_turn(model: Blip3, first: EncodedSample, second: EncodedSample) -> float:
    """Seconds to it, the first turn and its answer being remembered."""
    memory = ChatMemory(model)
    collect(memory.generate_steps(first, _ANSWER, ()))
    start = time.perf_counter()
    collect(memory.generate_steps(second, _ONE, ()))
    return time.perf_counter() - start


def same_second_turn(model: Blip3, first: EncodedSample, second: EncodedSample) -> str:
    """Check that the answer is that of the whole prompt; say what either first token's time is made of.

    Raises:
        GateError: it differs.
    """
    memory, sampling = ChatMemory(model), SamplingConfig(max_new_tokens=8)
    collect(memory.generate_steps(first, _ANSWER, ()))
    found = collect(memory.generate_steps(second, sampling, ()))
    whole = collect(generate_steps(model, [second], sampling, ()))
    if found != whole:
        raise GateError(f"tokens: expected {whole[0]}, got {found[0]}")
    again = ChatMemory(model)
    collect(again.generate_steps(first, _ANSWER, ()))
    ours = spent(model, lambda: collect(again.generate_steps(second, _ONE, ())))
    theirs = spent(model, lambda: collect(generate_steps(model, [second], _ONE, ())))
    return f"tokens equal; ours: {ours}; theirs: {theirs}"


def spent(model: Blip3, work: Callable[[], object]) -> str:
    """The milliseconds that work takes, and those of them within the parts of the model."""
    lm = model.lang_model
    places = [(model.vision_encoder, "forward"), (model.vision_tokenizer, "forward"), (lm, "prefill"), (lm, "logits")]
    seconds = [0.0] * len(places)

    def watched(place: int, run: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        start = time.perf_counter()
        out = run(*args, **kwargs)
        seconds[place] += time.perf_counter() - start
        return out

    for place, (module, name) in enumerate(places):
        setattr(module, name, partial(watched, place, getattr(module, name)))
    total = clocked(work)()
    for module, name in places:
        delattr(module, name)
    names = ("tower", "connector", "prefill", "head")
    within = [f"{name} {1e3 * part_s:.1f}" for name, part_s in zip(names, seconds, strict=True) if part_s]
    return f"{', '.join(within)} of {1e3 * total:.1f} ms"


def chat_pair(name: str, model: Blip3, num_tiles: int) -> Pair:
    """The second turn over a picture, with and without what the first has read."""
    first, second = conversation(model, num_tiles)
    return Pair(
        suite="prefill",
        name=name,
        peer="ours, without reuse",
        ours=partial(first_token_of_second_turn, model, first, second),
        theirs=clocked(lambda: collect(generate_steps(model, [second], _ONE, ()))),
        check=partial(same_second_turn, model, first, second),
    )


def tower_pair(name: str, tower: SiglipVision, num_tiles: int) -> Pair:
    """Tiles through the vision tower."""
    from bench_models import tower_flops

    theirs = their_tower(tower).eval()
    size = tower.cfg.image_px
    pixels = torch.rand(num_tiles, 3, size, size, generator=torch.Generator().manual_seed(6)) * 2 - 1

    @torch.inference_mode()
    def ours() -> Tensor:
        return tower(pixels)

    @torch.inference_mode()
    def others() -> Tensor:
        return theirs(pixel_values=pixels).last_hidden_state

    flops = tower_flops(tower.cfg, num_tiles)
    return Pair(
        suite="prefill",
        name=name,
        peer="transformers SiglipVisionModel",
        ours=clocked(ours),
        theirs=clocked(others),
        check=lambda: agree("features", ours(), others(), 1e-4),
        least_s=lambda floors: flops / floors.flops_per_s,
    )


def prompt_pair(name: str, cfg: Phi3Config, length: int) -> Pair:
    """One pass over a prompt, up to the logits behind it."""
    model = random_lm(cfg).eval().requires_grad_(False)
    theirs = their_lm(model).eval()
    ids = torch.randint(3, cfg.vocab_size, (length,), generator=torch.Generator().manual_seed(7))
    bounds = torch.tensor([0, length], dtype=torch.int32)

    @torch.inference_mode()
    def ours() -> Tensor:
        return model.logits(model.prefill(model.embed(ids), bounds, model.new_cache(1)))

    @torch.inference_mode()
    def others() -> Tensor:
        return theirs(input_ids=ids[None], use_cache=True, logits_to_keep=1).logits[:, -1]

    return Pair(
        suite="prefill",
        name=name,
        peer="transformers Phi3ForCausalLM",
        ours=clocked(ours),
        theirs=clocked(others),
        check=lambda: agree("logits", ours(), others(), 1e-4),
    )


def prefill_pairs() -> Iterator[Pair]:
    """Prompts, second turns, and tiles through the published tower."""
    cfg = demo_joined()
    # nobody else's tower is compared here: the demo's own stem
    cfg = replace(cfg, vision=replace(cfg.vision, stem="conv"))
    demo = Blip3(cfg, generator=torch.Generator().manual_seed(0)).eval().requires_grad_(False)
    yield chat_pair("second turn over 5 tiles, demo-size: time to first token", demo, 5)
    yield chat_pair("second turn over 5 tiles, 4 layers of so400m + small LM", larger(), 5)
    yield prompt_pair("LM prefill fp32, 1024 tokens", small_lm(), 1024)
    with torch.no_grad():
        tower = SiglipVision(replace(so400m_patch14_384().vision, use_head=False)).eval().requires_grad_(False)
    yield tower_pair("SigLIP so400m fp32, one tile", tower, 1)


def larger() -> Blip3:
    """A published tower's width in front of the small language model."""
    cfg = demo_joined()
    vision = replace(so400m_patch14_384().vision, use_head=False, num_layers=4)
    connector = replace(cfg.connector, dim=vision.width, dim_out=small_lm().width, num_latents=128, head_dim=96)
    cfg = replace(
        cfg, vision=vision, connector=connector, lm=small_lm(), tiling=replace(cfg.tiling, tile_px=vision.image_px)
    )
    return Blip3(cfg, generator=torch.Generator().manual_seed(0)).eval().requires_grad_(False)
