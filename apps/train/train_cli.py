"""The command line of `apps/train`: recipe, saved config, overrides, in this order of precedence. Imports no torch.

train                          the recipe `demo`
train sft --data FILE          one stage
train --config runs/x/config.json --max-steps 50
train --out runs/x --resume    the stage in runs/x, with the settings it was started with
train sft … --resume auto      begin that stage, or go on with it: the same line each time
train sft … --dry-run          say what would be trained, and on what
train pretrain-4b --dry-run --devices 64 --kind h100    and what it would take there
train ablate NAME              an ablation (see `train_ablate_cli`)
"""

import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import msgspec
import tyro

from interleave_data.config import load_data_file
from train_config import Command, DemoRun, LanguageRun, PlanRequest, RunConfig, StageRun, WarmupRun, run_path
from train_recipes import RECIPES
from trainer_lite.config import fitting_counts

_Config = TypeVar("_Config", bound=msgspec.Struct)
FREE_ON_RESUME = (
    "out",
    "resume",
    "device",
    "accept_data_change",
    # The sources' fingerprints tell whether other data lie behind the name.
    "data",
    "eval_questions",
    "feature_cache_mb",
    "parallel.engine",
    "parallel.offload_optimizer",
    "parallel.offload_parameters",
    "parallel.recompute",
    "parallel.timeout_s",
    "stage.num_workers",
    "stage.data_timeout_s",
    "stage.train.log_every",
    "stage.train.save_every",
    "stage.train.keep_last",
    "stage.train.on_save_error",
    "stage.train.max_nonfinite_steps",
    "stage.train.spike_ratio",
    "stage.train.spike_window",
    "stage.train.spike_guard",
)
"""What may change when a run is continued: it moves no weight, or keeps a bad step from moving them."""
NEWEST, AUTO = "newest", "auto"
DRY_RUN = "--dry-run"
_PLAN_FLAGS = ("--devices", "--kind", "--utilisation", "--link-gb-per-s", "--image-share")


class SavedConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of a run folder's config.json."""

    recipe: str
    config: msgspec.Raw


def _refuse(reason: str) -> NoReturn:
    print(f"train: {reason}", file=sys.stderr)
    sys.exit(2)


def _take(flag: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    """Split `FLAG VALUE` (or `FLAG=VALUE`) off the arguments."""
    for index, argument in enumerate(arguments):
        if argument == flag:
            following = arguments[index + 1] if index + 1 < len(arguments) else "nothing"
            if index + 1 == len(arguments) or following.startswith("--"):
                _refuse(f"{flag}: expected a name or number, got {following} behind it; give one")
            return following, arguments[:index] + arguments[index + 2 :]
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}="), arguments[:index] + arguments[index + 1 :]
    return None, arguments


def _usual_forms(arguments: Sequence[str]) -> list[str]:
    """Write out a bare `--resume`, and `--checkpoint-every` (also behind a stage's prefix) by its setting's name."""
    written: list[str] = []
    for index, argument in enumerate(arguments):
        written.append(re.sub(r"^(--(?:[\w-]+\.)*)checkpoint-every(?==|$)", r"\1save-every", argument))
        following = arguments[index + 1] if index + 1 < len(arguments) else "--"
        if argument == "--resume" and following.startswith("--"):
            written.append(NEWEST)
    return written


def _config_type(recipe: str) -> type[RunConfig]:
    return {"demo": DemoRun, "warmup": WarmupRun, "smollm2": LanguageRun}.get(recipe, StageRun)


def _decode(content: bytes | msgspec.Raw, config_type: type[_Config]) -> _Config:
    """Decode JSON; an unknown key is an error that names the nearest known one."""
    try:
        return msgspec.json.decode(content, type=config_type)
    except msgspec.ValidationError as error:
        unknown = re.search(r"unknown field `(.*?)`(?: - at `\$\.(.*?)`)?", str(error))
        if unknown is None:
            raise
        known = _keys_at(config_type, unknown[2].split(".") if unknown[2] else [])
        nearest = difflib.get_close_matches(unknown[1], known, n=1)
        hint = f"did you mean `{nearest[0]}`?" if nearest else f"known keys are {', '.join(known)}"
        raise msgspec.ValidationError(f"{error}; {hint}") from error


