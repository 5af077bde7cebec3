"""Memory and time of a DPO step, ours beside TRL's DPOTrainer, on the same weights, adapters and pairs.

    uv run tools/bench_dpo.py [--pairs 4] [--steps 4] [--rounds 2] [--json FILE]

A Phi-3 of 384 × 8 (6 heads, MLP 1024, vocabulary 32,064) gets adapters of rank 64 on all linear layers of its blocks,
and then once more trains all of its weights. Both sides read the same weights and pairs: prompts of 192 tokens, answers
of 64, all of one length, so that neither side pads (TRL 1.16 has its padding-free mode switched off). The reference's
log-probabilities are there before the first step on both sides. fp32, AdamW, two threads.

Sides take turns, each in a process of its own. Memory is the most that a process holds in the timed steps, less what it
held before its first one (weights, adapters, data, libraries): activations, gradients, optimiser. Time is the median
step. Exit status 1 if the losses of the two sides differ by more than 1e-3: then they do not compute the same.

Needs trl and peft.
"""

import argparse
import contextlib
import gc
import importlib
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench_index import processor_name
from bench_pairs import Row
from dpo_lite import ReferenceCache, answer_digest, dpo_loss, sequence_log_probs, side_by_side, split_pairs
from fused_kernels import linear_log_probs
from lora_lite import attach, load_peft, lora_parameters, save_peft, xgen_mm_lora
from phi3_lite import Phi3, Phi3Config, load_lm, save_huggingface
from trainer_lite import keep_freed_memory, peak_rss_bytes

CONFIG = Phi3Config(
    vocab_size=32_064, width=384, num_layers=8, num_heads=6, num_kv_heads=6, mlp_width=1024, init_std=0.04
)
PROMPT, ANSWER = 192, 64
BETA, LEARNING_RATE = 0.1, 1e-4
THREADS = 2
MOST_UNLIKE = 1e-3
"""Largest difference of the losses of the two sides."""
_WARM_STEPS = 1
_PEER = "TRL's DPOTrainer"


def drawn_pairs(count: int) -> list[dict[str, list[int]]]:
    """Random pairs, all of one length."""
    generator = torch.Generator().manual_seed(7)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, 32_000, (length,), generator=generator).tolist()

    return [
        {"prompt_ids": tokens(PROMPT), "chosen_ids": tokens(ANSWER), "rejected_ids": tokens(ANSWER)}
        for _ in range(count)
    ]


