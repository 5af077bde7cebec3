"""The settings of one training stage: length, optimiser, schedule, guards. Imports no torch."""

from typing import Literal

import msgspec

_LONGEST_S = 1_000_000
"""Longest time that is waited for anything: eleven days. The system takes no endless one."""


def _require(is_valid: bool, what: str, rule: str, got: object, advice: str) -> None:
    if not is_valid:
        raise ValueError(f"{what}: expected {rule}, got {got!r}; {advice}")


class OptimizerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """AdamW, or Muon on the matrices of hidden layers with AdamW on the rest."""

    kind: Literal["adamw", "muon"] = "adamw"
    """Which rule moves the 2-D matrices of hidden layers; everything else is always moved by AdamW."""
    learning_rate: float = 1e-3
    """Peak rate of AdamW."""
    muon_learning_rate: float = 5e-3
    """Peak rate of Muon, before its own factor sqrt(max(1, rows / columns)); unused by "adamw"."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.05
    """Decoupled decay, times the rate, of matrices; vectors and the names in `no_decay` have none."""
    muon_momentum: float = 0.95
    """Muon's momentum (Nesterov form)."""
    no_decay: tuple[str, ...] = ("norm", "bias", "embed", "latents")
    """A parameter whose name holds one of these has no weight decay. One-dimensional ones never have."""
    no_muon: tuple[str, ...] = ("embed", "lm_head", "latents")
    """A matrix whose name holds one of these is moved by AdamW even if kind is "muon"."""
    learning_rate_scales: dict[str, float] = {}
    """Name prefix → factor on the rate; the longest prefix that fits wins, no fit means 1."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range."""
        for name in ("learning_rate", "muon_learning_rate", "eps"):
            value = getattr(self, name)
            _require(value > 0, f"optimizer.{name}", "a number > 0", value, "1e-3 is a usual rate for a small model")
        for index, beta in enumerate(self.betas):
            _require(0 <= beta < 1, f"optimizer.betas[{index}]", "0 <= beta < 1", beta, "0.9 and 0.95 are usual")
        _require(0 <= self.muon_momentum < 1, "optimizer.muon_momentum", "0 <= x < 1", self.muon_momentum, "try 0.95")
        _require(self.weight_decay >= 0, "optimizer.weight_decay", "a number >= 0", self.weight_decay, "0 turns it off")
        for prefix, scale in self.learning_rate_scales.items():
            what = f"optimizer.learning_rate_scales[{prefix!r}]"
            _require(scale >= 0, what, "a factor >= 0", scale, "freeze with requires_grad rather than with a sign")


class ScheduleConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Linear warm-up from 0, then constant, or falling to `min_ratio` of the peak at the last step."""

    kind: Literal["constant", "cosine", "linear"] = "cosine"
    """The shape after the warm-up."""
    warmup_steps: int = 0
    """Updates until the peak is reached; a run that is shorter reaches it at its end."""
    min_ratio: float = 0.1
    """The last rate as a share of the peak; unused by "constant"."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range."""
        _require(self.warmup_steps >= 0, "schedule.warmup_steps", "a number >= 0", self.warmup_steps, "0 means none")
        _require(0 <= self.min_ratio <= 1, "schedule.min_ratio", "0 <= x <= 1", self.min_ratio, "it is a share")


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stage of training."""

    max_steps: int
    """Optimiser steps of this stage, the skipped ones included."""
    accumulation_steps: int = 1
    """Batches behind one optimiser step; the loss is averaged over the targets of all of them together."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The rule that moves the parameters."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The course of the learning rate."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient, applied once per step; 0 turns it off."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16" runs the forward pass under autocast; parameters and moments keep their own type."""
    seed: int = 0
    """Seeds torch's generators (dropout) when a stage starts; a resumed stage restores them instead."""
    log_every: int = 10
    """Steps between console lines; metrics.jsonl gets every step."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves only where the stage ends or is stopped."""
    eval_every: int = 0
    """Steps between calls of the evaluation callback; 0 never calls it."""
    keep_last: int = 2
    """Checkpoints kept from the middle of a stage; those at a stage's end are always kept."""
    on_save_error: Literal["stop", "warn"] = "stop"
    """Where a checkpoint on the way cannot be written: end the run, or say so and go on. The last one ends it."""
    max_nonfinite_steps: int = 5
    """This many steps in a row with a loss or gradient that is not finite end the run."""
    spike_ratio: float = 5.0
    """A loss above this many times the median of the last ones is written down with its samples; 0 never is."""
    spike_window: int = 32
    """Losses that this median runs over; before there are so many, none counts as a spike."""
    spike_guard: bool = False
    """Leave out the update of such a step, as of one that is not finite."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range."""
        counts = ("max_steps", "accumulation_steps", "log_every", "keep_last", "max_nonfinite_steps", "spike_window")
        for name in counts:
            value = getattr(self, name)
            _require(value >= 1, f"train.{name}", "a whole number >= 1", value, "raise it to at least 1")
        for name in ("save_every", "eval_every", "grad_clip"):
            value = getattr(self, name)
            _require(value >= 0, f"train.{name}", "a number >= 0", value, "0 turns it off")
        is_ratio = self.spike_ratio > 1 or (self.spike_ratio == 0 and not self.spike_guard)
        rule = "a number > 1" if self.spike_guard else "a number > 1, or 0"
        _require(is_ratio, "train.spike_ratio", rule, self.spike_ratio, "5 leaves ordinary noise alone")


class ParallelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How several processes share the work. Nothing here moves the course of training beyond rounding."""

    engine: Literal["ddp", "zero0", "zero1", "zero2", "zero3"] = "ddp"
    """`ddp`: each process holds everything, gradients are summed; alone it is the plain loop. `zero1` to `zero3`:
    DeepSpeed, which cuts the optimiser's state, then the gradients, then the parameters too; `zero0` cuts nothing."""
    offload_optimizer: bool = False
    """Keep the optimiser's state in the host's memory and update there; with zero1, zero2 and zero3."""
    offload_parameters: bool = False
    """Keep the parameters in the host's memory until they are needed; with zero3."""
    recompute: bool = False
    """Compute each layer's activations a second time in the backward pass, and do not keep them (checkpointing)."""
    timeout_s: float = 600.0
    """Longest silence of a process, longest wait of the others for it (also in a checkpoint), and longest that a batch
    or an update may take; then it is named and the run ends."""

    def __post_init__(self) -> None:
        """Raise ValueError for what does not go together."""
        is_time = 0 < self.timeout_s <= _LONGEST_S
        rule = f"seconds, above 0 and at most {_LONGEST_S:,}"
        _require(is_time, "parallel.timeout_s", rule, self.timeout_s, "use several minutes")
        if self.offload_optimizer:
            what = "parallel.offload_optimizer"
            _require(self.engine in ("zero1", "zero2", "zero3"), what, "zero1, zero2 or zero3", self.engine, "name one")
        if self.offload_parameters:
            _require(self.engine == "zero3", "parallel.offload_parameters", "zero3", self.engine, "name it")

    @property
    def uses_deepspeed(self) -> bool:
        """Whether the engine is DeepSpeed, which may hold the model in parts."""
        return self.engine != "ddp"


def fitting_counts(accumulation_steps: int) -> list[int]:
    """Numbers of processes among which the batches of a step can be divided, smallest first."""
    return [count for count in range(1, accumulation_steps + 1) if accumulation_steps % count == 0]


def check_division(accumulation_steps: int, count: int) -> None:
    """Check that every process gets as many batches of a step.

    Raises:
        ValueError: they cannot; lists the numbers of processes that can.
    """
    fitting = fitting_counts(accumulation_steps)
    if count not in fitting:
        raise ValueError(
            f"processes: expected a number that divides the {accumulation_steps} batches of a step "
            f"(accumulation_steps), got {count}; use one of {', '.join(map(str, fitting))}"
        )
