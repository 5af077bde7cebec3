"""What hosts must have alike before a run of several processes begins: each difference is found on every rank."""

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from trainer_lite import Processes


@pytest.mark.parametrize("setting", ["ratios", "epochs", "skip_limits"])
def test_data_files_that_differ_in_more_than_sources_make_other_orders(parse, setting: str) -> None:
    from interleave_data import SkipLimits
    from train_agreement import order_fingerprint
    from train_stream import StageData

    stage = parse("sft").stage
    others = {"ratios": (1.0, 2.0), "epochs": (1.0, None), "skip_limits": SkipLimits(max_share=0.5)}
    changed: dict[str, Any] = {"ratios": (1.0, 1.0), setting: others[setting]}
    fingerprints = {
        order_fingerprint(stage, StageData([], ratios=(1.0, 1.0))),
        order_fingerprint(stage, StageData([], **changed)),
        order_fingerprint(replace(stage, train=replace(stage.train, seed=9)), StageData([], ratios=(1.0, 1.0))),
    }
    assert len(fingerprints) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
def test_one_other_bit_makes_other_weights(parse, dtype: torch.dtype) -> None:
    from train_agreement import weights_fingerprint

    model, other = nn.Module(), nn.Module()
    numbers = torch.arange(1, 15).reshape(2, 7).to(dtype)
    # Laid out otherwise in memory, which makes no difference.
    model.register_buffer("table", numbers)
    other.register_buffer("table", numbers.T.contiguous().T)
    assert weights_fingerprint(model) == weights_fingerprint(other)
    numbers.view(torch.uint8)[1, 3] ^= 1
    assert weights_fingerprint(model) != weights_fingerprint(other)


def test_a_run_compares_code_settings_data_order_weights_and_folder(train, monkeypatch, capsys, toy_flags) -> None:
    """As the second of two ranks, on a host whose disk is another one."""
    import train_agreement
    import train_run

    told: list[Mapping[str, str]] = []

    class Second(Processes):
        def share(self, value: object) -> list[object]:
            return [value, value]

        def agree(self, facts: Mapping[str, str]) -> None:
            told.append(facts)
            if any(what.startswith("not there") for what in facts.values()):
                raise ValueError(f"run folder: {facts}")

    @contextmanager
    def joined(*_: object):
        yield Second(1, 2)

    monkeypatch.setattr(train_run, "join", joined)
    monkeypatch.setattr(train_agreement, "_SEEN_WITHIN_S", 0.0)
    assert train("sft", *toy_flags, "--accumulation-steps", "2", "--world-samples", "20") == 2
    assert "--out has to be on a disk that all hosts share" in capsys.readouterr().err
    compared = [sorted(facts) for facts in told]
    assert compared == [["code", "data", "kind of device", "order", "settings"], ["weights"], ["run folder runs/sft"]]
    assert not Path("runs").exists()


def test_parameters_in_parts_count_as_wholes(parse) -> None:
    from train_terminal import num_parameters

    # As DeepSpeed leaves one under ZeRO-3.
    part = nn.Parameter(torch.empty(0))
    part.ds_numel = 35  # type: ignore[attr-defined]
    assert num_parameters([part, nn.Parameter(torch.empty(2, 3))]) == 41
