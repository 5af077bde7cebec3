"""Convert weights between published formats and checkpoints of ours; what lies at SOURCE tells its format.

    uv run tools/convert.py LM OUT --to hf                           # Phi-3 or Llama: a folder, or a GGUF file
    uv run tools/convert.py SIGLIP OUT --to hf                       # SigLIP of Hugging Face, open_clip or timm
    uv run tools/convert.py RELEASE OUT --to ours                    # xGen-MM v1.5
    uv run tools/convert.py TRAINED.pt OUT --to ours --kind base --allow-pickle --vision SIGLIP
    uv run tools/convert.py OURS OUT --to xgen-mm --kind interleave
    uv run tools/convert.py OURS OUT --to ours --merge               # adapters folded into the weights
    uv run tools/convert.py OURS OUT --to peft                       # the adapters alone
    uv run tools/convert.py OURS OUT --to hf --part language         # a part alone; or vision

Loading is strict, tensor by tensor, and runs no code of a checkpoint. Beside a trainer's .pt there has to be the
tokenizer.json of Phi-3 or of a release. A result keeps the dtype of its source (float32 where a checkpoint of ours has
several); an xGen-MM folder has that of the release.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, NoReturn

import msgspec
from tqdm import tqdm

import blip3_lite
import lora_lite
import phi3_lite
import siglip_lite
from blip3_lite.presets import XgenKind, xgen_mm_config

if TYPE_CHECKING:
    import torch

    from blip3_lite import CheckpointConfig, LoadedModel

# The packages' pages import torch when a name is taken from them: a typing error answers at once.

Source = Literal["language model", "SigLIP", "xGen-MM", "ours"]
Target = Literal["hf", "ours", "xgen-mm", "peft"]
Progress = Callable[[str], None]
PICKLES = (".pt", ".pth", ".bin")


class Job(NamedTuple):
    """The command line."""

    source: Path
    out: Path
    to: Target
    kind: XgenKind | None
    part: Literal["vision", "language"] | None
    merge: bool
    dtype: Literal["float32", "bfloat16", "float16"] | None
    allow_missing: Sequence[str]
    allow_pickle: bool
    vision: Path | None
    max_shard_gb: float | None

    @property
    def options(self) -> set[str]:
        """Those that were given."""
        return {
            name for name, value in self._asdict().items() if name not in _ALWAYS and value not in (None, False, [])
        }

    @property
    def torch_dtype(self) -> "torch.dtype | None":
        """The dtype that was asked for."""
        import torch

        return None if self.dtype is None else getattr(torch, self.dtype)

    @property
    def max_shard_bytes(self) -> int:
        """The most that a file of weights may have; what Hugging Face does, if nothing was said."""
        return int((5 if self.max_shard_gb is None else self.max_shard_gb) * 1e9)


_ALWAYS = ("source", "out", "to")


class Conversion(NamedTuple):
    """One way from a source's format to a target's."""

    run: Callable[[Job, Progress], None]
    takes: Set[str]
    """Options that mean something here."""
    needs: Set[str] = frozenset()
    """Those of them that have to be given."""


def source_format(path: Path) -> Source:
    """Tell what lies at a path by the names of its files, config.json, and where that says nothing by the tensors.

    Raises:
        ValueError: nothing that can be converted.
    """
    if path.is_file():
        if path.suffix in PICKLES:
            return "xGen-MM"
        if path.suffix != ".gguf":
            raise ValueError(f"{path}: expected a folder, a .gguf or a .pt, got another file; name the folder it is in")
        return "language model"
    if not path.is_dir():
        raise ValueError(f"{path}: expected a folder or a file, got nothing there; check the path")
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{path}: expected a model, got adapters alone; name the checkpoint of ours that holds them")
    from blip3_lite.folder import MANIFEST
    from blip3_lite.opening import is_release

    config = _read_config(path)
    # First: a release that we have written has a manifest too.
    if config.get("model_type") == "xgenmm" or is_release(path):
        return "xGen-MM"
    if (path / MANIFEST).is_file():
        return "ours"
    is_timm = "architecture" in config
    if is_timm or (path / "open_clip_config.json").is_file() or str(config.get("model_type", "")).startswith("siglip"):
        return "SigLIP"
    return "language model"


def _read_config(path: Path) -> dict[str, object]:
    file = path / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got: {error}; fetch it again") from error
    return found if isinstance(found, dict) else {}


def convert_language_model(job: Job, on_tensor: Progress) -> None:
    """Phi-3 or Llama → a folder of Hugging Face's Phi-3."""
    held = phi3_lite.load_lm(job.source, dtype=job.torch_dtype, allow_missing=job.allow_missing, on_tensor=on_tensor)
    _say_random(held.left_random)
    phi3_lite.save_huggingface(
        job.out,
        held.model,
        held.tokenizer,
        generation=held.generation,
        chat=held.chat,
        max_shard_bytes=job.max_shard_bytes,
    )


