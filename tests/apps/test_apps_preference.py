"""Preference stages: the kept reference, losses by name, the step on noised pictures, pairs of own errors."""

import io
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

import lora_lite
from blip3_lite import collate
from dpo_lite import DpoConfig, ReferenceCacheError, kto_baseline
from interleave_data import ImagePart, PreferenceSample, Sample, SkipLimits, TextPart, TooManySkips, Turn
from trainer_lite import QuietProgress

ADAPTERS = lora_lite.LoraConfig(rank=2, alpha=4, targets=("qkv_proj", "o_proj"))
ANSWERS = [("red", "green"), ("a blue square", "no"), ("green", "what is red?"), ("the square", "red")]


@pytest.fixture
def app(repo_root: Path, monkeypatch: pytest.MonkeyPatch):
    """Import the app's modules, which stand outside every package."""
    monkeypatch.syspath_prepend(str(repo_root / "apps" / "train"))
    import train_answers
    import train_noise
    import train_objectives
    import train_pairs
    import train_preparation
    import train_run
    import train_stages
    import train_stream

    class App:
        answers, noise, objectives, run = train_answers, train_noise, train_objectives, train_run
        pairs, preparation, stages, stream = train_pairs, train_preparation, train_stages, train_stream

    return App


def picture(number: int) -> ImagePart:
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number, 16), (40 * number, 90, 200)).save(buffer, format="PNG")
    return ImagePart(buffer.getvalue(), key=f"picture {number}")


def preference(number: int, answers=None) -> PreferenceSample:
    turns = (Turn("user", (picture(number), TextPart("what colour?"))),)
    return PreferenceSample(str(number), "toy", turns, *(answers or ANSWERS[number]))


def pack_of(app, processor, samples):
    documents = [part for sample in samples for part in processor.encode_preference(sample)]
    digests = [app.objectives.sample_digest(document) for document in documents]
    return app.objectives.PairPack([sample.id for sample in samples], collate(documents), digests, documents)


def objective(app, model, **cfg):
    lora_lite.attach(model.lang_model, ADAPTERS)
    return app.objectives.Preference(model, DpoConfig(**cfg))


def move_adapters(model) -> None:
    with torch.no_grad():
        for parameter in lora_lite.lora_parameters(model.lang_model):
            parameter.normal_(std=0.3)


class InMemory:
    """Samples in a list."""

    fingerprint = "in memory"

    def __init__(self, name: str, samples: list) -> None:
        self.name, self.samples = name, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        return self.samples[index]


def test_kept_reference_is_the_live_one_bit_for_bit_in_the_same_pack(app, tiny_model, tiny_processor) -> None:
    found = objective(app, tiny_model)
    batch = pack_of(app, tiny_processor, [preference(number) for number in range(4)])
    found.loss(batch)
    move_adapters(tiny_model)
    with torch.no_grad(), lora_lite.disabled(tiny_model):
        live = app.objectives.answer_log_probs(tiny_model, batch.pack)
        other = pack_of(app, tiny_processor, [preference(number) for number in (2, 0)])
        live_in_another = app.objectives.answer_log_probs(tiny_model, other.pack)
    assert found.reference.get(batch.digests).equal(live)
    torch.testing.assert_close(found.reference.get(other.digests), live_in_another, atol=1e-5, rtol=0)
    # Nothing is left for the reference to do.
    assert found.reference.missing(other.digests) == []


def test_reference_is_kept_by_content_and_not_by_id(app, tiny_model, tiny_processor) -> None:
    found = objective(app, tiny_model)
    first, second = preference(0, ("red", "green")), preference(0, ("red", "blue"))
    other_picture = PreferenceSample("0", "toy", preference(1).turns, "red", "green")
    for sample in (first, second, other_picture):
        batch = pack_of(app, tiny_processor, [sample])
        out = found.loss(batch)
        # A policy that is the reference: nothing has moved, whichever answer the id has stood for.
        assert out.parts["kl"] == pytest.approx(0, abs=1e-10)
    # The chosen answer of the first two is one and the same.
    assert len(found.reference) == 5


