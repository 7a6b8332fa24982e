"""Posteriors pushed to a hub and loaded from it."""

from pathlib import Path

import torch

from laplace_lora import KronLoraLaplace
from laplace_lora.storage.files import CONFIG, TENSORS
from support.batches import token_batch
from support.posteriors import fitted

BATCH = token_batch((4, 2, 5), seed=3)


def test_push_to_hub_uploads_both_files(monkeypatch):
    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            calls["repo"] = (repo_id, private, exist_ok)

        def upload_folder(self, repo_id, folder_path, **kwargs):
            calls["files"] = {p.name for p in Path(folder_path).iterdir()}
            calls["kwargs"] = kwargs
            return "address"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    la = fitted()
    assert la.push_to_hub("me/adapter", token="t", private=True, revision="v1") == "address"
    assert calls["repo"] == ("me/adapter", True, True) and calls["token"] == "t"
    assert calls["files"] == {TENSORS, CONFIG}
    assert calls["kwargs"] == {"commit_message": "Upload Laplace posterior", "revision": "v1"}


def test_a_repository_name_is_looked_up_on_the_hub(monkeypatch, tmp_path):
    la = fitted()
    la.save_pretrained(tmp_path, precision="exact")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: tmp_path / name)
    again = KronLoraLaplace.from_pretrained(la.logits_model, "me/adapter")
    assert torch.equal(again(BATCH), la(BATCH))
