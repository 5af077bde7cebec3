"""Checkpoints: whole or not there, strict, round trip bit for bit."""

import json
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_lite
from blip3_lite import (
    Blip3,
    CheckpointError,
    collate,
    load_model,
    load_tensors,
    newest_checkpoint,
    read_manifest,
    save_model,
    write_folder,
)
from blip3_lite.checkpoint import read_config


@pytest.fixture
def saved(tmp_path: Path, tiny_model, tiny_processor) -> Path:
    save_model(tmp_path / "model", tiny_model, tiny_processor, manifest={"step": 7})
    return tmp_path / "model"


def _rewrite(folder: Path, change) -> None:
    """Change the tensors and make the manifest fit, so that only the strict load can notice."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    config, tokenizer = (folder / "config.json").read_bytes(), (folder / "tokenizer.json").read_bytes()
    write_folder(
        folder,
        {
            "config.json": lambda path: path.write_bytes(config),
            "tokenizer.json": lambda path: path.write_bytes(tokenizer),
            "model.safetensors": lambda path: save_file(tensors, path),
        },
        {},
    )


def test_round_trip_gives_equal_tensors_ids_and_hidden_states(saved, tiny_model, tiny_processor, conversations) -> None:
    loaded = load_model(saved)
    wanted = tiny_model.state_dict()
    assert loaded.model.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.model.state_dict().items())
    ours, theirs = (p.encode(conversations[2]) for p in (tiny_processor, loaded.processor))
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(tiny_model(collate([ours])), loaded.model(collate([theirs])))
    assert read_manifest(saved)["step"] == 7


def test_missing_extra_and_misshaped_tensors_are_all_listed(saved) -> None:
    """(T24)"""

    def change(tensors):
        del tensors["vision_tokenizer.latents"]
        tensors["lang_model.surprise"] = torch.zeros(1)
        tensors["lang_model.model.norm.weight"] = torch.zeros(5)

    _rewrite(saved, change)
    with pytest.raises(CheckpointError) as caught:
        load_model(saved)
    message = str(caught.value)
    assert "missing (1): vision_tokenizer.latents" in message
    assert "unexpected (1): lang_model.surprise" in message
    assert "lang_model.model.norm.weight: expected [24], got [5]" in message


def test_nothing_is_loaded_where_one_tensor_does_not_fit(saved, tiny_config) -> None:
    _rewrite(saved, lambda tensors: tensors.pop("vision_tokenizer.latents"))
    model = Blip3(tiny_config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError):
        load_tensors(model, saved / "model.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unknown_config_key_is_refused(saved) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["model"]["surprise"] = 1
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="surprise"):
        read_config(saved)


def test_connector_and_tiling_are_tagged_in_the_config(saved) -> None:
    model = json.loads((saved / "config.json").read_text())["model"]
    assert model["connector"]["kind"] == "perceiver"
    assert model["tiling"]["kind"] == "anyres"


def test_adapters_are_attached_again(tmp_path, tiny_model, tiny_processor, conversations) -> None:
    lora = lora_lite.LoraConfig(rank=2, alpha=4, targets=("qkv_proj",))
    lora_lite.attach(tiny_model.lang_model, lora)
    for parameter in lora_lite.lora_parameters(tiny_model.lang_model):
        torch.nn.init.normal_(parameter)
    save_model(tmp_path / "model", tiny_model, tiny_processor, lora=lora)
    batch = collate([tiny_processor.encode(conversations[0])])
    assert torch.equal(load_model(tmp_path / "model").model(batch), tiny_model(batch))


LORA = lora_lite.LoraConfig(rank=2, alpha=4, targets=("qkv_proj",))


def test_adapters_other_than_those_named_are_not_saved(tmp_path, tiny_model, tiny_processor) -> None:
    """Each would be loaded as another model, or not at all."""

    def refused(lora, match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            save_model(tmp_path / "model", tiny_model, tiny_processor, lora=lora)
        assert list(tmp_path.iterdir()) == []

    refused(LORA, "got none; attach them")
    lora_lite.attach(tiny_model.lang_model, LORA)
    refused(None, r"expected none .* got 2, the first at lang_model\.model\.layers\.0\.self_attn\.qkv_proj")
    refused(msgspec.structs.replace(LORA, rank=3, alpha=6), "expected rank 3, scale 2, got rank 2, scale 2")
    refused(msgspec.structs.replace(LORA, alpha=2), "expected rank 2, scale 1, got rank 2, scale 2")
    lora_lite.merge(tiny_model)
    refused(LORA, "expected it apart, got it merged")
    lora_lite.unmerge(tiny_model)
    lora_lite.attach(tiny_model.vision_tokenizer, msgspec.structs.replace(LORA, targets=("to_q",)))
    refused(LORA, r"vision_tokenizer\..*: expected adapters in lang_model only")


def test_loaded_adapters_merge_into_frozen_weights(tmp_path, tiny_model, tiny_processor) -> None:
    lora_lite.attach(tiny_model.lang_model, LORA)
    save_model(tmp_path / "model", tiny_model, tiny_processor, lora=LORA)
    loaded = load_model(tmp_path / "model").model
    lora_lite.merge_and_remove(loaded)
    assert [name for name, parameter in loaded.named_parameters() if parameter.requires_grad] == []


def test_loading_draws_no_random_number(saved) -> None:
    before = torch.get_rng_state()
    load_model(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_tied_head_is_saved_once(tmp_path, tiny_config, tiny_processor) -> None:
    lm = msgspec.structs.replace(tiny_config.lm, is_head_tied=True)
    model = Blip3(msgspec.structs.replace(tiny_config, lm=lm))
    tiny_processor = type(tiny_processor)(model.cfg, tiny_processor.tokenizer)
    save_model(tmp_path / "model", model, tiny_processor)
    assert "lang_model.lm_head.weight" not in load_file(tmp_path / "model/model.safetensors")
    assert torch.equal(load_model(tmp_path / "model").model.lang_model.head_weight, model.lang_model.head_weight)


def test_a_failed_write_leaves_the_old_checkpoint_and_no_rubbish(saved) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_folder(saved, {"a": fail}, {})
    assert load_model(saved).config.lora is None
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_failed_last_rename_puts_the_old_checkpoint_back(saved, monkeypatch) -> None:
    rename = Path.rename

    def fail_for_the_new_one(self: Path, target: Path) -> Path:
        if target == saved and self.name != ".model.writing-old":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="Input/output"):
        write_folder(saved, {"a": lambda path: path.write_bytes(b"new")}, {})
    assert load_model(saved).config.lora is None
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path, tiny_model, tiny_processor) -> None:
    (tmp_path / "run").mkdir()
    save_model(tmp_path / "run", tiny_model, tiny_processor)
    (tmp_path / "run/MANIFEST.json").unlink()
    (tmp_path / "file").write_bytes(b"mine")
    for name, got in (("run", "a folder without MANIFEST.json that holds config.json"), ("file", "a file")):
        with pytest.raises(CheckpointError, match=rf"an older checkpoint, got {got}"):
            save_model(tmp_path / name, tiny_model, tiny_processor)
    assert (tmp_path / "run/config.json").is_file()
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_what_a_killed_writer_left_is_cleaned_or_put_back(saved) -> None:
    (saved.parent / ".model.writing-123").mkdir()
    write_folder(saved, {"a": lambda path: path.write_bytes(b"new")}, {})
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    # Killed between its two renames: the old folder waits under another name.
    saved.rename(saved.parent / ".model.writing-old")
    with pytest.raises(ZeroDivisionError):
        write_folder(saved, {"a": lambda path: 1 / 0}, {})
    assert (saved / "a").read_bytes() == b"new"


def test_newest_checkpoint_is_the_one_written_last(tmp_path, tiny_model, tiny_processor) -> None:
    for name in ("b", "a"):
        save_model(tmp_path / name / "model", tiny_model, tiny_processor)
    assert newest_checkpoint(tmp_path) == tmp_path / "a/model"
    with pytest.raises(CheckpointError, match="apps/train"):
        newest_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_or_cut_file_is_named(saved, name: str) -> None:
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"{name}: expected {len(data)} bytes"):
        load_model(saved)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: missing"):
        load_model(saved)


def _edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    change(manifest["files"])
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("key", ["bytes", "sha256"])
def test_a_manifest_entry_without_a_field_is_refused(saved, key: str) -> None:
    _edit_manifest(saved, lambda files: files["config.json"].pop(key))
    with pytest.raises(CheckpointError, match=rf"missing required field `{key}`"):
        load_model(saved)


@pytest.mark.parametrize(("name", "read"), [("config.json", read_config), ("MANIFEST.json", read_manifest)])
def test_json_that_is_not_utf8_is_refused(saved, name: str, read) -> None:
    (saved / name).write_bytes((saved / name).read_bytes().replace(b"tokenizer", b"\xff"))
    with pytest.raises(CheckpointError, match="can't decode byte 0xff"):
        read(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_the_manifest_does_not_list_is_not_loaded(saved, name: str) -> None:
    _edit_manifest(saved, lambda files: files.pop(name))
    with pytest.raises(CheckpointError, match=rf"expected {name} among the files of its manifest"):
        load_model(saved)


@pytest.mark.parametrize("name", ["../tokenizer.json", "/etc/hosts", "a/b.json", "..", ""])
def test_a_tokenizer_outside_the_folder_is_refused(saved, name: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**config, "tokenizer_file": name}))
    with pytest.raises(CheckpointError, match="expected a plain file name"):
        read_config(saved)