def test_reference_has_no_noise_and_no_dropout(app, tiny_model, tiny_processor) -> None:
    adapters = lora_lite.LoraConfig(rank=2, alpha=4, dropout=0.5, targets=("qkv_proj",))
    batch = pack_of(app, tiny_processor, [preference(0)])
    plain = app.objectives.answer_log_probs(tiny_model, batch.pack).detach()
    lora_lite.attach(tiny_model.lang_model, adapters)
    tiny_model.train()
    tiny_model.neftune_alpha = 50.0
    found = app.objectives.Preference(tiny_model, DpoConfig())
    out = found.loss(batch)
    assert tiny_model.training
    assert found.reference.get(batch.digests).equal(plain)
    assert out.parts["kl"] > 0


@pytest.mark.parametrize("kind", ["dpo-norm", "ipo", "reference-free", "simpo", "orpo", "kto"])
def test_each_loss_is_trained_by_its_name(app, tiny_model, tiny_processor, kind) -> None:
    found = objective(app, tiny_model, kind=kind)
    batch = pack_of(app, tiny_processor, [preference(number) for number in range(3)])
    parameters = lora_lite.lora_parameters(tiny_model.lang_model)
    optimiser = torch.optim.Adam(parameters, lr=0.03)
    margins = []
    for _ in range(6):
        out = found.loss(batch)
        margins.append(out.parts["reward_margin"])
        optimiser.zero_grad()
        out.total.backward()
        optimiser.step()
    assert margins[-1] > margins[0]
    assert ("kl" in out.parts) == (kind not in ("reference-free", "simpo", "orpo"))
    assert (len(found.reference) > 0) == (kind not in ("reference-free", "simpo", "orpo"))


@torch.no_grad()
def test_exchanged_answers_are_those_of_samples_that_were_encoded_so(app, tiny_model, tiny_processor) -> None:
    samples = [preference(number) for number in range(3)]
    batch = pack_of(app, tiny_processor, samples)
    exchanged = app.answers.with_exchanged_answers(batch.pack)
    expected = pack_of(app, tiny_processor, [preference(number, ANSWERS[(number + 1) % 3]) for number in range(3)]).pack
    # What follows the answer, which nothing is learnt from, may differ in length: compare what the model makes of it.
    torch.testing.assert_close(
        app.objectives.answer_log_probs(tiny_model, exchanged),
        app.objectives.answer_log_probs(tiny_model, expected),
        atol=1e-5,
        rtol=0,
    )
    assert app.answers.with_exchanged_answers(pack_of(app, tiny_processor, samples[:1]).pack) is None


def test_baseline_of_kto_is_the_mean_over_exchanged_answers(app, tiny_model, tiny_processor) -> None:
    found = objective(app, tiny_model, kind="kto", beta=0.5)
    batch = pack_of(app, tiny_processor, [preference(number) for number in range(3)])
    move_adapters(tiny_model)
    exchanged = app.answers.with_exchanged_answers(batch.pack)
    with torch.no_grad():
        policy = app.objectives.answer_log_probs(tiny_model, exchanged)
        own = app.objectives.answer_log_probs(tiny_model, batch.pack)
        with lora_lite.disabled(tiny_model):
            z = kto_baseline(policy, app.objectives.answer_log_probs(tiny_model, exchanged))
            ratios = own - app.objectives.answer_log_probs(tiny_model, batch.pack)
    signs = torch.tensor([1.0, -1.0]).repeat(3)
    expected = (1 - torch.sigmoid(0.5 * signs * (ratios - z))).sum() / 2
    assert found.loss(batch).total.item() == pytest.approx(expected.item(), rel=1e-4)


