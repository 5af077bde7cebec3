"""`train ablate NAME`: the starts that arms share, then each arm with each seed that has no result yet, then the page.

    runs/ablations/starts/{warmup,pretrain,sft,…}         checkpoints, shared by all ablations
    runs/ablations/NAME/arms/ARM-SEED.json                answers of one arm with one seed, whole or not there
    runs/ablations/NAME/{result.json,page.html,picture.svg}

Who works on something locks it, so that several commands can share the arms of one ablation.
"""

import fcntl
import os
import platform
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import msgspec
import torch

from blip3_lite import Blip3, FeatureCache, Processor, load_model, read_manifest, save_model
from blip3_lite.checkpoint import weights_file
from blip3_lite.device import device_words
from blip3_lite.folder import file_sha256
from train_ablate_arm import QUESTION_SEED, ArmResult, Starts, Task, result_path, run_arm
from train_ablate_config import AblateRun
from train_ablate_data import draw_questions
from train_ablate_plan import Ablation, Start
from train_ablate_report import Conclusion, conclude, write_page
from train_ablate_table import ABLATIONS, TOWERS
from train_errors import BadInputError, checking_input
from train_recipes import demo_model, pretrain_stage, sft_stage, warmup_stage
from train_stages import CheckpointFiles, fit_stage, stage_trainer
from train_stream import IMAGE_CACHE_BYTES, make_stream
from train_terminal import say
from train_vision import fit_warmup, warmup_trainer
from train_vision_data import WARMUP_KINDS
from train_world import stage_data, world_tokenizer
from trainer_lite import StopFlag, TqdmProgress
from trainer_lite.atomic import write_atomically

_CHAIN: tuple[Start, ...] = ("warmup", "pretrain", "sft")
_FEATURE_BYTES = 640 << 20


def run_ablation(name: str, config: AblateRun, device: torch.device, stop: StopFlag) -> bool:
    """Make what is missing, then the page if nothing is; return False if a signal stopped it."""
    ablation, root = ABLATIONS[name](), Path(config.out)
    folder = root / name
    with stop.on_signals():
        with checking_input():
            starts = _starts(ablation, config, root / "starts", device, stop)
        if starts is None:
            return False
        digests = {place: file_sha256(weights_file(path)) for place, path in starts.items()}
        wanted = [(arm, seed) for seed in range(config.seeds) for arm in ablation.arms]
        marks = {one: _fingerprint(ablation, *one, config.questions, digests, device) for one in wanted}
        missing = [one for one in wanted if _result(folder, *one, marks[one]) is None]
        num_done = len(wanted) - len(missing)
        say(
            f"{name}: {len(ablation.arms)} arms, {config.seeds} seeds each: {num_done} of {len(wanted)} done; "
            f"{device_words(device)}"
        )
        _train_missing(ablation, missing, marks, starts, config, folder, device, stop)
    results = {
        arm: [_result(folder, arm, seed, marks[arm, seed]) for seed in range(config.seeds)] for arm in ablation.arms
    }
    left = [f"{arm}-{seed}" for arm, row in results.items() for seed, one in enumerate(row) if one is None]
    if left:
        say(f"missing: {', '.join(left)}; the same command goes on with those that no other is at work on")
        return not stop.is_set
    by_arm = {arm: [one for one in row if one is not None] for arm, row in results.items()}
    _write(name, ablation, by_arm, folder, config, device)
    return True


def _train_missing(
    ablation: Ablation,
    missing: Sequence[tuple[str, int]],
    marks: dict[tuple[str, int], str],
    starts: dict[str, Path],
    config: AblateRun,
    folder: Path,
    device: torch.device,
    stop: StopFlag,
) -> None:
    progress, loaded = TqdmProgress(), None
    num_done, spent_s = 0, 0.0
    for place, (arm, seed) in enumerate(missing):
        if stop.is_set or num_done == config.max_arms:
            return
        with _held(folder / "arms" / f".{arm}-{seed}.lock") as is_held:
            # Another command may have made it since.
            if not is_held or _result(folder, arm, seed, marks[arm, seed]) is not None:
                continue
            if loaded is None:
                with checking_input():
                    loaded = _load(starts, ablation)
            left = f", about {spent_s / num_done * (len(missing) - place):.0f} s left" if num_done else ""
            say(f"arm {place + 1} of {len(missing)}: {arm}, seed {seed}{left}")
            began_s = time.monotonic()
            task = Task(ablation, arm, seed, config.questions, marks[arm, seed])
            made = run_arm(task, loaded, device, progress, stop)
            if made is None:
                say(f"stopped in {arm}, seed {seed}: that arm begins again, those before it stay")
                return
            write_atomically(result_path(folder, arm, seed), msgspec.json.encode(made))
            num_done, spent_s = num_done + 1, spent_s + time.monotonic() - began_s
            rights = [one.is_correct for one in made.predictions]
            say(f"{arm}, seed {seed}: {time.monotonic() - began_s:.0f} s, {sum(rights) / len(rights):.1%} right")


def _write(
    name: str,
    ablation: Ablation,
    by_arm: dict[str, list[ArmResult]],
    folder: Path,
    config: AblateRun,
    device: torch.device,
) -> None:
    gpu = [] if device.type == "cpu" else [device_words(device)]
    conclusion = conclude(
        name,
        ablation,
        by_arm,
        date=datetime.now(UTC).date().isoformat(),
        machine=", ".join([_processor(), f"{os.cpu_count()} cores", *gpu]),
        torch=str(torch.__version__),
    )
    items = draw_questions(ablation.skills, config.questions, QUESTION_SEED)
    report, picture = write_page(conclusion, by_arm, items)
    write_atomically(folder / "result.json", msgspec.json.format(msgspec.json.encode(conclusion), indent=2) + b"\n")
    write_atomically(folder / "picture.svg", picture.encode())
    report.write(folder / "page.html")
    _say_conclusion(conclusion)
    say(f"page {folder / 'page.html'}")