def _keys_at(config_type: type[msgspec.Struct], path: Sequence[str]) -> list[str]:
    """Keys that the object at a path of keys may have."""
    described: object = msgspec.inspect.type_info(config_type)
    for name in path:
        assert isinstance(described, msgspec.inspect.StructType)
        described = next(field.type for field in described.fields if field.encode_name == name)
        if isinstance(described, msgspec.inspect.UnionType):
            described = next(kind for kind in described.types if isinstance(kind, msgspec.inspect.StructType))
    assert isinstance(described, msgspec.inspect.StructType)
    return [field.encode_name for field in described.fields]


def _read_config(what: str, file: Path, recipe: str | None) -> tuple[str, RunConfig]:
    try:
        saved = _decode(file.read_bytes(), SavedConfig)
        if recipe not in (None, saved.recipe):
            _refuse(f"{what}: expected the recipe {recipe}, got one of {saved.recipe}; leave the recipe out")
        _check_recipe(saved.recipe)
        return saved.recipe, _decode(saved.config, _config_type(saved.recipe))
    except OSError as error:
        _refuse(f"{what}: expected a readable {file}, got: {error.strerror}; check the path")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        _refuse(f"{what}: expected a run's config.json, got {file}: {error}")


def _check_recipe(recipe: str) -> None:
    if recipe not in RECIPES:
        nearest = difflib.get_close_matches(recipe, RECIPES, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(RECIPES)}"
        _refuse(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe}; {hint}")


def _check_dry_run(recipe: str, config: RunConfig) -> None:
    if not isinstance(config, StageRun):
        stages = [name for name, make in RECIPES.items() if isinstance(make(), StageRun)]
        _refuse(f"--dry-run: expected a stage ({', '.join(stages)}), got {recipe}; name one")
    if config.resume not in (None, AUTO):
        _refuse("--dry-run: expected no --resume, got one; leave it out to see the stage from its beginning")


def _take_plan(arguments: list[str], is_dry_run: bool) -> tuple[PlanRequest | None, list[str]]:
    """Split the flags of a plan off the arguments."""
    given: dict[str, str] = {}
    for flag in _PLAN_FLAGS:
        value, arguments = _take(flag, arguments)
        if value is not None:
            given[flag] = value
    if not given:
        return None, arguments
    if not is_dry_run:
        _refuse(
            f"{next(iter(given))}: expected together with --dry-run, got it alone; add that, or start with torchrun"
        )
    for flag in ("--devices", "--kind"):
        if flag not in given:
            kinds = "a100, h100 or h200"
            _refuse(f"{flag}: expected with {next(iter(given))}, got none; give --devices N and --kind {kinds}")
    fields = {flag.removeprefix("--").replace("-", "_"): value for flag, value in given.items()}
    try:
        return msgspec.convert(fields, PlanRequest, strict=False), arguments
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$.")
        name = place.rstrip("`")
        if name not in fields:
            _refuse(
                f"--{reason.replace('_', '-')}" if reason.split(":")[0] in PlanRequest.__struct_fields__ else reason
            )
        rule = "one of a100, h100, h200" if name == "kind" else "a whole number" if name == "devices" else "a number"
        _refuse(f"--{name.replace('_', '-')}: expected {rule}, got {fields[name]}; correct it")


def _check_plan(plan: PlanRequest, config: StageRun) -> None:
    """Refuse a number of devices that a step's packs cannot be divided among."""
    packs = config.stage.train.accumulation_steps
    fitting = fitting_counts(packs)
    if plan.devices not in fitting:
        _refuse(
            f"--devices: expected a divisor of the {packs} packs of a step ({', '.join(map(str, fitting))}), got "
            f"{plan.devices}; choose one, or change --accumulation-steps"
        )


