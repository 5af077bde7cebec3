"""Choosing tokens and the decoding loop."""

import msgspec
import pytest
import torch

from phi3_lite import (
    FINISHED,
    Phi3,
    Phi3Config,
    SamplingConfig,
    choose_tokens,
    collect,
    generate,
    penalise_repeats,
)

pytestmark = pytest.mark.usefixtures("each_way")

TINY = Phi3Config(
    vocab_size=23, width=16, num_layers=2, num_heads=2, num_kv_heads=1, mlp_width=20, sliding_window=6, init_std=0.4
)
LENGTHS = [5, 1, 3, 7, 2]
# 0.5, 0.3 and 0.2, not in order
LOGITS = torch.tensor([[0.3, 0.5, 0.2]]).log()


def _prompts() -> tuple[Phi3, torch.Tensor, torch.Tensor]:
    model = Phi3(TINY, generator=torch.Generator().manual_seed(5))
    return model, torch.randn(sum(LENGTHS), TINY.width), torch.tensor([0, *LENGTHS]).cumsum(0).int()


def _choose(uniform: float, *, temperature: float, top_p: float = 1.0) -> int:
    sampling = SamplingConfig(temperature=temperature, top_p=top_p)
    return int(choose_tokens(LOGITS, sampling, torch.tensor([uniform])))


def test_greedy_takes_the_most_likely() -> None:
    assert choose_tokens(torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), SamplingConfig()).tolist() == [1, 0]


def test_token_is_the_one_in_whose_stretch_the_number_falls() -> None:
    drawn = [_choose(u, temperature=1.0) for u in (0.0, 0.49, 0.51, 0.79, 0.81, 1 - 2**-24)]
    assert drawn == [1, 1, 0, 0, 2, 2]


def test_temperature_sharpens() -> None:
    # at 1/2 the probabilities are squared: 0.25, 0.09, 0.04 of 0.38
    drawn = [_choose(u, temperature=0.5) for u in (0.25 / 0.38 - 0.01, 0.25 / 0.38 + 0.01, 0.34 / 0.38 + 0.01)]
    assert drawn == [1, 0, 2]


def test_top_p_keeps_the_token_that_crosses_the_mass_and_drops_the_rest() -> None:
    # 0.6 needs two tokens, of mass 0.8: the first has 0.5 / 0.8 of it
    drawn = [_choose(u, temperature=1.0, top_p=0.6) for u in (0.62, 0.63, 1 - 2**-24)]
    assert drawn == [1, 0, 0]
    assert _choose(1 - 2**-24, temperature=1.0, top_p=0.01) == 1


def test_sampling_follows_the_softmax() -> None:
    logits = torch.randn(1, 11)
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    drawn = choose_tokens(logits.expand(20_000, -1), SamplingConfig(temperature=0.7), uniform)
    torch.testing.assert_close(
        drawn.bincount(minlength=11) / 20_000, torch.softmax(logits[0] / 0.7, dim=-1), rtol=0, atol=1e-4
    )


def test_sampling_without_numbers_raises() -> None:
    with pytest.raises(ValueError, match="uniform"):
        choose_tokens(LOGITS, SamplingConfig(temperature=1.0))


def test_greedy_generation_equals_the_model_without_cache() -> None:
    model, inputs, bounds = _prompts()
    tokens = collect(generate(model, inputs, bounds, SamplingConfig(max_new_tokens=12)))
    for row, prompt in enumerate(inputs.split(LENGTHS)):
        expected: list[int] = []
        with torch.inference_mode():
            for _ in range(12):
                hidden = model(torch.cat([prompt, model.embed(torch.tensor(expected, dtype=torch.int64))]))
                expected.append(int(model.logits(hidden[-1]).argmax()))
        assert tokens[row] == expected


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_rows_end_at_their_own_stop_token_and_disturb_no_other(temperature: float) -> None:
    model, inputs, bounds = _prompts()
    sampling = SamplingConfig(max_new_tokens=20, temperature=temperature)
    free = collect(generate(model, inputs, bounds, sampling, (), torch.Generator().manual_seed(0)))
    # each row is to stop at what it says at step `row`, so that rows leave one by one
    stops = [[free[row][row]] for row in range(len(LENGTHS))]
    steps = list(generate(model, inputs, bounds, sampling, stops, torch.Generator().manual_seed(0)))
    for row, stop in enumerate(stops):
        length = free[row].index(stop[0]) + 1
        seen = [int(step.tokens[row]) for step in steps]
        assert seen == free[row][:length] + [FINISHED] * (len(steps) - length)
        assert [bool(step.is_finished[row]) for step in steps] == [i >= length - 1 for i in range(len(steps))]
    assert len(steps) == max(free[row].index(stop[0]) + 1 for row, stop in enumerate(stops)) < 20


