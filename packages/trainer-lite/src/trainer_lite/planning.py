"""What a run on several devices takes: bytes held and bytes sent, as pure functions of sizes. Imports no torch.

Source: ZeRO, arXiv:1910.02054. §3.1: under mixed precision a trained number takes its bytes for the weight, as many for
the gradient, and 12 for the fp32 master and Adam's two moments. §5: stage 1 divides the 12 among the devices, stage 2
the gradients too, stage 3 the weights too. §7: what is sent for it. A frozen number has a weight and nothing else.

The engine planned for is DeepSpeed 0.19.8. Where it holds or sends more than the paper asks for, that is counted, and
the docstrings say so; `tools/bench_zero_memory.py` compares all of it with what real processes hold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

BUCKET_NUMBERS = 1 << 26
"""Gradients that our DeepSpeed engine sends together, so that the buffer in fp32 is a quarter of a GB in place of 2."""
PERSISTENT_NUMBERS = 100_000
"""Tensors up to this size stay gathered at stage 3, as DeepSpeed has it."""
_MASTER_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class DeviceKind:
    """What a plan needs to know of a device; bytes and operations, not GB and Tflop/s."""

    name: str
    memory_bytes: int
    """All of it, as the driver reports it."""
    peak_operations_per_s: float
    """Dense bf16 on the matrix units, fp32 sums."""
    link_bytes_per_s: float
    """To the other devices of its host, one direction."""
    network_bytes_per_s: float
    """To other hosts, one direction, of each device's own adapter."""
    devices_per_host: int = 8


DEVICE_KINDS = {
    "a100": DeviceKind(
        name="A100 SXM 80 GB",
        memory_bytes=81_920 << 20,
        peak_operations_per_s=312e12,
        link_bytes_per_s=300e9,
        network_bytes_per_s=25e9,
    ),
    "h100": DeviceKind(
        name="H100 SXM 80 GB",
        memory_bytes=81_559 << 20,
        peak_operations_per_s=989e12,
        link_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
    ),
    "h200": DeviceKind(
        name="H200 SXM 141 GB",
        memory_bytes=143_771 << 20,
        peak_operations_per_s=989e12,
        link_bytes_per_s=450e9,
        network_bytes_per_s=50e9,
    ),
}
"""Peak and NVLink: NVIDIA's data sheets "A100 80GB" (312 Tflop/s dense, NVLink 600 GB/s both directions together),
"H100" and "H200" (SXM: 1,979 Tflop/s with sparsity, hence half dense; NVLink 900 GB/s), as quoted by third parties that
were looked up; the sheets themselves could not be opened. Memory of A100 and H100: nvidia-smi's totals in
github.com/modal-labs/modal-client pull request 2797. From memory, unverified: the H200's total, and the network of
NVIDIA's DGX hosts, one adapter a device, 200 Gbit/s with A100 and 400 Gbit/s with the others."""


