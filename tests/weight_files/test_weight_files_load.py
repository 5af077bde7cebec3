"""Loads that are strict and whole, from files of other layouts."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weight_files import (
    Piece,
    SafetensorsFiles,
    TensorDict,
    WeightsError,
    as_they_are,
    load_tensors,
    open_pickled,
    plan_shards,
    same_names,
    shard_writers,
    unique_tensors,
)


def tensors() -> dict[str, Tensor]:
    return {"a": torch.arange(12.0).view(3, 4), "b": -torch.arange(8.0).view(2, 4), "s": torch.tensor(7.0)}


def write_shards(folder: Path, max_shard_bytes: int = 48) -> None:
    for name, write in shard_writers(as_they_are(tensors()), max_shard_bytes=max_shard_bytes).items():
        write(folder / name)


def test_pieces_are_stacked_sliced_and_transformed(tmp_path: Path) -> None:
    write_shards(tmp_path)
    target = torch.zeros(4, 4, dtype=torch.bfloat16)
    scalar = torch.tensor(0.0)
    recipes = {"x": [Piece("b"), Piece("a", rows=(1, 3), transform=lambda rows: rows.flip(0))], "y": [Piece("s")]}
    with SafetensorsFiles(tmp_path) as source:
        load_tensors(source, {"x": target, "y": scalar}, recipes)
    assert target.tolist() == [[0, -1, -2, -3], [-4, -5, -6, -7], [8, 9, 10, 11], [4, 5, 6, 7]]
    assert scalar.item() == 7


def test_all_differences_are_listed_and_nothing_is_written() -> None:
    """(T24)"""
    kept, wrong = torch.zeros(3, 4), torch.zeros(5)
    recipes = {"a": [Piece("a")], "b": [Piece("b")], "c": [Piece("gone")]}
    with pytest.raises(WeightsError) as caught:
        load_tensors(TensorDict(tensors()), {"a": kept, "b": wrong, "c": wrong}, recipes)
    text = str(caught.value)
    assert "missing (1): gone" in text
    assert "unexpected (1): s" in text
    assert "b: expected [5], got [2, 4]" in text
    assert not kept.any()


def test_allowed_missing_and_ignored_are_left(tmp_path: Path) -> None:
    """(T24)"""
    target = {"a": torch.zeros(3, 4), "new.weight": torch.ones(2)}
    left = load_tensors(TensorDict(tensors()), target, {"a": [Piece("a")]}, ignored=["b", "s"], allow_missing=["new.*"])
    assert left == ["new.weight"]
    assert target["a"].equal(tensors()["a"])


def test_a_tied_tensor_is_asked_for_once() -> None:
    module = nn.Module()
    module.first = nn.Parameter(torch.zeros(2))
    module.second = module.first
    assert list(unique_tensors(module)) == ["first"]
    assert same_names(module, "x.") == {"first": [Piece("x.first")]}


def test_shards_keep_order_and_size() -> None:
    plan = plan_shards(as_they_are({str(k): torch.zeros(size) for k, size in enumerate((3, 1, 9, 2))}), 16)
    assert [[tensor.name for tensor in shard] for shard in plan] == [["0", "1"], ["2"], ["3"]]


@pytest.mark.parametrize("fault", ["missing", "cut", "strange", "moved"])
def test_damaged_shards_are_refused_by_name(tmp_path: Path, fault: str) -> None:
    write_shards(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    if fault == "missing":
        shards[1].unlink()
    elif fault == "cut":
        shards[1].write_bytes(shards[1].read_bytes()[:-3])
    elif fault == "strange":
        index = next(tmp_path.glob("*.json"))
        index.write_text(index.read_text().replace(shards[1].name, f"../{shards[1].name}"))
    else:
        save_file({"b": torch.zeros(2, 4), "a": torch.zeros(3, 4)}, shards[1])
    with pytest.raises(WeightsError, match=r"\.\./" if fault == "strange" else shards[1].name):
        SafetensorsFiles(tmp_path)


def test_a_folder_with_two_sets_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="neither"):
        SafetensorsFiles(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(WeightsError, match=r"x\.safetensors, y\.safetensors"):
        SafetensorsFiles(tmp_path)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("code ran",)


def test_a_pickle_with_code_is_refused_unrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """(T24)"""
    torch.save({"weight": torch.zeros(1), "bad": Payload()}, tmp_path / "bad.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload()))
    for name in ("bad.pt", "plain.pt"):
        with pytest.raises(WeightsError, match="nothing in it was run"):
            open_pickled(tmp_path / name)
    assert "code ran" not in capsys.readouterr().out
    # The control: whoever trusts the file runs it.
    torch.load(tmp_path / "bad.pt", weights_only=False)
    assert "code ran" in capsys.readouterr().out


def test_a_pickled_state_is_found_inside_its_checkpoint(tmp_path: Path) -> None:
    torch.save({"epoch": 1, "model_state_dict": {"module.a": torch.ones(2)}}, tmp_path / "train.pt")
    source = open_pickled(tmp_path / "train.pt", prefix="module.")
    assert source.read("a").tolist() == [1, 1]


PEAK = """
import sys
from pathlib import Path
from weight_files import SafetensorsFiles

def held(kind):
    return int(Path("/proc/self/status").read_text().split(kind)[1].split()[0])

if sys.argv[2] == "mapped":
    from safetensors import safe_open
    files = safe_open(sys.argv[1], framework="pt").__enter__()
    names, read = list(files.keys()), files.get_tensor
else:
    files = SafetensorsFiles(sys.argv[1])
    names, read = list(files.tensors), files.read
# Once without counting: code is loaded too.
assert (read(names[0]) == len(names[0])).all()
before, peak = held("VmRSS:"), 0
for name in names[1:]:
    assert (read(name) == len(name)).all()
    peak = max(peak, held("VmRSS:") - before)
print(peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_that_is_read_through_is_never_held_whole(tmp_path: Path) -> None:
    """Sixteen tensors of 8 MiB, a few at a time, as the allocator keeps some; the control maps them."""
    file = tmp_path / "w.safetensors"
    save_file({"a" * (n + 1): torch.full((1024, 2048), n + 1.0) for n in range(16)}, file)
    peaks = {}
    for mode in ("read", "mapped"):
        command = [sys.executable, "-c", PEAK, str(file), mode]
        peaks[mode] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peaks["read"] <= 6 * 8192
    assert peaks["mapped"] >= 14 * 8192


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool, torch.float64])
def test_tensors_of_a_file_equal_the_format_s_own_reader(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = {"m": torch.randn(5, 3, 2), "empty": torch.zeros(0, 4), "one": torch.tensor(3.0), "v": torch.randn(7)}
    save_file({name: value.to(dtype) for name, value in values.items()}, tmp_path / "w.safetensors", {"note": "x"})
    expected = load_file(tmp_path / "w.safetensors")
    with SafetensorsFiles(tmp_path) as files:
        for name, value in expected.items():
            assert files.read(name).equal(value)
            assert files.read(name).dtype == dtype
        assert files.read("m", (1, 3)).equal(expected["m"][1:3])
        (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-3])
        with pytest.raises(WeightsError, match=r"expected \d+ bytes of"):
            [files.read(name) for name in expected]