def test_an_ended_row_gives_finished_also_while_it_is_still_in_the_batch() -> None:
    model, inputs, bounds = _prompts()
    sampling = SamplingConfig(max_new_tokens=4)
    free = collect(generate(model, inputs, bounds, sampling))
    # one of five ended is too few for the batch to be cut
    stops = [[], [free[1][0]], [], [], []]
    expected = [row if index != 1 else row[:1] for index, row in enumerate(free)]
    assert collect(generate(model, inputs, bounds, sampling, stops)) == expected


def test_shared_stop_ids_serve_all_rows() -> None:
    model, inputs, bounds = _prompts()
    sampling = SamplingConfig(max_new_tokens=10)
    free = collect(generate(model, inputs, bounds, sampling))
    stops = [free[0][2], free[1][0]]
    for row, tokens in enumerate(collect(generate(model, inputs, bounds, sampling, stops))):
        ends = [i for i, token in enumerate(free[row]) if token in stops]
        assert tokens == free[row][: ends[0] + 1 if ends else None]


def test_generation_ends_at_max_new_tokens_with_rows_unfinished() -> None:
    model, inputs, bounds = _prompts()
    steps = list(generate(model, inputs, bounds, SamplingConfig(max_new_tokens=3)))
    assert len(steps) == 3
    assert not steps[-1].is_finished.any()


def test_same_generator_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    model, inputs, bounds = _prompts()
    sampling = SamplingConfig(max_new_tokens=8, temperature=1.0)
    first, again, other = (
        collect(generate(model, inputs, bounds, sampling, (), torch.Generator().manual_seed(seed)))
        for seed in (7, 7, 8)
    )
    assert first == again
    assert first != other


def test_generation_leaves_the_global_generator_and_gradient_mode_alone() -> None:
    model, inputs, bounds = _prompts()
    before = torch.get_rng_state()
    steps = generate(model, inputs, bounds, SamplingConfig(temperature=1.0), (), torch.Generator().manual_seed(0))
    next(steps)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(torch.get_rng_state(), before)
    assert model(inputs, cu_seqlens=bounds).requires_grad


def test_temperature_near_zero_equals_greedy() -> None:
    model, inputs, bounds = _prompts()
    greedy = SamplingConfig(max_new_tokens=6)
    cold = msgspec.structs.replace(greedy, temperature=1e-4)
    assert collect(generate(model, inputs, bounds, greedy)) == collect(generate(model, inputs, bounds, cold))


def test_stop_ids_of_the_wrong_form_raise() -> None:
    model, inputs, bounds = _prompts()
    for stops in ([[1], [2]], [1, [2]]):
        with pytest.raises(ValueError, match="stop_ids"):
            next(generate(model, inputs, bounds, SamplingConfig(), stops))


def test_logits_that_are_all_equal_sample_within_the_vocabulary() -> None:
    tokens = choose_tokens(
        torch.zeros(4, 5), SamplingConfig(temperature=1.0), torch.tensor([0.0, 0.3, 0.7, 1 - 2**-24])
    )
    assert all(0 <= token < 5 for token in tokens.tolist())
    assert len(set(tokens.tolist())) == 4


