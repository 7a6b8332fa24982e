"""Sharing a saved posterior on the Hugging Face hub."""

from __future__ import annotations

from typing import Any


def upload(folder: str, repo_id: str, **kwargs: Any) -> str:
    """Upload a folder's files to a repository on the hub, beside an adapter that is there.

    Args:
        folder: Where the files are.
        repo_id: ``"user/name"``; created if missing.
        **kwargs: Arguments of `huggingface_hub.HfApi.upload_folder`, such as ``token``,
            ``commit_message`` and ``revision``; ``private`` goes to ``create_repo``.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True)
    options = {"commit_message": "Upload Laplace posterior", **kwargs}
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))