def resident_bytes() -> int:
    """Bytes that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def forget_peak() -> None:
    """Let the kernel count the peak anew."""
    Path("/proc/self/clear_refs").write_text("5")


class Meter:
    """Seconds of each step, losses, and memory."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._held = 0
        self._started = 0.0

    def before_first(self) -> None:
        """Call once all is loaded."""
        gc.collect()
        self._held = resident_bytes()

    def start(self) -> None:
        """Call before each step."""
        if len(self.seconds) == _WARM_STEPS:
            forget_peak()
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Call after each step."""
        self.seconds.append(time.perf_counter() - self._started)

    def report(self) -> dict[str, Any]:
        """Figures of the timed steps."""
        return {
            "seconds": self.seconds[_WARM_STEPS:],
            "losses": self.losses,
            "held_bytes": self._held,
            "peak_bytes": peak_rss_bytes(),
            "step_bytes": peak_rss_bytes() - self._held,
        }


def run_ours(folder: Path, pairs: list[dict[str, list[int]]], steps: int, has_adapters: bool) -> dict[str, Any]:
    """A step as apps/train makes it: one packed sequence, fused log-probabilities, reference from the cache."""
    keep_freed_memory()
    model = load_lm(folder / "model", dtype=torch.float32).model
    parameters = list(model.parameters())
    if has_adapters:
        model.requires_grad_(False)
        load_peft(model, folder / "adapter")
        parameters = lora_parameters(model)
        for parameter in parameters:
            parameter.requires_grad_(True)
    documents = side_by_side(
        [
            (
                torch.tensor(pair["prompt_ids"] + pair["chosen_ids"]),
                torch.tensor(pair["prompt_ids"] + pair["rejected_ids"]),
            )
            for pair in pairs
        ]
    )
    ids = torch.cat(documents)
    ends = torch.tensor([0, *(len(document) for document in documents)]).cumsum(0)
    cu_seqlens = ends.to(torch.int32)
    targets = ids.roll(-1)
    targets[ends[1:] - 1] = -100
    is_prompt = (torch.arange(len(ids)) % (PROMPT + ANSWER)) < PROMPT - 1
    targets[is_prompt] = -100

    def answers() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model(model.embed(ids), None, cu_seqlens)
        tokens = linear_log_probs(hidden, model.head_weight, targets)
        return split_pairs(sequence_log_probs(tokens, cu_seqlens))

    digests = [answer_digest(document, document) for document in documents]
    cache = ReferenceCache("the model as it is")
    with torch.no_grad():
        cache.put(digests, torch.stack(answers(), dim=1).flatten())
    optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    meter = Meter()
    meter.before_first()
    for _ in range(_WARM_STEPS + steps):
        meter.start()
        out = dpo_loss(*answers(), *split_pairs(cache.get(digests)), beta=BETA)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        meter.losses.append(out.loss.item())
        meter.stop()
    return meter.report()


def run_trl(folder: Path, pairs: list[dict[str, list[int]]], steps: int, has_adapters: bool) -> dict[str, Any]:
    """The same by DPOTrainer."""
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["TQDM_DISABLE"] = "1"
    # TRL's own: they are installed with it, and nothing else here needs them.
    datasets, peft, tokenizers, transformers, trl = (
        importlib.import_module(name) for name in ("datasets", "peft", "tokenizers", "transformers", "trl")
    )

    vocabulary = tokenizers.models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>")
    words = tokenizers.Tokenizer(vocabulary)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    model = transformers.Phi3ForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa"
    )
    if has_adapters:
        model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    meter = Meter()

    class Clock(transformers.TrainerCallback):
        """Times whole steps, the optimiser's share included."""

        def on_train_begin(self, *_: object, **__: object) -> None:
            meter.before_first()

        def on_step_begin(self, *_: object, **__: object) -> None:
            meter.start()

        def on_step_end(self, *_: object, **__: object) -> None:
            meter.stop()

        def on_log(self, args: object, state: object, control: object, logs: dict[str, float], **_: object) -> None:
            if "loss" in logs:
                meter.losses.append(logs["loss"])

    class Ready(trl.DPOTrainer):
        """The pairs are tokens already."""

        def _prepare_dataset(self, dataset: Any, *_: object, **__: object) -> Any:
            return dataset

    args = trl.DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(pairs),
        max_steps=_WARM_STEPS + steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        beta=BETA,
        bf16=False,
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=len(pairs),
        max_length=None,
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", **pair} for pair in pairs]
    trainer = Ready(model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    trainer.add_callback(Clock())
    trainer.train()
    return meter.report()


RUNNERS: dict[str, Callable[..., dict[str, Any]]] = {"ours": run_ours, "trl": run_trl}


def _child(side: str, folder: Path, args: argparse.Namespace, what: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--pairs", str(args.pairs), "--steps", str(args.steps)]
    command += ["--side", side, "--folder", str(folder), "--trains", what]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    return json.loads(done.stdout.splitlines()[-1])


def _make_inputs(folder: Path) -> None:
    torch.manual_seed(0)
    model = Phi3(CONFIG)
    save_huggingface(folder / "model", model)
    attach(model, xgen_mm_lora())
    with torch.no_grad():
        # No adapter changes nothing: give both sides the same small one, as after some steps.
        for parameter in lora_parameters(model):
            parameter.normal_(0.0, 0.01)
    save_peft(model, folder / "adapter")


def main() -> None:
    """Run both sides in turns, print the ratios and write them."""
    parser = argparse.ArgumentParser(prog="bench_dpo", description="Memory and time of a DPO step beside TRL's.")
    parser.add_argument("--pairs", type=int, default=4, help="pairs a step")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes a side")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--side", choices=list(RUNNERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--trains", choices=["adapters", "all"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    if args.side:
        with contextlib.redirect_stdout(sys.stderr):
            found = RUNNERS[args.side](args.folder, drawn_pairs(args.pairs), args.steps, args.trains == "adapters")
        print(json.dumps(found))
        return
    results = measured(args)
    for what, result in results.items():
        print(_line(what, result))
    if args.json:
        machine = {"processor": processor_name(), "threads": THREADS, "torch": torch.__version__}
        content = {"command": "uv run tools/bench_dpo.py", "date": time.strftime("%Y-%m-%d"), "machine": machine}
        args.json.write_text(json.dumps({**content, "python": platform.python_version(), **results}, indent=1) + "\n")
    if any(result["largest_loss_difference"] > MOST_UNLIKE for result in results.values()):
        sys.exit("losses: expected the two sides to agree to 1e-3, got more; the figures compare different things")


def measured(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Both sides in turns, with adapters and with all weights trained."""
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _make_inputs(folder)
        for what in ("adapters", "all"):
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in RUNNERS}
            for _ in range(args.rounds):
                for side in RUNNERS:
                    runs[side].append(_child(side, folder, args, what))
            results[what] = _compared(runs, args.pairs)
    return results


def rows() -> Iterator[Row]:
    """For `tools/bench.py`: pairs a second and the step's memory, of one process a side."""
    args = argparse.Namespace(pairs=4, steps=4, rounds=1)
    for what, found in measured(args).items():
        name = f"DPO step fp32, {'rank-64 adapters' if what == 'adapters' else 'all weights'} trained"
        unlike = found["largest_loss_difference"]
        if unlike > MOST_UNLIKE:
            yield Row("dpo", name, _PEER, None, None, "pairs/s", None, None, f"red: losses differ by {unlike:.0e}")
            continue
        gate = f"losses of {args.steps + _WARM_STEPS} steps within {unlike:.0e}"
        speed, memory = found["pairs_per_s"], found["step_bytes"]
        ratio = found["speed_ratio"]
        yield Row("dpo", name, _PEER, speed["ours"], speed["trl"], "pairs/s", ratio, None, gate)
        ours, theirs = memory["ours"] / 1e6, memory["trl"] / 1e6
        yield Row("dpo", f"{name}: memory of the step", _PEER, ours, theirs, "MB", theirs / ours, None, gate)


def _compared(runs: dict[str, list[dict[str, Any]]], num_pairs: int) -> dict[str, Any]:
    seconds = {side: statistics.median(s for run in of for s in run["seconds"]) for side, of in runs.items()}
    memory = {side: statistics.median(run["step_bytes"] for run in of) for side, of in runs.items()}
    peaks = {side: statistics.median(run["peak_bytes"] for run in of) for side, of in runs.items()}
    pairs = zip(runs["ours"][0]["losses"], runs["trl"][0]["losses"], strict=True)
    return {
        "step_s": seconds,
        "pairs_per_s": {side: num_pairs / value for side, value in seconds.items()},
        "step_bytes": memory,
        "peak_bytes": peaks,
        "speed_ratio": seconds["trl"] / seconds["ours"],
        "memory_ratio": memory["ours"] / memory["trl"],
        "peak_ratio": peaks["ours"] / peaks["trl"],
        "largest_loss_difference": max(abs(one - other) for one, other in pairs),
        "runs": runs,
    }


def _line(what: str, result: dict[str, Any]) -> str:
    sides = ", ".join(
        f"{side} {result['pairs_per_s'][side]:.2f} pairs/s {result['step_bytes'][side] / 2**20:.0f} MiB"
        for side in RUNNERS
    )
    return (
        f"{what}: {sides}; {result['speed_ratio']:.2f} × the pairs/s, {result['memory_ratio']:.2f} × the memory "
        f"({result['peak_ratio']:.2f} × of the whole process); losses differ by {result['largest_loss_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