def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    seen = torch.tensor([[True, True, False, False]])
    penalised = penalise_repeats(torch.tensor([[3.0, -2.0, 3.0, -2.0]]), seen, 1.5)
    assert penalised.tolist() == [[2.0, -3.0, 3.0, -2.0]]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_repetition_penalty_counts_each_rows_prompt_and_answer(temperature: float) -> None:
    model, inputs, bounds = _prompts()
    sampling = SamplingConfig(max_new_tokens=10, temperature=temperature, repetition_penalty=1.7)
    prompt_ids = [[row, row + 5] for row in range(len(LENGTHS))]

    def run(stops: list[list[int]]) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        return collect(generate(model, inputs, bounds, sampling, stops, generator, prompt_ids=prompt_ids))

    # rows that end at different times: the table of seen tokens must follow its row through the cuts
    stops = [[tokens[row]] for row, tokens in enumerate(run([[]] * len(LENGTHS)))]
    found = run(stops)
    numbers = torch.Generator().manual_seed(0)
    uniforms = [torch.rand(len(LENGTHS), generator=numbers) for _ in range(10 if temperature else 0)]
    for row, prompt in enumerate(inputs.split(LENGTHS)):
        said: list[int] = []
        for step in range(10):
            with torch.no_grad():
                hidden = model(torch.cat([prompt, model.embed(torch.tensor(said, dtype=torch.int64))]))
                logits = model.logits(hidden[-1:])[0]
            for token in {*prompt_ids[row], *said}:
                logits[token] = logits[token] * 1.7 if logits[token] < 0 else logits[token] / 1.7
            said.append(int(choose_tokens(logits[None], sampling, uniforms[step][row : row + 1] if uniforms else None)))
            if said[-1] in stops[row]:
                break
        assert found[row] == said
    plain = msgspec.structs.replace(sampling, repetition_penalty=1.0)
    assert found != collect(generate(model, inputs, bounds, plain, stops, torch.Generator().manual_seed(0)))


def test_penalty_without_prompt_ids_counts_what_was_generated() -> None:
    model, inputs, bounds = _prompts()
    # so strong that a token with a positive logit never comes twice
    tokens = collect(generate(model, inputs, bounds, SamplingConfig(max_new_tokens=6, repetition_penalty=1e6)))
    assert all(len(set(row)) == 6 for row in tokens)
    assert any(len(set(row)) < 6 for row in collect(generate(model, inputs, bounds, SamplingConfig(max_new_tokens=6))))


@pytest.mark.parametrize("prompt_ids", [[[1]], [[1], [2], [3], [4], [23]], [[1], [2], [3], [4], [-1]]])
def test_prompt_ids_that_fit_no_row_or_no_token_raise(prompt_ids: list[list[int]]) -> None:
    model, inputs, bounds = _prompts()
    with pytest.raises(ValueError, match="prompt_ids: expected ids below 23 for each of 5 rows"):
        next(generate(model, inputs, bounds, SamplingConfig(repetition_penalty=2.0), prompt_ids=prompt_ids))


@pytest.mark.parametrize("penalty", [0.0, -1.0])
def test_penalty_that_is_not_positive_raises(penalty: float) -> None:
    with pytest.raises(ValueError, match="repetition_penalty"):
        SamplingConfig(repetition_penalty=penalty)


def test_rows_end_where_the_caller_says_and_disturb_no_other() -> None:
    model, inputs, bounds = _prompts()
    sampling = SamplingConfig(max_new_tokens=9)
    free = collect(generate(model, inputs, bounds, sampling))
    asked: list[list[int]] = []

    def ends(tokens: torch.Tensor) -> torch.Tensor:
        asked.append(tokens.tolist())
        # each row is to end with its step number `row`
        return torch.tensor([len(asked) == row + 1 for row in range(len(LENGTHS))])

    assert collect(generate(model, inputs, bounds, sampling, ends=ends)) == [
        row[: index + 1] for index, row in enumerate(free)
    ]
    assert len(asked) == len(LENGTHS)
    assert asked[1][0] == FINISHED


def test_margins_are_those_of_each_rows_own_logits_and_infinite_behind_its_end() -> None:
    model, inputs, bounds = _prompts()
    sampling = SamplingConfig(max_new_tokens=6)
    rows = collect(generate(model, inputs, bounds, sampling))
    stop_ids = [[row[2]] if index % 2 else [] for index, row in enumerate(rows)]
    steps = list(generate(model, inputs, bounds, sampling, stop_ids, with_margins=True))
    for row, (start, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        told = [step for step in steps if step.tokens[row] != FINISHED]
        said = torch.tensor([int(step.tokens[row]) for step in told])
        whole = torch.cat([inputs[start:end], model.embed(said)]).detach()
        length = torch.tensor([0, len(whole)], dtype=torch.int32)
        logits = model.logits(model(whole, torch.arange(len(whole)), length))[end - start - 1 : -1]
        first, second = logits.topk(2, dim=-1).values.unbind(-1)
        margins = torch.stack([step.margins[row] for step in told if step.margins is not None])
        torch.testing.assert_close(margins, first - second)
        behind = [step.margins[row] for step in steps[len(told) :] if step.margins is not None]
        assert all(margin == torch.inf for margin in behind)
    assert all(step.margins is None for step in generate(model, inputs, bounds, sampling))