def _say_conclusion(conclusion: Conclusion) -> None:
    for found in (conclusion.control, *conclusion.contrasts):
        one = found.estimate
        say(f"{found.rule.says}: {one.value:+.1%} [{one.low:+.1%}, {one.high:+.1%}] {found.verdict}")
    print(f"{conclusion.ablation}: {conclusion.verdict}")


def _processor() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _fingerprint(
    ablation: Ablation, arm: str, seed: int, num_questions: int, digests: dict[str, str], device: torch.device
) -> str:
    """Of all that a result follows from, but the code."""
    told = [ablation.arms[arm], ablation.start, ablation.skills, ablation.control, seed, num_questions]
    # A GPU draws other numbers and rounds otherwise: arms are compared with their like.
    told += [] if device.type == "cpu" else [torch.cuda.get_device_name(device)]
    return sha256(msgspec.json.encode([*told, digests, str(torch.__version__)], order="sorted")).hexdigest()[:16]


def _result(folder: Path, arm: str, seed: int, fingerprint: str) -> ArmResult | None:
    """The arm's result, if there is one that this command would make again."""
    path = result_path(folder, arm, seed)
    if not path.exists():
        return None
    found = msgspec.json.decode(path.read_bytes(), type=ArmResult)
    return found if found.fingerprint == fingerprint else None


@contextmanager
def _held(path: Path) -> Generator[bool]:
    """Lock a file while inside; False if another process holds it. Its death ends the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def _load(starts: dict[str, Path], ablation: Ablation) -> Starts:
    models = {place: load_model(path, dtype=torch.float32) for place, path in starts.items()}
    return Starts(models[ablation.start], models)


def _starts(
    ablation: Ablation, config: AblateRun, folder: Path, device: torch.device, stop: StopFlag
) -> dict[str, Path] | None:
    """The checkpoints that the arms begin from, made where they are missing; None if a signal stopped that."""
    towers = [arm.tower for arm in ablation.arms.values() if arm.tower is not None]
    wanted = dict.fromkeys([ablation.start, *towers])
    found: dict[str, Path] = {}
    for place in wanted:
        path = folder / place
        if place in _CHAIN and config.demo is not None:
            found[place] = _of_demo(Path(config.demo), place)
            continue
        if place in _CHAIN:
            for earlier in _CHAIN[: _CHAIN.index(place) + 1]:
                _make(earlier, folder, device, stop)
        else:
            _make(place, folder, device, stop)
        if stop.is_set:
            return None
        found[place] = path
    return found


def _of_demo(demo: Path, stage: str) -> Path:
    """The checkpoint that a demo has left behind a stage."""
    paths = sorted((demo / "checkpoints").glob("step-*"))
    for path in paths:
        if read_manifest(path)["stage"] == stage:
            return path
    raise BadInputError(f"demo: expected the run folder of a demo that got through {stage}, got {demo}; leave it out")


def _make(place: str, folder: Path, device: torch.device, stop: StopFlag) -> None:
    """Train one shared start, unless it is there."""
    path = folder / place
    if stop.is_set or (path / "MANIFEST.json").exists():
        return
    with _held(folder / f".{place}.lock") as is_held:
        if not is_held:
            raise BadInputError(f"{path}: expected nobody at work there, got another command; wait for its end")
        say(f"shared start: {place}")
        model, processor = (
            _make_tower(place, device, stop)
            if place == "warmup" or place in TOWERS
            else _go_on(place, folder, device, stop)
        )
        if not stop.is_set:
            save_model(path, model, processor, manifest={"stage": place})


def _make_tower(place: str, device: torch.device, stop: StopFlag) -> tuple[Blip3, Processor]:
    config, kinds = TOWERS.get(place, (warmup_stage(), WARMUP_KINDS))
    torch.manual_seed(0)
    tokenizer = world_tokenizer(demo_model().lm.vocab_size)
    model = Blip3(demo_model()).to(device)
    processor = Processor(demo_model(), tokenizer)
    trainer = warmup_trainer(
        config, model, tokenizer, run=None, progress=TqdmProgress(), stop=stop, name=place, kinds=kinds
    )
    fit_warmup(trainer, model, CheckpointFiles(model, processor, None))
    return model, processor


def _go_on(place: str, folder: Path, device: torch.device, stop: StopFlag) -> tuple[Blip3, Processor]:
    before = load_model(folder / _CHAIN[_CHAIN.index(place) - 1], dtype=torch.float32, device=device)
    model = before.model
    processor = Processor(before.config.model, before.processor.tokenizer, image_cache_bytes=IMAGE_CACHE_BYTES)
    stage = {"pretrain": pretrain_stage, "sft": sft_stage}[place]()
    data = stage_data(place, stage.world_samples, 0)
    stream = make_stream(stage, data, processor, FeatureCache(model, _FEATURE_BYTES))
    trainer = stage_trainer(
        place, stage, model, processor, data, stream=stream, run=None, progress=TqdmProgress(), stop=stop
    )
    fit_stage(trainer, model)
    return model, processor