class Sharding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the states of a model are divided among devices.

    Raises:
        ValueError: a count out of range, or offload at a stage that cannot do it.
    """

    stage: Literal[0, 1, 2, 3]
    """ZeRO's stage; at 0 every device holds everything."""
    num_devices: int
    """Devices among which it is divided."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Type of weights and gradients; moments are fp32, and so are masters, where there are any."""
    offloads_optimizer: bool = False
    """Masters, moments and their gradients in the host's memory; from stage 1 on."""
    offloads_parameters: bool = False
    """Weights in the host's memory until they are needed; at stage 3."""
    bucket_numbers: int = BUCKET_NUMBERS
    """Gradients sent together, in a place of this size however few there are [reduce_bucket_size]."""
    live_numbers: int = 1_000_000_000
    """Most weights that stage 3 keeps gathered at a time [stage3_max_live_parameters, stage3_max_reuse_distance]."""
    persistent_numbers: int = PERSISTENT_NUMBERS
    """Tensors up to this size stay gathered at stage 3 [stage3_param_persistence_threshold]."""

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (
            ("num_devices", 1),
            ("bucket_numbers", 1),
            ("live_numbers", 0),
            ("persistent_numbers", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}; raise it")
        if self.offloads_optimizer and self.stage < 1:
            raise ValueError(f"offloads_optimizer: expected stage 1 to 3, got {self.stage}; raise the stage")
        if self.offloads_parameters and self.stage < 3:
            raise ValueError(f"offloads_parameters: expected stage 3, got {self.stage}; raise the stage")

    @property
    def number_bytes(self) -> int:
        """Of a weight, and of a gradient as it is made and sent."""
        return 4 if self.weights == "fp32" else 2

    @property
    def has_masters(self) -> bool:
        """Whether there are fp32 masters beside the weights; from stage 1 on DeepSpeed copies fp32 weights too."""
        return self.weights == "bf16" or self.stage > 0


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes of a model's states on one device, each part at its most; its share of the host's memory apart."""

    parameters: int
    masters: int
    moments: int
    gradients: int
    bucket: int
    """Gradients on their way."""
    gathered: int
    """At stage 3: weights that are gathered, at most."""
    for_step: int
    """More for the step itself, flat copies of gradients, when activations are gone."""
    host: int
    keeps_gradients: bool
    """Whether gradients and bucket have their place for good (stage 3), or only from a backward pass to the step."""

    @property
    def between_steps(self) -> int:
        """What is held all the time, but for weights that stage 3 has gathered."""
        kept = self.gradients + self.bucket if self.keeps_gradients else 0
        return self.parameters + self.masters + self.moments + kept

    @property
    def before_step(self) -> int:
        """The most that is held while batches are computed, activations apart."""
        return self.parameters + self.masters + self.moments + self.gradients + self.bucket + self.gathered

    @property
    def in_step(self) -> int:
        """The most that is held while the weights move."""
        return self.between_steps + (0 if self.keeps_gradients else self.gradients) + self.for_step


def _share(numbers: Sequence[int], num_devices: int) -> int:
    """Numbers of a device's part where each tensor is padded to be cut evenly, as stage 3 does."""
    return sum(math.ceil(number / num_devices) for number in numbers)


def _touched(numbers: Sequence[int], part: int) -> int:
    """Numbers of the tensors that a part of all, laid end to end, begins or ends in or holds; of the largest such part.

    DeepSpeed's stage 2 keeps a tensor's gradient whole on each device whose part it reaches into.
    """
    sums: dict[int, int] = {}
    start = 0
    for number in numbers:
        for place in range(start // part, (start + number - 1) // part + 1):
            sums[place] = sums.get(place, 0) + number
        start += number
    return max(sums.values(), default=0)


def state_bytes(
    trained: Sequence[int], frozen: Sequence[int], sharding: Sharding, *, num_moments: int | None = None
) -> StateBytes:
    """Bytes of weights, masters, moments, gradients and buffers of communication.

    Args:
        trained: numbers of each trained tensor, none of them 0, in the optimiser's order.
        frozen: numbers of each frozen tensor.
        sharding: how they are divided.
        num_moments: numbers that the optimiser keeps of all trained ones together; None for two each, Adam's.

    With Ψ trained and F frozen numbers of b bytes each and N devices (paper §5):

        stage 0   b(Ψ + F) + bΨ + 12Ψ
        stage 1   b(Ψ + F) + bΨ + 12Ψ/N
        stage 2   b(Ψ + F) + (b + 12)Ψ/N
        stage 3   (b(Ψ + F) + (b + 12)Ψ)/N

    With fp32 weights the 12 are 8 at stage 0, as these are their own masters; from stage 1 on DeepSpeed copies them
    all the same. Its stage 2 keeps more gradients than Ψ/N, whole tensors (see `_touched`).
    """
    num_trained = sum(trained)
    moments = 2 * num_trained if num_moments is None else num_moments
    devices, stage, size = sharding.num_devices, sharding.stage, sharding.number_bytes
    # Stages 1 and 2 lay all tensors end to end and cut that; DeepSpeed's alignment is two numbers a device.
    part = {0: num_trained, 3: _share(trained, devices)}.get(stage, math.ceil(num_trained / (2 * devices)) * 2)
    moments = math.ceil(moments * part / max(1, num_trained))
    masters = _MASTER_BYTES * part if sharding.has_masters else 0
    kept = {2: min(num_trained, _touched(trained, part)), 3: part}.get(stage, num_trained)
    gradients = size * kept
    bucket = size * sharding.bucket_numbers if stage > 0 else 0
    if stage == 0:
        held, gathered = num_trained + sum(frozen), 0
        sent = size * min(num_trained, sharding.bucket_numbers) if devices > 1 else 0
        for_step = max(sent, _MASTER_BYTES * part if sharding.has_masters else 0)
    elif stage < 3:
        held, gathered = part * devices + sum(frozen), 0
        for_step = _MASTER_BYTES * part
    else:
        held = part + _share(frozen, devices)
        small = sum(number for number in (*trained, *frozen) if number <= sharding.persistent_numbers)
        gathered = small + min(num_trained + sum(frozen) - small, sharding.live_numbers)
        for_step = _MASTER_BYTES * part if size < _MASTER_BYTES else 0
    parameters, host = size * held, 0
    if sharding.offloads_optimizer:
        # Masters, moments and fp32 gradients, and the part once more in the weights' type on its way.
        host += masters + _MASTER_BYTES * (moments + part) + size * part
        masters = moments = for_step = 0
        if stage > 1:
            gradients = 0
    if sharding.offloads_parameters:
        host += parameters
        parameters = 0
    return StateBytes(
        parameters=parameters,
        masters=masters,
        moments=_MASTER_BYTES * moments,
        gradients=gradients,
        bucket=bucket,
        gathered=size * gathered,
        for_step=for_step,
        host=host,
        keeps_gradients=stage == 3,
    )


def sent_bytes(
    num_trained: int, num_frozen: int, sharding: Sharding, *, num_batches: int = 1, num_forward_only: int = 0
) -> dict[str, int]:
    """Bytes that a device sends for one step, by collective, with ring algorithms.

    Of M bytes a ring's all-gather and reduce-scatter send M(N - 1)/N from each of N devices, its all-reduce twice that.

        stage 0   all-reduce of the gradients
        stage 1   the same, and an all-gather of the new weights
        stage 2   the gradients of every batch, and an all-gather of the new weights
        stage 3   for every batch: all-gather of all weights, forward and backward; reduce-scatter of the gradients

    What the end of a forward pass has gathered DeepSpeed keeps for the backward pass, if no more than
    `stage3_max_reuse_distance` numbers are used in between, there and back; its default is that of `live_numbers`.

    The paper's stages 1 and 2 reduce-scatter (§7.2.1); DeepSpeed all-reduces its buckets, as they hold parts of several
    devices (`use_multi_rank_bucket_allreduce`).

    Args:
        num_trained: trained numbers.
        num_frozen: frozen numbers.
        sharding: how they are divided.
        num_batches: batches a device computes for a step.
        num_forward_only: of the frozen numbers, those that no gradient passes: the backward pass does not need them.
    """
    devices, stage, size = sharding.num_devices, sharding.stage, sharding.number_bytes

    def ring(numbers: int) -> int:
        return size * numbers * (devices - 1) // devices

    if stage == 3:
        again = max(0, num_trained + num_frozen - num_forward_only - sharding.live_numbers // 2)
        gathered = num_trained + num_frozen + again
        return {"all-gather": num_batches * ring(gathered), "reduce-scatter": num_batches * ring(num_trained)}
    reductions = num_batches if stage == 2 else 1
    found = {"all-reduce": 2 * reductions * ring(num_trained)}
    return found if stage == 0 else {**found, "all-gather": ring(num_trained)}


def step_seconds(
    operations: int, sent: int, kind: DeviceKind, *, utilisation: float, link_bytes_per_s: float
) -> tuple[float, float]:
    """Seconds of computing and of sending for one step of one device; sent while computing, the longer one counts.

    `utilisation`: share of the peak that the operations reach while nothing is waited for.
    """
    return operations / (kind.peak_operations_per_s * utilisation), sent / link_bytes_per_s
