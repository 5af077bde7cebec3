"""Which device is taken, and that nothing of a model or a batch stays behind when it moves there."""

from collections.abc import Iterator
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

import lora_lite
from blip3_lite import collate
from blip3_lite.device import choose_device, device_words

META = torch.device("meta")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch):
    """Number of GPUs, LOCAL_RANK → a host like that."""

    def make(num_gpus: int, local_rank: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if local_rank is not None:
            monkeypatch.setenv("LOCAL_RANK", local_rank)

    return make


@pytest.mark.parametrize(
    ("num_gpus", "local_rank", "wish", "expected"),
    [
        (0, None, "auto", "cpu"),
        (0, "1", "auto", "cpu"),
        (1, None, "auto", "cuda:0"),
        (2, "1", "auto", "cuda:1"),
        (2, "1", "cuda", "cuda:1"),
        (2, "1", "cpu", "cpu"),
        (1, "7", "cpu", "cpu"),
    ],
)
def test_the_device_is_this_processes_gpu_where_there_is_one(host, num_gpus, local_rank, wish, expected) -> None:
    host(num_gpus, local_rank)
    assert choose_device(wish) == torch.device(expected)


def test_a_gpu_that_is_not_there_is_named(host, monkeypatch: pytest.MonkeyPatch) -> None:
    host(0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ValueError, match=r"device: expected a CUDA device, got none .* a build of torch with CUDA, or"):
        choose_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(ValueError, match=r"see whether nvidia-smi lists one .* or use --device cpu"):
        choose_device("cuda")


@pytest.mark.parametrize("local_rank", ["2", "one"])
def test_more_processes_than_gpus_are_named(host, local_rank: str) -> None:
    host(2, local_rank)
    with pytest.raises(ValueError, match=rf"got LOCAL_RANK '{local_rank}' and 2 GPUs; start 2 processes"):
        choose_device("auto")


def test_the_cpu_has_no_other_name() -> None:
    assert device_words(torch.device("cpu")) == "cpu"


def tensors_in(value: object) -> Iterator[Tensor]:
    """All tensors in a value, in lists, tuples, sets and dictionaries too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple, set)):
        for part in value:
            yield from tensors_in(part)


def strays(model: nn.Module, device: torch.device) -> list[str]:
    """Modules that hold a tensor anywhere else than on `device`, registered or not."""
    return [
        name
        for name, part in model.named_modules()
        if any(t.device != device for t in tensors_in(list(vars(part).values())))
    ]


def test_a_batch_moves_with_every_tensor(tiny_model, tiny_processor, conversations) -> None:
    batch = collate([tiny_processor.encode(sample) for sample in conversations])
    num_tiles, num_patches = batch.valid.shape
    batch = replace(
        batch, features=torch.zeros(num_tiles, num_patches, 16), feature_order=torch.arange(num_tiles * num_patches)
    )
    moved = batch.to(META)
    held = {item.name for item in fields(batch) if isinstance(getattr(batch, item.name), Tensor)}
    assert held == {item.name for item in fields(batch)} - {"sample_ids", "tiles_per_image"}
    assert {name: getattr(moved, name).device for name in held} == dict.fromkeys(held, META)
    assert (moved.sample_ids, moved.tiles_per_image) == (batch.sample_ids, batch.tiles_per_image)


@pytest.mark.parametrize("adapters", [None, "lora", "dora"])
def test_a_model_moves_with_every_tensor(tiny_model, tiny_processor, conversations, adapters) -> None:
    if adapters is not None:
        cfg = lora_lite.LoraConfig(rank=2, alpha=4, targets=("qkv_proj",), use_dora=adapters == "dora")
        lora_lite.attach(tiny_model.lang_model, cfg)
    # With what a step leaves in it.
    tiny_model.loss_sum(collate([tiny_processor.encode(sample) for sample in conversations])).backward()
    tiny_model.to(META)
    assert strays(tiny_model, META) == []
    # The control: a tensor that is no buffer stays behind.
    tiny_model.lang_model.model.table = {"rows": [torch.zeros(1)]}
    assert strays(tiny_model, META) == ["lang_model.model"]