def test_noise_has_the_variance_that_was_asked_for_and_another_name(app, tiny_processor) -> None:
    sample, _ = tiny_processor.encode_preference(preference(1))
    generator = torch.Generator().manual_seed(3)
    all_noise = app.answers.noised(sample, 1.0, generator)
    values = all_noise.tiles.float() / 127.5 - 1
    # A normal distribution cut at one standard deviation: its mean square is 0.516.
    assert values.square().mean().item() == pytest.approx(0.516, abs=0.02)
    little = app.answers.noised(sample, 1e-6, generator)
    assert (little.tiles.int() - sample.tiles.int()).abs().max() <= 2
    assert set(all_noise.tile_keys).isdisjoint(sample.tile_keys)
    assert len(set(all_noise.tile_keys)) == len(sample.tile_keys)
    with pytest.raises(ValueError, match="noise: expected above 0"):
        app.answers.noised(sample, 0.0, generator)


def test_an_answer_that_is_put_in_is_encoded_as_the_processor_does(app, tiny_processor) -> None:
    chosen, rejected = tiny_processor.encode_preference(preference(1))
    start = app.answers.answer_start(rejected.targets)
    tokens = [token for token in rejected.targets[start:].tolist() if token != -100][:-1]
    made = app.answers.with_answer(chosen, tokens)
    num = made.length
    assert made.ids.equal(rejected.ids[:num])
    assert made.targets.equal(rejected.targets[:num])
    assert (rejected.targets[num:] == -100).all()
    prompt = app.answers.prompt_of(chosen)
    assert prompt.ids.equal(tiny_processor.encode_prompt(Sample("x", "toy", preference(1).turns)).ids)


def noised_stream(app, model, processor, samples, accumulation=2):
    from train_config import StageConfig
    from trainer_lite import TrainConfig

    stage = StageConfig(
        train=TrainConfig(max_steps=4, accumulation_steps=accumulation),
        objective="preference",
        use_lora=True,
        max_samples=1,
        noise=0.9,
    )
    data = app.stream.StageData([InMemory("toy", samples)])
    return app.noise.NoisedStream(
        app.stream.make_stream(stage, data, processor, None),
        model,
        processor,
        noise=0.9,
        batches_a_step=accumulation,
        seed=5,
    )


def outline(batch):
    return batch.sample_ids, batch.pack.ids.tolist(), batch.pack.targets.tolist(), batch.digests


def test_batches_of_a_step_are_followed_by_their_prompts_with_the_models_own_answers(
    app, tiny_model, tiny_processor
) -> None:
    samples = [preference(number) for number in range(4)]
    batches = list(islice(noised_stream(app, tiny_model, tiny_processor, samples), 8))
    assert [batch.sample_ids for batch in batches[:2]] == [batch.sample_ids for batch in batches[2:4]]
    assert [batch.sample_ids for batch in batches[4:6]] == [batch.sample_ids for batch in batches[6:]]
    for given, made in zip(batches[:2], batches[2:4], strict=True):
        assert made.digests[0] == given.digests[0]
        assert made.digests[1] != given.digests[1]
        # The rejected answer is what the model says to the noised picture, behind the picture itself.
        assert made.documents[1].tile_keys == given.documents[0].tile_keys
        assert made.pack.tiles.equal(given.pack.tiles)


def test_an_answer_that_stays_right_in_spite_of_the_noise_makes_no_pair(
    app, tiny_model, tiny_processor, monkeypatch
) -> None:
    chosen, _ = tiny_processor.encode_preference(preference(1))
    start = app.answers.answer_start(chosen.targets)
    tokens = [token for token in chosen.targets[start:].tolist() if token != -100][:-1]
    monkeypatch.setattr(app.answers, "answers_to", lambda model, prompts, stop_ids, max_new_tokens: [tokens, [7]])
    rivals = app.answers.noised_rivals(tiny_model, tiny_processor, [chosen, chosen], 0.5, torch.Generator())
    assert list(rivals) == [1]
    monkeypatch.setattr(app.noise, "noised_rivals", lambda *arguments: {})
    batches = list(islice(noised_stream(app, tiny_model, tiny_processor, [preference(0)], accumulation=1), 2))
    assert batches[1].num_targets == 0
    lora_lite.attach(tiny_model.lang_model, ADAPTERS)
    assert app.objectives.Preference(tiny_model, DpoConfig()).loss(batches[1]).total.item() == 0


