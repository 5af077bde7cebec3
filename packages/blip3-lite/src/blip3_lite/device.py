"""Where a program computes: the GPU of this process, where there is one, else the CPU."""

import os

import torch

from .config import DeviceChoice


def choose_device(wish: DeviceChoice = "auto") -> torch.device:
    """The device of this process: of several on a host, the GPU that LOCAL_RANK names (torchrun, deepspeed).

    Nothing is set: an operation between ranks also needs it to be torch's current device, as `trainer_lite.join` does.

    Raises:
        ValueError: a GPU is wished for where torch sees none, or there are more processes on the host than GPUs.
    """
    if wish == "cpu" or (wish == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        advice = (
            "install a build of torch with CUDA"
            if torch.version.cuda is None
            else "see whether nvidia-smi lists one and CUDA_VISIBLE_DEVICES does not hide it"
        )
        raise ValueError(
            f"device: expected a CUDA device, got none that torch {torch.__version__} can use; {advice}, or use "
            "--device cpu"
        )
    told, count = os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count()
    if not told.isdecimal() or int(told) >= count:
        raise ValueError(
            f"device: expected a GPU for each process of a host, got LOCAL_RANK {told!r} and {count} GPUs; start "
            f"{count} processes (--nproc-per-node {count}), or use --device cpu"
        )
    return torch.device("cuda", int(told))


def device_words(device: torch.device) -> str:
    """The device as a person knows it: `cpu`, or `cuda:0 (NVIDIA H200)`."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
