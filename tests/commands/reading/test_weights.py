"""Files of an adapter or its base model that are missing or damaged are named, with a way out."""

import json
import shutil

import huggingface_hub
import pytest
import torch

from laplace_lora.commands.reading.adapter import load_adapter
from support.command_line import refused


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def named(folder, base):
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "base_model_name_or_path": str(base)}))


@pytest.mark.parametrize("base", ["/no/such/base", "../gone", "gone", "me/gone"])
def test_a_base_model_that_is_gone(adapter, data, monkeypatch, base):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = adapter()
    own = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    named(folder, base)
    message = refused("doctor", folder)
    assert f"the base model {base}, as {folder} names it, was not found" in message
    assert ". Give it by --base" in message
    assert ("from the hub" in message) == (base in ("gone", "me/gone"))
    message = refused("doctor", folder, "--base", base)
    assert f"the base model {base}, as --base names it" in message
    assert load_adapter(str(folder), base=own, device="cpu").outputs == 2


def test_an_adapter_without_weights(adapter):
    folder = adapter()
    (folder / "adapter_model.safetensors").unlink()
    message = refused("doctor", folder)
    assert f"{folder} has no weights: neither adapter_model.safetensors nor" in message


def test_damaged_files_are_named(adapter, made, tmp_path):
    folder, base = adapter(), shutil.copytree(made("classifier").parent / "base", tmp_path / "base")
    file = cut(base / "model.safetensors")
    assert f"{file} is damaged (" in refused("doctor", folder, "--base", base)
    file = folder / "adapter_model.safetensors"
    torch.save({"a": torch.zeros(99)}, folder / "adapter_model.bin")
    assert f"{cut(file)} is damaged (" in refused("doctor", folder)
    file.unlink()
    for part in (cut(folder / "adapter_model.bin"), folder / "adapter_model.bin"):
        message = refused("doctor", folder)
        assert f"{part} is damaged (" in message and "copy or download it again" in message
        part.write_bytes(b"")
    file = cut(folder / "adapter_config.json")
    assert f"adapter_config.json of {folder} is damaged" in refused("doctor", folder)