def test_noised_steps_go_on_where_they_were(app, tiny_model, tiny_processor) -> None:
    samples = [preference(number) for number in range(4)]

    def stream(state=None):
        made = noised_stream(app, tiny_model, tiny_processor, samples)
        if state is not None:
            made.load_state_dict(json.loads(json.dumps(state)))
        return made

    whole = [outline(batch) for batch in islice(stream(), 12)]
    resumed, state = [], None
    # Ends within the given batches, between the two steps, within the second, and behind it.
    for count in (1, 1, 1, 1, 6, 0, 2):
        made = stream(state)
        assert made.changes(made.state_dict()) == []
        resumed += [outline(batch) for batch in islice(made, count)]
        state = made.state_dict()
    assert resumed == whole


def test_the_world_asks_as_often_about_what_is_there_as_about_what_is_not(app, parse) -> None:
    stage = parse("dpo", "--own-errors", "6", "--world-samples", "6")
    asked = app.run._stage_data("dpo", stage)
    (source,) = asked.sources
    answers = [source[number].turns[-1].parts[0].text for number in range(len(source))]
    assert sorted(answers) == ["no"] * 3 + ["yes"] * 3


def test_own_errors_become_pairs_and_are_read_again(app, tiny_model, tiny_processor, tmp_path, monkeypatch) -> None:
    talks = [
        Sample(str(n), "talk", (Turn("user", (picture(n), TextPart("which?"))), Turn("assistant", (TextPart(right),))))
        for n, right in enumerate(["Red  square", "blue", "green"])
    ]
    data = app.stream.StageData(
        [InMemory("talk", talks), InMemory("toy", [preference(0), preference(1)])], ratios=[3.0, 1.0]
    )
    said = iter(["red square", "green", "", "green", "a blue square"])

    draws = []

    def answer(model, processor, prompts, sampling, *, generator, **settings):
        assert sampling.temperature == 1.0
        draws.append(torch.rand(1, generator=generator).item())
        return [next(said) for _ in prompts]

    monkeypatch.setattr("eval_lite.prediction.answer_batch", answer)
    path = tmp_path / "own_errors.jsonl"
    made = app.pairs.own_errors(data, 3, tiny_model, tiny_processor, None, path, QuietProgress(), seed=0)
    # Right but for case and space; wrong; nothing said. Then wrong, and right.
    found = [(s.id, s.source, s.chosen, s.rejected) for source in made.sources for s in source]
    assert found == [("1", "talk", "blue", "green"), ("0", "toy", "red", "green")]
    seeded = torch.Generator().manual_seed(0)
    assert draws == [torch.rand(1, generator=seeded).item() for _ in range(2)]
    assert made.ratios == [3.0, 1.0]
    assert made.sources[0][0].images()[0].key == "picture 1"
    again = app.pairs.own_errors(data, 3, tiny_model, tiny_processor, None, path, QuietProgress(), seed=0)
    assert again.fingerprint == made.fingerprint != data.fingerprint
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[1])
    fewer = app.pairs.own_errors(data, 3, tiny_model, tiny_processor, None, path, QuietProgress(), seed=0)
    assert [source.name for source in fewer.sources] == ["toy"]
    assert fewer.ratios == [1.0]
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="own_errors: expected a wrong answer"):
        app.pairs.own_errors(data, 3, tiny_model, tiny_processor, None, path, QuietProgress(), seed=0)