def convert_siglip(job: Job, on_tensor: Progress) -> None:
    """SigLIP, whichever towers there are → Hugging Face's, with the tokenizer if it is of SigLIP 1."""
    from siglip_lite.formats.loading import read_folder

    towers = read_folder(job.source)
    load = siglip_lite.load_siglip
    if towers.vision is None or towers.text is None:
        load = siglip_lite.load_siglip_text if towers.vision is None else siglip_lite.load_siglip_vision
    has_tokenizer = towers.text is not None and (job.source / "spiece.model").is_file()
    tokenizer = siglip_lite.SiglipTokenizer.from_folder(job.source) if has_tokenizer else None
    # Says itself what it left random.
    model = load(job.source, dtype=job.torch_dtype, allow_missing=job.allow_missing, on_tensor=on_tensor)
    siglip_lite.save_huggingface(job.out, model, tokenizer=tokenizer, max_shard_bytes=job.max_shard_bytes)
    if towers.text is not None and tokenizer is None:
        _say(f"{job.out}: without a tokenizer: {job.source} has no spiece.model")


def import_release(job: Job, on_tensor: Progress) -> None:
    """xGen-MM → ours."""
    from blip3_lite.xgen_mm import load_xgen_mm

    loaded = load_xgen_mm(
        job.source,
        job.kind,
        dtype=job.torch_dtype,
        allow_missing=job.allow_missing,
        allow_pickle=job.allow_pickle,
        vision=job.vision,
        on_tensor=on_tensor,
    )
    _say_random(loaded.left_random)
    blip3_lite.save_model(job.out, loaded.model, loaded.processor, sampling=loaded.config.sampling)


def export_release(job: Job, on_tensor: Progress) -> None:
    """Ours → xGen-MM, if it is the released model but for its weights."""
    from blip3_lite.xgen_mm import export_xgen_mm

    assert job.kind is not None
    cfg = _check_adapters(job).model
    published, own = (_flat(msgspec.to_builtins(x)) for x in (xgen_mm_config(job.kind), cfg))
    # How fresh weights are drawn is no part of a release.
    names = sorted(name for name in published.keys() | own.keys() if not name.endswith("init_std"))
    other = [
        f"{name} {own.get(name)} instead of {published.get(name)}"
        for name in names
        if own.get(name) != published.get(name)
    ]
    if other:
        more = f" and {len(other) - 8} more" if len(other) > 8 else ""
        raise ValueError(
            f"{job.source}: expected the model of xGen-MM v1.5 {job.kind}, got another: {', '.join(other[:8])}{more}; "
            "only what began as such a release can go back"
        )
    export_xgen_mm(job.out, _load_ours(job, on_tensor), job.kind, max_shard_bytes=job.max_shard_bytes)


def convert_ours(job: Job, on_tensor: Progress) -> None:
    """Ours → ours, with the adapters merged or the weights in another dtype."""
    if not job.merge and job.dtype is None:
        raise ValueError("--to ours: expected --merge or --dtype with a checkpoint of ours, got neither; give one")
    loaded = _load_ours(job, on_tensor)
    blip3_lite.save_model(
        job.out, loaded.model, loaded.processor, lora=loaded.config.lora, sampling=loaded.config.sampling
    )


def export_adapters(job: Job, on_tensor: Progress) -> None:
    """Adapters of ours → PEFT's folder."""
    _expect_adapters(job)
    lora_lite.save_peft(_load_ours(job, on_tensor).model.lang_model, job.out)


def export_part(job: Job, on_tensor: Progress) -> None:
    """One part of ours → Hugging Face's folder of it."""
    if job.part == "vision":
        tower = _load_ours(job, on_tensor).model.vision_encoder
        siglip_lite.save_huggingface(job.out, tower, max_shard_bytes=job.max_shard_bytes)
        return
    _check_adapters(job)
    loaded = _load_ours(job, on_tensor)
    template = loaded.processor.template
    phi3_lite.save_huggingface(
        job.out,
        loaded.model.lang_model,
        loaded.processor.tokenizer,
        generation=phi3_lite.GenerationDefaults(stop_ids=loaded.processor.stop_ids),
        # There is no program of a conversation without a format.
        chat=None if template.kind == "plain" else template,
        max_shard_bytes=job.max_shard_bytes,
    )


def _load_ours(job: Job, on_tensor: Progress) -> "LoadedModel":
    """Load our checkpoint; merge before rounding to another dtype."""
    if not job.merge:
        return blip3_lite.load_model(job.source, dtype=job.torch_dtype, on_tensor=on_tensor)
    _expect_adapters(job)
    loaded = blip3_lite.load_model(job.source, on_tensor=on_tensor)
    lora_lite.merge_and_remove(loaded.model.lang_model)
    config = msgspec.structs.replace(loaded.config, lora=None)
    return blip3_lite.LoadedModel(loaded.model.to(dtype=job.torch_dtype), loaded.processor, config)


def _expect_adapters(job: Job) -> None:
    from blip3_lite.checkpoint import read_config

    if read_config(job.source).lora is None:
        flag = "--merge" if job.merge else f"--to {job.to}"
        raise ValueError(f"{flag}: expected a checkpoint with adapters, got {job.source}, which has none; leave it out")