def _saved_run(arguments: list[str], recipe: str | None, is_new_allowed: bool) -> tuple[str, StageRun] | None:
    """Recipe and config of the run that `--resume` is to continue; None if there is none yet and that is allowed."""
    out, _ = _take("--out", arguments)
    if out is None and recipe is None:
        _refuse("--resume: expected a recipe or --out, got neither; name the run to continue")
    file = run_path(str(recipe), out) / "config.json"
    if is_new_allowed and not file.exists():
        return None
    recipe, saved = _read_config("--resume", file, recipe)
    if not isinstance(saved, StageRun):
        _refuse(
            f"--resume: expected a run of one stage, got {recipe}, which cannot be continued; start it anew, or hand "
            "its newest checkpoint to a stage with --init"
        )
    return recipe, saved


def _flat(value: object, name: str = "") -> dict[str, object]:
    """Leaves of nested dictionaries by dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part in value for key, leaf in _flat(value[part], f"{name}.{part}".lstrip(".")).items()}


def _check_same_course(saved: StageRun, config: StageRun) -> None:
    """Refuse to continue a run under other settings than it was started with."""
    before, now = _flat(msgspec.to_builtins(saved)), _flat(msgspec.to_builtins(config))
    changed = [
        f"{name.removeprefix('stage.').removeprefix('train.')}: {before.get(name)} there, {now.get(name)} now"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name) and name not in FREE_ON_RESUME
    ]
    if changed:
        _refuse(
            f"--resume: expected the settings that the run was started with, got {'; '.join(changed)}; leave them out "
            "or start another run"
        )


def parse_command_line(arguments: Sequence[str]) -> Command:
    """Return the resolved config, or exit with status 2 and a reason."""
    if list(arguments[:1]) == ["ablate"]:
        # Not above: nothing else needs the table of ablations.
        from train_ablate_cli import parse_ablation

        return parse_ablation(arguments[1:])
    is_dry_run = DRY_RUN in arguments
    # deepspeed's launcher adds the latter; the environment says it too.
    arguments = [one for one in arguments if one != DRY_RUN and not one.startswith("--local_rank=")]
    plan, arguments = _take_plan(arguments, is_dry_run)
    file, rest = _take("--config", _usual_forms(arguments))
    recipe = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if recipe is not None:
        _check_recipe(recipe)
    resume, _ = _take("--resume", rest)
    found = None if resume is None else _saved_run(rest, recipe, is_new_allowed=resume == AUTO)
    saved = None
    if found is not None:
        recipe, saved = found
    if file is not None:
        recipe, default = _read_config("--config", Path(file), recipe)
    elif saved is not None and recipe is not None:
        default = saved
    else:
        recipe = recipe or "demo"
        default = RECIPES[recipe]()
    description = f"{type(default).__doc__}\n\nRecipes: {', '.join(RECIPES)}. --config FILE starts from a saved config."
    description += " `ablate --list` names the ablations."
    description += (
        " --checkpoint-every N is another name of --save-every N. --dry-run trains nothing and writes no run "
    )
    description += (
        "folder: it prints parameters, memory, tokens a step, steps an epoch and the first samples of a stage"
    )
    description += (
        "; with --devices N --kind a100|h100|h200 also memory by part for each ZeRO stage, what is sent, and days on "
        "those (--utilisation, --link-gb-per-s, --image-share)."
    )
    try:
        config = tyro.cli(
            type(default),
            prog=f"train {recipe}",
            description=description,
            default=default,
            args=rest,
            config=(tyro.conf.AvoidSubcommands,),
        )
        if isinstance(config, StageRun) and config.data is not None:
            load_data_file(config.data)
    except ValueError as error:
        _refuse(str(error))
    if saved is not None and isinstance(config, StageRun):
        _check_same_course(saved, config)
    if is_dry_run:
        _check_dry_run(recipe, config)
    if plan is not None and isinstance(config, StageRun):
        _check_plan(plan, config)
    return Command(recipe=recipe, config=config, is_dry_run=is_dry_run, plan=plan)