def test_what_cannot_be_asked_of_own_errors_is_counted_and_limited(
    app, tiny_model, tiny_processor, tmp_path, monkeypatch
) -> None:
    broken = PreferenceSample("1", "toy", (Turn("user", (ImagePart(b"no picture"), TextPart("what?"))),), "red", "blue")
    samples = InMemory("toy", [preference(0), broken, preference(2)])
    monkeypatch.setattr("eval_lite.prediction.answer_batch", lambda model, processor, prompts, *_, **__: ["x", "y"])
    lines = []

    class Told(QuietProgress):
        def line(self, text: str) -> None:
            lines.append(text)

    data = app.stream.StageData([samples])
    made = app.pairs.own_errors(data, 3, tiny_model, tiny_processor, None, tmp_path / "a", Told(), seed=0)
    assert [(pair.id, pair.rejected) for pair in made.sources[0]] == [("0", "x"), ("2", "y")]
    assert lines == [
        "toy: 2 questions asked, 2 answered wrongly",
        "could not be asked, of all sources: not_an_image 1",
    ]
    strict = app.stream.StageData([samples], skip_limits=SkipLimits(max_consecutive=1))
    with pytest.raises(TooManySkips, match=r"toy: expected fewer than 1 bad samples in a row.* toy:1: not_an_image"):
        app.pairs.own_errors(strict, 3, tiny_model, tiny_processor, None, tmp_path / "b", Told(), seed=0)
    assert not (tmp_path / "b").exists()


def test_reference_of_all_answers_makes_adapters_needless(app, tiny_model, tiny_processor, tmp_path) -> None:
    from train_config import StageConfig
    from trainer_lite import TrainConfig

    stage = StageConfig(train=TrainConfig(max_steps=1), objective="preference", max_samples=2)
    assert stage.has_kept_reference
    data = app.stream.StageData([InMemory("toy", [preference(number) for number in range(4)])])
    path = tmp_path / "reference.json"
    cache = app.stages.kept_reference(tiny_model, stage, data, tiny_processor, None, path)
    assert len(cache) == 8
    batch = next(iter(app.stream.make_stream(stage, data, tiny_processor, None)))
    with torch.no_grad():
        live = app.objectives.answer_log_probs(tiny_model, batch.pack)
    torch.testing.assert_close(cache.get(batch.digests), live, atol=1e-5, rtol=0)
    # The weights themselves move then, and the reference stays where it was.
    found = app.objectives.Preference(tiny_model, stage.dpo, reference=cache)
    with torch.no_grad():
        tiny_model.lang_model.head_weight.normal_()
    assert found.loss(batch).parts["kl"] > 0.1
    assert cache.get(batch.digests).allclose(live, atol=1e-5)
    again = app.stages.kept_reference(tiny_model, stage, data, tiny_processor, None, path)
    assert again.get(batch.digests).equal(cache.get(batch.digests))
    other = app.stream.StageData([InMemory("other", [preference(0)])])
    with pytest.raises(ReferenceCacheError, match="fingerprint"):
        app.stages.kept_reference(tiny_model, stage, other, tiny_processor, None, path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": 0.5}, "noise: expected 0.0 without pairs"),
        ({"own_errors": 5}, "own_errors: expected None without pairs"),
        ({"objective": "preference", "noise": 1.5}, "noise: expected 0 to 1"),
        ({"objective": "preference", "noise": 0.5}, "use_lora: expected adapters"),
        ({"objective": "preference", "dpo": DpoConfig(kind="kto")}, "use_lora: expected adapters"),
        ({"objective": "preference", "own_errors": 0}, "own_errors: expected at least 1"),
        ({"neftune_alpha": -1.0}, "neftune_alpha: expected at least 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(app, settings, message) -> None:
    from train_config import StageConfig
    from trainer_lite import TrainConfig

    with pytest.raises(ValueError, match=message):
        StageConfig(train=TrainConfig(max_steps=1), **settings)