def _check_adapters(job: Job) -> "CheckpointConfig":
    """Return the config; refuse adapters that are to stay, where the target has no place for them."""
    from blip3_lite.checkpoint import read_config

    config = read_config(job.source)
    if config.lora is not None and not job.merge:
        raise ValueError(f"{job.source}: expected no adapters beside the weights, got some; give --merge")
    return config


def _flat(value: object, name: str = "") -> dict[str, object]:
    """Leaves of nested dictionaries by dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part in value for key, leaf in _flat(value[part], f"{name}.{part}".lstrip(".")).items()}


_FILES = {"dtype", "allow_missing", "max_shard_gb"}
CONVERSIONS: dict[tuple[Source, Target], Conversion] = {
    ("language model", "hf"): Conversion(convert_language_model, takes=_FILES),
    ("SigLIP", "hf"): Conversion(convert_siglip, takes=_FILES),
    ("xGen-MM", "ours"): Conversion(import_release, takes={"kind", "dtype", "allow_missing", "allow_pickle", "vision"}),
    ("ours", "ours"): Conversion(convert_ours, takes={"merge", "dtype"}),
    ("ours", "xgen-mm"): Conversion(export_release, takes={"kind", "merge", "max_shard_gb"}, needs={"kind"}),
    ("ours", "peft"): Conversion(export_adapters, takes=set()),
    ("ours", "hf"): Conversion(export_part, takes={"part", "merge", "dtype", "max_shard_gb"}, needs={"part"}),
}


def choose(job: Job) -> Conversion:
    """Return the way from the source to the target.

    Raises:
        ValueError: there is none, or options are given that mean nothing there, or not those that are needed.
    """
    found = source_format(job.source)
    chosen = CONVERSIONS.get((found, job.to))
    if chosen is None:
        known = "; ".join(f"{source} to {target}" for source, target in CONVERSIONS)
        raise ValueError(
            f"{job.source}: expected a conversion that there is, got {found} to {job.to}; there are {known}"
        )
    for what, names in (("none", job.options - chosen.takes), ("one", chosen.needs - job.options)):
        for name in sorted(names):
            got, do = ("one", "leave it out") if what == "none" else ("none", "give it")
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag}: expected {what} when {found} goes to {job.to}, got {got}; {do}")
    return chosen


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


def _say_random(names: Sequence[str]) -> None:
    if names:
        _say(f"left random, as --allow-missing lets it ({len(names)}): {', '.join(names)}")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _gigabytes(text: str) -> float:
    size = float(text)
    if not (math.isfinite(size) and size > 0):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}; 5 is usual")
    return size


def parse(arguments: Sequence[str] | None) -> Job:
    """Read the command line; leaves with status 2 and one line if it is wrong."""
    parser = _Parser(
        prog="convert",
        description="Convert weights between published formats and checkpoints of ours.",
        epilog=f"There are: {'; '.join(f'{source} to {target}' for source, target in CONVERSIONS)}.",
    )
    parser.add_argument("source", type=Path, help="a folder, a GGUF file, or a .pt of xGen-MM's trainer")
    parser.add_argument("out", type=Path, help="a folder that is not there or empty")
    parser.add_argument("--to", required=True, choices=("hf", "ours", "xgen-mm", "peft"), help="format of the result")
    parser.add_argument("--kind", choices=("base", "singleimg", "interleave", "dpo"), help="which release of xGen-MM")
    parser.add_argument("--part", choices=("vision", "language"), help="the part of ours that goes to hf")
    parser.add_argument("--merge", action="store_true", help="fold the adapters into the weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the source's")
    parser.add_argument(
        "--allow-missing", action="append", default=[], metavar="PATTERN",
        help="tensors that may be missing and are then drawn anew; may be given more than once",
    )  # fmt: skip
    parser.add_argument("--allow-pickle", action="store_true", help="read a .pt, with weights_only=True")
    parser.add_argument("--vision", type=Path, metavar="SIGLIP", help="folder of the tower that a trainer's .pt lacks")
    parser.add_argument("--max-shard-gb", type=_gigabytes, metavar="GB", help="the most in one file (default: 5)")
    job = Job(**vars(parser.parse_args(arguments)))
    try:
        is_taken = (job.out.exists() or job.out.is_symlink()) and not (job.out.is_dir() and not any(job.out.iterdir()))
    except OSError as error:
        parser.error(str(error))
    if is_taken:
        parser.error(f"{job.out}: expected nothing there or an empty folder, got something; name another")
    return job


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 2 where nothing can be converted."""
    job = parse(arguments)
    try:
        conversion = choose(job)
        with tqdm(desc=f"loading {job.source.name}", unit=" tensors", disable=None) as bar:

            def count(_: str) -> None:
                bar.update()

            conversion.run(job, count)
    except (ValueError, OSError) as error:
        print(f"convert: {'; '.join(line.strip() for line in str(error).splitlines())}", file=sys.stderr)
        return 2
    print(f"{job.out}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
